"""Alpha compositing along rays, forward and back, over pairs (value, tangent).

    s = ρ(raw_3), c = sigmoid(raw_0..2), δ_i = t_{i+1} − t_i (the last a constant), τ = s δ,
    e = exp(−τ), α = −expm1(−τ), m = [α > 1e-10], f = e + 1e-10 where m, else 1,
    T_i = Π_{j<i} f_j, w = T α; rgb = Σ w c + β (1 − Σ w), depth = Σ w t, acc = Σ w

    back: w̄ = ⟨r̄gb, c−β⟩ + d̄epth t + ācc, τ̄_i = T_i e_i w̄_i − m_i (e_i/f_i) Σ_{j>i} w_j w̄_j,
    s̄ = δ τ̄, δ̄ = s τ̄, c̄ = w r̄gb, t̄_i = d̄epth w_i + δ̄_{i−1} − δ̄_i

The products and sums over neighbours are inclusive scans, moved by one place: nothing is divided or
subtracted to get an exclusive one, so the last interval (1e10) never meets the others. The tangent
of T is ``Ṫ_i = −T_i Σ_{j<i} m_j (e_j/f_j) τ̇_j``, all of whose terms are bounded by τ̇.

A program owns whole rays of one task, one warp to each or several to a warp, and sees 512 to 1024
samples at a time, padded to a power of two. Rays of up to 256 samples (128 dual) keep what the way
back needs in registers; longer ones walk in chunks, write the T that comes into each (a number and
its tangent) to memory, and recompute. Longer chunks spill: 512 dual samples of a ray 800 bytes on
sm_90. Sums run inside a program, per ray; the loss is one number per program, added by a second
kernel in a fixed order: the same bits every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import March
from .activation import activate
from .launch import launch
from .loss import loss_slope
from .number import add, mul, scaled

# Where each warp has a ray of its own, scans stay inside it: 4 to 8 samples a thread.
WARPS = 4
TILE = 512  # samples of a program at a time, at least
CHUNK, DUAL_CHUNK = 256, 128  # samples of a ray at a time, at most
_SUMS = 256

_PER_LN2 = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: its product with k is exact
_LN2_LOW = tl.constexpr(1.42860682030941723212e-6)


@triton.jit
def exponentials(x):
    """(exp x, expm1 x), each to a rounding or two; 0 and −1 below −87, as at 88 above it."""
    if x.dtype == tl.float64:
        x = tl.where(x > 700.0, 700.0, x)
        e = tl.exp(tl.where(x < -700.0, -700.0, x))
        m = e - 1.0
        plain = (m == 0.0) | (m == -1.0)
        ratio = x / tl.log(tl.where(plain, 2.0, e))  # e's rounding cancels
        return tl.where(x < -700.0, 0.0, e), tl.where(m == 0.0, x, tl.where(plain, m, m * ratio))
    low = x < -87.0
    r = tl.where(x > 88.0, 88.0, tl.where(low, -87.0, x))
    k = tl.floor(r * _PER_LN2 + 0.5)
    r = (r - k * _LN2_HIGH) - k * _LN2_LOW
    p = ((0.00139464904 * r + 0.00836661085) * r + 0.0416662805) * r + 0.166665435
    p = (p * r + 0.5) * (r * r) + r  # expm1 r, 1.3e-8 relative
    scale = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2ᵏ
    e = p * scale + scale
    m = p * scale + (scale - 1.0)
    return tl.where(low, 0.0, e), tl.where(low, -1.0, m)


@triton.jit
def log1p(u):
    """log(1 + u) of u in [0,1]: 2 atanh(u / (2 + u))."""
    if u.dtype == tl.float64:
        v = 1.0 + u
        m = v - 1.0
        none = m == 0.0
        return tl.where(none, u, tl.log(v) * (u / tl.where(none, 1.0, m)))
    v = u / (u + 2.0)
    q = v * v
    p = (0.121541657 * q + 0.107129246) * q + 0.143085182
    p = (p * q + 0.19999437) * q + 0.333333373
    return 2.0 * (p * q * v + v)


@triton.jit
def density(z, DENSITY: tl.constexpr, DUAL: tl.constexpr):
    """The numbers (ρ(z), ρ'(z)). Softplus is accurate where it is small: times a last interval of
    1e10, 1e-9 counts."""
    a = z[0]
    if DENSITY == "relu":
        s = tl.where(a < 0, 0.0, a)  # a NaN stays a NaN
        first = tl.where(a > 0, tl.full(a.shape, 1.0, a.dtype), 0.0)
        second = tl.zeros(a.shape, a.dtype)
    else:
        e = exponentials(-tl.abs(a))[0]
        s = tl.where(a < 0, 0.0, a) + log1p(e)
        first = tl.where(a < 0, e, 1.0) / (1.0 + e)
        second = e / ((1.0 + e) * (1.0 + e))
    ds = s
    dfirst = first
    if DUAL:
        ds = first * z[1]
        dfirst = second * z[1]
    return (s, ds), (first, dfirst)


@triton.jit
def before(a, first):
    """``a_{i−1}`` along a ray, ``first`` at i = 0: [R,S] -> [R,S]."""
    i = tl.arange(0, a.shape[1])[None, :]
    index = tl.broadcast_to(tl.where(i > 0, i - 1, 0), a.shape)
    return tl.where(i > 0, tl.gather(a, index, 1), first)


@triton.jit
def after(a):
    """``Σ_{j>i} a_j`` along a ray: turned round, scanned, turned back: [R,S] -> [R,S]."""
    i = tl.arange(0, a.shape[1])[None, :]
    back = tl.broadcast_to(-i + (a.shape[1] - 1), a.shape)
    total = tl.cumsum(tl.gather(a, back, 1), 1)
    index = tl.broadcast_to(tl.maximum(-i + (a.shape[1] - 2), 0), a.shape)
    return tl.where(i < a.shape[1] - 1, tl.gather(total, index, 1), 0.0)


@triton.jit
def total(a, DUAL: tl.constexpr):
    """The number ``Σ_i a_i`` of each ray: [R,S] -> [R]."""
    v = tl.sum(a[0], 1)
    d = v
    if DUAL:
        d = tl.sum(a[1], 1)
    return (v, d)


@triton.jit
def along(a, DUAL: tl.constexpr):
    """A ray's number for each of its samples: [R] -> [R,1]."""
    v = a[0][:, None]
    d = v
    if DUAL:
        d = a[1][:, None]
    return (v, d)


@triton.jit
def march_forward(
    raw, delta, inner, reached, DENSITY: tl.constexpr, REAL: tl.constexpr, DUAL: tl.constexpr
):
    """What R rays' samples weigh, and the tape for the way back.

    raw: four numbers [R,S]; delta: a number [R,S], 0 in padding; inner [R,S]: samples before the
    ray's last one; reached: the number T [R] at the first sample, 1 at a ray's start. Returns (w
    [R,S], c three numbers, tape, T behind the last sample [R]).
    """
    c0, k0 = activate(raw[0][0], raw[0][1], "sigmoid", 1.0, "fp32", REAL, DUAL)
    c1, k1 = activate(raw[1][0], raw[1][1], "sigmoid", 1.0, "fp32", REAL, DUAL)
    c2, k2 = activate(raw[2][0], raw[2][1], "sigmoid", 1.0, "fp32", REAL, DUAL)
    s, slope = density(raw[3], DENSITY, DUAL)
    tau = mul(s, delta, DUAL)
    decay, fall = exponentials(-tau[0])
    one = tl.full(decay.shape, 1.0, REAL)
    mask = -fall > 1e-10
    f = tl.where(mask, decay + 1e-10, one)
    share = tl.where(mask, decay / f, 0.0)  # m e/f
    product = tl.cumprod(tl.where(inner, f, one), 1)
    T = before(product, one)
    i = tl.arange(0, decay.shape[1])[None, :]
    ends = i == decay.shape[1] - 1
    last = tl.sum(tl.where(ends, product, 0.0), 1)
    de = decay
    dalpha = decay
    dshare = share
    dT = T
    dlast = last
    if DUAL:
        de = -decay * tau[1]
        dalpha = decay * tau[1]
        dshare = -share * (1e-10 / f) * tau[1]
        slopes = tl.cumsum(tl.where(inner, -share * tau[1], 0.0), 1)  # Σ_{j<=i} ḟ_j / f_j
        dT = T * before(slopes, tl.zeros(T.shape, REAL))
        dlast = last * tl.sum(tl.where(ends, slopes, 0.0), 1)
    T = mul(along(reached, DUAL), (T, dT), DUAL)
    w = mul(T, (-fall, dalpha), DUAL)
    tape = ((k0, k1, k2), s, slope, delta, mul(T, (decay, de), DUAL), (share, dshare), w)
    return w, (c0, c1, c2), tape, mul(reached, (last, dlast), DUAL)


@triton.jit
def march_show(w, c, t, DUAL: tl.constexpr):
    """The numbers (Σ w c_0, Σ w c_1, Σ w c_2, Σ w t, Σ w) [R]; the background comes later."""
    return (
        total(mul(w, c[0], DUAL), DUAL),
        total(mul(w, c[1], DUAL), DUAL),
        total(mul(w, c[2], DUAL), DUAL),
        total(mul(w, t, DUAL), DUAL),
        total(w, DUAL),
    )


@triton.jit
def march_background(rgb, acc, DUAL: tl.constexpr):
    """``rgb + 1 − acc`` of one channel."""
    v = rgb[0] + (1.0 - acc[0])
    d = v
    if DUAL:
        d = rgb[1] - acc[1]
    return (v, d)


@triton.jit
def _less(c, WHITE: tl.constexpr):
    """c − β."""
    if WHITE:
        return (c[0] - 1.0, c[1])
    return c


@triton.jit
def march_backward(
    tape,
    c,
    t,
    inner,
    grgb,
    gdepth,
    gacc,
    behind,
    WHITE: tl.constexpr,
    FULL: tl.constexpr,
    DUAL: tl.constexpr,
):
    """(r̄aw four numbers, δ̄, d̄epth w [R,S], Σ w w̄ [R]) from the adjoints [R] of what is shown.

    behind: the number Σ w w̄ [R] of the samples after these. Without FULL, gdepth and gacc are 0 and
    not read, and δ̄ is not wanted.
    """
    slopes, s, slope, delta, te, share, w = tape
    g0 = along(grgb[0], DUAL)
    g1 = along(grgb[1], DUAL)
    g2 = along(grgb[2], DUAL)
    gw = mul(g0, _less(c[0], WHITE), DUAL)
    gw = add(gw, mul(g1, _less(c[1], WHITE), DUAL), DUAL)
    gw = add(gw, mul(g2, _less(c[2], WHITE), DUAL), DUAL)
    shift = w
    if FULL:
        gd = along(gdepth, DUAL)
        gw = add(add(gw, mul(gd, t, DUAL), DUAL), along(gacc, DUAL), DUAL)
        shift = mul(gd, w, DUAL)
    q = mul(w, gw, DUAL)
    later = after(q[0]) + behind[0][:, None]
    dlater = later
    if DUAL:
        dlater = after(q[1]) + behind[1][:, None]
    # at a ray's last sample nothing lies behind: its own q, which can be 1e10, never gets in
    gtau = add(
        mul(te, gw, DUAL),
        scaled(mul(share, (later, dlater), DUAL), tl.where(inner, -1.0, 0.0), DUAL),
        DUAL,
    )
    graw = (
        mul(slopes[0], mul(w, g0, DUAL), DUAL),
        mul(slopes[1], mul(w, g1, DUAL), DUAL),
        mul(slopes[2], mul(w, g2, DUAL), DUAL),
        mul(slope, mul(delta, gtau, DUAL), DUAL),
    )
    gdelta = gtau
    if FULL:
        gdelta = mul(s, gtau, DUAL)
        v = tl.where(inner, gdelta[0], 0.0)
        d = v
        if DUAL:
            d = tl.where(inner, gdelta[1], 0.0)
        gdelta = (v, d)
    return graw, gdelta, shift, total(q, DUAL)


@triton.jit
def _read(p, at, mask):
    """raw [R,S,4] as four blocks [R,S]."""
    quad = tl.arange(0, 4)[None, None, :]
    v = tl.load(p + at[:, :, None] * 4 + quad, mask=mask[:, :, None], other=0.0)  # [R,S,4]
    even, odd = tl.split(tl.reshape(v, (at.shape[0], at.shape[1], 2, 2)))
    r0, r2 = tl.split(even)
    r1, r3 = tl.split(odd)
    return r0, r1, r2, r3


@triton.jit
def _write(p, at, mask, r0, r1, r2, r3):
    """Four blocks [R,S] as raw [R,S,4]."""
    v = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (at.shape[0], at.shape[1], 4))
    quad = tl.arange(0, 4)[None, None, :]
    tl.store(p + at[:, :, None] * 4 + quad, v, mask=mask[:, :, None])


