// The structures of W on the CPU: the row a of a class, the row that W moves by along a direction, and the
// gradients to the coefficients. The products are those of math/weight.h.
//
// The gradients are two walks. Over classes: every table row k over the rows whose target it is, in their
// order. Over columns: d_right, which all table rows of a group add to, so each block of its classes runs
// over the table rows, in order. Nothing is added by two threads, so the bits do not depend on their number.
#ifndef L2T_CPU_WEIGHT_H
#define L2T_CPU_WEIGHT_H

#include "../math/weight.h"
#include "call.h"
#include "pool.h"
#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {

// A right factor V, of every group, transposed: [G, r, C], so that walks run along classes. Nothing if there
// is no V.
template <class T>
class Columns {
 public:
  Columns(const l2t_rows& rows, const T* right, Memory& memory)
      : c_(rows.c),
        rank_(rows.rank),
        columns_(right != nullptr ? memory.take<T>(rows.groups * rank_ * c_) : nullptr) {
    if (right == nullptr || memory.failed()) return;
    for (int64_t k = 0; k < rows.groups * c_; ++k)
      for (int64_t s = 0; s < rank_; ++s) column(k, s)[k % c_] = right[k * rank_ + s];
  }

  // Column s of the V of table row k's group.
  T* column(int64_t k, int64_t s) const { return columns_ + (k / c_ * rank_ + s) * c_; }

  // out += V U[k]; left = U[k].
  void add_product(int64_t k, const T* left, T* out) const {
    const T* right = column(k, 0);
    each<T>(c_, [&](int64_t j, auto which) {
      auto sum = which.load(out + j);
      for (int64_t s = 0; s < rank_; ++s) sum = plus_product(sum, left[s], which.load(right + s * c_ + j));
      which.store(out + j, sum);
    });
  }

 private:
  int64_t c_, rank_;
  T* columns_;
};

// W itself.
template <class T>
class Weight {
 public:
  template <class S>
  Weight(const Call<T, S>& call, Memory& memory)
      : in_weight(call.in.weight),
        in_left(call.in.left),
        c(call.c),
        rank(call.rows.rank),
        low_rank(rank > 0),
        dense(low_rank || call.rows.structure == L2T_FULL),
        columns(call.rows, low_rank ? call.in.right : nullptr, memory) {}

  // The row a of table row k, in place or multiplied out into `room`. Only where W is dense.
  const T* row(int64_t k, T* room) const {
    if (!low_rank) return in_weight + k * c;
    fill(c, T(0), room);
    columns.add_product(k, in_left + k * rank, room);
    room[k % c] += diagonal(k);
    return room;
  }

  // The work of having a row and running over it, in row elements.
  int64_t cost() const { return c * (1 + rank); }

  // a_y, where W is diagonal: all there is of a.
  T diagonal(int64_t k) const { return at(in_weight, k, T(1)); }

  const T *in_weight, *in_left;
  const int64_t c, rank;
  const bool low_rank, dense;
  const Columns<T> columns;
};

// The row v_a that W moves by along a direction v of all inputs, which need not move W, or anything.
template <class T, class S>
class WeightDirection {
 public:
  WeightDirection(const Weight<T>& w, const Call<T, S>& call, const Inputs<T, S>& v, Memory& memory)
      : moves(v.weight != nullptr || (w.low_rank && (v.left != nullptr || v.right != nullptr))),
        v(v),
        columns(call.rows, w.low_rank ? v.right : nullptr, memory),
        w_(w) {}

  // Only where W is dense and moves.
  const T* row(int64_t k, T* room) const {
    const int64_t c = w_.c, rank = w_.rank;
    if (!w_.low_rank) return v.weight + k * c;
    fill(c, T(0), room);
    if (v.left != nullptr) w_.columns.add_product(k, v.left + k * rank, room);
    if (v.right != nullptr) columns.add_product(k, w_.in_left + k * rank, room);
    room[k % c] += diagonal(k);
    return room;
  }

  T diagonal(int64_t k) const { return at(v.weight, k, T(0)); }

  const bool moves;
  const Inputs<T, S> v;
  const Columns<T> columns;

 private:
  const Weight<T>& w_;
};

// The gradients to W, bias and scale from the heads of the rows: those of `grad` where nothing moves, else
// their derivative along the direction.
template <class T, class S>
class CoefficientGradients {
 public:
  CoefficientGradients(const Call<T, S>& call, const Weight<T>& w, const WeightDirection<T, S>& direction,
                       const Head<T>* heads, const Outputs<T, S>& out, Memory& memory)
      : call_(call),
        w_(w),
        direction_(direction),
        heads_(heads),
        out_(out),
        by_class_(call.rows, memory),
        blocks_((call.c + kColumns - 1) / kColumns),
        scratch_(memory, call.rows, max(call.table_rows, call.rows.groups * blocks_),
                 w.low_rank ? max(2 * call.c, (w.rank + 2) * kColumns) : 0) {}

  void over_classes() const {
    const bool rows_wanted = w_.dense && (out_.weight != nullptr || out_.left != nullptr);
    const int64_t cost = (rows_wanted ? w_.cost() : 1) * (1 + call_.n / call_.table_rows);
    parallel_for(call_.rows.threads, call_.table_rows, cost, [&](int64_t k, int lane) {
      bias_and_scale(k);
      if (!w_.dense && out_.weight != nullptr) out_.weight[k] = diagonal(k);
      if (!rows_wanted) return;
      if (w_.low_rank)
        diagonal_and_left(k, scratch_[lane], scratch_[lane] + call_.c);
      else
        row(k, 0, call_.c, out_.weight + k * call_.c, nullptr);
    });
  }

