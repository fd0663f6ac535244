// The four ops of the waist, in every instruction set, structure, link, dtype and reduction, against central
// differences in long double of the loss as docs/math.md section 1 defines it; the same program is run under
// the address and undefined-behaviour sanitizers.
//
// Not here: precision in float32 and bits (tests/test_native.py), the pool by itself (test_pool.cpp).
#include "../../csrc/l2t.h"
#include "problem.h"

#include <algorithm>
#include <cstring>

namespace {

// A point and a direction, and what the ops must give there. The logits have few enough bits for every dtype to
// hold them, so one truth serves all.
struct Truth {
  Point x, v, ones, v_logits;  // ones: x with 1 as each v_loss; v_logits: nothing moves but the logits
  Coordinates at;
  long double value;
  Point grad, grad_of_ones, grad_vjp, grad_jvp, grad_vjp_of_logits;

  explicit Truth(const Problem& problem)
      : x(Memory<float, l2t::bfloat16>(problem, normals(problem.size(), 0.7)).point()),
        v(Memory<float, l2t::bfloat16>(problem, normals(problem.size(), 0.7)).point()),
        ones(x),
        v_logits(problem.size(), 0),
        at(problem.some_coordinates()) {
    Point without_v_loss = v;
    std::fill_n(ones.begin(), problem.losses, 1);
    std::fill_n(without_v_loss.begin(), problem.losses, 0);
    const size_t begin = problem.start[LOGITS], end = problem.start[WEIGHT];
    std::copy(v.begin() + begin, v.begin() + end, v_logits.begin() + begin);
    const auto f = [&](const Point& here) { return problem.total_loss(here); };
    value = f(x);
    grad = gradient(f, x, at);
    grad_of_ones = gradient(f, ones, at);
    grad_vjp = gradient_along(f, x, without_v_loss, at);
    grad_jvp = gradient_along(f, x, v, at);
    grad_vjp_of_logits = gradient_along(f, x, v_logits, at);
  }
};

// The four ops of one problem in one dtype.
template <class T, class S>
struct Ops {
  const Problem& problem;
  const Truth& truth;
  const int dtype;
  const std::string name;
  const l2t_rows rows;
  Memory<T, S> inputs, direction;
  std::vector<T> loss, stats;

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

  // An output of the storage's type is off by half its last bit; the rest by roundings of the arithmetic, and
  // by the differences that are the truth.
  double bound(int part) const {
    if (part == LOGITS && dtype == L2T_BFLOAT16) return 5e-3;
    if (part == LOGITS && dtype == L2T_FLOAT16) return 7e-4;
    return dtype == L2T_FLOAT64 ? 1e-5 : 1e-4;
  }

  void expect(const std::string& op, const Memory<T, S>& got, const Point& expected, bool with_v_loss) const {
    const Coordinates& at = truth.at;
    const Point flat = got.point();
    for (int part = with_v_loss ? V_LOSS : LOGITS; part < PARTS; ++part) {
      if (problem.start[part] == problem.start[part + 1]) continue;
      Point a, b;
      for (size_t i = problem.start[part]; i < problem.start[part + 1]; ++i) {
        if (!at.empty() && std::find(at.begin(), at.end(), i) == at.end()) {
          if (!std::isnan(flat[i])) continue;  // not looked at, but written
          b.push_back(0);
        } else {
          b.push_back(expected[i]);
        }
        a.push_back(flat[i]);
      }
      check(name + ", " + op + ", part " + std::to_string(part), relative_error(a, b), bound(part));
    }
  }

  Memory<T, S> unwritten() const { return Memory<T, S>(problem, Point(problem.size(), NAN)); }

  void same(const std::string& what, const std::vector<S>& got, const std::vector<S>& expected) const {
    check(name + ", " + what, std::memcmp(got.data(), expected.data(), got.size() * sizeof(S)) != 0, 0);
  }

