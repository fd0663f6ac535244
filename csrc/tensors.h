// The waist's records of pointers as kernels read them: typed, on either device. No arithmetic.
#ifndef L2T_TENSORS_H
#define L2T_TENSORS_H

#include "l2t.h"
#include "math/num.h"

namespace l2t {
inline namespace L2T_ISA {

// l2t_tensors or l2t_outputs: those of [N, C] are of type S, all others of type T (const in l2t_tensors).
template <class T, class S>
struct Tensors {
  T* v_loss;
  S* logits;
  T *weight, *left, *right, *bias, *scale;

  template <class Untyped>
  L2T_FN explicit Tensors(const Untyped& t)
      : v_loss(static_cast<T*>(t.v_loss)),
        logits(static_cast<S*>(t.logits)),
        weight(static_cast<T*>(t.weight)),
        left(static_cast<T*>(t.left)),
        right(static_cast<T*>(t.right)),
        bias(static_cast<T*>(t.bias)),
        scale(static_cast<T*>(t.scale)) {}
};

template <class T, class S>
using Inputs = Tensors<const T, const S>;
template <class T, class S>
using Outputs = Tensors<T, S>;

// Entry k of a table that may be absent.
template <class T>
L2T_FN T at(const T* table, int64_t k, T absent) {
  return table != nullptr ? table[k] : absent;
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
