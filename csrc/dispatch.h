// From the numbers of the waist to types: one place that turns a dtype into template arguments. A dtype is one
// line here. Links are a switch once a row (math/link.h) and structures a branch once a row (cpu/weight.h), not
// template arguments.
#ifndef L2T_DISPATCH_H
#define L2T_DISPATCH_H

#include "l2t.h"
#include "math/num.h"

namespace l2t {
inline namespace L2T_ISA {

// f(T{}, S{}) for the type T of the arithmetic and the type S of the [N, C] tensors in memory; the dtype has
// been checked (status.h).
template <class F>
auto dispatch(int dtype, const F& f) {
  switch (dtype) {
    case L2T_FLOAT64:
      return f(double{}, double{});
    case L2T_BFLOAT16:
      return f(float{}, bfloat16{});
    case L2T_FLOAT16:
      return f(float{}, float16{});
    default:
      return f(float{}, float{});
  }
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
