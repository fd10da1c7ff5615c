"""An eikonal term in the loss of distance fields: ``L + w E``, ``E = mean((‖∇_x f‖ − 1)²)``.

The gradient in the weights of a term that holds ∇_x f is a second derivative of the network, one
dual pass of the worker. Second-order MAML over it would need a third, which is refused.

Source: Gropp et al. 2020, "Implicit geometric regularization for learning shapes" (there w = 0.1).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import rng
from ..batch import Batch, Rays
from ..ops import dispatch
from ..ops.adapt import Adapted, check_steps, expand_rates
from ..ops.mlp import mlp
from ..reference import State, draw, rule_step
from ..rules import MetaSGD, Rule, resolve
from ..spec import MLP
from .given import with_gradients
from .maml import hold_rate, start


def adapt_eikonal(
    net: MLP,
    params: Tensor,
    batch: Batch,
    steps: int,
    lr: float | Tensor,
    weight: float,
    *,
    rule: str | Rule = "sgd",
    keep: bool = False,
    impl: str | None = None,
    precision: str | None = None,
) -> Adapted:
    """``fm.adapt`` with an eikonal term: K steps down ``L_k + w E_k``; losses[k] is that sum.

    ``E_k`` is the mean of ``(‖∇_x f‖ − 1)²`` over the points that step k sees and, where the batch
    has seeds, over as many again, drawn anew, uniform in [-1,1]^D. Where ∇_x f = 0, as in a dead
    ReLU network, its derivative is 0.

    Args:
        net: a network of one output.
        weight: w >= 0; 0 gives ``fm.adapt``.
        params, batch, steps, lr, rule, keep, impl, precision: as in ``fm.adapt``; the batch has
            points and no measure.

    Returns:
        Adapted, as ``fm.adapt``. No gradient flows through it; taking one raises.

    Raises:
        ValueError, TypeError: data that do not fit the network or the term, rates that do not
            broadcast, or a worker that cannot run the case.

    Source: Gropp et al. 2020; its points are the data's and uniform ones too.
    """
    rule = resolve(rule)
    rows, case = dispatch.task_case("adapt_eikonal", net, params, batch, precision, rule, 2)
    _check("adapt_eikonal", net, batch, weight)
    steps = check_steps("adapt_eikonal", steps, 0)
    rates = expand_rates("adapt_eikonal", lr, steps, batch.tasks, rows).detach()
    loss = _Loss(dispatch.choose(case, impl), net, batch, float(weight), impl, precision)
    outputs: tuple = _descend(loss, rows.detach(), rates, rule, keep)
    outputs = outputs if keep else outputs[:2]
    given = dispatch.refuse_gradient("adapt_eikonal", "fm.mlp", (params, lr), outputs)
    return Adapted(*given, *([None] * (not keep)))


class Eikonal(nn.Module):
    """Reptile, or first-order MAML, over inner loops with an eikonal term.

    ``loss = mean_t (L + w E)(θ_K)``, ``θ_0 = init``, θ_K by ``adapt_eikonal``. backward puts
    ``(incoming cotangent) · (init − mean_t θ_K)`` on ``init`` for "reptile", and
    ``(incoming cotangent) · mean_t ∇(L + w E)(θ_K)`` for "fomaml".

    Args:
        net: a network of one output.
        inner_steps: K >= 1.
        inner_lr: α, a number or a tensor that broadcasts to [K,T,P]; not learned.
        weight: w >= 0, of the inner and the outer loss alike.
        algorithm: "reptile": the outer loss, of the support data, is a number to watch. "fomaml":
            it is of the query set where the batch has one. Its draws are those of step index K.
        rule: "sgd", "momentum", "adam", or a frozen object of ``fastmeta.rules``.
        init: [P] to begin with; None: ``net.init()``.
        impl, precision: as in ``fm.mlp``.

    Raises:
        ValueError, TypeError: arguments or batches that do not fit; second order, which would need
            a third derivative of the network; learned rates; with "reptile", a query set.

    Source: Gropp et al. 2020; Nichol et al. 2018.
    """

    inner_lr: float | Tensor

    def __init__(
        self,
        net: MLP,
        inner_steps: int,
        inner_lr: float | Tensor,
        weight: float,
        *,
        algorithm: Literal["reptile", "fomaml"] = "reptile",
        rule: str | Rule = "sgd",
        init: Tensor | None = None,
        impl: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        if algorithm not in ("reptile", "fomaml"):
            why = "second order would need a third derivative of the network"
            came = f"algorithm is {algorithm!r}"
            raise ValueError(f"Eikonal: {came}; accepted are reptile and fomaml: {why}")
        self.net = dispatch.network("Eikonal", net)
        self.inner_steps = check_steps("Eikonal", inner_steps, 1)
        self.algorithm, self.rule, self.weight = algorithm, resolve(rule), weight
        if isinstance(inner_lr, nn.Parameter) or isinstance(self.rule, MetaSGD):
            raise ValueError("Eikonal: learned inner rates were asked for; accepted are fixed ones")
        self.impl, self.precision = impl, precision
        self.init = start("Eikonal", net, init)
        _check("Eikonal", net, None, weight)
        hold_rate(self, inner_lr)

    def forward(self, batch: Batch) -> Tensor:
        """The mean over tasks of the loss with its term at θ_K, a scalar."""
        net, K, reptile = self.net, self.inner_steps, self.algorithm == "reptile"
        rows, case = dispatch.task_case(
            "Eikonal", net, self.init, batch, self.precision, self.rule, 2
        )
        if reptile and batch.query is not None:
            raise ValueError("Eikonal: the batch has a query set; accepted with reptile is none")
        query = batch if batch.query is None else batch.query
        for part in (batch, query):
            _check("Eikonal", net, part, self.weight)
        rates = expand_rates("Eikonal", self.inner_lr, K, batch.tasks, rows)
        how = (float(self.weight), self.impl, self.precision)
        inner, outer = (
            _Loss(dispatch.choose(case, self.impl), net, b, *how) for b in (batch, query)
        )
        theta = _descend(inner, rows.detach(), rates, self.rule, False)[0]
        loss, gradient = outer.grad(theta, K)
        direction = self.init.detach() - theta.mean(0) if reptile else gradient.mean(0)
        why = "Eikonal: a derivative of the outer gradient was asked for; there is none"
        return with_gradients(loss.mean(), (self.init,), (direction,), why)

    def extra_repr(self) -> str:
        what = f"inner_steps={self.inner_steps}, weight={self.weight}, rule={self.rule}"
        return f"{self.net}, algorithm={self.algorithm!r}, {what}"


def _check(op: str, net: MLP, batch: Batch | None, weight: Any) -> None:
    if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"{op}: weight is {weight!r}; accepted is a finite number >= 0")
    if net.out_features != 1:
        raise ValueError(f"{op}: net.out_features is {net.out_features}; accepted is 1, a distance")
    if batch is not None and batch.measure is not None:
        raise ValueError(f"{op}: the batch has measure {batch.measure_name}; accepted is none")


class _Loss(NamedTuple):
    """``L + w E`` of a batch."""

    worker: Any
    net: MLP
    batch: Batch
    weight: float
    impl: str | None
    precision: str | None

    def grad(self, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(L + w E [T], its gradient [T,P]) at θ [T,P], with the draws of a step."""
        loss, gradient = self.worker.loss_grad(self.net, theta, self.batch, step)
        if self.weight:
            term, slope = self._term(theta, step)
            loss, gradient = loss + self.weight * term, gradient + self.weight * slope
        return loss, gradient

    def _term(self, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(E [T], ∇E [T,P])."""
        x, valid = self._points(step)
        with torch.enable_grad():
            theta, x = theta.detach().requires_grad_(), x.requires_grad_()
            y = mlp(self.net, theta, x, impl=self.impl, precision=self.precision)  # [T,M,1]
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # [T,M,D]
            # vector_norm has derivative 0 at 0, where the square root's is infinite
            error = (torch.linalg.vector_norm(slope, dim=-1) - 1) ** 2  # [T,M]
            term = (error * valid).sum(1) / valid.sum(1)  # [T]
            (gradient,) = torch.autograd.grad(term.sum(), theta)
        return term.detach(), gradient

    def _points(self, step: int) -> tuple[Tensor, Tensor]:
        """x [T,M,D] and which are real [T,M]: the step's points, then as many uniform ones."""
        sample, batch = draw(self.batch, step), self.batch
        x = sample.x
        assert x is not None and not isinstance(batch.x, Rays)
        T, N, D = batch.tasks, *x.shape[1:]
        x = x.detach().expand(T, N, D)
        valid = x.new_ones(T, N) if sample.valid is None else sample.valid.to(x)
        if batch.seed is None:
            return x.clone(), valid
        free = rng.uniform(batch.seed, N * D, step, rng.SURFACE, x.dtype).view(T, N, D)
        return torch.cat([x, 2 * free - 1], 1), torch.cat([valid, valid], 1)


def _descend(
    loss: _Loss, params: Tensor, lr: Tensor, rule: Rule, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loop of ``reference.adapt`` over this loss: θ_K, losses [K,T], θ_0..θ_K or None."""
    K, T, P = lr.shape
    state: State = ()
    theta = params.expand(T, P).contiguous()
    losses, thetas = theta.new_empty(K, T), [theta]
    with torch.no_grad():
        for k in range(K):
            losses[k], g = loss.grad(theta, k)
            u, state = rule_step(rule, k, theta, g, state)
            theta = theta - lr[k] * u
            if keep:
                thetas.append(theta)
    return theta if K else theta.clone(), losses, torch.stack(thetas) if keep else None
