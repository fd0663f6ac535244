// The row walk: the loops over the classes of one row from which every kernel is made, as text that the
// compiler turns into vector code (`omp simd`: a promise to the compiler, no runtime). The element's
// expression is the caller's, from math/.
//
// Deliberately not here: a single pass that keeps a running maximum (it takes two exponentials an element and
// was slower at every shape tried), and hand-written vectors.
#ifndef L2T_CPU_WALK_H
#define L2T_CPU_WALK_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

template <class F>
void each(int64_t c, F f) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) f(j);
}

// In short blocks, whose sums are added in double: the rounding error does not grow with the row.
template <class T, class F>
T sum(int64_t c, F term) {
  constexpr int64_t block = 64;
  double total = 0;
  for (int64_t begin = 0; begin < c; begin += block) {
    const int64_t end = min(begin + block, c);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) part += term(j);
    total += part;
  }
  return static_cast<T>(total);
}

template <class T>
T sum(int64_t c, const T* x) {
  return sum<T>(c, [=](int64_t j) { return x[j]; });
}

template <class T>
T dot(int64_t c, const T* x, const T* y) {
  return sum<T>(c, [=](int64_t j) { return x[j] * y[j]; });
}

template <class T>
void add_scaled(int64_t c, T factor, const T* x, T* out) {
  each(c, [=](int64_t j) { out[j] += factor * x[j]; });
}

// NaN may or may not be seen here; it comes through in the sum of exponentials.
template <class T, class S>
T max_of(int64_t c, const S* z) {
  T max = -T(INFINITY);
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < c; ++j) max = widen(z[j]) > max ? widen(z[j]) : max;
  return max;
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
