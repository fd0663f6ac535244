// The structures of W on the CPU: the row a of a class, the row that W moves by along a direction, and the
// gradients to the coefficients. The products are those of math/weight.h.
//
// The gradients are two walks. Over classes: every table row k over the rows whose target it is, in their
// order; where W is of low rank, a tile of those that occur at a time, in blocks of columns. Over columns:
// d_right, which all table rows of a group add to, so each block of its classes runs over the table rows, in
// order. Nothing is added by two threads, so the bits do not depend on their number.
#ifndef L2T_CPU_WEIGHT_H
#define L2T_CPU_WEIGHT_H

#include "../math/weight.h"
#include "block.h"
#include "call.h"
#include "pool.h"
#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {

constexpr int64_t kMany = 4 * kTile;  // factors of a product at a time

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
    for (int64_t k = 0; k < rows.groups * c_; k += c_)
      transpose(c_, rank_, right + k * rank_, rank_, column(k, 0), c_);
  }

  // Column s of the V of table row k's group.
  T* column(int64_t k, int64_t s) const { return columns_ + (k / c_ * rank_ + s) * c_; }

  // out[m] = V U[k], and what it was before if wanted, for table rows k[m] of one group; left = U.
  void product(const int64_t (&k)[kTile], const T* left, bool add, T* const (&out)[kTile]) const {
    T packed[kMany][kTile];
    for (int64_t s = 0; s < rank_; s += kMany) {
      const int64_t count = min(kMany, rank_ - s);
      for (int64_t q = 0; q < count; ++q)
        for (int m = 0; m < kTile; ++m) packed[q][m] = left[k[m] * rank_ + s + q];
      products(c_, count, packed, column(k[0], s), c_, add || s > 0, out);
    }
  }

 private:
  int64_t c_, rank_;
  T* columns_;
};

