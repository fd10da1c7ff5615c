"""Reptile: move the start towards where the inner loops ended."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..ops import dispatch
from ..ops.adapt import check_memory, check_steps, expand_rates
from ..rules import MetaSGD, Rule, resolve
from ..spec import MLP
from .given import with_gradients
from .maml import hold_rate, start


class Reptile(nn.Module):
    """One learned initialisation; backward puts ``(incoming cotangent) · (θ − mean_t θ_K)`` on it
    and nothing else.

    ``forward(batch)`` is ``mean_t L(θ_K)`` on the support data (draws of step index K): a number to
    watch, whose backward is not its derivative. The pseudo-gradient goes to the outer optimiser as
    it is.

    Args:
        net, inner_steps, inner_lr, rule, init, max_memory, impl, precision: as in ``fm.MAML``; the
            rates are not learned, so an ``nn.Parameter`` or "meta_sgd" raises.

    Raises:
        ValueError, TypeError: arguments or batches that do not fit; a batch with a query set, which
            Reptile has no use for.

    Source: Nichol et al. 2018; Tancik et al. 2021, section 3.

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(1, 1, width=16, depth=3)
    >>> reptile = fm.Reptile(net, inner_steps=3, inner_lr=1e-2)
    >>> x, phase = torch.linspace(0, 1, 50)[:, None], torch.rand(8, 1, 1)
    >>> batch = fm.Batch(x, torch.sin(6 * x + phase))
    >>> reptile(batch).backward()
    >>> ended = fm.adapt(net, reptile.init.detach(), batch, steps=3, lr=1e-2).params  # [T,P]
    >>> torch.allclose(reptile.init.grad, reptile.init - ended.mean(0), atol=1e-6)
    True
    """

    inner_lr: float | Tensor

    def __init__(
        self,
        net: MLP,
        inner_steps: int,
        inner_lr: float | Tensor,
        *,
        rule: str | Rule = "sgd",
        init: Tensor | None = None,
        max_memory: int | None = None,
        impl: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.net = dispatch.network("Reptile", net)
        self.inner_steps = check_steps("Reptile", inner_steps, 1)
        self.rule = resolve(rule)
        if isinstance(inner_lr, nn.Parameter) or isinstance(self.rule, MetaSGD):
            raise ValueError(
                "Reptile: learned inner rates were asked for; it has no rate gradient, fm.MAML has"
            )
        self.max_memory = check_memory("Reptile", max_memory)
        self.impl, self.precision = impl, precision
        self.init = start("Reptile", net, init)
        hold_rate(self, inner_lr)

    def forward(self, batch: Batch) -> Tensor:
        """The mean over tasks of the support loss at θ_K, a scalar."""
        rows, case = dispatch.task_case(
            "reptile", self.net, self.init, batch, self.precision, self.rule
        )
        if batch.query is not None:
            raise ValueError(
                "Reptile: the batch has a query set; Reptile learns from support data alone"
            )
        rates = expand_rates("Reptile", self.inner_lr, self.inner_steps, batch.tasks, rows)
        worker = dispatch.choose(case, self.impl)
        init, memory = self.init.detach(), self.max_memory
        lr = rates.detach()
        with torch.no_grad():
            theta = worker.adapt(self.net, init[None], batch, lr, self.rule, max_memory=memory)[0]
            loss = worker.loss(self.net, theta, batch, self.inner_steps, memory).mean()
        why = "Reptile: a derivative of the pseudo-gradient was asked for; there is none"
        return with_gradients(loss, (self.init,), (init - theta.mean(0),), why)

    def extra_repr(self) -> str:
        return f"{self.net}, inner_steps={self.inner_steps}, rule={self.rule}"
