// Numbers: the only file that knows how exp and log are computed, how half precision is stored, and what an
// infinite log-probability does in a product.
//
// A T of the functions here is one number, or as many as a vector register holds (cpu/vec.h): then `select`
// stands for ?: and a comparison gives one answer a lane. exp, log, log1p and expm1 are our own, without a branch
// or a call, so that they are vector code in any instruction set; their error is asserted in ULP by
// tests/native/test_math.cpp. They are right where the loss needs them: exp and expm1 up to 40, log of normal
// numbers, log1p on [0, 1]; NaN stays NaN everywhere. A card's log and its kin are CUDA's. Deliberately not here:
// anything about the loss.
#ifndef L2T_MATH_NUM_H
#define L2T_MATH_NUM_H

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#  define L2T_FN __host__ __device__ inline
#else
#  define L2T_FN inline
#endif

// The namespace of everything that is compiled once per instruction set, which the build names: functions of
// one name and different instructions must not be taken for each other by the linker.
#ifndef L2T_ISA
#  if defined(__CUDACC__) || defined(L2T_CUDA_ON_CPU)
#    define L2T_ISA cuda
#  else
#    define L2T_ISA generic
#  endif
#endif

namespace l2t {
inline namespace L2T_ISA {

// ---- one number or a vector of them ----

// The type of one of them, and of the bits of all.
template <class T>
struct Number;
template <>
struct Number<float> {
  using One = float;
  using Bits = uint32_t;
};
template <>
struct Number<double> {
  using One = double;
  using Bits = uint64_t;
};
template <class T>
using One = typename Number<T>::One;
template <class T>
using Bits = typename Number<T>::Bits;

template <class To, class From>
L2T_FN To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither lost nor made up");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
L2T_FN T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// x y + z, rounded once where that is one instruction, and the same for a lone number as in a vector.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
constexpr bool kFused = true;
L2T_FN float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
L2T_FN double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
#else
constexpr bool kFused = false;
L2T_FN float fma(float x, float y, float z) { return x * y + z; }
L2T_FN double fma(double x, double y, double z) { return x * y + z; }
#endif

// The second, if either is NaN.
template <class T>
L2T_FN T larger(T x, T y) {
  return select(x > y, x, y);
}

L2T_FN float abs(float x) { return __builtin_fabsf(x); }
L2T_FN double abs(double x) { return __builtin_fabs(x); }

// ---- numbers in memory ----
//
// Half precision is storage only. The conversions from and to the lower 16 bits are integer arithmetic without a
// branch, rounding to the nearest, ties to even; denormal numbers, infinities and NaN come through.

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T>
L2T_FN T from_bfloat16(Bits<T> bits) {
  return same_bits<T>(bits << 16);
}

template <class T>
L2T_FN Bits<T> to_bfloat16(T x) {
  const Bits<T> bits = same_bits<Bits<T>>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return same_bits<Bits<T>>(select(x == x, same_bits<T>(rounded), same_bits<T>(bits | 0x400000))) >> 16;
}

template <class T>
L2T_FN T from_float16(Bits<T> bits) {
  const Bits<T> magnitude = (bits & 0x7fff) << 13;
  const T scaled = same_bits<T>(magnitude) * T(0x1p112f);  // from exponent bias 15 to 127
  const T x = select(scaled >= T(65536), same_bits<T>(magnitude | 0x7f800000), scaled);
  return same_bits<T>(same_bits<Bits<T>>(x) | (bits & 0x8000) << 16);
}

template <class T>
L2T_FN Bits<T> to_float16(T x) {
  const Bits<T> bits = same_bits<Bits<T>>(x), none = bits ^ bits;
  const T size = abs(x);
  // Adding 0.5 moves the last bit of a denormal half to the last bit of the sum.
  const Bits<T> denormal = same_bits<Bits<T>>(size + T(0.5)) - 0x3f000000;
  const Bits<T> magnitude = bits & 0x7fffffff;
  const Bits<T> normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  T result = select(size < T(0x1p-14f), same_bits<T>(denormal), same_bits<T>(normal));
  result = select(size < T(65520), result, same_bits<T>(none + 0x7c00));
  result = select(x == x, result, same_bits<T>(none + 0x7e00));
  return same_bits<Bits<T>>(result) | (bits >> 16 & 0x8000);
}

L2T_FN float widen(float x) { return x; }
L2T_FN double widen(double x) { return x; }
L2T_FN float widen(bfloat16 x) { return from_bfloat16<float>(x.bits); }
L2T_FN float widen(float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return from_float16<float>(x.bits);
#endif
}
L2T_FN void narrow(float x, float& out) { out = x; }
L2T_FN void narrow(double x, double& out) { out = x; }
L2T_FN void narrow(float x, bfloat16& out) { out.bits = static_cast<uint16_t>(to_bfloat16(x)); }
L2T_FN void narrow(float x, float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  out.bits = static_cast<uint16_t>(to_float16(x));
#endif
}

// ---- exp and expm1: x = k log 2 + r with |r| <= log(2)/2 ----

template <class T>
struct Format;

template <>
struct Format<float> {
  static constexpr float exp_low = -104.0f;    // below: exp is 0
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // few bits: k * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float one_half_root = 0.70710678f;
  static constexpr float two_to_mantissa = 8388608.0f;
  static constexpr float two_to_minus_64 = 0x1p-64f;
  static constexpr int bias = 127, mantissa = 23, log_terms = 5;
};

template <>
struct Format<double> {
  static constexpr double exp_low = -746.0;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693145751953125;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr double one_half_root = 0.70710678118654752;
  static constexpr double two_to_mantissa = 4503599627370496.0;
  static constexpr double two_to_minus_64 = 0x1p-64;
  static constexpr int bias = 1023, mantissa = 52, log_terms = 12;
};

// (exp(r) - 1 - r) / r^2 for |r| <= log(2)/2, minimax in the relative error of exp: 3.1e-9 in float, 3.7e-18
// in double.
template <class T>
L2T_FN T exp_tail(T r, float) {
  T y = fma(T(0.00138145404892f), r, T(0.00836874511741f));
  y = fma(y, r, T(0.041668390778f));
  y = fma(y, r, T(0.16666520399f));
  return fma(y, r, T(0.499999934322f));
}

template <class T>
L2T_FN T exp_tail(T r, double) {
  T y = fma(T(2.5000018376404530119e-8), r, T(2.7630306344621712242e-7));
  y = fma(y, r, T(2.7557586805904075949e-6));
  y = fma(y, r, T(0.000024801492949361810685));
  y = fma(y, r, T(0.00019841269505770564355));
  y = fma(y, r, T(0.0013888888943760232634));
  y = fma(y, r, T(0.0083333333334949794524));
  y = fma(y, r, T(0.041666666666529727203));
  y = fma(y, r, T(0.16666666666666411503));
  return fma(y, r, T(0.50000000000000106689));
}

// The integer k of x as k + round, whose lowest bits are k.
template <class T>
L2T_FN T exp_k_plus_round(T x) {
  return fma(x, T(Format<One<T>>::log2_e), T(Format<One<T>>::round));
}

template <class T>
L2T_FN T exp_r(T x, T k_plus_round) {
  using F = Format<One<T>>;
  const T k = k_plus_round - T(F::round);
  return fma(k, T(-F::ln2_low), fma(k, T(-F::ln2_high), x));
}

// y 2^k for k <= 60. The result may be denormal: the power is 64 too high, and the last product rounds.
template <class T>
L2T_FN T times_power_of_two(T y, T k_plus_round) {
  using F = Format<One<T>>;
  const Bits<T> power = (same_bits<Bits<T>>(k_plus_round) + (F::bias + 64)) << F::mantissa;
  return y * same_bits<T>(power) * T(F::two_to_minus_64);
}

template <class T>
L2T_FN T exp(T x) {
  x = larger(T(Format<One<T>>::exp_low), x);
  const T k_plus_round = exp_k_plus_round(x), r = exp_r(x, k_plus_round), tail = exp_tail(r, One<T>());
  // The left is an operation less; rounded after each product it would be 1.16 ULP in float.
  return times_power_of_two(kFused ? fma(fma(tail, r, T(1)), r, T(1)) : 1 + (r + r * r * tail), k_plus_round);
}

// A card computes float32's with its own instruction, as precisely; in double there is none.
L2T_FN float exp(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  return exp<float>(x);
#endif
}

template <class T>
L2T_FN T expm1(T x) {
#ifdef __CUDA_ARCH__
  return ::expm1(x);
#else
  x = larger(T(Format<One<T>>::exp_low), x);
  const T k_plus_round = exp_k_plus_round(x), r = exp_r(x, k_plus_round);
  const T power = times_power_of_two(T(1), k_plus_round);
  return fma(power, fma(r * r, exp_tail(r, One<T>()), r), power - 1);
#endif
}

// ---- log and log1p ----

// log(1 + f) for f in [-0.3, 0.5] as f - sum, so that the caller can add to the sum what is small beside f: with
// s = f / (2 + f), log(1 + f) = 2 artanh(s) and f - 2 s = s f.
template <class T>
L2T_FN T f_minus_log1p(T f) {
  const T s = f / (2 + f), square = s * s, half = T(0.5) * f * f;
  T series = T(0);
  for (int i = Format<One<T>>::log_terms; i > 0; --i)  // 2/3 s^2 + 2/5 s^4 + ...
    series = square * (series + One<T>(2) / One<T>(2 * i + 1));
  return half - s * (half + series);
}

template <class T>
L2T_FN T log(T x) {
#ifdef __CUDA_ARCH__
  return ::log(x);
#else
  using F = Format<One<T>>;
  using B = Bits<One<T>>;
  // x = 2^k (1 + f) with 1 + f in [1/sqrt 2, sqrt 2). Raised by half of all there is, k is not negative.
  constexpr B raise = B(1) << (8 * sizeof(B) - 1 - F::mantissa);
  const B split = same_bits<B>(F::one_half_root), number = same_bits<B>(F::two_to_mantissa);
  const Bits<T> bits = same_bits<Bits<T>>(x);
  const Bits<T> k_raised = (bits - split + (raise << F::mantissa)) >> F::mantissa;
  const T k = same_bits<T>(k_raised | number) - T(F::two_to_mantissa + static_cast<One<T>>(raise));
  const T f = same_bits<T>(bits - ((k_raised - raise) << F::mantissa)) - 1;
  const T y = fma(k, T(F::ln2_high), f - (f_minus_log1p(f) - k * T(F::ln2_low)));
  return select(x < T(INFINITY), y, x);
#endif
}

template <class T>
L2T_FN T log1p(T x) {
#ifdef __CUDA_ARCH__
  return ::log1p(x);
#else
  using F = Format<One<T>>;
  const auto above = x > T(0.5);  // 1 + x = 2 (1 + f)
  const T f = select(above, T(0.5) * (x - 1), x);
  const T sum = f_minus_log1p(f);
  return select(above, T(F::ln2_high) + (f - (sum - T(F::ln2_low))), f - sum);
#endif
}

// ---- infinities ----

// factor * x, where a factor of exactly zero removes its term even if x is infinite: a class of probability
// zero (logit -inf, log p = -inf) that has no weight takes no part. NaN is not removed.
template <class T>
L2T_FN T times(T factor, T x) {
  const auto removed = (factor == T(0)) & (abs(x) == T(INFINITY));
  return factor * select(removed, T(0), x);
}

template <class T>
L2T_FN bool finite(T x) {
  return abs(x) < T(INFINITY);
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
