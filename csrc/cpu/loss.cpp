// The ops on the CPU: value, grad, and one for grad_vjp and grad_jvp. Here are the walks over rows (loss, stats,
// d_logits, d_v_loss: each row by itself); the gradients to the coefficients are in weight.h. A row that is
// ignored is never read.
//
// The formulas are those of math/row.h, in its three moves: sums over classes, head, one expression an output.
// The gradient to the logits may be written over the logits: what needs them comes before, in the row and in
// the call. Deliberately not here: arithmetic (math/), loops over classes (walk.h), threads (pool.h).
#include "../l2t.h"

#include "../dispatch.h"
#include "../math/row.h"
#include "call.h"
#include "isa.h"
#include "pool.h"
#include "walk.h"
#include "weight.h"

namespace l2t {
inline namespace L2T_ISA {
namespace {

// The gradient to the logits of one row from its head, written over z or elsewhere.
template <class T, class S>
void write_d_logits(const Weight<T>& w, const Head<T>& head, int64_t k, const S* z, T* room, S* d_logits) {
  const int64_t c = w.c, y = k % c;
  if (w.dense) {
    const T* a = w.row(k, room);
    const T R = sum(c, a);
    each(c, [=](int64_t j) { narrow(d_z(head, head.stats.p(widen(z[j])), a[j], R), d_logits[j]); });
  } else {
    const T R = w.diagonal(k), p = head.stats.p(widen(z[y]));
    each(c, [=](int64_t j) { narrow(d_z(head, head.stats.p(widen(z[j])), T(0), R), d_logits[j]); });
    narrow(d_z(head, p, R, R), d_logits[y]);
  }
}

template <class S>
void zero(int64_t c, S* row) {
  for (int64_t j = 0; j < c; ++j) row[j] = S{};
}

// ---- value ----

template <class T, class S>
l2t_status value(const l2t_rows& rows, const l2t_tensors& inputs, T* loss_out, T* stats_out,
                 S* d_logits_out) {
  Memory memory;
  const Call<T, S> call(rows, inputs, memory);
  const int64_t c = call.c;
  const Weight<T> w(call, memory);
  const Scratch<T> scratch(memory, rows, call.n, w.low_rank ? c : 0);
  T* loss_of_row = call.reduced ? memory.take<T>(call.n) : loss_out;
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  parallel_for(rows.threads, call.n, w.cost(), [&](int64_t i, int lane) {
    if (call.ignored(i)) {
      loss_of_row[i] = 0;
      store_stats(stats_out, i, Stats<T>{0, 0, 0});
      if (d_logits_out != nullptr) zero(c, d_logits_out + i * c);
      return;
    }
    const int64_t k = rows.target[i], y = k % c;
    const S* z = call.logits(i);
    const T max = max_of<T>(c, z);
    Stats<T> stats =
        stats_before_u(max, sum<T>(c, [=](int64_t j) { return sum_exp_term(widen(z[j]), max); }));
    stats.u = call.beta(k);
    if (w.dense) {
      const T* a = w.row(k, scratch[lane]);
      stats.u += sum<T>(c, [=](int64_t j) { return a_log_p_term(a[j], stats.log_p(widen(z[j]))); });
    } else {
      stats.u += a_log_p_term(w.diagonal(k), stats.log_p(widen(z[y])));
    }
    loss_of_row[i] = loss(call.link, stats, call.kappa(k));
    store_stats(stats_out, i, stats);
    if (d_logits_out == nullptr) return;
    const Head<T> head = grad_head(call.link, stats, call.kappa(k), call.of_loss(nullptr, i, T(1)));
    write_d_logits(w, head, k, z, scratch[lane], d_logits_out + i * c);
  });
  if (call.reduced) call.reduce(loss_of_row, loss_out);
  return L2T_OK;
}

// ---- grad ----

template <class T, class S>
l2t_status grad(const l2t_rows& rows, const l2t_tensors& inputs, const T* stats, const Outputs<T, S>& out) {
  Memory memory;
  const Call<T, S> call(rows, inputs, memory);
  const int64_t c = call.c;
  const Weight<T> w(call, memory);
  const WeightDirection<T, S> nowhere(w, call, Inputs<T, S>(l2t_tensors{}), memory);
  auto* heads = memory.take<Head<T>>(call.n);
  const Scratch<T> scratch(memory, rows, call.n, w.low_rank ? c : 0);
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  parallel_for(rows.threads, call.n, 30, [&](int64_t i, int) {
    if (call.ignored(i)) return;
    const T go = call.of_loss(call.in.v_loss, i, T(1));
    heads[i] = grad_head(call.link, load_stats(stats, i), call.kappa(rows.target[i]), go);
  });
  const l2t_status status = coefficient_gradients(call, w, nowhere, heads, out, memory);
  if (status != L2T_OK || out.logits == nullptr) return status;
  parallel_for(rows.threads, call.n, w.cost(), [&](int64_t i, int lane) {
    S* d_logits = out.logits + i * c;
    if (call.ignored(i))
      zero(c, d_logits);
    else
      write_d_logits(w, heads[i], rows.target[i], call.logits(i), scratch[lane], d_logits);
  });
  return L2T_OK;
}

// ---- grad_vjp, grad_jvp: the derivative of grad along v ----

template <class T, class S>
l2t_status second_order(const l2t_rows& rows, const l2t_tensors& inputs, const T* stats_in,
                        const Inputs<T, S>& v, const Outputs<T, S>& out) {
  Memory memory;
  const Call<T, S> call(rows, inputs, memory);
  const int64_t c = call.c;
  const Weight<T> w(call, memory);
  const WeightDirection<T, S> direction(w, call, v, memory);
  auto* heads = memory.take<Head<T>>(call.n);
  const Scratch<T> scratch(memory, rows, call.n, 4 * c);  // p, v_z, a, v_a
  T* zeros = memory.take<T>(c);
  T* d_go_of_row = out.v_loss == nullptr ? nullptr : call.reduced ? memory.take<T>(call.n) : out.v_loss;
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  zero(c, zeros);
  parallel_for(rows.threads, call.n, 2 * w.cost(), [&](int64_t i, int lane) {
    S* d_logits = out.logits != nullptr ? out.logits + i * c : nullptr;
    if (call.ignored(i)) {
      if (d_logits != nullptr) zero(c, d_logits);
      if (d_go_of_row != nullptr) d_go_of_row[i] = 0;
      return;
    }
    const int64_t k = rows.target[i], y = k % c;
    const Stats<T> stats = load_stats(stats_in, i);
    const S *z = call.logits(i), *v_logits = v.logits + i * c;
    T *p = scratch[lane], *v_z = p + c, *a_room = v_z + c, *v_a_room = a_room + c;
    if (v.logits != nullptr)
      each(c, [=](int64_t j) { v_z[j] = widen(v_logits[j]); });
    else
      v_z = zeros;

    Direction<T> along{};
    along.v_beta = at(v.bias, k, T(0));
    along.v_kappa = at(v.scale, k, T(0));
    along.t_go = call.of_loss(v.v_loss, i, T(0));
    if (d_logits != nullptr || v.logits != nullptr) {
      each(c, [=](int64_t j) { p[j] = stats.p(widen(z[j])); });
      along.pv = dot(c, p, v_z);
    }
    const T *a = nullptr, *v_a = zeros;
    T R;
    if (w.dense) {
      a = w.row(k, a_room);
      R = sum(c, a);
      along.av = dot(c, a, v_z);
      if (direction.moves) {
        v_a = direction.row(k, v_a_room);
        along.sum_va = sum(c, v_a);
        along.va_log_p = sum<T>(c, [=](int64_t j) { return a_log_p_term(v_a[j], stats.log_p(widen(z[j]))); });
      }
    } else {
      R = w.diagonal(k);
      along.av = R * v_z[y];
      along.sum_va = direction.diagonal(k);
      along.va_log_p = a_log_p_term(along.sum_va, stats.log_p(widen(z[y])));
    }

    const T go = call.of_loss(call.in.v_loss, i, T(1));
    const Head<T> head = second_head(call.link, stats, call.kappa(k), go, R, along);
    heads[i] = head;
    if (d_go_of_row != nullptr) d_go_of_row[i] = head.d_go;
    if (d_logits == nullptr) return;
    const T sum_va = along.sum_va;
    if (w.dense) {
      each(c, [=](int64_t j) { narrow(d_z(head, p[j], a[j], R, v_z[j], v_a[j], sum_va), d_logits[j]); });
    } else {
      each(c, [=](int64_t j) { narrow(d_z(head, p[j], T(0), R, v_z[j], T(0), sum_va), d_logits[j]); });
      narrow(d_z(head, p[y], R, R, v_z[y], sum_va, sum_va), d_logits[y]);
    }
  });
  if (out.v_loss != nullptr && call.reduced) call.reduce(d_go_of_row, out.v_loss);
  return coefficient_gradients(call, w, direction, heads, out, memory);
}

// ---- the table ----

l2t_status any_value(const l2t_rows& rows, const l2t_tensors& inputs, void* loss, void* stats,
                     void* d_logits) {
  return dispatch(rows.dtype, [&](auto arithmetic, auto storage) {
    using T = decltype(arithmetic);
    using S = decltype(storage);
    return value(rows, inputs, static_cast<T*>(loss), static_cast<T*>(stats), static_cast<S*>(d_logits));
  });
}

l2t_status any_grad(const l2t_rows& rows, const l2t_tensors& inputs, const void* stats,
                    const l2t_outputs& outputs) {
  return dispatch(rows.dtype, [&](auto arithmetic, auto storage) {
    using T = decltype(arithmetic);
    using S = decltype(storage);
    return grad(rows, inputs, static_cast<const T*>(stats), Outputs<T, S>(outputs));
  });
}

l2t_status any_second_order(const l2t_rows& rows, const l2t_tensors& inputs, const void* stats,
                            const l2t_tensors& direction, const l2t_outputs& outputs) {
  return dispatch(rows.dtype, [&](auto arithmetic, auto storage) {
    using T = decltype(arithmetic);
    using S = decltype(storage);
    return second_order(rows, inputs, static_cast<const T*>(stats), Inputs<T, S>(direction),
                        Outputs<T, S>(outputs));
  });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {any_value, any_grad, any_second_order};

}  // namespace L2T_ISA
}  // namespace l2t
