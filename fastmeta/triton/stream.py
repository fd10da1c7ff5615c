"""Buffers and launches of one network on T tasks of N points: the streamed kernels in order.

``forward`` fills y; ``backward`` takes ȳ or a loss and leaves partial sums, which ``gradient`` and
``advance`` of ``sums`` add up. Plain, or dual along v and ẋ.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import mlp, plan, step, sums
from .launch import launch
from .plan import Constants, empty, up
from .sums import Weights, ones, stride

_REAL = {torch.float32: tl.float32, torch.float64: tl.float64}


class Stream:
    """T tasks of N points through one network.

    Args:
        c: the network in a precision.
        tasks, points: T, N.
        like: a tensor of the dtype and device of everything.
        dual: with tangents.
        keep: what the way back needs is kept; else two layers at a time.
        grad: in a dual pass, the gradient too, not the Hessian-vector product alone.
        tangent_x: coordinates have tangents.
        want_x: x̄ is wanted.
    """

    def __init__(
        self,
        c: Constants,
        tasks: int,
        points: int,
        like: Tensor,
        *,
        dual: bool = False,
        keep: bool = True,
        grad: bool = True,
        tangent_x: bool = False,
        want_x: bool = False,
    ) -> None:
        self.c, self.T, self.N, self.like, self.dual, self.keep = c, tasks, points, like, dual, keep
        self.grad, self.tangent_x, self.want_x = grad or not dual, tangent_x, want_x
        self.ahead, self.back = plan.stream_tiles(c, dual)
        real, L, WP, C = like.dtype, c.net.depth, c.width, c.net.out_features
        self.NP = up(points, max(self.ahead.points, self.back.points))
        self.tiles = self.NP // self.back.points
        if self.NP * WP >= 2**31:
            raise ValueError(
                f"triton: {points} points a task at width {c.net.width}; accepted are "
                f"{2**31 // WP} at most"
            )
        self.slots = L - 1 if keep else min(2, L - 1)
        self.basis, self.phi = (
            plan.basis(c.net, c.features, like.device, real) if c.encoded else (like, like)
        )
        one = ones(tasks, like.device, real)
        self.scale, self.v_scale = one, one

        def pair(dtype: torch.dtype, *shape: int, wanted: bool = True) -> tuple[Tensor, Tensor]:
            value = empty(like, dtype, *shape) if wanted else like
            return value, empty(like, dtype, *shape) if wanted and dual else value

        rows = (tasks, self.slots, self.NP, WP)
        self.kept = empty(like, c.kept(real), *rows)
        self.dkept = empty(like, c.stored(real), *rows) if dual else self.kept
        self.z, self.dz = pair(real, tasks, points, C)
        self.y, self.dy = pair(real, tasks, points, C)
        self.losses = empty(like, real, tasks, self.tiles)
        self.delta = self.ddelta = self.thin = self.dthin = self.gx = self.dgx = like
        self.hidden: _Weigher | None = None
        self.opening: _Weigher | None = None
        if not keep:
            return
        self.delta, self.ddelta = pair(c.stored(real), tasks, L - 1, self.NP, WP)
        self.thin, self.dthin = pair(real, tasks, self.tiles, c.thin)
        self.gx, self.dgx = pair(real, tasks, points, c.net.in_features, wanted=want_x)
        self.hidden = _Weigher(self, False) if L > 2 else None
        self.opening = _Weigher(self, True) if c.encoded else None

    # one call after the other

    def forward(self, weights: Weights, x: Tensor, w: Tensor | None = None) -> Tensor:
        """y [T,N,C], which stays in ``self.y`` (its tangent in ``self.dy``); w: tangents of x."""
        self.weights, self.x, self.w = weights, x, x if w is None else w
        args, consts = self._common(self.ahead)
        args |= {"z_out": self.z, "dz_out": self.dz, "y_out": self.y, "dy_out": self.dy}
        launch(
            mlp.ahead,
            (self.T * args["tiles"],),
            args,
            {k: v for k, v in consts.items() if k != "DP"} | {"SLOTS": self.slots},
            warps=self.ahead.warps,
            stages=self.ahead.stages,
        )
        return self.y

    def backward(
        self,
        given: Tensor,
        tangent: Tensor | None = None,
        *,
        loss: tuple[str, float | None] | None = None,
        counts: Tensor | None = None,
        chain: bool = True,
    ) -> None:
        """From ȳ [T,N,C] (and its tangent), or from the targets of a loss over counts [T] points:
        partial sums; the loss's parts in ``self.losses`` [T,tiles]."""
        args, consts = self._common(self.back)
        kind, clamp = (None, None) if loss is None else loss
        args |= {
            "z_in": self.z,
            "dz_in": self.dz,
            "given": given,
            "dgiven": given if tangent is None else tangent,
            "counts": given if counts is None else counts,
            "scale": self.scale,
            "losses": self.losses,
            "delta": self.delta,
            "ddelta": self.ddelta,
            "thin": self.thin,
            "dthin": self.dthin,
            "gx": self.gx,
            "dgx": self.dgx,
        }
        consts |= {
            "TH": self.c.thin,
            "LOSS": kind,
            "CLAMP": clamp,
            "GDUAL": tangent is not None,
            "CHAIN": chain,
            "WANT_X": self.want_x,
        }
        launch(
            mlp.back,
            (self.T * self.tiles,),
            args,
            consts,
            warps=self.back.warps,
            stages=self.back.stages,
        )
        if chain:
            for weigher in (self.hidden, self.opening):
                if weigher is not None:
                    weigher.run()

    def _common(self, tile: plan.Tile) -> tuple[dict[str, Any], dict[str, Any]]:
        args = sums.inputs(self) | {
            "dx": self.w,
            "kept": self.kept,
            "dkept": self.dkept,
            "NP": self.NP,
            "tiles": self.NP // tile.points,
        }
        consts = self.c.shapes() | {
            "DUAL": self.dual,
            "XDUAL": self.tangent_x,
            "BM": tile.points,
            "BN": tile.columns,
            "BK": tile.depth,
            "BE": min(tile.depth, self.c.features),
            "BL": min(tile.last, self.c.width),
        }
        return args, consts

    def parts(self, dual: bool) -> sums.Parts:
        """What every program left of the gradient, or of its tangent."""

        def part(weigher: _Weigher | None) -> tuple[Tensor, int]:
            if weigher is None:
                return self.thin, 1
            return (weigher.dpart if dual else weigher.part), weigher.splits

        thin = self.dthin if dual else self.thin
        return sums.Parts(*part(self.hidden), *part(self.opening), thin, self.tiles)

    gradient = sums.gradient
    advance = sums.advance

    def descend(
        self,
        weights: Weights,
        x: Tensor,
        target: Tensor,
        loss: tuple[str, float | None],
        counts: Tensor,
        *,
        back: bool = True,
    ) -> None:
        """``forward``, then ``backward`` from a loss against target [T,N,C] over counts [T] points;
        its parts in ``self.losses`` [T,tiles]."""
        self.forward(weights, x)
        self.backward(target, loss=loss, counts=counts, chain=back)


