"""``y = mlp(net, params, x)``: many small networks at many points, differentiable twice in params
and x."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..spec import MLP
from . import dispatch, doors


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

    Differentiable in params and x, twice, by autograd, torch.func (grad, vjp, jvp, vmap and their
    compositions) and within torch.compile; a third derivative, and forward mode over forward mode
    or within a compiled graph, raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a worker that cannot
            run the case.

    Source: Tancik et al. 2021, section 3; Pearlmutter 1994 for the dual pass.

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(1, 1, width=16, depth=3)
    >>> params = net.init(tasks=4)  # [T,P]
    >>> x = torch.linspace(0, 1, 100)[:, None].requires_grad_()  # [N,D], shared
    >>> y = fm.mlp(net, params, x)
    >>> y.shape
    torch.Size([4, 100, 1])
    >>> (slope,) = torch.autograd.grad(y[0].sum(), x, create_graph=True)  # dy/dx of network 0
    >>> (bend,) = torch.autograd.grad(slope.sum(), x)
    >>> bend.shape
    torch.Size([100, 1])
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
    if rows.dtype != x.dtype or rows.device != x.device:
        dispatch.agree("mlp", params=rows, x=x)  # raises
    (y,) = doors.call(_FORM, net, impl, precision, rows, points)
    return y[0] if params.dim() == 1 and x.dim() == 2 else y


def _value(worker: Any, net: MLP, params: Tensor, x: Tensor) -> tuple[Tensor]:
    return (worker.mlp(net, params, x),)


def _grad(worker: Any, net: MLP, inputs: tuple, cotangents: Any, wanted: tuple) -> tuple:
    return worker.mlp_grad(net, *inputs, *cotangents, want_x=wanted[1])


def _dual(worker: Any, net: MLP, inputs: tuple, tangents: tuple, cotangents: Any) -> tuple:
    return worker.mlp_dual(net, *inputs, *tangents, *cotangents)


def _shapes(net: MLP, params: Tensor, x: Tensor) -> list:
    tasks = x.shape[0] if params.shape[0] == 1 else params.shape[0]
    return [(tasks, x.shape[1], net.out_features)]


_FORM = doors.Form(
    name="mlp",
    inputs=("params", "x"),
    outputs=("y",),
    value=_value,
    grad=_grad,
    dual=_dual,
    shapes=_shapes,
    fields=lambda net: (net, "none"),
    spec=MLP.from_key,
    shared=True,
)
doors.register(_FORM)
