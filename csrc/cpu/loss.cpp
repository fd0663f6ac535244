// The four ops on the CPU: value, grad, grad_vjp, grad_jvp. The formulas are math/'s; here is who walks over
// what.
//
//     over rows      loss, stats, d_logits, d_v_loss: each row by itself
//     over classes   d_weight, d_left, d_bias, d_scale: each table row k over the rows whose target it is, in
//     their order over columns   d_right, which every table row of a group adds to: each block of classes
//     over the table rows, in order
//
// Nothing is added by two threads, so the bits do not depend on their number. A row that is ignored is never
// read. Deliberately not here: arithmetic (math/), loops over the classes of a row (walk.h), threads
// (pool.h).
#include "../l2t.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../dispatch.h"
#include "../math/row.h"
#include "../math/weight.h"
#include "../status.h"
#include "pool.h"
#include "walk.h"

namespace l2t {
namespace {

// ---- the call, typed
// --------------------------------------------------------------------------------------------------

template <class T>
struct Inputs {
  const T *v_loss, *logits, *weight, *left, *right, *bias, *scale;

  explicit Inputs(const l2t_tensors& t)
      : v_loss(static_cast<const T*>(t.v_loss)),
        logits(static_cast<const T*>(t.logits)),
        weight(static_cast<const T*>(t.weight)),
        left(static_cast<const T*>(t.left)),
        right(static_cast<const T*>(t.right)),
        bias(static_cast<const T*>(t.bias)),
        scale(static_cast<const T*>(t.scale)) {}
};

template <class T>
struct Outputs {
  T *v_loss, *logits, *weight, *left, *right, *bias, *scale;

  explicit Outputs(const l2t_outputs& t)
      : v_loss(static_cast<T*>(t.v_loss)),
        logits(static_cast<T*>(t.logits)),
        weight(static_cast<T*>(t.weight)),
        left(static_cast<T*>(t.left)),
        right(static_cast<T*>(t.right)),
        bias(static_cast<T*>(t.bias)),
        scale(static_cast<T*>(t.scale)) {}
};

// Memory of one call: `each` numbers for every lane, not initialised.
template <class T>
class Scratch {
 public:
  Scratch(int64_t lanes, int64_t each) : each_(each), memory_(new T[lanes * each]) {}
  T* operator[](int64_t lane) const { return memory_.get() + lane * each_; }

 private:
  int64_t each_;
  std::unique_ptr<T[]> memory_;
};

// V of every group transposed, [G, r, C]: walks run along classes. Empty if there is no V.
template <class T>
std::vector<T> transposed(const T* right, int64_t groups, int64_t c, int64_t rank) {
  if (right == nullptr) return {};
  std::vector<T> columns(groups * rank * c);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < c; ++j)
      for (int64_t s = 0; s < rank; ++s) columns[(g * rank + s) * c + j] = right[(g * c + j) * rank + s];
  return columns;
}

template <class T>
struct Call {
  const l2t_rows& rows;
  const Inputs<T> in;
  const l2t_link link;
  const int64_t n, c, classes_total, rank;
  const bool dense;  // W has dense rows a; else a = a_y e_y
  const std::vector<T> right_columns;

  Call(const l2t_rows& rows, const l2t_tensors& inputs)
      : rows(rows),
        in(inputs),
        link(static_cast<l2t_link>(rows.link)),
        n(rows.n),
        c(rows.c),
        classes_total(rows.groups * rows.c),
        rank(rows.rank),
        dense(rows.structure == L2T_FULL || rows.rank > 0),
        right_columns(transposed(in.right, rows.groups, c, rank)) {}

  bool low_rank() const { return rank > 0; }
  bool ignored(int64_t i) const { return rows.target[i] == rows.ignore_index; }
  const T* logits(int64_t i) const { return in.logits + i * rows.logits_stride; }
  T beta(int64_t k) const { return in.bias != nullptr ? in.bias[k] : T(0); }
  T kappa(int64_t k) const { return in.scale != nullptr ? in.scale[k] : T(1); }
  T diagonal(int64_t k) const { return in.weight != nullptr ? in.weight[k] : T(1); }
  int64_t lanes(int64_t count) const { return std::max<int64_t>(1, std::min<int64_t>(rows.threads, count)); }

  // V of the group of table row k, or x_V, transposed: [r, C].
  const T* columns(const std::vector<T>& all, int64_t k) const { return all.data() + (k / c) * rank * c; }

