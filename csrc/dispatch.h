// From the numbers of the waist to types: one place that turns a dtype into a template argument. A dtype is
// one line here. Links are a switch once a row (math/link.h) and structures a branch once a row
// (cpu/weight.h), not template arguments.
#ifndef L2T_DISPATCH_H
#define L2T_DISPATCH_H

#include "l2t.h"

namespace l2t {

// f(T{}) for the T of the dtype; the dtype has been checked (status.h).
template <class F>
void dispatch(int dtype, const F& f) {
  switch (dtype) {
    case L2T_FLOAT32:
      return f(float{});
    case L2T_FLOAT64:
      return f(double{});
  }
}

}  // namespace l2t
#endif