  void run() {
    l2t_tensors in = inputs.template record<l2t_tensors>();
    int status = L2T_OK;

    // value, and the gradient of the sum of the losses that it makes in the same pass
    std::vector<S> d_logits(inputs.logits.size()), again(inputs.logits), none;
    status |= l2t_cpu_value(&rows, &in, loss.data(), stats.data(), nullptr);
    const std::vector<T> loss_alone = loss;
    status |= l2t_cpu_value(&rows, &in, loss.data(), stats.data(), d_logits.data());
    check(name + ", value, bits with d_logits", loss != loss_alone, 0);
    long double total = 0;
    for (size_t l = 0; l < problem.losses; ++l) total += truth.x[l] * loss[l];
    check(name + ", value",
          static_cast<double>(std::fabs(total - truth.value) / std::fmax(std::fabs(truth.value), 1.0L)),
          dtype == L2T_FLOAT64 ? 1e-12 : 1e-5);
    Memory<T, S> d = unwritten();
    l2t_outputs out = d.template record<l2t_outputs>();
    in.v_loss = nullptr;
    status |= l2t_cpu_grad(&rows, &in, stats.data(), &out);
    expect("grad without v_loss", d, truth.grad_of_ones, false);
    Memory<T, S> d_of_value = d;
    d_of_value.logits = d_logits;
    expect("d_logits of value", d_of_value, truth.grad_of_ones, false);

    // ... over the logits
    in.logits = again.data();
    std::vector<T> stats_again(stats.size());
    status |= l2t_cpu_value(&rows, &in, loss.data(), stats_again.data(), again.data());
    same("value in place", again, d_logits);
    check(name + ", value in place, loss and stats", loss != loss_alone || stats != stats_again, 0);
    again = inputs.logits;
    Memory<T, S> in_place = unwritten();
    out = in_place.template record<l2t_outputs>();
    out.logits = again.data();
    status |= l2t_cpu_grad(&rows, &in, stats.data(), &out);
    same("grad in place", again, d.logits);
    in_place.logits = again;
    expect("grad in place", in_place, truth.grad_of_ones, false);

    in = inputs.template record<l2t_tensors>();
    d = unwritten(), out = d.template record<l2t_outputs>();
    status |= l2t_cpu_grad(&rows, &in, stats.data(), &out);
    expect("grad", d, truth.grad, false);

    // logits in rows that are longer than C
    std::vector<S> padded;
    S nan;
    l2t::narrow(T(NAN), nan);
    for (size_t i = 0; i < problem.n; ++i) {
      padded.insert(padded.end(), &inputs.logits[i * problem.c], &inputs.logits[i * problem.c] + problem.c);
      padded.insert(padded.end(), 3, nan);
    }
    l2t_rows apart = rows;
    apart.logits_stride = problem.c + 3;
    in.logits = padded.data();
    Memory<T, S> d_apart = unwritten();
    out = d_apart.template record<l2t_outputs>();
    status |= l2t_cpu_grad(&apart, &in, stats.data(), &out);
    same("grad, rows apart", d_apart.logits, d.logits);

    in = inputs.template record<l2t_tensors>();
    d = unwritten(), out = d.template record<l2t_outputs>();
    l2t_tensors cotangents = direction.template record<l2t_tensors>();
    cotangents.v_loss = nullptr;
    status |= l2t_cpu_grad_vjp(&rows, &in, stats.data(), &cotangents, &out);
    expect("grad_vjp", d, truth.grad_vjp, true);

    d = unwritten(), out = d.template record<l2t_outputs>();
    out.v_loss = nullptr;
    const l2t_tensors tangents = direction.template record<l2t_tensors>();
    status |= l2t_cpu_grad_jvp(&rows, &in, stats.data(), &tangents, &out);
    expect("grad_jvp", d, truth.grad_jvp, false);

    // only the logits move, and only their gradient is wanted: the step of an unrolled reverse pass
    cotangents = l2t_tensors{}, cotangents.logits = direction.logits.data();
    d = unwritten(), out = d.template record<l2t_outputs>();
    status |= l2t_cpu_grad_vjp(&rows, &in, stats.data(), &cotangents, &out);
    expect("grad_vjp of logits", d, truth.grad_vjp_of_logits, true);
    out = l2t_outputs{};
    std::vector<S> alone(d.logits.size());
    out.logits = alone.data();
    status |= l2t_cpu_grad_vjp(&rows, &in, stats.data(), &cotangents, &out);
    same("grad_vjp, logits alone", alone, d.logits);
    check(name + ", status", status, 0);
  }
};

// The instruction sets of the build that this machine has, best last.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* const* set = l2t_cpu_instruction_sets(); *set != nullptr; ++set) names.push_back(*set);
  return names;
}

