// A vector register as a number: what math/num.h asks of a T, for as many floats or doubles as one instruction of
// the instruction set works on; how they come from memory and go there, half precision and the end of a row
// included; and the sum and maximum of the lanes.
//
// The text is the compiler's vector types, the same for every instruction set. Intrinsics are only where that
// text is not turned into the one instruction there is: products with a sum, maxima, powers of two, F16C, loads and
// stores of a part, stores past the cache. Deliberately not here: anything about rows (walk.h).
#ifndef L2T_CPU_VEC_H
#define L2T_CPU_VEC_H

#include "../math/num.h"

#if defined(__x86_64__)
// GCC 12 takes its own _mm512_undefined_ps() for a mistake of ours.
#  pragma GCC diagnostic push
#  pragma GCC diagnostic ignored "-Wuninitialized"
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  include <immintrin.h>
#  pragma GCC diagnostic pop
#endif

namespace l2t {
inline namespace L2T_ISA {

#define L2T_INLINE __attribute__((always_inline)) inline

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Register {
  typedef T Native __attribute__((vector_size(kVectorBytes)));
};

// One register or two, of which the second goes through every operation beside the first: neither waits for a result
// of the other. (Members and not an array: GCC 12 keeps an array of registers in memory.)
template <class Native, int K>
struct Registers {
  Native first;
};
template <class Native>
struct Registers<Native, 2> {
  Native first, second;
};

// f on each register of the arguments, as a V.
template <class V, class F, class... Vs>
L2T_INLINE V on_each(F f, const Vs&... x) {
  if constexpr (V::count == 1)
    return V{{f(x.of.first...)}};
  else
    return V{{f(x.of.first...), f(x.of.second...)}};
}

template <class Native, int K>
struct Answers {  // of comparisons: a lane is all ones or zero
  static constexpr int count = K;
  Registers<Native, K> of;

  friend L2T_INLINE Answers operator&(Answers x, Answers y) {
    return on_each<Answers>([](auto a, auto b) { return a & b; }, x, y);
  }
};

template <class T, int K = 1>
struct Vec {
  static constexpr int count = K, lanes_of_one = kVectorBytes / sizeof(T), lanes = K * lanes_of_one;
  using Native = typename Register<T>::Native;
  using Compared = Answers<decltype(Native() < Native()), K>;

  Registers<Native, K> of;

  L2T_INLINE T operator[](int lane) const {
    if constexpr (K == 2)
      if (lane >= lanes_of_one) return of.second[lane - lanes_of_one];
    return of.first[lane];
  }

  Vec() = default;
  L2T_INLINE Vec(Registers<Native, K> of) : of(of) {}
  L2T_INLINE Vec(T x) {
    of.first = x - Native{};
    if constexpr (K == 2) of.second = of.first;
  }

  friend L2T_INLINE Vec operator+(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a + b; }, x, y);
  }
  friend L2T_INLINE Vec operator-(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a - b; }, x, y);
  }
  friend L2T_INLINE Vec operator*(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a * b; }, x, y);
  }
  friend L2T_INLINE Vec operator/(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a / b; }, x, y);
  }
  friend L2T_INLINE Vec operator&(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a & b; }, x, y);
  }
  friend L2T_INLINE Vec operator|(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a | b; }, x, y);
  }
  friend L2T_INLINE Vec operator^(Vec x, Vec y) {
    return on_each<Vec>([](auto a, auto b) { return a ^ b; }, x, y);
  }
  friend L2T_INLINE Vec operator-(Vec x) {
    return on_each<Vec>([](auto a) { return -a; }, x);
  }
  friend L2T_INLINE Vec operator<<(Vec x, int bits) {
    return on_each<Vec>([bits](auto a) { return a << bits; }, x);
  }
  friend L2T_INLINE Vec operator>>(Vec x, int bits) {
    return on_each<Vec>([bits](auto a) { return a >> bits; }, x);
  }
  friend L2T_INLINE Compared operator<(Vec x, Vec y) {
    return on_each<Compared>([](auto a, auto b) { return a < b; }, x, y);
  }
  friend L2T_INLINE Compared operator>(Vec x, Vec y) {
    return on_each<Compared>([](auto a, auto b) { return a > b; }, x, y);
  }
  friend L2T_INLINE Compared operator>=(Vec x, Vec y) {
    return on_each<Compared>([](auto a, auto b) { return a >= b; }, x, y);
  }
  friend L2T_INLINE Compared operator==(Vec x, Vec y) {
    return on_each<Compared>([](auto a, auto b) { return a == b; }, x, y);
  }
  friend L2T_INLINE Vec select(Compared condition, Vec yes, Vec no) {
    return on_each<Vec>([](auto a, auto b, auto c) { return a ? b : c; }, condition, yes, no);
  }
};

