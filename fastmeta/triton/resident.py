"""Kernel of the resident network: width ≤ 64, depth ≤ 6; activations never leave the registers.

    forward, ȳ or the loss, backward and all sums over points, in one launch:
    z_l = W_l h_{l-1} + b_l
    δ_l = φ'(z_l) h̄_l,  W̄_l = Σ δ_l h_{l-1}ᵀ,  b̄_l = Σ δ_l,  h̄_{l-1} = W_lᵀ δ_l

A program owns the points of one split of one task and walks them BM at a time. Weights are read
once, as operands; W̄ and b̄ are added up in registers over all its points (b̄ by products with
rows of ones) and written once, in the
form in which ``step.gather`` and ``step.advance`` add partial sums: no atomics, the same bits every
run. Plain passes keep h (an operand) and φ'(z) of every layer, two special functions a sine; dual
passes keep z and ż and make h, φ', φ'' again. Precisions as in ``mlp``.

Memory per point: coordinates and targets, 4 (D + C) bytes; per program P numbers in, P out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .loss import loss_slope
from .mlp import features
from .number import dot, loaded, mul, once, operand


@triton.jit
def _row(p, at, inside, scale, SCALED: tl.constexpr):
    """A vector of parameters, zero beyond the width."""
    v = tl.load(p + at, mask=inside, other=0.0)
    if SCALED:
        v *= scale
    return v


@triton.jit
def resident(
    theta,
    dtheta,
    shadow,  # [T or 1, L−2, WP, WP]
    dshadow,
    first,  # [T or 1, WP, EP]: of an encoded first layer
    dfirst,
    x,
    basis,
    phi,
    given,  # ȳ, or the targets of a loss
    dgiven,
    counts,  # [T]
    scale,  # [T]: of δ
    v_scale,  # [T]: of tangents
    y_out,
    dy_out,
    losses,  # [T,splits]
    part,  # [T,splits,L−2,WP,WP]
    dpart,
    first_part,  # [T,splits,WP,EP]
    dfirst_part,
    thin,  # [T,splits,TH]
    dthin,
    N,
    splits,
    rows,  # of one split, a multiple of BM
    p_stride,
    v_stride,
    s_stride,
    ds_stride,
    f_stride,
    df_stride,
    x_stride,
    TH: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    IDENTITY: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    W0_FIRST: tl.constexpr,
    W0: tl.constexpr,
    SHIFT: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    ENCODED: tl.constexpr,
    DUAL: tl.constexpr,
    GRAD: tl.constexpr,  # in a dual pass: W̄ too, not its tangent alone
    BACK: tl.constexpr,  # false: y, or the loss, alone
    LOSS: tl.constexpr,  # None: given is ȳ
    CLAMP: tl.constexpr,
    GDUAL: tl.constexpr,  # dgiven is its tangent
    BM: tl.constexpr,
):
    """One program: the points of one split of one task, BM at a time."""
    REAL: tl.constexpr = theta.dtype.element_ty
    HIDDEN: tl.constexpr = W * W + W
    SUMS: tl.constexpr = "bf16x3" if MODE == "bf16" or MODE == "fp16" else "fp32"
    t = (tl.program_id(0) // splits).to(tl.int64)
    s = tl.program_id(0) % splits
    theta += t * p_stride
    shadow += t * s_stride
    first += t * f_stride
    x += t * x_stride
    vs = 1.0
    if DUAL:
        dtheta += t * v_stride
        dshadow += t * ds_stride
        dfirst += t * df_stride
        vs = tl.load(v_scale + t)
    n = tl.arange(0, WP)
    inside = n < W
    c = tl.arange(0, CP)
    shown = c < C
    e = tl.arange(0, EP)

    # weights: hidden ones as operands [out,in], the last in float32 [CP,WP]; tuples end in a dummy
    ws = (0,)
    dws = (0,)
    for i in tl.static_range(L - 2):
        block = (L - 3 - i) * (WP * WP) + n[:, None] * WP + n[None, :]
        ws = (loaded(tl.load(shadow + block), MODE),) + ws
        if DUAL:
            dws = (loaded(tl.load(dshadow + block), MODE),) + dws
    TAIL: tl.constexpr = (E + 1) * W + (L - 2) * HIDDEN
    entry = c[:, None] * W + n[None, :]
    there = shown[:, None] & inside[None, :]
    wl = tl.load(theta + TAIL + entry, mask=there, other=0.0)
    bl = tl.load(theta + TAIL + C * W + c, mask=shown, other=0.0)
    dwl = wl
    dbl = bl
    if DUAL:
        dwl = tl.load(dtheta + TAIL + entry, mask=there, other=0.0) * vs
        dbl = tl.load(dtheta + TAIL + C * W + c, mask=shown, other=0.0) * vs

    # sums over points
    gws = (0,)  # of hidden layers
    dgws = (0,)
    for _ in tl.static_range(L - 2):
        gws = (tl.zeros((WP, WP), REAL),) + gws
        dgws = (tl.zeros((WP, WP), REAL),) + dgws
    sides = tl.zeros((16, WP), REAL)  # rows: x̄ columns of a bare first layer, then biases
    dsides = sides
    ROW: tl.constexpr = 0 if ENCODED else D
    side = tl.arange(0, 16)
    gfirst = tl.zeros((WP, EP if ENCODED else 1), REAL)
    dgfirst = gfirst
    glast = tl.zeros((CP, WP), REAL)
    dglast = glast
    gbl = tl.zeros((CP,), REAL)
    dgbl = gbl
    total = tl.zeros((BM,), REAL)
    count = N
    inverse = 1.0
    if LOSS is not None:
        count = tl.load(counts + t)
        inverse = 1.0 / (count * C).to(REAL)
    big = 1.0
    if BACK:
        big = tl.load(scale + t)

    for m in range(s * rows, tl.minimum(s * rows + rows, N), BM):
        r = m + tl.arange(0, BM)
        real = r < N

        # forward: what is kept of each layer, the last layer first
        z = tl.zeros((BM, WP), REAL)
        dz = tl.zeros((BM, WP), REAL)
        f = (z, z)
        if ENCODED:
            f, _, _ = features(x, x, basis, phi, r, real, e, D, EP, IDENTITY, FIRST, False, REAL)
            a = operand(f[0], FIRST)
            w = loaded(tl.load(first + n[:, None] * EP + e[None, :]), FIRST)
            z = dot(a, tl.trans(w), z, FIRST)
            if DUAL:
                dw = loaded(tl.load(dfirst + n[:, None] * EP + e[None, :]), FIRST)
                dz = dot(a, tl.trans(dw), dz, FIRST)
        else:
            for d in tl.static_range(D):
                xd = tl.load(x + r * D + d, mask=real, other=0.0)[:, None]
                z += xd * _row(theta, n * D + d, inside, vs, False)[None, :]
                if DUAL:
                    dz += xd * _row(dtheta, n * D + d, inside, vs, True)[None, :]
        z += _row(theta, E * W + n, inside, vs, False)[None, :]
        if DUAL:
            dz += _row(dtheta, E * W + n, inside, vs, True)[None, :]
        h, slope = activate(z, dz, ACT, W0_FIRST, MODE, REAL, DUAL)
        kept = (0,)
        dkept = (0,)
        for i in tl.static_range(L - 2):
            if DUAL:
                kept = (once(z),) + kept
                dkept = (once(dz),) + dkept
                a = operand(once(h[0]), MODE)
            else:
                a = operand(once(h[0]), MODE)
                kept = (a,) + kept
                dkept = (once(slope[0]),) + dkept
            w = tl.trans(ws[i])
            z = dot(a, w, tl.zeros((BM, WP), REAL), MODE)
            b0 = (E + 1) * W + i * HIDDEN + W * W
            z += _row(theta, b0 + n, inside, vs, False)[None, :]
            if DUAL:
                dz = dot(a, tl.trans(dws[i]), tl.zeros((BM, WP), REAL), MODE)
                dz = dot(operand(once(h[1]), MODE), w, dz, MODE)
                dz += _row(dtheta, b0 + n, inside, vs, True)[None, :]
            h, slope = activate(z, dz, ACT, W0, MODE, REAL, DUAL)
        zl = dot(h[0], tl.trans(wl), tl.zeros((BM, CP), REAL), "fp32") + bl[None, :]
        dzl = zl
        if DUAL:
            dzl = dot(h[0], tl.trans(dwl), tl.zeros((BM, CP), REAL), "fp32")
            dzl = dot(h[1], tl.trans(wl), dzl, "fp32") + dbl[None, :]
        y, rise = activate(zl, dzl, OUT, 1.0, "fp32", REAL, DUAL)
        place = (t * N + r)[:, None] * C + c[None, :]
        valid = real[:, None] & shown[None, :]
        if not BACK:
            if LOSS is None:
                tl.store(y_out + place, y[0] + SHIFT, mask=valid)
                if DUAL:
                    tl.store(dy_out + place, y[1] / vs, mask=valid)
            else:
                g = tl.load(given + place, mask=valid, other=0.0)
                ell, turn = loss_slope((y[0] + SHIFT, y[1]), g, LOSS, CLAMP, DUAL)
                counted = valid & (r < count)[:, None]
                total += tl.sum(tl.where(counted, ell, 0.0), 1)
        else:
            g = tl.load(given + place, mask=valid, other=0.0)
            if LOSS is None:
                dg = tl.zeros((BM, CP), REAL)
                if GDUAL:
                    dg = tl.load(dgiven + place, mask=valid, other=0.0)
                gy = (g * big, dg * big)
            else:
                valid = valid & (r < count)[:, None]
                ell, turn = loss_slope((y[0] + SHIFT, y[1]), g, LOSS, CLAMP, DUAL)
                total += tl.sum(tl.where(valid, ell, 0.0), 1)
                by = inverse * big
                gy = (tl.where(valid, turn[0] * by, 0.0), tl.where(valid, turn[1] * by, 0.0))

            # back through the last layer
            dl = mul(rise, gy, DUAL)  # [BM,CP]
            if GRAD:
                gbl += tl.sum(dl[0], 0)
                glast = dot(tl.trans(dl[0]), h[0], glast, SUMS)
            gh = dot(dl[0], wl, tl.zeros((BM, WP), REAL), "fp32")
            dgh = gh
            if DUAL:
                dgbl += tl.sum(dl[1], 0)
                dglast = dot(tl.trans(dl[1]), h[0], dglast, SUMS)
                dglast = dot(tl.trans(dl[0]), h[1], dglast, SUMS)
                dgh = dot(dl[1], wl, tl.zeros((BM, WP), REAL), "fp32")
                dgh = dot(dl[0], dwl, dgh, "fp32")

            # through the hidden layers; the new sums are put together from the back
            new = (0,)
            dnew = (0,)
            for i in tl.static_range(L - 2):
                de = mul(slope, (gh, dgh), DUAL)
                a = operand(de[0], MODE)
                w = ws[L - 3 - i]
                one = tl.where(side == ROW + L - 2 - i, 1.0, 0.0).to(REAL)  # [16]
                one = operand(tl.zeros((16, BM), REAL) + one[:, None], MODE)
                if GRAD:
                    sides = dot(one, a, sides, MODE)
                gh = dot(a, w, tl.zeros((BM, WP), REAL), MODE)
                if DUAL:
                    w0 = W0_FIRST if i == L - 3 else W0
                    h, slope = activate(kept[i], dkept[i], ACT, w0, MODE, REAL, DUAL)
                    below = operand(h[0], MODE)
                    da = operand(de[1], MODE)
                    dsides = dot(one, da, dsides, MODE)
                    dgh = dot(da, w, tl.zeros((BM, WP), REAL), MODE)
                    dgh = dot(a, dws[L - 3 - i], dgh, MODE)
                    acc = dot(tl.trans(da), below, dgws[L - 3 - i], MODE)
                    dnew = (dot(tl.trans(a), operand(h[1], MODE), acc, MODE),) + dnew
                else:
                    below = kept[i]
                    slope = (dkept[i], dkept[i])
                if GRAD:
                    new = (dot(tl.trans(a), below, gws[L - 3 - i], MODE),) + new
            if GRAD:
                gws = new
            if DUAL:
                dgws = dnew

            # the first layer's sums
            de = mul(slope, (gh, dgh), DUAL)
            xs = tl.where(side == ROW, 1.0, 0.0).to(REAL)[:, None] + tl.zeros((16, BM), REAL)
            if not ENCODED:
                for d in tl.static_range(D):
                    xd = tl.load(x + r * D + d, mask=real, other=0.0)[None, :]
                    xs += tl.where((side == d)[:, None], xd, 0.0)
            if GRAD:
                sides = dot(xs, de[0], sides, SUMS)
            if DUAL:
                dsides = dot(xs, de[1], dsides, SUMS)
            if ENCODED:
                a = operand(f[0], FIRST)
                if GRAD:
                    gfirst = dot(tl.trans(operand(de[0], FIRST)), a, gfirst, FIRST)
                if DUAL:
                    dgfirst = dot(tl.trans(operand(de[1], FIRST)), a, dgfirst, FIRST)

    p = t * splits + s
    if LOSS is not None:
        tl.store(losses + p, tl.sum(total, 0) * inverse)
    if BACK:
        if GRAD:
            _sums_out(
                gws, sides, gfirst, glast, gbl, part, first_part, thin, p, n, c, e,
                TH, D, EP, W, WP, L, C, ENCODED,
            )  # fmt: skip
        if DUAL:
            _sums_out(
                dgws, dsides, dgfirst, dglast, dgbl, dpart, dfirst_part, dthin, p, n, c, e,
                TH, D, EP, W, WP, L, C, ENCODED,
            )  # fmt: skip


@triton.jit
def _sums_out(
    gws, sides, gfirst, glast, gbl, part, first_part, thin, p, n, c, e,
    TH: tl.constexpr, D: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, ENCODED: tl.constexpr,
):  # fmt: skip
    """A program's sums, as ``step._gathered`` reads them."""
    LOW: tl.constexpr = 0 if ENCODED else D * W
    inside = n < W
    for i in tl.static_range(L - 2):
        block = (p * (L - 2) + i) * (WP * WP) + n[:, None] * WP + n[None, :]
        tl.store(part + block, gws[i])
    thin += p * TH
    side = tl.arange(0, 16)
    row = side - (0 if ENCODED else D)
    there = (row >= 0) & (row < L - 1)
    at = LOW + row[:, None] * W + n[None, :]
    tl.store(thin + at, sides, mask=there[:, None] & inside[None, :])
    if ENCODED:
        tl.store(first_part + p * (WP * EP) + n[:, None] * EP + e[None, :], gfirst)
    else:
        at = n[None, :] * D + side[:, None]
        tl.store(thin + at, sides, mask=(side < D)[:, None] & inside[None, :])
    last = thin + LOW + (L - 1) * W
    there = (c < C)[:, None] & inside[None, :]
    tl.store(last + c[:, None] * W + n[None, :], glast, mask=there)
    tl.store(last + C * W + c, gbl, mask=c < C)
