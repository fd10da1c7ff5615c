// Pack<T>: one SIMD register of float or double, for the instruction set this file is compiled for.
//
// GCC vector extensions only, so that one source serves SSE2, AVX2, AVX-512 and NEON. float has
// vector versions of the elementary functions, good to about one rounding of float32; double takes
// libm lane by lane (it is there to check gradients).
#pragma once

#include <type_traits>

#include "../math/scalar.h"

#if !defined(FM_ISA) || !defined(FM_VECTOR_BYTES)
#error "compile one of cpu/isa_*.cpp"
#endif

namespace fastmeta {
namespace FM_ISA {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(FM_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FM_VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(FM_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
struct Pack {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  static constexpr int kLanes = FM_VECTOR_BYTES / sizeof(T);
  V v;

  Pack() = default;
  FM_HOST_DEVICE Pack(V x) : v(x) {}
  FM_HOST_DEVICE Pack(T x) : v(x - V{}) {}
  template <class N>
  FM_HOST_DEVICE explicit Pack(N x) : v(static_cast<T>(x) - V{}) {}
};

#define FM_PACK      \
  template <class T> \
  FM_HOST_DEVICE
FM_PACK Pack<T> load(const T* p) {
  return Pack<T>(*reinterpret_cast<const typename Pack<T>::V*>(p));
}
FM_PACK Pack<T> load_unaligned(const T* p) {
  return Pack<T>((typename Pack<T>::V)(*reinterpret_cast<const typename Lanes<T>::U*>(p)));
}
FM_PACK void store(T* p, Pack<T> x) { *reinterpret_cast<typename Pack<T>::V*>(p) = x.v; }

FM_PACK Pack<T> operator+(Pack<T> x, Pack<T> y) { return x.v + y.v; }
FM_PACK Pack<T> operator-(Pack<T> x, Pack<T> y) { return x.v - y.v; }
FM_PACK Pack<T> operator*(Pack<T> x, Pack<T> y) { return x.v * y.v; }
FM_PACK Pack<T> operator/(Pack<T> x, Pack<T> y) { return x.v / y.v; }
FM_PACK Pack<T> operator-(Pack<T> x) { return -x.v; }

template <class T>
struct Mask {
  typename Pack<T>::I bits;
};
FM_PACK Mask<T> operator>(Pack<T> x, Pack<T> y) { return {(typename Pack<T>::I)(x.v > y.v)}; }
FM_PACK Mask<T> operator<(Pack<T> x, Pack<T> y) { return {(typename Pack<T>::I)(x.v < y.v)}; }
FM_PACK Pack<T> select(Mask<T> m, Pack<T> x, Pack<T> y) {
  return Pack<T>((typename Pack<T>::V)(m.bits ? x.v : y.v));
}
FM_PACK Pack<T> abs(Pack<T> x) { return select(x < Pack<T>(T(0)), -x, x); }
FM_PACK T sum(Pack<T> x) {  // lanes in order
  T s = 0;
  for (int i = 0; i < Pack<T>::kLanes; ++i) s += x.v[i];
  return s;
}
// Lanes first..: 0, 1, 2, …
FM_PACK Mask<T> below(int64_t count) {
  typename Pack<T>::I b;
  for (int i = 0; i < Pack<T>::kLanes; ++i) b[i] = i < count ? -1 : 0;
  return {b};
}
#undef FM_PACK

// double: libm, lane by lane ---

#define FM_EACH(name)                                                                       \
  FM_HOST_DEVICE Pack<double> name(Pack<double> x) {                                        \
    for (int i = 0; i < Pack<double>::kLanes; ++i) x.v[i] = fastmeta::name(double(x.v[i])); \
    return x;                                                                               \
  }
FM_EACH(exp)
FM_EACH(expm1)
FM_EACH(log1p)
FM_EACH(tanh)
FM_EACH(erfc)
FM_EACH(sqrt)
#undef FM_EACH
FM_HOST_DEVICE void sincos(Pack<double> x, Pack<double>& s, Pack<double>& c) {
  for (int i = 0; i < Pack<double>::kLanes; ++i) {
    s.v[i] = ::sin(x.v[i]);
    c.v[i] = ::cos(x.v[i]);
  }
}

// float ---

using F = Pack<float>;
using FV = F::V;
using FI = F::I;

// Horner, lowest coefficient first.
FM_HOST_DEVICE FV horner(FV, float c0) { return c0 - FV{}; }
template <class... C>
FM_HOST_DEVICE FV horner(FV x, float c0, C... rest) {
  return horner(x, rest...) * x + c0;
}

FM_HOST_DEVICE F sqrt(F x) {
  for (int i = 0; i < F::kLanes; ++i) x.v[i] = __builtin_sqrtf(x.v[i]);
  return x;
}

// Largest |x| that sincos of packs reduces well. Callers watch their phases (Reach) and take the
// scalar functions for what is farther out, NaN and infinity included; a test per pack inside the
// loop costs a fifth of its time.
constexpr float kPhaseLimit = 16384.0f;

template <class T>
struct Reach {  // libm reaches everywhere
  FM_HOST_DEVICE void see(Pack<T>) {}
  FM_HOST_DEVICE bool beyond(T) const { return false; }
};
template <>
struct Reach<float> {
  FI largest{};  // bits of |x|, whose order is that of the numbers, with infinity and NaN above all
  FM_HOST_DEVICE void see(F x) {
    const FI bits = (FI)x.v & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  FM_HOST_DEVICE bool beyond(float limit) const {
    for (int i = 0; i < F::kLanes; ++i) {
      const int32_t bits = largest[i];
      float x;
      __builtin_memcpy(&x, &bits, sizeof(x));
      if (!(x <= limit)) return true;
    }
    return false;
  }
};

// r = x − kπ/2 in [−π/4, π/4]; the quadrant k mod 4 swaps sine and cosine and sets their signs.
// With fused multiply-add, x − k·hi is exact; without, π/2 comes in parts of 11 bits whose products
// with k are exact. Minimax polynomials, 1.8e-9 and 5e-11. (Reducing by π instead saves the swap,
// needs two more terms, and misses 1e-7.)
FM_HOST_DEVICE void sincos(F phase, F& s, F& c) {
  const FV x = phase.v;
  const FV shifted =
      x * 0x1.45f306p-1f + 0x1.8p+23f;  // round(2x/π) in the low bits of the mantissa
  const FV k = shifted - 0x1.8p+23f;
  FV r;
  if constexpr (kHasFma) {
    r = x - k * 0x1.921fb6p+0f;
    r = r - k * -0x1.777a5cp-25f;
  } else {
    r = x - k * 0x1.92p+0f;
    r = r - k * 0x1.fb4p-12f;
    r = r - k * 0x1.444p-24f;
    r = r - k * 0x1.68cp-39f;
  }
  const FV q = r * r;
  const FV sine = r + r * q * horner(q, -0.166666508f, 0.0083319759f, -0.000194952867f);
  const FV cosine = horner(q, 1.0f, -0.5f, 0.0416666232f, -0.001388676f, 2.43900395e-05f);
  const FI quadrant = (FI)shifted, swap = (quadrant & 1) != 0;
  s = F((FV)((FI)(swap ? cosine : sine) ^ ((quadrant & 2) << 30)));
  c = F((FV)((FI)(swap ? sine : cosine) ^ (((quadrant + 1) & 2) << 30)));
}

// 2^k for integer-valued k in [-250, 250], in two factors, so that results may be subnormal or
// infinite.
FM_HOST_DEVICE void scale_parts(FV k, FV& a, FV& b) {
  const FI whole = __builtin_convertvector(k, FI), half = whole >> 1;
  a = (FV)((half + 127) << 23);
  b = (FV)((whole - half + 127) << 23);
}

// k = round(x / ln 2), r = x − k ln 2, expm1(r) by a minimax polynomial (1.3e-8 relative).
FM_HOST_DEVICE void exp_parts(FV x, FV& p, FV& a, FV& b) {
  x = x > 120.0f ? FV{} + 120.0f : x;
  x = x < -120.0f ? FV{} - 120.0f : x;
  const FV k = (x * 0x1.715476p+0f + 0x1.8p+23f) - 0x1.8p+23f;
  FV r = x - k * 0x1.62e4p-1f;  // 15 bits: exact
  r = r - k * 0x1.7f7d1cp-20f;
  p = r + r * r * horner(r, 0.5f, 0.166665435f, 0.0416662805f, 0.00836661085f, 0.00139464904f);
  scale_parts(k, a, b);
}
FM_HOST_DEVICE F exp(F x) {
  FV p, a, b;
  exp_parts(x.v, p, a, b);
  return F((p * a + a) * b);
}
FM_HOST_DEVICE F expm1(F x) {
  FV p, a, b;
  exp_parts(x.v, p, a, b);
  const FV scale = a * b;  // for x > 88 both parts reach infinity
  return select(F(scale) > F(1e38f), F(FV{} + INFINITY), F(p * scale + (scale - 1.0f)));
}
// e / (e + 2), e = expm1(2|x|); as 1 − 2 / (e + 2) where e > 1, which rounds once near 1.
FM_HOST_DEVICE F tanh(F x) {
  const F size = abs(x), e = expm1(select(size > F(15.0f), F(30.0f), size + size));
  const auto large = e > F(1.0f);
  const F ratio = select(large, F(2.0f), e) / (e + F(2.0f));
  const F t = select(large, F(1.0f) - ratio, ratio);
  return select(x < F(0.0f), -t, t);
}
// For u in [0, 1]: 2 atanh(w), w = u / (2 + u) <= 1/3.
FM_HOST_DEVICE F log1p(F u) {
  const FV w = u.v / (u.v + 2.0f), q = w * w;
  return F(
      2.0f *
      (w + w * q * horner(q, 0.333333373f, 0.19999437f, 0.143085182f, 0.107129246f, 0.121541657f)));
}
// exp(−x²) Q(t), t = (|x| − 2) / (|x| + 2), Q minimax to 6e-9 relative on [0, 10.2]; 2 − that for x
// < 0.
FM_HOST_DEVICE F erfc(F x) {
  const F size = select(abs(x) > F(10.1f), F(10.1f), abs(x));
  const FV t = (size.v - 2.0f) / (size.v + 2.0f);
  const FV q = horner(t, 0.255395681f, -0.427185863f, 0.241658255f, -0.0789779946f, 0.0037316978f,
                      0.00699244486f, -0.000840866356f, -0.000962623046f, 3.27601992e-05f,
                      0.000138116797f, 2.65396611e-05f);
  const F tail = F(q) * exp(-(size * size));
  return select(x < F(0.0f), F(2.0f) - tail, tail);
}

}  // namespace FM_ISA
}  // namespace fastmeta
