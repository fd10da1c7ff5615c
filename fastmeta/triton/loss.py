"""Losses of points and rays, in kernels, over pairs (value, tangent).

    mse (y−t)² · l1 |y−t| · clamped l1 |clip(y, ±clamp) − clip(t, ±clamp)|

Derivative 0 at the kinks. The list is ``batch.LOSSES``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _clip(a, CLAMP: tl.constexpr):
    """a in [−CLAMP, CLAMP]; a NaN stays a NaN."""
    high = tl.full(a.shape, CLAMP, a.dtype)
    return tl.where(a > high, high, tl.where(a < -high, -high, a))


@triton.jit
def loss_slope(y, target, KIND: tl.constexpr, CLAMP: tl.constexpr, DUAL: tl.constexpr):
    """(ℓ, ℓ') of a number y and a plain target: ``2(y−t)`` with tangent 2ẏ, or the sign of the
    difference (0 outside the clamp) with tangent 0. CLAMP is a number or None."""
    a = y[0]
    if KIND == "mse":
        difference = a - target
        loss = difference * difference
        slope = 2.0 * difference
        tangent = slope
        if DUAL:
            tangent = 2.0 * y[1]
    else:
        difference = a - target
        if CLAMP is not None:
            difference = _clip(a, CLAMP) - _clip(target, CLAMP)
        loss = tl.abs(difference)
        one = tl.full(a.shape, 1.0, a.dtype)
        slope = tl.where(difference > 0, one, tl.where(difference < 0, -one, difference))
        if CLAMP is not None:
            slope = tl.where(tl.abs(a) < tl.full(a.shape, CLAMP, a.dtype), slope, 0.0)
        tangent = tl.zeros(a.shape, a.dtype)
    return loss, (slope, tangent)
