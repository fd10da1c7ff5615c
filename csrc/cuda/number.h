// Plain and dual numbers in the kernels: sums of products, and an activation at a pre-activation.
#pragma once

#include <type_traits>

#include "../math/activation.h"
#include "product.h"

namespace fastmeta {

template <bool kDual>
using NumberOf = std::conditional_t<kDual, Dual<float>, float>;

// What a gradient keeps of a product of two numbers: plain, all of it; dual, its tangent.
FM_DEVICE float kept(float x, float y, float sum) { return fused(x, y, sum); }
FM_DEVICE float kept(Dual<float> x, Dual<float> y, float sum) {
  return fused(x.d, y.a, fused(x.a, y.d, sum));
}
FM_DEVICE float kept(float x) { return x; }
FM_DEVICE float kept(Dual<float> x) { return x.d; }
// sum + x y
FM_DEVICE float plus_product(float sum, float x, float y) { return fused(x, y, sum); }
FM_DEVICE Dual<float> plus_product(Dual<float> sum, Dual<float> x, Dual<float> y) {
  return {fused(x.a, y.a, sum.a), kept(x, y, sum.d)};
}

// (h, φ') of one z. A sine's phase w0 z is reduced first; reduced, it is left in phase but in fp32,
// which takes polynomials. kCosine: φ' or a tangent is wanted.
template <Mode kMode, bool kCosine, Activation kKind, class Number>
FM_DEVICE void bend(Number z, float w0, Number& h, Number& slope, float& phase) {
  if constexpr (kKind == Activation::k_sine) {
    float s, c = 0;
    if constexpr (kMode == Mode::kFp32) {
      sincos_polynomial(w0 * value(z), s, c);
    } else {
      phase = reduce_turns(w0 * value(z));
      s = sine_of_reduced(phase);
      if (kCosine) c = cosine_of_reduced(phase);
    }
    along_curve(sine_curve(s, c, w0), z, h, slope);
  } else {
    activate<kKind>(z, w0, h, slope);
  }
}

// The power of two that brings the largest of some absolute values to [½, 1); 1 where it is 0.
FM_DEVICE float power_of(float largest) {
  if (!(largest > 0.0f)) return 1.0f;
  const int exponent = static_cast<int>(bits_of(largest) >> 23) - 126;
  const int clipped = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  return float_of(static_cast<uint32_t>(127 - clipped) << 23);
}

}  // namespace fastmeta
