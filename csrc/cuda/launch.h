// How the CUDA side meets CUDA: the one way to launch a kernel, shared memory by name, and what a failed call
// leaves behind. With L2T_CUDA_ON_CPU the same sources are plain C++ and run on tests/native/cuda_on_cpu.h.
//
// A kernel is enqueued on the stream that the caller gives and nothing waits for it; the status says whether it
// could be enqueued.
#ifndef L2T_CUDA_LAUNCH_H
#define L2T_CUDA_LAUNCH_H

#include "../l2t.h"

#ifdef L2T_CUDA_ON_CPU
#  include "cuda_on_cpu.h"
#else
#  include <cuda_runtime.h>
#  define L2T_SHARED(T, name, count) __shared__ T name[count]
#  define L2T_DYNAMIC_SHARED(T, name)                                   \
    extern __shared__ __align__(16) unsigned char l2t_dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(l2t_dynamic_shared)
#endif

#define L2T_DEVICE __device__ __forceinline__

namespace l2t {

// Why the last failed call on this thread failed: l2t_cuda_error().
inline const char*& cuda_error() {
  static thread_local const char* reason = "no error";
  return reason;
}

inline l2t_status status_of(cudaError_t error) {
  if (error == cudaSuccess) return L2T_OK;
  cuda_error() = cudaGetErrorString(error);
  cudaGetLastError();  // the runtime would report it again to whoever asks next
  return L2T_CUDA_FAILED;
}

// Without asking, a block may have this much dynamic shared memory.
constexpr size_t kPlainSharedBytes = 48 * 1024 - 1024;

template <class... Parameters, class... Arguments>
l2t_status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                  const Arguments&... arguments) {
  if (grid.x == 0) return L2T_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kPlainSharedBytes) {
    const l2t_status status = status_of(cudaFuncSetAttribute(
        address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    if (status != L2T_OK) return status;
  }
#ifdef L2T_CUDA_ON_CPU
  if (on != nullptr) return status_of(cudaErrorInvalidValue);  // there is only the default stream
  l2t_shim::run(address, grid, block, shared_bytes, [&] { kernel(arguments...); });
  return status_of(cudaGetLastError());
#else
  const auto enqueue = [&](Parameters... parameters) {
    void* pointers[] = {&parameters...};
    return cudaLaunchKernel(address, grid, block, pointers, shared_bytes, on);
  };
  return status_of(enqueue(arguments...));
#endif
}

inline l2t_status fill_with_zeros(void* address, size_t bytes, void* stream) {
  if (bytes == 0) return L2T_OK;
  return status_of(cudaMemsetAsync(address, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// The most dynamic shared memory that a block can have, beside 1 KB for what is static.
inline size_t shared_bytes_at_most() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return kPlainSharedBytes;
  return static_cast<size_t>(bytes) - 1024;
}

inline unsigned blocks_for(int64_t threads, int block) {
  return static_cast<unsigned>((threads + block - 1) / block);
}

}  // namespace l2t
#endif
