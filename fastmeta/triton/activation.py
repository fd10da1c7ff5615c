"""Activations in kernels: ``φ, φ', φ''`` from what was kept of z.

    sine sin(w0 z) · relu max(z,0) · tanh · sigmoid s · softplus log(1+e^z) · gelu z Φ(z)
    silu z s(z) · none z

ReLU has slope 0 at the kink. What is kept of a pre-activation between the passes (``keep``,
``KEPT`` on the host's side):

* sine, below fp32: the phase w0 z mod 2π as a signed 16-bit fraction of a turn, at most 4.8e-5 rad
  off, 2 bytes, which gives sine and cosine alike;
* relu and none: h as an operand, whose sign is the slope;
* the others, and sine in fp32: z.

The list is ``spec.ACTIVATIONS``; ``tests/test_triton.py`` compares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .number import INTERP, operand

ACTIVATIONS = ("relu", "sine", "tanh", "sigmoid", "softplus", "gelu", "silu", "none")

_TURN = tl.constexpr(6.283185307179586)
_PER_TURN = tl.constexpr(0.15915494309189535)
# 2π in two terms: the first has 8 bits, so that its product with up to 2¹⁶ turns is exact
_TURN_HIGH = tl.constexpr(6.28125)
_TURN_LOW = tl.constexpr(0.0019353071795864769)
# π/2 in three
_QUARTER_HIGH = tl.constexpr(1.5703125)
_QUARTER_MIDDLE = tl.constexpr(4.837512969970703125e-4)
_QUARTER_LOW = tl.constexpr(7.549789948768648e-8)


@triton.jit
def phase(p):
    """p mod 2π in [−π,π], about 1e-7 off beyond the rounding of p (Cody and Waite)."""
    turns = tl.floor(p * _PER_TURN + 0.5)
    return (p - turns * _TURN_HIGH) - turns * _TURN_LOW


@triton.jit
def _fast_sin(r):
    return tl.inline_asm_elementwise(
        "sin.approx.ftz.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _fast_cos(r):
    return tl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def quick_sincos(r):
    """(sin r, cos r) of r in [−π,π] on the special function unit, at most 5e-7 off."""
    if INTERP:
        return tl.sin(r), tl.cos(r)
    return _fast_sin(r), _fast_cos(r)


@triton.jit
def exact_sincos(p):
    """(sin p, cos p) to about 1e-7: reduced by π/2, then two polynomials (Cephes' sinf, cosf)."""
    if p.dtype == tl.float64:
        return tl.sin(p), tl.cos(p)
    quarters = tl.floor(p * (4.0 * _PER_TURN) + 0.5)
    r = ((p - quarters * _QUARTER_HIGH) - quarters * _QUARTER_MIDDLE) - quarters * _QUARTER_LOW
    q = quarters.to(tl.int32)
    s = r * r
    a = ((-1.9515295891e-4 * s + 8.3321608736e-3) * s - 1.6666654611e-1) * (s * r) + r
    b = ((2.443315711809948e-5 * s - 1.388731625493765e-3) * s + 4.166664568298827e-2) * (s * s) + (
        1.0 - 0.5 * s
    )
    sine = tl.where((q & 1) == 0, a, b)
    cosine = tl.where((q & 1) == 0, b, a)
    return tl.where((q & 2) == 0, sine, -sine), tl.where(((q + 1) & 2) == 0, cosine, -cosine)


@triton.jit
def wave(p, MODE: tl.constexpr):
    """(sin p, cos p) of any p, by the precision's means."""
    if MODE == "fp32":
        return exact_sincos(p)
    return quick_sincos(phase(p))


@triton.jit
def keep(z, ACT: tl.constexpr, W0: tl.constexpr, MODE: tl.constexpr):
    """What stays of z."""
    if ACT == "sine" and MODE != "fp32":
        return tl.floor(phase(W0 * z) * (65536.0 * _PER_TURN) + 0.5).to(tl.int32).to(tl.int16)
    elif ACT == "relu":
        return operand(tl.where(z < 0, 0.0, z), MODE)  # a NaN stays a NaN
    elif ACT == "none":
        return operand(z, MODE)
    else:
        return z


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0, -t, t)


@triton.jit
def _softplus(z):
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def curve(k, ACT: tl.constexpr, W0: tl.constexpr, MODE: tl.constexpr, REAL: tl.constexpr):
    """(φ, φ', φ'') as REAL blocks, from what was kept, or from z itself."""
    if ACT == "sine":
        if k.dtype == tl.int16:
            s, c = quick_sincos(k.to(REAL) * (_TURN / 65536.0))
        else:
            s, c = wave(W0 * k, MODE)
        return s, W0 * c, -(W0 * W0) * s
    z = k.to(REAL)
    one = tl.full(z.shape, 1.0, REAL)
    zero = tl.zeros(z.shape, REAL)
    if ACT == "relu":
        return tl.where(z < 0, zero, z), tl.where(z > 0, one, zero), zero
    elif ACT == "tanh":
        t = _tanh(z)
        first = 1.0 - t * t
        return t, first, -2.0 * t * first
    elif ACT == "sigmoid":
        s = _sigmoid(z)
        first = s * (1.0 - s)
        return s, first, first * (1.0 - 2.0 * s)
    elif ACT == "softplus":
        s = _sigmoid(z)
        return _softplus(z), s, s * (1.0 - s)
    elif ACT == "gelu":
        normal = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * normal, normal * (2.0 - z * z)
    elif ACT == "silu":
        s = _sigmoid(z)
        return z * s, s + z * (s * (1.0 - s)), s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    else:
        return z, one, zero


@triton.jit
def activate(
    k,
    dz,
    ACT: tl.constexpr,
    W0: tl.constexpr,
    MODE: tl.constexpr,
    REAL: tl.constexpr,
    DUAL: tl.constexpr,
):
    """The numbers ``h = (φ, φ' ż)`` and ``slope = (φ', φ'' ż)``, from what was kept of z, and ż."""
    f, first, second = curve(k, ACT, W0, MODE, REAL)
    dh = f
    dslope = first
    if DUAL:
        dh = first * dz
        dslope = second * dz
    return (f, dh), (first, dslope)
