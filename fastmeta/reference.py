"""The whole mathematics in plain PyTorch, float32 or float64: the specification that every worker
is tested against.

Each pass stands here once and runs on two kinds of number. On tensors, ``forward`` and ``backward``
give y and the gradient. On ``Dual`` numbers a + ε ȧ (ε² = 0) the same lines give ẏ and the
derivative of the gradient: with ȧ = v in the weights, the tangent of the gradient is the
Hessian-vector product H v.

Everything is written over T tasks: weights [T,out,in], coordinates [T,N,D]; one set of weights for
all tasks has T = 1. Memory stays at one tile of points: activations are recomputed, never kept
between passes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import rng
from .batch import Batch, March, Project, Rays
from .rules import SGD, Adam, Momentum, Rule
from .spec import MLP, encoding_tensors

DTYPES = (torch.float32, torch.float64)
PRECISIONS = ("fp32",)  # float64 comes by the tensors' dtype

_F = TypeVar("_F", bound=Callable[..., Any])


def objections(case: Any) -> list[str]:
    """Why this worker cannot run a case of the dispatcher; empty: it can."""
    reasons = []
    if case.dtype not in DTYPES:
        reasons.append(f"dtype {case.dtype} (float32 and float64 only)")
    if case.precision is not None and case.precision not in PRECISIONS:
        reasons.append(f"precision {case.precision!r} (fp32 only; float64 by the tensors' dtype)")
    return reasons


def at(precision: str | None) -> ModuleType:
    """The passes in an arithmetic: this module, which has one for each dtype."""
    return sys.modules[__name__]


def exact(function: _F) -> _F:
    """Run a pass without autograd, without autocast, and with float32 products in full float32."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        backends: Any = torch.backends
        settings = (backends.mkldnn.matmul, backends.cuda.matmul)
        before = [s.fp32_precision for s in settings]
        try:
            for s in settings:
                s.fp32_precision = "ieee"
            with (
                torch.no_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
            ):
                return function(*args, **kwargs)
        finally:
            for s, value in zip(settings, before, strict=True):
                s.fp32_precision = value

    return run  # type: ignore[return-value]


# Dual numbers ---


class Dual:
    """a + ε d with ε² = 0: a tensor and its tangent; d is None where it is zero."""

    __slots__ = ("a", "d")

    def __init__(self, a: Tensor, d: Tensor | None = None) -> None:
        self.a, self.d = a, d

    def __add__(self, other: Number | float) -> Dual:
        return Dual(self.a + value(other), _plus(self.d, tangent(other)))

    def __neg__(self) -> Dual:
        return Dual(-self.a, None if self.d is None else -self.d)

    def __sub__(self, other: Number | float) -> Dual:
        return self + (-other)

    def __rsub__(self, other: Number | float) -> Dual:
        return -self + other

    def __mul__(self, other: Number | float) -> Dual:
        return Dual(
            self.a * value(other),
            _plus(_times(self.d, value(other)), _times(tangent(other), self.a)),
        )

    def __matmul__(self, other: Number) -> Dual:
        d = None if self.d is None else self.d @ value(other)
        e = tangent(other)
        return Dual(self.a @ value(other), d if e is None else _plus(d, self.a @ e))

    def __rmatmul__(self, other: Tensor) -> Dual:
        return Dual(other, None) @ self

    def __getitem__(self, index: Any) -> Dual:
        return self.map(lambda t: t[index])

    @property
    def mT(self) -> Dual:
        return self.map(lambda t: t.mT)

    def sum(self, dim: int) -> Dual:
        return self.map(lambda t: t.sum(dim))

    def map(self, linear: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function, such as a view, of value and tangent alike."""
        return Dual(linear(self.a), None if self.d is None else linear(self.d))

    __radd__ = __add__
    __rmul__ = __mul__


# Tensor | Dual. Both run through the same lines, which mypy cannot follow: to it this is Any.
Number = Any


def value(x: Any) -> Any:
    return x.a if isinstance(x, Dual) else x


def tangent(x: Any) -> Tensor | None:
    return x.d if isinstance(x, Dual) else None


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _times(a: Tensor | None, b: Any) -> Tensor | None:
    return None if a is None else a * b


def _linear(f: Callable[[Tensor], Tensor], x: Number) -> Number:
    return x.map(f) if isinstance(x, Dual) else f(x)


def _chain(x: Number, y: Tensor, slope: Callable[[], Tensor]) -> Number:
    """y = f(x) with f'(x) = slope(): the tangent is f'(x) ẋ."""
    if not isinstance(x, Dual):
        return y
    return Dual(y, None if x.d is None else slope() * x.d)


def _join(join: Callable[..., Tensor], parts: list[Number], dim: int) -> Number:
    """torch.cat or torch.stack of numbers."""
    if not any(isinstance(p, Dual) for p in parts):
        return join(parts, dim)
    tangents = [tangent(p) for p in parts]
    if all(t is None for t in tangents):
        return Dual(join([value(p) for p in parts], dim))
    filled = [
        torch.zeros_like(value(p)) if t is None else t for p, t in zip(parts, tangents, strict=True)
    ]
    return Dual(join([value(p) for p in parts], dim), join(filled, dim))


# Activations: z -> (φ(z), φ'(z)), as numbers of z's kind; φ'' enters as the tangent of φ' ---------


def activation(name: str, z: Number, w0: float = 1.0) -> tuple[Number, Number | None]:
    """``h = φ(z)`` and ``φ'(z)``; None stands for φ' = 1. Every second derivative is the tangent of
    φ'."""
    if name in ("none", "linear"):
        return z, None
    h, first, second = _ACTIVATIONS[name](value(z), w0)
    return _chain(z, h, lambda: first), _chain(z, first, second)


def _sine(z: Tensor, w0: float) -> tuple:
    s, c = torch.sin(w0 * z), torch.cos(w0 * z)
    return s, w0 * c, lambda: -(w0 * w0) * s


def _relu(z: Tensor, _: float) -> tuple:
    return z.clamp(min=0), (z > 0).to(z.dtype), lambda: torch.zeros_like(z)


def _tanh(z: Tensor, _: float) -> tuple:
    t = torch.tanh(z)
    return t, 1 - t * t, lambda: -2 * t * (1 - t * t)


def _sigmoid(z: Tensor, _: float) -> tuple:
    s = torch.sigmoid(z)
    return s, s * (1 - s), lambda: s * (1 - s) * (1 - 2 * s)


def _softplus(z: Tensor, _: float) -> tuple:
    s = torch.sigmoid(z)
    return torch.logaddexp(z, torch.zeros_like(z)), s, lambda: s * (1 - s)


def _gelu(z: Tensor, _: float) -> tuple:
    normal = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    cdf = 0.5 * torch.erfc(-z / math.sqrt(2.0))
    return z * cdf, cdf + z * normal, lambda: normal * (2 - z * z)


def _silu(z: Tensor, _: float) -> tuple:
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s)), lambda: s * (1 - s) * (2 + z * (1 - 2 * s))


