"""Buffers and launches of one small network on T tasks of N points: ``resident`` under the same
faces as ``stream.Stream``, one launch in place of three and no activations in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import plan, resident, sums
from .launch import launch
from .plan import Constants, empty, up
from .stream import Stream
from .sums import Weights, ones


class Held:
    """T tasks of N points through one network that ``plan.resident_tile`` takes.

    Args: as of ``Stream``; coordinates have no tangents and x̄ is not wanted.
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
    ) -> None:
        self.c, self.T, self.N, self.like, self.dual = c, tasks, points, like, dual
        self.grad = grad or not dual
        tile = plan.resident_tile(c, dual)
        assert tile is not None
        self.tile = tile
        turns = -(-points // tile.points)
        splits = max(1, min(-(-2 * plan.PROGRAMS // tasks), turns))
        self.rows = up(-(-points // splits), tile.points)
        self.splits = -(-points // self.rows)
        self.basis, self.phi = (
            plan.basis(c.net, c.features, like.device, like.dtype) if c.encoded else (like, like)
        )
        one = ones(tasks, like.device, like.dtype)
        self.scale, self.v_scale = one, one
        real, C, WP = like.dtype, c.net.out_features, c.width

        def pair(*shape: int, wanted: bool = True) -> tuple[Tensor, Tensor]:
            value = empty(like, real, *shape) if wanted else like
            return value, empty(like, real, *shape) if wanted and dual else value

        self.y, self.dy = pair(tasks, points, C)
        self.losses = empty(like, real, tasks, self.splits)
        self.part, self.dpart = pair(
            tasks, self.splits, c.net.depth - 2, WP, WP, wanted=keep and c.net.depth > 2
        )
        opening = keep and c.encoded
        self.first, self.dfirst = pair(tasks, self.splits, WP, c.features, wanted=opening)
        self.thin, self.dthin = pair(tasks, self.splits, c.thin, wanted=keep)

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """y [T,N,C], which stays in ``self.y`` (its tangent in ``self.dy``)."""
        self.weights, self.x = weights, x
        self._launch(self.y, None, None, None, back=False)
        return self.y

    def backward(self, given: Tensor, tangent: Tensor | None = None) -> None:
        """From ȳ [T,N,C] (and its tangent) at what ``forward`` saw: partial sums."""
        self._launch(given, tangent, None, None, back=True)

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
        """From a loss against target [T,N,C] over counts [T] points: partial sums, and the loss's
        parts in ``self.losses`` [T,splits]."""
        self.weights, self.x = weights, x
        self._launch(target, None, loss, counts, back=back)

    def _launch(
        self,
        given: Tensor,
        tangent: Tensor | None,
        loss: tuple[str, float | None] | None,
        counts: Tensor | None,
        *,
        back: bool,
    ) -> None:
        kind, clamp = (None, None) if loss is None else loss
        args = sums.inputs(self) | {
            "given": given,
            "dgiven": given if tangent is None else tangent,
            "counts": given if counts is None else counts,
            "scale": self.scale,
            "y_out": self.y,
            "dy_out": self.dy,
            "losses": self.losses,
            "part": self.part,
            "dpart": self.dpart,
            "first_part": self.first,
            "dfirst_part": self.dfirst,
            "thin": self.thin,
            "dthin": self.dthin,
            "splits": self.splits,
            "rows": self.rows,
        }
        consts = self.c.shapes() | {
            "TH": self.c.thin,
            "DUAL": self.dual,
            "GRAD": self.grad,
            "BACK": back,
            "LOSS": kind,
            "CLAMP": clamp,
            "GDUAL": tangent is not None,
            "BM": self.tile.points,
        }
        del consts["DP"]
        launch(
            resident.resident,
            (self.T * self.splits,),
            args,
            consts,
            warps=self.tile.warps,
            stages=self.tile.stages,
        )

    def parts(self, dual: bool) -> sums.Parts:
        """What every program left of the gradient, or of its tangent."""
        s = self.splits
        if dual:
            return sums.Parts(self.dpart, s, self.dfirst, s, self.dthin, s)
        return sums.Parts(self.part, s, self.first, s, self.thin, s)

    gradient = sums.gradient
    advance = sums.advance


def network(
    c: Constants,
    tasks: int,
    points: int,
    like: Tensor,
    *,
    dual: bool = False,
    keep: bool = True,
    grad: bool = True,
) -> Any:
    """A ``Held`` where the table has a tile for it, else a ``Stream``."""
    kind = Stream if plan.resident_tile(c, dual) is None else Held
    return kind(c, tasks, points, like, dual=dual, keep=keep, grad=grad)
