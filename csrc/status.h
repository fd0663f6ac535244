// What a call can come to: the checks made before any work, and one sentence for each refusal.
//
// These are the core's own defence (a wrong call never reads or writes where it should not); the sentences
// that a user of the Python library meets, with shapes and dtypes, are in l2t/check.py. Deliberately not
// here: printing, abort, exit.
#ifndef L2T_STATUS_H
#define L2T_STATUS_H

#include "l2t.h"

namespace l2t {

// Of the binding: %s is the argument.
constexpr const char* kMisfit =
    "l2t core: %s does not fit the other arguments in shape, dtype, device or contiguity.";
constexpr const char* kNoExchange = "l2t core: this PyTorch does not have DLPack's C exchange API; 2.11 has.";

inline const char* sentence(l2t_status status) {
  switch (status) {
    case L2T_OK:
      return "l2t core: no error.";
    case L2T_BAD_DTYPE:
      return "l2t core: dtype must be 0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16).";
    case L2T_BAD_LINK:
      return "l2t core: link must be 0 (sigmoid), 1 (identity) or 2 (log-sigmoid).";
    case L2T_BAD_STRUCTURE:
      return "l2t core: structure must be 0 (full), 1 (diagonal) or 2 (low rank).";
    case L2T_BAD_SIZE:
      return "l2t core: n and rank must be at least 0, c and groups at least 1; with CUDA n, rank and groups "
             "* c "
             "below 2^31.";
    case L2T_BAD_LOSSES:
      return "l2t core: losses must divide n.";
    case L2T_BAD_THREADS:
      return "l2t core: threads must be at least 1.";
    case L2T_BAD_TARGET:
      return "l2t core: every target must be ignore_index or lie in [0, groups * c).";
    case L2T_MISSING_ROWS:
      return "l2t core: logits, target, stats and loss must not be null where there are rows; nor a CUDA "
             "call's workspace.";
    case L2T_MISSING_WEIGHT:
      return "l2t core: a full weight must not be null; the identity is the diagonal structure's null.";
    case L2T_MISSING_FACTORS:
      return "l2t core: left and right must not be null for a low-rank weight of rank 1 or more.";
    case L2T_STRAY_FACTORS:
      return "l2t core: left and right must be null, and rank 0, unless the structure is low rank.";
    case L2T_OUT_OF_MEMORY:
      return "l2t core: there is not enough memory for the scratch rows; use fewer threads.";
    case L2T_CUDA_FAILED:
      return "l2t core: a CUDA call failed; l2t_cuda_error() says of what.";
  }
  return "l2t core: unknown status.";
}

// Inputs, directions or outputs for factors that the structure does not have.
template <class Tensors>
bool stray_factors(const l2t_rows& rows, const Tensors& tensors) {
  return rows.structure != L2T_LOW_RANK && (tensors.left != nullptr || tensors.right != nullptr);
}

// What all ops have in common, on every device: all but the targets, which may be on the device.
inline l2t_status check(const l2t_rows& rows, const l2t_tensors& in) {
  if (rows.dtype < L2T_FLOAT32 || rows.dtype > L2T_FLOAT16) return L2T_BAD_DTYPE;
  if (rows.link < L2T_SIGMOID || rows.link > L2T_LOG_SIGMOID) return L2T_BAD_LINK;
  if (rows.structure < L2T_FULL || rows.structure > L2T_LOW_RANK) return L2T_BAD_STRUCTURE;
  if (rows.n < 0 || rows.c < 1 || rows.groups < 1 || rows.rank < 0) return L2T_BAD_SIZE;
  if (rows.losses == 0 ? rows.n != 0 : rows.losses < 0 || rows.n % rows.losses != 0) return L2T_BAD_LOSSES;
  if (rows.n > 0 && (in.logits == nullptr || rows.target == nullptr)) return L2T_MISSING_ROWS;
  if (rows.structure == L2T_FULL && in.weight == nullptr) return L2T_MISSING_WEIGHT;
  if (rows.structure == L2T_LOW_RANK) {
    if (rows.rank > 0 && (in.left == nullptr || in.right == nullptr)) return L2T_MISSING_FACTORS;
  }
  if (stray_factors(rows, in) || (rows.structure != L2T_LOW_RANK && rows.rank != 0)) return L2T_STRAY_FACTORS;
  return L2T_OK;
}

}  // namespace l2t
#endif
