"""Kernels of the streamed network: any width to 512, any depth; activations go through memory.

A tile of BM points goes through all layers in one program. Between two layers it is written to
memory (there it must be anyway, for the way back) and read again in chunks of BK columns by the
same program, so it comes from L1 or L2. Weights [out,in] come as padded operands (``shadow``:
zero beyond the width), chunk by chunk, from L2.

    ahead    z_l = W_l h_{l-1} + b_l                    keeps z_l (2 bytes for sine and ReLU)
    back     δ_l = φ'(z_l) h̄_l, h̄_{l-1} = W_lᵀ δ_l     keeps δ_l; thin sums: biases, first and last
    weigh    W̄_l = Σ δ_l h_{l-1}ᵀ                       split over points, partial sums
    finish   adds partial sums in a fixed order, then the gradient, the step or the walk

Everything runs on plain and on dual numbers. No atomics; the same bits every run.

The first layer on bare coordinates (D ≤ 4) is float32 multiply-adds, the last layer three TF32
products or float64 under the interpreter, whatever MODE says; so are their gradients and all
biases' ("thin"). FIRST is the precision of a first layer on encoded features.

Per hidden unit and point, in bytes of memory at 16 bits: ahead 2, back 2 + 2, weigh 4 (kept
values and deltas read again within a tile come from L2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, curve, keep, wave
from .loss import loss_slope
from .number import dot, loaded, mul, operand


@triton.jit
def _w0(layer, W0_FIRST: tl.constexpr, W0: tl.constexpr):
    """w0 of the hidden layer with that index."""
    if W0_FIRST == W0:
        return W0
    return tl.where(layer == 0, W0_FIRST, W0)


@triton.jit
def features(
    x,  # at this task
    dx,
    basis,  # [D,EP]
    phi,  # [EP]
    rows,
    real,  # which rows exist
    e,
    D: tl.constexpr,
    EP: tl.constexpr,
    IDENTITY: tl.constexpr,
    FIRST: tl.constexpr,
    XDUAL: tl.constexpr,
    REAL: tl.constexpr,
):
    """Encoded features of a tile, ``sin(xB + φ)``, the first IDENTITY the coordinates themselves:
    the number, and ``(q̇, sin q, cos q)`` for the way back. [rows, e]."""
    q = tl.zeros((rows.shape[0], e.shape[0]), REAL) + tl.load(phi + e)[None, :]
    dq = tl.zeros((rows.shape[0], e.shape[0]), REAL)
    for d in tl.static_range(D):
        b = tl.load(basis + d * EP + e)
        q += tl.load(x + rows * D + d, mask=real, other=0.0)[:, None] * b[None, :]
        if XDUAL:
            dq += tl.load(dx + rows * D + d, mask=real, other=0.0)[:, None] * b[None, :]
    s, c = wave(q, FIRST)
    if IDENTITY > 0:
        bare = (e < IDENTITY)[None, :]
        s = tl.where(bare, q, s)
        c = tl.where(bare, 1.0, c)
    df = s
    if XDUAL:
        df = c * dq
    return (s, df), dq, c


@triton.jit
def ahead(
    theta,
    dtheta,
    shadow,  # [T or 1, L−2, WP, WP]
    dshadow,
    first,  # [T or 1, WP, EP]: of an encoded first layer
    dfirst,
    x,
    dx,
    basis,
    phi,
    kept,
    dkept,
    z_out,
    dz_out,
    y_out,
    dy_out,
    v_scale,  # [T]: dtheta and dx are multiplied by it (dshadow is already)
    N,
    NP,
    tiles,
    p_stride,
    v_stride,
    s_stride,
    ds_stride,
    f_stride,
    df_stride,
    x_stride,
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
    XDUAL: tl.constexpr,
    SLOTS: tl.constexpr,  # layers of kept: L−1, or 2 where nothing is kept
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    BL: tl.constexpr,
):
    """``y = out(z_L) + shift``, ``z_l = W_l h_{l-1} + b_l``; one program: BM points of one task."""
    REAL: tl.constexpr = theta.dtype.element_ty
    t = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles
    r = tl.arange(0, BM)
    real = m * BM + r < N
    theta += t * p_stride
    shadow += t * s_stride
    first += t * f_stride
    x += t * x_stride + m.to(tl.int64) * (BM * D)
    at = (t * SLOTS * NP + m * BM) * WP  # of this tile in slot 0
    layer = NP.to(tl.int64) * WP  # between slots
    vs = 1.0
    if DUAL:
        dtheta += t * v_stride
        dshadow += t * ds_stride
        dfirst += t * df_stride
        dx += t * x_stride + m.to(tl.int64) * (BM * D)
        vs = tl.load(v_scale + t)

    # first layer
    for n0 in range(0, WP, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < W
        bias = theta + E * W + n
        z = tl.zeros((BM, BN), REAL)
        dz = tl.zeros((BM, BN), REAL)
        if ENCODED:
            for e0 in range(0, EP, BE):
                e = e0 + tl.arange(0, BE)
                h, _, _ = features(
                    x, dx, basis, phi, r, real, e, D, EP, IDENTITY, FIRST, XDUAL, REAL
                )
                a = operand(h[0], FIRST)
                w = loaded(tl.load(first + n[:, None] * EP + e[None, :]), FIRST)
                z = dot(a, tl.trans(w), z, FIRST)
                if DUAL:
                    dw = loaded(tl.load(dfirst + n[:, None] * EP + e[None, :]), FIRST)
                    dz = dot(a, tl.trans(dw), dz, FIRST)
                if XDUAL:
                    dz = dot(operand(h[1] * vs, FIRST), tl.trans(w), dz, FIRST)
        else:
            for d in tl.static_range(D):
                xd = tl.load(x + r * D + d, mask=real, other=0.0)
                w = tl.load(theta + n * D + d, mask=inside, other=0.0)
                z += xd[:, None] * w[None, :]
                if DUAL:
                    dw = tl.load(dtheta + n * D + d, mask=inside, other=0.0) * vs
                    dz += xd[:, None] * dw[None, :]
                if XDUAL:
                    dxd = tl.load(dx + r * D + d, mask=real, other=0.0) * vs
                    dz += dxd[:, None] * w[None, :]
        z += tl.load(bias, mask=inside, other=0.0)[None, :]
        where = r[:, None] * WP + n[None, :]
        tl.store(kept + at + where, keep(z, ACT, W0_FIRST, MODE))
        if DUAL:
            dz += (tl.load(dtheta + E * W + n, mask=inside, other=0.0) * vs)[None, :]
            tl.store(dkept + at + where, operand(dz, MODE))

    # hidden layers
    for l in range(1, L - 1):
        tl.debug_barrier()  # this program's own stores of layer l−1
        src = at + ((l - 1) % SLOTS) * layer
        dst = at + (l % SLOTS) * layer
        weight = (l - 1) * (WP * WP)
        b0 = (E + 1) * W + (l - 1) * (W + 1) * W + W * W
        w0 = _w0(l - 1, W0_FIRST, W0)
        for n0 in range(0, WP, BN):
            n = n0 + tl.arange(0, BN)
            inside = n < W
            z = tl.zeros((BM, BN), REAL)
            dz = tl.zeros((BM, BN), REAL)
            for k0 in range(0, WP, BK):
                k = k0 + tl.arange(0, BK)
                col = r[:, None] * WP + k[None, :]
                kz = loaded(tl.load(kept + src + col), MODE)
                kdz = kz
                if DUAL:
                    kdz = loaded(tl.load(dkept + src + col), MODE).to(REAL)
                h, _ = activate(kz, kdz, ACT, w0, MODE, REAL, DUAL)
                a = operand(h[0], MODE)
                block = weight + n[:, None] * WP + k[None, :]
                w = tl.trans(loaded(tl.load(shadow + block), MODE))
                z = dot(a, w, z, MODE)
                if DUAL:
                    dw = tl.trans(loaded(tl.load(dshadow + block), MODE))
                    dz = dot(a, dw, dz, MODE)
                    dz = dot(operand(h[1], MODE), w, dz, MODE)
            z += tl.load(theta + b0 + n, mask=inside, other=0.0)[None, :]
            where = r[:, None] * WP + n[None, :]
            tl.store(kept + dst + where, keep(z, ACT, W0, MODE))
            if DUAL:
                dz += (tl.load(dtheta + b0 + n, mask=inside, other=0.0) * vs)[None, :]
                tl.store(dkept + dst + where, operand(dz, MODE))

    # last layer
    tl.debug_barrier()
    src = at + ((L - 2) % SLOTS) * layer
    last = (E + 1) * W + (L - 2) * (W + 1) * W
    w0 = _w0(L - 2, W0_FIRST, W0)
    c = tl.arange(0, CP)
    shown = c < C
    z = tl.zeros((BM, CP), REAL)
    dz = tl.zeros((BM, CP), REAL)
    for k0 in range(0, WP, BL):
        k = k0 + tl.arange(0, BL)
        col = r[:, None] * WP + k[None, :]
        kz = loaded(tl.load(kept + src + col), MODE)
        kdz = kz
        if DUAL:
            kdz = loaded(tl.load(dkept + src + col), MODE).to(REAL)
        h, _ = activate(kz, kdz, ACT, w0, MODE, REAL, DUAL)
        entry = last + c[:, None] * W + k[None, :]
        there = shown[:, None] & (k < W)[None, :]
        w = tl.trans(tl.load(theta + entry, mask=there, other=0.0))
        z = dot(h[0], w, z, "fp32")
        if DUAL:
            dw = tl.trans(tl.load(dtheta + entry, mask=there, other=0.0)) * vs
            dz = dot(h[0], dw, dz, "fp32")
            dz = dot(h[1], w, dz, "fp32")
    z += tl.load(theta + last + C * W + c, mask=shown, other=0.0)[None, :]
    where = (t * N + m * BM + r)[:, None] * C + c[None, :]
    there = real[:, None] & shown[None, :]
    f, rise, _ = curve(z, OUT, 1.0, "fp32", REAL)
    tl.store(z_out + where, z, mask=there)
    tl.store(y_out + where, f + SHIFT, mask=there)
    if DUAL:
        dz += (tl.load(dtheta + last + C * W + c, mask=shown, other=0.0) * vs)[None, :]
        tl.store(dz_out + where, dz, mask=there)
        tl.store(dy_out + where, rise * dz / vs, mask=there)


@triton.jit
def back(
    theta,
    dtheta,
    shadow,  # [T or 1, L−2, WP, WP]
    dshadow,
    first,  # [T or 1, WP, EP]: of an encoded first layer
    dfirst,
    x,
    dx,
    basis,
    phi,
    kept,
    dkept,
    z_in,
    dz_in,
    given,  # ȳ, or the targets of a loss
    dgiven,
    counts,  # [T]
    scale,  # [T]: of δ
    v_scale,  # [T]: of tangents
    losses,  # [T,tiles]
    delta,
    ddelta,
    thin,  # [T,tiles,TH]
    dthin,
    gx,
    dgx,
    N,
    NP,
    tiles,
    p_stride,
    v_stride,
    s_stride,
    ds_stride,
    f_stride,
    df_stride,
    x_stride,
    TH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
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
    XDUAL: tl.constexpr,
    LOSS: tl.constexpr,  # None: given is ȳ
    CLAMP: tl.constexpr,
    GDUAL: tl.constexpr,  # dgiven is its tangent
    CHAIN: tl.constexpr,  # false: the loss alone
    WANT_X: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    BL: tl.constexpr,
):
    """``δ_l = φ'(z_l) h̄_l``, ``h̄_{l-1} = W_lᵀ δ_l`` from ȳ or a loss; one program: BM points of one
    task. Thin sums over its points: W̄ of a first layer on bare coordinates and of the last, b̄ of
    all; ``x̄`` where wanted."""
    REAL: tl.constexpr = theta.dtype.element_ty
    t = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles
    r = tl.arange(0, BM)
    real = m * BM + r < N
    c = tl.arange(0, CP)
    shown = c < C
    vs = 1.0
    if DUAL:
        vs = tl.load(v_scale + t)

    # δ of the last layer
    place = (t * N + m * BM + r)[:, None] * C + c[None, :]
    valid = real[:, None] & shown[None, :]
    z = tl.load(z_in + place, mask=valid, other=0.0)
    dz = z
    if DUAL:
        dz = tl.load(dz_in + place, mask=valid, other=0.0)
    y, rise = activate(z, dz, OUT, 1.0, "fp32", REAL, DUAL)
    ybar = tl.load(given + place, mask=valid, other=0.0)
    if LOSS is None:
        dg = tl.zeros((BM, CP), REAL)
        if GDUAL:
            dg = tl.load(dgiven + place, mask=valid, other=0.0)
        gy = (ybar, dg)
    else:
        count = tl.load(counts + t)
        valid = valid & (m * BM + r < count)[:, None]
        inverse = 1.0 / (count * C).to(REAL)
        value, turn = loss_slope((y[0] + SHIFT, y[1]), ybar, LOSS, CLAMP, DUAL)
        part = tl.sum(tl.sum(tl.where(valid, value, 0.0), 1), 0) * inverse
        tl.store(losses + t * tiles + m, part)
        gy = (tl.where(valid, turn[0] * inverse, 0.0), tl.where(valid, turn[1] * inverse, 0.0))
    if CHAIN:
        big = tl.load(scale + t)
        dl = mul(rise, (gy[0] * big, gy[1] * big), DUAL)
        theta += t * p_stride
        shadow += t * s_stride
        first += t * f_stride
        x += t * x_stride + m.to(tl.int64) * (BM * D)
        thin += (t * tiles + m) * TH
        at = (t * (L - 1) * NP + m * BM) * WP
        layer = NP.to(tl.int64) * WP
        if DUAL:
            dtheta += t * v_stride
            dshadow += t * ds_stride
            dfirst += t * df_stride
            dx += t * x_stride + m.to(tl.int64) * (BM * D)
            dthin += (t * tiles + m) * TH
        last = (E + 1) * W + (L - 2) * (W + 1) * W
        thin_last = (1 if ENCODED else D + 1) * W + (L - 2) * W
        tl.store(thin + thin_last + C * W + c, tl.sum(dl[0], 0), mask=shown)
        if DUAL:
            tl.store(dthin + thin_last + C * W + c, tl.sum(dl[1], 0), mask=shown)

        # through the last layer
        src = at + (L - 2) * layer
        w0 = _w0(L - 2, W0_FIRST, W0)
        for n0 in range(0, WP, BL):
            n = n0 + tl.arange(0, BL)
            where = r[:, None] * WP + n[None, :]
            kz = loaded(tl.load(kept + src + where), MODE)
            kdz = kz
            if DUAL:
                kdz = loaded(tl.load(dkept + src + where), MODE).to(REAL)
            h, slope = activate(kz, kdz, ACT, w0, MODE, REAL, DUAL)
            entry = c[:, None] * W + n[None, :]
            inside = shown[:, None] & (n < W)[None, :]
            w = tl.load(theta + last + entry, mask=inside, other=0.0)  # [CP,BL]
            gw = dot(tl.trans(dl[0]), h[0], tl.zeros((CP, BL), REAL), "fp32")
            tl.store(thin + thin_last + entry, gw, mask=inside)
            gh = dot(dl[0], w, tl.zeros((BM, BL), REAL), "fp32")
            dgh = gh
            if DUAL:
                dw = tl.load(dtheta + last + entry, mask=inside, other=0.0) * vs
                dgw = dot(tl.trans(dl[1]), h[0], tl.zeros((CP, BL), REAL), "fp32")
                dgw = dot(tl.trans(dl[0]), h[1], dgw, "fp32")
                tl.store(dthin + thin_last + entry, dgw, mask=inside)
                dgh = dot(dl[1], w, tl.zeros((BM, BL), REAL), "fp32")
                dgh = dot(dl[0], dw, dgh, "fp32")
            de = mul(slope, (gh, dgh), DUAL)
            _delta_out(
                de,
                x,
                dx,
                thin,
                dthin,
                delta,
                ddelta,
                src,
                where,
                n,
                r,
                real,
                vs,
                L - 2,
                D,
                W,
                MODE,
                ENCODED,
                DUAL,
                XDUAL,
                WANT_X,
                REAL,
            )

        # through the hidden layers
        for back_l in range(0, L - 2):
            l = L - 2 - back_l
            tl.debug_barrier()  # this program's own δ_l
            src = at + l * layer
            dst = at + (l - 1) * layer
            weight = (l - 1) * (WP * WP)
            w0 = _w0(l - 1, W0_FIRST, W0)
            for n0 in range(0, WP, BN):
                n = n0 + tl.arange(0, BN)
                gh = tl.zeros((BM, BN), REAL)
                dgh = tl.zeros((BM, BN), REAL)
                for k0 in range(0, WP, BK):
                    k = k0 + tl.arange(0, BK)
                    col = r[:, None] * WP + k[None, :]
                    block = weight + k[:, None] * WP + n[None, :]
                    a = loaded(tl.load(delta + src + col), MODE)
                    w = loaded(tl.load(shadow + block), MODE)
                    gh = dot(a, w, gh, MODE)
                    if DUAL:
                        da = loaded(tl.load(ddelta + src + col), MODE)
                        dw = loaded(tl.load(dshadow + block), MODE)
                        dgh = dot(da, w, dgh, MODE)
                        dgh = dot(a, dw, dgh, MODE)
                where = r[:, None] * WP + n[None, :]
                kz = loaded(tl.load(kept + dst + where), MODE)
                kdz = kz
                if DUAL:
                    kdz = loaded(tl.load(dkept + dst + where), MODE).to(REAL)
                _, slope = activate(kz, kdz, ACT, w0, MODE, REAL, DUAL)
                de = mul(slope, (gh, dgh), DUAL)
                _delta_out(
                    de,
                    x,
                    dx,
                    thin,
                    dthin,
                    delta,
                    ddelta,
                    dst,
                    where,
                    n,
                    r,
                    real,
                    vs,
                    l - 1,
                    D,
                    W,
                    MODE,
                    ENCODED,
                    DUAL,
                    XDUAL,
                    WANT_X,
                    REAL,
                )

        if WANT_X:
            tl.debug_barrier()
            unscale = 1.0 / big
            d = tl.arange(0, DP)
            total = tl.zeros((BM, DP), REAL)
            dtotal = tl.zeros((BM, DP), REAL)
            if ENCODED:
                for e0 in range(0, EP, BE):
                    e = e0 + tl.arange(0, BE)
                    gh, dgh = _features_back(
                        delta, ddelta, first, dfirst, at, r, e,
                        EP, WP, MODE, FIRST, DUAL, REAL, BM, BK, BE,
                    )  # fmt: skip
                    h, dq, cosine = features(
                        x, dx, basis, phi, r, real, e, D, EP, IDENTITY, FIRST, XDUAL, REAL
                    )
                    gq = cosine * gh
                    dgq = gq
                    if DUAL:
                        dgq = cosine * dgh
                        if XDUAL:
                            sine = tl.where((e < IDENTITY)[None, :], 0.0, h[0])
                            dgq -= sine * (dq * vs) * gh
                    for i in tl.static_range(D):
                        b = tl.load(basis + i * EP + e)[None, :]
                        column = (d == i)[None, :]
                        total += tl.where(column, tl.sum(gq * b, 1)[:, None], 0.0)
                        if DUAL:
                            dtotal += tl.where(column, tl.sum(dgq * b, 1)[:, None], 0.0)
            else:
                for n0 in range(0, WP, BN):
                    n = n0 + tl.arange(0, BN)
                    where = at + r[:, None] * WP + n[None, :]
                    a = loaded(tl.load(delta + where), MODE).to(REAL)
                    da = a
                    if DUAL:
                        da = loaded(tl.load(ddelta + where), MODE).to(REAL)
                    for i in tl.static_range(D):
                        w = tl.load(theta + n * D + i, mask=n < W, other=0.0)[None, :]
                        column = (d == i)[None, :]
                        total += tl.where(column, tl.sum(a * w, 1)[:, None], 0.0)
                        if DUAL:
                            dw = tl.load(dtheta + n * D + i, mask=n < W, other=0.0)[None, :]
                            both = da * w + a * (dw * vs)
                            dtotal += tl.where(column, tl.sum(both, 1)[:, None], 0.0)
            where = ((t * N + m * BM) + r)[:, None] * D + d[None, :]
            there = real[:, None] & (d < D)[None, :]
            tl.store(gx + where, total * unscale, mask=there)
            if DUAL:
                tl.store(dgx + where, dtotal * unscale / vs, mask=there)


@triton.jit
def _delta_out(
    de,
    x,
    dx,
    thin,
    dthin,
    delta,
    ddelta,
    at,
    where,
    n,
    r,
    real,
    vs,
    layer,
    D: tl.constexpr,
    W: tl.constexpr,
    MODE: tl.constexpr,
    ENCODED: tl.constexpr,
    DUAL: tl.constexpr,
    XDUAL: tl.constexpr,
    WANT_X: tl.constexpr,
    REAL: tl.constexpr,
):
    """Stores δ of a hidden layer for the products to come, and its thin sums: b̄, and W̄ of a first
    layer on bare coordinates."""
    inside = n < W
    bias = (1 if ENCODED else D + 1) * W + (layer - 1) * W
    tl.store(thin + bias + n, tl.sum(de[0], 0), mask=inside)
    if DUAL:
        tl.store(dthin + bias + n, tl.sum(de[1], 0), mask=inside)
    if not ENCODED:
        if layer == 0:
            for d in tl.static_range(D):
                xd = tl.load(x + r * D + d, mask=real, other=0.0)[:, None]
                tl.store(thin + n * D + d, tl.sum(de[0] * xd, 0), mask=inside)
                if DUAL:
                    g = de[1] * xd
                    if XDUAL:
                        dxd = tl.load(dx + r * D + d, mask=real, other=0.0) * vs
                        g += de[0] * dxd[:, None]
                    tl.store(dthin + n * D + d, tl.sum(g, 0), mask=inside)
    if ENCODED or WANT_X:
        _store_delta(de, delta, ddelta, at + where, MODE, DUAL)
    else:
        if layer > 0:
            _store_delta(de, delta, ddelta, at + where, MODE, DUAL)


@triton.jit
def _store_delta(de, delta, ddelta, where, MODE: tl.constexpr, DUAL: tl.constexpr):
    tl.store(delta + where, operand(de[0], MODE))
    if DUAL:
        tl.store(ddelta + where, operand(de[1], MODE))


@triton.jit
def _features_back(
    delta,
    ddelta,
    first,
    dfirst,
    at,
    r,
    e,
    EP: tl.constexpr,
    WP: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    DUAL: tl.constexpr,
    REAL: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
):
    """``h̄_0 = W_1ᵀ δ_1`` for BE features, and its tangent."""
    gh = tl.zeros((BM, BE), REAL)
    dgh = tl.zeros((BM, BE), REAL)
    for k0 in range(0, WP, BK):
        k = k0 + tl.arange(0, BK)
        where = at + r[:, None] * WP + k[None, :]
        block = k[:, None] * EP + e[None, :]
        a = operand(loaded(tl.load(delta + where), MODE).to(REAL), FIRST)
        w = loaded(tl.load(first + block), FIRST)
        gh = dot(a, w, gh, FIRST)
        if DUAL:
            da = operand(loaded(tl.load(ddelta + where), MODE).to(REAL), FIRST)
            dw = loaded(tl.load(dfirst + block), FIRST)
            dgh = dot(da, w, dgh, FIRST)
            dgh = dot(a, dw, dgh, FIRST)
    return gh, dgh
