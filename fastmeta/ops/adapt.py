"""Task losses with their gradients and Hessian-vector products, and the inner loop: every task of a
batch at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..rules import Rule, resolve
from ..spec import MLP
from . import dispatch

_FACES = "fm.mlp, fm.MAML and fm.Reptile"


class Adapted(NamedTuple):
    """What ``adapt`` returns: params θ_K [T,P], losses [K,T] with losses[k] = L(θ_k), trajectory
    [K+1,T,P] or None."""

    params: Tensor
    losses: Tensor
    trajectory: Tensor | None


def loss_grad(
    net: MLP,
    params: Tensor,
    batch: Batch,
    *,
    step: int = 0,
    impl: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each task's loss and its gradient in the parameters.

    ``L = (1/M) Σ ℓ(measure(mlp(params, encode(x))), y)``, M = valid points × channels; ``grad =
    ∇L``.

    Args:
        net: the network's specification.
        params: [T,P], or [P] shared.
        batch: the tasks' support data (``batch.query`` is not read).
        step: which draw of a batch with ``per_step``, and of its jitter.
        impl, precision: as in ``mlp``.

    Returns:
        loss [T], grad [T,P]: one row per task even where params are shared. No gradient flows
        through them; taking one raises.

    Raises:
        ValueError, TypeError: data that do not fit the network, or a worker that cannot run the
            case.

    Source: Tancik et al. 2021, section 3.

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(2, 1, width=16, depth=3)
    >>> x = torch.rand(100, 2)
    >>> batch = fm.Batch(x, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 100, 1))
    >>> loss, grad = fm.loss_grad(net, torch.zeros(net.num_params), batch)
    >>> loss  # all-zero weights say 0 everywhere: the mean of y²
    tensor([1., 4.])
    >>> grad.shape == (2, net.num_params)
    True
    """
    rows, case = dispatch.task_case("loss_grad", net, params, batch, precision)
    result = dispatch.choose(case, impl).loss_grad(net, rows.detach(), batch, step)
    return dispatch.refuse_gradient("loss_grad", _FACES, (params,), result)


