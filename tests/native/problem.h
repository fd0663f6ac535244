// A problem for the four ops: its sizes, its loss in long double as docs/math.md section 1 defines it, and its
// points in the types of a dtype. What the ops of every device are tested on.
#ifndef L2T_TESTS_PROBLEM_H
#define L2T_TESTS_PROBLEM_H

#include "../../csrc/l2t.h"
#include "../../csrc/math/num.h"
#include "check.h"

inline constexpr const char* structure_names[] = {"full", "diagonal", "low rank"};
enum Part { V_LOSS, LOGITS, WEIGHT, LEFT, RIGHT, BIAS, SCALE, PARTS };

// One problem: its sizes, and where each of the gradient op's inputs lies in a flat point.
struct Problem {
  int link, structure;
  size_t n, c, losses;
  bool mean;
  size_t groups, rank;
  long long ignore_index = -100;
  std::vector<int64_t> target;
  size_t start[PARTS + 1];

  Problem(int link, int structure, size_t n, size_t c, size_t losses, bool mean, size_t groups = 2,
          size_t low_rank = 2)
      : link(link),
        structure(structure),
        n(n),
        c(c),
        losses(losses),
        mean(mean),
        groups(groups),
        rank(structure == L2T_LOW_RANK ? low_rank : 0) {
    const size_t k = groups * c;
    const size_t sizes[] = {losses, n * c, structure == L2T_FULL ? k * c : k, k * rank, k * rank, k, k};
    start[0] = 0;
    for (int part = 0; part < PARTS; ++part) start[part + 1] = start[part] + sizes[part];
    std::mt19937_64 generator(7);
    for (size_t i = 0; i < n; ++i) target.push_back(generator() % k);
    if (n > 2) target[0] = target[n - 1], target[2] = ignore_index;
  }

  size_t size() const { return start[PARTS]; }
  size_t loss_of(size_t i) const { return i / (n / losses); }

  long double total_loss(const Point& x) const {
    const long double *go = &x[0], *z = &x[start[LOGITS]], *w = &x[start[WEIGHT]], *left = &x[start[LEFT]],
                      *right = &x[start[RIGHT]], *bias = &x[start[BIAS]], *scale = &x[start[SCALE]];
    std::vector<long double> sums(losses, 0), counts(losses, 0);
    for (size_t i = 0; i < n; ++i) {
      if (target[i] == ignore_index) continue;
      const size_t k = target[i], y = k % c, first = k - y;
      long double sum_exp = 0, u = bias[k];
      for (size_t j = 0; j < c; ++j) sum_exp += std::exp(z[i * c + j]);
      const long double lse = std::log(sum_exp);
      for (size_t j = 0; j < c; ++j) {
        long double a = structure == L2T_FULL ? w[k * c + j] : j == y ? w[k] : 0;
        for (size_t s = 0; s < rank; ++s) a += left[k * rank + s] * right[(first + j) * rank + s];
        if (a != 0) u += a * (z[i * c + j] - lse);
      }
      sums[loss_of(i)] += -scale[k] * link_by_definition(link, u);
      counts[loss_of(i)] += 1;
    }
    long double total = 0;
    for (size_t l = 0; l < losses; ++l) total += go[l] * sums[l] / (mean ? counts[l] : 1);
    return total;
  }

  // Everything of a small problem; of a large one two rows of logits and some of each part.
  Coordinates some_coordinates() const {
    Coordinates at;
    if (size() < 400) return at;
    for (size_t i = start[LOGITS]; i < start[LOGITS] + 2 * c; ++i) at.push_back(i);
    std::mt19937_64 generator(8);
    for (int part = 0; part < PARTS; ++part)
      for (size_t i = 0; i < 12 && start[part] < start[part + 1]; ++i)
        at.push_back(start[part] + generator() % (start[part + 1] - start[part]));
    // Rows of coefficients that occur, the last classes of a row among them.
    for (int64_t k : target) {
      if (k == ignore_index) continue;
      at.push_back(start[BIAS] + k), at.push_back(start[SCALE] + k);
      if (structure == L2T_FULL)
        for (size_t j : {size_t(0), k % c, c - 2, c - 1}) at.push_back(start[WEIGHT] + k * c + j);
      else
        at.push_back(start[WEIGHT] + k);
      for (size_t s = 0; s < rank; ++s) at.push_back(start[LEFT] + k * rank + s);
    }
    return at;
  }

  l2t_rows rows(int dtype) const {
    l2t_rows rows{};
    rows.dtype = dtype, rows.link = link, rows.structure = structure, rows.mean = mean, rows.threads = 2;
    rows.n = n, rows.c = c, rows.groups = groups, rows.rank = rank, rows.losses = losses;
    rows.ignore_index = ignore_index, rows.logits_stride = c, rows.target = target.data();
    return rows;
  }
};

// A point in the types of a dtype, as records of pointers.
template <class T, class S>
struct Memory {
  const Problem* problem;
  std::vector<T> flat;
  std::vector<S> logits;

  Memory(const Problem& problem, const Point& x) : problem(&problem), flat(x.begin(), x.end()) {
    for (size_t i = problem.start[LOGITS]; i < problem.start[WEIGHT]; ++i) {
      logits.emplace_back();
      l2t::narrow(static_cast<T>(x[i]), logits.back());
    }
  }

  Point point() const {
    Point x(flat.begin(), flat.end());
    for (size_t i = 0; i < logits.size(); ++i) x[problem->start[LOGITS] + i] = l2t::widen(logits[i]);
    return x;
  }

  template <class Record>
  Record record() {
    Record r{};
    const auto at = [&](int part) {
      return problem->start[part] == problem->start[part + 1] ? nullptr : &flat[problem->start[part]];
    };
    r.v_loss = at(V_LOSS), r.weight = at(WEIGHT), r.left = at(LEFT), r.right = at(RIGHT), r.bias = at(BIAS),
    r.scale = at(SCALE), r.logits = logits.data();
    return r;
  }
};

#endif
