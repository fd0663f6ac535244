// One call of the waist as the CPU kernels read it: typed pointers, what belongs to a row, which rows belong
// to a class, and memory for the time of the call. No arithmetic.
#ifndef L2T_CPU_CALL_H
#define L2T_CPU_CALL_H

#include <algorithm>
#include <memory>
#include <vector>

#include "../l2t.h"
#include "../math/row.h"

namespace l2t {

// l2t_tensors (P = const T*) or l2t_outputs (P = T*).
template <class P>
struct Tensors {
  P v_loss, logits, weight, left, right, bias, scale;

  template <class Untyped>
  explicit Tensors(const Untyped& t)
      : v_loss(static_cast<P>(t.v_loss)),
        logits(static_cast<P>(t.logits)),
        weight(static_cast<P>(t.weight)),
        left(static_cast<P>(t.left)),
        right(static_cast<P>(t.right)),
        bias(static_cast<P>(t.bias)),
        scale(static_cast<P>(t.scale)) {}
};

template <class T>
using Inputs = Tensors<const T*>;
template <class T>
using Outputs = Tensors<T*>;

// Entry k of a coefficient table that may be absent.
template <class T>
T at(const T* table, int64_t k, T absent) {
  return table != nullptr ? table[k] : absent;
}

template <class T>
struct Call {
  const l2t_rows& rows;
  const Inputs<T> in;
  const l2t_link link;
  const int64_t n, c, table_rows;

  Call(const l2t_rows& rows, const l2t_tensors& inputs)
      : rows(rows),
        in(inputs),
        link(static_cast<l2t_link>(rows.link)),
        n(rows.n),
        c(rows.c),
        table_rows(rows.groups * rows.c) {}

  bool ignored(int64_t i) const { return rows.target[i] == rows.ignore_index; }
  const T* logits(int64_t i) const { return in.logits + i * rows.logits_stride; }
  T beta(int64_t k) const { return at(in.bias, k, T(0)); }
  T kappa(int64_t k) const { return at(in.scale, k, T(1)); }
};

template <class T>
Stats<T> load_stats(const T* stats, int64_t i) {
  return {stats[3 * i], stats[3 * i + 1], stats[3 * i + 2]};
}

template <class T>
void store_stats(T* stats, int64_t i, const Stats<T>& s) {
  stats[3 * i] = s.max;
  stats[3 * i + 1] = s.log_sum;
  stats[3 * i + 2] = s.u;
}

// Room for `each` numbers on every lane that a loop over `count` items can have; not initialised.
template <class T>
class Scratch {
 public:
  Scratch(const l2t_rows& rows, int64_t count, int64_t each)
      : each_(each), memory_(new T[std::min<int64_t>(rows.threads, std::max<int64_t>(count, 1)) * each]) {}
  T* operator[](int64_t lane) const { return memory_.get() + lane * each_; }

 private:
  int64_t each_;
  std::unique_ptr<T[]> memory_;
};

// The rows of each table row, each list in ascending order (a counting sort): what a walk over classes runs
// along.
class RowsByClass {
 public:
  explicit RowsByClass(const l2t_rows& rows) : start_(rows.groups * rows.c + 2, 0) {
    const auto counts = [&](int64_t i) { return rows.target[i] != rows.ignore_index; };
    for (int64_t i = 0; i < rows.n; ++i)
      if (counts(i)) ++start_[rows.target[i] + 2];
    for (size_t k = 2; k < start_.size(); ++k) start_[k] += start_[k - 1];
    row_.resize(start_.back());
    for (int64_t i = 0; i < rows.n; ++i)
      if (counts(i)) row_[start_[rows.target[i] + 1]++] = i;
    for (int64_t k = 0; k < rows.groups * rows.c; ++k)
      if (occurs(k)) occurring_.push_back(k);
  }

  bool occurs(int64_t k) const { return start_[k] < start_[k + 1]; }

  template <class F>
  void each_row(int64_t k, const F& f) const {
    for (int64_t at = start_[k]; at < start_[k + 1]; ++at) f(row_[at]);
  }

  // Those of [begin, end) that have rows, in order.
  template <class F>
  void each_occurring(int64_t begin, int64_t end, const F& f) const {
    auto k = std::lower_bound(occurring_.begin(), occurring_.end(), begin);
    for (; k != occurring_.end() && *k < end; ++k) f(*k);
  }

 private:
  std::vector<int64_t> start_, row_, occurring_;
};

}  // namespace l2t
#endif
