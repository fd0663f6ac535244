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

// Central differences of a scalar function: its gradient, and the gradient of its derivative along v, at the
// given coordinates (all, if none are given); NaN elsewhere.
using Coordinates = std::vector<size_t>;

template <class F>
Point gradient(const F& f, const Point& x, Coordinates at = {}, long double h = 1e-5L) {
  Point g(x.size(), NAN);
  if (at.empty())
    for (size_t i = 0; i < x.size(); ++i) at.push_back(i);
  Point here = x;
  for (size_t i : at) {
    here[i] = x[i] + h;
    const long double up = f(here);
    here[i] = x[i] - h;
    g[i] = (up - f(here)) / (2 * h);
    here[i] = x[i];
  }
  return g;
}

template <class F>
Point gradient_along(const F& f, const Point& x, const Point& v, const Coordinates& at = {},
                     long double h = 3e-5L) {
  Point moved(x.size());
  const auto along = [&](const Point& here) {
    for (size_t i = 0; i < here.size(); ++i) moved[i] = here[i] + h * v[i];
    const long double up = f(moved);
    for (size_t i = 0; i < here.size(); ++i) moved[i] = here[i] - h * v[i];
    return (up - f(moved)) / (2 * h);
  };
  return gradient(along, x, at, h);
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
