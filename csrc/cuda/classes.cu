// The gradients to the coefficients. Each is a sum over the rows of a class (d_V: of a group) of a vector that the
// row's head gives: d_a for a full W; slope, d_kappa and d_a at the target for bias, scale and diagonal; V^T d_a for
// U; d_a U[y]^T for V, with the cross terms of math/weight.h along a direction.
//
// All are one walk. The rows, sorted by class, are cut into parts of equally many, whatever their classes, so that
// many rows of one class and many classes of one row are the same work. A thread adds up a part in one column and
// writes what belongs to a class; a class that reaches beyond the part leaves a partial sum, and a second walk adds
// those in the order of the parts. No atomics on numbers: the bits are the same in every run.
//
//     bytes moved: N C S (twice along a direction that moves the logits) + K C T for the full d_W, and a partial
//     sum of 2 C T for every part of 16 or more rows; the sort moves some numbers a row and class
//
// With `atomics` rows are taken as they come and each part adds to the gradient what it has of a class: no sort and
// no second walk, two or three kernels instead of six or more, for calls so small that launches are their time. Of
// many rows in few classes it makes a queue at few addresses. Neither was measured against the other (no GPU was at
// hand).
#include "classes.h"

#include "walk.h"

namespace l2t {
inline namespace L2T_ISA {
namespace {

constexpr int kThreads = 256;

// ---- rows by class ----

// The rank of a row among the rows of its class in its chunk, and how many those are. Chunks are multiples of the
// block, so a block lies in one.
template <class T, class S>
__global__ void rank_in_chunk(Call<T, S> call, int chunk_rows, int* rank, int* counts) {
  L2T_SHARED(int, tile, kThreads);
  const int64_t block_begin = int64_t(blockIdx.x) * kThreads, i = block_begin + threadIdx.x;
  const int64_t chunk = block_begin / chunk_rows;
  const int own = i < call.n ? call.table_row(i) : kIgnored;
  int before = 0;
  for (int64_t begin = chunk * chunk_rows; begin < block_begin; begin += kThreads) {
    __syncthreads();
    tile[threadIdx.x] = call.table_row(begin + threadIdx.x);
    __syncthreads();
    for (int other = 0; other < kThreads; ++other) before += tile[other] == own;
  }
  __syncthreads();
  tile[threadIdx.x] = own;
  __syncthreads();
  for (int other = 0; other < static_cast<int>(threadIdx.x); ++other) before += tile[other] == own;
  if (own < 0) return;
  rank[i] = before;
  atomicAdd(&counts[chunk * call.table_rows + own], 1);
}

// Of each class, how many rows earlier chunks have, in place, and the total: a warp a class.
__global__ void count_earlier_chunks(int table_rows, int chunks, int* counts, int* totals) {
  const int64_t k = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (k >= table_rows) return;
  int earlier = 0;
  for (int begin = 0; begin < chunks; begin += 32) {
    int* const count = counts + int64_t(begin + lane) * table_rows + k;
    const int own = begin + lane < chunks ? *count : 0;
    int up_to = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_sync(0xffffffffu, up_to, lane >= offset ? lane - offset : lane);
      if (lane >= offset) up_to += other;
    }
    if (begin + lane < chunks) *count = earlier + up_to - own;
    earlier += __shfl_sync(0xffffffffu, up_to, 31);
  }
  if (lane == 0) totals[k] = earlier;
}

// start[k] = the rows of classes before k: one block, each thread a stretch of classes.
__global__ void start_of_classes(int table_rows, const int* totals, int* start) {
  L2T_SHARED(int, sums, kThreads);
  const int each = (table_rows + kThreads - 1) / kThreads;
  const int64_t begin = int64_t(threadIdx.x) * each,
                end = begin + each < table_rows ? begin + each : table_rows;
  int own = 0;
  for (int64_t k = begin; k < end; ++k) own += totals[k];
  sums[threadIdx.x] = own;
  __syncthreads();
  int before = 0;
  for (int other = 0; other < static_cast<int>(threadIdx.x); ++other) before += sums[other];
  for (int64_t k = begin; k < end; ++k) {
    start[k] = before;
    before += totals[k];
  }
  if (threadIdx.x == kThreads - 1) start[table_rows] = before;
}

template <class T, class S>
__global__ void place_rows(Call<T, S> call, ClassMemory<T> memory) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= call.n) return;
  const int k = call.table_row(i);
  if (k < 0) return;
  const int64_t chunk = i / memory.chunk_rows;
  const int earlier = memory.chunks > 1 ? memory.counts[chunk * call.table_rows + k] : 0;
  const int position = memory.start[k] + earlier + memory.rank[i];
  memory.order[position] = static_cast<int>(i);
  memory.table_row[position] = k;
}

