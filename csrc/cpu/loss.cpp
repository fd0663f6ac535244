// The four ops on the CPU: value, grad, grad_vjp, grad_jvp. Here are the walks over rows (loss, stats,
// d_logits, d_v_loss: each row by itself); the gradients to the coefficients are in weight.h. A row that is
// ignored is never read.
//
// The formulas are those of math/row.h, in its three moves: sums over classes, head, one expression an
// output. Deliberately not here: arithmetic (math/), loops over classes (walk.h), threads (pool.h).
#include "../l2t.h"

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <vector>

#include "../dispatch.h"
#include "../math/row.h"
#include "../status.h"
#include "call.h"
#include "pool.h"
#include "walk.h"
#include "weight.h"

namespace l2t {
namespace {

// ---- value ----

template <class T>
void value(const Call<T>& call, T* loss_out, T* stats_out) {
  const int64_t c = call.c;
  const Weight<T> w(call);
  const Scratch<T> scratch(call.rows, call.n, w.low_rank ? c : 0);
  parallel_for(call.rows.threads, call.n, w.cost(), [&](int64_t i, int lane) {
    if (call.ignored(i)) {
      loss_out[i] = 0;
      store_stats(stats_out, i, Stats<T>{0, 0, 0});
      return;
    }
    const int64_t k = call.rows.target[i], y = k % c;
    const T* z = call.logits(i);
    const T max = max_of(c, z);
    Stats<T> stats = stats_before_u(max, sum<T>(c, [=](int64_t j) { return sum_exp_term(z[j], max); }));
    stats.u = call.beta(k);
    if (w.dense) {
      const T* a = w.row(k, scratch[lane]);
      stats.u += sum<T>(c, [=](int64_t j) { return a_log_p_term(a[j], stats.log_p(z[j])); });
    } else {
      stats.u += a_log_p_term(w.diagonal(k), stats.log_p(z[y]));
    }
    loss_out[i] = loss(call.link, stats, call.kappa(k));
    store_stats(stats_out, i, stats);
  });
}

// ---- grad ----

template <class T>
void grad(const Call<T>& call, const T* stats, const Outputs<T>& out) {
  const int64_t c = call.c;
  const Weight<T> w(call);
  const Scratch<Head<T>> heads(call.rows, 1, call.n);
  const Scratch<T> scratch(call.rows, call.n, w.low_rank ? c : 0);
  parallel_for(call.rows.threads, call.n, out.logits != nullptr ? w.cost() : 1, [&](int64_t i, int lane) {
    T* d_logits = out.logits != nullptr ? out.logits + i * c : nullptr;
    if (call.ignored(i)) {
      if (d_logits != nullptr) std::fill_n(d_logits, c, T(0));
      return;
    }
    const int64_t k = call.rows.target[i], y = k % c;
    const Head<T> head = grad_head(call.link, load_stats(stats, i), call.kappa(k), call.in.v_loss[i]);
    heads[0][i] = head;
    if (d_logits == nullptr) return;
    const T* z = call.logits(i);
    if (w.dense) {
      const T* a = w.row(k, scratch[lane]);
      const T R = sum(c, a);
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, head.stats.p(z[j]), a[j], R); });
    } else {
      const T R = w.diagonal(k);
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, head.stats.p(z[j]), T(0), R); });
      d_logits[y] = d_z(head, head.stats.p(z[y]), R, R);
    }
  });
  const WeightDirection<T> nowhere(w, call, Inputs<T>(l2t_tensors{}));
  coefficient_gradients(call, w, nowhere, heads[0], out);
}

// ---- grad_vjp, grad_jvp: the derivative of grad along v ----
//
// The Hessian is symmetric, so both are one walk; the v of a jvp has a v_loss, the outputs of a vjp want one.

