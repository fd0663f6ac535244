// Which kernels a call launches, with which grids: the sources of csrc/cuda compiled for the host, on the shim of
// tests/native, except that a launch is written down here and nothing runs. The device is an H100 by its numbers.
//
// Reads cases from standard input, one a line: op, to_all, n, c, rank, structure, dtype (numbers of l2t.h). For
// each it prints "case STATUS", then a line for every launch: kernel's address, blocks, threads, bytes of dynamic
// shared memory. The address leads to the kernel's name by the symbol table (benchmarks/roofline.py).
#include "../csrc/l2t.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "cuda_on_cpu.h"

// What the launching code takes of the shim; threads there are none.
static const uint3 nowhere{};
static const dim3 nothing{};
const uint3 &threadIdx = nowhere, &blockIdx = nowhere;
const dim3 &blockDim = nothing, &gridDim = nothing;

namespace l2t_shim {
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>&) {
  std::printf("%zx %u %u %zu\n", reinterpret_cast<size_t>(kernel), grid.x * grid.y * grid.z,
              block.x * block.y * block.z, shared_bytes);
}
uint64_t meet(Call, unsigned, int, uint64_t, Site) { return 0; }
int lane() { return 0; }
void* shared(const char*, size_t) { return nullptr; }
void* dynamic_shared() { return nullptr; }
}  // namespace l2t_shim

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 227 * 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

int main() {
  // One piece of memory that every pointer of a call leads to: kernels do not run, only a memset may write.
  const size_t room = size_t(1) << 36;
  void* memory =
      mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 1;
  char op[16];
  int to_all, structure, dtype;
  long n, c, rank;
  while (std::scanf("%15s %d %ld %ld %ld %d %d", op, &to_all, &n, &c, &rank, &structure, &dtype) == 7) {
    l2t_rows rows{};
    rows.dtype = dtype, rows.structure = structure, rows.mean = 1, rows.threads = 1;
    rows.n = n, rows.c = c, rows.groups = 1, rows.rank = rank, rows.losses = 1;
    rows.ignore_index = -100, rows.logits_stride = c, rows.target = static_cast<int64_t*>(memory);
    l2t_tensors inputs{}, along{};
    inputs.v_loss = inputs.logits = inputs.weight = inputs.bias = along.logits = memory;
    l2t_outputs outputs{};
    outputs.logits = memory;
    if (to_all) outputs.weight = outputs.bias = memory;
    if (structure == L2T_LOW_RANK) {
      inputs.left = inputs.right = memory;
      if (to_all) outputs.left = outputs.right = memory;
    }
    std::printf("case\n");
    l2t_status status = L2T_BAD_SIZE;
    if (std::strcmp(op, "value") == 0)
      status = l2t_cuda_value(&rows, &inputs, memory, memory, nullptr, memory, nullptr);
    if (std::strcmp(op, "value+grad") == 0)
      status = l2t_cuda_value(&rows, &inputs, memory, memory, memory, memory, nullptr);
    if (std::strcmp(op, "grad") == 0)
      status = l2t_cuda_grad(&rows, &inputs, memory, &outputs, memory, nullptr);
    if (std::strcmp(op, "grad_vjp") == 0)
      status = l2t_cuda_grad_vjp(&rows, &inputs, memory, &along, &outputs, memory, nullptr);
    if (std::strcmp(op, "grad_jvp") == 0)
      status = l2t_cuda_grad_jvp(&rows, &inputs, memory, &along, &outputs, memory, nullptr);
    if (status != L2T_OK) return 2;
  }
  return 0;
}
