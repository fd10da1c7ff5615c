"""Kernels between the passes: weight gradients, sums of partial sums, the rule's step, operands.

    weigh    W̄_l = Σ δ_l h_{l-1}ᵀ, split over points; one partial sum a split
    gather   adds the partial sums in a fixed order: a gradient or a Hessian-vector product [T,P]
    advance  the same, then θ_{k+1} = θ_k − α_k ⊙ u_k and the operands of θ_{k+1}
    shade    parameters [T,P] as padded operands

No atomics; the same bits every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .mlp import _w0, features
from .number import dot, loaded, operand


@triton.jit
def weigh(
    kept,
    dkept,
    delta,
    ddelta,
    x,
    dx,
    basis,
    phi,
    part,  # [T,S,L−2 or 1,WP,KP]
    dpart,
    v_scale,
    N,
    NP,
    splits,
    rows,  # of one split, a multiple of BR
    x_stride,
    D: tl.constexpr,
    EP: tl.constexpr,
    IDENTITY: tl.constexpr,
    WP: tl.constexpr,
    L: tl.constexpr,
    ACT: tl.constexpr,
    W0_FIRST: tl.constexpr,
    W0: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    FEATURES: tl.constexpr,  # h is the encoding, of the one layer above it
    DUAL: tl.constexpr,
    XDUAL: tl.constexpr,
    GRAD: tl.constexpr,  # in a dual pass: W̄ too, not its tangent alone
    REAL: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
):
    """``W̄ = Σ δ hᵀ``, ``W̄̇ = Σ (δ̇ hᵀ + δ ḣᵀ)``; one program: a BO × BI block of one layer of one
    task, over the points of one split. h is made again from what was kept."""
    KP: tl.constexpr = EP if FEATURES else WP
    LAYERS: tl.constexpr = 1 if FEATURES else L - 2
    MD: tl.constexpr = FIRST if FEATURES else MODE
    pid = tl.program_id(0)
    i = (pid % (KP // BI)) * BI + tl.arange(0, BI)
    pid = pid // (KP // BI)
    o = (pid % (WP // BO)) * BO + tl.arange(0, BO)
    pid = pid // (WP // BO)
    lay = pid % LAYERS
    pid = pid // LAYERS
    s = pid % splits
    t = (pid // splits).to(tl.int64)
    layer = NP.to(tl.int64) * WP
    below = t * (L - 1) * layer + lay * layer
    above = below
    if not FEATURES:
        above = below + layer
    w0 = _w0(lay, W0_FIRST, W0)
    acc = tl.zeros((BO, BI), REAL)
    dacc = tl.zeros((BO, BI), REAL)
    vs = 1.0
    if XDUAL:
        vs = tl.load(v_scale + t)
    for r0 in range(s * rows, tl.minimum(s * rows + rows, NP), BR):
        r = r0 + tl.arange(0, BR)
        where = above + r[:, None] * WP + o[None, :]
        g = loaded(tl.load(delta + where), MODE).to(REAL)
        g = tl.trans(operand(g, MD))
        if FEATURES:
            h, _, _ = features(
                x + t * x_stride, dx + t * x_stride, basis, phi, r, r < N, i,
                D, EP, IDENTITY, FIRST, XDUAL, REAL,
            )  # fmt: skip
            h = (h[0], h[1] * vs)
        else:
            kz = loaded(tl.load(kept + below + r[:, None] * WP + i[None, :]), MODE)
            kdz = kz
            if DUAL:
                kdz = loaded(tl.load(dkept + below + r[:, None] * WP + i[None, :]), MODE).to(REAL)
            h, _ = activate(kz, kdz, ACT, w0, MODE, REAL, DUAL)
        a = operand(h[0], MD)
        if GRAD:
            acc = dot(g, a, acc, MD)
        if DUAL:
            dg = loaded(tl.load(ddelta + where), MODE).to(REAL)
            dg = tl.trans(operand(dg, MD))
            dacc = dot(dg, a, dacc, MD)
            if XDUAL or not FEATURES:
                dacc = dot(g, operand(h[1], MD), dacc, MD)
    out = ((t * splits + s) * LAYERS + lay) * (WP * KP) + o[:, None] * KP + i[None, :]
    if GRAD:
        tl.store(part + out, acc)
    if DUAL:
        tl.store(dpart + out, dacc)


@triton.jit
def _gathered(
    part, first_part, thin, t, p, P, tiles, splits, first_splits,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    L: tl.constexpr, ENCODED: tl.constexpr, REAL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The sum of what every program left for parameters p of task t, in a fixed order."""
    CHUNK: tl.constexpr = 16
    TAIL: tl.constexpr = (E + 1) * W + (L - 2) * (W + 1) * W  # where the last layer begins
    LOW: tl.constexpr = 0 if ENCODED else D * W  # where thin biases begin
    q = p - (E + 1) * W
    lay = q // (W * W + W)
    u = q % (W * W + W)
    hidden = (p >= (E + 1) * W) & (p < TAIL)
    weight = hidden & (u < W * W)
    opening = p < E * W
    total = tl.zeros((BP,), REAL)

    # hidden weights
    where = (lay * WP + u // W) * WP + u % W
    some = tl.max(weight.to(tl.int32), 0)
    base = part + t * splits * ((L - 2) * WP * WP)
    for _ in range(0, splits * some):
        total += tl.load(base + where, mask=weight, other=0.0)
        base += (L - 2) * WP * WP
    if ENCODED:
        some = tl.max(opening.to(tl.int32), 0)
        where = (p // E) * EP + p % E
        base = first_part + t * first_splits * (WP * EP)
        for _ in range(0, first_splits * some):
            total += tl.load(base + where, mask=opening, other=0.0)
            base += WP * EP

    # thin sums
    j = tl.where(p < TAIL, LOW + (lay + 1) * W + u - W * W, LOW + (L - 1) * W + p - TAIL)
    j = tl.where(p < (E + 1) * W, p - E * W + LOW, j)
    slim = (p < P) & ~weight
    if ENCODED:
        slim = slim & ~opening
    TH: tl.constexpr = LOW + (L - 1) * W - TAIL
    size = TH + P
    some = tl.max(slim.to(tl.int32), 0)
    base = thin + t * tiles * size
    c = tl.arange(0, CHUNK)
    for m in range(0, tiles * some, CHUNK):
        rows = (m + c)[:, None]
        there = (rows < tiles) & slim[None, :]
        block = tl.load(base + rows * size + j[None, :], mask=there, other=0.0)
        total += tl.sum(block, 0)
    return total


@triton.jit
def gather(
    part, first_part, thin, scale, v_scale, start, out, P, tiles, splits, first_splits, blocks,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    L: tl.constexpr, ENCODED: tl.constexpr, DUAL: tl.constexpr, ADD: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """``out [T,P] = Σ partial sums`` over the scales (ADD: plus start [T,P]); one program: BP
    parameters of one task."""
    REAL: tl.constexpr = out.dtype.element_ty
    t = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    g = _gathered(
        part, first_part, thin, t, p, P, tiles, splits, first_splits,
        D, E, EP, W, WP, L, ENCODED, REAL, BP,
    )  # fmt: skip
    g = g / tl.load(scale + t)
    if DUAL:
        g = g / tl.load(v_scale + t)
    if ADD:
        g += tl.load(start + t * P + p, mask=p < P, other=0.0)
    tl.store(out + t * P + p, g, mask=p < P)


@triton.jit
def _shade_out(
    theta, shadow, first, t, p, P, s_size,
    E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr,
    MODE: tl.constexpr, FIRST: tl.constexpr, ENCODED: tl.constexpr,
):  # fmt: skip
    """Parameters p of task t into the padded operands."""
    q = p - (E + 1) * W
    lay = q // (W * W + W)
    u = q % (W * W + W)
    weight = (q >= 0) & (lay < L - 2) & (u < W * W)
    where = (lay * WP + u // W) * WP + u % W
    tl.store(shadow + t * s_size + where, operand(theta, MODE), mask=weight)
    if ENCODED:
        where = (p // E) * EP + p % E
        tl.store(first + t * (WP * EP) + where, operand(theta, FIRST), mask=p < E * W)


@triton.jit
def shade(
    source, scale, shadow, first, P, p_stride, s_size, blocks,
    E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr,
    MODE: tl.constexpr, FIRST: tl.constexpr, ENCODED: tl.constexpr, SCALED: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """The hidden weights (and an encoded first layer's) of source [T,P], times scale [T], rounded
    to operands [T,L−2,WP,WP]; padding stays as it was: zero. One program: BP parameters."""
    t = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    theta = tl.load(source + t * p_stride + p, mask=p < P, other=0.0)
    if SCALED:
        theta *= tl.load(scale + t)
    _shade_out(theta, shadow, first, t, p, P, s_size, E, EP, W, WP, L, MODE, FIRST, ENCODED)


@triton.jit
def advance(
    part, first_part, thin, scale, theta, lr, coefficients, m_in, v_in, m_out, v_out, u_out,
    next_theta, shadow, first, P, tiles, splits, first_splits, blocks, p_stride, lr_task,
    lr_param, s_size,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    L: tl.constexpr, MODE: tl.constexpr, FIRST: tl.constexpr, ENCODED: tl.constexpr,
    RULE: tl.constexpr, NESTEROV: tl.constexpr, KEEP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``θ' = θ − α ⊙ u``: u of sgd ``g``; momentum ``b' = μ b + g + ω θ``, u = b' (nesterov ``g + ω
    θ + μ b'``); adam ``m' = β1 m + (1−β1) g``, ``v' = β2 v + (1−β2) g²``, ``u = m'/(c1 (√(v'/c2) +
    ε))``.

    coefficients: this step's (μ, ω) or (β1, 1−β1, β2, 1−β2, ε, c1, c2). State [T,P] (b in m);
    KEEP writes u. One program: BP parameters of one task."""
    REAL: tl.constexpr = next_theta.dtype.element_ty
    t = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    inside = p < P
    g = _gathered(
        part, first_part, thin, t, p, P, tiles, splits, first_splits,
        D, E, EP, W, WP, L, ENCODED, REAL, BP,
    )  # fmt: skip
    g = g / tl.load(scale + t)
    th = tl.load(theta + t * p_stride + p, mask=inside, other=0.0)
    rate = tl.load(lr + t * lr_task + p * lr_param, mask=inside, other=0.0)
    where = t * P + p
    u = g
    if RULE == "momentum":
        mu = tl.load(coefficients)
        g += tl.load(coefficients + 1) * th
        b = mu * tl.load(m_in + where, mask=inside, other=0.0) + g
        tl.store(m_out + where, b, mask=inside)
        u = b
        if NESTEROV:
            u = g + mu * b
    if RULE == "adam":
        mean = tl.load(m_in + where, mask=inside, other=0.0)
        square = tl.load(v_in + where, mask=inside, other=0.0)
        mean = tl.load(coefficients) * mean + tl.load(coefficients + 1) * g
        square = tl.load(coefficients + 2) * square + tl.load(coefficients + 3) * g * g
        tl.store(m_out + where, mean, mask=inside)
        tl.store(v_out + where, square, mask=inside)
        root = tl.sqrt(square / tl.load(coefficients + 6)) + tl.load(coefficients + 4)
        u = mean / (tl.load(coefficients + 5) * root)
    if KEEP:
        tl.store(u_out + where, u, mask=inside)
    th -= rate * u
    tl.store(next_theta + where, th, mask=inside)
    _shade_out(th, shadow, first, t, p, P, s_size, E, EP, W, WP, L, MODE, FIRST, ENCODED)
