"""``y = mlp(net, params, x)``: many small networks at many points, differentiable twice in params
and x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import MLP
from . import dispatch


def mlp(
    net: MLP, params: Tensor, x: Tensor, *, impl: str | None = None, precision: str | None = None
) -> Tensor:
    """T networks of one shape at N points each.

    ``y = out(W_L h_{L-1} + b_L) + shift``, ``h_l = φ(W_l h_{l-1} + b_l)``, ``h_0 = encode(x)``

    Args:
        net: the network's specification.
        params: [T,P], or [P] shared by all tasks (read in place, never copied).
        x: coordinates [T,N,D], or [N,D] shared by all tasks; in ``net.coords``.
        impl, precision: the worker and its arithmetic; None: the fastest that accepts the case, at
            fp32-class accuracy.

    Returns:
        y [T,N,C]; where neither params nor x has a task axis, [N,C].

    Differentiable in params and x, twice; a third derivative raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a worker that cannot
            run the case.

    Source: Tancik et al. 2021, section 3; Pearlmutter 1994 for the dual pass.
    """
    net = dispatch.network("mlp", net)
    x = dispatch.tensor("mlp", "x", x, dims=(2, 3))
    if x.shape[-1] != net.in_features:
        raise ValueError(f"mlp: x has {x.shape[-1]} columns, net.in_features is {net.in_features}")
    if 0 in x.shape:
        raise ValueError(
            f"mlp: x has shape {tuple(x.shape)}; accepted are [T,N,D] and [N,D], none empty"
        )
    rows = dispatch.parameters("mlp", net, params)
    points = x if x.dim() == 3 else x[None]
    if rows.shape[0] != points.shape[0] and 1 not in (rows.shape[0], points.shape[0]):
        raise ValueError(f"mlp: params has {rows.shape[0]} tasks, x has {points.shape[0]}")
    dispatch.agree("mlp", params=params, x=x)
    case = dispatch.Case("mlp", x.dtype, x.device.type, precision, net, order=2)
    y = _MLP.apply(dispatch.choose(case, impl), net, rows, points)
    return y[0] if params.dim() == 1 and x.dim() == 2 else y


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, worker: Any, net: MLP, params: Tensor, x: Tensor) -> Tensor:
        ctx.worker, ctx.net = worker, net
        ctx.save_for_backward(params, x)
        return worker.mlp(net, params, x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        params, x = ctx.saved_tensors
        gp, gx = _MLPGrad.apply(ctx.worker, ctx.net, params, x, gy, ctx.needs_input_grad[3])
        return None, None, gp, gx


class _MLPGrad(torch.autograd.Function):
    """(p̄, x̄) of (params, x, ȳ); its own derivative is one dual pass."""

    @staticmethod
    def forward(
        ctx: Any, worker: Any, net: MLP, params: Tensor, x: Tensor, gy: Tensor, want_x: bool
    ) -> tuple:
        ctx.worker, ctx.net = worker, net
        ctx.save_for_backward(params, x, gy)
        ctx.set_materialize_grads(False)
        return worker.mlp_grad(net, params, x, gy, want_x=want_x)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, w: Tensor | None) -> tuple:
        params, x, gy = ctx.saved_tensors
        if u is None and w is None:
            return (None,) * 6
        dy, dp, dx = _MLPDual.apply(ctx.worker, ctx.net, params, x, u, w, gy)
        return None, None, dp, dx, dy, None


class _MLPDual(torch.autograd.Function):
    """(ẏ, p̄̇, x̄̇) along u in the weights and w in the coordinates: s = ⟨u,p̄⟩ + ⟨w,x̄⟩,
    differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        worker: Any,
        net: MLP,
        params: Tensor,
        x: Tensor,
        u: Tensor | None,
        w: Tensor | None,
        gy: Tensor,
    ) -> tuple:
        return worker.mlp_dual(net, params, x, u, w, gy)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            "mlp: a third derivative was asked for; it is differentiable twice in params and x"
        )