_ACTIVATIONS: dict[str, Callable[[Tensor, float], tuple]] = {
    "sine": _sine,
    "relu": _relu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "gelu": _gelu,
    "silu": _silu,
}


# The network: encode, forward, backward ---


def encode(net: MLP, x: Number) -> tuple[Number, Number | None]:
    """``h_0 = concat(x if include_input, sin(xB + φ))`` [T,N,E], and cos(xB + φ) [T,N,F] for the
    way back."""
    if net.encoding is None:
        return x, None
    B, phi = encoding_tensors(net.encoding, value(x).device, value(x).dtype)
    s, c = activation("sine", x @ B + phi)
    return (_join(torch.cat, [x, s], -1) if net.encoding.include_input else s), c


def _encode_backward(net: MLP, cosine: Number | None, gh: Number) -> Number:
    """``x̄ = (cos(xB + φ) ⊙ h̄) Bᵀ``, plus h̄'s leading columns where the input was included."""
    if net.encoding is None:
        return gh
    B, _ = encoding_tensors(net.encoding, value(gh).device, value(gh).dtype)
    D = net.in_features if net.encoding.include_input else 0
    gx = (cosine * gh[..., D:]) @ B.mT
    return gx + gh[..., :D] if D else gx


def _affine(h: Number, weight: Number, bias: Number) -> Number:
    """``h Wᵀ + b``: [T,N,in], [T,out,in], [T,out] -> [T,N,out]."""
    if isinstance(h, Dual) or isinstance(weight, Dual):
        return h @ weight.mT + bias[:, None]
    if h.shape[0] == weight.shape[0]:
        return torch.baddbmm(bias[:, None], h, weight.mT)
    return (h @ weight.mT).add_(bias[:, None])


Layers = list[tuple[Number, Number]]  # (weight [T,out,in], bias [T,out]) of each layer


class Tape(NamedTuple):
    """What the way back needs: each layer's input and slope, and the encoding's cosine."""

    steps: list[tuple[Number, Number | None]]
    cosine: Number | None


def forward(net: MLP, layers: Layers, x: Number) -> tuple[Number, Tape]:
    """``z_l = W_l h_{l-1} + b_l``, ``h_l = φ(z_l)``, ``y = out(z_L) + shift``: [T,N,D] ->
    [T,N,C]."""
    h, cosine = encode(net, x)
    steps = []
    names = [net.activation] * (net.depth - 1) + [net.output]
    for (weight, bias), name, w0 in zip(layers, names, (*net.frequencies, 1.0), strict=True):
        z = _affine(h, weight, bias)  # [T,N,out]
        y, slope = activation(name, z, w0)
        steps.append((h, slope))
        h = y
    return h + net.output_shift, Tape(steps, cosine)


