// The four ops on CUDA: value, grad, grad_vjp, grad_jvp, as sequences of kernels on the caller's stream. Here are
// the order of the steps, the workspace, and the reduction of the rows' numbers to the losses.
//
// Deliberately not here: the walks over rows (first_order.cu, second_order.cu) and over classes (classes.cu).
#include "../l2t.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "../dispatch.h"
#include "../status.h"
#include "classes.h"
#include "first_order.h"
#include "second_order.h"
#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {
namespace {

constexpr int kThreads = 256;

// ---- sums over the rows of each loss ----
//
// A warp adds up kRowsOfAWarp numbers, in double; where a loss has more, the sums are added up again. The order
// depends on N / L alone.

constexpr int64_t kRowsOfAWarp = 1024;

template <class T>
struct RowNumbers {
  const T* of;
  L2T_DEVICE double operator()(int64_t i) const { return of[i]; }
};

struct RowsThatCount {
  const int64_t* target;
  int64_t ignore_index;
  L2T_DEVICE double operator()(int64_t i) const { return target[i] != ignore_index; }
};

struct ToPartialSums {
  double* to;
  L2T_DEVICE void operator()(int64_t at, double sum) const { to[at] = sum; }
};

// Divided by the count for a mean.
template <class T>
struct ToLosses {
  T* to;
  const double* count;
  L2T_DEVICE void operator()(int64_t loss, double sum) const {
    to[loss] = static_cast<T>(count != nullptr ? sum / count[loss] : sum);
  }
};

template <class T>
struct ToCounts {
  double* count;
  T* inverse_count;
  L2T_DEVICE void operator()(int64_t loss, double sum) const {
    count[loss] = sum;
    inverse_count[loss] = 1 / static_cast<T>(sum);
  }
};

template <class From, class To>
__global__ void add_up_rows(From from, To to, int64_t losses, int64_t of_a_loss, int64_t warps_of_a_loss) {
  const int64_t warp = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t loss = warp / warps_of_a_loss, begin = warp % warps_of_a_loss * kRowsOfAWarp;
  if (loss >= losses) return;
  const int64_t end = begin + kRowsOfAWarp < of_a_loss ? begin + kRowsOfAWarp : of_a_loss;
  const Team team(32);
  double sum[1] = {0};
  for (int64_t i = begin + team.lane; i < end; i += 32) sum[0] += from(loss * of_a_loss + i);
  team.sum(sum);
  if (team.leads()) to(warp, sum[0]);
}

int64_t warps_for(int64_t of_a_loss) {
  return of_a_loss > 0 ? (of_a_loss + kRowsOfAWarp - 1) / kRowsOfAWarp : 1;  // of nothing, 0
}

template <class From, class To>
l2t_status reduce(const From& from, const To& to, int64_t losses, int64_t of_a_loss, double* const (&room)[2],
                  void* stream) {
  const int64_t warps = warps_for(of_a_loss);
  const unsigned blocks = blocks_for(losses * warps * 32, kThreads);
  if (warps == 1)
    return launch(add_up_rows<From, To>, blocks, kThreads, 0, stream, from, to, losses, of_a_loss, warps);
  L2T_STEP(launch(add_up_rows<From, ToPartialSums>, blocks, kThreads, 0, stream, from, ToPartialSums{room[0]},
                  losses, of_a_loss, warps));
  return reduce(RowNumbers<double>{room[0]}, to, losses, warps, {room[1], room[0]}, stream);
}

// ---- the gradient that value has made, times the cotangents of the losses ----

constexpr int kScaledByAThread = 8;

template <class T, class S>
__global__ void scale_rows(const T* v_loss, S* d_logits, int64_t count, int64_t of_a_loss) {
  const int64_t begin = int64_t(blockIdx.x) * kThreads * kScaledByAThread + threadIdx.x;
  for (int e = 0; e < kScaledByAThread; ++e) {
    const int64_t at = begin + int64_t(e) * kThreads;
    if (at >= count) return;
    const T factor = v_loss[at / of_a_loss];
    if (factor == 1) continue;
    const T x = widen(d_logits[at]);
    if (x != 0) narrow(factor * x, d_logits[at]);  // rows that are ignored have zeros, whatever the factor
  }
}

// ---- the steps of a call ----

template <class T>
struct Workspace {
  Memory memory;
  T* row_numbers;      // [N] losses, or what d_v_loss is made of
  double* partial[2];  // of the losses
  double* count;       // [L] rows that count
  T* inverse_count;    // [L]
  Head<T>* heads;      // [N]
  ClassMemory<T> classes;