@triton.jit
def _samples(
    raw,
    vraw,
    t,
    vt,
    live,
    start,
    S: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    REAL: tl.constexpr,
    DUAL: tl.constexpr,
    MOVED: tl.constexpr,
):
    """(raw four numbers, t, δ, inner) of the samples start, start + 1, ... of R rays."""
    s = start + tl.arange(0, WIDTH)[None, :]
    at = tl.arange(0, live.shape[0])[:, None] * S + s  # [R,WIDTH]
    mask = live[:, None] & (s < S)
    inner = live[:, None] & (s < S - 1)
    r0, r1, r2, r3 = _read(raw, at, mask)
    t0 = tl.load(t + at, mask=mask, other=0.0)
    t1 = tl.load(t + at + 1, mask=inner, other=0.0)
    far = tl.where(mask, tl.full(at.shape, LAST, REAL), 0.0)
    delta = tl.where(inner, t1 - t0, far)
    d0 = r0
    d1 = r1
    d2 = r2
    d3 = r3
    dt = t0
    ddelta = delta
    if DUAL:
        d0, d1, d2, d3 = _read(vraw, at, mask)
        dt = tl.zeros(at.shape, REAL)
        ddelta = dt
        if MOVED:
            dt = tl.load(vt + at, mask=mask, other=0.0)
            ddelta = tl.where(inner, tl.load(vt + at + 1, mask=inner, other=0.0) - dt, 0.0)
    return ((r0, d0), (r1, d1), (r2, d2), (r3, d3)), (t0, dt), (delta, ddelta), inner


