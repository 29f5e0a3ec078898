// What torch computes in float32: its `scalar ** tensor` on an x86-64 CPU, bit for bit, for the table that must equal
// transformers' own. torch takes whole blocks of 32 through SLEEF's vector power (1.0 units in the last place; the
// algorithm and its coefficients are those of SLEEF's powf_u10, Boost licence) and the rest through the C library's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

namespace ropewalk {
// One rounding at a time, as torch does in float32.
inline float F(double value) { return static_cast<float>(value); }
inline double D(float value) { return value; }

namespace torch_pow {

struct Pair {  // an unevaluated sum of two floats
  float hi, lo;
};

inline Pair TwoSum(float a, float b) {
  const float sum = a + b, part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}
inline Pair FastTwoSum(float a, float b) {
  const float sum = a + b;
  return {sum, a - sum + b};
}
inline Pair Normalize(Pair a) {
  const float sum = a.hi + a.lo;
  return {sum, a.hi - sum + a.lo};
}
inline Pair AddFast(Pair a, Pair b) {  // |a| >= |b|
  const float sum = a.hi + b.hi;
  return {sum, a.hi - sum + b.hi + a.lo + b.lo};
}
inline Pair AddFast(float a, Pair b) {
  const float sum = a + b.hi;
  return {sum, a - sum + b.hi + b.lo};
}
inline Pair Add(Pair a, Pair b) {
  const Pair sum = TwoSum(a.hi, b.hi);
  return {sum.hi, sum.lo + (a.lo + b.lo)};
}
inline Pair Add(Pair a, float b) {
  const Pair sum = TwoSum(a.hi, b);
  return {sum.hi, sum.lo + a.lo};
}
inline Pair Multiply(Pair a, Pair b) {
  const float product = a.hi * b.hi;
  return {product, std::fma(a.hi, b.lo, std::fma(a.lo, b.hi, std::fma(a.hi, b.hi, -product)))};
}
inline Pair Multiply(Pair a, float b) {
  const float product = a.hi * b;
  return {product, std::fma(a.lo, b, std::fma(a.hi, b, -product))};
}
inline Pair Square(Pair a) {
  const float square = a.hi * a.hi;
  return {square, std::fma(a.hi + a.hi, a.lo, std::fma(a.hi, a.hi, -square))};
}
inline Pair Divide(Pair n, Pair d) {
  const float t = 1.0f / d.hi, s = n.hi * t;
  const float u = std::fma(t, n.hi, -s);
  const float v = std::fma(-d.lo, t, std::fma(-d.hi, t, 1.0f));
  return {s, std::fma(s, v, std::fma(n.lo, t, u))};
}

inline Pair Log(float d) {
  const int e = std::ilogb(d * (1.0f / 0.75f));
  const float m = std::ldexp(d, -e);
  const Pair x = Divide(TwoSum(-1.0f, m), TwoSum(1.0f, m));
  const Pair x2 = Square(x);
  float t = 0.240320354700088500976562f;
  t = std::fma(t, x2.hi, 0.285112679004669189453125f);
  t = std::fma(t, x2.hi, 0.400007992982864379882812f);
  const Pair c{0.66666662693023681640625f, 3.69183861259614332084311e-09f};
  Pair s = Multiply(Pair{0.69314718246459960938f, -1.904654323148236017e-09f}, static_cast<float>(e));
  s = AddFast(s, Pair{x.hi * 2, x.lo * 2});
  return AddFast(s, Multiply(Multiply(x2, x), Add(Multiply(x2, t), c)));
}

inline float Exp(Pair d) {
  const float q = std::nearbyint((d.hi + d.lo) * 1.442695040888963407359924681001892137426645954152985934135449406931f);
  Pair s = Add(d, q * -0.693145751953125f);
  s = Add(s, q * -1.428606765330187045e-06f);
  s = Normalize(s);
  float u = 0.00136324646882712841033936f;
  u = std::fma(u, s.hi, 0.00836596917361021041870117f);
  u = std::fma(u, s.hi, 0.0416710823774337768554688f);
  u = std::fma(u, s.hi, 0.166665524244308471679688f);
  u = std::fma(u, s.hi, 0.499999850988388061523438f);
  Pair t = AddFast(s, Multiply(Square(s), u));
  t = AddFast(1.0f, t);
  return std::ldexp(t.hi + t.lo, static_cast<int>(q));
}

inline float Vector(float base, float exponent) { return Exp(Multiply(Log(base), exponent)); }

}  // namespace torch_pow

// Replaces each of the exponents by base to it; base > 0.
inline void TorchPow(float base, float* exponents, int64_t count) {
  constexpr int64_t kBlock = 32;  // two AVX-512 vectors, or four of AVX2
  const int64_t vectors = count - count % kBlock;
  for (int64_t i = 0; i < count; ++i) {
    exponents[i] = i < vectors ? torch_pow::Vector(base, exponents[i]) : std::pow(base, exponents[i]);
  }
}

}  // namespace ropewalk
