// Numbers: the only file that knows how exp and log are computed, and what an infinite log-probability does
// in a product.
//
// exp is our own, without a branch or a call, so that a loop over it becomes vector code on any instruction
// set and the same bits come out of a lone scalar; its error is asserted in ULP by
// tests/native/test_math.cpp. log and its kin are needed once a row and are the C library's. Deliberately not
// here: anything about the loss.
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

// ---- numbers in memory ----
//
// Half precision is storage only. The conversions are integer arithmetic without a branch, rounding to the
// nearest, ties to even; denormal numbers, infinities and NaN come through.

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

L2T_FN uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

L2T_FN float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

L2T_FN float widen(float x) { return x; }
L2T_FN double widen(double x) { return x; }
L2T_FN float widen(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
L2T_FN float widen(float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#endif
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t beyond = magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0;  // infinity and NaN
  const float scaled = float_of(magnitude) * 0x1p112f;                   // from exponent bias 15 to 127
  return float_of(bits_of(scaled) | beyond | uint32_t(x.bits & 0x8000) << 16);
}

L2T_FN void narrow(float x, float& out) { out = x; }
L2T_FN void narrow(double x, double& out) { out = x; }
L2T_FN void narrow(float x, bfloat16& out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}
L2T_FN void narrow(float x, float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
  return;
#endif
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  // Adding 0.5 moves the last bit of a denormal half to the last bit of the sum.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t finite = magnitude < 113u << 23 ? denormal : normal;
  const uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  out.bits = static_cast<uint16_t>((magnitude >= 0x477ff000 ? beyond : finite) | (bits >> 16 & 0x8000));
}

// ---- exp and log ----

// How exp splits its argument: x = k log 2 + r with |r| <= log(2)/2.
template <class T>
struct ExpSplit;

template <>
struct ExpSplit<float> {
  using Bits = uint32_t;
  static constexpr float low = -104.0f, high = 89.0f;  // beyond: 0 and infinity
  static constexpr float round = 12582912.0f;          // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // few bits: k * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr int bias = 127, mantissa = 23;
};

template <>
struct ExpSplit<double> {
  using Bits = uint64_t;
  static constexpr double low = -746.0, high = 710.0;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 0.693145751953125;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
  static constexpr int bias = 1023, mantissa = 52;
};

// (exp(r) - 1 - r) / r^2 for |r| <= log(2)/2, minimax in the relative error of exp: 3.1e-9 in float, 3.7e-18
// in double.
L2T_FN float exp_tail(float r) {
  return 0.499999934322f +
         r * (0.16666520399f + r * (0.041668390778f + r * (0.00836874511741f + r * 0.00138145404892f)));
}

L2T_FN double exp_tail(double r) {
  const double high =
      0.000024801492949361810685 +
      r * (2.7557586805904075949e-6 + r * (2.7630306344621712242e-7 + r * 2.5000018376404530119e-8));
  const double mid =
      0.0083333333334949794524 + r * (0.0013888888943760232634 + r * (0.00019841269505770564355 + r * high));
  return 0.50000000000000106689 + r * (0.16666666666666411503 + r * (0.041666666666529727203 + r * mid));
}

// 2^k, where the integer k stands in the low bits of k + round.
template <class T>
L2T_FN T power_of_two(T k_plus_round) {
  using E = ExpSplit<T>;
  typename E::Bits bits;
  std::memcpy(&bits, &k_plus_round, sizeof bits);
  bits = (bits + E::bias) << E::mantissa;
  T power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

template <class T>
L2T_FN T exp(T x) {
  using E = ExpSplit<T>;
  x = x < E::low ? E::low : x;  // written so that NaN stays NaN
  x = x > E::high ? E::high : x;
  const T k_rounded = x * E::log2_e + E::round;
  const T k = k_rounded - E::round;
  const T r = (x - k * E::ln2_high) - k * E::ln2_low;
  const T y = 1 + (r + r * r * exp_tail(r));
  // 2^k in two factors: where the result is denormal or barely finite, k lies outside the exponents of normal
  // numbers.
  const T half_rounded = k * T(0.5) + E::round;
  const T half = half_rounded - E::round;
  return y * power_of_two(half_rounded) * power_of_two((k - half) + E::round);
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
L2T_FN T log(T x) {
  return std::log(x);
}

template <class T>
L2T_FN T log1p(T x) {
  return std::log1p(x);
}

template <class T>
L2T_FN T expm1(T x) {
  return std::expm1(x);
}

template <class T>
L2T_FN T abs(T x) {
  return std::fabs(x);
}

// factor * x, where a factor of exactly zero removes its term even if x is infinite: a class of probability
// zero (logit -inf, log p = -inf) that has no weight takes no part. NaN is not removed.
template <class T>
L2T_FN T times(T factor, T x) {
  const bool removed = (factor == 0) & (abs(x) == T(INFINITY));
  return factor * (removed ? T(0) : x);
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
