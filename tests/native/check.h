// The whole test framework of tests/native: a check prints one line and is counted, main returns failures !=
// 0; random numbers; and the definition of the links in long double, which shares nothing with csrc/.
#ifndef L2T_TESTS_CHECK_H
#define L2T_TESTS_CHECK_H

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

inline int failures = 0;

// Passes if error <= bound; NaN fails.
inline void check(const std::string& what, double error, double bound) {
  const bool passed = error <= bound;
  failures += !passed;
  std::printf("%s %s: %.3g (bound %.3g)\n", passed ? "ok  " : "FAIL", what.c_str(), error, bound);
}

inline double normal() {
  static std::mt19937_64 generator(20260101);
  return std::normal_distribution<double>()(generator);
}

using Point = std::vector<long double>;

inline Point normals(size_t count, double scale = 1) {
  Point x(count);
  for (auto& value : x) value = scale * normal();
  return x;
}

inline const char* link_name(int link) {
  return link == 0 ? "sigmoid" : link == 1 ? "identity" : "log-sigmoid";
}

inline long double link_by_definition(int link, long double u) {
  if (link == 0) return 1 / (1 + std::exp(-u));
  return link == 1 ? u : -std::log1p(std::exp(-u));
}

// Central differences of a scalar function: its gradient, and the gradient of its derivative along v.
template <class F>
Point gradient(const F& f, const Point& x, long double h = 1e-5L) {
  Point g(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    Point up = x, down = x;
    up[i] += h, down[i] -= h;
    g[i] = (f(up) - f(down)) / (2 * h);
  }
  return g;
}

template <class F>
Point gradient_along(const F& f, const Point& x, const Point& v, long double h = 3e-5L) {
  const auto along = [&](const Point& at) {
    Point up = at, down = at;
    for (size_t i = 0; i < at.size(); ++i) up[i] += h * v[i], down[i] -= h * v[i];
    return (f(up) - f(down)) / (2 * h);
  };
  return gradient(along, x, h);
}

// Largest difference, relative to the largest entry of the truth.
template <class Vector>
double relative_error(const Vector& got, const Point& truth) {
  long double worst = 0, size = 1e-3L;
  for (size_t i = 0; i < truth.size(); ++i) {
    const long double error = std::fabs(static_cast<long double>(got[i]) - truth[i]);
    worst = error > worst || std::isnan(error) ? error : worst;
    size = std::fabs(truth[i]) > size ? std::fabs(truth[i]) : size;
    if (std::isnan(worst)) break;
  }
  return static_cast<double>(worst / size);
}

#endif