class _Weigher:
    """The weight gradient of the hidden layers, or of an encoded first layer."""

    def __init__(self, stream: Stream, features: bool) -> None:
        self.stream, self.features = stream, features
        c, T = stream.c, stream.T
        self.tile = plan.weigh_tile(c, features, stream.dual, stream.dual and stream.grad)
        inner, layers = (c.features, 1) if features else (c.width, c.net.depth - 2)
        blocks = T * layers * (c.width // self.tile.points) * (inner // self.tile.columns)
        turns = -(-stream.NP // self.tile.depth)
        self.splits = max(1, min(-(-2 * plan.PROGRAMS // blocks), turns // 4))
        self.rows = up(-(-stream.NP // self.splits), self.tile.depth)
        self.splits = -(-stream.NP // self.rows)
        self.grid = (blocks * self.splits,)
        shape = (T, self.splits, layers, c.width, inner)
        real = stream.like.dtype
        self.part = empty(stream.like, real, *shape) if stream.grad else stream.like
        self.dpart = empty(stream.like, real, *shape) if stream.dual else self.part

    def run(self) -> None:
        s, c = self.stream, self.stream.c
        keys = ("D", "EP", "IDENTITY", "WP", "L", "ACT", "W0_FIRST", "W0", "MODE", "FIRST")
        launch(
            step.weigh,
            self.grid,
            {
                "kept": s.kept,
                "dkept": s.dkept,
                "delta": s.delta,
                "ddelta": s.ddelta,
                "x": s.x,
                "dx": s.w,
                "basis": s.basis,
                "phi": s.phi,
                "part": self.part,
                "dpart": self.dpart,
                "v_scale": s.v_scale,
                "N": s.N,
                "NP": s.NP,
                "splits": self.splits,
                "rows": self.rows,
                "x_stride": stride(s.x),
            },
            {k: c.shapes()[k] for k in keys}
            | {
                "FEATURES": self.features,
                "DUAL": s.dual,
                "XDUAL": s.tangent_x and self.features,
                "GRAD": s.grad,
                "REAL": _REAL[s.like.dtype],
                "BO": self.tile.points,
                "BI": self.tile.columns,
                "BR": self.tile.depth,
            },
            warps=self.tile.warps,
            stages=self.tile.stages,
        )
