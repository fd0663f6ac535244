// The row walk: how the threads that share a row read it, run over its classes and add up. The element's
// expression is the caller's, from math/.
//
// Two kinds of row have one face (each, write, max, sum), so that an op is written once:
//
//     RowInRegisters   2^k lanes of a warp share a row: several rows a warp where there are few classes. All
//                      numbers of the row are read once and stay in registers.
//     RowInMemory      a block shares a row and reads it in windows; `keep` has the logits in shared memory
//                      from then on, else a later walk reads them again (from L2).
//
// A thread has V consecutive classes at a time: 16 bytes of logits where alignment and C allow, else V = 1. It
// writes only classes that it alone reads, so the outputs may be the logits' own memory. Sums are added in an
// order that depends on C alone.
//
// Deliberately not here: a single pass that keeps a running maximum, since the row is at hand anyway.
#ifndef L2T_CUDA_WALK_H
#define L2T_CUDA_WALK_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

// ---- numbers in memory, V at a time ----

template <int V, class X>
struct alignas(V * sizeof(X)) Pack {
  X of[V];
};

template <int V, class X>
constexpr int kPackOf = V * static_cast<int>(sizeof(X)) > 16 ? 16 / static_cast<int>(sizeof(X)) : V;

template <int V, class X, class T>
L2T_DEVICE void load(const X* from, T* to) {
  constexpr int kPack = kPackOf<V, X>;
#pragma unroll
  for (int begin = 0; begin < V; begin += kPack) {
    const auto pack = *reinterpret_cast<const Pack<kPack, X>*>(from + begin);
#pragma unroll
    for (int e = 0; e < kPack; ++e) to[begin + e] = widen(pack.of[e]);
  }
}

template <int V, class X, class T>
L2T_DEVICE void store(X* to, const T* from) {
  constexpr int kPack = kPackOf<V, X>;
#pragma unroll
  for (int begin = 0; begin < V; begin += kPack) {
    Pack<kPack, X> pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e) narrow(from[begin + e], pack.of[e]);
    *reinterpret_cast<Pack<kPack, X>*>(to + begin) = pack;
  }
}

// V for the [N, C] tensors of a call, or 1; other tensors' rows are aligned where these are.
template <class S>
constexpr int kWide = 16 / static_cast<int>(sizeof(S));

// Numbers that keep the next row in shared memory aligned.
template <class S>
L2T_FN int64_t padded(int64_t c) {
  return (c + kWide<S> - 1) / kWide<S> * kWide<S>;
}

// ---- merging over threads ----

// 2^k neighbouring lanes of a warp, of which each gets the result.
struct Team {
  int lanes, lane;
  unsigned mask;

  L2T_DEVICE explicit Team(int lanes) : lanes(lanes), lane(threadIdx.x % lanes) {
    const unsigned ones = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    mask = ones << (threadIdx.x % 32 - lane);
  }

  template <class T>
  L2T_DEVICE T max(T x) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const T other = __shfl_xor_sync(mask, x, offset);
      x = other > x ? other : x;
    }
    return x;
  }

  template <int K, class T>
  L2T_DEVICE void sum(T (&x)[K]) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int k = 0; k < K; ++k) x[k] += __shfl_xor_sync(mask, x[k], offset);
    }
  }

  L2T_DEVICE bool leads() const { return lane == 0; }
};

// A block, of which each thread gets the result. `room`: shared memory for kSums numbers a warp.
template <class T>
struct Block {
  static constexpr int kThreads = 512, kSums = 5, kRoom = kThreads / 32 * kSums;
  T* room;

  L2T_DEVICE T max(T x) const {
    x = Team(32).max(x);
    exchange(&x, 1);
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x = room[warp] > x ? room[warp] : x;
    return x;
  }

  template <int K>
  L2T_DEVICE void sum(T (&x)[K]) const {
    static_assert(K <= kSums, "the room is too small");
    Team(32).sum(x);
    exchange(x, K);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x[k] = 0;
      for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x[k] += room[warp * K + k];
    }
  }

  L2T_DEVICE bool leads() const { return threadIdx.x == 0; }

 private:
  L2T_DEVICE void exchange(const T* x, int count) const {
    __syncthreads();  // nobody still reads what was there
    if (threadIdx.x % 32 == 0)
      for (int k = 0; k < count; ++k) room[threadIdx.x / 32 * count + k] = x[k];
    __syncthreads();
  }
};

// ---- where the numbers of one row come from ----

