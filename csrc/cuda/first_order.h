// value and grad of the logits as one launch, and the heads from which classes.h makes the coefficient gradients.
#ifndef L2T_CUDA_FIRST_ORDER_H
#define L2T_CUDA_FIRST_ORDER_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

// value: `known` is null; loss [N] of the rows, stats and, unless null, d_logits. grad: from the known stats,
// d_logits alone.
template <class T, class S>
struct FirstOrder {
  static constexpr bool kSecond = false;
  const T* known;
  T *loss, *stats;
  S* d_logits;
};

template <class T, class S>
l2t_status first_order(const Call<T, S>&, const FirstOrder<T, S>&, void* stream);

// The heads of grad; those of rows without a table row are left alone.
template <class T, class S>
l2t_status grad_heads(const Call<T, S>&, const T* stats, Head<T>* heads, void* stream);

}  // namespace L2T_ISA
}  // namespace l2t
#endif