  Workspace(const l2t_rows& rows, void* base)
      : memory(base),
        row_numbers(memory.take<T>(rows.n)),
        partial{memory.take<double>(partial_sums(rows)), memory.take<double>(partial_sums(rows))},
        count(memory.take<double>(rows.losses)),
        inverse_count(memory.take<T>(rows.losses)),
        heads(memory.take<Head<T>>(rows.n)),
        classes(rows, memory) {}

  static int64_t partial_sums(const l2t_rows& rows) {
    return rows.losses > 0 ? rows.losses * warps_for(rows.n / rows.losses) : 0;
  }
};

template <class T, class S>
class Op {
 public:
  Op(const l2t_rows& rows, const l2t_tensors& inputs, void* workspace, void* stream)
      : rows_(rows),
        work_(rows, workspace),
        call_(rows, inputs, rows.mean != 0 ? work_.inverse_count : nullptr),
        stream_(stream) {}

  l2t_status value(T* loss, T* stats, S* d_logits) const {
    L2T_STEP(count());
    T* const row_losses = reduced() ? work_.row_numbers : loss;
    L2T_STEP(first_order(call_, FirstOrder<T, S>{nullptr, row_losses, stats, d_logits}, stream_));
    return reduce_to(loss);
  }

  // d_logits last: it may overwrite the logits.
  l2t_status grad(const T* stats, const Outputs<T, S>& out) const {
    L2T_STEP(count());
    if (wants_coefficients(out)) {
      L2T_STEP(grad_heads(call_, stats, work_.heads, stream_));
      L2T_STEP(coefficient_gradients(call_, Inputs<T, S>(l2t_tensors{}), work_.heads, out, rows_.atomics != 0,
                                     work_.classes, stream_));
    }
    if (out.logits == nullptr) return L2T_OK;
    return first_order(call_, FirstOrder<T, S>{stats, nullptr, nullptr, out.logits}, stream_);
  }

  l2t_status second_order(const T* stats, const Inputs<T, S>& direction, const Outputs<T, S>& out) const {
    L2T_STEP(count());
    T* const d_go = out.v_loss == nullptr ? nullptr : reduced() ? work_.row_numbers : out.v_loss;
    // What is still to be read is not written over: then the rows are walked twice.
    const bool last = wants_coefficients(out) && out.logits == call_.in.logits;
    const SecondOrder<T, S> io{direction, stats, work_.heads, d_go, last ? nullptr : out.logits};
    L2T_STEP(l2t::second_order(call_, io, stream_));
    if (out.v_loss != nullptr) L2T_STEP(reduce_to(out.v_loss));
    if (!wants_coefficients(out)) return L2T_OK;
    L2T_STEP(coefficient_gradients(call_, direction, work_.heads, out, rows_.atomics != 0, work_.classes,
                                   stream_));
    if (!last) return L2T_OK;
    return l2t::second_order(call_, SecondOrder<T, S>{direction, stats, nullptr, nullptr, out.logits},
                             stream_);
  }

 private:
  bool reduced() const { return rows_.mean != 0 || rows_.losses != rows_.n; }

  static bool wants_coefficients(const Outputs<T, S>& out) {
    return out.weight || out.left || out.right || out.bias || out.scale;
  }

  l2t_status count() const {
    if (rows_.mean == 0 || rows_.losses == 0) return L2T_OK;
    return reduce(RowsThatCount{rows_.target, rows_.ignore_index},
                  ToCounts<T>{work_.count, work_.inverse_count}, rows_.losses, rows_.n / rows_.losses,
                  work_.partial, stream_);
  }

  l2t_status reduce_to(T* out) const {
    if (!reduced() || rows_.losses == 0) return L2T_OK;
    return reduce(RowNumbers<T>{work_.row_numbers}, ToLosses<T>{out, rows_.mean != 0 ? work_.count : nullptr},
                  rows_.losses, rows_.n / rows_.losses, work_.partial, stream_);
  }

