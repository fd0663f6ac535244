// The part of CUDA that csrc/cuda uses, for a host compiler: with -DL2T_CUDA_ON_CPU the .cu sources are plain
// C++, and every CUDA thread of a block is a fiber (cuda_on_cpu.cpp) that runs until it meets others: at
// __syncthreads, __syncwarp, a shuffle or a vote. What a GPU would leave undefined ends the program with a
// sentence that names file, line, block and thread.
//
// What finds which fault (tests/native/faults.cu has one of each):
//
//     any run                 threads of a block at different barriers or gone, a mask that names a lane which is
//                             not there, a launch that no card accepts; shared memory read before it is written
//                             shows as NaN (every byte of it starts as 0xff)
//     orders, bits compared   some missing barriers
//     address sanitizer       out of bounds, global and shared: each array is its own allocation of exact size
//     thread sanitizer        every missing barrier, and two blocks on one cell, in whatever order: a fiber is a
//                             thread to it, and only __syncthreads and __syncwarp order two of them
//
// Deliberately not here: __shared__ (of a static array in a template g++ loses section and bounds; L2T_SHARED
// has both), memory order between threads, occupancy, fast-math, streams (a launch is over when it returns).
#ifndef L2T_TESTS_CUDA_ON_CPU_H
#define L2T_TESTS_CUDA_ON_CPU_H

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// A key for each declaration in each instance of a template, a reference to an array for UBSan to know the bounds.
#define L2T_SHARED(T, name, count) \
  static char l2t_key_##name = 0;  \
  T(&name)                         \
  [count] = *static_cast<T(*)[count]>(l2t_shim::shared(&l2t_key_##name, sizeof(T[count])))
#define L2T_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(l2t_shim::dynamic_shared())

// ---- types and indices ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Alignment as on a GPU, so that UBSan sees a wide load from a pointer that is not; may_alias, since a wide
// load through a cast is what these types are for, and a host compiler would otherwise assume that it is not.
#define L2T_VECTOR(name, T, bytes, ...)                    \
  struct __attribute__((may_alias, aligned(bytes))) name { \
    T __VA_ARGS__;                                         \
  };
L2T_VECTOR(float2, float, 8, x, y)
L2T_VECTOR(float4, float, 16, x, y, z, w)
L2T_VECTOR(double2, double, 16, x, y)
L2T_VECTOR(int2, int, 8, x, y)
L2T_VECTOR(int4, int, 16, x, y, z, w)
L2T_VECTOR(uint2, unsigned, 8, x, y)
L2T_VECTOR(uint4, unsigned, 16, x, y, z, w)
#undef L2T_VECTOR

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// CUDA has these without std::. Whole numbers only: what a host makes of a NaN is not what a GPU makes of it.
template <class T, class = std::enable_if_t<std::is_integral<T>::value>>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T, class = std::enable_if_t<std::is_integral<T>::value>>
T max(T a, T b) {
  return a < b ? b : a;
}

// Of the fiber that runs.
extern const uint3 &threadIdx, &blockIdx;
extern const dim3 &blockDim, &gridDim;
constexpr int warpSize = 32;

// ---- the scheduler ----

namespace l2t_shim {

// Where a call stands in the kernel: as a default argument it is the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Runs body() once as each thread of the grid, and returns when all have ended. `kernel` is the address for
// which cudaFuncSetAttribute may have allowed more shared memory.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// In which order blocks, and between two meetings the threads of a block, go on:
//
//     lockstep            each in turn         first-warp-ahead    the lowest thread that can
//     reverse             the same from the    last-warp-ahead     the highest thread that can
//                         last to the first    random:SEED         any
//
// L2T_CUDA_ORDER in the environment is the order at the start, else lockstep.
void use_order(const char* order);
const std::vector<const char*>& orders();  // one of each, and some seeds

uint64_t blocks_run();  // since the start, so that a test can see that there was something to test

// What the kernels' own calls come down to.
enum class Call { shuffle, vote, sync_warp, sync_threads };
uint64_t meet(Call call, unsigned mask, int source_lane, uint64_t bits, Site at);
int lane();
void* shared(const char* key, size_t bytes);
void* dynamic_shared();

template <class T>
T shuffle(unsigned mask, T value, int source_lane, Site at) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "CUDA shuffles numbers of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet(Call::shuffle, mask, source_lane, bits, at);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace l2t_shim

// ---- barriers, shuffles, votes ----

inline void __syncthreads(l2t_shim::Site at = l2t_shim::Site::here()) {
  l2t_shim::meet(l2t_shim::Call::sync_threads, 0, 0, 0, at);
}
inline void __syncwarp(unsigned mask = 0xffffffff, l2t_shim::Site at = l2t_shim::Site::here()) {
  l2t_shim::meet(l2t_shim::Call::sync_warp, mask, 0, 0, at);
}

// A source beyond the lane's own segment of `width` lanes leaves the lane its own value, as on a GPU.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              l2t_shim::Site at = l2t_shim::Site::here()) {
  const int first = l2t_shim::lane() & -width;
  return l2t_shim::shuffle(mask, value, first + (source & (width - 1)), at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   l2t_shim::Site at = l2t_shim::Site::here()) {
  const int lane = l2t_shim::lane(), end = (lane & -width) + width;
  const int64_t source = int64_t(lane) + delta;
  return l2t_shim::shuffle(mask, value, source < end ? int(source) : lane, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 l2t_shim::Site at = l2t_shim::Site::here()) {
  const int lane = l2t_shim::lane(), first = lane & -width;
  const int64_t source = int64_t(lane) - delta;
  return l2t_shim::shuffle(mask, value, source >= first ? int(source) : lane, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  l2t_shim::Site at = l2t_shim::Site::here()) {
  const int lane = l2t_shim::lane(), end = (lane & -width) + width, source = lane ^ lane_mask;
  return l2t_shim::shuffle(mask, value, source < end ? source : lane, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, l2t_shim::Site at = l2t_shim::Site::here()) {
  return unsigned(l2t_shim::meet(l2t_shim::Call::vote, mask, 0, predicate != 0, at));
}
inline int __any_sync(unsigned mask, int predicate, l2t_shim::Site at = l2t_shim::Site::here()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, l2t_shim::Site at = l2t_shim::Site::here()) {
  return __ballot_sync(mask, predicate, at) == mask;
}

// ---- memory ----

template <class T>
T __ldg(const T* address) {
  return *address;
}

// Relaxed atomics, which the thread sanitizer knows: two of them are no race, one and a plain access are.
template <class T>
T atomic_add(T* address, T x) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = old + x;
  } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
inline int atomicAdd(int* address, int x) { return __atomic_fetch_add(address, x, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned x) {
  return __atomic_fetch_add(address, x, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float x) { return atomic_add(address, x); }
inline double atomicAdd(double* address, double x) { return atomic_add(address, x); }

// ---- the runtime: one device, on which nothing fails but what ends the program ----

using cudaStream_t = struct l2t_stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
inline cudaError_t cudaMemsetAsync(void* address, int byte, size_t bytes, cudaStream_t) {
  return std::memset(address, byte, bytes), cudaSuccess;
}

#endif
