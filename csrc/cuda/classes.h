// The gradients to the coefficients, from the heads of the rows (first_order.h, second_order.h), as launches: sums over the rows of each
// class, of each group for V.
#ifndef L2T_CUDA_CLASSES_H
#define L2T_CUDA_CLASSES_H

#include "call.h"

namespace l2t {
inline namespace L2T_ISA {

// Their part of the workspace.
template <class T>
struct ClassMemory {
  // Rows by class: a stable counting sort in chunks of rows.
  int chunk_rows, chunks;
  int* counts;      // [chunks, K]; then those of earlier chunks
  int* rank;        // [N] among the rows of the class and chunk
  int* totals;      // [K]
  int* start;       // [K + 1]
  int* order;       // [N], rows by class, ascending within
  int* table_row;   // [N], that of order[position]
  T* left_terms;    // [N, r]
  T* partial_sums;  // 2 a part and column (classes.cu)

  ClassMemory(const l2t_rows& rows, Memory& memory);
};

// The gradients of grad where `direction` is all null, else their derivative along it.
template <class T, class S>
l2t_status coefficient_gradients(const Call<T, S>&, const Inputs<T, S>& direction, const Head<T>* heads,
                                 const Outputs<T, S>&, bool atomics, const ClassMemory<T>&, void* stream);

}  // namespace L2T_ISA
}  // namespace l2t
#endif
