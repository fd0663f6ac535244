// The walks over rows as launches: loss, stats and d_logits, and the heads from which the coefficient gradients
// are made (classes.h). Each enqueues one kernel.
#ifndef L2T_CUDA_ROWS_H
#define L2T_CUDA_ROWS_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

// value: `known` is null; loss [N] of the rows, stats and, unless null, d_logits. grad: from the known stats,
// d_logits alone.
template <class T, class S>
struct FirstOrder {
  const T* known;
  T *loss, *stats;
  S* d_logits;
};

template <class T, class S>
l2t_status first_order(const Call<T, S>&, const FirstOrder<T, S>&, void* stream);

// The heads of grad; those of rows without a table row are left alone.
template <class T, class S>
l2t_status grad_heads(const Call<T, S>&, const T* stats, Head<T>* heads, void* stream);

// grad_vjp and grad_jvp: the derivative of grad along `direction`. Heads, d_go [N] (the rows' part of d_v_loss)
// and d_logits, each unless null.
template <class T, class S>
struct SecondOrder {
  Inputs<T, S> direction;
  const T* stats;
  Head<T>* heads;
  T* d_go;
  S* d_logits;
};

template <class T, class S>
l2t_status second_order(const Call<T, S>&, const SecondOrder<T, S>&, void* stream);

}  // namespace L2T_ISA
}  // namespace l2t
#endif
