// The row walk: the loops over the classes of one row from which every kernel is made, a vector at a time. What is
// done to the numbers is the caller's, from math/.
//
// Deliberately not here: a single pass that keeps a running maximum of elements (it takes two exponentials an element
// and was slower at every shape tried; loss.cpp keeps one of pieces).
#ifndef L2T_CPU_WALK_H
#define L2T_CPU_WALK_H

#include <type_traits>

#include "../math/weight.h"
#include "vec.h"

namespace l2t {
inline namespace L2T_ISA {

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t max(int64_t x, int64_t y) { return x > y ? x : y; }
constexpr int64_t up_to_multiple(int64_t x, int64_t of) { return (x + of - 1) / of * of; }

// Which lanes of a vector stand for classes of the row: all of them, or at its end the first few of one register.
template <int K>
struct Whole {
  template <class S>
  L2T_INLINE Vec<Arithmetic<S>, K> load(const S* from) const {
    using V = Vec<Arithmetic<S>, K>;
    if constexpr (K == 1)
      return V{{widen(load_bits(from), S())}};
    else
      return V{{widen(load_bits(from), S()), widen(load_bits(from + V::lanes_of_one), S())}};
  }
  template <class S>
  L2T_INLINE void store(S* to, Vec<Arithmetic<S>, K> x) const {
    store_bits(to, narrow(x.of.first, S()));
    if constexpr (K == 2) store_bits(to + x.lanes_of_one, narrow(x.of.second, S()));
  }
  template <class S>
  L2T_INLINE void stream(S* to, Vec<Arithmetic<S>, K> x) const {
    stream_bits(to, narrow(x.of.first, S()));
    if constexpr (K == 2) stream_bits(to + x.lanes_of_one, narrow(x.of.second, S()));
  }
  // From and to scratch rows, which end with a register.
  template <class T>
  Vec<T, K> load_all(const T* from) const {
    return load(from);
  }
  template <class T>
  void store_all(T* to, Vec<T, K> x) const {
    store(to, x);
  }
  template <class V, class T>
  V only(const V& x, T) const {
    return x;
  }
};

struct Part {
  int count;

  template <class S>
  Vec<Arithmetic<S>> load(const S* from) const {
    return Vec<Arithmetic<S>>({widen(load_bits(from, count), S())});
  }
  template <class S>
  void store(S* to, Vec<Arithmetic<S>> x) const {
    store_bits(to, narrow(x.of.first, S()), count);
  }
  template <class T>
  Vec<T> load_all(const T* from) const {
    return Whole<1>().load(from);
  }
  template <class T>
  void store_all(T* to, Vec<T> x) const {
    Whole<1>().store(to, x);
  }
  template <class T>
  Vec<T> only(Vec<T> x, T others) const {
    Vec<T> lane;
    for (int at = 0; at < Vec<T>::lanes; ++at) lane.of.first[at] = static_cast<T>(at);
    return select(lane < Vec<T>(static_cast<T>(count)), x, Vec<T>(others));
  }
};

// Into the first cache what lies so far behind the numbers of a vector. Nothing for 0.
template <int64_t Ahead, class S, class Which>
L2T_INLINE void fetch(const S* from, Which) {
  if constexpr (Ahead > 0 && std::is_same_v<Which, Whole<2>>)
    for (int64_t j = 0; j < Vec<Arithmetic<S>, 2>::lanes; j += 64 / sizeof(S))
      __builtin_prefetch(from + Ahead + j);
}

// A sum over classes, to which every vector of a row adds. Lanes apart and in two steps, so that the rounding error
// hardly grows with the row; a row gives the same bits wherever it lies.
template <class T>
struct Sum {
  Vec<T, 2> recent = T(0), earlier = T(0);

  L2T_INLINE void add(Vec<T, 2> x) { recent = recent + x; }
  L2T_INLINE void add(Vec<T> x) { recent.of.first = (Vec<T>({recent.of.first}) + x).of.first; }
  L2T_INLINE void add(Vec<T, 2> x, Vec<T, 2> y) { recent = fma(x, y, recent); }
  L2T_INLINE void add(Vec<T> x, Vec<T> y) { recent.of.first = fma(x, y, Vec<T>({recent.of.first})).of.first; }
  void settle() {
    earlier = earlier + recent;
    recent = T(0);
  }
  T value() const { return sum_of_lanes(earlier + recent); }
};

// f(j, which) for what is left of a row after pairs of vectors.
template <class T, class F>
L2T_INLINE void each_of_rest(int64_t j, int64_t c, F f) {
  if (j + Vec<T>::lanes <= c) {
    f(j, Whole<1>());
    j += Vec<T>::lanes;
  }
  if (j < c) f(j, Part{static_cast<int>(c - j)});
}

// f(j, which): the classes from j on, for the vectors of a row; `sums` are what f adds to. (Where f stands, it is
// compiled: here once for each width.)
template <class T, class F, class... Sums>
void each(int64_t c, F f, Sums&... sums) {
  constexpr int64_t two = 2 * Vec<T>::lanes, block = 16 * two;
  int64_t j = 0;
  if constexpr (sizeof...(Sums) > 0)
    for (; j + block <= c; (sums.settle(), ...))
      for (const int64_t end = j + block; j < end; j += two) f(j, Whole<2>());
  for (; j + two <= c; j += two) f(j, Whole<2>());
  each_of_rest<T>(j, c, f);
}

// out[j] = f(j, which), past the cache if wanted: then others may look after `streamed`.
template <class T, class S, class F>
void write(int64_t c, S* out, bool stream, F f) {
  constexpr int64_t two = 2 * Vec<T>::lanes;
  int64_t j = 0;
  if (stream) {
    // Such stores are to addresses that are multiples of their size.
    constexpr int64_t size = sizeof(S);
    const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % sizeof(Raw<S>)) / size;
    j = beyond > 0 ? min(c, Vec<T>::lanes - beyond) : 0;
    const Part first{static_cast<int>(j)};
    if (j > 0) first.store(out, f(0, first));
    for (; j + two <= c; j += two) Whole<2>().stream(out + j, f(j, Whole<2>()));
  } else {
    for (; j + two <= c; j += two) Whole<2>().store(out + j, f(j, Whole<2>()));
  }
  each_of_rest<T>(j, c, [&](int64_t j, auto which) { which.store(out + j, f(j, which)); });
}

// NaN may or may not be seen here; it comes through in the sum of exponentials.
template <class T, class S>
T max_of(int64_t c, const S* z) {
  constexpr int64_t two = 2 * Vec<T>::lanes;
  Vec<T, 2> even = -T(INFINITY), odd = even;  // four maxima, so that none waits for the last
  int64_t j = 0;
  for (; j + 2 * two <= c; j += 2 * two) {
    even = larger(Whole<2>().load(z + j), even);
    odd = larger(Whole<2>().load(z + j + two), odd);
  }
  even = larger(even, odd);
  Vec<T> largest = larger(Vec<T>({even.of.first}), Vec<T>({even.of.second}));
  for (; j + Vec<T>::lanes <= c; j += Vec<T>::lanes) largest = larger(Whole<1>().load(z + j), largest);
  if (j < c) {
    const Part last{static_cast<int>(c - j)};
    largest = larger(last.only(last.load(z + j), -T(INFINITY)), largest);
  }
  return largest_lane(largest);
}

template <class T>
T sum(int64_t c, const T* x) {
  Sum<T> total;
  each<T>(c, [&](int64_t j, auto which) { total.add(which.load(x + j)); }, total);
  return total.value();
}

template <class T>
void fill(int64_t c, T value, T* out) {
  for (int64_t j = 0; j < c; ++j) out[j] = value;
}

// out[j] = f(j, which), or += f(j, which)
template <class T, class F>
void put_or_add(int64_t c, T* out, bool put, F f) {
  if (put)
    each<T>(c, [&](int64_t j, auto which) { which.store(out + j, f(j, which)); });
  else
    each<T>(c, [&](int64_t j, auto which) { which.store(out + j, which.load(out + j) + f(j, which)); });
}

// to[j][i] = from[i][j] for i < rows, j < columns; a row of `from` has so many numbers.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int64_t lines = 64 / sizeof(T);  // of one cache line on either side
  for (int64_t first = 0; first < rows; first += lines)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = first; i < min(first + lines, rows); ++i) to[j * to_row + i] = from[i * from_row + j];
}

