// The four ops of the CUDA waist on the CPU (cuda_on_cpu.h), in every structure, link and dtype, around the sizes at
// which rows are walked differently, against differences in long double of the loss as docs/math.md section 1 defines
// it: the product of a gradient with a random direction, so that every number of it counts. And bits: in every order
// of threads, in place, in every run.
//
// With the argument `few` every kernel is run, but not at every size, nor on long rows of a full matrix in every
// dtype: for sanitizers that take their time.
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
          if (problem.structure != L2T_DIAGONAL) x[i] /= 32, v[i] /= 32;
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
        // u moves far along a long direction of coefficients: as log p does not, along one of logits.
        const long double step = probe.part == LOGITS ? h : h / (1 + std::sqrt(kept.size()) / 8);
        const auto here = [&](long double step) {
          for (size_t i = 0; i < kept.size(); ++i) at[probe.begin + i] = kept[i] + step * probe.d[i];
          return problem.total_loss(at);
        };
        const long double difference = (here(step) - here(-step)) / (2 * step);
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

    // ... times the cotangents of the losses, as grad has it
    std::vector<S> scaled = d_logits;
    const T* v_loss = static_cast<const T*>(tensors().v_loss);
    status |= l2t_cuda_scale(&rows, v_loss, scaled.data(), nullptr);
    Memory<T, S> d_scaled = d;
    d_scaled.logits = scaled;
    expect("d_logits of value, scaled", d_scaled, &Probe::grad, LOGITS, LOGITS);
    const std::vector<T> ones(problem.losses, T(1));
    scaled = d_logits;
    status |= l2t_cuda_scale(&rows, ones.data(), scaled.data(), nullptr);
    same("d_logits of value, times 1", scaled, d_logits);
    const std::vector<T> infinite(problem.losses, T(INFINITY));
    status |= l2t_cuda_scale(&rows, infinite.data(), scaled.data(), nullptr);
    int64_t lost_zeros = 0;
    for (size_t at = 0; at < scaled.size(); ++at)
      lost_zeros +=
          l2t::widen(d_logits[at]) == 0 && l2t::widen(scaled[at]) != 0;  // those of ignored rows among them
    check(name + ", zeros of d_logits lost where a cotangent is infinite", static_cast<double>(lost_zeros),
          0);

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

// ---- what is not a derivative ----

// NaN in the row's loss and d_logits, and in everything else the bits as if it were ignored.
template <class T, class S>
void a_target_out_of_range_is_nan_alone(int structure, size_t c, int dtype) {
  Problem problem(L2T_SIGMOID, structure, 5, c, 5, false, 1);
  problem.target[1] = problem.ignore_index;
  const Truth truth(problem);
  Ops<T, S> ops(problem, truth, dtype, std::string("a target out of range, ") + structure_names[structure]);
  std::vector<S> d_logits(problem.n * c), d_logits_ignored = d_logits;
  ops.value(ops.tensors(), d_logits_ignored.data());
  const std::vector<T> loss_ignored = ops.loss, stats = ops.stats;
  const l2t_tensors v = ops.direction.template record<l2t_tensors>();
  const Memory<T, S> ignored = ops.grad(ops.tensors()), vjp_ignored = ops.vjp(ops.tensors(), v);
  const auto row_is_nan_then_zero = [&](std::vector<S>& d_logits) {
    bool nan = true;
    for (size_t j = c; j < 2 * c; ++j) nan &= std::isnan(l2t::widen(d_logits[j])), d_logits[j] = S{};
    return nan;
  };
  for (long long target : {static_cast<long long>(c), -1LL, 1LL << 40, -(1LL << 62)}) {
    problem.target[1] = target;
    ops.value(ops.tensors(), d_logits.data());
    bool nan = std::isnan(ops.loss[1]) && row_is_nan_then_zero(d_logits);
    ops.loss[1] = 0;
    ops.same("loss", ops.loss, loss_ignored);
    ops.same("d_logits of value", d_logits, d_logits_ignored);
    Memory<T, S> d = ops.grad(ops.tensors()), d_vjp = ops.vjp(ops.tensors(), v);
    nan &= row_is_nan_then_zero(d.logits) && row_is_nan_then_zero(d_vjp.logits);
    ops.same("grad", d, ignored);
    ops.same("grad_vjp", d_vjp, vjp_ignored);
    check(ops.name + ", NaN", !nan, 0);
  }
  check(ops.name + ", status", ops.status, 0);
}

