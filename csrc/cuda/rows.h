// A walk over rows as a kernel, for either order (`Io`: first_order.h, second_order.h): which threads have a row, where
// its numbers are kept, and what becomes of a row that has no table row. The order's own part is `on_row`, `no_row` and
// `direction_of`.
//
// Few classes: 2^k lanes a row, up to 8 numbers (4 of float64) a lane. More: a block a row. The logits and the direction
// are kept in shared memory if they fit (the logits alone, if only they do), and read once.
#ifndef L2T_CUDA_ROWS_H
#define L2T_CUDA_ROWS_H

#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {

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

constexpr int kTeamThreads = 128;

template <bool Dense, int V, int E, class T, class S, class Io>
__global__ void __launch_bounds__(kTeamThreads, 1) rows_by_team(Call<T, S> call, Io io, int lanes) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  if (i >= call.n) return;
  const Team team(lanes);
  const int k = call.table_row(i);
  if (done_without_row(call, io, i, k, team.lane, lanes)) return;
  RowInRegisters<T, S, Dense, Io::kSecond, V, E> row({call, direction_of(io), i, k}, team);
  on_row(call, io, i, k, row);
}

// `kept`: how many of z and v_z the block has shared memory for.
template <bool Dense, int V, int E, class T, class S, class Io>
__global__ void __launch_bounds__(Block<T>::kThreads, 1) rows_by_block(Call<T, S> call, Io io, int kept) {
  L2T_SHARED(T, room, Block<T>::kRoom);
  L2T_DYNAMIC_SHARED(S, rows);
  const int64_t i = blockIdx.x;
  const int k = call.table_row(i);
  if (done_without_row(call, io, i, k, threadIdx.x, blockDim.x)) return;
  RowInMemory<T, S, Dense, Io::kSecond, V, E> row({call, direction_of(io), i, k}, room,
                                                  kept > 0 ? rows : nullptr,
                                                  kept > 1 ? rows + padded<S>(call.c) : nullptr);
  on_row(call, io, i, k, row);
}

template <bool Dense, int V, class T, class S, class Io>
l2t_status launch_rows(const Call<T, S>& call, const Io& io, int worth_keeping, void* stream) {
  constexpr int kNumbers = 32 / sizeof(T),
                kWindow = V > 4 ? V : 4;  // of each vector that a thread has at a time
  if (call.c <= 32 * kNumbers) {
    int lanes = 1;
    while (lanes * kNumbers < call.c) lanes *= 2;
    return launch(rows_by_team<Dense, V, kNumbers, T, S, Io>,
                  blocks_for(int64_t(call.n) * lanes, kTeamThreads), kTeamThreads, 0, stream, call, io,
                  lanes);
  }
  const size_t row_bytes = padded<S>(call.c) * sizeof(S), wanted = worth_keeping * row_bytes;
  const size_t most = wanted <= kPlainSharedBytes ? kPlainSharedBytes : shared_bytes_at_most();
  const int kept = wanted <= most ? worth_keeping : row_bytes <= most ? 1 : 0;
  const int threads = call.c <= 2048 ? 128 : call.c <= 8192 ? 256 : Block<T>::kThreads;
  return launch(rows_by_block<Dense, V, kWindow, T, S, Io>, call.n, threads, kept * row_bytes, stream, call,
                io, kept);
}

template <class T, class S, class Io>
l2t_status launch_rows(const Call<T, S>& call, const Io& io, int worth_keeping, bool wide, void* stream) {
  if (call.dense())
    return wide ? launch_rows<true, kWide<S>>(call, io, worth_keeping, stream)
                : launch_rows<true, 1>(call, io, worth_keeping, stream);
  return wide ? launch_rows<false, kWide<S>>(call, io, worth_keeping, stream)
              : launch_rows<false, 1>(call, io, worth_keeping, stream);
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