// Products of small matrices with long rows, four rows of the result at a time, so that what is loaded serves four.
// (Four variables and not an array: GCC 12 keeps an array of registers in memory.)
constexpr int kTile = 4;

// out[m][j] = (add ? out[m][j] : 0) + sum over q < count of left[q][m] right[q * stride + j]
template <class T>
void products(int64_t c, int64_t count, const T (*left)[kTile], const T* right, int64_t stride, bool add,
              T* const (&out)[kTile]) {
  T *const out0 = out[0], *const out1 = out[1], *const out2 = out[2], *const out3 = out[3];
  each<T>(c, [=](int64_t j, auto which) {
    using V = decltype(which.load(right));
    V sum0 = T(0), sum1 = T(0), sum2 = T(0), sum3 = T(0);
    if (add)
      sum0 = which.load(out0 + j), sum1 = which.load(out1 + j), sum2 = which.load(out2 + j),
      sum3 = which.load(out3 + j);
    for (int64_t q = 0; q < count; ++q) {
      const V x = which.load(right + q * stride + j);
      sum0 = plus_product(sum0, left[q][0], x), sum1 = plus_product(sum1, left[q][1], x);
      sum2 = plus_product(sum2, left[q][2], x), sum3 = plus_product(sum3, left[q][3], x);
    }
    which.store(out0 + j, sum0), which.store(out1 + j, sum1);
    which.store(out2 + j, sum2), which.store(out3 + j, sum3);
  });
}

// f(m, sum over j of x[m][j] y[j])
template <class T, class F>
void dots(int64_t c, const T* const (&x)[kTile], const T* y, F f) {
  const T *const x0 = x[0], *const x1 = x[1], *const x2 = x[2], *const x3 = x[3];
  Sum<T> sum0, sum1, sum2, sum3;
  const auto add = [&](int64_t j, auto which) {
    const auto y_j = which.load(y + j);
    sum0.add(which.load(x0 + j), y_j), sum1.add(which.load(x1 + j), y_j);
    sum2.add(which.load(x2 + j), y_j), sum3.add(which.load(x3 + j), y_j);
  };
  each<T>(c, add, sum0, sum1, sum2, sum3);
  f(0, sum0.value()), f(1, sum1.value()), f(2, sum2.value()), f(3, sum3.value());
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