// The logits z, the row a of W, and where `Second` a direction's v_z and v_a. A weight is dense (a row in
// memory, or of low rank: multiplied out here) or has one number, at the target.
template <class T, class S, bool Dense, bool Second>
struct Source {
  int c, y, rank;
  const S *z, *v_z;          // [C]; v_z may be absent
  const T *a, *v_a;          // [C], full only; v_a may be absent
  const T *left, *v_left;    // [r], low rank only; v_left may be absent
  const T *right, *v_right;  // [C, r], the same
  T diagonal, v_diagonal;    // what is added at y

  L2T_DEVICE Source(const Call<T, S>& call, const Inputs<T, S>& v, int64_t i, int k)
      : c(call.c), y(call.class_of(k)), rank(call.rank) {
    const int64_t first = k - y;
    const auto row = [&](const T* table, int64_t row, int64_t width) {
      return table != nullptr ? table + row * width : nullptr;
    };
    z = call.logits(i);
    a = call.full ? call.in.weight + int64_t(k) * c : nullptr;
    left = row(call.in.left, k, rank), right = row(call.in.right, first, rank);
    diagonal = call.full ? T(0) : at(call.in.weight, k, T(1));
    v_z = Second && v.logits != nullptr ? v.logits + i * c : nullptr;
    v_a = Second && call.full ? row(v.weight, k, c) : nullptr;
    v_left = Second ? row(v.left, k, rank) : nullptr, v_right = Second ? row(v.right, first, rank) : nullptr;
    v_diagonal = Second && !call.full ? at(v.weight, k, T(0)) : T(0);
  }
};

template <class T>
struct Element {
  int j;
  T z, a, v_z, v_a;
};

// E numbers a thread of each of the row's vectors: classes first + step * q + (0 .. V - 1).
template <class T, class S, bool Dense, bool Second, int V, int E>
struct Window {
  static_assert(E % V == 0, "a window is made of packs");
  int first, step;
  T z[E], a[Dense ? E : 1], v_z[Second ? E : 1], v_a[Dense && Second ? E : 1];

  L2T_DEVICE Window(const Source<T, S, Dense, Second>& row, int first, int step) : first(first), step(step) {
    packs(row.c, [&](int at, int j) { load<V>(row.z + j, z + at); });
    if (Dense && row.a != nullptr) {
      packs(row.c, [&](int at, int j) { load<V>(row.a + j, a + at); });
    } else if (Dense) {
      numbers(row.c, [&](int at, int j) { a[at] = j == row.y ? row.diagonal : T(0); });
      add_product(row, row.left, row.right, a);
    }
    if (Second && row.v_z != nullptr) {
      packs(row.c, [&](int at, int j) { load<V>(row.v_z + j, v_z + at); });
    } else if (Second) {
      numbers(row.c, [&](int at, int) { v_z[at] = 0; });
    }
    if (Second && Dense && row.v_a != nullptr) {
      packs(row.c, [&](int at, int j) { load<V>(row.v_a + j, v_a + at); });
    } else if (Second && Dense) {
      numbers(row.c, [&](int at, int j) { v_a[at] = j == row.y ? row.v_diagonal : T(0); });
      add_product(row, row.v_left, row.right, v_a);
      add_product(row, row.left, row.v_right, v_a);
    }
  }

  template <class F>
  L2T_DEVICE void each(const Source<T, S, Dense, Second>& row, F f) const {
    numbers(row.c, [&](int at, int j) { f(element(row, at, j)); });
  }

  template <class F>
  L2T_DEVICE void write(const Source<T, S, Dense, Second>& row, S* out, F f) const {
    packs(row.c, [&](int at, int j) {
      T result[V];
#pragma unroll
      for (int e = 0; e < V; ++e) result[e] = f(element(row, at + e, j + e));
      store<V>(out + j, result);
    });
  }

 private:
  // The row of a low-rank product, where there are both factors: x += V U[y].
  L2T_DEVICE void add_product(const Source<T, S, Dense, Second>& row, const T* left, const T* right, T* x) {
    if (left == nullptr || right == nullptr) return;
    // Along a direction there are no registers left for packs.
    constexpr int kPack = Second ? 1 : 16 / sizeof(T);
    if (kPack > 1 && row.rank % kPack == 0 && aligned(left) && aligned(right))
      add_product<kPack>(row, left, right, x);
    else
      add_product<1>(row, left, right, x);
  }

