// The loss of one row and its derivatives: docs/math.md sections 1 to 4, in the order value, grad, vjp and
// jvp of grad.
//
// An op on a row is three moves. Sums over the classes (max, sum exp, p.v and the like) are the device's; the
// Head makes of them the handful of scalars that the row needs; then one expression per output and class. The
// heads and the expressions are here, the function and its derivatives on one screen. Letters are those of
// math.md; R = sum a_j, pv = sum p_j v_j and so on are sums over classes; `go` is the upstream gradient of
// the row's loss.
//
// The gradient to (z, a, beta) is a multiple of one vector, the derivative of u. Its own derivative along a
// direction (v_z, v_a, v_beta, v_kappa) is a multiple of that vector and one of that vector's change, so a
// row needs two coefficients:
//
//     gradient              slope (g_u, log p, 1)                                             g_u = a - R p
//     along a direction     slope (g_u, log p, 1) + pull (v_a - (sum v_a) p - R p (v_z - pv), v_z - pv, 0)
//
// Deliberately not here: loops, memory, and what a row a of W is made of (weight.h). A term a_j log p_j with
// a_j = 0 is zero even at log p_j = -inf (num.h: times), so that a class with logit -inf is a class that does
// not exist, as in cross-entropy; the gradient to such an a_j is what it is, infinite.
#ifndef L2T_MATH_ROW_H
#define L2T_MATH_ROW_H

#include "link.h"
#include "num.h"

namespace l2t {
inline namespace L2T_ISA {

// ---- value: l = -kappa phi(u), u = sum a_j log p_j + beta ----

// What `value` leaves for the other ops. max and log sum exp(z - max) stay apart: their sum would round log p
// to the precision of the largest logit.
template <class T>
struct Stats {
  T max, log_sum, u;

  template <class V>
  L2T_FN V log_p(V z) const {
    return (z - max) - log_sum;
  }
  template <class V>
  L2T_FN V p(V z) const {
    return exp(log_p(z));
  }
};

template <class T, class V>
L2T_FN V sum_exp_term(V z, T max) {
  return exp(z - max);
}

// max and sum exp(z - max) in, u still to come: beta + sum a_j log p_j, of which the next is one term.
template <class T>
L2T_FN Stats<T> stats_before_u(T max, T sum_exp) {
  return {max, log(sum_exp), 0};
}

template <class T>
L2T_FN T a_log_p_term(T a, T log_p) {
  return times(a, log_p);
}

// The same u from sum a_j (z_j - max): one read of z is enough for all sums of `value`.
template <class T>
L2T_FN T u_of_sums(T a_z, T R, T log_sum, T beta) {
  return fma(-R, log_sum, a_z) + beta;
}

template <class T>
L2T_FN T loss(l2t_link link, const Stats<T>& stats, T kappa) {
  return -kappa * phi(link, stats.u).value;
}

// ---- grad: d_z = slope g_u, d_a = slope log p, d_beta = slope, d_kappa ----

template <class T>
struct Head {
  Stats<T> stats;
  T slope;  // also the gradient to beta
  T d_kappa;
  T pull, pv, d_go;  // second order only; pull is what slope is in `grad`
};

template <class T>
L2T_FN Head<T> grad_head(l2t_link link, const Stats<T>& stats, T kappa, T go) {
  const Phi<T> f = phi(link, stats.u);
  return {stats, -go * kappa * f.first, -times(go, f.value), 0, 0, 0};
}

// One row, and one class of it or several (V). Only the product R p counts, so a factor of p may be R's.
template <class T, class V>
L2T_FN V d_z(const Head<T>& head, V p, V a, T R) {
  return head.slope * fma(V(-R), p, a);
}
// Where a is zero.
template <class T, class V>
L2T_FN V d_z(const Head<T>& head, V p, T R) {
  return -(head.slope * R) * p;
}

template <class T, class V>
L2T_FN V d_a(const Head<T>& head, V log_p) {
  return times(V(head.slope), log_p);
}

// ---- vjp and jvp of grad: one symmetric Hessian; a jvp also moves go, a vjp also returns to it ----

// A direction in one row, by its sums over classes: p.v_z, a.v_z, sum v_a, v_a.log p, and v_beta, v_kappa,
// t_go.
template <class T>
struct Direction {
  T pv, av, sum_va, va_log_p, v_beta, v_kappa, t_go;
};

template <class T>
L2T_FN Head<T> second_head(l2t_link link, const Stats<T>& stats, T kappa, T go, T R, const Direction<T>& v) {
  const Phi<T> f = phi(link, stats.u);
  const T q = (v.av - R * v.pv) + v.va_log_p + v.v_beta;  // the derivative of u
  const T k = kappa * times(f.second, q) + f.first * v.v_kappa;
  const T d_phi = times(f.first, q);
  Head<T> head;
  head.stats = stats;
  head.slope = -go * k - v.t_go * kappa * f.first;
  head.d_kappa = -go * d_phi - times(v.t_go, f.value);
  head.pull = -go * kappa * f.first;
  head.pv = v.pv;
  head.d_go = -kappa * d_phi - times(v.v_kappa, f.value);
  return head;
}

// What p has in it: R p and (sum v_a) p of the two terms, and R p (v_z - pv).
template <class T, class V>
L2T_FN V d_z_of_p(const Head<T>& head, V p, T R, V v_z, T sum_va) {
  const T still = fma(head.slope, R, head.pull * sum_va), moved = head.pull * R;
  return p * fma(V(moved), v_z - head.pv, V(still));
}
template <class T, class V>
L2T_FN V d_z(const Head<T>& head, V p, V a, T R, V v_z, V v_a, T sum_va) {
  return fma(V(head.slope), a, head.pull * v_a) - d_z_of_p(head, p, R, v_z, sum_va);
}

template <class T, class V>
L2T_FN V d_a(const Head<T>& head, V log_p, V v_z) {
  return times(V(head.slope), log_p) + head.pull * (v_z - head.pv);
}

// The gradient to a that `grad` itself gives: what the cross terms of a low-rank weight multiply (weight.h).
template <class T, class V>
L2T_FN V first_d_a(const Head<T>& head, V log_p) {
  return times(V(head.pull), log_p);
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