  // The row a of W for table row k, where W is dense: in place, or multiplied out into `a`.
  const T* weight_row(int64_t k, T* a) const {
    if (!low_rank()) return in.weight + k * c;
    const T *left = in.left + k * rank, *right = columns(right_columns, k);
    each(c, [=](int64_t j) { a[j] = low_rank_entry(left, right + j, rank, c); });
    a[k % c] += diagonal(k);
    return a;
  }
};

template <class T>
Stats<T> load(const T* stats, int64_t i) {
  return {stats[3 * i], stats[3 * i + 1], stats[3 * i + 2]};
}

// Rows by table row, each list in ascending order (a counting sort): what the walks over classes run along.
struct RowsOfClass {
  std::vector<int64_t> start, row;

  explicit RowsOfClass(const l2t_rows& rows) : start(rows.groups * rows.c + 2, 0) {
    for (int64_t i = 0; i < rows.n; ++i)
      if (rows.target[i] != rows.ignore_index) ++start[rows.target[i] + 2];
    for (size_t k = 2; k < start.size(); ++k) start[k] += start[k - 1];
    row.resize(start.back());
    for (int64_t i = 0; i < rows.n; ++i)
      if (rows.target[i] != rows.ignore_index) row[start[rows.target[i] + 1]++] = i;
  }

  template <class F>
  void each_row(int64_t k, const F& f) const {
    for (int64_t at = start[k]; at < start[k + 1]; ++at) f(row[at]);
  }
  bool occurs(int64_t k) const { return start[k] < start[k + 1]; }
};

// ---- value
// ------------------------------------------------------------------------------------------------------------

template <class T>
void value(const Call<T>& call, T* loss_out, T* stats_out) {
  const int64_t c = call.c;
  const Scratch<T> weight_rows(call.lanes(call.n), call.low_rank() ? c : 0);
  parallel_for(call.rows.threads, call.n, c, [&](int64_t i, int lane) {
    if (call.ignored(i)) {
      loss_out[i] = stats_out[3 * i] = stats_out[3 * i + 1] = stats_out[3 * i + 2] = 0;
      return;
    }
    const int64_t k = call.rows.target[i];
    const T* z = call.logits(i);
    const T max = max_of(z, c);
    const T sum_exp = sum<T>(c, [=](int64_t j) { return exp(z[j] - max); });
    Stats<T> stats;
    if (call.dense) {
      const T* a = call.weight_row(k, weight_rows[lane]);
      const T az = sum<T>(c, [=](int64_t j) { return times(a[j], z[j] - max); });
      const T R = sum<T>(c, [=](int64_t j) { return a[j]; });
      stats = dense_stats(max, sum_exp, az, R, call.beta(k));
    } else {
      stats = diagonal_stats(max, sum_exp, z[k % c], call.diagonal(k), call.beta(k));
    }
    loss_out[i] = loss(call.link, stats, call.kappa(k));
    stats_out[3 * i] = stats.max;
    stats_out[3 * i + 1] = stats.log_sum;
    stats_out[3 * i + 2] = stats.u;
  });
}

// ---- the gradients to the coefficients, of `grad` (second = false) and of its derivatives
// -----------------------------

template <bool second, class T>
class Coefficients {
 public:
  Coefficients(const Call<T>& call, const Head<T>* heads, const Inputs<T>& v, const Outputs<T>& out)
      : call_(call),
        heads_(heads),
        v_(v),
        out_(out),
        rows_(call.rows),
        v_right_columns_(
            transposed(call.low_rank() ? v.right : nullptr, call.rows.groups, call.c, call.rank)) {}

  void over_classes() const {
    const int64_t c = call_.c, rows_per_class = 1 + call_.n / call_.classes_total;
    const bool row_wanted = call_.dense && (out_.weight != nullptr || out_.left != nullptr);
    const Scratch<T> scratch(call_.lanes(call_.classes_total), call_.low_rank() ? 2 * c : 0);
    parallel_for(call_.rows.threads, call_.classes_total, rows_per_class * (row_wanted ? c : 1),
                 [&](int64_t k, int lane) {
                   scalars(k);
                   if (!call_.dense && out_.weight != nullptr) out_.weight[k] = diagonal_entry(k);
                   if (!row_wanted) return;
                   if (call_.low_rank())
                     diagonal_and_left(k, scratch[lane], scratch[lane] + c);
                   else
                     weight_row(k, 0, c, out_.weight + k * c, nullptr);
                 });
  }