@triton.jit
def _bars(p, live, columns, column):
    """A column of adjoints [rays,columns] as numbers without a tangent: [R]."""
    at = tl.arange(0, live.shape[0]) * columns + column
    v = tl.load(p + at, mask=live, other=0.0)
    return (v, tl.zeros(v.shape, v.dtype))


@triton.jit
def _put(p, dp, at, mask, a, VALUE: tl.constexpr, TANGENT: tl.constexpr):
    """A number to memory: what is wanted of it."""
    if VALUE:
        tl.store(p + at, a[0], mask=mask)
    if TANGENT:
        tl.store(dp + at, a[1], mask=mask)


@triton.jit
def _put_back(
    graw,
    dgraw,
    gt,
    dgt,
    kept,
    start,
    back,
    pending,
    S: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    VALUE: tl.constexpr,
    DUAL: tl.constexpr,
):
    """r̄aw and t̄ of a chunk to memory. t̄ of a chunk's first sample misses δ̄ of the sample before:
    it is returned, and written with the chunk before, as ``pending`` of the next chunk is here."""
    g, gdelta, shift, _ = back
    s = start + tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, kept.shape[0])
    at = row[:, None] * S + s
    mask = kept[:, None] & (s < S)
    if VALUE:
        _write(graw, at, mask, g[0][0], g[1][0], g[2][0], g[3][0])
    if DUAL:
        _write(dgraw, at, mask, g[0][1], g[1][1], g[2][1], g[3][1])
    if FULL:
        begins = s == start
        ends = s == start + WIDTH - 1
        v = shift[0] - gdelta[0]
        first = tl.sum(tl.where(begins, v, 0.0), 1)
        v += before(gdelta[0], tl.zeros(v.shape, v.dtype))
        last = tl.sum(tl.where(ends, gdelta[0], 0.0), 1)
        d = v
        dfirst = first
        dlast = last
        if DUAL:
            d = shift[1] - gdelta[1]
            dfirst = tl.sum(tl.where(begins, d, 0.0), 1)
            d += before(gdelta[1], tl.zeros(d.shape, d.dtype))
            dlast = tl.sum(tl.where(ends, gdelta[1], 0.0), 1)
        wanted = mask & ((s > start) | (s == 0))
        _put(gt, dgt, at, wanted, (v, d), VALUE, DUAL)
        if WIDTH < S:
            following = row * 0 + start + WIDTH
            held = add(pending, (last, dlast), DUAL)
            _put(gt, dgt, row * S + following, kept & (following < S), held, VALUE, DUAL)
        pending = (first, dfirst)
    return pending