template <class T, class S>
l2t_status sort_rows(const Call<T, S>& call, const ClassMemory<T>& memory, void* stream) {
  const int table_rows = call.table_rows, chunks = memory.chunks;
  const unsigned row_blocks = blocks_for(call.n, kThreads);
  L2T_STEP(fill_with_zeros(memory.counts, sizeof(int) * chunks * table_rows, stream));
  L2T_STEP(launch(rank_in_chunk<T, S>, row_blocks, kThreads, 0, stream, call, memory.chunk_rows, memory.rank,
                  memory.counts));
  if (chunks > 1)
    L2T_STEP(launch(count_earlier_chunks, blocks_for(int64_t(table_rows) * 32, kThreads), kThreads, 0, stream,
                    table_rows, chunks, memory.counts, memory.totals));
  L2T_STEP(launch(start_of_classes, 1, kThreads, 0, stream, table_rows,
                  chunks > 1 ? memory.totals : memory.counts, memory.start));
  return launch(place_rows<T, S>, row_blocks, kThreads, 0, stream, call, memory);
}

// ---- what a row gives: V neighbouring columns of its vector ----

// d_a in neighbouring classes: e, which is along the direction if there is one, and f of grad itself.
template <class T, class S>
struct RowGradient {
  Call<T, S> call;
  const S* v_logits;  // [N, C], null where the logits do not move
  const Head<T>* heads;

  template <int V>
  L2T_DEVICE void get(int64_t i, int j, T (&e)[V], T (&f)[V]) const {
    const Head<T> head = heads[i];
    T z[V], v_z[V];
    load<V>(call.logits(i) + j, z);
    if (v_logits != nullptr) load<V>(v_logits + i * call.c + j, v_z);
#pragma unroll
    for (int at = 0; at < V; ++at) {
      const T log_p = head.stats.log_p(z[at]);
      e[at] = v_logits != nullptr ? d_a(head, log_p, v_z[at]) : d_a(head, log_p);
      f[at] = first_d_a(head, log_p);
    }
  }
};

// d_W: a column a class.
template <class T, class S>
struct WeightTerm {
  RowGradient<T, S> rows;
  int unit;
  using Place = int;

  L2T_DEVICE Place place(int64_t column) const { return static_cast<int>(column); }

  template <int V>
  L2T_DEVICE void add(int64_t i, int, Place j, T (&sum)[V]) const {
    T e[V], f[V];
    rows.get(i, j, e, f);
#pragma unroll
    for (int at = 0; at < V; ++at) sum[at] += e[at];
  }
};

// The columns bias, scale, diagonal.
template <class T, class S>
struct ScalarTerm {
  RowGradient<T, S> rows;
  int unit;
  using Place = int;

  L2T_DEVICE Place place(int64_t column) const { return static_cast<int>(column); }

  L2T_DEVICE void add(int64_t i, int k, Place column, T (&sum)[1]) const {
    if (column < 2) {
      sum[0] += column == 0 ? rows.heads[i].slope : rows.heads[i].d_kappa;
      return;
    }
    T e[1], f[1];
    rows.get(i, rows.call.class_of(k), e, f);
    sum[0] += e[0];
  }
};

// d_U: a column a rank, from what left_terms has made.
template <class T>
struct LeftTerm {
  const T* terms;
  int64_t rank;
  int unit;
  using Place = int64_t;

  L2T_DEVICE Place place(int64_t column) const { return column; }

  L2T_DEVICE void add(int64_t i, int, Place s, T (&sum)[1]) const { sum[0] += terms[i * rank + s]; }
};

// d_V: a column a class and rank, of the rows of a group.
template <class T, class S>
struct RightTerm {
  RowGradient<T, S> rows;
  const T* v_left;
  int unit;
  struct Place {
    int j, s;
  };