def backward(
    net: MLP, layers: Layers, tape: Tape, gy: Number, *, want_x: bool = False
) -> tuple[Layers, Number | None]:
    """``δ_l = φ'(z_l) h̄_l``, ``W̄_l = Σ δ_l h_{l-1}ᵀ``, ``b̄_l = Σ δ_l``, ``h̄_{l-1} = W_lᵀ δ_l``;
    Σ over points."""
    gradients: Layers = []
    for index in range(net.depth - 1, -1, -1):
        h, slope = tape.steps[index]
        delta = gy if slope is None else slope * gy  # [T,N,out]
        gradients.append((delta.mT @ h, delta.sum(-2)))
        if index or want_x:
            gy = delta @ layers[index][0]
    return gradients[::-1], _encode_backward(net, tape.cosine, gy) if want_x else None


def dual_layers(net: MLP, params: Tensor, v: Tensor | None) -> Layers:
    """Views of params [T,P], with the tangent v [T,P] where there is one."""
    plain = net.layers(params)
    if v is None:
        return [(w, b) for w, b in plain]
    return [
        (Dual(w, dw), Dual(b, db)) for (w, b), (dw, db) in zip(plain, net.layers(v), strict=True)
    ]


def _flat(gradients: Layers) -> tuple[Tensor, Tensor | None]:
    """Layer gradients back to rows [T,P]: value and tangent."""
    parts = [_linear(lambda q: q.flatten(1), g) for pair in gradients for g in pair]
    rows = _join(torch.cat, parts, 1)
    return value(rows), tangent(rows)


# Tiles: how many points are in flight at a time ---


