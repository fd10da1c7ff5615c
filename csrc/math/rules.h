// Inner rules, elementwise over any number type: the step θ' = θ − α u, and its adjoint for the
// walk back.
//
//   sgd       u = g
//   momentum  g' = g + ω θ, b' = μ b + g', u = b' (Nesterov: g' + μ b')
//   adam      m' = β1 m + (1−β1) g, v' = β2 v + (1−β2) g², u = m' / (c1 (√(v'/c2) + ε)),
//             c_i = 1 − β_i^n, n = k+1
//
// The adjoints are those of the chain rule with the square root's derivative 0 at v = 0, where it
// is exact.
#pragma once

#include "../abi.h"
#include "scalar.h"

namespace fastmeta {

// A rule's numbers at step k, in the arithmetic of S.
template <class S>
struct RuleAt {
  RuleKind kind;
  bool nesterov, first;  // first: k = 0, where the state is still zero
  S mu, decay, beta1, beta2, gain1, gain2, eps, c1, c2;  // gain_i = 1 − β_i, rounded once
};

template <class S>
FM_HOST_DEVICE RuleAt<S> rule_at(const Rule& r, int64_t k) {
  const double n = static_cast<double>(k + 1);
  return {r.kind == RuleKind::k_meta_sgd ? RuleKind::k_sgd : r.kind,
          r.nesterov != 0,
          k == 0,
          S(r.mu),
          S(r.weight_decay),
          S(r.beta1),
          S(r.beta2),
          S(1.0 - r.beta1),
          S(1.0 - r.beta2),
          S(r.eps),
          S(1.0 - ::pow(r.beta1, n)),
          S(1.0 - ::pow(r.beta2, n))};
}

// The update u, from the gradient and the state (s0, s1), which moves on in place.
template <class S>
FM_HOST_DEVICE S rule_step(const RuleAt<S>& r, S theta, S g, S& s0, S& s1) {
  if (r.kind == RuleKind::k_sgd) return g;
  if (r.kind == RuleKind::k_momentum) {
    g = g + r.decay * theta;
    s0 = r.first ? g : r.mu * s0 + g;
    return r.nesterov ? g + r.mu * s0 : s0;
  }
  s0 = r.first ? r.gain1 * g : r.beta1 * s0 + r.gain1 * g;
  s1 = r.first ? r.gain2 * g * g : r.beta2 * s1 + r.gain2 * g * g;
  return s0 / (r.c1 * (sqrt(s1 / r.c2) + r.eps));
}

// From ū = −α λ' and the adjoint (a0, a1) of the state after the step: ḡ; the adjoint becomes that
// of the state before. g is the step's gradient, (m, v) the state after it; both are read by adam
// only.
template <class S>
FM_HOST_DEVICE S rule_adjoint(const RuleAt<S>& r, S ubar, S g, S m, S v, S& a0, S& a1) {
  if (r.kind == RuleKind::k_sgd) return ubar;
  if (r.kind == RuleKind::k_momentum) {
    const S b = a0 + (r.nesterov ? r.mu * ubar : ubar);
    a0 = r.mu * b;
    return r.nesterov ? b + ubar : b;
  }
  const S gain1 = r.gain1, gain2 = S(2) * r.gain2 * g;
  if (r.first) {  // the two paths of ū nearly cancel at n = 1; their sum in closed form
    const S d = abs(g) + r.eps;
    return ubar * r.eps / (d * d) + gain1 * a0 + gain2 * a1;
  }
  const S root = sqrt(v / r.c2), d = root + r.eps;
  const auto alive = root > S(0);
  const S mbar = a0 + ubar / (r.c1 * d);
  const S through = a1 - ubar * m / (S(2) * r.c1 * r.c2 * d * d * select(alive, root, S(1)));
  const S vbar = select(alive, through, S(0));
  a0 = r.beta1 * mbar;
  a1 = r.beta2 * vbar;
  return gain1 * mbar + gain2 * vbar;
}

}  // namespace fastmeta
