// csrc/math against what does not share its formulas: exp and log against the C library in ULP, half precision
// against its definition, the links and the row
// against central differences, in long double, of the loss as docs/math.md section 1 defines it.
//
// Not here: structures of W, rows in memory, threads (test_ops.cpp, test_pool.cpp).
#include "../../csrc/math/link.h"
#include "../../csrc/math/num.h"
#include "../../csrc/math/row.h"
#include "check.h"

#include <algorithm>
#include <limits>

namespace {

// ---- exp, expm1, log, log1p ----

template <class T, class Wide>
double ulps(T got, Wide truth) {
  if (truth == 0) return got == 0 ? 0 : INFINITY;
  const int exponent = std::max(std::ilogb(truth), std::numeric_limits<T>::min_exponent - 1);
  const Wide ulp = std::ldexp(Wide(1), exponent - std::numeric_limits<T>::digits + 1);
  return static_cast<double>(std::fabs(Wide(got) - truth) / ulp);
}

// The worst error over every 101st float of [low, high], which are of one sign: all magnitudes, and denormal
// results.
template <class F, class Truth>
double worst_in_float(float low, float high, const F& f, const Truth& truth) {
  double worst = 0;
  const float from = std::fabs(low) < std::fabs(high) ? low : high, to = from == low ? high : low;
  for (uint32_t bits = l2t::same_bits<uint32_t>(from); bits <= l2t::same_bits<uint32_t>(to); bits += 101) {
    const float x = l2t::same_bits<float>(bits);
    const double error = ulps(f(x), truth(static_cast<double>(x)));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

template <class F, class Truth>
double worst_in_double(double low, double high, const F& f, const Truth& truth) {
  std::mt19937_64 generator(1);
  std::uniform_real_distribution<double> anywhere(low, high), small(-60, 0);
  double worst = 0;
  for (int i = 0; i < 500000; ++i) {
    double x = anywhere(generator);
    if (i % 2) x = std::fmin(std::fmax(low, std::copysign(std::exp2(small(generator)), x)), high);
    const double error = ulps(f(x), truth(static_cast<long double>(x)));
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

void functions_are_within_one_ulp() {
  const auto exp = [](auto x) { return l2t::exp(x); };
  const auto expm1 = [](auto x) { return l2t::expm1(x); };
  const auto log = [](auto x) { return l2t::log(x); };
  const auto log1p = [](auto x) { return l2t::log1p(x); };
  const auto true_exp = [](auto x) { return std::exp(x); };
  const auto true_expm1 = [](auto x) { return std::expm1(x); };
  const auto true_log = [](auto x) { return std::log(x); };
  const auto true_log1p = [](auto x) { return std::log1p(x); };
  check("exp, float, ULP below 0", worst_in_float(-150, -0.0f, exp, true_exp), 1);
  check("exp, float, ULP above 0", worst_in_float(0, 40, exp, true_exp), 1);
  check("expm1, float, ULP", worst_in_float(-150, -1e-37f, expm1, true_expm1), 1);
  check("log, float, ULP", worst_in_float(0x1p-126f, 3e38f, log, true_log), 1);
  check("log1p, float, ULP", worst_in_float(0, 1, log1p, true_log1p), 1);
  check("exp, double, ULP", worst_in_double(-745, 40, exp, true_exp), 1.1);
  check("expm1, double, ULP", worst_in_double(-745, 0, expm1, true_expm1), 1.1);
  check("log, double, ULP below 2", worst_in_double(1e-300, 2, log, true_log), 1);
  check("log, double, ULP", worst_in_double(1e-300, 1e300, log, true_log), 1);
  check("log1p, double, ULP", worst_in_double(0, 1, log1p, true_log1p), 1);
}

template <class T>
void functions_at_the_ends(const char* name) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const bool right = l2t::exp(T(0)) == 1 && l2t::exp(-inf) == 0 && std::isnan(l2t::exp(nan)) &&
                     l2t::exp(T(-800)) == 0 && l2t::expm1(-inf) == -1 && l2t::expm1(T(0)) == 0 &&
                     std::isnan(l2t::expm1(nan)) && l2t::log(T(1)) == 0 && l2t::log(inf) == inf &&
                     std::isnan(l2t::log(nan)) && l2t::log1p(T(0)) == 0 && std::isnan(l2t::log1p(nan));
  check(std::string("exp, expm1, log, log1p at 0, infinities, NaN, ") + name, right ? 0 : 1, 0);
}

// ---- half precision ----

// By its definition: sign, exponent and fraction of 1 + e + f bits.
double half_by_definition(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1,
            exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const double fraction = bits & ((1 << fraction_bits) - 1), sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
  const double significand = (exponent > 0 ? 1 : 0) + std::ldexp(fraction, -fraction_bits);
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias);
}

template <class S>
void half_precision_is_rounded_to_the_nearest(const char* name, int exponent_bits, int fraction_bits) {
  int wrong = 0;
  const auto narrowed = [](float x) {
    S half;
    l2t::narrow(x, half);
    return half.bits;
  };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double exact = half_by_definition(bits, exponent_bits, fraction_bits);
    const float wide = l2t::widen(S{static_cast<uint16_t>(bits)});
    wrong += std::isnan(exact)
                 ? !std::isnan(wide) || !std::isnan(l2t::widen(S{narrowed(wide)}))
                 : wide != exact || std::signbit(wide) != std::signbit(exact) || narrowed(wide) != bits;
    // Between this number and the next: down below the middle, up above it, to the even one at it.
    const uint32_t next = bits + 1;
    const double above = half_by_definition(next & 0xffff, exponent_bits, fraction_bits);
    if (!std::isfinite(exact) || (bits & 0x7fff) == 0x7fff || !std::isfinite(above)) continue;
    const float middle = static_cast<float>((exact + above) / 2);
    const uint32_t even = bits % 2 == 0 ? bits : next;
    wrong += narrowed(middle) != even;
    wrong += narrowed(std::nextafter(middle, static_cast<float>(exact))) != bits;
    wrong += narrowed(std::nextafter(middle, static_cast<float>(above))) != next;
  }
  check(std::string("half precision, ") + name, wrong, 0);
}

void half_precision_overflows_to_infinity() {
  l2t::float16 half;
  int wrong = 0;
  for (auto [x, bits] :
       {std::pair(65519.0f, 0x7bff), {65520.0f, 0x7c00}, {-1e30f, 0xfc00}, {-INFINITY, 0xfc00}}) {
    l2t::narrow(x, half);
    wrong += half.bits != bits;
  }
  check("half precision, overflow", wrong, 0);
}

void times_drops_only_infinities_without_weight() {
  const double inf = INFINITY, nan = NAN;
  const bool right = l2t::times(0.0, -inf) == 0 && l2t::times(0.0, inf) == 0 &&
                     l2t::times(-2.0, -inf) == inf && l2t::times(3.0, 0.5) == 1.5 &&
                     std::isnan(l2t::times(0.0, nan)) && std::isnan(l2t::times(nan, -inf));
  check("times", right ? 0 : 1, 0);
}

// ---- links ----

// Differences say something only where the function is small: sigmoid on the left, log-sigmoid on the right.
// The other side is theirs by sigmoid(u) = 1 - sigmoid(-u) and log-sigmoid(u) = log-sigmoid(-u) + u.
void links_have_their_derivatives() {
  const long double h = 1e-4L;
  for (int link = 0; link < 3; ++link) {
    double value = 0, first = 0, second = 0;
    for (long double u = -30; u <= 30; u += 0.37L) {
      const auto define = [&](long double x) { return link_by_definition(link, x); };
      const long double side = link == 1 ? u : std::copysign(u, link == 0 ? -1.0L : 1.0L);
      long double d1 = (define(side + h) - define(side - h)) / (2 * h);
      long double d2 = (define(side + h) - 2 * define(side) + define(side - h)) / (h * h);
      if (side != u && link == 0) d2 = -d2;
      if (side != u && link == 2) d1 = 1 - d1;
      const auto error = [](double got, long double truth) {
        return static_cast<double>(std::fabs(got - truth) / std::fmax(std::fabs(truth), 1e-30L));
      };
      const l2t::Phi<double> phi = l2t::phi(static_cast<l2t_link>(link), static_cast<double>(u));
      value = std::fmax(value, error(phi.value, define(u)));
      first = std::fmax(first, error(phi.first, d1));
      second = std::fmax(second, link == 1 ? std::fabs(phi.second) : error(phi.second, d2));
    }
    check(std::string(link_name(link)) + ", value", value, 1e-13);
    check(std::string(link_name(link)) + ", first derivative", first, 1e-7);
    check(std::string(link_name(link)) + ", second derivative", second, 1e-6);
  }
}

// In float32 the derivatives keep their relative precision where s (1 - s) is 0 already.
void links_do_not_cancel_in_float() {
  for (int link : {0, 2}) {
    double worst = 0;
    for (float u = -80; u <= 80; u += 0.25f) {
      const auto narrow = l2t::phi(static_cast<l2t_link>(link), u);
      const auto wide = l2t::phi(static_cast<l2t_link>(link), static_cast<double>(u));
      const auto error = [](float got, double truth) {
        return truth == 0 ? std::fabs(got) : std::fabs(got / truth - 1);
      };
      for (double e : {error(narrow.value, wide.value), error(narrow.first, wide.first),
                       error(narrow.second, wide.second)})
        worst = std::fmax(worst, e);
    }
    check(std::string(link_name(link)) + ", relative error in float", worst, 1e-6);
  }
}

void links_at_infinity() {
  const double inf = INFINITY;
  const auto is = [](l2t::Phi<double> got, double value, double first, double second) {
    return got.value == value && got.first == first && got.second == second;
  };
  const bool right =
      is(l2t::phi(L2T_SIGMOID, inf), 1, 0, 0) && is(l2t::phi(L2T_SIGMOID, -inf), 0, 0, 0) &&
      is(l2t::phi(L2T_LOG_SIGMOID, inf), 0, 0, 0) && is(l2t::phi(L2T_LOG_SIGMOID, -inf), -inf, 1, 0) &&
      is(l2t::phi(L2T_IDENTITY, -inf), -inf, 1, 0) && std::isnan(l2t::phi(L2T_LOG_SIGMOID, NAN).value) &&
      std::isnan(l2t::phi(L2T_SIGMOID, NAN).first);
  check("links at infinity and NaN", right ? 0 : 1, 0);
}

// ---- the row ----

// A point is (z [C], a [C], beta, kappa, go) of one row.
constexpr size_t C = 6;

long double loss_by_definition(int link, const Point& x) {
  const long double beta = x[2 * C], kappa = x[2 * C + 1], go = x[2 * C + 2];
  long double sum_exp = 0, u = beta;
  for (size_t j = 0; j < C; ++j) sum_exp += std::exp(x[j]);
  for (size_t j = 0; j < C; ++j) u += x[C + j] * (x[j] - std::log(sum_exp));
  return go * -kappa * link_by_definition(link, u);
}

// The smallest device there is: the sums of row.h as plain loops.
struct Row {
  l2t_link link;
  std::vector<double> z, a;
  double beta, kappa, go, R = 0;
  l2t::Stats<double> stats;

  Row(int link, const Point& x)
      : link(static_cast<l2t_link>(link)),
        z(x.begin(), x.begin() + C),
        a(x.begin() + C, x.begin() + 2 * C),
        beta(static_cast<double>(x[2 * C])),
        kappa(static_cast<double>(x[2 * C + 1])),
        go(static_cast<double>(x[2 * C + 2])) {
    double sum_exp = 0;
    const double max = *std::max_element(z.begin(), z.end());
    for (double value : z) sum_exp += l2t::sum_exp_term(value, max);
    stats = l2t::stats_before_u(max, sum_exp);
    stats.u = beta;
    for (size_t j = 0; j < C; ++j) {
      stats.u += l2t::a_log_p_term(a[j], stats.log_p(z[j]));
      R += a[j];
    }
  }

  std::vector<double> gradient() const {
    const auto head = l2t::grad_head(link, stats, kappa, go);
    std::vector<double> d(2 * C + 3);
    for (size_t j = 0; j < C; ++j) {
      d[j] = l2t::d_z(head, stats.p(z[j]), a[j], R);
      d[C + j] = l2t::d_a(head, stats.log_p(z[j]));
    }
    d[2 * C] = head.slope;
    d[2 * C + 1] = head.d_kappa;
    d[2 * C + 2] = l2t::loss(link, stats, kappa);
    return d;
  }

  std::vector<double> gradient_along(const Point& direction) const {
    const std::vector<double> v(direction.begin(), direction.end());
    l2t::Direction<double> along{};
    for (size_t j = 0; j < C; ++j) {
      along.pv += stats.p(z[j]) * v[j];
      along.av += a[j] * v[j];
      along.sum_va += v[C + j];
      along.va_log_p += l2t::a_log_p_term(v[C + j], stats.log_p(z[j]));
    }
    along.v_beta = v[2 * C], along.v_kappa = v[2 * C + 1], along.t_go = v[2 * C + 2];
    const auto head = l2t::second_head(link, stats, kappa, go, R, along);
    std::vector<double> d(2 * C + 3);
    for (size_t j = 0; j < C; ++j) {
      d[j] = l2t::d_z(head, stats.p(z[j]), a[j], R, v[j], v[C + j], along.sum_va);
      d[C + j] = l2t::d_a(head, stats.log_p(z[j]), v[j]);
    }
    d[2 * C] = head.slope;
    d[2 * C + 1] = head.d_kappa;
    d[2 * C + 2] = head.d_go;
    return d;
  }
};

void rows_have_their_derivatives() {
  for (int link = 0; link < 3; ++link) {
    double value = 0, first = 0, second = 0;
    for (int repeat = 0; repeat < 20; ++repeat) {
      const Point x = normals(2 * C + 3), v = normals(2 * C + 3);
      const auto f = [&](const Point& at) { return loss_by_definition(link, at); };
      const Row row(link, x);
      value =
          std::fmax(value, std::fabs(static_cast<double>(row.gradient()[2 * C + 2] * x[2 * C + 2] - f(x))));
      first = std::fmax(first, relative_error(row.gradient(), gradient(f, x)));
      second = std::fmax(second, relative_error(row.gradient_along(v), gradient_along(f, x, v)));
    }
    check(std::string("row, ") + link_name(link) + ", value", value, 1e-12);
    check(std::string("row, ") + link_name(link) + ", gradient", first, 1e-8);
    check(std::string("row, ") + link_name(link) + ", gradient along a direction", second, 1e-6);
  }
}

}  // namespace

int main() {
  functions_are_within_one_ulp();
  functions_at_the_ends<float>("float");
  functions_at_the_ends<double>("double");
  half_precision_is_rounded_to_the_nearest<l2t::bfloat16>("bfloat16", 8, 7);
  half_precision_is_rounded_to_the_nearest<l2t::float16>("float16", 5, 10);
  half_precision_overflows_to_infinity();
  times_drops_only_infinities_without_weight();
  links_have_their_derivatives();
  links_do_not_cancel_in_float();
  links_at_infinity();
  rows_have_their_derivatives();
  return failures != 0;
}
