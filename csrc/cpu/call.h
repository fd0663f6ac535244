// One call of the waist as the CPU kernels read it: typed pointers, what belongs to a row, memory for the time
// of the call, and which rows belong to a class. No arithmetic but that of a mean's 1 / count.
//
// All of it is compiled once per instruction set, so nothing of the standard library is used here that the
// compiler might emit as a function of its own.
#ifndef L2T_CPU_CALL_H
#define L2T_CPU_CALL_H

#include <cstdlib>

#include "../l2t.h"
#include "../math/row.h"
#include "../tensors.h"
#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {

// Scratch memory, given back at the end of the call: the first of it without asking the system, so that a
// small call allocates nothing. Not initialised. Look at `failed` before the first use.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    while (blocks_ != nullptr) {
      Block* next = blocks_->next;
      std::free(blocks_);
      blocks_ = next;
    }
  }

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count > kMost ? kMost : count * static_cast<int64_t>(sizeof(T))));
  }

  bool failed() const { return failed_; }

 private:
  static constexpr int64_t kLine = 64, kNear = 16384, kMost = int64_t(1) << 56;
  struct alignas(kLine) Block {
    Block* next;
  };

  void* bytes(int64_t size) {
    size = (size + kLine - 1) / kLine * kLine;
    if (size <= kNear - used_) {
      used_ += size;
      return near_ + used_ - size;
    }
    auto* block = static_cast<Block*>(std::aligned_alloc(kLine, sizeof(Block) + size));
    if (block == nullptr) {
      failed_ = true;
      return nullptr;
    }
    block->next = blocks_;
    blocks_ = block;
    return block + 1;
  }

  alignas(kLine) char near_[kNear];
  int64_t used_ = 0;
  Block* blocks_ = nullptr;
  bool failed_ = false;
};

template <class T, class S>
struct Call {
  const l2t_rows& rows;
  const Inputs<T, S> in;
  const l2t_link link;
  const int64_t n, c, table_rows;
  const bool reduced;            // losses are sums or means of rows
  const int64_t rows_of_a_loss;  // at least 1
  const T* inverse_count;        // [L], 1 / (rows that count); null without mean

  Call(const l2t_rows& rows, const l2t_tensors& inputs, Memory& memory)
      : rows(rows),
        in(inputs),
        link(static_cast<l2t_link>(rows.link)),
        n(rows.n),
        c(rows.c),
        table_rows(rows.groups * rows.c),
        reduced(rows.mean != 0 || rows.losses != rows.n),
        rows_of_a_loss(rows.losses > 0 ? max(rows.n / rows.losses, 1) : 1),
        inverse_count(rows.mean != 0 ? inverse_counts(memory) : nullptr) {}

  bool ignored(int64_t i) const { return rows.target[i] == rows.ignore_index; }
  const S* logits(int64_t i) const { return in.logits + i * rows.logits_stride; }
  int64_t class_of(int64_t k) const { return rows.groups == 1 ? k : k % c; }
  T beta(int64_t k) const { return at(in.bias, k, T(0)); }
  T kappa(int64_t k) const { return at(in.scale, k, T(1)); }

  // What row i gets of a cotangent or tangent of the losses.
  T of_loss(const T* v_loss, int64_t i, T absent) const {
    const int64_t loss = !reduced ? i : rows.losses == 1 ? 0 : i / rows_of_a_loss;
    return at(v_loss, loss, absent) * at(inverse_count, loss, T(1));
  }

  // The losses of the rows' numbers x [N], added in the rows' order, whoever made them.
  void reduce(const T* x, T* out) const {
    for (int64_t loss = 0; loss < rows.losses; ++loss) {
      double sum = 0;
      for (int64_t i = loss * rows_of_a_loss; i < min((loss + 1) * rows_of_a_loss, n); ++i) sum += x[i];
      if (rows.mean != 0) sum /= static_cast<double>(count(loss));
      out[loss] = static_cast<T>(sum);
    }
  }

 private:
  int64_t count(int64_t loss) const {
    int64_t counted = 0;
    for (int64_t i = loss * rows_of_a_loss; i < min((loss + 1) * rows_of_a_loss, n); ++i)
      counted += !ignored(i);
    return counted;
  }

  const T* inverse_counts(Memory& memory) const {
    T* inverse = memory.take<T>(rows.losses);
    if (memory.failed()) return nullptr;
    for (int64_t loss = 0; loss < rows.losses; ++loss) inverse[loss] = 1 / static_cast<T>(count(loss));
    return inverse;
  }
};

// Room for `each` numbers on every lane that a loop over `count` items can have.
template <class T>
class Scratch {
 public:
  Scratch(Memory& memory, const l2t_rows& rows, int64_t count, int64_t each)
      : each_(up_to_multiple(each, 64 / sizeof(T))),
        first_(memory.take<T>(min(rows.threads, max(count, 1)) * each_)) {}
  T* operator[](int64_t lane) const { return first_ + lane * each_; }

 private:
  int64_t each_;
  T* first_;
};

// The rows of each table row, each list in ascending order (a counting sort): what a walk over classes runs
// along.
class RowsByClass {
 public:
  RowsByClass(const l2t_rows& rows, Memory& memory)
      : start_(memory.take<int64_t>(rows.groups * rows.c + 2)),
        row_(memory.take<int64_t>(rows.n)),
        occurring_(memory.take<int64_t>(min(rows.groups * rows.c, rows.n))) {
    if (memory.failed()) return;
    const int64_t table_rows = rows.groups * rows.c;
    const auto counts = [&](int64_t i) { return rows.target[i] != rows.ignore_index; };
    for (int64_t k = 0; k < table_rows + 2; ++k) start_[k] = 0;
    for (int64_t i = 0; i < rows.n; ++i)
      if (counts(i)) ++start_[rows.target[i] + 2];
    for (int64_t k = 2; k < table_rows + 2; ++k) start_[k] += start_[k - 1];
    for (int64_t i = 0; i < rows.n; ++i)
      if (counts(i)) row_[start_[rows.target[i] + 1]++] = i;
    for (int64_t k = 0; k < table_rows; ++k)
      if (occurs(k)) occurring_[occurrences_++] = k;
  }

  bool occurs(int64_t k) const { return start_[k] < start_[k + 1]; }
  // The table rows that have rows, in order.
  int64_t occurrences() const { return occurrences_; }
  int64_t occurring(int64_t at) const { return occurring_[at]; }

  template <class F>
  void each_row(int64_t k, const F& f) const {
    for (int64_t at = start_[k]; at < start_[k + 1]; ++at) f(row_[at]);
  }

  // Those of [begin, end) that have rows, in order.
  template <class F>
  void each_occurring(int64_t begin, int64_t end, const F& f) const {
    int64_t first = 0, last = occurrences_;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (occurring_[middle] < begin)
        first = middle + 1;
      else
        last = middle;
    }
    for (; first < occurrences_ && occurring_[first] < end; ++first) f(occurring_[first]);
  }

 private:
  int64_t *start_, *row_, *occurring_;
  int64_t occurrences_ = 0;
};

}  // namespace L2T_ISA
}  // namespace l2t
#endif
