// The waist of l2t: plain C types, one function for each op and device. Everything above (the Python binding)
// and everything below (the kernels) meets here and nowhere else.
//
// The letters are those of docs/math.md. Sizes: N rows, C classes, r the rank, G groups. A group is one loss
// of a stack: table row g*C + y of every coefficient is what the teacher of group g gives for class y, and a
// target names that row.
//
// Deliberately not here: any framework's type, memory management (every buffer is the caller's) and error
// sentences (status.h).
#ifndef L2T_H
#define L2T_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// dtype is that of the [N, C] tensors: logits, their direction and their gradient. Everything else is of the
// arithmetic's type: float64 for float64, float32 for all others.
typedef enum { L2T_FLOAT32 = 0, L2T_FLOAT64 = 1, L2T_BFLOAT16 = 2, L2T_FLOAT16 = 3 } l2t_dtype;
typedef enum { L2T_SIGMOID = 0, L2T_IDENTITY = 1, L2T_LOG_SIGMOID = 2 } l2t_link;
typedef enum { L2T_FULL = 0, L2T_DIAGONAL = 1, L2T_LOW_RANK = 2 } l2t_structure;

// What a call can come to; status.h has the sentence for each.
typedef enum {
  L2T_OK = 0,
  L2T_BAD_DTYPE,
  L2T_BAD_LINK,
  L2T_BAD_STRUCTURE,
  L2T_BAD_SIZE,
  L2T_BAD_LOSSES,
  L2T_BAD_THREADS,
  L2T_BAD_TARGET,
  L2T_MISSING_ROWS,
  L2T_MISSING_WEIGHT,
  L2T_MISSING_FACTORS,
  L2T_STRAY_FACTORS,
  L2T_OUT_OF_MEMORY,
  L2T_CUDA_FAILED,  // l2t_cuda_error() has the reason
} l2t_status;

// The rows of a call and what is to be made of them. Logits have unit stride over classes and any stride over
// rows; every other [N, C] tensor is contiguous.
//
// The rows are reduced to `losses` numbers: loss l is the sum over the N / losses rows from row l * N / losses
// on, or their mean over those that are not ignored (0 / 0 if there is none). losses = N without `mean`:
// nothing is reduced.
typedef struct {
  int dtype, link, structure;
  int mean;     // 0 or 1
  int threads;  // CPU
  int atomics;  // CUDA, 0 or 1: coefficient gradients may be added in any order, which is faster where many
                // rows share few classes; without it every bit is the same in every run
  int64_t n, c, groups, rank;
  int64_t losses;         // L; divides n
  int64_t ignore_index;   // a target of this value: the row counts for nothing and its logits are not read
  int64_t logits_stride;  // in elements
  const int64_t* target;  // [N], g*C + class
} l2t_rows;

// One pointer for each input of the gradient op; the same shape of record serves for the inputs themselves,
// for directions (cotangents or tangents) and for outputs. Null: absent (an input: weight, identity; bias, 0;
// scale, 1; v_loss, 1; a direction: zero; an output: not wanted). All but the logits among the inputs are
// contiguous.
typedef struct {
  const void* v_loss;  // [L]       cotangent of each loss
  const void* logits;  // [N, C]
  const void* weight;  // [G*C, C]  full; [G*C] otherwise: the diagonal
  const void* left;    // [G*C, r]  low rank: U
  const void* right;   // [G*C, r]  low rank: V
  const void* bias;    // [G*C]
  const void* scale;   // [G*C]
} l2t_tensors;

typedef struct {
  void *v_loss, *logits, *weight, *left, *right, *bias, *scale;
} l2t_outputs;

// The first row whose target is neither ignore_index nor in [0, table_rows), or -1.
int64_t l2t_check_target(int64_t n, int64_t table_rows, int64_t ignore_index, const int64_t* target);

// ---- the CPU ----

// The instruction sets that this build has and this machine can run, best last, as a null-terminated list;
// the one in use; and another one from now on (0) unless the list does not have it (-1). At load the best is
// chosen, or the one that the environment variable L2T_INSTRUCTION_SET names.
const char* const* l2t_cpu_instruction_sets(void);
const char* l2t_cpu_instruction_set(void);
int l2t_cpu_use_instruction_set(const char* name);

// loss [L]; stats [N, 3] = (max z, log sum exp(z - max z), u), which the other ops start from. d_logits, unless
// null: the gradient of the sum of the losses, made in the same pass; it may be the logits' own memory.
// inputs->v_loss is not read.
l2t_status l2t_cpu_value(const l2t_rows*, const l2t_tensors* inputs, void* loss, void* stats, void* d_logits);
// The gradient of <v_loss, loss> to every input but v_loss, whose gradient is the loss itself:
// outputs->v_loss is not looked at. outputs->logits may be the logits' own memory: then it is written last.
l2t_status l2t_cpu_grad(const l2t_rows*, const l2t_tensors* inputs, const void* stats, const l2t_outputs*);
// Cotangents of grad's outputs back to all of its inputs: the double backward. cotangents->v_loss must be
// null, since grad has no such output.
l2t_status l2t_cpu_grad_vjp(const l2t_rows*, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* cotangents, const l2t_outputs*);
// Tangents of grad's inputs forward to all of its outputs: forward over reverse. outputs->v_loss must be
// null.
l2t_status l2t_cpu_grad_jvp(const l2t_rows*, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* tangents, const l2t_outputs*);

// ---- CUDA: the same ops on device memory, in a build that has them ----
//
// Every call enqueues kernels on `stream` and returns: it waits for nothing and allocates nothing, so it can be
// captured into a graph. The targets are looked at by the kernels only: a row whose target is out of range gets
// a loss and a d_logits of NaN and takes no part in other gradients. `workspace` is scratch memory, aligned to
// 256 bytes, that lives until the stream has passed; one size serves all four ops.
int64_t l2t_cuda_workspace(const l2t_rows*);
l2t_status l2t_cuda_value(const l2t_rows*, const l2t_tensors* inputs, void* loss, void* stats, void* d_logits,
                          void* workspace, void* stream);
l2t_status l2t_cuda_grad(const l2t_rows*, const l2t_tensors* inputs, const void* stats, const l2t_outputs*,
                         void* workspace, void* stream);
l2t_status l2t_cuda_grad_vjp(const l2t_rows*, const l2t_tensors* inputs, const void* stats,
                             const l2t_tensors* cotangents, const l2t_outputs*, void* workspace,
                             void* stream);
l2t_status l2t_cuda_grad_jvp(const l2t_rows*, const l2t_tensors* inputs, const void* stats,
                             const l2t_tensors* tangents, const l2t_outputs*, void* workspace, void* stream);
// d_logits [N, C] of each row times the cotangent of its loss, v_loss [L]; a zero stays one, and what has a cotangent
// of 1 is neither read nor written. Of the rows, dtype, n, c and losses are looked at.
l2t_status l2t_cuda_scale(const l2t_rows*, const void* v_loss, void* d_logits, void* stream);
// How many devices the driver has, 0 without a driver; and what the last failed call on this thread failed of.
int l2t_cuda_devices(void);
const char* l2t_cuda_error(void);

#ifdef __cplusplus
}
#endif
#endif
