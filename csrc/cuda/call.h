// One call of the waist as the CUDA kernels read it: typed pointers by value, what belongs to a row, and the
// layout of the workspace. No arithmetic but that of a mean's 1 / count.
//
// Rows, classes and table rows are counted in 32 bits (status: L2T_BAD_SIZE beyond), elements in 64.
#ifndef L2T_CUDA_CALL_H
#define L2T_CUDA_CALL_H

#include "../math/row.h"
#include "../tensors.h"
#include "launch.h"

namespace l2t {
inline namespace L2T_ISA {

// The steps of a call: the first failure ends it.
#define L2T_STEP(status)                           \
  do {                                             \
    const l2t_status step_status = (status);       \
    if (step_status != L2T_OK) return step_status; \
  } while (false)

L2T_FN bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// What stands in place of a table row where a row has none.
constexpr int kIgnored = -1, kOutOfRange = -2;

template <class T, class S>
struct Call {
  Inputs<T, S> in;
  l2t_link link;
  bool full, low_rank;
  int n, c, rank, table_rows, rows_of_a_loss;
  int64_t ignore_index, logits_stride;
  const int64_t* target;
  const T* inverse_count;  // [L], 1 / (rows that count); null without mean

  Call(const l2t_rows& rows, const l2t_tensors& inputs, const T* inverse_count)
      : in(inputs),
        link(static_cast<l2t_link>(rows.link)),
        full(rows.structure == L2T_FULL),
        low_rank(rows.rank > 0),
        n(static_cast<int>(rows.n)),
        c(static_cast<int>(rows.c)),
        rank(static_cast<int>(rows.rank)),
        table_rows(static_cast<int>(rows.groups * rows.c)),
        rows_of_a_loss(rows.n > 0 ? static_cast<int>(rows.n / rows.losses) : 1),
        ignore_index(rows.ignore_index),
        logits_stride(rows.logits_stride),
        target(rows.target),
        inverse_count(inverse_count) {}

  bool dense() const { return full || low_rank; }

  // Whether rows of the inputs start at multiples of 16 bytes, whole packs of which make them up.
  bool wide() const {
    constexpr int kPack = 16 / sizeof(S);
    return c % kPack == 0 && logits_stride % kPack == 0 && aligned(in.logits) &&
           (!full || aligned(in.weight));
  }

  L2T_DEVICE int table_row(int64_t i) const {
    const int64_t k = target[i];
    if (k == ignore_index) return kIgnored;
    return k >= 0 && k < table_rows ? static_cast<int>(k) : kOutOfRange;
  }
  L2T_DEVICE int class_of(int k) const { return static_cast<int>(unsigned(k) % unsigned(c)); }
  L2T_DEVICE const S* logits(int64_t i) const { return in.logits + i * logits_stride; }
  L2T_DEVICE T beta(int k) const { return at(in.bias, k, T(0)); }
  L2T_DEVICE T kappa(int k) const { return at(in.scale, k, T(1)); }

  // What row i gets of a cotangent or tangent of the losses.
  L2T_DEVICE T of_loss(const T* v_loss, int64_t i, T absent) const {
    const unsigned loss = unsigned(i) / unsigned(rows_of_a_loss);
    return at(v_loss, loss, absent) * at(inverse_count, loss, T(1));
  }
};

template <class T>
L2T_DEVICE Stats<T> load_stats(const T* stats, int64_t i) {
  const T* of_row = stats + 3 * i;
  return {of_row[0], of_row[1], of_row[2]};
}

template <class T>
L2T_DEVICE void store_stats(T* stats, int64_t i, const Stats<T>& s) {
  T* of_row = stats + 3 * i;
  of_row[0] = s.max, of_row[1] = s.log_sum, of_row[2] = s.u;
}

// Pieces of the workspace, one after another; from a null base, their size.
class Memory {
 public:
  explicit Memory(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t begin = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return base_ != nullptr ? reinterpret_cast<T*>(base_ + begin) : nullptr;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace L2T_ISA
}  // namespace l2t
#endif
