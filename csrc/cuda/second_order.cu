// grad_vjp and grad_jvp on the rows, by the formulas of math/row.h.
//
// Bytes moved a row, for logits of S and coefficients of T bytes, beside a few numbers:
//
//     all inputs move        3 C S    + 2 C T for a full W; low rank: V and its direction from L2 or L1
//     the logits alone       3 C S    + C T
//
// What a block does not keep in shared memory, rows of W among it, is read a second time, from L1 or L2.
#include "second_order.h"

#include "rows.h"

namespace l2t {
inline namespace L2T_ISA {

// ---- grad_vjp, grad_jvp: the derivative of grad along v ----
//
// The Hessian is symmetric, so both are one walk; the v of a jvp has a v_loss, the outputs of a vjp want one.

template <class T, class S, class Row>
L2T_DEVICE void on_row(const Call<T, S>& call, const SecondOrder<T, S>& io, int64_t i, int k, Row& row) {
  const Stats<T> stats = load_stats(io.stats, i);
  row.keep();
  T sums[5] = {0, 0, 0, 0, 0};
  if (row.from.v_z != nullptr) row.each([&](const Element<T>& x) { sums[0] += stats.p(x.z) * x.v_z; });
  row.each_with_weight([&](const Element<T>& x) {
    sums[1] += x.a;
    sums[2] += x.a * x.v_z;
    sums[3] += x.v_a;
    sums[4] += a_log_p_term(x.v_a, stats.log_p(x.z));
  });
  row.sum(sums);
  const T R = sums[1];
  Direction<T> along{};
  along.pv = sums[0], along.av = sums[2], along.sum_va = sums[3], along.va_log_p = sums[4];
  along.v_beta = at(io.direction.bias, k, T(0));
  along.v_kappa = at(io.direction.scale, k, T(0));
  along.t_go = io.direction.v_loss != nullptr ? call.of_loss(io.direction.v_loss, i, T(0)) : T(0);

  const Head<T> head =
      second_head(call.link, stats, call.kappa(k), call.of_loss(call.in.v_loss, i, T(1)), R, along);
  if (row.leads()) {
    if (io.heads != nullptr) io.heads[i] = head;
    if (io.d_go != nullptr) io.d_go[i] = head.d_go;
  }
  if (io.d_logits == nullptr) return;
  row.write(io.d_logits + i * call.c,
            [&](const Element<T>& x) { return d_z(head, stats.p(x.z), x.a, R, x.v_z, x.v_a, along.sum_va); });
}

// ---- as a kernel ----

template <class T, class S>
L2T_DEVICE void no_row(const SecondOrder<T, S>& io, int64_t i, T) {
  if (io.d_go != nullptr) io.d_go[i] = 0;
}

template <class T, class S>
L2T_DEVICE const Inputs<T, S>& direction_of(const SecondOrder<T, S>& io) {
  return io.direction;
}

template <class T, class S>
l2t_status second_order(const Call<T, S>& call, const SecondOrder<T, S>& io, void* stream) {
  const Inputs<T, S>& v = io.direction;
  const bool wide =
      call.wide() && aligned(io.d_logits) && aligned(v.logits) && (!call.full || aligned(v.weight));
  return launch_rows(call, io, v.logits != nullptr ? 2 : 1, wide, stream);
}

#define L2T_INSTANTIATE(T, S) \
  template l2t_status second_order(const Call<T, S>&, const SecondOrder<T, S>&, void*);
L2T_INSTANTIATE(float, float)
L2T_INSTANTIATE(double, double)
L2T_INSTANTIATE(float, bfloat16)
L2T_INSTANTIATE(float, float16)
#undef L2T_INSTANTIATE

}  // namespace L2T_ISA
}  // namespace l2t