@triton.jit
def march(
    raw,
    vraw,
    t,
    vt,
    y,
    counts,
    grgb,
    gdepth,
    gacc,
    rgb,
    depth,
    acc,
    graw,
    dgraw,
    gt,
    dgt,
    partial,
    reached,
    rays,
    blocks,
    S: tl.constexpr,
    LAST: tl.constexpr,
    WHITE: tl.constexpr,
    DENSITY: tl.constexpr,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    COUNTS: tl.constexpr,
    SHOW: tl.constexpr,
    BACK: tl.constexpr,
    FULL: tl.constexpr,
    VALUE: tl.constexpr,
    MOVED: tl.constexpr,
    RAYS: tl.constexpr,
    WIDTH: tl.constexpr,
    REAL: tl.constexpr,
    DUAL: tl.constexpr,
):
    """RAYS rays of one task: shown (SHOW), compared with y (KIND), taken back (BACK).

    KIND "" takes the adjoints from grgb, gdepth, gacc; a loss makes them, with d̄epth = ācc = 0.
    FULL: those two, and t̄, count. VALUE: r̄aw itself is wanted, not only its tangent. MOVED: t has
    a tangent. With DUAL, what is shown are the tangents.
    """
    program = tl.program_id(0)
    task = (program // blocks).to(tl.int64)
    first = (program % blocks) * RAYS
    row = tl.arange(0, RAYS)
    count = rays
    if COUNTS:
        count = tl.load(counts + task).to(tl.int32)
    kept = first + row < rays
    live = first + row < count
    ray = task * rays + first
    raw += ray * (4 * S)
    vraw += ray * (4 * S)
    t += ray * S
    vt += ray * S
    zero = tl.zeros((RAYS,), REAL)
    none = (zero, zero)
    start_T = (tl.full((RAYS,), 1.0, REAL), zero)
    CHUNKS: tl.constexpr = (S + WIDTH - 1) // WIDTH
    CARRIED: tl.constexpr = CHUNKS * RAYS * 2
    reached += program.to(tl.int64) * CARRIED

    if CHUNKS == 1:
        r, at_t, delta, inner = _samples(
            raw, vraw, t, vt, live, 0, S, LAST, WIDTH, REAL, DUAL, MOVED
        )
        w, c, tape, _ = march_forward(r, delta, inner, start_T, DENSITY, REAL, DUAL)
        b0, b1, b2, b3, b4 = march_show(w, c, at_t, DUAL)
    else:
        b0 = none
        b1 = none
        b2 = none
        b3 = none
        b4 = none
        T = start_T
        for chunk in range(CHUNKS):
            if BACK:
                to = reached + chunk * (2 * RAYS) + row
                tl.store(to, T[0])
                if DUAL:
                    tl.store(to + RAYS, T[1])
            r, at_t, delta, inner = _samples(
                raw, vraw, t, vt, live, chunk * WIDTH, S, LAST, WIDTH, REAL, DUAL, MOVED
            )
            w, c, tape, T = march_forward(r, delta, inner, T, DENSITY, REAL, DUAL)
            part = march_show(w, c, at_t, DUAL)
            b0 = add(b0, part[0], DUAL)
            b1 = add(b1, part[1], DUAL)
            b2 = add(b2, part[2], DUAL)
            b3 = add(b3, part[3], DUAL)
            b4 = add(b4, part[4], DUAL)
    if WHITE:
        b0 = march_background(b0, b4, DUAL)
        b1 = march_background(b1, b4, DUAL)
        b2 = march_background(b2, b4, DUAL)
    if SHOW:
        to = rgb + ray * 3 + row * 3
        _put(to, to, 0, kept, b0, not DUAL, DUAL)
        _put(to, to, 1, kept, b1, not DUAL, DUAL)
        _put(to, to, 2, kept, b2, not DUAL, DUAL)
        _put(depth + ray, depth + ray, row, kept, b3, not DUAL, DUAL)
        _put(acc + ray, acc + ray, row, kept, b4, not DUAL, DUAL)
    if KIND != "":
        y += ray * 3
        l0, g0 = loss_slope(b0, _bars(y, live, 3, 0)[0], KIND, CLAMP, DUAL)
        l1, g1 = loss_slope(b1, _bars(y, live, 3, 1)[0], KIND, CLAMP, DUAL)
        l2, g2 = loss_slope(b2, _bars(y, live, 3, 2)[0], KIND, CLAMP, DUAL)
        numbers = (zero + 3.0) * count
        scale = tl.where(live, 1.0 / numbers, 0.0)
        tl.store(partial + program, tl.sum((l0 + l1 + l2) * scale, 0))
        g = (scaled(g0, scale, DUAL), scaled(g1, scale, DUAL), scaled(g2, scale, DUAL))
        gd = none
        ga = none
    elif BACK:
        grgb += ray * 3
        g = (_bars(grgb, live, 3, 0), _bars(grgb, live, 3, 1), _bars(grgb, live, 3, 2))
        gd = _bars(gdepth + ray, live, 1, 0)
        ga = _bars(gacc + ray, live, 1, 0)
    if BACK:
        graw += ray * (4 * S)
        dgraw += ray * (4 * S)
        gt += ray * S
        dgt += ray * S
        if CHUNKS == 1:
            back = march_backward(tape, c, at_t, inner, g, gd, ga, none, WHITE, FULL, DUAL)
            _put_back(graw, dgraw, gt, dgt, kept, 0, back, none, S, WIDTH, FULL, VALUE, DUAL)
        else:
            tl.debug_barrier()  # each thread may read T that another wrote
            behind = none
            pending = none
            for turn in range(CHUNKS):
                start = (CHUNKS - 1 - turn) * WIDTH
                r, at_t, delta, inner = _samples(
                    raw, vraw, t, vt, live, start, S, LAST, WIDTH, REAL, DUAL, MOVED
                )
                to = reached + (CHUNKS - 1 - turn) * (2 * RAYS) + row
                T0 = tl.load(to)
                dT0 = T0
                if DUAL:
                    dT0 = tl.load(to + RAYS)
                w, c, tape, _ = march_forward(r, delta, inner, (T0, dT0), DENSITY, REAL, DUAL)
                back = march_backward(tape, c, at_t, inner, g, gd, ga, behind, WHITE, FULL, DUAL)
                pending = _put_back(
                    graw, dgraw, gt, dgt, kept, start, back, pending, S, WIDTH, FULL, VALUE, DUAL
                )
                behind = add(behind, back[3], DUAL)


@triton.jit
def add_parts(partial, loss, blocks, BLOCK: tl.constexpr):
    """``loss_t = Σ partial[t]``, BLOCK programs' shares at a time: one task."""
    task = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + task * blocks + i, mask=i < blocks, other=0.0)
    tl.store(loss + task, tl.sum(total, 0))