  L2T_DEVICE Place place(int64_t column) const {
    return {static_cast<int>(column / rows.call.rank), static_cast<int>(column % rows.call.rank)};
  }

  L2T_DEVICE void add(int64_t i, int k, Place at, T (&sum)[1]) const {
    T e[1], f[1];
    rows.get(i, at.j, e, f);
    const int64_t entry = int64_t(k) * rows.call.rank + at.s;
    sum[0] += rows.call.in.left[entry] * e[0];
    if (v_left != nullptr) sum[0] += v_left[entry] * f[0];
  }
};

// V^T e + x_V^T f of every row: [N, r]. A warp or a block has a row and four ranks at a time.
template <bool ByBlock, class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    left_terms(RowGradient<T, S> rows, const T* v_right, T* terms) {
  L2T_SHARED(T, room, Block<T>::kRoom);
  const Call<T, S>& call = rows.call;
  const int lanes = ByBlock ? kThreads : 32, lane = threadIdx.x % lanes;
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  if (i >= call.n) return;
  const int k = call.table_row(i);
  if (k < 0) return;
  const int64_t group = int64_t(k - call.class_of(k)) * call.rank;
  for (int begin = 0; begin < call.rank; begin += 4) {
    T sums[4] = {0, 0, 0, 0};
    for (int j = lane; j < call.c; j += lanes) {
      T e[1], f[1];
      rows.get(i, j, e, f);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (begin + s >= call.rank) break;
        const int64_t entry = group + int64_t(j) * call.rank + begin + s;
        sums[s] += call.in.right[entry] * e[0];
        if (v_right != nullptr) sums[s] += v_right[entry] * f[0];
      }
    }
    if (ByBlock)
      Block<T>{room}.sum(sums);
    else
      Team(32).sum(sums);
    for (int s = 0; lane == 0 && s < 4 && begin + s < call.rank; ++s)
      terms[i * call.rank + begin + s] = sums[s];
  }
}

// ---- where the sums go: of a key (a table row; a group), a column ----

template <class T>
struct Table {
  T* first;
  int64_t width;
  L2T_DEVICE T* at(int64_t key, int64_t column) const { return first + key * width + column; }
};

template <class T>
struct Columns {
  T *bias, *scale, *diagonal;
  L2T_DEVICE T* at(int64_t key, int64_t column) const {
    T* const first = column == 0 ? bias : column == 1 ? scale : diagonal;
    return first != nullptr ? first + key : nullptr;
  }
};

// ---- adding up ----

// Parts of the sorted rows: so long that there are threads enough and partial sums are few.
struct Parts {
  int64_t width, rows, count;

  Parts(int64_t n, int64_t width) : width(width) {
    constexpr int64_t kThreadsWanted = 1 << 18, kAtLeast = 16, kAtMost = 256, kPartsAtMost = 2048;
    rows = n * width / kThreadsWanted;
    rows = rows < kAtLeast ? kAtLeast : rows > kAtMost ? kAtMost : rows;
    if (n > rows * kPartsAtMost) rows = (n + kPartsAtMost - 1) / kPartsAtMost;
    count = (n + rows - 1) / rows;
  }

  int64_t partial_sums() const { return 2 * count * width; }
};

// Of a thread: its part or key, and the first of its V columns; false beyond the last. Threads of narrow vectors
// come in powers of two, so that a warp has whole ones.
template <int V>
struct Threads {
  int64_t columns;  // threads a vector

  explicit Threads(int64_t width) : columns(width / V) {
    if (columns >= 32) return;
    int64_t power = 1;
    while (power < columns) power *= 2;
    columns = power;
  }

  L2T_DEVICE bool mine(int64_t count, int64_t width, int64_t& item, int64_t& column) const {
    const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    item = thread / columns, column = thread % columns * V;
    return item < count && column < width;
  }
};