void a_mean_of_nothing_is_nan() {
  Problem problem(L2T_SIGMOID, L2T_DIAGONAL, 6, 3, 2, true);
  problem.target = {-100, -100, -100, 1, -100, 2};
  const Truth truth(problem);
  Ops<float, float> ops(problem, truth, L2T_FLOAT32, "a mean of nothing");
  std::vector<float> d_logits(18, 5);
  ops.value(ops.tensors(), d_logits.data());
  const bool zero = std::all_of(d_logits.begin(), d_logits.begin() + 9, [](float x) { return x == 0; });
  const bool finite = std::all_of(d_logits.begin(), d_logits.end(), [](float x) { return std::isfinite(x); });
  check(ops.name, !(std::isnan(ops.loss[0]) && std::isfinite(ops.loss[1]) && zero && finite), 0);
}

// A stack of more losses than rows: the sort has one chunk, of several blocks.
void a_chunk_of_several_blocks() {
  const Problem problem(L2T_SIGMOID, L2T_DIAGONAL, 600, 2, 1, false, 640);
  const Truth truth(problem);
  Ops<float, float> ops(problem, truth, L2T_FLOAT32, "a chunk of several blocks");
  ops.value(ops.tensors(), nullptr);
  Memory<float, float> d = ops.unwritten();
  l2t_outputs bias{};
  bias.bias = d.record<l2t_outputs>().bias;
  const l2t_tensors in = ops.tensors();
  ops.status |= l2t_cuda_grad(&ops.rows, &in, ops.stats.data(), &bias, ops.workspace().get(), nullptr);
  ops.expect("grad of the bias", d, &Probe::grad, BIAS, BIAS);
  check(ops.name + ", status", ops.status, 0);
}

// A class of logit -inf and no weight is a class that is not there.
void a_class_without_probability_is_none(size_t c) {
  Problem problem(L2T_LOG_SIGMOID, L2T_DIAGONAL, 3, c, 3, false, 1);
  problem.target = {1, 0, 1};
  const Truth truth(problem);
  Ops<float, float> ops(problem, truth, L2T_FLOAT32, "a logit of -inf, " + std::to_string(c));
  std::vector<float> d(3 * c), d_without(3 * c);
  for (size_t i = 0; i < 3; ++i) ops.inputs.logits[i * c + c - 1] = -INFINITY;
  ops.value(ops.tensors(), d.data());
  const std::vector<float> loss = ops.loss;
  ops.rows.c = c - 1;  // the same rows, one class shorter
  ops.value(ops.tensors(), d_without.data());
  double worst = 0;
  for (size_t i = 0; i < 3; ++i) {
    worst = std::fmax(worst, std::fabs(loss[i] / ops.loss[i] - 1)) + (d[i * c + c - 1] != 0);
    for (size_t j = 0; j + 1 < c; ++j)
      worst = std::fmax(worst, std::fabs(d[i * c + j] - d_without[i * (c - 1) + j]));
  }
  check(ops.name, worst + ops.status, 1e-6);
}

void a_wrong_call_is_refused() {
  const Problem problem(L2T_SIGMOID, L2T_FULL, 6, 3, 2, true);
  const Truth truth(problem);
  Ops<float, float> ops(problem, truth, L2T_FLOAT32, "a wrong call");
  const auto refused = [&](l2t_status expected, const char* what, const auto& change) {
    l2t_rows rows = ops.rows;
    l2t_tensors in = ops.tensors();
    void *workspace = ops.workspace().release(), *whole = workspace, *stream = nullptr;
    change(rows, in, workspace, stream);
    const auto value =
        l2t_cuda_value(&rows, &in, ops.loss.data(), ops.stats.data(), nullptr, workspace, stream);
    Memory<float, float> d = ops.unwritten();
    l2t_outputs out = d.record<l2t_outputs>();
    const auto grad = l2t_cuda_grad(&rows, &in, ops.stats.data(), &out, workspace, stream);
    const l2t_tensors none{};
    const auto vjp = l2t_cuda_grad_vjp(&rows, &in, ops.stats.data(), &none, &out, workspace, stream);
    const auto jvp = l2t_cuda_grad_jvp(&rows, &in, ops.stats.data(), &none, &out, workspace, stream);
    const bool untouched = std::isnan(ops.loss[0]) && std::isnan(d.flat[0]) && std::isnan(d.flat.back());
    check(std::string("refused: ") + what,
          !(value == expected && grad == expected && vjp == expected && jvp == expected && untouched), 0);
    std::free(whole);
  };
  using Rows = l2t_rows&;
  using In = l2t_tensors&;
  using Pointer = void*&;
  refused(L2T_BAD_DTYPE, "dtype", [](Rows rows, In, Pointer, Pointer) { rows.dtype = 4; });
  refused(L2T_BAD_LINK, "link", [](Rows rows, In, Pointer, Pointer) { rows.link = 3; });
  refused(L2T_BAD_SIZE, "no class", [](Rows rows, In, Pointer, Pointer) { rows.c = 0; });
  refused(L2T_BAD_SIZE, "rows beyond 32 bits", [](Rows rows, In, Pointer, Pointer) { rows.n = 6LL << 40; });
  refused(L2T_BAD_SIZE, "groups", [](Rows rows, In, Pointer, Pointer) { rows.groups = 1LL << 30; });
  refused(L2T_BAD_LOSSES, "losses", [](Rows rows, In, Pointer, Pointer) { rows.losses = 4; });
  refused(L2T_MISSING_ROWS, "logits", [](Rows, In in, Pointer, Pointer) { in.logits = nullptr; });
  refused(L2T_MISSING_ROWS, "workspace", [](Rows, In, Pointer memory, Pointer) { memory = nullptr; });
  refused(L2T_MISSING_WEIGHT, "weight", [](Rows, In in, Pointer, Pointer) { in.weight = nullptr; });
  refused(L2T_STRAY_FACTORS, "factors", [](Rows, In in, Pointer, Pointer) { in.left = in.weight; });
  refused(L2T_CUDA_FAILED, "a stream that is none",
          [&](Rows, In, Pointer, Pointer stream) { stream = &ops; });
  check("its reason", std::strlen(l2t_cuda_error()) == 0, 0);
  l2t_rows wrong = ops.rows;
  wrong.c = 0;
  check("workspace of a wrong call", static_cast<double>(l2t_cuda_workspace(&wrong)), 0);
}