  template <int kPack>
  L2T_DEVICE void add_product(const Source<T, S, Dense, Second>& row, const T* left, const T* right, T* x) {
#pragma unroll 1
    for (int begin = 0; begin < row.rank; begin += kPack) {
      T of_left[kPack];
      load<kPack>(left + begin, of_left);
      numbers(row.c, [&](int at, int j) {
        T of_right[kPack];
        load<kPack>(right + int64_t(j) * row.rank + begin, of_right);
#pragma unroll
        for (int s = 0; s < kPack; ++s) x[at] += of_left[s] * of_right[s];
      });
    }
  }

  L2T_DEVICE Element<T> element(const Source<T, S, Dense, Second>& row, int at, int j) const {
    const T a_j = Dense ? a[Dense ? at : 0] : j == row.y ? row.diagonal : T(0);
    const T v_a_j = !Second      ? T(0)
                    : Dense      ? v_a[Dense && Second ? at : 0]
                    : j == row.y ? row.v_diagonal
                                 : T(0);
    return {j, z[at], a_j, Second ? v_z[Second ? at : 0] : T(0), v_a_j};
  }

  template <class F>
  L2T_DEVICE void packs(int c, F f) const {
#pragma unroll
    for (int q = 0; q < E / V; ++q) {
      const int j = first + q * step;
      if (j < c) f(q * V, j);
    }
  }

  template <class F>
  L2T_DEVICE void numbers(int c, F f) const {
    packs(c, [&](int at, int j) {
#pragma unroll
      for (int e = 0; e < V; ++e) f(at + e, j + e);
    });
  }
};

// ---- rows ----

template <class T, class S, bool Dense, bool Second, int V, int E>
struct RowInRegisters : Team {
  static constexpr bool kDense = Dense;
  Source<T, S, Dense, Second> from;
  Window<T, S, Dense, Second, V, E> window;

  L2T_DEVICE RowInRegisters(const Source<T, S, Dense, Second>& from, Team team)
      : Team(team), from(from), window(from, team.lane * V, team.lanes * V) {}

  L2T_DEVICE void keep() {}

  template <class F>
  L2T_DEVICE void each(F f) const {
    window.each(from, f);
  }

  // Those whose a or v_a can be other than zero.
  template <class F>
  L2T_DEVICE void each_with_weight(F f) const {
    window.each(from, [&](const Element<T>& x) {
      if (Dense || x.j == from.y) f(x);
    });
  }

  template <class F>
  L2T_DEVICE void write(S* out, F f) const {
    window.write(from, out, f);
  }
};

template <class T, class S, bool Dense, bool Second, int V, int E>
struct RowInMemory : Block<T> {
  static constexpr bool kDense = Dense;
  Source<T, S, Dense, Second> from;
  S *z_room, *v_z_room;  // [C] of shared memory, or null

  L2T_DEVICE RowInMemory(const Source<T, S, Dense, Second>& from, T* room, S* z_room, S* v_z_room)
      : Block<T>{room}, from(from), z_room(z_room), v_z_room(v_z_room) {}

  // No barrier: a thread finds there what it put there.
  L2T_DEVICE void keep() {
    copy(from.z, z_room);
    if (Second) copy(from.v_z, v_z_room);
  }

  template <class F>
  L2T_DEVICE void each(F f) const {
    windows([&](const Window<T, S, Dense, Second, V, E>& window) { window.each(from, f); });
  }

  template <class F>
  L2T_DEVICE void each_with_weight(F f) const {
    if (Dense) return each(f);
    if (from.y / V % blockDim.x != threadIdx.x) return;
    const T v_z = from.v_z != nullptr ? widen(from.v_z[from.y]) : T(0);
    f(Element<T>{from.y, widen(from.z[from.y]), from.diagonal, v_z, from.v_diagonal});
  }

  template <class F>
  L2T_DEVICE void write(S* out, F f) const {
    windows([&](const Window<T, S, Dense, Second, V, E>& window) { window.write(from, out, f); });
  }

 private:
  template <class F>
  L2T_DEVICE void windows(F f) const {
    const int step = blockDim.x * V;
#pragma unroll 1
    for (int first = threadIdx.x * V; first < from.c; first += step * (E / V))
      f(Window<T, S, Dense, Second, V, E>(from, first, step));
  }

  L2T_DEVICE void copy(const S*& row, S* room) {
    if (row == nullptr || room == nullptr) return;
#pragma unroll 4
    for (int j = threadIdx.x * V; j < from.c; j += blockDim.x * V)
      *reinterpret_cast<Pack<V, S>*>(room + j) = *reinterpret_cast<const Pack<V, S>*>(row + j);
    row = room;
  }
};

}  // namespace L2T_ISA
}  // namespace l2t
#endif
