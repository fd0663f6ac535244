// The four ops of the CUDA waist on the CPU (cuda_on_cpu.h), in every structure, link and dtype, around the sizes at
// which rows are walked differently, against differences in long double of the loss as docs/math.md section 1 defines
// it: the product of a gradient with a random direction, so that every number of it counts. And bits: in every order
// of threads, in place, in every run.
//
// With the argument `few` every kernel is run, but not at every size: for sanitizers that take their time.
#include "../../csrc/l2t.h"
#include "cuda_on_cpu.h"
#include "problem.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

bool few = false;

// ---- truth ----

// A direction in a stretch of one part, and the products of the ops' outputs with it.
struct Probe {
  int part;
  size_t begin;
  Point d;
  long double grad = 0, grad_of_ones = 0, vjp = 0, jvp = 0, vjp_of_logits = 0;
};

struct Truth {
  const Problem& problem;
  Point x, v;
  long double value = 0;
  std::vector<Probe> probes;

  // x and v have few enough bits for every dtype to hold them.
  explicit Truth(const Problem& problem)
      : problem(problem),
        x(Memory<float, l2t::bfloat16>(problem, normals(problem.size(), 0.7)).point()),
        v(Memory<float, l2t::bfloat16>(problem, normals(problem.size(), 0.7)).point()) {
    // A sum over many classes of the size of one.
    if (problem.c > 32)
      for (int part : {WEIGHT, RIGHT})
        for (size_t i = problem.start[part]; i < problem.start[part + 1]; ++i)
          if (problem.structure != L2T_DIAGONAL) x[i] /= 32;
    value = problem.total_loss(x);
    for (int part = V_LOSS; part < PARTS; ++part) {
      const size_t begin = problem.start[part], size = problem.start[part + 1] - begin;
      if (size == 0) continue;
      probes.push_back({part, begin, normals(size)});
      if (part == LOGITS && problem.n > 1 && problem.n < 8)
        for (size_t i = 0; i < problem.n; ++i)
          probes.push_back({part, begin + i * problem.c, normals(problem.c)});
    }
    const long double h = 1e-5L;
    const auto moved = [&](long double step, int from, int to) {
      Point at = x;
      for (size_t i = problem.start[from]; i < problem.start[to]; ++i) at[i] += step * v[i];
      return at;
    };
    Point ones = x;
    std::fill_n(ones.begin(), problem.losses, 1);
    Point up = moved(h, V_LOSS, PARTS), down = moved(-h, V_LOSS, PARTS);
    Point up_fixed = moved(h, LOGITS, PARTS), down_fixed = moved(-h, LOGITS, PARTS);
    Point up_logits = moved(h, LOGITS, WEIGHT), down_logits = moved(-h, LOGITS, WEIGHT);
    for (Probe& probe : probes) {
      const auto slope = [&](Point& at) {
        const Point kept(at.begin() + probe.begin, at.begin() + probe.begin + probe.d.size());
        const auto here = [&](long double step) {
          for (size_t i = 0; i < kept.size(); ++i) at[probe.begin + i] = kept[i] + step * probe.d[i];
          return problem.total_loss(at);
        };
        const long double difference = (here(h) - here(-h)) / (2 * h);
        std::copy(kept.begin(), kept.end(), at.begin() + probe.begin);
        return difference;
      };
      probe.grad = slope(x);
      probe.grad_of_ones = slope(ones);
      probe.jvp = (slope(up) - slope(down)) / (2 * h);
      probe.vjp = (slope(up_fixed) - slope(down_fixed)) / (2 * h);
      probe.vjp_of_logits = (slope(up_logits) - slope(down_logits)) / (2 * h);
    }
  }
};

// ---- the ops of one problem in one dtype ----

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T, class S>
struct Ops {
  const Problem& problem;
  const Truth& truth;
  const int dtype;
  std::string name;
  l2t_rows rows;
  Memory<T, S> inputs, direction;
  std::vector<T> loss, stats;
  int status = L2T_OK;