void ops_have_their_derivatives(const Problem& problem) {
  const Truth truth(problem);
  for (const std::string& set : instruction_sets()) {
    check("use of " + set, l2t_cpu_use_instruction_set(set.c_str()), 0);
    const std::string name = set + ", " + structure_names[problem.structure] + ", " +
                             link_name(problem.link) + ", " + std::to_string(problem.n) + " x " +
                             std::to_string(problem.c) + ", " + std::to_string(problem.losses) +
                             (problem.mean ? " means, " : " sums, ");
    Ops<float, float>(problem, truth, L2T_FLOAT32, name + "float32").run();
    Ops<double, double>(problem, truth, L2T_FLOAT64, name + "float64").run();
    Ops<float, l2t::bfloat16>(problem, truth, L2T_BFLOAT16, name + "bfloat16").run();
    Ops<float, l2t::float16>(problem, truth, L2T_FLOAT16, name + "float16").run();
  }
}

// 0 / 0, as of PyTorch's mean; its rows get gradients of zero, and other losses do not see it.
void a_mean_of_nothing_is_nan() {
  Problem problem(L2T_SIGMOID, L2T_DIAGONAL, 6, 3, 2, true);
  problem.target = {-100, -100, -100, 1, -100, 2};
  const Truth truth(problem);
  Ops<float, float> ops(problem, truth, L2T_FLOAT32, "mean of nothing");
  const l2t_tensors in = ops.inputs.record<l2t_tensors>();
  std::vector<float> d_logits(18, 5);
  const int status = l2t_cpu_value(&ops.rows, &in, ops.loss.data(), ops.stats.data(), d_logits.data());
  const bool zero = std::all_of(d_logits.begin(), d_logits.begin() + 9, [](float x) { return x == 0; });
  const bool finite = std::all_of(d_logits.begin(), d_logits.end(), [](float x) { return std::isfinite(x); });
  check("a mean of nothing",
        status + !(std::isnan(ops.loss[0]) && std::isfinite(ops.loss[1]) && zero && finite), 0);
}

void a_number_of_losses_divides_the_rows() {
  const Problem problem(L2T_SIGMOID, L2T_DIAGONAL, 6, 3, 2, true);
  const Truth truth(problem);
  Ops<float, float> ops(problem, truth, L2T_FLOAT32, "losses");
  const l2t_tensors in = ops.inputs.record<l2t_tensors>();
  int wrong = 0;
  for (int64_t losses : {-1, 0, 4, 7}) {
    l2t_rows rows = ops.rows;
    rows.losses = losses;
    wrong += l2t_cpu_value(&rows, &in, ops.loss.data(), ops.stats.data(), nullptr) != L2T_BAD_LOSSES;
  }
  check("losses must divide n", wrong, 0);
}

}  // namespace

int main() {
  for (int structure = 0; structure < 3; ++structure) {
    for (int link = 0; link < 3; ++link) {
      ops_have_their_derivatives(Problem(link, structure, 8, 5, 8, false));
      ops_have_their_derivatives(Problem(link, structure, 8, 3, 1, true));
      ops_have_their_derivatives(Problem(link, structure, 8, 4, 2, link == 0));
    }
    // Sizes around those of vectors and blocks of rows.
    for (int c : {1, 2, 16, 17, 31, 67, 130}) {
      const int n = c < 20 ? 37 : 6;
      ops_have_their_derivatives(Problem(c % 3, structure, n, c, 1, c % 2 == 0));
    }
  }
  const std::string best = instruction_sets().back();
  check("an instruction set that is not there", l2t_cpu_use_instruction_set("x87") + 1, 0);
  check("is not used", best != l2t_cpu_instruction_set(), 0);
  a_mean_of_nothing_is_nan();
  a_number_of_losses_divides_the_rows();
  return failures != 0;
}
