"""``composite``: colour, depth and opacity of sampled rays; ``render``: rays through a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import March, Rays
from ..reference import ray_times
from ..spec import MLP
from . import dispatch
from .mlp import mlp


def composite(
    raw: Tensor, t: Tensor, march: March, *, impl: str | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Alpha compositing along rays.

    ``s = ρ(raw_3)``, ``c = sigmoid(raw_0..2)``, ``α_i = 1 − exp(−s_i δ_i)``, ``T_i = Π_{j<i} min(1,
    1 − α_j + 1e-10)``, ``w = T α``; ``rgb = Σ w c + β (1 − Σ w)``, ``depth = Σ w t``, ``acc = Σ
    w``; β = 1 for a white background.

    Args:
        raw: [...,S,4], the network's raw outputs.
        t: [...,S], where the samples lie, in units of the ray's direction.
        march: density, background and last interval.
        impl, precision: as in ``mlp``; compositing itself is fp32 whatever the precision.

    Returns:
        rgb [...,3], depth [...], acc [...]. Differentiable twice in raw and t; a third derivative
        raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Tancik et al. 2021, ShapeNet and Phototourism notebooks; Mildenhall et al. 2020.
    """
    raw = dispatch.tensor("composite", "raw", raw, columns=4)
    t = dispatch.tensor("composite", "t", t)
    if not isinstance(march, March):
        raise TypeError(
            f"composite: march is a {type(march).__name__}; accepted is a fastmeta.March"
        )
    if raw.dim() < 2 or raw.shape[:-1] != t.shape or 0 in raw.shape:
        raise ValueError(
            f"composite: raw has shape {tuple(raw.shape)}, t {tuple(t.shape)}; accepted are "
            "[...,S,4] and [...,S]"
        )
    dispatch.agree("composite", raw=raw, t=t)
    case = dispatch.Case(
        "composite", raw.dtype, raw.device.type, precision, measure="march", order=2
    )
    return _Composite.apply(dispatch.choose(case, impl), march, raw, t)


def render(
    net: MLP,
    params: Tensor,
    rays: Rays,
    march: March,
    *,
    seed: Tensor | None = None,
    impl: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, depth and opacity of rays through radiance fields: ``composite(mlp(net, params, o + t
    d), t)``.

    Args:
        net: 3 inputs, 4 raw outputs, such as ``nerf_mlp()``.
        params: [T,P], or [P] shared.
        rays: T × R rays.
        march: how they are sampled; ``t = linspace(near, far, S)``.
        seed: [T] int64: stratified jitter U[0, (far−near)/S) per sample, the same numbers on every
            worker; None: none.
        impl, precision: as in ``mlp``.

    Returns:
        rgb [T,R,3], depth [T,R], acc [T,R]. Differentiable twice in params and in the rays' origins
        and directions.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Tancik et al. 2021, ShapeNet notebook.
    """
    net = dispatch.network("render", net)
    if not isinstance(rays, Rays) or not isinstance(march, March):
        raise TypeError(
            f"render: rays is a {type(rays).__name__}, march a {type(march).__name__}; "
            "accepted are Rays and March"
        )
    if (net.in_features, net.out_features) != (3, 4):
        raise ValueError(
            f"render: the network is {net.in_features} -> {net.out_features}; accepted is 3 -> 4"
        )
    T, R = rays.origins.shape[:2]
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (T,):
            raise ValueError(f"render: seed is {seed!r}; accepted is an int64 tensor [{T}]")
        if seed.device != rays.origins.device:
            came = f"seed is on {seed.device}, the rays on {rays.origins.device}"
            raise ValueError(f"render: {came}; both must agree")
    t = ray_times(rays, march, seed, 0)  # [T,R,S]
    x = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]  # [T,R,S,3]
    raw = mlp(net, params, x.flatten(1, 2), impl=impl, precision=precision)
    return composite(raw.unflatten(1, (R, march.samples)), t, march, impl=impl, precision=precision)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, worker: Any, march: March, raw: Tensor, t: Tensor) -> tuple:
        ctx.worker, ctx.march = worker, march
        ctx.save_for_backward(raw, t)
        return worker.composite(raw, t, march)

    @staticmethod
    def backward(ctx: Any, grgb: Tensor, gdepth: Tensor, gacc: Tensor) -> tuple:
        graw, gt = _CompositeGrad.apply(
            ctx.worker, ctx.march, *ctx.saved_tensors, grgb, gdepth, gacc
        )
        return None, None, graw, gt


class _CompositeGrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, worker: Any, march: March, raw: Tensor, t: Tensor, *adjoints: Tensor
    ) -> tuple:
        ctx.worker, ctx.march = worker, march
        ctx.save_for_backward(raw, t, *adjoints)
        return worker.composite_grad(raw, t, march, *adjoints)

    @staticmethod
    def backward(ctx: Any, vraw: Tensor, vt: Tensor) -> tuple:
        raw, t, *adjoints = ctx.saved_tensors
        drgb, ddepth, dacc, draw, dt = _CompositeDual.apply(
            ctx.worker, ctx.march, raw, t, vraw, vt, *adjoints
        )
        return None, None, draw, dt, drgb, ddepth, dacc


class _CompositeDual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, worker: Any, march: March, raw: Tensor, t: Tensor, *rest: Tensor
    ) -> tuple:
        return worker.composite_dual(raw, t, march, *rest)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            "composite: a third derivative was asked for; it is differentiable twice in raw and t"
        )
