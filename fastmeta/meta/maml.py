"""MAML: the gradient of the loss after K inner steps, with respect to where they started."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..ops import dispatch
from ..ops.adapt import check_memory, check_steps, expand_rates
from ..rules import MetaSGD, Rule, resolve
from ..spec import MLP
from .given import with_gradients


class MAML(nn.Module):
    """One learned initialisation; ``forward(batch)`` is the loss after K inner steps, its backward
    the meta-gradient.

    ``loss = mean_t L_query(θ_K)``, ``θ_{k+1} = θ_k − α_k ⊙ u_k(∇L_k(θ_k))``, ``θ_0 = init`` for
    every task.
    Order 2 is exact for every rule: θ_0..θ_K are stored and ``λ_k = λ_{k+1} + H_k ḡ_k`` is walked
    back, one Hessian-vector product a step, without a double-backward graph. Order 1 (FOMAML) takes
    ``λ_0 = λ_K``. Where ``init`` or the rates ask for a gradient, it is computed together with the
    loss, and ``backward`` only scales it: evaluate under ``torch.no_grad()``.

    Args:
        net: the network's specification.
        inner_steps: K >= 1.
        inner_lr: α, a number or a tensor that broadcasts to [K,T,P]; learned where it is an
            ``nn.Parameter`` or the rule is "meta_sgd" (then one rate per parameter [P], unless a
            tensor of another shape is given).
        order: 2 or 1.
        rule: "sgd", "momentum", "adam", "meta_sgd", or a frozen object of ``fastmeta.rules``.
        init: [P] to begin with; None: ``net.init()``.
        max_memory: bytes of activations that may be held beyond the trajectory K·T·P (three times
            that for Adam); the result does not depend on it. None: chosen for speed, 1 GiB at most
            on the cpu worker, which then computes 21 units of work for K = 2 instead of 25.
        impl, precision: as in ``fm.mlp``.

    The query set of an outer step uses step index K of its draws. Differentiable once, in ``init``
    and a learned ``inner_lr``; a gradient of the meta-gradient raises.

    Raises:
        ValueError, TypeError: arguments or batches that do not fit.

    Source: Finn et al. 2017; Li et al. 2017 (Meta-SGD); Tancik et al. 2021, section 3.

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(1, 1, width=16, depth=3)
    >>> maml = fm.MAML(net, inner_steps=3, inner_lr=1e-2)
    >>> optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    >>> x, phase = torch.linspace(0, 1, 50)[:, None], torch.rand(8, 1, 1)
    >>> loss = maml(fm.Batch(x, torch.sin(6 * x + phase)))  # eight sine waves
    >>> loss.backward()
    >>> optimizer.step()
    >>> [(name, p.shape == (net.num_params,)) for name, p in maml.named_parameters()]
    [('init', True)]
    >>> learned = fm.MAML(net, 3, 1e-2, rule="meta_sgd")
    >>> [name for name, _ in learned.named_parameters()]
    ['init', 'inner_lr']
    """

    inner_lr: float | Tensor

    def __init__(
        self,
        net: MLP,
        inner_steps: int,
        inner_lr: float | Tensor,
        *,
        order: int = 2,
        rule: str | Rule = "sgd",
        init: Tensor | None = None,
        max_memory: int | None = None,
        impl: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        if order not in (1, 2):
            raise ValueError(f"MAML: order is {order!r}; accepted are 1 and 2")
        self.net = dispatch.network("MAML", net)
        self.inner_steps = check_steps("MAML", inner_steps, 1)
        self.order, self.rule = order, resolve(rule)
        self.max_memory = check_memory("MAML", max_memory)
        self.impl, self.precision = impl, precision
        self.init = start("MAML", net, init)
        if isinstance(self.rule, MetaSGD) and not isinstance(inner_lr, nn.Parameter):
            given = torch.as_tensor(inner_lr, dtype=self.init.dtype)
            rates = given if given.dim() else given.expand(net.num_params)
            inner_lr = nn.Parameter(rates.detach().clone().to(self.init.device))
        hold_rate(self, inner_lr)

    def forward(self, batch: Batch) -> Tensor:
        """The mean over tasks of the query loss at θ_K, a scalar."""
        rows, case = dispatch.task_case(
            "maml", self.net, self.init, batch, self.precision, self.rule, self.order
        )
        rates = expand_rates("MAML", self.inner_lr, self.inner_steps, batch.tasks, rows)
        worker, grad = dispatch.choose(case, self.impl), torch.is_grad_enabled()
        learned = self.inner_lr if isinstance(self.inner_lr, nn.Parameter) else None
        wanted = [p for p in (self.init, learned) if p is not None and p.requires_grad]
        net, init, lr, memory = self.net, self.init.detach()[None], rates.detach(), self.max_memory
        with torch.no_grad():
            if not (wanted and grad):
                theta = worker.adapt(net, init, batch, lr, self.rule, max_memory=memory)[0]
                query = batch if batch.query is None else batch.query
                return worker.loss(net, theta, query, self.inner_steps, memory).mean()
            rate = None if learned is None or not learned.requires_grad else learned.detach()
            how: dict[str, Any] = {"order": self.order, "learned": rate, "max_memory": memory}
            loss, ginit, grates = worker.maml(net, init, batch, lr, self.rule, **how)
        why = (
            "MAML: a derivative of the meta-gradient was asked for; the loss is differentiable once"
        )
        return with_gradients(loss.mean(), (self.init, learned), (ginit, grates), why)

    def extra_repr(self) -> str:
        return f"{self.net}, inner_steps={self.inner_steps}, order={self.order}, rule={self.rule}"


def start(op: str, net: MLP, init: Tensor | None) -> nn.Parameter:
    """The learned initialisation as a parameter [P]."""
    if init is None:
        return nn.Parameter(net.init()[0])
    init = dispatch.tensor(op, "init", init, dims=(1,))
    return nn.Parameter(dispatch.parameters(op, net, init, name="init")[0].detach().clone())


def hold_rate(module: Any, inner_lr: float | Tensor) -> None:
    """Keep α on the module: a parameter where it is learned, a buffer where it is a tensor, else a
    number."""
    if isinstance(inner_lr, Tensor) and not isinstance(inner_lr, nn.Parameter):
        module.register_buffer("inner_lr", inner_lr.detach().clone())
    else:
        module.inner_lr = inner_lr if isinstance(inner_lr, nn.Parameter) else float(inner_lr)