// A class that begins before the part goes to the part's first partial sum, one that ends beyond it to the second.
template <int V, class Term, class Out, class T>
__global__ void __launch_bounds__(kThreads, 1)
    sums_of_parts(Term term, Out out, Parts parts, Threads<V> threads, int table_rows,
                  ClassMemory<T> memory) {
  int64_t part, column;
  if (!threads.mine(parts.count, parts.width, part, column)) return;
  const auto place = term.place(column);
  const int64_t begin = part * parts.rows, sorted = memory.start[table_rows];
  const int64_t end = begin + parts.rows < sorted ? begin + parts.rows : sorted;
  for (int64_t position = begin; position < end;) {
    const int key = memory.table_row[position] / term.unit;
    const int first = memory.start[key * term.unit], last = memory.start[(key + 1) * term.unit];
    T sum[V] = {};
    for (; position < end && position < last; ++position)
      term.add(memory.order[position], memory.table_row[position], place, sum);
    const bool inside = first >= begin && last <= begin + parts.rows;
    T* const partial = memory.partial_sums + (2 * part + (first >= begin)) * parts.width + column;
    T* const to = inside ? out.at(key, column) : partial;
    if (to != nullptr) store<V>(to, sum);
  }
}

// What parts have not finished: nothing for keys without rows, and partial sums of two parts or more.
template <int V, class Out, class T>
__global__ void __launch_bounds__(kThreads, 1)
    sums_over_parts(Out out, Parts parts, Threads<V> threads, int keys, int unit, ClassMemory<T> memory) {
  int64_t key, column;
  if (!threads.mine(keys, parts.width, key, column)) return;
  T* const to = out.at(key, column);
  if (to == nullptr) return;
  const int first = memory.start[key * unit], last = memory.start[(key + 1) * unit];
  const int64_t first_part = first / parts.rows, last_part = (last - 1) / parts.rows;
  T sum[V] = {};
  if (first < last) {
    if (first_part == last_part) return;
    load<V>(memory.partial_sums + (2 * first_part + 1) * parts.width + column, sum);
    for (int64_t part = first_part + 1; part <= last_part; ++part) {
      T more[V];
      load<V>(memory.partial_sums + 2 * part * parts.width + column, more);
#pragma unroll
      for (int at = 0; at < V; ++at) sum[at] += more[at];
    }
  }
  store<V>(to, sum);
}

// Rows as they come; the sums must be 0 before.
template <int V, class Term, class Out, class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    sums_by_atomics(Call<T, S> call, Term term, Out out, Parts parts, Threads<V> threads) {
  int64_t part, column;
  if (!threads.mine(parts.count, parts.width, part, column)) return;
  const auto place = term.place(column);
  const int64_t begin = part * parts.rows, end = begin + parts.rows < call.n ? begin + parts.rows : call.n;
  int key = -1;
  T sum[V] = {};
  for (int64_t i = begin; i <= end; ++i) {
    const int k = i < end ? call.table_row(i) : -1;
    if (k < 0 && i < end) continue;
    const int next = k < 0 ? -1 : k / term.unit;
    if (next != key && key >= 0) {
      T* const to = out.at(key, column);
#pragma unroll
      for (int at = 0; at < V; ++at) {
        if (to != nullptr) atomicAdd(to + at, sum[at]);
        sum[at] = 0;
      }
    }
    key = next;
    if (k >= 0) term.add(i, k, place, sum);
  }
}

template <int V, class Term, class Out, class T, class S>
l2t_status add_up(const Call<T, S>& call, const Term& term, const Out& out, int64_t width, bool atomics,
                  const ClassMemory<T>& memory, void* stream) {
  const Parts parts(call.n, width);
  const Threads<V> threads(width);
  const int keys = call.table_rows / term.unit;
  const unsigned part_blocks = blocks_for(parts.count * threads.columns, kThreads);
  if (atomics)
    return launch(sums_by_atomics<V, Term, Out, T, S>, part_blocks, kThreads, 0, stream, call, term, out,
                  parts, threads);
  L2T_STEP(launch(sums_of_parts<V, Term, Out, T>, part_blocks, kThreads, 0, stream, term, out, parts, threads,
                  call.table_rows, memory));
  return launch(sums_over_parts<V, Out, T>, blocks_for(keys * threads.columns, kThreads), kThreads, 0, stream,
                out, parts, threads, keys, term.unit, memory);
}

}  // namespace