  void over_columns() const {
    if (out_.right == nullptr || !call_.low_rank()) return;
    const int64_t c = call_.c, rank = call_.rank, blocks = (c + kColumns - 1) / kColumns;
    const int64_t items = call_.rows.groups * blocks;
    const Scratch<T> scratch(call_.lanes(items), (rank + 2) * kColumns);
    parallel_for(call_.rows.threads, items, (call_.n + c) * kColumns / blocks, [&](int64_t item, int lane) {
      const int64_t begin = item % blocks * kColumns, width = std::min(kColumns, c - begin);
      T *d_right = scratch[lane], *e = d_right + rank * kColumns, *f = e + kColumns;
      right_block(item / blocks, begin, width, d_right, e, f);
    });
  }

 private:
  static constexpr int64_t kColumns = 256;

  const T* v_logits(int64_t i) const { return v_.logits + i * call_.c; }

  void scalars(int64_t k) const {
    T d_bias = 0, d_scale = 0;
    rows_.each_row(k, [&](int64_t i) {
      d_bias += heads_[i].turn;
      d_scale += heads_[i].d_kappa;
    });
    if (out_.bias != nullptr) out_.bias[k] = d_bias;
    if (out_.scale != nullptr) out_.scale[k] = d_scale;
  }

  T diagonal_entry(int64_t k) const {
    const int64_t y = k % call_.c;
    T sum = 0;
    rows_.each_row(k, [&](int64_t i) {
      const T log_p = heads_[i].stats.log_p(call_.logits(i)[y]);
      if constexpr (second)
        sum += d_a(heads_[i], log_p, v_.logits != nullptr ? v_logits(i)[y] : T(0));
      else
        sum += d_a(heads_[i], log_p);
    });
    return sum;
  }

  // e = the gradient to row k of W, its classes [begin, begin + width); f = the one that `grad` gives, where
  // asked.
  void weight_row(int64_t k, int64_t begin, int64_t width, T* e, T* f) const {
    std::fill_n(e, width, T(0));
    if (f != nullptr) std::fill_n(f, width, T(0));
    rows_.each_row(k, [&](int64_t i) {
      const Head<T> head = heads_[i];
      const T* z = call_.logits(i) + begin;
      if (second && v_.logits != nullptr) {
        const T* v_z = v_logits(i) + begin;
        each(width, [=](int64_t j) { e[j] += d_a(head, head.stats.log_p(z[j]), v_z[j]); });
      } else {
        each(width, [=](int64_t j) { e[j] += d_a(head, head.stats.log_p(z[j])); });
      }
      if (f != nullptr) each(width, [=](int64_t j) { f[j] += first_d_a(head, head.stats.log_p(z[j])); });
    });
  }

  void diagonal_and_left(int64_t k, T* e, T* f) const {
    const int64_t c = call_.c, rank = call_.rank;
    const bool crossed = second && v_.right != nullptr;
    weight_row(k, 0, c, e, crossed ? f : nullptr);
    if (out_.weight != nullptr) out_.weight[k] = e[k % c];
    if (out_.left == nullptr) return;
    const T* right = call_.columns(call_.right_columns, k);
    const T* v_right = call_.columns(v_right_columns_, k);
    for (int64_t s = 0; s < rank; ++s) {
      const T *right_s = right + s * c, *v_right_s = v_right + s * c;
      T d_left = sum<T>(c, [=](int64_t j) { return right_s[j] * e[j]; });
      if (crossed) d_left += sum<T>(c, [=](int64_t j) { return v_right_s[j] * f[j]; });
      out_.left[k * rank + s] = d_left;
    }
  }

  void right_block(int64_t group, int64_t begin, int64_t width, T* d_right, T* e, T* f) const {
    const int64_t c = call_.c, rank = call_.rank;
    const bool crossed = second && v_.left != nullptr;
    std::fill_n(d_right, rank * width, T(0));
    for (int64_t k = group * c; k < (group + 1) * c; ++k) {
      if (!rows_.occurs(k)) continue;
      weight_row(k, begin, width, e, crossed ? f : nullptr);
      for (int64_t s = 0; s < rank; ++s) {
        T* d = d_right + s * width;
        const T left = call_.in.left[k * rank + s];
        each(width, [=](int64_t j) { d[j] += left * e[j]; });
        if (!crossed) continue;
        const T v_left = v_.left[k * rank + s];
        each(width, [=](int64_t j) { d[j] += v_left * f[j]; });
      }
    }
    for (int64_t j = 0; j < width; ++j)
      for (int64_t s = 0; s < rank; ++s)
        out_.right[(group * c + begin + j) * rank + s] = d_right[s * width + j];
  }