template <class T, int K>
struct Number<Vec<T, K>> {
  using One = T;
  using Bits = Vec<typename Number<T>::Bits, K>;
};

template <class To, class T, int K>
L2T_INLINE To same_bits(Vec<T, K> from) {
  return on_each<To>([](auto a) { return reinterpret_cast<typename To::Native>(a); }, from);
}

template <class T, int K>
L2T_INLINE Vec<T, K> abs(Vec<T, K> x) {
  constexpr auto magnitude = ~Bits<T>(0) >> 1;
  return same_bits<Vec<T, K>>(same_bits<Bits<Vec<T, K>>>(x) & magnitude);
}

// ---- what has an instruction of its own, on one register ----

using Floats = typename Register<float>::Native;
using Doubles = typename Register<double>::Native;

#if defined(__AVX512F__)
inline Floats fma_of(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
inline Doubles fma_of(Doubles x, Doubles y, Doubles z) { return _mm512_fmadd_pd(x, y, z); }
inline Floats larger_of(Floats x, Floats y) { return _mm512_max_ps(x, y); }
inline Doubles larger_of(Doubles x, Doubles y) { return _mm512_max_pd(x, y); }
inline Floats scaled(Floats y, Floats k) { return _mm512_scalef_ps(y, k); }
inline Doubles scaled(Doubles y, Doubles k) { return _mm512_scalef_pd(y, k); }

template <class T, int K>
L2T_INLINE Vec<T, K> times_power_of_two(Vec<T, K> y, Vec<T, K> k_plus_round) {
  return on_each<Vec<T, K>>([](auto a, auto k) { return scaled(a, k); }, y, k_plus_round - Format<T>::round);
}
#elif defined(__AVX2__) && defined(__FMA__)
inline Floats fma_of(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
inline Doubles fma_of(Doubles x, Doubles y, Doubles z) { return _mm256_fmadd_pd(x, y, z); }
inline Floats larger_of(Floats x, Floats y) { return _mm256_max_ps(x, y); }
inline Doubles larger_of(Doubles x, Doubles y) { return _mm256_max_pd(x, y); }
#else
template <class Native>
Native fma_of(Native x, Native y, Native z) {
  if (!kFused) return x * y + z;
  for (size_t lane = 0; lane < kVectorBytes / sizeof(x[0]); ++lane) z[lane] = fma(x[lane], y[lane], z[lane]);
  return z;
}
#  if defined(__SSE2__)
inline Floats larger_of(Floats x, Floats y) { return _mm_max_ps(x, y); }
inline Doubles larger_of(Doubles x, Doubles y) { return _mm_max_pd(x, y); }
#  else
template <class Native>
Native larger_of(Native x, Native y) {
  return x > y ? x : y;
}
#  endif
#endif

template <class T, int K>
L2T_INLINE Vec<T, K> fma(Vec<T, K> x, Vec<T, K> y, Vec<T, K> z) {
  return on_each<Vec<T, K>>([](auto a, auto b, auto c) { return fma_of(a, b, c); }, x, y, z);
}

template <class T, int K>
L2T_INLINE Vec<T, K> larger(Vec<T, K> x, Vec<T, K> y) {
  return on_each<Vec<T, K>>([](auto a, auto b) { return larger_of(a, b); }, x, y);
}

// ---- the lanes of a register as one number, halves first ----

template <class V>
struct Halved {
  typedef decltype(V()[0] + V()[0]) Half __attribute__((vector_size(sizeof(V) / 2)));
  Half low, high;
};

template <class V>
L2T_INLINE Halved<V> halved(V x) {
  Halved<V> halves;
  std::memcpy(&halves, &x, sizeof x);
  return halves;
}

template <class Half>
L2T_INLINE Doubles in_double(Half x) {
  return __builtin_convertvector(x, Doubles);
}

#if defined(__AVX512F__)
L2T_INLINE Halved<Floats> halved(Floats x) {
  return {_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)};
}
L2T_INLINE Halved<Doubles> halved(Doubles x) {
  return {_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1)};
}
L2T_INLINE Doubles in_double(__m256 x) { return _mm512_cvtps_pd(x); }
#endif

