// The link functions phi of docs/math.md section 1 with their two derivatives (end of section 4), side by
// side.
//
// All are written in t = exp(-|u|), which cannot overflow, and in the smaller of the two sigmoids, s =
// sigmoid(-|u|) <= 1/2: s - s^2 loses no digits, and an error of s counts once and less, where it would twice in
// t / (1 + t)^2. With the larger one the slope would be exactly 0 in float32 from u = 17 on. A new link is one
// case here.
#ifndef L2T_MATH_LINK_H
#define L2T_MATH_LINK_H

#include "../l2t.h"
#include "num.h"

namespace l2t {
inline namespace L2T_ISA {

template <class T>
struct Phi {
  T value, first, second;
};

template <class T>
L2T_FN Phi<T> phi(l2t_link link, T u) {
  if (link == L2T_IDENTITY) return {u, T(1), T(0)};
  const T t = exp(-abs(u));
  const T d = 1 / (1 + t);                    // sigmoid(|u|)
  const T small = t * d;                      // sigmoid(-|u|)
  const T slope = fma(-small, small, small);  // sigmoid'(u)
  const auto right = u >= T(0);
  if (link == L2T_SIGMOID) {
    const T tilt = expm1(-abs(u)) * d;  // -tanh(|u| / 2)
    return {select(right, d, small), slope, slope * select(right, tilt, -tilt)};
  }
  return {select(right, T(0), u) - log1p(t), select(right, small, d), -slope};
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