  const Call<T>& call_;
  const Head<T>* heads_;
  const Inputs<T>& v_;
  const Outputs<T>& out_;
  const RowsOfClass rows_;
  const std::vector<T> v_right_columns_;
};

template <bool second, class T>
void coefficients(const Call<T>& call, const Head<T>* heads, const Inputs<T>& v, const Outputs<T>& out) {
  if (!out.weight && !out.left && !out.right && !out.bias && !out.scale) return;
  const Coefficients<second, T> walk(call, heads, v, out);
  walk.over_classes();
  walk.over_columns();
}

// ---- grad
// -------------------------------------------------------------------------------------------------------------

template <class T>
void grad(const Call<T>& call, const T* stats, const Outputs<T>& out) {
  const int64_t c = call.c;
  const Scratch<Head<T>> heads(1, call.n);
  const Scratch<T> weight_rows(call.lanes(call.n), call.low_rank() ? c : 0);
  parallel_for(call.rows.threads, call.n, out.logits != nullptr ? c : 1, [&](int64_t i, int lane) {
    T* d_logits = out.logits != nullptr ? out.logits + i * c : nullptr;
    if (call.ignored(i)) {
      if (d_logits != nullptr) std::fill_n(d_logits, c, T(0));
      return;
    }
    const int64_t k = call.rows.target[i], y = k % c;
    const Head<T> head = grad_head(call.link, load(stats, i), call.kappa(k), call.in.v_loss[i]);
    heads[0][i] = head;
    if (d_logits == nullptr) return;
    const T* z = call.logits(i);
    if (call.dense) {
      const T* a = call.weight_row(k, weight_rows[lane]);
      const T R = sum<T>(c, [=](int64_t j) { return a[j]; });
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, exp(head.stats.log_p(z[j])), a[j], R); });
    } else {
      const T R = call.diagonal(k);
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, exp(head.stats.log_p(z[j])), T(0), R); });
      d_logits[y] = d_z(head, exp(head.stats.log_p(z[y])), R, R);
    }
  });
  coefficients<false>(call, heads[0], call.in, out);
}

// ---- grad_vjp, grad_jvp: the derivative of grad along v; the Hessian is symmetric, so both are one walk
// ---------------

template <class T>
void second_order(const Call<T>& call, const T* stats_in, const Inputs<T>& v, const Outputs<T>& out) {
  const int64_t c = call.c;
  const bool row_wanted = out.logits != nullptr;
  const bool v_factors = call.low_rank() && (v.left != nullptr || v.right != nullptr);
  const std::vector<T> v_right_columns =
      transposed(v_factors ? v.right : nullptr, call.rows.groups, c, call.rank);
  const std::vector<T> zeros(c, T(0));
  const Scratch<Head<T>> heads(1, call.n);
  const Scratch<T> scratch(call.lanes(call.n), 3 * c);

  // The row v_a that W moves by (weight.h); null if it is zero but for the entry at the target.
  const auto weight_direction = [&](int64_t k, T* v_a) -> const T* {
    if (!call.low_rank()) return call.dense && v.weight != nullptr ? v.weight + k * c : nullptr;
    if (!v_factors && v.weight == nullptr) return nullptr;
    std::fill_n(v_a, c, T(0));
    if (v.left != nullptr) {
      const T *v_left = v.left + k * call.rank, *right = call.columns(call.right_columns, k);
      each(c, [=, &call](int64_t j) { v_a[j] += low_rank_entry(v_left, right + j, call.rank, c); });
    }
    if (v.right != nullptr) {
      const T *left = call.in.left + k * call.rank, *v_right = call.columns(v_right_columns, k);
      each(c, [=, &call](int64_t j) { v_a[j] += low_rank_entry(left, v_right + j, call.rank, c); });
    }
    if (v.weight != nullptr) v_a[k % c] += v.weight[k];
    return v_a;
  };

  parallel_for(call.rows.threads, call.n, 2 * c, [&](int64_t i, int lane) {
    T* d_logits = row_wanted ? out.logits + i * c : nullptr;
    if (call.ignored(i)) {
      if (row_wanted) std::fill_n(d_logits, c, T(0));
      if (out.v_loss != nullptr) out.v_loss[i] = 0;
      return;
    }
    const int64_t k = call.rows.target[i], y = k % c;
    const Stats<T> stats = load(stats_in, i);
    const T* z = call.logits(i);
    const T* v_z = v.logits != nullptr ? v.logits + i * c : zeros.data();
    T* p = scratch[lane];

    Direction<T> along{};
    along.v_beta = v.bias != nullptr ? v.bias[k] : T(0);
    along.v_kappa = v.scale != nullptr ? v.scale[k] : T(0);
    along.t_go = v.v_loss != nullptr ? v.v_loss[i] : T(0);
    if (row_wanted || v.logits != nullptr) {
      each(c, [=](int64_t j) { p[j] = exp(stats.log_p(z[j])); });
      along.pv = sum<T>(c, [=](int64_t j) { return p[j] * v_z[j]; });
    }
    const T *a = nullptr, *v_a = nullptr;
    T R, a_y, v_a_y;
    if (call.dense) {
      a = call.weight_row(k, p + c);
      v_a = weight_direction(k, p + 2 * c);
      R = sum<T>(c, [=](int64_t j) { return a[j]; });
      along.av = sum<T>(c, [=](int64_t j) { return a[j] * v_z[j]; });
      if (v_a != nullptr) {
        along.sum_va = sum<T>(c, [=](int64_t j) { return v_a[j]; });
        along.va_log_p = sum<T>(c, [=](int64_t j) { return times(v_a[j], stats.log_p(z[j])); });
      } else {
        v_a = zeros.data();
      }
    } else {
      R = a_y = call.diagonal(k);
      v_a_y = along.sum_va = v.weight != nullptr ? v.weight[k] : T(0);
      along.av = a_y * v_z[y];
      along.va_log_p = times(v_a_y, stats.log_p(z[y]));
    }

    const Head<T> head = second_head(call.link, stats, call.kappa(k), call.in.v_loss[i], R, along);
    heads[0][i] = head;
    if (out.v_loss != nullptr) out.v_loss[i] = head.d_go;
    if (!row_wanted) return;
    const T sum_va = along.sum_va;
    if (call.dense) {
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, p[j], a[j], R, v_z[j], v_a[j], sum_va); });
    } else {
      each(c, [=](int64_t j) { d_logits[j] = d_z(head, p[j], T(0), R, v_z[j], T(0), sum_va); });
      d_logits[y] = d_z(head, p[y], a_y, R, v_z[y], v_a_y, sum_va);
    }
  });
  coefficients<true>(call, heads[0], v, out);
}

