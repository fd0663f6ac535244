// Loops that read and write what an op of l2t has to, and do next to nothing with it: the bound of triad.py.
//
// out = 3 z + x + (the target's row of w), row by row, or the sum of that where there is no out. w may be
// `pieces` times as wide as z, which then stands for logits in half precision. Two kinds of stores, since it
// depends on the size which is faster.
#include <cstring>
#if defined(__SSE2__)
#  include <emmintrin.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(64)));
constexpr long kLanes = 16;

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void stream(float* to, const Vector& v) {
#if defined(__SSE2__)
  for (int i = 0; i < 4; ++i) _mm_stream_ps(to + 4 * i, reinterpret_cast<const __m128*>(&v)[i]);
#else
  std::memcpy(to, &v, sizeof v);
#endif
}

enum Store { kNone, kPlain, kStream };

template <bool X, int Pieces>
inline Vector at(long j, long m, const float* z, const float* x, const float* w) {
  Vector v = 3.0f * load(z + j);
  if (X) v += load(x + j);
  for (int p = 0; p < Pieces; ++p) v += load(w + p * m + j);
  return v;
}

template <bool X, int Pieces, Store S>
double row(long m, const float* z, const float* x, const float* w, float* out) {
  constexpr int kSums = 8;  // independent chains, or the latency of an addition would be what is measured
  Vector sums[kSums] = {};
  long j = 0;
  for (; S == kNone && j + kSums * kLanes <= m; j += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) sums[k] += at<X, Pieces>(j + k * kLanes, m, z, x, w);
  for (; j + kLanes <= m; j += kLanes) {
    const Vector v = at<X, Pieces>(j, m, z, x, w);
    if (S == kNone) sums[0] += v;
    if (S == kPlain) std::memcpy(out + j, &v, sizeof v);
    if (S == kStream) stream(out + j, v);
  }
  double total = 0;
  for (; j < m; ++j) {
    float v = 3.0f * z[j];
    if (X) v += x[j];
    for (int p = 0; p < Pieces; ++p) v += w[p * m + j];
    if (S == kNone)
      total += v;
    else
      out[j] = v;
  }
  if (S == kNone) {
    for (int k = 1; k < kSums; ++k) sums[0] += sums[k];
    for (long i = 0; i < kLanes; ++i) total += sums[0][i];
  }
  return total;
}

template <bool X, int Pieces, Store S>
double rows(long n, long m, const float* z, const float* x, const float* w, const long* target, float* out) {
  double total = 0;
  for (long i = 0; i < n; ++i)
    total += row<X, Pieces, S>(m, z + i * m, X ? x + i * m : x, Pieces ? w + target[i] * Pieces * m : w,
                               S == kNone ? out : out + i * m);
  return total;
}

template <bool X, int Pieces>
double with(Store store, long n, long m, const float* z, const float* x, const float* w, const long* target,
            float* out) {
  if (store == kNone) return rows<X, Pieces, kNone>(n, m, z, x, w, target, out);
  if (store == kPlain) return rows<X, Pieces, kPlain>(n, m, z, x, w, target, out);
  return rows<X, Pieces, kStream>(n, m, z, x, w, target, out);
}

template <bool X>
double with(int pieces, Store store, long n, long m, const float* z, const float* x, const float* w,
            const long* target, float* out) {
  if (pieces == 0) return with<X, 0>(store, n, m, z, x, w, target, out);
  if (pieces == 1) return with<X, 1>(store, n, m, z, x, w, target, out);
  return with<X, 2>(store, n, m, z, x, w, target, out);
}

}  // namespace

// m: floats in a row of z; x, w and out may be null. Streaming wants rows of out at multiples of 16 bytes.
extern "C" double triad(int streaming, long pieces, long n, long m, const float* z, const float* x,
                        const float* w, const long* target, float* out) {
  const Store store = out == nullptr ? kNone : streaming ? kStream : kPlain;
  return x == nullptr ? with<false>(static_cast<int>(pieces), store, n, m, z, x, w, target, out)
                      : with<true>(static_cast<int>(pieces), store, n, m, z, x, w, target, out);
}

// Writes `count` zeros: a gradient to a matrix of which few rows are anything else.
extern "C" void fill(int streaming, long count, float* out) {
  const Vector zero = {};
  long j = 0;
  for (; streaming && j + kLanes <= count; j += kLanes) stream(out + j, zero);
  if (j < count) std::memset(out + j, 0, sizeof(float) * (count - j));
}