  void over_columns() const {
    if (out_.right == nullptr || !w_.low_rank) return;
    const int64_t items = call_.rows.groups * blocks_;
    const int64_t cost = kColumns * (1 + w_.rank) * (1 + call_.n / call_.rows.groups);
    parallel_for(call_.rows.threads, items, cost, [&](int64_t item, int lane) {
      right_block(item / blocks_, item % blocks_ * kColumns, scratch_[lane]);
    });
  }

 private:
  static constexpr int64_t kColumns = 256;

  // Null where the logits do not move.
  const S* v_logits(int64_t i) const {
    return direction_.v.logits != nullptr ? direction_.v.logits + i * call_.c : nullptr;
  }

  void bias_and_scale(int64_t k) const {
    T d_bias = 0, d_scale = 0;
    by_class_.each_row(k, [&](int64_t i) {
      d_bias += heads_[i].slope;
      d_scale += heads_[i].d_kappa;
    });
    if (out_.bias != nullptr) out_.bias[k] = d_bias;
    if (out_.scale != nullptr) out_.scale[k] = d_scale;
  }

  T diagonal(int64_t k) const {
    const int64_t y = k % call_.c;
    T total = 0;
    by_class_.each_row(k, [&](int64_t i) {
      const S* v_z = v_logits(i);
      const T log_p = heads_[i].stats.log_p(widen(call_.logits(i)[y]));
      total += v_z != nullptr ? d_a(heads_[i], log_p, widen(v_z[y])) : d_a(heads_[i], log_p);
    });
    return total;
  }

  // e = the gradient to the row a of table row k, classes [begin, begin + width); f = the one of `grad`,
  // where asked for.
  void row(int64_t k, int64_t begin, int64_t width, T* e, T* f) const {
    fill(width, T(0), e);
    if (f != nullptr) fill(width, T(0), f);
    by_class_.each_row(k, [&](int64_t i) {
      const Head<T> head = heads_[i];
      const S *z = call_.logits(i) + begin, *v_z = v_logits(i);
      if (v_z != nullptr) {
        v_z += begin;
        add_to<T>(width, e, [&](int64_t j, auto which) {
          return d_a(head, head.stats.log_p(which.load(z + j)), which.load(v_z + j));
        });
      } else {
        add_to<T>(width, e,
                  [&](int64_t j, auto which) { return d_a(head, head.stats.log_p(which.load(z + j))); });
      }
      if (f != nullptr)
        add_to<T>(width, f, [&](int64_t j, auto which) {
          return first_d_a(head, head.stats.log_p(which.load(z + j)));
        });
    });
  }

  void diagonal_and_left(int64_t k, T* e, T* f) const {
    const int64_t c = call_.c, rank = w_.rank;
    if (!by_class_.occurs(k)) {
      if (out_.weight != nullptr) out_.weight[k] = 0;
      for (int64_t s = 0; out_.left != nullptr && s < rank; ++s) out_.left[k * rank + s] = 0;
      return;
    }
    const bool crossed = direction_.v.right != nullptr;
    row(k, 0, c, e, crossed ? f : nullptr);
    if (out_.weight != nullptr) out_.weight[k] = e[k % c];
    for (int64_t s = 0; out_.left != nullptr && s < rank; ++s) {
      T& d_left = out_.left[k * rank + s];
      d_left = dot(c, w_.columns.column(k, s), e);
      if (crossed) d_left += dot(c, direction_.columns.column(k, s), f);
    }
  }

  void right_block(int64_t group, int64_t begin, T* room) const {
    const int64_t c = call_.c, rank = w_.rank, width = min(kColumns, c - begin);
    const bool crossed = direction_.v.left != nullptr;
    T *d_right = room, *e = d_right + rank * width, *f = e + width;  // [r, width], [width], [width]
    fill(rank * width, T(0), d_right);
    by_class_.each_occurring(group * c, (group + 1) * c, [&](int64_t k) {
      row(k, begin, width, e, crossed ? f : nullptr);
      for (int64_t s = 0; s < rank; ++s) {
        add_scaled(width, w_.in_left[k * rank + s], e, d_right + s * width);
        if (crossed) add_scaled(width, direction_.v.left[k * rank + s], f, d_right + s * width);
      }
    });
    T* out = out_.right + (group * c + begin) * rank;
    for (int64_t j = 0; j < width; ++j)
      for (int64_t s = 0; s < rank; ++s) out[j * rank + s] = d_right[s * width + j];
  }

  const Call<T, S>& call_;
  const Weight<T>& w_;
  const WeightDirection<T, S>& direction_;
  const Head<T>* heads_;
  const Outputs<T, S>& out_;
  const RowsByClass by_class_;
  const int64_t blocks_;
  const Scratch<T> scratch_;
};

template <class T, class S>
l2t_status coefficient_gradients(const Call<T, S>& call, const Weight<T>& w,
                                 const WeightDirection<T, S>& direction, const Head<T>* heads,
                                 const Outputs<T, S>& out, Memory& memory) {
  if (!out.weight && !out.left && !out.right && !out.bias && !out.scale) return L2T_OK;
  const CoefficientGradients<T, S> walks(call, w, direction, heads, out, memory);
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  walks.over_classes();
  walks.over_columns();
  return L2T_OK;
}

}  // namespace L2T_ISA
}  // namespace l2t
#endif