  Ops(const Problem& problem, const Truth& truth, int dtype, const std::string& name)
      : problem(problem),
        truth(truth),
        dtype(dtype),
        name(name),
        rows(problem.rows(dtype)),
        inputs(problem, truth.x),
        direction(problem, truth.v),
        loss(problem.losses, T(NAN)),
        stats(3 * problem.n, T(NAN)) {}

  // Each call has memory of its own, full of NaN and of the exact size.
  std::unique_ptr<void, Free> workspace() const {
    const size_t bytes = l2t_cuda_workspace(&rows);
    void* memory = std::aligned_alloc(256, bytes);
    std::memset(memory, 0xff, bytes);
    return std::unique_ptr<void, Free>(memory);
  }

  l2t_tensors tensors() { return inputs.template record<l2t_tensors>(); }

  Memory<T, S> unwritten() const { return Memory<T, S>(problem, Point(problem.size(), NAN)); }

  void value(const l2t_tensors& in, S* d_logits) {
    status |= l2t_cuda_value(&rows, &in, loss.data(), stats.data(), d_logits, workspace().get(), nullptr);
  }

  // The rest of the record goes where `in_place` says, d_logits onto the logits.
  Memory<T, S> grad(const l2t_tensors& in, S* in_place = nullptr) {
    Memory<T, S> d = unwritten();
    l2t_outputs out = d.template record<l2t_outputs>();
    if (in_place != nullptr) out.logits = in_place;
    status |= l2t_cuda_grad(&rows, &in, stats.data(), &out, workspace().get(), nullptr);
    if (in_place != nullptr) d.logits.assign(in_place, in_place + problem.n * problem.c);
    return d;
  }

  Memory<T, S> vjp(const l2t_tensors& in, l2t_tensors cotangents, S* in_place = nullptr) {
    Memory<T, S> d = unwritten();
    l2t_outputs out = d.template record<l2t_outputs>();
    cotangents.v_loss = nullptr;
    if (in_place != nullptr) out.logits = in_place;
    status |= l2t_cuda_grad_vjp(&rows, &in, stats.data(), &cotangents, &out, workspace().get(), nullptr);
    if (in_place != nullptr) d.logits.assign(in_place, in_place + problem.n * problem.c);
    return d;
  }

  Memory<T, S> jvp(const l2t_tensors& in, const l2t_tensors& tangents) {
    Memory<T, S> d = unwritten();
    l2t_outputs out = d.template record<l2t_outputs>();
    out.v_loss = nullptr;
    status |= l2t_cuda_grad_jvp(&rows, &in, stats.data(), &tangents, &out, workspace().get(), nullptr);
    return d;
  }

  // An output of the storage's type is off by half its last bit; the rest by roundings of the arithmetic, and by the
  // differences that are the truth.
  double bound(int part) const {
    if (part == LOGITS && dtype == L2T_BFLOAT16) return 1e-2;
    if (part == LOGITS && dtype == L2T_FLOAT16) return 1.5e-3;
    return dtype == L2T_FLOAT64 ? 1e-5 : 1e-4;
  }

  // Worst over the probes of error / bound.
  void expect(const std::string& op, const Memory<T, S>& got, long double Probe::* product, int first,
              int last) {
    const Point flat = got.point();
    double worst = 0;
    int worst_part = first;
    for (const Probe& probe : truth.probes) {
      if (probe.part < first || probe.part > last) continue;
      long double sum = 0, squares = 1e-4L;
      for (size_t i = 0; i < probe.d.size(); ++i) {
        const long double term = flat[probe.begin + i] * probe.d[i];
        sum += term, squares += term * term;
      }
      const double error =
          static_cast<double>(std::fabs(sum - probe.*product) / std::sqrt(squares)) / bound(probe.part);
      if (!(error <= worst)) worst = error, worst_part = probe.part;
      if (std::isnan(worst)) break;
    }
    check(name + ", " + op + ", worst in part " + std::to_string(worst_part), worst, 1);
  }

