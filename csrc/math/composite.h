// Alpha compositing along a ray, in steps that run on scalars, packs and duals of both.
//
//   s = ρ(raw_3), c = sigmoid(raw_0..2), τ = s δ, e = exp(−τ), α = −expm1(−τ),
//   f = min(1, e + 1e-10), T_1 = 1, T_{i+1} = T_i f_i, w = T α;
//   rgb = Σ w c + β (1 − Σ w), depth = Σ w t, acc = Σ w
//
// Back, without division, G_{S+1} = 0: w̄ = ⟨r̄gb, c−β⟩ + d̄epth t + ācc, k_i = w̄_i − m_i G_{i+1},
// G_i = α_i w̄_i + f_i G_{i+1}, τ̄ = T e k; m = [α > 1e-10] is where the clamp in f passes a
// derivative.
#pragma once

#include "activation.h"

namespace fastmeta {

// The plain number below a dual one: Pack for Dual<Pack>.
template <class S>
struct PlainOf {
  using type = S;
};
template <class S>
struct PlainOf<Dual<S>> {
  using type = S;
};
template <class S>
using Plain = typename PlainOf<S>::type;

template <class S>
FM_HOST_DEVICE void interval_terms(S s, S delta, S& e, S& alpha, S& f, Plain<S>& mask) {
  const S tau = s * delta;
  const Plain<S> decay = exp(-value(tau)), one(1);
  if constexpr (sizeof(S) == sizeof(Plain<S>)) {
    e = decay;
    alpha = -expm1(-tau);
  } else {
    e = chain(tau, decay, -decay);
    alpha = chain(tau, -expm1(-tau.a), decay);
  }
  const auto alive = value(alpha) > Plain<S>(1e-10);
  mask = select(alive, one, one - one);
  f = keep_where(alive, e + Plain<S>(1e-10), one);
}

template <class S>
FM_HOST_DEVICE void density_terms(bool softplus, S raw, S& s, S& slope) {
  if (softplus) {
    activate<Activation::k_softplus>(raw, Plain<S>(1), s, slope);
  } else {
    activate<Activation::k_relu>(raw, Plain<S>(1), s, slope);
  }
}

// One step of the scan from the back: returns k_i and moves G on.
template <class S>
FM_HOST_DEVICE S march_back(S& G, S gw, S alpha, S f, Plain<S> mask) {
  const S k = gw - G * mask;
  G = alpha * gw + f * G;
  return k;
}

}  // namespace fastmeta