template <class V, class F>
L2T_INLINE auto fold(V x, F f) {
  const Halved<V> halves = halved(x);
  if constexpr (sizeof(V) == 2 * sizeof(x[0]))
    return f(x[0], x[1]);
  else
    return fold(f(halves.low, halves.high), f);
}

// In double, so that a sum of a few hundred numbers is rounded hardly more often than they are.
L2T_INLINE double sum_of_lanes(Vec<double, 2> x) {
  return fold(x.of.first + x.of.second, [](auto a, auto b) { return a + b; });
}

L2T_INLINE float sum_of_lanes(Vec<float, 2> x) {
  const Halved<Floats> first = halved(x.of.first), second = halved(x.of.second);
  const Doubles sum =
      (in_double(first.low) + in_double(first.high)) + (in_double(second.low) + in_double(second.high));
  return static_cast<float>(fold(sum, [](auto a, auto b) { return a + b; }));
}

template <class T>
T largest_lane(Vec<T> x) {
  return fold(x.of.first, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- as many numbers of a type in memory as a register has lanes: all, or the first `count` ----

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
using Words = typename Register<uint32_t>::Native;

#if defined(__AVX512F__)
inline Words words(Halves x) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
}
inline Halves lower_halves(Words x) {
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
#else
inline Words words(Halves x) { return __builtin_convertvector(x, Words); }
inline Halves lower_halves(Words x) { return __builtin_convertvector(x, Halves); }
#endif

inline Floats widen(Floats x, float) { return x; }
inline Doubles widen(Doubles x, double) { return x; }
inline Floats widen(Halves x, bfloat16) {
  return from_bfloat16<Vec<float>>(Vec<uint32_t>({words(x)})).of.first;
}
inline Floats narrow(Floats x, float) { return x; }
inline Doubles narrow(Doubles x, double) { return x; }
inline Halves narrow(Floats x, bfloat16) { return lower_halves(to_bfloat16(Vec<float>({x})).of.first); }

#if defined(__AVX512F__)
inline Floats widen(Halves x, float16) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x)); }
inline Halves narrow(Floats x, float16) {
  return reinterpret_cast<Halves>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Floats widen(Halves x, float16) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x)); }
inline Halves narrow(Floats x, float16) {
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Floats widen(Halves x, float16) {
  return from_float16<Vec<float>>(Vec<uint32_t>({words(x)})).of.first;
}
inline Halves narrow(Floats x, float16) { return lower_halves(to_float16(Vec<float>({x})).of.first); }
#endif

// The type of the arithmetic for a type in memory, and the bits of a register's worth of it.
template <class S>
using Arithmetic = decltype(widen(S()));
template <class S>
using Raw = decltype(narrow(typename Register<Arithmetic<S>>::Native(), S()));

template <class S>
Raw<S> load_bits(const S* from) {
  Raw<S> bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

template <class S>
void store_bits(S* to, Raw<S> bits) {
  std::memcpy(to, &bits, sizeof bits);
}

// Zero beyond the count.
template <class S>
Raw<S> load_bits(const S* from, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) return reinterpret_cast<Raw<S>>(_mm512_maskz_loadu_epi64(mask, from));
  if constexpr (sizeof(S) == 4) return reinterpret_cast<Raw<S>>(_mm512_maskz_loadu_epi32(mask, from));
  if constexpr (sizeof(S) == 2) return reinterpret_cast<Raw<S>>(_mm256_maskz_loadu_epi16(mask, from));
#else
  Raw<S> bits{};
  std::memcpy(&bits, from, count * sizeof(S));
  return bits;
#endif
}

template <class S>
void store_bits(S* to, Raw<S> bits, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_epi64(to, mask, reinterpret_cast<__m512i>(bits));
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_epi32(to, mask, reinterpret_cast<__m512i>(bits));
  if constexpr (sizeof(S) == 2) _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(bits));
#else
  std::memcpy(to, &bits, count * sizeof(S));
#endif
}

// Past the cache; `to` is aligned to the size of the bits. Others may look after `streamed`.
template <class S>
void stream_bits(S* to, Raw<S> bits) {
#if defined(__SSE2__)
  if constexpr (sizeof bits == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(bits));
#endif
#if defined(__AVX__)
  if constexpr (sizeof bits == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(bits));
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(bits));
#endif
  store_bits(to, bits);
}

inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