  template <class X>
  void same(const std::string& what, const std::vector<X>& got, const std::vector<X>& expected) {
    const bool differ =
        got.size() != expected.size() ||
        (!got.empty() && std::memcmp(got.data(), expected.data(), got.size() * sizeof(X)) != 0);
    check(name + ", " + what + ", bits", differ, 0);
  }

  void same(const std::string& what, const Memory<T, S>& got, const Memory<T, S>& expected) {
    same(what + ", d_logits", got.logits, expected.logits);
    same(what + ", coefficients", got.flat, expected.flat);
  }

  void run() {
    // value, and the gradient of the sum of the losses that it makes in the same pass
    value(tensors(), nullptr);
    const std::vector<T> loss_alone = loss, stats_alone = stats;
    std::vector<S> d_logits(inputs.logits.size()), again = inputs.logits;
    value(tensors(), d_logits.data());
    same("loss with d_logits", loss, loss_alone);
    long double total = 0;
    for (size_t l = 0; l < problem.losses; ++l) total += truth.x[l] * loss[l];
    if (problem.n > 0)
      check(name + ", value",
            static_cast<double>(std::fabs(total - truth.value) / std::fmax(std::fabs(truth.value), 1.0L)),
            dtype == L2T_FLOAT64 ? 1e-12 : 2e-5);
    l2t_tensors in = tensors();
    in.v_loss = nullptr;
    Memory<T, S> d = grad(in), d_of_value = d;
    expect("grad without v_loss", d, &Probe::grad_of_ones, LOGITS, SCALE);
    d_of_value.logits = d_logits;
    expect("d_logits of value", d_of_value, &Probe::grad_of_ones, LOGITS, LOGITS);

    // ... over the logits
    l2t_tensors in_place = tensors();
    in_place.logits = again.data();
    value(in_place, again.data());
    same("value in place", again, d_logits);
    same("stats in place", stats, stats_alone);

    const Memory<T, S> d_grad = grad(tensors());
    expect("grad", d_grad, &Probe::grad, LOGITS, SCALE);
    const l2t_tensors v = direction.template record<l2t_tensors>();
    const Memory<T, S> d_vjp = vjp(tensors(), v), d_jvp = jvp(tensors(), v);
    expect("grad_vjp", d_vjp, &Probe::vjp, V_LOSS, SCALE);
    expect("grad_jvp", d_jvp, &Probe::jvp, LOGITS, SCALE);
    again = inputs.logits;
    same("grad in place", grad(in_place, again.data()), d_grad);
    again = inputs.logits;
    same("grad_vjp in place", vjp(in_place, v, again.data()), d_vjp);

    // only the logits move, and only their gradient is wanted: the step of an unrolled reverse pass
    l2t_tensors v_logits{};
    v_logits.logits = v.logits;
    d = vjp(tensors(), v_logits);
    expect("grad_vjp of logits", d, &Probe::vjp_of_logits, V_LOSS, SCALE);
    std::vector<S> alone(d.logits.size());
    l2t_outputs out{};
    out.logits = alone.data();
    in = tensors();
    status |= l2t_cuda_grad_vjp(&rows, &in, stats.data(), &v_logits, &out, workspace().get(), nullptr);
    same("grad_vjp, logits alone", alone, d.logits);

    // logits in rows that are longer than C, and not aligned
    std::vector<S> apart(1);
    S nan;
    l2t::narrow(T(NAN), nan);
    for (size_t i = 0; i < problem.n; ++i) {
      apart.insert(apart.end(), &inputs.logits[i * problem.c], &inputs.logits[i * problem.c] + problem.c);
      apart.insert(apart.end(), 3, nan);
    }
    rows.logits_stride = problem.c + 3;
    in.logits = apart.data() + 1;
    value(in, d_logits.data());
    d_of_value.logits = d_logits;
    expect("d_logits of value, rows apart", d_of_value, &Probe::grad_of_ones, LOGITS, LOGITS);
    expect("grad, rows apart", grad(in), &Probe::grad, LOGITS, SCALE);
    expect("grad_jvp, rows apart", jvp(in, v), &Probe::jvp, LOGITS, SCALE);
    rows.logits_stride = problem.c;

    rows.atomics = 1;
    expect("grad, atomics", grad(tensors()), &Probe::grad, LOGITS, SCALE);
    expect("grad_vjp, atomics", vjp(tensors(), v), &Probe::vjp, V_LOSS, SCALE);
    rows.atomics = 0;

    if (orders) {
      const std::vector<const char*>& names = l2t_shim::orders();
      for (size_t order = 1; order < names.size(); order += few ? 3 : 1) {
        l2t_shim::use_order(names[order]);
        value(tensors(), d_logits.data());
        same(std::string("value, ") + names[order], loss, loss_alone);
        same(std::string("grad, ") + names[order], grad(tensors()), d_grad);
        same(std::string("grad_jvp, ") + names[order], jvp(tensors(), v), d_jvp);
      }
      l2t_shim::use_order(names[0]);
    }
    check(name + ", status", status, 0);
  }

