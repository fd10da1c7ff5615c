// Elementwise losses ℓ(y, t) and slopes dℓ/dy: mse (y−t)², l1 |y−t|, clamped |clip(y) − clip(t)|.
//
// The slope is 0 at every kink. A task's loss is the mean over its valid points and channels.
#pragma once

#include "../abi.h"
#include "dual.h"

namespace fastmeta {

template <class S>
FM_HOST_DEVICE S sign(S x) {
  return select(x > S(0), S(1), select(x < S(0), S(-1), x * S(0)));  // a NaN stays a NaN
}

template <class S>
FM_HOST_DEVICE S clip(S x, S c) {
  return select(x > c, c, select(x < -c, -c, x));
}

template <class S>
FM_HOST_DEVICE S l1_slope(S y, S target, S clamp, S& ell) {
  const S difference = clip(y, clamp) - clip(target, clamp);
  ell = abs(difference);
  return select(abs(y) < clamp, sign(difference), difference * S(0));
}

// clamp is infinite where there is none.
template <class S>
FM_HOST_DEVICE void loss_terms(Loss kind, S clamp, S y, S target, S& ell, S& slope) {
  if (kind == Loss::k_mse) {
    const S difference = y - target;
    ell = difference * difference;
    slope = S(2) * difference;
  } else {
    slope = l1_slope(y, target, clamp, ell);
  }
}

template <class S>
FM_HOST_DEVICE void loss_terms(Loss kind, S clamp, Dual<S> y, S target, S& ell, Dual<S>& slope) {
  S first;
  loss_terms(kind, clamp, y.a, target, ell, first);
  slope = {first, kind == Loss::k_mse ? S(2) * y.d : S(0) * y.d};
}

}  // namespace fastmeta