const std::vector<int> kAll = {L2T_FLOAT32, L2T_FLOAT64, L2T_BFLOAT16, L2T_FLOAT16}, kSingle = {L2T_FLOAT32},
                       kTwo = {L2T_FLOAT32, L2T_BFLOAT16};

}  // namespace

int main(int count, char** arguments) {
  few = count > 1 && std::strcmp(arguments[1], "few") == 0;
  check("there is a device", l2t_cuda_devices() != 1, 0);
  for (int structure = 0; structure < 3; ++structure) {
    for (int link = 0; link < 3; ++link)
      ops_have_their_derivatives(Problem(link, structure, 5, 10, 5, false), {L2T_FLOAT32, L2T_FLOAT64},
                                 link == 0);
    // Where a row is a lane's, some lanes', a warp's, and a block's, in memory of either kind; with and without packs.
    const std::vector<size_t> every = {1, 3, 8, 31, 32, 33, 100, 256, 300, 1000, 1025, 5000, 60000};
    for (size_t c : few ? std::vector<size_t>{3, 32, 264} : every) {
      if (structure == L2T_FULL && (c == 1000 || c > 1025)) continue;  // a truth takes c^2 long doubles
      const int link = static_cast<int>(c + structure) % 3;
      const size_t groups = c > 100 ? 1 : 2, rank = c % 2 != 0 ? 5 : c % 3 == 0 ? 2 : 4;
      const Problem problem(link, structure, c > 5000 ? 2 : 5, c, 1, c % 2 == 0, groups, rank);
      const bool slow = few && c * (structure == L2T_FULL) > 100;  // every dtype walks its matrix at 32
      ops_have_their_derivatives(problem, few && c == 3 ? kSingle : slow ? kTwo : kAll, !few && c == 1025);
      if (few || c > 5000) continue;
      ops_have_their_derivatives(Problem(link, structure, 1, c, 1, c % 2 != 0, groups, rank), kSingle);
      ops_have_their_derivatives(Problem(link, structure, 0, c, 1, false, groups, rank), kSingle);
    }
    // Many rows of few classes: chunks of the sort, parts of a class, sums in two steps.
    ops_have_their_derivatives(Problem(0, structure, 700, 2, 2, true, 1), kSingle, !few);
    if (!few) ops_have_their_derivatives(Problem(1, structure, 2600, 3, 1, true, 2), kSingle);
  }
  for (int structure = 0; structure < 3; ++structure)
    for (size_t c : {3, 300}) {
      if (few && structure == L2T_FULL && c > 3) continue;
      a_target_out_of_range_is_nan_alone<float, float>(structure, c, L2T_FLOAT32);
      if (!few) a_target_out_of_range_is_nan_alone<float, l2t::float16>(structure, c, L2T_FLOAT16);
    }
  a_mean_of_nothing_is_nan();
  a_chunk_of_several_blocks();
  for (size_t c : {3, 11, 301}) a_class_without_probability_is_none(c);
  a_wrong_call_is_refused();
  return failures != 0;
}
