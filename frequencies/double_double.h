// Arithmetic on unevaluated sums of two doubles (about 104 bits), for frequencies: a double's 2^-53 of a frequency near
// 1 is already 2^-22 of a radian at position 2^31. Only what frequencies.cc needs; same bits on every platform.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

namespace ropewalk {

struct DoubleDouble {
  double hi = 0, lo = 0;

  DoubleDouble() = default;
  DoubleDouble(double value) : hi(value) {}  // NOLINT: a double is one
  DoubleDouble(double high, double low) : hi(high), lo(low) {}

  explicit operator double() const { return hi + lo; }
  explicit operator long double() const { return static_cast<long double>(hi) + static_cast<long double>(lo); }
};

// The sum without loss (Knuth); `Fast` needs |a| >= |b| (Dekker).
inline DoubleDouble TwoSum(double a, double b) {
  const double sum = a + b, part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}
inline DoubleDouble FastTwoSum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

inline DoubleDouble operator-(DoubleDouble a) { return {-a.hi, -a.lo}; }
inline DoubleDouble operator+(DoubleDouble a, DoubleDouble b) {
  DoubleDouble high = TwoSum(a.hi, b.hi);
  const DoubleDouble low = TwoSum(a.lo, b.lo);
  high = FastTwoSum(high.hi, high.lo + low.hi);
  return FastTwoSum(high.hi, high.lo + low.lo);
}
inline DoubleDouble operator-(DoubleDouble a, DoubleDouble b) { return a + -b; }
inline DoubleDouble operator*(DoubleDouble a, DoubleDouble b) {
  const double product = a.hi * b.hi;
  const double rest = std::fma(a.hi, b.hi, -product);
  return FastTwoSum(product, rest + (a.hi * b.lo + a.lo * b.hi));
}
inline DoubleDouble operator/(DoubleDouble a, DoubleDouble b) {
  const double first = a.hi / b.hi;
  DoubleDouble rest = a - b * first;
  const double second = rest.hi / b.hi;
  rest = rest - b * second;
  return FastTwoSum(first, second) + rest.hi / b.hi;
}
inline bool operator<(DoubleDouble a, DoubleDouble b) { return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo); }
inline bool operator>(DoubleDouble a, DoubleDouble b) { return b < a; }

inline DoubleDouble Floor(DoubleDouble a) {
  const double high = std::floor(a.hi);
  return high == a.hi ? FastTwoSum(high, std::floor(a.lo)) : DoubleDouble(high);
}

inline const DoubleDouble kLn2{0x1.62e42fefa39efp-1, 0x1.abc9e3b39803fp-56};
inline const DoubleDouble kTwoPi{0x1.921fb54442d18p+2, 0x1.1a62633145c07p-52};
inline const DoubleDouble kInverseTwoPi{0x1.45f306dc9c883p-3, -0x1.6b01ec5417056p-57};

// e^a for |a| < 700: a Taylor series for e^r - 1 of r = (a - k ln 2) / 512, then nine doublings of the angle, which
// keep the 1 apart so that nothing is lost to it.
inline DoubleDouble Exp(DoubleDouble a) {
  const double k = std::nearbyint(a.hi / kLn2.hi);
  const DoubleDouble scaled = a - kLn2 * k;
  const DoubleDouble r{std::ldexp(scaled.hi, -9), std::ldexp(scaled.lo, -9)};
  DoubleDouble term = r, sum = r;
  for (int n = 2; n <= 11; ++n) {  // |r| < 2^-10.5: the next term is below 2^-150
    term = term * r / static_cast<double>(n);
    sum = sum + term;
  }
  for (int n = 0; n < 9; ++n) sum = sum * 2.0 + sum * sum;
  sum = sum + 1.0;
  const int exponent = static_cast<int>(k);
  return {std::ldexp(sum.hi, exponent), std::ldexp(sum.lo, exponent)};
}

// ln a for a > 0: a double's logarithm, then one Newton step, whose own error is cubic.
inline DoubleDouble Log(DoubleDouble a) {
  const DoubleDouble guess = std::log(a.hi);
  const DoubleDouble error = a * Exp(-guess) - 1.0;
  return guess + (error - error * error * 0.5);
}

}  // namespace ropewalk