// f(k, out) for the rows of a block that count, a tile of one group at a time; the last row of a tile may stand in it
// more than once. `a` are the rows in `room`.
template <class T, class F>
void each_tile(const Block<T>& block, int64_t c, T* room, int64_t apart, const T* (&a)[kBlockRows], F f) {
  int64_t k[kTile];
  T* out[kTile];
  int filled = 0;
  const auto flush = [&] {
    for (int m = filled; m < kTile && filled > 0; ++m) k[m] = k[filled - 1], out[m] = out[filled - 1];
    if (filled > 0) f(k, out);
    filled = 0;
  };
  block.each_counted([&](int row) {
    if (filled == kTile || (filled > 0 && block.k[row] / c != k[0] / c)) flush();
    k[filled] = block.k[row], out[filled++] = room + row * apart;
    a[row] = room + row * apart;
  });
  flush();
}

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

  // The rows a of a block, in place or multiplied out into `room`, so far `apart`. Only where W is dense.
  void rows(const Block<T>& block, T* room, int64_t apart, const T* (&a)[kBlockRows]) const {
    if (!low_rank) return block.each_counted([&](int row) { a[row] = in_weight + block.k[row] * c; });
    each_tile(block, c, room, apart, a, [&](const int64_t (&k)[kTile], T* const(&out)[kTile]) {
      columns.product(k, in_left, false, out);
    });
    block.each_counted([&](int row) { room[row * apart + block.y[row]] += diagonal(block.k[row]); });
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

  // As those of W. Only where W is dense and moves.
  void rows(const Block<T>& block, T* room, int64_t apart, const T* (&v_a)[kBlockRows]) const {
    const int64_t c = w_.c;
    if (!w_.low_rank) return block.each_counted([&](int row) { v_a[row] = v.weight + block.k[row] * c; });
    each_tile(block, c, room, apart, v_a, [&](const int64_t (&k)[kTile], T* const(&out)[kTile]) {
      if (v.left != nullptr) w_.columns.product(k, v.left, false, out);
      if (v.right != nullptr) columns.product(k, w_.in_left, v.left != nullptr, out);
      if (v.left == nullptr && v.right == nullptr)
        for (T* row : out) fill(c, T(0), row);
    });
    block.each_counted([&](int row) { room[row * apart + block.y[row]] += diagonal(block.k[row]); });
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
                 w.low_rank ? (2 * kMany + w.rank) * kColumns : 0) {}

  void over_classes() const {
    const bool rows_wanted = w_.dense && (out_.weight != nullptr || out_.left != nullptr);
    const bool row_by_row = rows_wanted && !w_.low_rank;
    const int64_t cost = (row_by_row ? call_.c : 1) * (1 + call_.n / call_.table_rows);
    parallel_for(call_.rows.threads, call_.table_rows, cost, [&](int64_t k, int) {
      bias_and_scale(k);
      if (row_by_row)
        row(k, 0, call_.c, out_.weight + k * call_.c, nullptr);
      else if (out_.weight != nullptr)
        out_.weight[k] = w_.dense ? T(0) : diagonal(k);
      for (int64_t s = 0; out_.left != nullptr && s < w_.rank; ++s) out_.left[k * w_.rank + s] = 0;
    });
    if (!rows_wanted || !w_.low_rank) return;
    const int64_t tiles = (by_class_.occurrences() + kTile - 1) / kTile;
    parallel_for(call_.rows.threads, tiles, kTile * w_.cost(), [&](int64_t tile, int lane) {
      diagonal_and_left(tile * kTile, min((tile + 1) * kTile, by_class_.occurrences()), scratch_[lane]);
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
    double d_bias = 0, d_scale = 0;  // a class may have a million rows
    by_class_.each_row(k, [&](int64_t i) {
      d_bias += heads_[i].slope;
      d_scale += heads_[i].d_kappa;
    });
    if (out_.bias != nullptr) out_.bias[k] = static_cast<T>(d_bias);
    if (out_.scale != nullptr) out_.scale[k] = static_cast<T>(d_scale);
  }

  T diagonal(int64_t k) const {
    const int64_t y = k % call_.c;
    double total = 0;
    by_class_.each_row(k, [&](int64_t i) {
      const S* v_z = v_logits(i);
      const T log_p = heads_[i].stats.log_p(widen(call_.logits(i)[y]));
      total += v_z != nullptr ? d_a(heads_[i], log_p, widen(v_z[y])) : d_a(heads_[i], log_p);
    });
    return static_cast<T>(total);
  }

  // e = the gradient to the row a of table row k, classes [begin, begin + width); f = the one of `grad`,
  // where asked for.
  void row(int64_t k, int64_t begin, int64_t width, T* e, T* f) const {
    bool first = true;
    by_class_.each_row(k, [&](int64_t i) {
      const Head<T> head = heads_[i];
      const S *z = call_.logits(i) + begin, *v_z = v_logits(i);
      if (v_z != nullptr) {
        v_z += begin;
        put_or_add<T>(width, e, first, [&](int64_t j, auto which) {
          return d_a(head, head.stats.log_p(which.load(z + j)), which.load(v_z + j));
        });
      } else {
        put_or_add<T>(width, e, first,
                      [&](int64_t j, auto which) { return d_a(head, head.stats.log_p(which.load(z + j))); });
      }
      if (f != nullptr)
        put_or_add<T>(width, f, first, [&](int64_t j, auto which) {
          return first_d_a(head, head.stats.log_p(which.load(z + j)));
        });
      first = false;
    });
    if (!first) return;
    fill(width, T(0), e);
    if (f != nullptr) fill(width, T(0), f);
  }

  // Of the occurring classes [first, last), a tile, which may lie in two groups.
  void diagonal_and_left(int64_t first, int64_t last, T* room) const {
    const int64_t c = call_.c, rank = w_.rank;
    const bool crossed = direction_.v.right != nullptr;
    const T *e[kTile], *f[kTile];
    for (int m = 0; m < kTile; ++m) e[m] = room + m * kColumns, f[m] = room + (kTile + m) * kColumns;
    for (int64_t begin = 0; begin < c; begin += kColumns) {
      const int64_t width = min(kColumns, c - begin);
      for (int64_t at = first; at < last; ++at) {
        const int64_t k = by_class_.occurring(at), y = k % c - begin, m = at - first;
        row(k, begin, width, room + m * kColumns, crossed ? room + (kTile + m) * kColumns : nullptr);
        if (out_.weight != nullptr && 0 <= y && y < width) out_.weight[k] = e[m][y];
      }
      if (out_.left == nullptr) continue;
      for (int64_t from = first, to; from < last; from = to) {
        const int64_t k = by_class_.occurring(from);
        for (to = from + 1; to < last && by_class_.occurring(to) / c == k / c;) ++to;
        for (int64_t s = 0; s < rank; ++s) {
          const auto add = [&](int m, T sum) {
            if (from - first <= m && m < to - first)
              out_.left[by_class_.occurring(first + m) * rank + s] += sum;
          };
          dots(width, e, w_.columns.column(k, s) + begin, add);
          if (crossed) dots(width, f, direction_.columns.column(k, s) + begin, add);
        }
      }
    }
  }

  void right_block(int64_t group, int64_t begin, T* room) const {
    const int64_t c = call_.c, rank = w_.rank, width = min(kColumns, c - begin);
    const bool crossed = direction_.v.left != nullptr;
    T *d_right = room, *e = d_right + rank * kColumns, *f = e + kMany * kColumns;  // [r], [kMany], [kMany]
    fill(rank * kColumns, T(0), d_right);
    int64_t many[kMany], filled = 0;
    const auto flush = [&] {
      for (int64_t s = 0; s < rank; s += kTile) {
        T* out[kTile];
        for (int m = 0; m < kTile; ++m) out[m] = d_right + min(s + m, rank - 1) * kColumns;
        const auto add = [&](const T* left, const T* rows) {
          T packed[kMany][kTile];
          for (int64_t q = 0; q < filled; ++q)
            for (int m = 0; m < kTile; ++m) packed[q][m] = left[many[q] * rank + min(s + m, rank - 1)];
          products(width, filled, packed, rows, kColumns, true, out);
        };
        add(w_.in_left, e);
        if (crossed) add(direction_.v.left, f);
      }
      filled = 0;
    };
    by_class_.each_occurring(group * c, (group + 1) * c, [&](int64_t k) {
      row(k, begin, width, e + filled * kColumns, crossed ? f + filled * kColumns : nullptr);
      many[filled++] = k;
      if (filled == kMany) flush();
    });
    flush();
    T* out = out_.right + (group * c + begin) * rank;
    transpose(rank, width, d_right, kColumns, out, rank);
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