def _tiles(
    net: MLP,
    tasks: int,
    points: int,
    dtype: torch.dtype,
    max_memory: int | None = None,
    group: int = 1,
) -> Iterator[tuple[slice, slice]]:
    """(tasks, points) slices whose activations fit the budget: several tasks of few points, or
    points of one task.

    A point keeps about five numbers per neuron on the dual way. Without a bound, tiles hold 32 MiB:
    on 2 cores of a Zen 5, T = 3, N = 4096, width 128, that was as fast as any size from 8 to 64
    MiB. ``group`` points (a ray's samples) stay together; the least tile is 256 points.
    """
    per_point = 5 * dtype.itemsize * (net.encoded_features + net.depth * net.width)
    fit = max(256, (2**25 if max_memory is None else max_memory) // per_point)
    count = points // group
    step_points = max(1, min(count, fit // group)) if count * group > fit else count
    step_tasks = max(1, fit // (step_points * group))
    for t in range(0, tasks, step_tasks):
        for n in range(0, count, step_points):
            yield slice(t, min(t + step_tasks, tasks)), slice(n, min(n + step_points, count))


def _rows(x: Tensor, tasks: slice) -> Tensor:
    """The rows of some tasks; what all tasks share has one row."""
    return x if x.shape[0] == 1 else x[tasks]


def _reduce(total: Tensor, rows: slice, part: Tensor) -> None:
    """total += part, where a shared total has one row."""
    if total.shape[0] == 1:
        total += part.sum(0, keepdim=True)
    else:
        total[rows] += part


# mlp ---


@exact
def mlp(net: MLP, params: Tensor, x: Tensor) -> Tensor:
    """y [T,N,C] of params [T or 1,P] at x [T or 1,N,D]."""
    T, N = max(params.shape[0], x.shape[0]), x.shape[1]
    y = x.new_empty(T, N, net.out_features)
    for ts, ns in _tiles(net, T, N, x.dtype):
        y[ts, ns] = forward(net, net.layers(_rows(params, ts)), _rows(x, ts)[:, ns])[0]
    return y


@exact
def mlp_grad(
    net: MLP, params: Tensor, x: Tensor, gy: Tensor, *, want_x: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``p̄ = J_pᵀ ȳ``, ``x̄ = J_xᵀ ȳ``, in the shapes of params and x (summed over tasks where
    these are shared)."""
    gp, gx, *_ = _mlp_pass(net, params, x, None, None, gy, want_x)
    return gp, gx if want_x else None


@exact
def mlp_dual(
    net: MLP, params: Tensor, x: Tensor, v: Tensor | None, w: Tensor | None, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(ẏ, p̄̇, x̄̇) along v in the weights and w in the coordinates, ȳ̇ = 0: the derivatives of
    ⟨v,p̄⟩ + ⟨w,x̄⟩."""
    v = torch.zeros_like(params) if v is None else v
    _, _, dy, dp, dx = _mlp_pass(net, params, x, v, w, gy, True)
    return dy, dp, dx


def _mlp_pass(
    net: MLP,
    params: Tensor,
    x: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    gy: Tensor,
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(p̄, x̄, ẏ, p̄̇, x̄̇): sums over tiles; what was not asked for stays zero."""
    gp, gx, dy, dp, dx = (torch.zeros_like(q) for q in (params, x, gy, params, x))
    for ts, ns in _tiles(net, gy.shape[0], gy.shape[1], x.dtype):
        layers = dual_layers(net, _rows(params, ts), None if v is None else _rows(v, ts))
        xs: Number = _rows(x, ts)[:, ns]
        if w is not None:
            xs = Dual(xs, _rows(w, ts)[:, ns])
        y, tape = forward(net, layers, xs)
        gradients, gxs = backward(net, layers, tape, gy[ts, ns], want_x=want_x)
        rows, tangents = _flat(gradients)
        _reduce(gp, ts, rows)
        if gxs is not None:
            _reduce(gx[:, ns], ts, value(gxs))
        for total, part in ((dp, tangents), (dx[:, ns], tangent(gxs)), (dy[:, ns], tangent(y))):
            if part is not None:
                _reduce(total, ts, part)
    return gp, gx, dy, dp, dx


# Compositing along rays ---


class _March(NamedTuple):
    """What the way back of compositing needs."""

    colour: Number  # c [...,S,3]
    colour_slope: Number  # c(1−c)
    density: Number  # s [...,S]
    density_slope: Number  # ρ'
    delta: Number  # δ [...,S]
    e: Number  # exp(−τ)
    alpha: Number  # −expm1(−τ)
    f: Number  # min(1, e + 1e-10)
    mask: Tensor  # [α > 1e-10]: where the clamp passes a derivative
    T: Number  # transmittance
    w: Number  # T α


def composite_forward(
    raw: Number, t: Number, march: March
) -> tuple[Number, Number, Number, _March]:
    """``s = ρ(raw_3)``, ``c = sigmoid(raw_0..2)``, ``τ = s δ``, ``α = −expm1(−τ)``, ``f = min(1,
    e^{−τ} + 1e-10)``, ``T_1 = 1``, ``T_{i+1} = T_i f_i``, ``w = T α``; ``rgb = Σ w c + β(1 − Σ
    w)``, ``depth = Σ w t``, ``acc = Σ w``.

    raw [...,S,4], t [...,S] -> rgb [...,3], depth [...], acc [...].
    """
    c, dc = activation("sigmoid", raw[..., :3])
    s, ds = activation(march.density, raw[..., 3])
    last = torch.full_like(value(t)[..., :1], march.last_interval)
    delta = _join(torch.cat, [t[..., 1:] - t[..., :-1], last], -1)  # [...,S]
    tau = s * delta
    e = _chain(tau, torch.exp(-value(tau)), lambda: -torch.exp(-value(tau)))
    alpha = _chain(tau, -torch.expm1(-value(tau)), lambda: torch.exp(-value(tau)))
    mask = value(alpha) > 1e-10
    f = _linear(lambda q: torch.where(mask, q, 0), e + 1e-10) + ~mask
    steps: list[Number] = [torch.ones_like(mask[..., 0], dtype=value(t).dtype)]
    for i in range(value(t).shape[-1] - 1):
        steps.append(steps[-1] * f[..., i])
    T = _join(torch.stack, steps, -1)
    w = T * alpha
    acc = w.sum(-1)
    rgb = (w[..., None] * c).sum(-2)
    if march.white_background:
        rgb = rgb + (1 - acc)[..., None]
    return rgb, (w * t).sum(-1), acc, _March(c, dc, s, ds, delta, e, alpha, f, mask, T, w)


def composite_backward(
    m: _March, t: Number, march: March, grgb: Number, gdepth: Number, gacc: Number
) -> tuple[Number, Number]:
    """``w̄ = ⟨r̄gb, c−β⟩ + d̄epth t + ācc``, and a scan from the back without division, ``G_{S+1} =
    0``: ``τ̄_i = T_i e_i k_i``, ``k_i = w̄_i − m_i G_{i+1}``, ``G_i = α_i w̄_i + f_i G_{i+1}``."""
    grgb, gdepth, gacc = grgb[..., None, :], gdepth[..., None], gacc[..., None]
    white = 1.0 if march.white_background else 0.0
    gw = (grgb * (m.colour - white)).sum(-1) + gdepth * t + gacc  # [...,S]
    G: Number = torch.zeros_like(value(t)[..., 0])
    after: list[Number] = []  # m_i G_{i+1}, from the back
    for i in range(value(t).shape[-1] - 1, -1, -1):
        after.append(G * m.mask[..., i])
        G = m.alpha[..., i] * gw[..., i] + m.f[..., i] * G
    k = gw - _join(torch.stack, after[::-1], -1)
    gtau = m.T * m.e * k
    gdelta = (m.density * gtau)[..., :-1]  # the last interval is a constant
    gsigma = m.density_slope * (m.delta * gtau)
    gcolour = m.colour_slope * (m.w[..., None] * grgb)
    pad = torch.zeros_like(value(t)[..., :1])
    gt = gdepth * m.w + _join(torch.cat, [pad, gdelta], -1) - _join(torch.cat, [gdelta, pad], -1)
    return _join(torch.cat, [gcolour, gsigma[..., None]], -1), gt


@exact
def composite(raw: Tensor, t: Tensor, march: March) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb, depth, acc); see ``composite_forward``."""
    return composite_forward(raw, t, march)[:3]


@exact
def composite_grad(
    raw: Tensor, t: Tensor, march: March, grgb: Tensor, gdepth: Tensor, gacc: Tensor
) -> tuple[Tensor, Tensor]:
    """(r̄aw, t̄) from the adjoints of (rgb, depth, acc)."""
    *_, tape = composite_forward(raw, t, march)
    return composite_backward(tape, t, march, grgb, gdepth, gacc)


@exact
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
    a, b = Dual(raw, vraw), Dual(t, vt)
    rgb, depth, acc, tape = composite_forward(a, b, march)
    graw, gt = composite_backward(tape, b, march, grgb, gdepth, gacc)
    return rgb.d, depth.d, acc.d, graw.d, gt.d


# The CT projector ---


@exact
def project(image: Tensor, pixels: Tensor) -> Tensor:
    """``sino[a,c] = (1/N) Σ_r image[k(a,r,c)]``, k < 0 counts as 0: image [T,H,W], pixels [T,A,W,W]
    -> [T,A,W]."""
    T, A, N, _ = pixels.shape
    padded = torch.cat([image.flatten(1), image.new_zeros(T, 1)], 1)  # index −1 is the last entry
    index = torch.where(pixels < 0, N * N, pixels).long()
    return padded.gather(1, index.flatten(1)).view(T, A, N, N).sum(2) / N


@exact
def project_adjoint(sinogram: Tensor, pixels: Tensor) -> Tensor:
    """``īmage[p] = (1/N) Σ_{a,r,c: k(a,r,c) = p} s̄ino[a,c]``: [T,A,W] -> [T,W,W]."""
    T, _, N, _ = pixels.shape
    index = torch.where(pixels < 0, N * N, pixels).long().flatten(1)
    spread = (sinogram / N)[:, :, None, :].expand(pixels.shape).flatten(1)
    image = sinogram.new_zeros(T, N * N + 1).scatter_add_(1, index, spread)
    return image[:, :-1].view(T, N, N)


# Task losses ---


class Sample(NamedTuple):
    """What one step sees: drawn points or rays, their targets, which are real, and how many numbers
    the mean is over."""

    x: Tensor | None  # [T or 1,N,D]
    rays: Rays | None
    t: Tensor | None  # [T,R,S]
    y: Tensor  # [T,N,C], [T,R,3] or [T,A,W]
    valid: Tensor | None  # [T,N] bool
    numbers: Tensor  # [T]: M, points times channels


def draw(batch: Batch, step: int) -> Sample:
    """The points or rays of a step: all of them, or ``per_step`` drawn with replacement from the
    first ``counts``."""
    x, y, valid, counts = batch.x, batch.y, None, batch.counts
    points = batch.points
    if batch.per_step is not None:
        assert batch.seed is not None
        points = batch.per_step
        upper = batch.points if counts is None else counts
        index = rng.integers(batch.seed, points, upper, step, rng.POINTS)[..., None]  # [T,n,1]
        y = y.gather(1, index.expand(-1, -1, y.shape[-1]))
        if isinstance(x, Rays):
            far = index.expand(-1, -1, 3)
            x = Rays(x.origins.gather(1, far), x.directions.gather(1, far), x.near, x.far)
        else:
            x = x.expand(batch.tasks, *x.shape[-2:]).gather(1, index.expand(-1, -1, x.shape[-1]))
    elif counts is not None:  # padding may hold anything, NaN too: put zeros there
        valid = torch.arange(points, device=y.device) < counts[:, None]  # [T,N]
        keep = valid[..., None]
        y = torch.where(keep, y, 0)
        if isinstance(x, Rays):
            x = Rays(
                torch.where(keep, x.origins, 0), torch.where(keep, x.directions, 0), x.near, x.far
            )
        else:
            x = torch.where(keep, x, 0)
    count = y.shape[1] if valid is None or counts is None else counts
    numbers = torch.as_tensor(count * y.shape[-1], device=y.device).to(y.dtype).expand(batch.tasks)
    if isinstance(x, Rays):
        assert isinstance(batch.measure, March)
        return Sample(None, x, ray_times(x, batch.measure, batch.seed, step), y, valid, numbers)
    return Sample(x if x.dim() == 3 else x[None], None, None, y, valid, numbers)


def ray_times(rays: Rays, march: March, seed: Tensor | None, step: int) -> Tensor:
    """``t = linspace(near, far, S)``, plus U[0, (far−near)/S) where there is a seed: [T,R,S]."""
    T, R, S = *rays.origins.shape[:2], march.samples
    near, far = rays.bounds
    part = torch.arange(S, device=near.device, dtype=near.dtype) / (S - 1)
    t = (near[:, None] + (far - near)[:, None] * part)[:, None].expand(T, R, S)
    if seed is None:
        return t.contiguous()
    jitter = rng.uniform(seed, R * S, step, rng.JITTER, t.dtype).view(T, R, S)
    return t + jitter * ((far - near) / S)[:, None, None]


def loss_forward(
    kind: str, clamp: float | None, y: Number, target: Tensor
) -> tuple[Tensor, Number]:
    """(ℓ, ℓ') elementwise: mse (y−t)², l1 |y−t|, clamped |clip(y) − clip(t)|; derivative 0 at the
    kinks."""
    if kind == "mse":
        difference = y - target
        return value(difference) ** 2, 2.0 * difference
    a = value(y)
    if clamp is None:
        difference = a - target
        return difference.abs(), difference.sign()
    difference = a.clamp(-clamp, clamp) - target.clamp(-clamp, clamp)
    return difference.abs(), difference.sign() * (a.abs() < clamp)


def _seed_adjoint(
    batch: Batch, sample: Sample, ts: slice, ns: slice, y: Number
) -> tuple[Tensor, Number]:
    """This tile's share of the loss [T], and ȳ [T,N,C]."""
    kind, clamp = batch.loss_parts
    ell, slope = loss_forward(kind, clamp, y, sample.y[ts, ns])
    scale = (1.0 / sample.numbers[ts])[:, None, None]
    if sample.valid is not None:
        scale = scale * sample.valid[ts, ns, None]
    return (ell * scale).sum((1, 2)), slope * scale


def _march_tile(
    net: MLP, layers: Layers, batch: Batch, sample: Sample, ts: slice, ns: slice, grad: bool
) -> tuple:
    """Rays of a tile: points o + t d, network, compositing, loss, and back."""
    assert sample.rays is not None and sample.t is not None and isinstance(batch.measure, March)
    t = sample.t[ts, ns]  # [T,R,S]
    o, d = sample.rays.origins[ts, ns, None], sample.rays.directions[ts, ns, None]
    x = (o + t[..., None] * d).flatten(1, 2)  # [T,R·S,3]
    raw, tape = forward(net, layers, x)
    raw = _linear(lambda q: q.unflatten(1, t.shape[1:]), raw)  # [T,R,S,4]
    rgb, _, acc, marched = composite_forward(raw, t, batch.measure)
    loss, grgb = _seed_adjoint(batch, sample, ts, ns, rgb)
    if not grad:
        return loss, None
    zero = torch.zeros_like(value(acc))
    graw, _ = composite_backward(marched, t, batch.measure, grgb, zero, zero)
    return loss, backward(net, layers, tape, _linear(lambda q: q.flatten(1, 2), graw))[0]


def _point_tile(
    net: MLP, layers: Layers, batch: Batch, sample: Sample, ts: slice, ns: slice, grad: bool
) -> tuple:
    """Points of a tile: network, loss, and back."""
    assert sample.x is not None
    y, tape = forward(net, layers, _rows(sample.x, ts)[:, ns])
    loss, gy = _seed_adjoint(batch, sample, ts, ns, y)
    return loss, backward(net, layers, tape, gy)[0] if grad else None


def _project_task(
    net: MLP, layers: Layers, batch: Batch, sample: Sample, task: slice, max_memory: int | None
) -> tuple[Tensor, Iterator[Layers]]:
    """One task of CT: the whole image is needed before the loss, so its tiles run again on the way
    back."""
    assert sample.x is not None and isinstance(batch.measure, Project)
    W = sample.y.shape[-1]
    x = _rows(sample.x, task)
    tiles = [ns for _, ns in _tiles(net, 1, W * W, x.dtype, max_memory)]
    parts = [_linear(lambda q: q[..., 0], forward(net, layers, x[:, ns])[0]) for ns in tiles]
    image = _linear(lambda q: q.unflatten(1, (W, W)), _join(torch.cat, parts, 1))
    pixels = batch.measure.pixels(W)[task]
    sinogram = _linear(lambda q: project(q, pixels), image)
    loss, gsino = _seed_adjoint(batch, sample, task, slice(None), sinogram)
    gimage = _linear(lambda q: project_adjoint(q, pixels).flatten(1)[..., None], gsino)
    return loss, (
        backward(net, layers, forward(net, layers, x[:, ns])[1], gimage[:, ns])[0] for ns in tiles
    )


def _loss_pass(
    net: MLP,
    params: Tensor,
    v: Tensor | None,
    batch: Batch,
    step: int,
    grad: bool,
    max_memory: int | None,
) -> tuple:
    """Sum of the tiles: (loss [T], gradient [T,P] or None, H v [T,P] or None); params and v are [T
    or 1,P]."""
    sample = draw(batch, step)
    T = batch.tasks
    loss = sample.y.new_zeros(T)
    total = sample.y.new_zeros(T, net.num_params) if grad else None
    hv = None if v is None else sample.y.new_zeros(T, net.num_params)

    def add(ts: slice, gradients: Layers) -> None:
        if total is None:
            return
        rows, tangents = _flat(gradients)
        total[ts] += rows
        if hv is not None and tangents is not None:
            hv[ts] += tangents

    def layers(ts: slice) -> Layers:
        return dual_layers(net, _rows(params, ts), None if v is None else _rows(v, ts))

    if isinstance(batch.measure, Project):
        for one in (slice(i, i + 1) for i in range(T)):
            loss[one], parts = _project_task(net, layers(one), batch, sample, one, max_memory)
            for part in parts if grad else ():
                add(one, part)
        return loss, total, hv
    marching = isinstance(batch.measure, March)
    group = batch.measure.samples if isinstance(batch.measure, March) else 1
    for ts, ns in _tiles(net, T, sample.y.shape[1] * group, params.dtype, max_memory, group):
        tile = _march_tile if marching else _point_tile
        share, gradients = tile(net, layers(ts), batch, sample, ts, ns, grad)
        loss[ts] += share
        if gradients is not None:
            add(ts, gradients)
    return loss, total, hv


@exact
def loss(
    net: MLP, params: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
) -> Tensor:
    """Loss [T] at params [T or 1,P]."""
    return _loss_pass(net, params, None, batch, step, False, max_memory)[0]


@exact
def loss_grad(
    net: MLP, params: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
) -> tuple[Tensor, Tensor]:
    """(loss [T], ∇L [T,P])."""
    return _loss_pass(net, params, None, batch, step, True, max_memory)[:2]


@exact
def loss_hvp(
    net: MLP, params: Tensor, v: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
) -> tuple[Tensor, Tensor]:
    """(∇L [T,P], ∇²L v [T,P])."""
    return _loss_pass(net, params, v, batch, step, True, max_memory)[1:]


# Inner rules ---

State = tuple[Tensor, ...]  # the rule's state, each [T,P]


def rule_step(rule: Rule, k: int, theta: Tensor, g: Tensor, state: State) -> tuple[Tensor, State]:
    """(u_k, state_{k+1}): the update is ``θ_{k+1} = θ_k − α ⊙ u_k`` for every rule."""
    if isinstance(rule, SGD):
        return g, ()
    if isinstance(rule, Momentum):
        g = g + rule.weight_decay * theta if rule.weight_decay else g
        b = rule.mu * state[0] + g if k else g
        return (g + rule.mu * b if rule.nesterov else b), (b,)
    m = rule.beta1 * state[0] + (1 - rule.beta1) * g if k else (1 - rule.beta1) * g
    v = rule.beta2 * state[1] + (1 - rule.beta2) * g * g if k else (1 - rule.beta2) * g * g
    return adam_update(rule, k, m, v)[0], (m, v)


def adam_update(
    rule: Adam, k: int, m: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """``u = m / (c1 D)``, ``D = r + ε``, ``r = √(v / c2)``, with (u, D, r, c1, c2); n = k + 1."""
    c1, c2 = 1 - rule.beta1 ** (k + 1), 1 - rule.beta2 ** (k + 1)
    r = torch.sqrt(v / c2)
    D = r + rule.eps
    return m / (c1 * D), D, r, c1, c2


class Trajectory(NamedTuple):
    """What an inner loop leaves behind: θ_K [T,P], losses [K,T], and where they were asked for
    θ_0..θ_K [K+1,T,P], states 0..K, updates u [K,T,P]. Other workers return the first three."""

    theta: Tensor
    losses: Tensor
    thetas: Tensor | None
    states: list[State]
    updates: Tensor | None


@exact
def adapt(
    net: MLP,
    params: Tensor,
    batch: Batch,
    lr: Tensor,
    rule: Rule,
    *,
    keep: bool = False,
    keep_state: bool = False,
    keep_updates: bool = False,
    max_memory: int | None = None,
) -> Trajectory:
    """``θ_{k+1} = θ_k − α_k ⊙ u_k``, K steps of every task from params [T or 1,P], rates lr [K,T,P]
    (broadcast views welcome); losses[k] = L_k(θ_k), before step k."""
    K, T, P = lr.shape
    theta = params.expand(T, P)
    losses = theta.new_empty(K, T)
    thetas = theta.new_empty(K + 1, T, P) if keep else None
    updates = theta.new_empty(K, T, P) if keep_updates else None
    state: State = ()
    states = [state] if keep_state else []
    for k in range(K):
        if thetas is not None:
            thetas[k] = theta
        losses[k], g = loss_grad(net, theta, batch, k, max_memory)
        u, state = rule_step(rule, k, theta, g, state)
        theta = theta - lr[k] * u
        if keep_state:
            states.append(state)
        if updates is not None:
            updates[k] = u
    if thetas is not None:
        thetas[K] = theta
    return Trajectory(theta.contiguous() if K else theta.clone(), losses, thetas, states, updates)


# Meta-gradients: walking back over the inner steps ---


class Adjoint(NamedTuple):
    """What step k hands back: its gradient's cotangent ḡ_k, ω, and the state's adjoint."""

    g: Tensor
    decay: float
    state: State


def rule_adjoint(
    rule: Rule, k: int, ubar: Tensor, after: State, state: State, g: Tensor | None
) -> Adjoint:
    """From ``ū = −α ⊙ λ_{k+1}`` and the adjoint of state_{k+1}: ḡ_k and the adjoint of state_k.

    Momentum: ``b̃ = β_{k+1} + ū``, ``ḡ = b̃``, ``β_k = μ b̃`` (Nesterov: ``b̃ = β_{k+1} + μ ū``,
    ``ḡ = b̃ + ū``). Adam: ``m̃ = m̄_{k+1} + ū/(c1 D)``, ``ṽ = v̄_{k+1} − ū m/(2 c1 c2 D² r)`` and
    ``ṽ = 0`` where r = 0, ``ḡ = (1−β1) m̃ + 2 (1−β2) g ⊙ ṽ``, ``m̄_k = β1 m̃``, ``v̄_k = β2 ṽ``.
    """
    if isinstance(rule, SGD):
        return Adjoint(ubar, 0.0, ())
    if isinstance(rule, Momentum):
        b = (rule.mu * ubar if rule.nesterov else ubar) + (after[0] if after else 0.0)
        return Adjoint(b + ubar if rule.nesterov else b, rule.weight_decay, (rule.mu * b,))
    assert g is not None
    if k == 0:  # n = 1: the two paths of ū nearly cancel, so their sum is taken in closed form
        gbar = ubar * rule.eps / (g.abs() + rule.eps) ** 2
        if after:
            gbar = gbar + (1 - rule.beta1) * after[0] + 2 * (1 - rule.beta2) * g * after[1]
        return Adjoint(gbar, 0.0, ())
    m, v = state
    _, D, r, c1, c2 = adam_update(rule, k, m, v)
    direct = ubar / (c1 * D)
    through = torch.where(r > 0, -ubar * m / (2 * c1 * c2 * D * D * torch.where(r > 0, r, 1)), 0)
    mbar = direct + after[0] if after else direct
    vbar = through + torch.where(r > 0, after[1], 0) if after else through
    gbar = (1 - rule.beta1) * mbar + 2 * (1 - rule.beta2) * g * vbar
    return Adjoint(gbar, 0.0, (rule.beta1 * mbar, rule.beta2 * vbar))


@exact
def maml(
    net: MLP,
    init: Tensor,
    batch: Batch,
    lr: Tensor,
    rule: Rule,
    *,
    order: int,
    learned: Tensor | None = None,
    max_memory: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """K inner steps from init [1,P], then back: (query losses [T], the gradient of their mean [P],
    and that of the rates in the shape of learned).

    ``λ_K = ∇L_query(θ_K) / T``; the query's draws are those of step K. First order: ``λ_0 = λ_K``.
    """
    second, K = order == 2, lr.shape[0]
    loop = adapt(
        net,
        init,
        batch,
        lr,
        rule,
        keep=second,
        keep_state=second
        and (isinstance(rule, Adam) or (learned is not None and isinstance(rule, Momentum))),
        keep_updates=not second and learned is not None,
        max_memory=max_memory,
    )
    query = batch if batch.query is None else batch.query
    loss, lam = loss_grad(net, loop.theta, query, K, max_memory)
    lam = lam / batch.tasks
    rates = None
    if second:
        assert loop.thetas is not None
        lam, rates = walk(net, loop.thetas, loop.states, batch, lr, rule, lam, learned, max_memory)
    elif learned is not None:
        assert loop.updates is not None
        rates = torch.zeros_like(learned)
        for k, u in enumerate(loop.updates):
            _add_rates(rates, k, -lam * u)
    return loss, lam.sum(0), rates


def walk(
    net: MLP,
    thetas: Tensor,
    states: list[State],
    batch: Batch,
    lr: Tensor,
    rule: Rule,
    lam: Tensor,
    learned: Tensor | None = None,
    max_memory: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact second order, from λ_K [T,P]: (λ_0 [T,P], the rates' gradient in the shape of learned).

    ``λ_k = λ_{k+1} + H_k ḡ_k (+ ω ḡ_k)``; for SGD ``ḡ_k = −α_k ⊙ λ_{k+1}``: the rate goes inside
    the Hessian-vector product. H_k belongs to the support loss with step k's own draw. The rates'
    gradient is ``ā_k = −λ_{k+1} ⊙ u_k``.
    """
    rates = None if learned is None else torch.zeros_like(learned)
    after: State = ()
    for k in range(lr.shape[0] - 1, -1, -1):
        ubar = -lr[k] * lam
        g = None
        if isinstance(rule, Adam):  # g_k from the states around it, to ten roundings of m
            before = states[k][0] if k else 0.0
            g = (states[k + 1][0] - rule.beta1 * before) / (1 - rule.beta1)
        gbar, decay, after = rule_adjoint(rule, k, ubar, after, states[k + 1] if states else (), g)
        grad, hv = loss_hvp(net, thetas[k], gbar, batch, k, max_memory)
        if rates is not None:
            u = grad if isinstance(rule, SGD) else rule_step(rule, k, thetas[k], grad, states[k])[0]
            _add_rates(rates, k, -lam * u)
        lam = lam + hv
        if decay:
            lam = lam + decay * gbar
    return lam, rates


def _add_rates(rates: Tensor, k: int, part: Tensor) -> None:
    """Sum ā_k [T,P] into the shape in which the rates were given, which broadcasts to [K,T,P]."""
    if rates.dim() == 3:
        rates[k if rates.shape[0] > 1 else 0] += part.sum_to_size(rates.shape[1:])
    else:
        rates += part.sum_to_size(rates.shape)