# The host's side ---


class _Plan(NamedTuple):
    """How many rays a program owns, how many samples it sees at a time, in how many chunks."""

    rays: int
    width: int
    chunks: int

    def carried(self, programs: int) -> int:
        """Numbers of memory for the incoming T of every chunk."""
        return programs * self.rays * self.chunks * 2 if self.chunks > 1 else 0


def _plan(samples: int, dual: bool) -> _Plan:
    width = min(DUAL_CHUNK if dual else CHUNK, triton.next_power_of_2(samples))
    return _Plan(max(WARPS, TILE // width), width, triton.cdiv(samples, width))


_NOTHING = {
    "KIND": "",
    "CLAMP": None,
    "COUNTS": False,
    "SHOW": False,
    "BACK": False,
    "FULL": False,
    "VALUE": False,
    "MOVED": False,
    "DUAL": False,
}


def _start(
    raw: Tensor, t: Tensor, how: March, tasks: int, rays: int, given: dict[str, Any], **flags: Any
) -> None:
    """One launch over tasks of so many rays; a tensor that is not given is never touched."""
    S = t.shape[-1]
    plan = _plan(S, flags.get("DUAL", False))
    blocks = triton.cdiv(rays, plan.rays)
    if "reached" not in given:
        given["reached"] = raw.new_empty(plan.carried(tasks * blocks) or 1)
    names = "vraw vt y counts grgb gdepth gacc rgb depth acc graw dgraw gt dgt partial reached"
    args: dict[str, Any] = {"raw": raw, "t": t}
    args |= {name: given.get(name, raw) for name in names.split()}
    args |= {"rays": rays, "blocks": blocks}
    consts = {
        **_NOTHING,
        **flags,
        "S": S,
        "LAST": float(how.last_interval),
        "WHITE": how.white_background,
        "DENSITY": how.density,
        "RAYS": plan.rays,
        "WIDTH": plan.width,
        "REAL": tl.float64 if raw.dtype == torch.float64 else tl.float32,
    }
    launch(march, (tasks * blocks,), args, consts, warps=WARPS)


def _shown(raw: Tensor) -> dict[str, Tensor]:
    """Where (rgb, depth, acc) of raw [...,S,4] go."""
    rays = raw.shape[:-2]
    return {
        "rgb": raw.new_empty(*rays, 3),
        "depth": raw.new_empty(rays),
        "acc": raw.new_empty(rays),
    }


def _dense(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _whole(raw: Tensor, t: Tensor, how: March, given: dict[str, Any], **flags: Any) -> None:
    raw, t = raw.contiguous(), t.contiguous()
    _start(raw, t, how, 1, t.numel() // t.shape[-1], given, **flags)


def composite(raw: Tensor, t: Tensor, march: March) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb [...,3], depth [...], acc [...]) of raw [...,S,4] at t [...,S]."""
    shown = _shown(raw)
    _whole(raw, t, march, dict(shown), SHOW=True)
    return shown["rgb"], shown["depth"], shown["acc"]


def composite_grad(
    raw: Tensor, t: Tensor, march: March, grgb: Tensor, gdepth: Tensor, gacc: Tensor
) -> tuple[Tensor, Tensor]:
    """(r̄aw, t̄) from the adjoints of (rgb, depth, acc)."""
    graw, gt = raw.new_empty(raw.shape), t.new_empty(t.shape)
    given = {**_dense(grgb=grgb, gdepth=gdepth, gacc=gacc), "graw": graw, "gt": gt}
    _whole(raw, t, march, given, BACK=True, FULL=True, VALUE=True)
    return graw, gt


def composite_dual(
    raw: Tensor,
    t: Tensor,
    march: March,
    vraw: Tensor,
    vt: Tensor,
    grgb: Tensor,
    gdepth: Tensor,
    gacc: Tensor,
) -> tuple[Tensor, ...]:
    """(rġb, dėpth, aċc, r̄aẇ, t̄̇) along (vraw, vt), the adjoints held fixed."""
    shown, graw, gt = _shown(raw), raw.new_empty(raw.shape), t.new_empty(t.shape)
    given = {
        **_dense(vraw=vraw, vt=vt, grgb=grgb, gdepth=gdepth, gacc=gacc),
        **shown,
        "dgraw": graw,
        "dgt": gt,
    }
    _whole(raw, t, march, given, SHOW=True, BACK=True, FULL=True, MOVED=True, DUAL=True)
    return shown["rgb"], shown["depth"], shown["acc"], graw, gt


class Marched(NamedTuple):
    """A loss of rays, the adjoint of what the network gave, its tangent; then working memory."""

    loss: Tensor  # [T]
    graw: Tensor | None  # [T,R,S,4]
    dgraw: Tensor | None  # its tangent, where raw has one
    partial: Tensor
    reached: Tensor


def march_room(raw: Tensor, *, grad: bool = True, dual: bool = False) -> Marched:
    """Tensors for ``march_loss`` of raw [T,R,S,4] to write into."""
    T, R, S, _ = raw.shape
    plan = _plan(S, dual)
    programs = T * triton.cdiv(R, plan.rays)
    return Marched(
        raw.new_empty(T),
        torch.empty_like(raw) if grad else None,
        torch.empty_like(raw) if dual else None,
        raw.new_empty(programs),
        raw.new_empty(plan.carried(programs) or 1),
    )


def march_loss(
    raw: Tensor,
    t: Tensor,
    y: Tensor,
    march: March,
    loss: tuple[str, float | None] = ("mse", None),
    *,
    counts: Tensor | None = None,
    draw: Tensor | None = None,
    grad: bool = True,
    out: Marched | None = None,
) -> Marched:
    """``L = Σ ℓ(rgb, y) / (3 counts)`` of each task and ``r̄aw``, with draw its tangent as well.

    Args:
        raw: [T,R,S,4], dense. t: [T,R,S]. y: [T,R,3].
        loss: kind and clamp, ``Batch.loss_parts``.
        counts: [T] integers, how many rays are real; the rest is not read, its adjoint is 0.
        draw: the tangent of raw.
        grad: whether r̄aw is wanted; without it and without draw, only the loss.
        out: what ``march_room`` gave for raw's shape: nothing is allocated.
    """
    T, R = t.shape[:2]
    dual = draw is not None
    out = march_room(raw, grad=grad, dual=dual) if out is None else out
    given: dict[str, Any] = {"y": y, "partial": out.partial, "reached": out.reached}
    given |= {} if counts is None else {"counts": counts}
    given |= {} if out.graw is None else {"graw": out.graw}
    given |= {"vraw": draw, "dgraw": out.dgraw} if dual else {}
    kind, clamp = loss
    flags = {"KIND": kind, "CLAMP": clamp, "COUNTS": counts is not None}
    back = {"BACK": grad or dual, "VALUE": grad, "DUAL": dual}
    _start(raw, t, march, T, R, given, **flags, **back)
    sums = {"partial": out.partial, "loss": out.loss, "blocks": len(out.partial) // T}
    launch(add_parts, (T,), sums, {"BLOCK": _SUMS})
    return out
