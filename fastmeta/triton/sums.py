"""Parameters as operands, and partial sums as gradients: what both families of kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan, step
from .launch import launch
from .plan import Constants

BLOCK = 512  # parameters a program of gather, advance and shade owns


@dataclass(frozen=True)
class Operands:
    """Padded operands of parameters: hidden [T or 1,L−2,WP,WP], first [T or 1,WP,EP]."""

    hidden: Tensor
    first: Tensor

    @classmethod
    def empty(cls, c: Constants, rows: int, like: Tensor) -> Operands:
        """Zero: the padding is never written."""
        real = like.dtype
        hidden = c.operand if real == torch.float32 else real
        first = plan.OPERANDS[c.first] if real == torch.float32 else real
        L, WP = c.net.depth, c.width
        opening = WP * c.features if c.encoded else 1
        return cls(
            torch.zeros(rows, max(1, (L - 2) * WP * WP), dtype=hidden, device=like.device),
            torch.zeros(rows, opening, dtype=first, device=like.device),
        )


def stride(rows: Tensor) -> int:
    """Elements from a task's row to the next; 0 where one row serves all."""
    return rows.stride(0) if rows.shape[0] > 1 else 0


@lru_cache(maxsize=32)
def ones(tasks: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[T], never written to."""
    return torch.ones(tasks, dtype=dtype, device=device)


def shade(c: Constants, params: Tensor, out: Operands, scale: Tensor | None = None) -> Operands:
    """``out`` becomes the operands of params [T or 1,P], times scale [T] where there is one."""
    rows, P = params.shape
    blocks = -(-P // BLOCK)
    keys = ("E", "EP", "W", "WP", "L", "MODE", "FIRST", "ENCODED")
    launch(
        step.shade,
        (rows * blocks,),
        {
            "source": params,
            "scale": params if scale is None else scale,
            "shadow": out.hidden,
            "first": out.first,
            "P": P,
            "p_stride": stride(params),
            "s_size": out.hidden.shape[1],
            "blocks": blocks,
        },
        {k: c.shapes()[k] for k in keys} | {"SCALED": scale is not None, "BP": BLOCK},
    )
    return out


class Weights(NamedTuple):
    """Parameters [T or 1,P] and their operands; a direction v of them and its own."""

    params: Tensor
    operands: Operands
    v: Tensor | None = None
    along: Operands | None = None


def inputs(network: Any) -> dict[str, Any]:
    """Arguments of every kernel that evaluates a ``Stream`` or a ``Held``: ``weights`` at ``x``."""
    c, (params, operands, v, along), x = network.c, network.weights, network.x
    v, along = params if v is None else v, operands if along is None else along
    return {
        "theta": params,
        "dtheta": v,
        "shadow": operands.hidden,
        "dshadow": along.hidden,
        "first": operands.first,
        "dfirst": along.first,
        "x": x,
        "basis": network.basis,
        "phi": network.phi,
        "v_scale": network.v_scale,
        "N": network.N,
        "p_stride": stride(params),
        "v_stride": stride(v),
        "s_stride": stride(operands.hidden),
        "ds_stride": stride(along.hidden),
        "f_stride": c.encoded * stride(operands.first),
        "df_stride": c.encoded * stride(along.first),
        "x_stride": stride(x),
    }


class Parts(NamedTuple):
    """Partial sums: of hidden weights [T,splits,L−2,WP,WP], of an encoded first layer
    [T,first_splits,WP,EP], of what is thin [T,tiles,TH]."""

    hidden: Tensor
    splits: int
    opening: Tensor
    first_splits: int
    thin: Tensor
    tiles: int


def _sums(network: Any, dual: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    c, parts = network.c, network.parts(dual)
    args = {
        "part": parts.hidden,
        "first_part": parts.opening,
        "thin": parts.thin,
        "scale": network.scale,
        "P": c.net.num_params,
        "tiles": parts.tiles,
        "splits": parts.splits,
        "first_splits": parts.first_splits,
        "blocks": -(-c.net.num_params // BLOCK),
    }
    keys = ("D", "E", "EP", "W", "WP", "L", "ENCODED")
    return args, {k: c.shapes()[k] for k in keys} | {"BP": BLOCK}


def gradient(
    network: Any, out: Tensor, *, tangent: bool = False, start: Tensor | None = None
) -> Tensor:
    """out [T,P]: the gradient that a ``Stream`` or a ``Held`` left, or its tangent, plus start
    where there is one."""
    args, consts = _sums(network, tangent)
    args |= {
        "v_scale": network.v_scale,
        "start": out if start is None else start,
        "out": out,
    }
    launch(
        step.gather,
        (network.T * args["blocks"],),
        args,
        consts | {"DUAL": tangent, "ADD": start is not None},
    )
    return out


def advance(
    network: Any,
    rule: Any,
    theta: Tensor,
    lr: Tensor,
    coefficients: Tensor,
    before: tuple[Tensor, ...],
    after: tuple[Tensor, ...],
    out: Tensor,
    operands: Operands,
    update: Tensor | None = None,
) -> None:
    """out [T,P] = θ − α ⊙ u of this gradient; operands become those of out. lr [T,P] is a view;
    before and after are the rule's state; update [T,P] becomes u."""
    args, consts = _sums(network, False)
    name = {"meta_sgd": "sgd"}.get(rule.name, rule.name)
    m_in, v_in = (*before, out, out)[:2]
    m_out, v_out = (*after, out, out)[:2]
    args |= {
        "theta": theta,
        "lr": lr,
        "coefficients": coefficients,
        "m_in": m_in,
        "v_in": v_in,
        "m_out": m_out,
        "v_out": v_out,
        "u_out": out if update is None else update,
        "next_theta": out,
        "shadow": operands.hidden,
        "first": operands.first,
        "p_stride": stride(theta),
        "lr_task": lr.stride(0),
        "lr_param": lr.stride(1),
        "s_size": operands.hidden.shape[1],
    }
    consts |= {
        "MODE": network.c.mode,
        "FIRST": network.c.first,
        "RULE": name,
        "NESTEROV": bool(getattr(rule, "nesterov", False)),
        "KEEP": update is not None,
    }
    launch(step.advance, (network.T * args["blocks"],), args, consts)