// ---- the waist
// --------------------------------------------------------------------------------------------------------

// Checks, then f(T{}) for the call's dtype. `others`: what must not be null where there are rows.
template <class F>
l2t_status guarded(const l2t_rows& rows, const l2t_tensors& inputs, std::initializer_list<const void*> others,
                   const F& f) {
  const l2t_status status = check(rows, inputs);
  if (status != L2T_OK) return status;
  if (rows.n > 0 && std::find(others.begin(), others.end(), nullptr) != others.end()) return L2T_MISSING_ROWS;
  try {
    dispatch(rows.dtype, f);
  } catch (const std::bad_alloc&) {
    return L2T_OUT_OF_MEMORY;
  }
  return L2T_OK;
}

}  // namespace
}  // namespace l2t

using namespace l2t;

int64_t l2t_check_target(int64_t n, int64_t classes_total, int64_t ignore_index, const int64_t* target) {
  for (int64_t i = 0; i < n; ++i)
    if ((target[i] < 0 || target[i] >= classes_total) && target[i] != ignore_index) return i;
  return -1;
}

l2t_status l2t_cpu_value(const l2t_rows* rows, const l2t_tensors* inputs, void* loss, void* stats) {
  return guarded(*rows, *inputs, {loss, stats}, [&](auto scalar) {
    using T = decltype(scalar);
    value(Call<T>(*rows, *inputs), static_cast<T*>(loss), static_cast<T*>(stats));
  });
}

l2t_status l2t_cpu_grad(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                        const l2t_outputs* outputs) {
  const l2t_status status = check_factors(*rows, *outputs);
  if (status != L2T_OK) return status;
  return guarded(*rows, *inputs, {inputs->v_loss, stats}, [&](auto scalar) {
    using T = decltype(scalar);
    grad(Call<T>(*rows, *inputs), static_cast<const T*>(stats), Outputs<T>(*outputs));
  });
}

l2t_status l2t_cpu_grad_vjp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* cotangents, const l2t_outputs* outputs) {
  const l2t_status status =
      check_factors(*rows, *cotangents) == L2T_OK ? check_factors(*rows, *outputs) : L2T_STRAY_FACTORS;
  if (status != L2T_OK) return status;
  return guarded(*rows, *inputs, {inputs->v_loss, stats}, [&](auto scalar) {
    using T = decltype(scalar);
    second_order(Call<T>(*rows, *inputs), static_cast<const T*>(stats), Inputs<T>(*cotangents),
                 Outputs<T>(*outputs));
  });
}

l2t_status l2t_cpu_grad_jvp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                            const l2t_tensors* tangents, const l2t_outputs* outputs) {
  return l2t_cpu_grad_vjp(rows, inputs, stats, tangents, outputs);
}
