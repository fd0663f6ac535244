// The ops on the CPU: value, grad, and one for grad_vjp and grad_jvp. Here are the walks over rows (loss, stats,
// d_logits, d_v_loss: each row by itself); the gradients to the coefficients are in weight.h. A row that is
// ignored is never read.
//
// The formulas are those of math/row.h, in its three moves: sums over classes of each row of a block, the heads of
// a block together, one expression an output. The gradient to the logits may be written over the logits: what
// needs them comes before, in the row and in the call. `value` reads a long row once, in pieces. Deliberately not here: arithmetic (math/), loops over
// classes (walk.h), threads (pool.h).
#include "../l2t.h"

#include "../dispatch.h"
#include "../math/row.h"
#include "block.h"
#include "isa.h"
#include "pool.h"
#include "weight.h"

namespace l2t {
inline namespace L2T_ISA {
namespace {

// Zeros of the type.
template <class V>
V nothing(const V&) {
  return V(One<V>(0));
}

template <class S>
void zero(int64_t c, S* row) {
  for (int64_t j = 0; j < c; ++j) row[j] = S{};
}

// Rows of a block: as many as keep a row of exponentials each in the first cache, and a tile where products are
// taken for several at a time.
template <class T, class S>
int64_t rows_of_a_block(const Call<T, S>& call) {
  const int64_t least = call.rows.rank > 0 ? kTile : 1;
  return min(max(32768 / (call.c * static_cast<int64_t>(sizeof(T))), least), kBlockRows);
}

// A row of exponentials or probabilities that waits for its head. A long one may wait where the gradient is going to
// be; others are in scratch memory, which ends with a register.
template <bool Long, class T>
struct Waiting {
  T* row;

  template <class Which, class V>
  L2T_INLINE void put(int64_t j, Which which, const V& x) const {
    if constexpr (Long)
      which.store(row + j, x);
    else
      which.store_all(row + j, x);
  }
  template <class Which>
  L2T_INLINE auto get(int64_t j, Which which) const {
    if constexpr (Long)
      return which.load(row + j);
    else
      return which.load_all(row + j);
  }
};

// f(block, lane) for all rows, block by block; `cost` is that of a row.
template <class T, class S, class F>
void each_block(const Call<T, S>& call, const T* v_loss, int64_t cost, F f) {
  const int64_t rows = rows_of_a_block(call), blocks = (call.n + rows - 1) / rows;
  parallel_for(call.rows.threads, blocks, rows * cost, [&](int64_t at, int lane) {
    Block<T> block(call, v_loss, at * rows, min(rows, call.n - at * rows));
    f(block, lane);
  });
}

// A long row has more classes than are gone over twice while they are in the first cache.
constexpr int64_t kPiece = 1024;

template <class T, class S>
bool worth_streaming(const Call<T, S>& call, const S* out) {
  return call.n * call.c * static_cast<int64_t>(sizeof(S)) >= 32 << 20 && out != call.in.logits;
}

// A long row waits where it is written anyway, so that less of the second cache is in use; but not over its logits.
template <class T, class S>
bool waits_in_output(const Call<T, S>& call, const S* out) {
  return sizeof(S) == sizeof(T) && out != nullptr && out != call.in.logits && !worth_streaming(call, out);
}

// ---- value ----

// Of a row: max z, sum exp(z - max), sum a (z - max) and R = sum a. No a: none of its sums.
template <class T>
struct ValueSums {
  T max, sum_exp, a_z, R;
};

// Those of some classes against a number that stands for the max; exp(z - max) is left in `e`, if it has a row.
// Long: the logits of the next piece, or row, are fetched into the first cache meanwhile, since the machine itself
// fetches nothing from memory while a piece is in it.
template <bool Long, class T, class S>
ValueSums<T> piece_sums(int64_t c, T max, const S* z, const T* a, const Waiting<Long, T>& e) {
  constexpr int64_t ahead = Long ? kPiece : 0;
  Sum<T> sum_exp, a_z, R;
  if (a == nullptr) {
    const auto add = [&](int64_t j, auto which) {
      fetch<ahead>(z + j, which);
      const auto x = sum_exp_term(which.load(z + j), max);
      if (e.row != nullptr) e.put(j, which, x);
      sum_exp.add(which.only(x, T(0)));
    };
    each<T>(c, add, sum_exp);
    return {max, sum_exp.value(), 0, 0};
  }
  const auto add = [&](int64_t j, auto which) {
    fetch<ahead>(z + j, which);
    const auto z_j = which.load(z + j), x = sum_exp_term(z_j, max), w = which.load(a + j);
    if (e.row != nullptr) e.put(j, which, x);
    sum_exp.add(which.only(x, T(0)));
    a_z.add(w, which.only(z_j - max, T(0)));
    R.add(w);
  };
  each<T>(c, add, sum_exp, a_z, R);
  return {max, sum_exp.value(), a_z.value(), R.value()};
}

// Those of a long row, which is read once: in pieces that stay in the first cache, each against the largest logit so
// far, which is left in `tops`. There an exponential is exp(max - top) times too large.
template <class T, class S>
__attribute__((noinline)) ValueSums<T> sums_of_pieces(int64_t c, const S* z, const T* a, Waiting<true, T> e,
                                                      T* tops) {
  double sum_exp = 0, a_z = 0, R = 0;
  T max = -T(INFINITY), top = 0;
  for (int64_t begin = 0; begin < c; begin += kPiece) {
    const int64_t width = min(kPiece, c - begin);
    const T largest = max_of<T>(width, z + begin);
    if (largest > max) {
      if (max > -T(INFINITY)) {
        sum_exp *= sum_exp_term(max, largest);
        a_z += R * (max - largest);
      }
      max = top = largest;
    }
    const T* of_piece = a != nullptr ? a + begin : a;
    const ValueSums<T> piece = piece_sums(width, top, z + begin, of_piece, e);
    sum_exp += piece.sum_exp, a_z += piece.a_z, R += piece.R;
    *tops++ = top;
    if (e.row != nullptr) e.row += width;
  }
  if (!(max > -T(INFINITY))) sum_exp = NAN;  // nothing but logits of -inf: there is no softmax
  return {max, static_cast<T>(sum_exp), static_cast<T>(a_z), static_cast<T>(R)};
}

// sum a (z - max) where it came out infinite or NaN, perhaps because of an infinite logit that has no weight.
template <class T, class S>
__attribute__((noinline)) T careful_a_z(int64_t c, T max, const S* z, const T* a) {
  T a_z = 0;
  for (int64_t j = 0; j < c; ++j) a_z += times(a[j], widen(z[j]) - max);
  return a_z;
}

// Long: in pieces.
template <bool Long, class T, class S>
l2t_status value(const l2t_rows& rows, const l2t_tensors& inputs, T* loss_out, T* stats_out,
                 S* d_logits_out) {
  Memory memory;
  Call<T, S> call(rows, inputs, memory);
  const int64_t c = call.c, padded = up_to_multiple(c, Vec<T>::lanes), together = rows_of_a_block(call);
  const Weight<T> w(call, memory);
  const int64_t pieces = Long ? (c + kPiece - 1) / kPiece : 0;
  const int64_t room_of_tops = up_to_multiple(together * pieces, Vec<T>::lanes);
  const Scratch<T> scratch(memory, rows, call.n, room_of_tops + together * padded * (w.low_rank ? 2 : 1));
  T* loss_of_row = call.reduced ? memory.take<T>(call.n) : loss_out;
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  const bool stream = worth_streaming(call, d_logits_out);
  const bool in_output = Long && waits_in_output(call, d_logits_out);

  each_block(call, static_cast<const T*>(nullptr), w.cost(), [&](Block<T>& block, int lane) {
    T *tops = scratch[lane], *scratch_e = tops + room_of_tops, *room = scratch_e + together * padded;
    const auto e = [&](int row) -> Waiting<Long, T> {
      if (in_output) return {reinterpret_cast<T*>(d_logits_out + (block.first + row) * c)};
      return {d_logits_out != nullptr ? scratch_e + row * padded : nullptr};
    };
    const T* a[kBlockRows] = {};
    Column<T> sum_exp, a_z, loss_column, p_y;
    if (!Long)
      block.each_counted([&](int row) { block.max[row] = max_of<T>(c, call.logits(block.first + row)); });
    if (w.dense) w.rows(block, room, padded, a);
    block.each_counted([&](int row) {
      const S* z = call.logits(block.first + row);
      ValueSums<T> sums;
      if constexpr (Long)
        sums = sums_of_pieces(c, z, a[row], e(row), tops + row * pieces);
      else
        sums = piece_sums(c, block.max[row], z, a[row], e(row));
      block.max[row] = sums.max, sum_exp[row] = sums.sum_exp, a_z[row] = sums.a_z, block.R[row] = sums.R;
      if (w.dense && !finite(sums.a_z)) a_z[row] = careful_a_z(c, sums.max, z, a[row]);
      if (!w.dense) {
        block.R[row] = w.diagonal(block.k[row]);
        a_z[row] = times(block.R[row], widen(z[block.y[row]]) - block.max[row]);
        if (d_logits_out != nullptr) p_y[row] = e(row).row[block.y[row]];
        if (Long) p_y[row] *= sum_exp_term(tops[row * pieces + block.y[row] / kPiece], sums.max);
      }
    });

    for (int row = 0; row < block.rows; row += Vec<T>::lanes) {
      const Vec<T> R = block.R.from(row), inverse = 1 / sum_exp.from(row), kappa = block.kappa.from(row);
      Stats<Vec<T>> stats = stats_before_u(block.max.from(row), sum_exp.from(row));
      stats.u = u_of_sums(a_z.from(row), R, stats.log_sum, block.beta.from(row));
      const Head<Vec<T>> head = grad_head(call.link, stats, kappa, block.go.from(row));
      block.log_sum.put(row, stats.log_sum), block.u.put(row, stats.u);
      loss_column.put(row, loss(call.link, stats, kappa));
      block.slope.put(row, head.slope), sum_exp.put(row, inverse);
      p_y.put(row, d_z(head, p_y.from(row) * inverse, R, R));
    }

    block.store_stats(stats_out);
    for (int row = 0; row < block.rows; ++row)
      loss_of_row[block.first + row] = block.y[row] >= 0 ? loss_column[row] : 0;
    if (d_logits_out == nullptr) return;
    for (int row = 0; row < block.rows; ++row) {
      S* d_logits = d_logits_out + (block.first + row) * c;
      if (block.y[row] < 0) {
        zero(c, d_logits);
        continue;
      }
      Head<T> head{};
      head.slope = block.slope[row];
      const Waiting<Long, T> exps = e(row);
      const T R_inverse = block.R[row] * sum_exp[row], *of_row = a[row];
      const auto write_piece = [&](int64_t begin, int64_t width, T of_e) {
        if (w.dense)
          write<T>(width, d_logits + begin, stream, [&](int64_t j, auto which) {
            return d_z(head, exps.get(begin + j, which), which.load(of_row + begin + j), of_e);
          });
        else
          write<T>(width, d_logits + begin, stream,
                   [&](int64_t j, auto which) { return d_z(head, exps.get(begin + j, which), of_e); });
      };
      if constexpr (Long)
        for (int64_t at = 0; at < pieces; ++at)
          write_piece(at * kPiece, min(kPiece, c - at * kPiece),
                      R_inverse * sum_exp_term(tops[row * pieces + at], block.max[row]));
      else
        write_piece(0, c, R_inverse);
      if (!w.dense) narrow(p_y[row], d_logits[block.y[row]]);
    }
    if (stream) streamed();
  });
  if (call.reduced) call.reduce(loss_of_row, loss_out);
  return L2T_OK;
}

// ---- grad ----

template <class T, class S>
l2t_status grad(const l2t_rows& rows, const l2t_tensors& inputs, const T* stats_in,
                const Outputs<T, S>& out) {
  Memory memory;
  const Call<T, S> call(rows, inputs, memory);
  const int64_t c = call.c;
  const Weight<T> w(call, memory);
  const WeightDirection<T, S> nowhere(w, call, Inputs<T, S>(l2t_tensors{}), memory);
  auto* heads = memory.take<Head<T>>(call.n);
  const Scratch<T> scratch(memory, rows, call.n, w.low_rank ? rows_of_a_block(call) * c : 0);
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  each_block(call, call.in.v_loss, 8, [&](Block<T>& block, int) {
    block.load_stats(stats_in);
    for (int row = 0; row < block.rows; row += Vec<T>::lanes)
      put_heads(grad_head(call.link, block.stats(row), block.kappa.from(row), block.go.from(row)), block, row,
                heads);
  });
  const l2t_status status = coefficient_gradients(call, w, nowhere, heads, out, memory);
  if (status != L2T_OK || out.logits == nullptr) return status;
  const bool stream = worth_streaming(call, out.logits);
  each_block(call, call.in.v_loss, w.cost(), [&](Block<T>& block, int lane) {
    const T* a[kBlockRows] = {};
    if (w.dense) w.rows(block, scratch[lane], c, a);
    const auto each_row = [&](auto f) {
      for (int row = 0; row < block.rows; ++row) {
        const int64_t i = block.first + row, y = block.y[row];
        S* d_logits = out.logits + i * c;
        if (y >= 0)
          f(row, y, call.logits(i), heads[i], d_logits);
        else
          zero(c, d_logits);
      }
    };
    if (w.dense)
      each_row([&](int row, int64_t, const S* z, Head<T> head, S* d_logits) {
        const T *of_row = a[row], R = sum(c, of_row);
        write<T>(c, d_logits, stream, [&](int64_t j, auto which) {
          return d_z(head, head.stats.p(which.load(z + j)), which.load(of_row + j), R);
        });
      });
    else
      each_row([&](int row, int64_t y, const S* z, Head<T> head, S* d_logits) {
        const T R = w.diagonal(block.k[row]), d_y = d_z(head, head.stats.p(widen(z[y])), R, R);
        write<T>(c, d_logits, stream,
                 [&](int64_t j, auto which) { return d_z(head, head.stats.p(which.load(z + j)), R); });
        narrow(d_y, d_logits[y]);
      });
    if (stream) streamed();
  });
  return L2T_OK;
}

// ---- grad_vjp, grad_jvp: the derivative of grad along v ----

// p.v_z, a.v_z and R = sum a; v_a: its sum and v_a.log p. p is left behind.
template <class T>
struct SecondSums {
  T pv, av, R, sum_va, va_log_p;
};

template <bool Long, class T, class S>
SecondSums<T> second_sums(int64_t c, const Stats<T>& stats, const S* z, const S* v_z, const T* a,
                          const T* v_a, const Waiting<Long, T>& p) {
  Sum<T> pv, av, R, sum_va, va_log_p;
  if (v_z == nullptr) {
    const auto add = [&](int64_t j, auto which) {
      p.put(j, which, stats.p(which.load(z + j)));
      if (a != nullptr) R.add(which.load(a + j));
    };
    each<T>(c, add, R);
  } else if (a == nullptr) {
    const auto add = [&](int64_t j, auto which) {
      const auto p_j = stats.p(which.load(z + j));
      p.put(j, which, p_j);
      pv.add(which.only(p_j, T(0)), which.load(v_z + j));
    };
    each<T>(c, add, pv);
  } else {
    const auto add = [&](int64_t j, auto which) {
      const auto p_j = stats.p(which.load(z + j)), v = which.load(v_z + j), w = which.load(a + j);
      p.put(j, which, p_j);
      pv.add(which.only(p_j, T(0)), v);
      av.add(w, v);
      R.add(w);
    };
    each<T>(c, add, pv, av, R);
  }
  if (v_a != nullptr) {
    const auto add = [&](int64_t j, auto which) {
      const auto v = which.load(v_a + j);
      sum_va.add(v);
      va_log_p.add(which.only(a_log_p_term(v, stats.log_p(which.load(z + j))), T(0)));
    };
    each<T>(c, add, sum_va, va_log_p);
  }
  return {pv.value(), av.value(), R.value(), sum_va.value(), va_log_p.value()};
}

template <bool Long, class T, class S>
l2t_status second_order(const l2t_rows& rows, const l2t_tensors& inputs, const T* stats_in,
                        const Inputs<T, S>& v, const Outputs<T, S>& out) {
  Memory memory;
  const Call<T, S> call(rows, inputs, memory);
  const int64_t c = call.c, padded = up_to_multiple(c, Vec<T>::lanes), together = rows_of_a_block(call);
  const Weight<T> w(call, memory);
  const WeightDirection<T, S> direction(w, call, v, memory);
  auto* heads = memory.take<Head<T>>(call.n);
  const Scratch<T> scratch(memory, rows, call.n, 3 * together * padded);  // p, a, v_a
  T* d_go_of_row = out.v_loss == nullptr ? nullptr : call.reduced ? memory.take<T>(call.n) : out.v_loss;
  if (memory.failed()) return L2T_OUT_OF_MEMORY;
  const bool stream = worth_streaming(call, out.logits),
             in_output = Long && waits_in_output(call, out.logits);
  const bool moves_a = w.dense && direction.moves;
  each_block(call, call.in.v_loss, 2 * w.cost(), [&](Block<T>& block, int lane) {
    T *scratch_p = scratch[lane], *a_room = scratch_p + together * padded,
      *v_a_room = a_room + together * padded;
    const auto p = [&](int row) -> Waiting<Long, T> {
      if (in_output) return {reinterpret_cast<T*>(out.logits + (block.first + row) * c)};
      return {scratch_p + row * padded};
    };
    const T *a[kBlockRows] = {}, *v_a[kBlockRows] = {};
    Column<T> pv, av, sum_va, va_log_p, v_beta, v_kappa, t_go, d_y;
    block.load_stats(stats_in);
    if (w.dense) w.rows(block, a_room, padded, a);
    if (moves_a) direction.rows(block, v_a_room, padded, v_a);
    block.each_counted([&](int row) {
      const int64_t i = block.first + row, k = block.k[row], y = block.y[row];
      const S *z = call.logits(i), *v_z = v.logits != nullptr ? v.logits + i * c : nullptr;
      const Stats<T> stats = {block.max[row], block.log_sum[row], block.u[row]};
      const SecondSums<T> sums = second_sums(c, stats, z, v_z, a[row], v_a[row], p(row));
      pv[row] = sums.pv, av[row] = sums.av, block.R[row] = sums.R;
      sum_va[row] = sums.sum_va, va_log_p[row] = sums.va_log_p;
      v_beta[row] = at(v.bias, k, T(0)), v_kappa[row] = at(v.scale, k, T(0));
      t_go[row] = call.of_loss(v.v_loss, i, T(0));
      if (!w.dense) {
        block.R[row] = w.diagonal(k);
        av[row] = v_z != nullptr ? block.R[row] * widen(v_z[y]) : 0;
        sum_va[row] = direction.diagonal(k);
        va_log_p[row] = a_log_p_term(sum_va[row], stats.log_p(widen(z[y])));
      }
    });

    for (int row = 0; row < block.rows; row += Vec<T>::lanes) {
      const Direction<Vec<T>> along = {pv.from(row),       av.from(row),     sum_va.from(row),
                                       va_log_p.from(row), v_beta.from(row), v_kappa.from(row),
                                       t_go.from(row)};
      put_heads(second_head(call.link, block.stats(row), block.kappa.from(row), block.go.from(row),
                            block.R.from(row), along),
                block, row, heads);
    }

    for (int row = 0; row < block.rows; ++row) {
      const int64_t i = block.first + row, y = block.y[row];
      if (d_go_of_row != nullptr) d_go_of_row[i] = y >= 0 ? heads[i].d_go : 0;
      if (out.logits == nullptr) continue;
      S* d_logits = out.logits + i * c;
      if (y < 0) {
        zero(c, d_logits);
        continue;
      }
      const Head<T> head = heads[i];
      const T R = block.R[row], moved = sum_va[row];
      const S* v_z = v.logits != nullptr ? v.logits + i * c : nullptr;
      const Waiting<Long, T> p_row = p(row);
      const T p_y = p_row.row[y], *a_row = a[row], *v_a_row = v_a[row];
      const auto each_d_z = [&](auto f) {
        write<T>(c, d_logits, stream,
                 [&](int64_t j, auto which) { return f(j, which, p_row.get(j, which)); });
      };
      if (w.dense)
        each_d_z([&](int64_t j, auto which, auto p) {
          return d_z(head, p, which.load(a_row + j), R, v_z != nullptr ? which.load(v_z + j) : nothing(p),
                     v_a_row != nullptr ? which.load(v_a_row + j) : nothing(p), moved);
        });
      else
        each_d_z([&](int64_t j, auto which, auto p) {
          return -d_z_of_p(head, p, R, v_z != nullptr ? which.load(v_z + j) : nothing(p), moved);
        });
      if (!w.dense)
        narrow(d_z(head, p_y, R, R, v_z != nullptr ? widen(v_z[y]) : T(0), moved, moved), d_logits[y]);
      if (stream) streamed();
    }
  });
  if (out.v_loss != nullptr && call.reduced) call.reduce(d_go_of_row, out.v_loss);
  return coefficient_gradients(call, w, direction, heads, out, memory);
}

// ---- the table ----

l2t_status any_value(const l2t_rows& rows, const l2t_tensors& inputs, void* loss, void* stats,
                     void* d_logits) {
  return dispatch(rows.dtype, [&](auto arithmetic, auto storage) {
    using T = decltype(arithmetic);
    using S = decltype(storage);
    const auto of_length = rows.c > kPiece ? value<true, T, S> : value<false, T, S>;
    return of_length(rows, inputs, static_cast<T*>(loss), static_cast<T*>(stats), static_cast<S*>(d_logits));
  });
}

l2t_status any_grad(const l2t_rows& rows, const l2t_tensors& inputs, const void* stats,
                    const l2t_outputs& outputs) {
  return dispatch(rows.dtype, [&](auto arithmetic, auto storage) {
    using T = decltype(arithmetic);
    using S = decltype(storage);
    return grad(rows, inputs, static_cast<const T*>(stats), Outputs<T, S>(outputs));
  });
}

l2t_status any_second_order(const l2t_rows& rows, const l2t_tensors& inputs, const void* stats,
                            const l2t_tensors& direction, const l2t_outputs& outputs) {
  return dispatch(rows.dtype, [&](auto arithmetic, auto storage) {
    using T = decltype(arithmetic);
    using S = decltype(storage);
    const auto of_length = rows.c > kPiece ? second_order<true, T, S> : second_order<false, T, S>;
    return of_length(rows, inputs, static_cast<const T*>(stats), Inputs<T, S>(direction),
                     Outputs<T, S>(outputs));
  });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {any_value, any_grad, any_second_order};

}  // namespace L2T_ISA
}  // namespace l2t