template <class T>
void second_order(const Call<T>& call, const T* stats_in, const Inputs<T>& v, const Outputs<T>& out) {
  const int64_t c = call.c;
  const Weight<T> w(call);
  const WeightDirection<T> direction(w, call, v);
  const std::vector<T> zeros(c, T(0));
  const Scratch<Head<T>> heads(call.rows, 1, call.n);
  const Scratch<T> scratch(call.rows, call.n, 3 * c);  // p, a, v_a
  parallel_for(call.rows.threads, call.n, 2 * w.cost(), [&](int64_t i, int lane) {
    T* d_logits = out.logits != nullptr ? out.logits + i * c : nullptr;
    if (call.ignored(i)) {
      if (d_logits != nullptr) std::fill_n(d_logits, c, T(0));
      if (out.v_loss != nullptr) out.v_loss[i] = 0;
      return;
    }
    const int64_t k = call.rows.target[i], y = k % c;
    const Stats<T> stats = load_stats(stats_in, i);
    const T* z = call.logits(i);
    const T* v_z = v.logits != nullptr ? v.logits + i * c : zeros.data();
    T *p = scratch[lane], *a_room = p + c, *v_a_room = a_room + c;

    Direction<T> along{};
    along.v_beta = at(v.bias, k, T(0));
    along.v_kappa = at(v.scale, k, T(0));
    along.t_go = at(v.v_loss, i, T(0));
    if (d_logits != nullptr || v.logits != nullptr) {
      each(c, [=](int64_t j) { p[j] = stats.p(z[j]); });
      along.pv = dot(c, p, v_z);
    }
    const T *a = nullptr, *v_a = zeros.data();
    T R;
    if (w.dense) {
      a = w.row(k, a_room);
      R = sum(c, a);
      along.av = dot(c, a, v_z);
      if (direction.moves) {
        v_a = direction.row(k, v_a_room);
        along.sum_va = sum(c, v_a);
        along.va_log_p = sum<T>(c, [=](int64_t j) { return a_log_p_term(v_a[j], stats.log_p(z[j])); });
      }
    } else {
      R = w.diagonal(k);
      along.av = R * v_z[y];
      along.sum_va = direction.diagonal(k);
      along.va_log_p = a_log_p_term(along.sum_va, stats.log_p(z[y]));
    }

    const Head<T> head = second_head(call.link, stats, call.kappa(k), call.in.v_loss[i], R, along);
    heads[0][i] = head;
    if (out.v_loss != nullptr) out.v_loss[i] = head.d_go;
    if (d_logits == nullptr) return;
    const T sum_va = along.sum_va;
    if (w.dense) {
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, p[j], a[j], R, v_z[j], v_a[j], sum_va); });
    } else {
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, p[j], T(0), R, v_z[j], T(0), sum_va); });
      d_logits[y] = d_z(head, p[y], R, R, v_z[y], sum_va, sum_va);
    }
  });
  coefficient_gradients(call, w, direction, heads[0], out);
}

// ---- the waist ----

// Checks, then f(T{}) for the call's dtype. `needed`: what the op cannot do without where there are rows.
template <class F>
l2t_status guarded(const l2t_rows& rows, const l2t_tensors& inputs, std::initializer_list<const void*> needed,
                   const F& f) {
  const l2t_status status = check(rows, inputs);
  if (status != L2T_OK) return status;
  if (rows.n > 0 && std::find(needed.begin(), needed.end(), nullptr) != needed.end()) return L2T_MISSING_ROWS;
  try {
    dispatch(rows.dtype, f);
  } catch (const std::exception&) {  // only memory can fail
    return L2T_OUT_OF_MEMORY;
  }
  return L2T_OK;
}

}  // namespace
}  // namespace l2t

int64_t l2t_check_target(int64_t n, int64_t table_rows, int64_t ignore_index, const int64_t* target) {
  for (int64_t i = 0; i < n; ++i)
    if ((target[i] < 0 || target[i] >= table_rows) && target[i] != ignore_index) return i;
  return -1;
}

l2t_status l2t_cpu_value(const l2t_rows* rows, const l2t_tensors* inputs, void* loss, void* stats) {
  return l2t::guarded(*rows, *inputs, {loss, stats}, [&](auto scalar) {
    using T = decltype(scalar);
    l2t::value(l2t::Call<T>(*rows, *inputs), static_cast<T*>(loss), static_cast<T*>(stats));
  });
}

l2t_status l2t_cpu_grad(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                        const l2t_outputs* outputs) {
  if (l2t::stray_factors(*rows, *outputs)) return L2T_STRAY_FACTORS;
  return l2t::guarded(*rows, *inputs, {inputs->v_loss, stats}, [&](auto scalar) {
    using T = decltype(scalar);
    l2t::grad(l2t::Call<T>(*rows, *inputs), static_cast<const T*>(stats), l2t::Outputs<T>(*outputs));
  });
}

l2t_status l2t_cpu_grad_vjp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* cotangents, const l2t_outputs* outputs) {
  if (l2t::stray_factors(*rows, *cotangents) || l2t::stray_factors(*rows, *outputs)) return L2T_STRAY_FACTORS;
  return l2t::guarded(*rows, *inputs, {inputs->v_loss, stats}, [&](auto scalar) {
    using T = decltype(scalar);
    l2t::second_order(l2t::Call<T>(*rows, *inputs), static_cast<const T*>(stats), l2t::Inputs<T>(*cotangents),
                      l2t::Outputs<T>(*outputs));
  });
}

l2t_status l2t_cpu_grad_jvp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* tangents, const l2t_outputs* outputs) {
  return l2t_cpu_grad_vjp(rows, inputs, stats, tangents, outputs);
}
