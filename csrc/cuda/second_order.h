// grad_vjp and grad_jvp of the logits as one launch.
#ifndef L2T_CUDA_SECOND_ORDER_H
#define L2T_CUDA_SECOND_ORDER_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

// grad_vjp and grad_jvp: the derivative of grad along `direction`. Heads, d_go [N] (the rows' part of d_v_loss)
// and d_logits, each unless null.
template <class T, class S>
struct SecondOrder {
  static constexpr bool kSecond = true;
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
