"""A loss whose derivative was computed with it, in one call of a worker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_gradients(
    loss: Tensor, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...], why: str
) -> Tensor:
    """The loss, such that ``backward`` puts (incoming cotangent) · gradient on each input.

    Args:
        loss: a scalar, detached.
        inputs: what the loss is a function of; gradients: one for each, of its shape, or None.
        why: the message where a derivative of these gradients is asked for, which they lack.

    Raises:
        RuntimeError: on the way back, such a derivative.
    """
    return _Given.apply(why, loss, gradients, *inputs)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, why: str, loss: Tensor, gradients: tuple, *inputs: Tensor) -> Tensor:
        ctx.why, ctx.count = why, len(inputs)
        ctx.save_for_backward(*inputs, *gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        saved = ctx.saved_tensors
        inputs, gradients = saved[: ctx.count], saved[ctx.count :]
        return None, None, None, *_Scaled.apply(ctx.why, cotangent, gradients, *inputs)


class _Scaled(torch.autograd.Function):
    """Gradients times the cotangent; the inputs are there so that a graph leads to the error, not
    to nothing."""

    @staticmethod
    def forward(
        ctx: Any, why: str, cotangent: Tensor, gradients: tuple, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.why = why
        return tuple(None if g is None else cotangent * g for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(ctx.why)
