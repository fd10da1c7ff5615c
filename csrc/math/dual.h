// Dual numbers a + ε d, ε² = 0: run a gradient on them and its tangent is the Hessian-vector
// product.
#pragma once

#include "scalar.h"

namespace fastmeta {

template <class S>
struct Dual {
  S a, d;
};

// The value of a number, and a number with a given value and no tangent.
template <class S>
FM_HOST_DEVICE const S& value(const S& x) {
  return x;
}
template <class S>
FM_HOST_DEVICE const S& value(const Dual<S>& x) {
  return x.a;
}

#define FM_DUAL      \
  template <class S> \
  FM_HOST_DEVICE
FM_DUAL Dual<S> operator+(Dual<S> x, Dual<S> y) { return {x.a + y.a, x.d + y.d}; }
FM_DUAL Dual<S> operator-(Dual<S> x, Dual<S> y) { return {x.a - y.a, x.d - y.d}; }
FM_DUAL Dual<S> operator*(Dual<S> x, Dual<S> y) { return {x.a * y.a, x.d * y.a + x.a * y.d}; }
FM_DUAL Dual<S> operator+(Dual<S> x, S y) { return {x.a + y, x.d}; }
FM_DUAL Dual<S> operator-(Dual<S> x, S y) { return {x.a - y, x.d}; }
FM_DUAL Dual<S> operator*(Dual<S> x, S y) { return {x.a * y, x.d * y}; }
FM_DUAL Dual<S> operator*(S x, Dual<S> y) { return {x * y.a, x * y.d}; }
FM_DUAL Dual<S> operator-(Dual<S> x) { return {-x.a, -x.d}; }

// y = f(x) with f'(x) = slope.
FM_DUAL Dual<S> chain(Dual<S> x, S y, S slope) { return {y, slope * x.d}; }
// Where mask, x; else the constant c.
template <class M, class S>
FM_HOST_DEVICE Dual<S> keep_where(M mask, Dual<S> x, S c) {
  return {select(mask, x.a, c), select(mask, x.d, c - c)};
}
template <class M, class S>
FM_HOST_DEVICE S keep_where(M mask, S x, S c) {
  return select(mask, x, c);
}
#undef FM_DUAL

}  // namespace fastmeta
