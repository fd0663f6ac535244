// The four ops of the waist, every structure, link and number of groups, against central differences in long
// double of the loss as docs/math.md section 1 defines it; the same program is run under the address and
// undefined-behaviour sanitizers.
//
// Not here: precision in float32 and bits (tests/test_native.py), the pool by itself (test_pool.cpp).
#include "../../csrc/l2t.h"
#include "check.h"

namespace {

// The inputs of the gradient op, flat and in the waist's order: v_loss, logits, weight, left, right, bias,
// scale.
struct Layout {
  int link, structure;
  size_t n = 7, c = 5, groups = 2, rank = 2;
  long long ignore_index = -100;
  std::vector<int64_t> target;
  size_t start[8];

  Layout(int link, int structure) : link(link), structure(structure) {
    if (structure != L2T_LOW_RANK) rank = 0;
    const size_t k = groups * c;
    const size_t sizes[] = {n, n * c, structure == L2T_FULL ? k * c : k, k * rank, k * rank, k, k};
    start[0] = 0;
    for (int i = 0; i < 7; ++i) start[i + 1] = start[i] + sizes[i];
    target = {3, 8, ignore_index, 3, 0, 9, 3};
  }

  long double total_loss(const Point& x) const {
    const long double *go = &x[0], *z = &x[start[1]], *w = &x[start[2]], *left = &x[start[3]],
                      *right = &x[start[4]], *bias = &x[start[5]], *scale = &x[start[6]];
    long double total = 0;
    for (size_t i = 0; i < n; ++i) {
      if (target[i] == ignore_index) continue;
      const size_t k = target[i], y = k % c, first = k - y;
      long double sum_exp = 0, u = bias[k];
      for (size_t j = 0; j < c; ++j) sum_exp += std::exp(z[i * c + j]);
      for (size_t j = 0; j < c; ++j) {
        long double a = structure == L2T_FULL ? w[k * c + j] : j == y ? w[k] : 0;
        for (size_t s = 0; s < rank; ++s) a += left[k * rank + s] * right[(first + j) * rank + s];
        u += a * (z[i * c + j] - std::log(sum_exp));
      }
      total += go[i] * -scale[k] * link_by_definition(link, u);
    }
    return total;
  }
};

// A point in the op's dtype, as records of pointers. Logits get three unused numbers a row: a stride that is
// not C.
template <class T>
struct Memory {
  std::vector<T> flat, logits;
  const Layout& layout;

  Memory(const Layout& layout, const Point& x) : flat(x.begin(), x.end()), layout(layout) {
    for (size_t i = 0; i < layout.n; ++i) {
      const auto row = flat.begin() + layout.start[1] + i * layout.c;
      logits.insert(logits.end(), row, row + layout.c);
      logits.insert(logits.end(), 3, T(NAN));
    }
  }

  template <class Record>
  Record record() {
    Record r{};
    const auto at = [&](int part) {
      return layout.start[part] == layout.start[part + 1] ? nullptr : &flat[layout.start[part]];
    };
    r.v_loss = at(0), r.logits = at(1), r.weight = at(2), r.left = at(3), r.right = at(4), r.bias = at(5),
    r.scale = at(6);
    return r;
  }
};

template <class T>
void ops_have_their_derivatives(int link, int structure) {
  const Layout layout(link, structure);
  const bool wide = sizeof(T) == 8;
  const Point x = normals(layout.start[7], 0.7), v = normals(layout.start[7], 0.7);
  const auto f = [&](const Point& at) { return layout.total_loss(at); };
  l2t_rows rows{};
  rows.dtype = wide ? L2T_FLOAT64 : L2T_FLOAT32;
  rows.link = link, rows.structure = structure, rows.threads = 2;
  rows.n = layout.n, rows.c = layout.c, rows.groups = layout.groups, rows.rank = layout.rank;
  rows.ignore_index = layout.ignore_index, rows.logits_stride = layout.c + 3,
  rows.target = layout.target.data();

  Memory<T> inputs(layout, x), direction(layout, v);
  l2t_tensors in = inputs.template record<l2t_tensors>();
  in.logits = inputs.logits.data();
  const std::string name = std::string(structure == 0   ? "full"
                                       : structure == 1 ? "diagonal"
                                                        : "low rank") +
                           ", " + link_name(link) + (wide ? ", double" : ", float");
  const auto expect = [&](const char* op, const Memory<T>& got, Point truth, bool with_v_loss) {
    Point compared(got.flat.begin(), got.flat.end());
    if (!with_v_loss) std::fill_n(truth.begin(), layout.n, 0), std::fill_n(compared.begin(), layout.n, 0);
    check(name + ", " + op, relative_error(compared, truth), wide ? 1e-6 : 1e-4);
  };
  const auto unwritten = [&] { return Memory<T>(layout, Point(layout.start[7], NAN)); };

  std::vector<T> loss(layout.n), stats(3 * layout.n);
  int status = l2t_cpu_value(&rows, &in, loss.data(), stats.data());
  long double total = 0;
  for (size_t i = 0; i < layout.n; ++i) total += x[i] * loss[i];
  check(name + ", value", static_cast<double>(std::fabs(total - f(x)) / std::fabs(f(x))),
        wide ? 1e-12 : 1e-4);

  Memory<T> d = unwritten();
  l2t_outputs out = d.template record<l2t_outputs>();
  status |= l2t_cpu_grad(&rows, &in, stats.data(), &out);
  expect("grad", d, gradient(f, x), false);

  Memory<T> d_vjp = unwritten();
  out = d_vjp.template record<l2t_outputs>();
  l2t_tensors cotangents = direction.template record<l2t_tensors>();
  cotangents.v_loss = nullptr;
  Point without_v_loss = v;
  std::fill_n(without_v_loss.begin(), layout.n, 0);
  status |= l2t_cpu_grad_vjp(&rows, &in, stats.data(), &cotangents, &out);
  expect("grad_vjp", d_vjp, gradient_along(f, x, without_v_loss), true);

  Memory<T> d_jvp = unwritten();
  out = d_jvp.template record<l2t_outputs>();
  const l2t_tensors tangents = direction.template record<l2t_tensors>();
  status |= l2t_cpu_grad_jvp(&rows, &in, stats.data(), &tangents, &out);
  expect("grad_jvp", d_jvp, gradient_along(f, x, v), false);
  check(name + ", status", status, 0);
}

}  // namespace

int main() {
  for (int structure = 0; structure < 3; ++structure) {
    for (int link = 0; link < 3; ++link) {
      ops_have_their_derivatives<double>(link, structure);
      ops_have_their_derivatives<float>(link, structure);
    }
  }
  return failures != 0;
}
