// One small kernel for each kind of fault that cuda_on_cpu.h is to find, and its correct twin, of which nothing
// may be said: the shim is tested too.
//
//     faults            every twin in every order against what it should give, and the shim's own promises
//     faults NAME       the kernel with the fault in every order, unless something ends the program before
//
// tests/test_cuda.py has the list of what must be seen of which fault, in which build.
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_on_cpu.h"

namespace {

constexpr int threads = 64, blocks = 3, all_lanes = -1;

// ---- barriers: two warps add up their numbers through shared memory, twice ----

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(all_lanes, x, lanes);
  return x;
}

template <bool before, bool after>
__device__ float block_sum(float x, float* parts) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  if (before) __syncthreads();
  const float sum = parts[0] + parts[1];
  if (after) __syncthreads();
  return sum;
}

template <bool before, bool after>
__global__ void sum(const float* in, float* out) {
  L2T_SHARED(float, parts, 2);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float first = block_sum<before, after>(in[i], parts);
  out[i] = block_sum<before, true>(first * in[i], parts);
}

template <bool right>
__global__ void barrier_in_a_branch(const float* in, float* out) {
  L2T_SHARED(float, held, threads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  if (right || threadIdx.x < 40) __syncthreads();
  out[i] = held[threads - 1 - threadIdx.x];
}

template <bool right>
__global__ void two_barriers_for_one(const float* in, float* out) {
  L2T_SHARED(float, held, threads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  if (right || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = held[threads - 1 - threadIdx.x];
}

// ---- warps ----

template <bool right>
__global__ void mask_of_an_exited_lane(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i];
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000;
  if (threadIdx.x % 32 >= 16) return;
  out[i] += __shfl_xor_sync(right ? half : 0xffffffff, in[i], 1);
}

template <bool right>
__global__ void mask_of_an_absent_lane(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;  // the block has 48 threads
  out[i] = __any_sync(right && threadIdx.x >= 32 ? 0xffff : 0xffffffff, in[i] > 1);
}

template <bool right>
__global__ void mask_without_oneself(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __shfl_down_sync(right ? 0xffffffff : 0x7fffffff, in[i], 1);
}

template <bool right>
__global__ void source_outside_the_mask(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000;
  out[i] = __shfl_xor_sync(half, in[i], right ? 8 : 16);
}

template <bool right>
__global__ void one_mask_two_calls(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (right || threadIdx.x % 2 == 0) {
    out[i] = __shfl_xor_sync(0xffffffff, in[i], 2);
  } else {
    out[i] = __shfl_xor_sync(0xffffffff, in[i], 2);
  }
}

// A shuffle orders no memory.
template <bool right>
__global__ void shuffle_for_a_barrier(const float* in, float* out) {
  L2T_SHARED(float, held, threads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  out[i] = warp_sum(in[i]);
  if (right) __syncwarp();
  out[i] += held[threadIdx.x ^ 1];
}

// A barrier of one half of a warp does not order the other half.
template <bool right>
__global__ void barrier_of_half_a_warp(const float* in, float* out) {
  L2T_SHARED(float, held, threads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000);
  out[i] = held[threadIdx.x ^ (right ? 8 : 16)];
}

// ---- memory ----

template <bool right>
__global__ void read_past_the_end(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = right && i + 1 == blocks * threads ? 0 : in[i + 1];
}

template <bool right>
__global__ void write_past_the_end(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 0) out[0] = 0;
  if (!right || i + 1 < blocks * threads) out[i + 1] = in[i];
}

template <bool right>
__global__ void static_shared_past_the_end(const float* in, float* out) {
  L2T_SHARED(float, held, threads - 1 + right);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float* mine = &held[0] + threadIdx.x;  // by a pointer, so that it is not UBSan that knows the bound
  *mine = in[i];
  out[i] = *mine;
}

template <bool right>
__global__ void static_shared_index(const float* in, float* out) {
  L2T_SHARED(float, held, threads - 1 + right);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  out[i] = held[threadIdx.x];
}

// Launched with one float less than threads, or as many.
__global__ void dynamic_shared_past_the_end(const float* in, float* out) {
  L2T_DYNAMIC_SHARED(float, held);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  out[i] = held[threadIdx.x];
}

// Launched with as much dynamic shared memory as there is without the static one, or with less.
__global__ void too_much_shared(const float* in, float* out) {
  L2T_DYNAMIC_SHARED(float, held);
  L2T_SHARED(float, more, threads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = in[i];
  more[threadIdx.x] = held[threadIdx.x];
  out[i] = more[threadIdx.x];
}

template <bool right>
__global__ void shared_of_nobody(const float* in, float* out) {
  L2T_SHARED(float, held, threads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (right || threadIdx.x != 5) held[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = held[threadIdx.x];
}

template <bool right>
__global__ void misaligned_wide_load(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float4 four = *reinterpret_cast<const float4*>(in + (right ? i / 4 * 4 : 1));
  out[i] = four.x + four.y + four.z + four.w;
}

template <bool right>
__global__ void two_blocks_one_cell(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i != 1) out[i] = in[i];
  if (threadIdx.x != 5) return;
  if (right) {
    atomicAdd(&out[1], 1.0f);
  } else {
    out[1] += 1;
  }
}

// ---- launches ----

struct Shape {
  int block = threads;
  size_t shared_bytes = 0;
};

struct Case {
  void (*wrong)(const float*, float*);
  void (*right)(const float*, float*);
  float (*expected)(const float* in, int i);  // exact: the inputs are small integers
  Shape wrong_shape = {}, right_shape = {};
};

float itself(const float* in, int i) { return in[i]; }
float mirrored(const float* in, int i) { return in[i / threads * threads + threads - 1 - i % threads]; }
template <int lanes>
float neighbour(const float* in, int i) {
  return in[i ^ lanes];
}
float sum_of(const float* in, int i, int group) {
  float sum = 0;
  for (int j = i / group * group; j < i / group * group + group; ++j) sum += in[j];
  return sum;
}
float square_of_sum(const float* in, int i) { return sum_of(in, i, threads) * sum_of(in, i, threads); }

const std::map<std::string, Case> cases = {
    {"barrier missing before", {sum<false, true>, sum<true, true>, square_of_sum}},
    {"barrier missing after", {sum<true, false>, sum<true, true>, square_of_sum}},
    {"barrier in a branch", {barrier_in_a_branch<false>, barrier_in_a_branch<true>, mirrored}},
    {"two barriers for one", {two_barriers_for_one<false>, two_barriers_for_one<true>, mirrored}},
    {"mask of an exited lane",
     {mask_of_an_exited_lane<false>, mask_of_an_exited_lane<true>,
      [](const float* in, int i) { return in[i] + (i % 32 < 16 ? in[i ^ 1] : 0); }}},
    {"mask of an absent lane",
     {mask_of_an_absent_lane<false>,
      mask_of_an_absent_lane<true>,
      [](const float*, int) { return 1.0f; },
      {48},
      {48}}},
    {"mask without oneself",
     {mask_without_oneself<false>, mask_without_oneself<true>,
      [](const float* in, int i) { return in[i % 32 < 31 ? i + 1 : i]; }}},
    {"source outside the mask",
     {source_outside_the_mask<false>, source_outside_the_mask<true>, neighbour<8>}},
    {"one mask, two calls", {one_mask_two_calls<false>, one_mask_two_calls<true>, neighbour<2>}},
    {"shuffle for a barrier",
     {shuffle_for_a_barrier<false>, shuffle_for_a_barrier<true>,
      [](const float* in, int i) { return sum_of(in, i, 32) + in[i ^ 1]; }}},
    {"barrier of half a warp", {barrier_of_half_a_warp<false>, barrier_of_half_a_warp<true>, neighbour<8>}},
    {"read past the end",
     {read_past_the_end<false>, read_past_the_end<true>,
      [](const float* in, int i) { return i + 1 == blocks * threads ? 0 : in[i + 1]; }}},
    {"write past the end",
     {write_past_the_end<false>, write_past_the_end<true>,
      [](const float* in, int i) { return i ? in[i - 1] : 0; }}},
    {"static shared past the end",
     {static_shared_past_the_end<false>, static_shared_past_the_end<true>, itself}},
    {"static shared index", {static_shared_index<false>, static_shared_index<true>, itself}},
    {"dynamic shared past the end",
     {dynamic_shared_past_the_end,
      dynamic_shared_past_the_end,
      itself,
      {threads, 4 * threads - 4},
      {threads, 4 * threads}}},
    {"shared of nobody", {shared_of_nobody<false>, shared_of_nobody<true>, itself}},
    {"misaligned wide load",
     {misaligned_wide_load<false>, misaligned_wide_load<true>,
      [](const float* in, int i) { return sum_of(in, i, 4); }}},
    {"two blocks, one cell",
     {two_blocks_one_cell<false>, two_blocks_one_cell<true>,
      [](const float* in, int i) { return i == 1 ? blocks : in[i]; }}},
    {"block too large", {shared_of_nobody<true>, shared_of_nobody<true>, itself, {1056}}},
    {"dynamic shared too large",
     {dynamic_shared_past_the_end, dynamic_shared_past_the_end, itself, {threads, 49153}, {threads, 49152}}},
    {"all shared too large", {too_much_shared, too_much_shared, itself, {threads, 49152}, {threads, 48896}}},
};

void run(const std::string& name, bool right) {
  const Case& c = cases.at(name);
  const auto kernel = right ? c.right : c.wrong;
  const Shape shape = right ? c.right_shape : c.wrong_shape;
  std::vector<float> in(blocks * shape.block), first;  // of exact size, for the address sanitizer
  std::mt19937_64 generator(1);  // of the standard library: cuda_on_cpu.cpp must not share a copy of it
  for (float& x : in) x = float(generator() % 7);
  for (const char* order : l2t_shim::orders()) {
    l2t_shim::use_order(order);
    std::vector<float> out(in.size());
    l2t_shim::run(reinterpret_cast<const void*>(kernel), blocks, shape.block, shape.shared_bytes,
                  [&] { kernel(in.data(), out.data()); });
    if (first.empty()) first = out;
    double error = 0;
    for (size_t i = 0; i < out.size(); ++i)
      if (out[i] != c.expected(in.data(), int(i))) error = 1;
    check(name + ", " + order, error, 0);
    check(name + ", bits of " + order, std::memcmp(first.data(), out.data(), out.size() * 4), 0);
  }
}

// ---- what the shim promises ----

// Every intrinsic against its definition, in a block of 2 x 20 threads, so that a warp is not a row and the
// last one is not full.
__global__ void intrinsics(int* wrong) {
  const int thread = int(threadIdx.x + blockDim.x * threadIdx.y), lane = thread % 32;
  const unsigned mask = thread < 32 ? 0xffffffff : 0xff;
  const int end = thread < 32 ? 32 : 8, warp = thread - lane;
  bool right = __shfl_sync(mask, 1.5 * thread, 3) == 1.5 * (warp + 3);
  right &= __shfl_sync(mask, thread, lane ^ 5) == (thread ^ 5);
  right &= __shfl_sync(mask, unsigned(thread), 6, 4) == unsigned(warp + lane / 4 * 4 + 2);
  right &= __shfl_xor_sync(mask, float(thread), 4) == float(thread ^ 4);
  right &= __shfl_xor_sync(mask, thread, 4, 4) == (lane & 4 ? thread ^ 4 : thread);
  right &= __shfl_down_sync(mask, thread, 2, 8) == (lane % 8 + 2 < 8 ? thread + 2 : thread);
  right &= __shfl_up_sync(mask, thread, 3, 8) == (lane % 8 - 3 >= 0 ? thread - 3 : thread);
  const unsigned odd = 0xaaaaaaaa & mask;
  right &= __ballot_sync(mask, lane % 2) == odd;
  right &= __any_sync(mask, lane == end - 1) && !__any_sync(mask, lane == end);
  right &= __all_sync(mask, lane < end) && !__all_sync(mask, lane < end - 1);
  // Each half by itself, one of them twice.
  const unsigned part = lane % 2 ? odd : mask & ~odd;
  for (int i = 0; i <= lane % 2; ++i) right &= __ballot_sync(part, 1) == part;
  right &= blockDim.x == 20 && blockDim.y == 2 && gridDim.x == 2 && gridDim.y == 3;
  if (!right) atomicAdd(wrong, 1);
  atomicAdd(wrong + 1, 1);
}

// Who goes when: two visits a thread with a barrier of its warp between them.
__global__ void visits(int* count, int* who) {
  const int thread = int(threadIdx.x + 100 * blockIdx.x);
  who[atomicAdd(count, 1)] = thread;
  __syncwarp(threadIdx.x < 32 ? 0xffffffff : 0x3);
  who[atomicAdd(count, 1)] = thread;
}

std::vector<int> visits_in(const char* order) {
  int count = 0;
  std::vector<int> who(4 * 34);
  l2t_shim::use_order(order);
  l2t_shim::run(nullptr, 2, 34, 0, [&] { visits(&count, who.data()); });
  return who;
}

void check_orders() {
  const auto expected = [](std::initializer_list<int> blocks, std::initializer_list<int> ends) {
    std::vector<int> who;  // ends: of ranges, of which each is walked from one to the other
    for (int block : blocks)
      for (auto end = ends.begin(); end != ends.end(); end += 2)
        for (int i = end[0]; i != end[1]; i += end[0] < end[1] ? 1 : -1) who.push_back(100 * block + i);
    return who;
  };
  check("lockstep", visits_in("lockstep") != expected({0, 1}, {0, 34, 0, 34}), 0);
  check("reverse", visits_in("reverse") != expected({1, 0}, {33, -1, 33, -1}), 0);
  check("first warp ahead", visits_in("first-warp-ahead") != expected({0, 1}, {0, 32, 0, 32, 32, 34, 32, 34}),
        0);
  check("last warp ahead", visits_in("last-warp-ahead") != expected({1, 0}, {33, 31, 33, 31, 31, -1, 31, -1}),
        0);
  const auto random = visits_in("random:5");
  check("a seed gives one order", visits_in("random:5") != random, 0);
  check("another gives another", visits_in("random:6") == random, 0);
  check("no seed is lockstep", visits_in("lockstep") == random, 0);
}

void promises() {
  for (const char* order : l2t_shim::orders()) {
    l2t_shim::use_order(order);
    int wrong[2] = {0, 0};
    l2t_shim::run(nullptr, dim3(2, 3), dim3(20, 2), 0, [&] { intrinsics(wrong); });
    check(std::string("intrinsics, ") + order, wrong[0], 0);
    check("threads that asked", std::abs(wrong[1] - 240), 0);
  }
  check_orders();
  int value = 0;
  check("more shared memory than a card has",
        cudaFuncSetAttribute(intrinsics, cudaFuncAttributeMaxDynamicSharedMemorySize, 65537) == cudaSuccess,
        0);
  check("the most that every card has",
        cudaFuncSetAttribute(intrinsics, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536) != cudaSuccess,
        0);
  cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  check("which is asked for by name", std::abs(value - 65536), 0);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    run(arguments[1], false);
  } else {
    for (const auto& [name, unused] : cases) run(name, true);
    promises();
  }
  return failures != 0;
}
