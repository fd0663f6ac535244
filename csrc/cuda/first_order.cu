// value and grad on the rows. The formulas are those of math/row.h, in its three moves: sums over the classes, head, one
// expression an output. A row that is ignored is never read; one whose target is out of range becomes NaN.
//
// Bytes moved a row, for logits of S and coefficients of T bytes, beside a few numbers:
//
//     value                  C S      + C T for a full W; low rank: V [C, r] is read from L2 or L1
//     value with d_logits    2 C S    + C T
//     grad                   2 C S    + C T
//
// The row of a full W is read twice where a block has the row, the second time from L1 or L2; so are logits that do not
// fit shared memory.
#include "first_order.h"

#include "rows.h"

namespace l2t {
inline namespace L2T_ISA {

// ---- value ----

template <class T>
struct ValueSums {
  Stats<T> stats;
  T R;
};

template <class T, class S, class Row>
L2T_DEVICE ValueSums<T> value_sums(const Call<T, S>& call, int k, Row& row) {
  row.keep();
  T max = -T(INFINITY);  // NaN comes through in the sum of exponentials
  row.each([&](const Element<T>& x) { max = x.z > max ? x.z : max; });
  max = row.max(max);
  T sum_exp[1] = {0};
  row.each([&](const Element<T>& x) { sum_exp[0] += sum_exp_term(x.z, max); });
  row.sum(sum_exp);
  Stats<T> stats = stats_before_u(max, sum_exp[0]);
  T u_R[2] = {0, 0};
  row.each_with_weight([&](const Element<T>& x) {
    u_R[0] += a_log_p_term(x.a, stats.log_p(x.z));
    u_R[1] += x.a;
  });
  row.sum(u_R);
  stats.u = call.beta(k) + u_R[0];
  return {stats, u_R[1]};
}

// ---- grad ----

template <class T, class Row>
L2T_DEVICE ValueSums<T> known_sums(const T* stats, int64_t i, const Row& row) {
  if (!Row::kDense) return {load_stats(stats, i), row.from.diagonal};
  T R[1] = {0};
  row.each_with_weight([&](const Element<T>& x) { R[0] += x.a; });
  row.sum(R);
  return {load_stats(stats, i), R[0]};
}

template <class T, class S>
L2T_DEVICE Head<T> grad_head_of(const Call<T, S>& call, int64_t i, int k, const Stats<T>& stats) {
  return grad_head(call.link, stats, call.kappa(k), call.of_loss(call.in.v_loss, i, T(1)));
}

template <class T, class S, class Row>
L2T_DEVICE void on_row(const Call<T, S>& call, const FirstOrder<T, S>& io, int64_t i, int k, Row& row) {
  const ValueSums<T> sums = io.known != nullptr ? known_sums(io.known, i, row) : value_sums(call, k, row);
  if (io.known == nullptr && row.leads()) {
    io.loss[i] = loss(call.link, sums.stats, call.kappa(k));
    store_stats(io.stats, i, sums.stats);
  }
  if (io.d_logits == nullptr) return;
  const Head<T> head = grad_head_of(call, i, k, sums.stats);
  row.write(io.d_logits + i * call.c,
            [&](const Element<T>& x) { return d_z(head, head.stats.p(x.z), x.a, sums.R); });
}

// ---- as kernels ----

template <class T, class S>
L2T_DEVICE void no_row(const FirstOrder<T, S>& io, int64_t i, T nothing) {
  if (io.known != nullptr) return;
  io.loss[i] = nothing;
  store_stats(io.stats, i, Stats<T>{nothing, nothing, nothing});
}

template <class T, class S>
L2T_DEVICE Inputs<T, S> direction_of(const FirstOrder<T, S>&) {
  return Inputs<T, S>(l2t_tensors{});
}

namespace {

template <class T, class S>
__global__ void head_by_thread(Call<T, S> call, const T* stats, Head<T>* heads) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= call.n) return;
  const int k = call.table_row(i);
  if (k >= 0) heads[i] = grad_head_of(call, i, k, load_stats(stats, i));
}

}  // namespace

template <class T, class S>
l2t_status first_order(const Call<T, S>& call, const FirstOrder<T, S>& io, void* stream) {
  const bool wide = call.wide() && aligned(io.d_logits);
  return launch_rows(call, io, io.known != nullptr ? 0 : 1, wide, stream);
}

template <class T, class S>
l2t_status grad_heads(const Call<T, S>& call, const T* stats, Head<T>* heads, void* stream) {
  return launch(head_by_thread<T, S>, blocks_for(call.n, 128), 128, 0, stream, call, stats, heads);
}

#define L2T_INSTANTIATE(T, S)                                                         \
  template l2t_status first_order(const Call<T, S>&, const FirstOrder<T, S>&, void*); \
  template l2t_status grad_heads(const Call<T, S>&, const T*, Head<T>*, void*);
L2T_INSTANTIATE(float, float)
L2T_INSTANTIATE(double, double)
L2T_INSTANTIATE(float, bfloat16)
L2T_INSTANTIATE(float, float16)
#undef L2T_INSTANTIATE

}  // namespace L2T_ISA
}  // namespace l2t
