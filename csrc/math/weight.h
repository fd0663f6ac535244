// The structures of W, docs/math.md section 1: what the row a of a class is made of, and how a gradient to a
// goes back to the parts. Two kinds are enough: a dense row (full; low rank, multiplied out) and a single
// entry at the target (diagonal).
//
//     full        a = W[y]                 d_W[y] += d_a
//     diagonal    a = d_y e_y              d_d[y] += d_a[y]
//     low rank    a = d_y e_y + V U[y]     d_d[y] += d_a[y];  d_U[y] += V^T d_a;  d_V += d_a U[y]^T
//
// Low rank is bilinear, so its own derivatives have one more term each. Along directions x of d, U, V the row
// moves by
//
//     v_a = x_d e_y + V x_U[y] + x_V U[y]
//
// and <x, (d_d, d_U, d_V)> = v_a . d_a depends on U and V through v_a too: with f the gradient to a that
// `grad` computes and e the one that its derivative gives,
//
//     to U[y]: V^T e + x_V^T f             to V: e U[y]^T + f x_U[y]^T
//
// Here is one step of a product along the rank; the sums over classes are the device's row walks.
#ifndef L2T_MATH_WEIGHT_H
#define L2T_MATH_WEIGHT_H

#include "num.h"

namespace l2t {
inline namespace L2T_ISA {

// Adds to entries of a what one column of V gives: left is the column's number in U[y].
template <class T, class V>
L2T_FN V plus_product(V a, T left, V right) {
  return fma(V(left), right, a);
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
