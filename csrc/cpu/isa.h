// The CPU kernels as a table, of which every instruction set has one: loss.cpp is compiled once for each, with
// L2T_ISA as its name, and isa.cpp chooses. Calls that come here have been checked (status.h).
#ifndef L2T_CPU_ISA_H
#define L2T_CPU_ISA_H

#include "../l2t.h"

namespace l2t {

struct Kernels {
  l2t_status (*value)(const l2t_rows&, const l2t_tensors& inputs, void* loss, void* stats, void* d_logits);
  l2t_status (*grad)(const l2t_rows&, const l2t_tensors& inputs, const void* stats, const l2t_outputs&);
  // grad_vjp and grad_jvp: the Hessian is symmetric. A vjp's direction has no v_loss, a jvp wants none.
  l2t_status (*second_order)(const l2t_rows&, const l2t_tensors& inputs, const void* stats,
                             const l2t_tensors& direction, const l2t_outputs&);
};

}  // namespace l2t
#endif
