// A block of rows: what the walks know of each of a few rows that are taken together, so that the head of math/row.h
// is computed for as many rows at a time as a vector has lanes.
#ifndef L2T_CPU_BLOCK_H
#define L2T_CPU_BLOCK_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

constexpr int kBlockRows = 16;

// A number a row.
template <class T>
struct Column {
  alignas(64) T of[kBlockRows] = {};

  T& operator[](int row) { return of[row]; }
  const T& operator[](int row) const { return of[row]; }
  Vec<T> from(int row) const { return Whole<1>().load(of + row); }
  void put(int row, const Vec<T>& x) { Whole<1>().store(of + row, x); }
};

template <class T>
struct Block;

// The heads of the rows from `row` of the block on, as far as it goes.
template <class T>
void put_heads(const Head<Vec<T>>& head, const Block<T>& block, int row, Head<T>* heads) {
  for (int lane = 0; lane < Vec<T>::lanes && row + lane < block.rows; ++lane)
    heads[block.first + row + lane] = {{head.stats.max[lane], head.stats.log_sum[lane], head.stats.u[lane]},
                                       head.slope[lane],
                                       head.d_kappa[lane],
                                       head.pull[lane],
                                       head.pv[lane],
                                       head.d_go[lane]};
}

template <class T>
struct Block {
  int64_t first;  // row of the call
  int rows;
  int64_t k[kBlockRows], y[kBlockRows];  // table row and class; y = -1 where the row is ignored
  Column<T> beta, kappa, go;
  Column<T> max, log_sum, u;
  Column<T> R, slope;

  template <class S>
  Block(const Call<T, S>& call, const T* v_loss, int64_t first, int64_t rows)
      : first(first), rows(static_cast<int>(rows)) {
    for (int row = 0; row < kBlockRows; ++row) {
      const int64_t i = first + (row < rows ? row : 0), target = call.rows.target[i];
      const bool ignored = call.ignored(i);
      k[row] = ignored ? 0 : target;
      y[row] = ignored ? -1 : call.class_of(target);
      beta[row] = call.beta(k[row]);
      kappa[row] = call.kappa(k[row]);
      go[row] = call.of_loss(v_loss, i, T(1));
    }
  }

  template <class F>
  void each_counted(F f) const {
    for (int row = 0; row < rows; ++row)
      if (y[row] >= 0) f(row);
  }

  Stats<Vec<T>> stats(int row) const { return {max.from(row), log_sum.from(row), u.from(row)}; }
  void load_stats(const T* from) {
    for (int row = 0; row < rows; ++row) {
      const T* stats = from + 3 * (first + row);
      max[row] = stats[0], log_sum[row] = stats[1], u[row] = stats[2];
    }
  }
  void store_stats(T* to) const {
    for (int row = 0; row < rows; ++row) {
      T* stats = to + 3 * (first + row);
      const bool counts = y[row] >= 0;
      stats[0] = counts ? max[row] : 0, stats[1] = counts ? log_sum[row] : 0, stats[2] = counts ? u[row] : 0;
    }
  }
};

}  // namespace L2T_ISA
}  // namespace l2t
#endif
