"""``composite``: colour, depth and opacity of sampled rays; ``render``: rays through a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import March, Rays
from ..reference import ray_times
from ..spec import MLP
from . import dispatch, doors
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
        rgb [...,3], depth [...], acc [...]. Differentiable twice in raw and t, under the transforms
        that ``mlp`` takes; a third derivative raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Tancik et al. 2021, ShapeNet and Phototourism notebooks; Mildenhall et al. 2020.

    >>> import torch, fastmeta as fm
    >>> t = torch.tensor([2.0, 3.0, 4.0])
    >>> raw = torch.zeros(3, 4)  # grey, and nothing there
    >>> raw[1, 3] = 1e3  # but at t = 3
    >>> rgb, depth, acc = fm.composite(raw, t, fm.March(samples=3))
    >>> rgb, depth, acc
    (tensor([0.5000, 0.5000, 0.5000]), tensor(3.), tensor(1.))
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
    if raw.dim() == 3:
        rgb, depth, acc = doors.call(_FORM, march, impl, precision, raw, t)
        return rgb, depth, acc
    rays = raw.shape[:-2]
    flat = doors.call(
        _FORM, march, impl, precision, raw.reshape(-1, *raw.shape[-2:]), t.reshape(-1, t.shape[-1])
    )
    return flat[0].view(*rays, 3), flat[1].view(rays), flat[2].view(rays)


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
        and directions, under the transforms that ``mlp`` takes.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Tancik et al. 2021, ShapeNet notebook.

    >>> import torch, fastmeta as fm
    >>> net = fm.nerf_mlp(width=16, depth=3)
    >>> ahead = torch.tensor([0.0, 0.0, 1.0]).expand(2, 5, 3)  # T = 2 scenes, R = 5 rays
    >>> rays = fm.Rays(torch.zeros(2, 5, 3), ahead, near=2.0, far=6.0)
    >>> rgb, depth, acc = fm.render(net, net.init(tasks=2), rays, fm.March(samples=8))
    >>> rgb.shape, depth.shape, acc.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5]), torch.Size([2, 5]))
    >>> nothing = torch.zeros(net.num_params)
    >>> fm.render(net, nothing, rays, fm.March(samples=8))[0][0, 0]  # the white background
    tensor([1., 1., 1.])
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


def _value(worker: Any, march: March, raw: Tensor, t: Tensor) -> tuple:
    return worker.composite(raw, t, march)


def _grad(worker: Any, march: March, inputs: tuple, cotangents: Any, wanted: tuple) -> tuple:
    return worker.composite_grad(*inputs, march, *cotangents)


def _dual(worker: Any, march: March, inputs: tuple, tangents: tuple, cotangents: Any) -> tuple:
    along = [torch.zeros_like(a) if v is None else v for a, v in zip(inputs, tangents, strict=True)]
    return worker.composite_dual(*inputs, march, *along, *cotangents)


def _shapes(march: March, raw: Tensor, t: Tensor) -> list:
    return [(raw.shape[0], 3), (raw.shape[0],), (raw.shape[0],)]


_FORM = doors.Form(
    name="composite",
    inputs=("raw", "t"),
    outputs=("rgb", "depth", "acc"),
    value=_value,
    grad=_grad,
    dual=_dual,
    shapes=_shapes,
    fields=lambda march: (None, "march"),
    spec=March.from_key,
)
doors.register(_FORM)