  bool orders = false;
};

void ops_have_their_derivatives(const Problem& problem, const std::vector<int>& dtypes, bool orders = false) {
  const Truth truth(problem);
  const std::string name = std::string(structure_names[problem.structure]) + ", " + link_name(problem.link) +
                           ", " + std::to_string(problem.n) + " x " + std::to_string(problem.c) + ", " +
                           std::to_string(problem.losses) + (problem.mean ? " means, " : " sums, ");
  const auto run = [&](auto ops) {
    ops.orders = orders;
    ops.run();
  };
  for (int dtype : dtypes) {
    if (dtype == L2T_FLOAT32) run(Ops<float, float>(problem, truth, dtype, name + "float32"));
    if (dtype == L2T_FLOAT64) run(Ops<double, double>(problem, truth, dtype, name + "float64"));
    if (dtype == L2T_BFLOAT16) run(Ops<float, l2t::bfloat16>(problem, truth, dtype, name + "bfloat16"));
    if (dtype == L2T_FLOAT16) run(Ops<float, l2t::float16>(problem, truth, dtype, name + "float16"));
  }
}

const std::vector<int> kAll = {L2T_FLOAT32, L2T_FLOAT64, L2T_BFLOAT16, L2T_FLOAT16}, kSingle = {L2T_FLOAT32};

}  // namespace

int main(int count, char** arguments) {
  few = count > 1 && std::strcmp(arguments[1], "few") == 0;
  check("there is a device", l2t_cuda_devices() != 1, 0);
  for (int structure = 0; structure < 3; ++structure) {
    for (int link = 0; link < 3; ++link)
      ops_have_their_derivatives(Problem(link, structure, 5, 10, 5, false), {L2T_FLOAT32, L2T_FLOAT64},
                                 link == 0);
    // Where a row is a lane's, some lanes', a warp's, and a block's, in memory of either kind; with and without packs.
    for (size_t c : {1, 3, 8, 31, 32, 33, 100, 256, 300, 1000, 1025, 5000, 60000}) {
      if (few && c != 3 && c != 32 && c != 300) continue;
      if (structure == L2T_FULL && c > 1025) continue;
      const int link = static_cast<int>(c + structure) % 3;
      const size_t groups = c > 100 ? 1 : 2, rank = c % 2 != 0 ? 5 : 2;
      const Problem problem(link, structure, c > 5000 ? 2 : 5, c, 1, c % 2 == 0, groups, rank);
      ops_have_their_derivatives(problem, few && c == 3 ? kSingle : kAll, !few && c == 1025);
      if (few || c > 5000) continue;
      ops_have_their_derivatives(Problem(link, structure, 1, c, 1, c % 2 != 0, groups, rank), kSingle);
      ops_have_their_derivatives(Problem(link, structure, 0, c, 1, false, groups, rank), kSingle);
    }
    // Many rows of few classes: chunks of the sort, parts of a class, sums in two steps.
    ops_have_their_derivatives(Problem(0, structure, 700, 2, 2, true, 1), kSingle, !few);
    if (!few) ops_have_their_derivatives(Problem(1, structure, 2600, 3, 1, true, 2), kSingle);
  }
  return failures != 0;
}
