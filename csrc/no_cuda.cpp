// The CUDA side of the waist in a build without it: no devices, and a reason for whoever calls nevertheless.
#include "l2t.h"

int64_t l2t_cuda_workspace(const l2t_rows*) { return 0; }

l2t_status l2t_cuda_value(const l2t_rows*, const l2t_tensors*, void*, void*, void*, void*, void*) {
  return L2T_CUDA_FAILED;
}

l2t_status l2t_cuda_grad(const l2t_rows*, const l2t_tensors*, const void*, const l2t_outputs*, void*, void*) {
  return L2T_CUDA_FAILED;
}

l2t_status l2t_cuda_grad_vjp(const l2t_rows*, const l2t_tensors*, const void*, const l2t_tensors*,
                             const l2t_outputs*, void*, void*) {
  return L2T_CUDA_FAILED;
}

l2t_status l2t_cuda_grad_jvp(const l2t_rows*, const l2t_tensors*, const void*, const l2t_tensors*,
                             const l2t_outputs*, void*, void*) {
  return L2T_CUDA_FAILED;
}

l2t_status l2t_cuda_scale(const l2t_rows*, const void*, void*, void*) { return L2T_CUDA_FAILED; }

int l2t_cuda_devices(void) { return 0; }

const char* l2t_cuda_error(void) { return "this build has no CUDA kernels; build where nvcc is"; }