template <class T>
ClassMemory<T>::ClassMemory(const l2t_rows& rows, Memory& memory) {
  const int64_t n = rows.n, table_rows = rows.groups * rows.c;
  // Chunks so many that the counts stay about as many as the rows, and ranks are found among few.
  int64_t wanted = 4 * n / table_rows;
  wanted = wanted < 1 ? 1 : wanted > 1024 ? 1024 : wanted;
  chunk_rows = static_cast<int>(((n + wanted - 1) / wanted + kThreads - 1) / kThreads * kThreads);
  if (chunk_rows == 0) chunk_rows = kThreads;
  chunks = n > 0 ? static_cast<int>((n + chunk_rows - 1) / chunk_rows) : 1;
  counts = memory.take<int>(chunks * table_rows);
  totals = memory.take<int>(table_rows);
  start = memory.take<int>(table_rows + 1);
  rank = memory.take<int>(n);
  order = memory.take<int>(n);
  table_row = memory.take<int>(n);
  left_terms = memory.take<T>(n * rows.rank);
  int64_t most = Parts(n, 3).partial_sums();
  for (int64_t width : {rows.structure == L2T_FULL ? rows.c : 0, rows.rank, rows.c * rows.rank})
    if (width > 0 && Parts(n, width).partial_sums() > most) most = Parts(n, width).partial_sums();
  partial_sums = memory.take<T>(most);
}

template <class T, class S>
l2t_status coefficient_gradients(const Call<T, S>& call, const Inputs<T, S>& direction, const Head<T>* heads,
                                 const Outputs<T, S>& out, bool atomics, const ClassMemory<T>& memory,
                                 void* stream) {
  const int64_t table_rows = call.table_rows, c = call.c, rank = call.rank;
  const RowGradient<T, S> rows{call, direction.logits, heads};
  const Columns<T> columns{out.bias, out.scale, call.full ? nullptr : out.weight};
  if (atomics) {
    const auto clear = [&](T* table, int64_t count) {
      return table != nullptr ? fill_with_zeros(table, sizeof(T) * count, stream) : L2T_OK;
    };
    L2T_STEP(clear(columns.bias, table_rows));
    L2T_STEP(clear(columns.scale, table_rows));
    L2T_STEP(clear(columns.diagonal, table_rows));
    if (call.full) L2T_STEP(clear(out.weight, table_rows * c));
    L2T_STEP(clear(out.left, table_rows * rank));
    L2T_STEP(clear(out.right, table_rows * rank));
  } else {
    L2T_STEP(sort_rows(call, memory, stream));
  }
  if (columns.bias != nullptr || columns.scale != nullptr || columns.diagonal != nullptr)
    L2T_STEP(add_up<1>(call, ScalarTerm<T, S>{rows, 1}, columns, 3, atomics, memory, stream));
  if (call.full && out.weight != nullptr) {
    const WeightTerm<T, S> term{rows, 1};
    const Table<T> table{out.weight, c};
    if (call.wide() && aligned(direction.logits) && aligned(out.weight))
      L2T_STEP(add_up<kWide<S>>(call, term, table, c, atomics, memory, stream));
    else
      L2T_STEP(add_up<1>(call, term, table, c, atomics, memory, stream));
  }
  if (call.low_rank && out.left != nullptr) {
    const auto kernel = call.c > 1024 ? left_terms<true, T, S> : left_terms<false, T, S>;
    const int64_t threads = int64_t(call.n) * (call.c > 1024 ? kThreads : 32);
    L2T_STEP(launch(kernel, blocks_for(threads, kThreads), kThreads, 0, stream, rows, direction.right,
                    memory.left_terms));
    const LeftTerm<T> term{memory.left_terms, rank, 1};
    L2T_STEP(add_up<1>(call, term, Table<T>{out.left, rank}, rank, atomics, memory, stream));
  }
  if (call.low_rank && out.right != nullptr) {
    const RightTerm<T, S> term{rows, direction.left, call.c};
    L2T_STEP(add_up<1>(call, term, Table<T>{out.right, c * rank}, c * rank, atomics, memory, stream));
  }
  return L2T_OK;
}

#define L2T_INSTANTIATE(T, S)                                                                       \
  template l2t_status coefficient_gradients(const Call<T, S>&, const Inputs<T, S>&, const Head<T>*, \
                                            const Outputs<T, S>&, bool, const ClassMemory<T>&, void*);
L2T_INSTANTIATE(float, float)
L2T_INSTANTIATE(double, double)
L2T_INSTANTIATE(float, bfloat16)
L2T_INSTANTIATE(float, float16)
#undef L2T_INSTANTIATE
template struct ClassMemory<float>;
template struct ClassMemory<double>;

}  // namespace L2T_ISA
}  // namespace l2t
