// Activations: z -> h = φ(z) and the slope φ'(z), over plain and dual numbers; φ'' enters as the
// slope's tangent.
//
//   sine sin(w0 z) · relu max(z,0) · tanh · sigmoid s · softplus log(1+e^z) · gelu z Φ(z)
//   silu z s(z) · none z
//
// ReLU has slope 0 at the kink. The lists are those of abi.h.
#pragma once

#include "../abi.h"
#include "dual.h"

namespace fastmeta {

template <class S>
struct Curve {
  S value, first, second;  // φ, φ', φ''
};

template <class S>
FM_HOST_DEVICE S sigmoid(S z) {
  return S(1) / (S(1) + exp(-z));
}

// The sine's, from s = sin(w0 z) and c = cos(w0 z).
template <class S>
FM_HOST_DEVICE Curve<S> sine_curve(S s, S c, S w0) {
  return {s, w0 * c, -(w0 * w0) * s};
}

template <Activation kKind, class S>
FM_HOST_DEVICE Curve<S> curve(S z, S w0) {
  const S one(1), zero(0);
  if constexpr (kKind == Activation::k_sine) {
    S s, c;
    sincos(w0 * z, s, c);
    return sine_curve(s, c, w0);
  } else if constexpr (kKind == Activation::k_relu) {
    const auto alive = z > zero;
    return {select(z < zero, zero, z), select(alive, one, zero), zero};  // a NaN stays a NaN
  } else if constexpr (kKind == Activation::k_tanh) {
    const S t = tanh(z), first = one - t * t;
    return {t, first, S(-2) * t * first};
  } else if constexpr (kKind == Activation::k_sigmoid) {
    const S s = sigmoid(z), first = s * (one - s);
    return {s, first, first * (one - S(2) * s)};
  } else if constexpr (kKind == Activation::k_softplus) {
    const S s = sigmoid(z), m = select(z > zero, z, zero);
    return {m + log1p(exp(-abs(z))), s, s * (one - s)};
  } else if constexpr (kKind == Activation::k_gelu) {
    const S normal = S(0.39894228040143267794) * exp(S(-0.5) * z * z);
    const S cdf = S(0.5) * erfc(S(-0.70710678118654752440) * z);
    return {z * cdf, cdf + z * normal, normal * (S(2) - z * z)};
  } else if constexpr (kKind == Activation::k_silu) {
    const S s = sigmoid(z), first = s * (one - s);
    return {z * s, s + z * first, first * (S(2) + z * (one - S(2) * s))};
  } else {
    return {z, one, zero};
  }
}

template <Activation kKind, class S>
FM_HOST_DEVICE void activate(S z, S w0, S& h, S& slope) {
  const Curve<S> c = curve<kKind>(z, w0);
  h = c.value;
  slope = c.first;
}

// h and φ' as numbers of z's kind, from the curve at z's value.
template <class S>
FM_HOST_DEVICE void along_curve(const Curve<S>& c, S, S& h, S& slope) {
  h = c.value;
  slope = c.first;
}
template <class S>
FM_HOST_DEVICE void along_curve(const Curve<S>& c, Dual<S> z, Dual<S>& h, Dual<S>& slope) {
  h = {c.value, c.first * z.d};
  slope = {c.first, c.second * z.d};
}

template <Activation kKind, class S>
FM_HOST_DEVICE void activate(Dual<S> z, S w0, Dual<S>& h, Dual<S>& slope) {
  along_curve(curve<kKind>(z.a, w0), z, h, slope);
}

// An output activation is one of the hidden ones; linear is none.
FM_HOST_DEVICE constexpr Activation hidden_twin(Output output) {
  switch (output) {
    case Output::k_relu:
      return Activation::k_relu;
    case Output::k_tanh:
      return Activation::k_tanh;
    case Output::k_sigmoid:
      return Activation::k_sigmoid;
    case Output::k_softplus:
      return Activation::k_softplus;
    default:
      return Activation::k_none;
  }
}

// Calls f with the activation as a compile-time constant, f(tag) with tag.kValue.
template <Activation kKind>
struct ActivationTag {
  static constexpr Activation kValue = kKind;
};
template <class F>
FM_HOST_DEVICE void with_activation(Activation kind, F&& f) {
  switch (kind) {
#define FM_CASE(name)        \
  case Activation::k_##name: \
    return f(ActivationTag<Activation::k_##name>{});
    FM_ACTIVATIONS(FM_CASE)
#undef FM_CASE
  }
}
// The same for an output activation, by its twin among the hidden ones.
template <class F>
FM_HOST_DEVICE void with_output(Output kind, F&& f) {
  switch (kind) {
#define FM_CASE(name)    \
  case Output::k_##name: \
    return f(ActivationTag<hidden_twin(Output::k_##name)>{});
    FM_OUTPUTS(FM_CASE)
#undef FM_CASE
  }
}

}  // namespace fastmeta