def loss_hvp(
    net: MLP,
    params: Tensor,
    v: Tensor,
    batch: Batch,
    *,
    step: int = 0,
    impl: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each task's gradient and Hessian-vector product, ``(∇L, ∇²L v)``, in one dual pass.

    Args:
        net, params, batch, step, impl, precision: as in ``loss_grad``.
        v: direction [T,P], or [P] shared.

    Returns:
        grad [T,P], hv [T,P]. No gradient flows through them; taking one raises.

    Raises:
        ValueError, TypeError: data that do not fit the network, or a worker that cannot run the
            case.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(2, 1, width=16, depth=3)
    >>> params, x = net.init(tasks=2).double(), torch.rand(2, 100, 2).double()
    >>> batch = fm.Batch(x, x.prod(-1, keepdim=True))
    >>> v = torch.randn(net.num_params).double()
    >>> grad, hv = fm.loss_hvp(net, params, v, batch)
    >>> beside = fm.loss_grad(net, params + 1e-5 * v, batch)[1]
    >>> before = fm.loss_grad(net, params - 1e-5 * v, batch)[1]
    >>> bool(torch.allclose((beside - before) / 2e-5, hv, rtol=1e-4, atol=1e-4))
    True
    """
    rows, case = dispatch.task_case("loss_hvp", net, params, batch, precision, order=2)
    direction = dispatch.parameters("loss_hvp", net, v, batch.tasks, "v")
    dispatch.agree("loss_hvp", params=rows, v=direction)
    direction = direction.detach().expand(batch.tasks, -1)
    rows = rows.detach().expand(batch.tasks, -1)
    result = dispatch.choose(case, impl).loss_hvp(net, rows, direction, batch, step)
    return dispatch.refuse_gradient("loss_hvp", _FACES, (params, v), result)


def adapt(
    net: MLP,
    params: Tensor,
    batch: Batch,
    steps: int,
    lr: float | Tensor,
    *,
    rule: str | Rule = "sgd",
    keep: bool = False,
    max_memory: int | None = None,
    impl: str | None = None,
    precision: str | None = None,
) -> Adapted:
    """The inner loop: K steps of an inner rule on every task, ``θ_{k+1} = θ_k − α_k ⊙
    u_k(∇L_k(θ_k))``.

    Args:
        net: the network's specification.
        params: the start, [P] shared or [T,P].
        batch: the tasks; step k sees all points, or its own draw where the batch has ``per_step``.
        steps: K >= 0.
        lr: α, a number or a tensor that broadcasts to [K,T,P], such as [T,1], [P] or [K,1,1].
        rule: "sgd", "momentum", "adam", "meta_sgd", or a frozen object of ``fastmeta.rules``.
        keep: also return θ_0..θ_K.
        max_memory: bytes of activations that may be held at a time; 0: one small tile; None: a size
            chosen for speed.
        impl, precision: as in ``mlp``.

    Returns:
        Adapted(params [T,P], losses [K,T] with losses[k] = L(θ_k) before step k, trajectory
        [K+1,T,P] or None). No gradient flows through them; taking one raises (``fm.MAML`` is the
        differentiable face).

    Raises:
        ValueError, TypeError: data that do not fit the network, rates that do not broadcast, or a
            worker that cannot run the case.

    Source: Tancik et al. 2021, section 3; Finn et al. 2017.

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(2, 1, width=16, depth=3)
    >>> x = torch.rand(100, 2)
    >>> batch = fm.Batch(x, torch.stack([x[:, :1], x[:, 1:]]))  # two tasks: y = x_0, y = x_1
    >>> fit = fm.adapt(net, net.init()[0], batch, steps=5, lr=1e-2)
    >>> fit.params.shape == (2, net.num_params)
    True
    >>> fit.losses.shape
    torch.Size([5, 2])
    >>> rates = torch.tensor([1e-2, 2e-2])[:, None]  # one a task, [T,1]
    >>> fit = fm.adapt(net, net.init()[0], batch, steps=5, lr=rates, rule="adam", keep=True)
    >>> fit.trajectory.shape == (6, 2, net.num_params)
    True
    """
    rule = resolve(rule)
    rows, case = dispatch.task_case("adapt", net, params, batch, precision, rule)
    rates = expand_rates("adapt", lr, check_steps("adapt", steps, 0), batch.tasks, rows)
    memory = check_memory("adapt", max_memory)
    worker = dispatch.choose(case, impl)
    theta, losses, thetas = worker.adapt(
        net, rows.detach(), batch, rates.detach(), rule, keep=keep, max_memory=memory
    )[:3]
    outputs = (theta, losses) if thetas is None else (theta, losses, thetas)
    return Adapted(
        *dispatch.refuse_gradient("adapt", _FACES, (params, lr), outputs),
        *([None] * (thetas is None)),
    )


def expand_rates(op: str, lr: float | Tensor, steps: int, tasks: int, params: Tensor) -> Tensor:
    """Inner rates as a [K,T,P] view."""
    if not isinstance(lr, Tensor):
        lr = torch.tensor(float(lr), dtype=params.dtype, device=params.device)
    full = (steps, tasks, params.shape[-1])
    try:
        return dispatch.tensor(op, "lr", lr).to(params.device, params.dtype).expand(full)
    except RuntimeError:
        raise ValueError(
            f"{op}: lr has shape {tuple(lr.shape)}; accepted is what broadcasts to [K,T,P] = {full}"
        ) from None


def check_steps(op: str, steps: Any, least: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise ValueError(f"{op}: steps is {steps!r}; accepted is an integer >= {least}")
    return steps


def check_memory(op: str, max_memory: Any) -> int | None:
    if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 0):
        raise ValueError(
            f"{op}: max_memory is {max_memory!r}; accepted are None and a number of bytes >= 0"
        )
    return max_memory