  const l2t_rows& rows_;
  const Workspace<T> work_;
  const Call<T, S> call_;
  void* const stream_;
};

// ---- the waist ----

bool fits_32_bits(const l2t_rows& rows) {
  if (rows.n < 0 || rows.c < 1 || rows.groups < 1 || rows.rank < 0 || rows.losses < 0) return false;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  return rows.n <= kMost && rows.c <= kMost && rows.rank <= kMost && rows.groups <= kMost / rows.c;
}

// Checks, then f(Op) for the call's dtype. `needed`: what the op cannot do without where there are rows.
template <class F>
l2t_status guarded(const l2t_rows& rows, const l2t_tensors& inputs, std::initializer_list<const void*> needed,
                   void* workspace, void* stream, const F& f) {
  L2T_STEP(check(rows, inputs));
  if (!fits_32_bits(rows)) return L2T_BAD_SIZE;
  if (workspace == nullptr) return L2T_MISSING_ROWS;
  if (rows.n > 0 && std::find(needed.begin(), needed.end(), nullptr) != needed.end()) return L2T_MISSING_ROWS;
  return dispatch(rows.dtype, [&](auto number, auto stored) {
    using T = decltype(number);
    using S = decltype(stored);
    return f(Op<T, S>(rows, inputs, workspace, stream), T{}, S{});
  });
}

}  // namespace
}  // namespace L2T_ISA
}  // namespace l2t

int64_t l2t_cuda_workspace(const l2t_rows* rows) {
  if (!l2t::fits_32_bits(*rows)) return 0;  // the ops will refuse it
  if (rows->dtype == L2T_FLOAT64) return l2t::Workspace<double>(*rows, nullptr).memory.used();
  return l2t::Workspace<float>(*rows, nullptr).memory.used();
}

l2t_status l2t_cuda_value(const l2t_rows* rows, const l2t_tensors* inputs, void* loss, void* stats,
                          void* d_logits, void* workspace, void* stream) {
  l2t_tensors without_v_loss = *inputs;
  without_v_loss.v_loss = nullptr;
  return l2t::guarded(
      *rows, without_v_loss, {loss, stats}, workspace, stream, [&](const auto& op, auto number, auto stored) {
        using T = decltype(number);
        using S = decltype(stored);
        return op.value(static_cast<T*>(loss), static_cast<T*>(stats), static_cast<S*>(d_logits));
      });
}

l2t_status l2t_cuda_grad(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                         const l2t_outputs* outputs, void* workspace, void* stream) {
  if (l2t::stray_factors(*rows, *outputs)) return L2T_STRAY_FACTORS;
  return l2t::guarded(*rows, *inputs, {stats}, workspace, stream,
                      [&](const auto& op, auto number, auto stored) {
                        using T = decltype(number);
                        using S = decltype(stored);
                        return op.grad(static_cast<const T*>(stats), l2t::Outputs<T, S>(*outputs));
                      });
}

l2t_status l2t_cuda_grad_vjp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                             const l2t_tensors* cotangents, const l2t_outputs* outputs, void* workspace,
                             void* stream) {
  if (l2t::stray_factors(*rows, *cotangents) || l2t::stray_factors(*rows, *outputs)) return L2T_STRAY_FACTORS;
  return l2t::guarded(*rows, *inputs, {stats}, workspace, stream,
                      [&](const auto& op, auto number, auto stored) {
                        using T = decltype(number);
                        using S = decltype(stored);
                        return op.second_order(static_cast<const T*>(stats), l2t::Inputs<T, S>(*cotangents),
                                               l2t::Outputs<T, S>(*outputs));
                      });
}

l2t_status l2t_cuda_grad_jvp(const l2t_rows* rows, const l2t_tensors* inputs, const void* stats,
                             const l2t_tensors* tangents, const l2t_outputs* outputs, void* workspace,
                             void* stream) {
  return l2t_cuda_grad_vjp(rows, inputs, stats, tangents, outputs, workspace, stream);
}

l2t_status l2t_cuda_scale(const l2t_rows* rows, const void* v_loss, void* d_logits, void* stream) {
  if (rows->dtype < L2T_FLOAT32 || rows->dtype > L2T_FLOAT16) return L2T_BAD_DTYPE;
  if (rows->n < 0 || rows->c < 1) return L2T_BAD_SIZE;
  const int64_t count = rows->n * rows->c;
  if (count == 0) return L2T_OK;
  if (rows->losses < 1 || rows->n % rows->losses != 0) return L2T_BAD_LOSSES;
  if (v_loss == nullptr || d_logits == nullptr) return L2T_MISSING_ROWS;
  return l2t::dispatch(rows->dtype, [&](auto number, auto stored) {
    using T = decltype(number);
    using S = decltype(stored);
    return l2t::launch(l2t::scale_rows<T, S>, l2t::blocks_for(count, l2t::kThreads * l2t::kScaledByAThread),
                       l2t::kThreads, 0, stream, static_cast<const T*>(v_loss), static_cast<S*>(d_logits),
                       count, count / rows->losses);
  });
}

int l2t_cuda_devices(void) {
  int count = 0;
  return l2t::status_of(cudaGetDeviceCount(&count)) == L2T_OK ? count : 0;
}

const char* l2t_cuda_error(void) { return l2t::cuda_error(); }
