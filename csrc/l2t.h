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

typedef enum { L2T_FLOAT32 = 0, L2T_FLOAT64 = 1 } l2t_dtype;
typedef enum { L2T_SIGMOID = 0, L2T_IDENTITY = 1, L2T_LOG_SIGMOID = 2 } l2t_link;
typedef enum { L2T_FULL = 0, L2T_DIAGONAL = 1, L2T_LOW_RANK = 2 } l2t_structure;

// What a call can come to; status.h has the sentence for each.
typedef enum {
  L2T_OK = 0,
  L2T_BAD_DTYPE,
  L2T_BAD_LINK,
  L2T_BAD_STRUCTURE,
  L2T_BAD_SIZE,
  L2T_BAD_THREADS,
  L2T_BAD_TARGET,
  L2T_MISSING_ROWS,
  L2T_MISSING_WEIGHT,
  L2T_MISSING_FACTORS,
  L2T_STRAY_FACTORS,
  L2T_OUT_OF_MEMORY,
} l2t_status;

// The rows of a call and what is to be made of them. Logits have unit stride over classes and any stride over
// rows.
typedef struct {
  int dtype, link, structure, threads;
  int64_t n, c, groups, rank;
  int64_t ignore_index;   // a target of this value: the row counts for nothing
  int64_t logits_stride;  // in elements
  const int64_t* target;  // [N], g*C + class
} l2t_rows;

// One pointer for each input of the gradient op, all of the call's dtype; the same shape of record serves for
// the inputs themselves, for directions (cotangents or tangents) and for outputs. Null: absent (an input:
// weight, identity; bias, 0; scale, 1; a direction: zero; an output: not wanted). Everything but the logits
// among the inputs is contiguous.
typedef struct {
  const void* v_loss;  // [N]       cotangent of the loss of each row
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

// loss [N]; stats [N, 3] = (max z, log sum exp(z - max z), u), which the other ops start from. inputs->v_loss
// is not read.
l2t_status l2t_cpu_value(const l2t_rows*, const l2t_tensors* inputs, void* loss, void* stats);
// The gradient of <v_loss, loss> to every input but v_loss, whose gradient is the loss itself:
// outputs->v_loss is not looked at.
l2t_status l2t_cpu_grad(const l2t_rows*, const l2t_tensors* inputs, const void* stats, const l2t_outputs*);
// Cotangents of grad's outputs back to all of its inputs: the double backward. cotangents->v_loss must be
// null, since grad has no such output.
l2t_status l2t_cpu_grad_vjp(const l2t_rows*, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* cotangents, const l2t_outputs*);
// Tangents of grad's inputs forward to all of its outputs: forward over reverse. outputs->v_loss must be
// null.
l2t_status l2t_cpu_grad_jvp(const l2t_rows*, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* tangents, const l2t_outputs*);

#ifdef __cplusplus
}
#endif
#endif
