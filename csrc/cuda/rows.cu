// The walks over rows. The formulas are those of math/row.h, in its three moves: sums over the classes, head, one
// expression an output. A row that is ignored is never read; one whose target is out of range becomes NaN.
//
// Bytes moved, for S-sized logits and T-sized coefficients, beside a few numbers a row:
//
//     value                  C S                  + C T dense (the row of W)
//     value with d_logits    2 C S                + C T
//     grad                   2 C S                + C T
//     grad_vjp, grad_jvp     3 C S                + 2 C T
//
// which holds where the row fits registers (C <= 1024, second order 512; half of it in float64) or, logits only,
// shared memory; beyond that, and for dense rows in a block, the later walks read from L2.
#include "rows.h"

#include <type_traits>

#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {
namespace {

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

// ---- a row that has no table row ----

template <class T, class S>
L2T_DEVICE void no_row(const FirstOrder<T, S>& io, int64_t i, T nothing) {
  if (io.known != nullptr) return;
  io.loss[i] = nothing;
  store_stats(io.stats, i, Stats<T>{nothing, nothing, nothing});
}

template <class T, class S>
L2T_DEVICE void no_row(const SecondOrder<T, S>& io, int64_t i, T) {
  if (io.d_go != nullptr) io.d_go[i] = 0;
}

// True, and the row is done, if it is ignored or its target is out of range.
template <class T, class S, class Io>
L2T_DEVICE bool done_without_row(const Call<T, S>& call, const Io& io, int64_t i, int k, int lane,
                                 int lanes) {
  if (k >= 0) return false;
  const T nothing = k == kIgnored ? T(0) : T(NAN);
  if (lane == 0) no_row(io, i, nothing);
  if (io.d_logits != nullptr)
    for (int j = lane; j < call.c; j += lanes) narrow(nothing, io.d_logits[i * call.c + j]);
  return true;
}

// ---- the kernels, of either order ----

template <class T, class S>
L2T_DEVICE Inputs<T, S> direction_of(const FirstOrder<T, S>&) {
  return Inputs<T, S>(l2t_tensors{});
}

template <class T, class S>
L2T_DEVICE const Inputs<T, S>& direction_of(const SecondOrder<T, S>& io) {
  return io.direction;
}

constexpr int kTeamThreads = 128;

template <bool Dense, bool Second, int V, int E, class T, class S, class Io>
__global__ void __launch_bounds__(kTeamThreads) rows_by_team(Call<T, S> call, Io io, int lanes) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (i >= call.n) return;
  const Team team(lanes);
  const int k = call.table_row(i);
  if (done_without_row(call, io, i, k, team.lane, lanes)) return;
  RowInRegisters<T, S, Dense, Second, V, E> row({call, direction_of(io), i, k}, team);
  on_row(call, io, i, k, row);
}

// `kept`: how many of z and v_z the block has shared memory for.
template <bool Dense, bool Second, int V, int E, class T, class S, class Io>
__global__ void __launch_bounds__(Block<T>::kThreads) rows_by_block(Call<T, S> call, Io io, int kept) {
  L2T_SHARED(T, room, Block<T>::kRoom);
  L2T_DYNAMIC_SHARED(S, rows);
  const int64_t i = blockIdx.x;
  const int k = call.table_row(i);
  if (done_without_row(call, io, i, k, threadIdx.x, blockDim.x)) return;
  RowInMemory<T, S, Dense, Second, V, E> row({call, direction_of(io), i, k}, room, kept > 0 ? rows : nullptr,
                                             kept > 1 ? rows + padded<S>(call.c) : nullptr);
  on_row(call, io, i, k, row);
}

// ---- their launches ----

template <bool Dense, int V, class T, class S, class Io>
l2t_status launch_rows(const Call<T, S>& call, const Io& io, int worth_keeping, void* stream) {
  constexpr bool kSecond = std::is_same<Io, SecondOrder<T, S>>::value;
  constexpr int kNumbers = 32 / sizeof(T),
                kWindow = V > 4 ? V : 4;  // of each vector that a thread has at a time
  if (call.c <= 32 * kNumbers) {
    int lanes = 1;
    while (lanes * kNumbers < call.c) lanes *= 2;
    return launch(rows_by_team<Dense, kSecond, V, kNumbers, T, S, Io>,
                  blocks_for(int64_t(call.n) * lanes, kTeamThreads), kTeamThreads, 0, stream, call, io,
                  lanes);
  }
  const size_t row_bytes = padded<S>(call.c) * sizeof(S), most = shared_bytes_at_most();
  const int kept = worth_keeping * row_bytes <= most ? worth_keeping : row_bytes <= most ? 1 : 0;
  const int threads = call.c <= 2048 ? 128 : call.c <= 8192 ? 256 : Block<T>::kThreads;
  return launch(rows_by_block<Dense, kSecond, V, kWindow, T, S, Io>, call.n, threads, kept * row_bytes,
                stream, call, io, kept);
}

template <class T, class S, class Io>
l2t_status launch_rows(const Call<T, S>& call, const Io& io, int worth_keeping, bool wide, void* stream) {
  if (call.dense())
    return wide ? launch_rows<true, kWide<S>>(call, io, worth_keeping, stream)
                : launch_rows<true, 1>(call, io, worth_keeping, stream);
  return wide ? launch_rows<false, kWide<S>>(call, io, worth_keeping, stream)
              : launch_rows<false, 1>(call, io, worth_keeping, stream);
}

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

template <class T, class S>
l2t_status second_order(const Call<T, S>& call, const SecondOrder<T, S>& io, void* stream) {
  const Inputs<T, S>& v = io.direction;
  const bool wide =
      call.wide() && aligned(io.d_logits) && aligned(v.logits) && (!call.full || aligned(v.weight));
  return launch_rows(call, io, v.logits != nullptr ? 2 : 1, wide, stream);
}

#define L2T_INSTANTIATE(T, S)                                                         \
  template l2t_status first_order(const Call<T, S>&, const FirstOrder<T, S>&, void*); \
  template l2t_status grad_heads(const Call<T, S>&, const T*, Head<T>*, void*);       \
  template l2t_status second_order(const Call<T, S>&, const SecondOrder<T, S>&, void*);
L2T_INSTANTIATE(float, float)
L2T_INSTANTIATE(double, double)
L2T_INSTANTIATE(float, bfloat16)
L2T_INSTANTIATE(float, float16)
#undef L2T_INSTANTIATE

}  // namespace L2T_ISA
}  // namespace l2t
