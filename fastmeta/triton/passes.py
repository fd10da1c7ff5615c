"""The passes of ``fastmeta.reference`` by the Triton kernels, in one precision."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..batch import Batch, March, Project
from ..reference import Dual, tangent, value
from ..rules import SGD, Adam, Momentum, Rule
from ..spec import MLP
from . import draw, graph, plan, project, render
from .held import network
from .plan import Constants, chunks, empty
from .stream import Stream
from .sums import Operands, Weights, shade


def guarded(function: Any) -> Any:
    """A pass without autograd, with its tensors' device the current one."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.no_grad(), torch.cuda.device_of(first):
            return function(self, *args, **kwargs)

    return run


def _power(*numbers: Tensor) -> Tensor:
    """[T]: the powers of two that bring each task's largest |number| to [½,1); 1 where all are
    0."""
    largest = reduce(torch.maximum, (g.abs().flatten(1).amax(1) for g in numbers))
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))[1]
    return torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, -exponent, 0))


def _full(batch: Batch, points: int) -> Tensor:
    return _counts(batch.tasks, points, batch.y.device)


@lru_cache(maxsize=32)
def _counts(tasks: int, points: int, device: torch.device) -> Tensor:
    return torch.full((tasks,), points, dtype=torch.int32, device=device)


class Seen:
    """The loss of a batch's tasks, and back: what a step draws, the network, the measurement.

    After ``run`` the partial sums of the gradient (dual: of its tangent too) lie in ``stream``.
    """

    def __init__(
        self,
        c: Constants,
        batch: Batch,
        *,
        dual: bool = False,
        grad: bool = True,
        back: bool = True,
    ) -> None:
        self.c, self.batch, self.dual, self.back = c, batch, dual, back
        n = batch.per_step or batch.points
        self.count = n
        if isinstance(batch.measure, March):
            n *= batch.measure.samples
        self.room = draw.room(batch)
        self.stream = network(c, batch.tasks, n, batch.y, dual=dual, grad=grad, keep=back)
        if isinstance(batch.measure, Project):
            self.pixels = batch.measure.pixels(batch.y.shape[2])
            self.inverse = project.inverse(self.pixels) if back else None
        elif isinstance(batch.measure, March):
            self.marched = render.march_room(self._rays(self.stream.y), grad=back, dual=dual)

    def refresh(self) -> None:
        """After the batch's tensors took other values, in place: what was computed from them."""
        if isinstance(self.batch.measure, Project):
            self.pixels.copy_(self.batch.measure.pixels(self.batch.y.shape[2]))
            if self.inverse is not None:
                for mine, new in zip(self.inverse, project.inverse(self.pixels), strict=True):
                    mine.copy_(new)

    def run(self, k: int, weights: Weights) -> Tensor:
        """Loss [T] of the draws of step k; along v where dual."""
        drawn = draw.draw(self.batch, k, self.room)
        s = self.stream
        if self.batch.measure is not None:
            s.forward(weights, drawn.x)
            march = isinstance(self.batch.measure, March)
            return self._marched(drawn) if march else self._projected(drawn)
        counts = _full(self.batch, self.count) if drawn.counts is None else drawn.counts
        if self.c.mode == "fp16":
            numbers = (counts * self.batch.y.shape[-1]).to(s.like.dtype)
            s.scale = torch.exp2(torch.round(torch.log2(numbers)))
        s.descend(weights, drawn.x, drawn.y, self.batch.loss_parts, counts, back=self.back)
        return s.losses.sum(1)

    def _chain(self, gy: Tensor, dgy: Tensor | None) -> None:
        s = self.stream
        if self.c.mode == "fp16":
            s.scale = _power(gy)
        shape = (s.T, s.N, -1)
        s.backward(gy.view(shape), None if dgy is None else dgy.view(shape))

    def _projected(self, drawn: draw.Drawn) -> Tensor:
        s, W = self.stream, self.batch.y.shape[2]
        sino: Any = project.project(s.y.view(s.T, W, W), self.pixels)
        if self.dual:
            sino = Dual(sino, project.project(s.dy.view(s.T, W, W), self.pixels))
        ell, slope = reference.loss_forward(*self.batch.loss_parts, sino, drawn.y)
        numbers = drawn.y[0].numel()
        if self.back:
            image = project.project_adjoint(value(slope) / numbers, self.pixels, self.inverse)
            along = tangent(slope)
            if along is not None:
                along = project.project_adjoint(along / numbers, self.pixels, self.inverse)
            self._chain(image, along)
        return ell.sum((1, 2)) / numbers

    def _rays(self, y: Tensor) -> Tensor:
        assert isinstance(self.batch.measure, March)
        return y.view(self.batch.tasks, self.count, self.batch.measure.samples, 4)

    def _marched(self, drawn: draw.Drawn) -> Tensor:
        s = self.stream
        assert isinstance(self.batch.measure, March) and drawn.t is not None
        m = render.march_loss(
            self._rays(s.y),
            drawn.t,
            drawn.y,
            self.batch.measure,
            self.batch.loss_parts,
            counts=drawn.counts,
            draw=self._rays(s.dy) if self.dual else None,
            grad=self.back,
            out=self.marched,
        )
        if self.back:
            assert m.graw is not None
            self._chain(m.graw, m.dgraw)
        return m.loss


class Product:
    """Hessian-vector products of a batch's loss: ``H v`` of θ along v, and ∇L where ``grad``."""

    def __init__(self, c: Constants, batch: Batch, grad: bool) -> None:
        self.seen, self.c = Seen(c, batch, dual=True, grad=grad), c
        self.operands = Operands.empty(c, batch.tasks, batch.y)
        self.along = Operands.empty(c, batch.tasks, batch.y)

    def run(self, k: int, theta: Tensor, v: Tensor, out: Tensor, start: Tensor | None) -> Tensor:
        """out [T,P] = H v (+ start), of the draws of step k."""
        s = self.seen.stream
        scale = None
        if self.c.mode == "fp16":
            scale = s.v_scale = _power(v)
        operands = shade(self.c, theta, self.operands)
        along = shade(self.c, v, self.along, scale)
        self.seen.run(k, Weights(theta, operands, v, along))
        return s.gradient(out, tangent=True, start=start)


class Results(NamedTuple):
    """What an inner loop or a meta-gradient leaves, of some tasks."""

    theta: Tensor
    losses: Tensor  # [K,T], or the query's [T]
    more: Tensor | None  # trajectory [K+1,T,P], or the sum over tasks of λ_0 [P]
    rates: Tensor | None = None


class Inner:
    """K steps of a batch's tasks: everything allocated, ``run`` only launches."""

    def __init__(
        self,
        c: Constants,
        params: Tensor,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        *,
        keep: bool = False,
        keep_state: bool = False,
        keep_updates: bool = False,
    ) -> None:
        K, T, P = lr.shape
        self.c, self.params, self.batch, self.lr, self.rule = c, params, batch, lr, rule
        self.K, self.keep = K, keep
        real = params.dtype
        self.seen = Seen(c, batch)
        self.start = Operands.empty(c, params.shape[0], params)
        self.operands = Operands.empty(c, T, params)
        self.losses = empty(params, real, K, T)
        self.thetas = _rows_apart(params, K + 1 if keep else 1, T, P)
        sets = K if keep_state else min(K, 1)
        self.states = [tuple(empty(params, real, T, P) for _ in rule.state) for _ in range(sets)]
        self.zero = tuple(torch.zeros(T, P, dtype=real, device=params.device) for _ in rule.state)
        self.updates = _rows_apart(params, K, T, P) if keep_updates else None
        self.coefficients = _coefficients(rule, K, real, params.device)

    def refresh(self) -> None:
        self.seen.refresh()

    @property
    def theta(self) -> Tensor:
        """θ_K [T,P]."""
        return self.thetas[-1]

    def run(self) -> Results:
        theta, operands = self.params, shade(self.c, self.params, self.start)
        if self.keep or self.K == 0:
            self.thetas[0].copy_(theta.expand(self.thetas.shape[1:]))
        state = self.zero
        for k in range(self.K):
            self.losses[k].copy_(self.seen.run(k, Weights(theta, operands)))
            out = self.thetas[k + 1 if self.keep else 0]
            after = self.states[k % len(self.states)]
            self.seen.stream.advance(
                self.rule,
                theta,
                self.lr[k],
                self.coefficients[k],
                state,
                after,
                out,
                self.operands,
                None if self.updates is None else self.updates[k],
            )
            theta, operands, state = out, self.operands, after
        return Results(self.theta, self.losses, self.thetas if self.keep else None)


def _rows_apart(like: Tensor, steps: int, tasks: int, params: int) -> Tensor:
    """[steps,T,P], each step's rows at an address that wide loads accept: one kernel for all."""
    size = tasks * params
    return empty(like, like.dtype, steps, plan.up(size, 16))[:, :size].unflatten(1, (tasks, params))


@lru_cache(maxsize=32)
def _coefficients(rule: Rule, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``advance`` reads in each step; never written to."""
    rows = []
    for k in range(max(K, 1)):
        if isinstance(rule, Momentum):
            rows.append([rule.mu, rule.weight_decay])
        elif isinstance(rule, Adam):
            a, b = rule.beta1, rule.beta2
            rows.append([a, 1 - a, b, 1 - b, rule.eps, 1 - a ** (k + 1), 1 - b ** (k + 1)])
        else:
            rows.append([0.0])
    return torch.tensor(rows, dtype=torch.float64).to(device, dtype)


class Meta:
    """K steps, the query's gradient at θ_K, and the walk back: everything allocated."""

    def __init__(
        self,
        c: Constants,
        params: Tensor,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        *,
        order: int,
        rates: torch.Size | None,
        tasks: int,
    ) -> None:
        """rates: the shape in which the rates' gradient is wanted; tasks: of all chunks."""
        second = order == 2
        self.inner = Inner(
            c,
            params,
            batch,
            lr,
            rule,
            keep=second,
            keep_state=second
            and (isinstance(rule, Adam) or (rates is not None and isinstance(rule, Momentum))),
            keep_updates=not second and rates is not None,
        )
        self.c, self.batch, self.order, self.tasks = c, batch, order, tasks
        query = batch if batch.query is None else batch.query
        self.query = self.inner.seen if batch.query is None else Seen(c, query)
        K, T, P = lr.shape
        self.at_end = Operands.empty(c, T, params)
        self.lam = empty(params, params.dtype, T, P)
        self.rates = None if rates is None else params.new_zeros(rates)
        self.product = Product(c, batch, rates is not None) if second and K else None
        self.grad = empty(params, params.dtype, T, P) if second and rates is not None else None

    def refresh(self) -> None:
        self.inner.refresh()
        if self.query is not self.inner.seen:
            self.query.refresh()
        if self.product is not None:
            self.product.seen.refresh()

    def run(self) -> Results:
        inner = self.inner
        inner.run()
        K = inner.K
        operands = inner.operands if K else inner.start
        loss = self.query.run(K, Weights(inner.theta, operands))
        lam = self.query.stream.gradient(self.lam)
        lam.div_(self.tasks)
        if self.rates is not None:
            self.rates.zero_()
        if self.order == 2:
            self._walk(lam)
        elif self.rates is not None:
            assert inner.updates is not None
            for k in range(K):
                reference._add_rates(self.rates, k, -lam * inner.updates[k])
        return Results(lam, loss, lam.sum(0), self.rates)

    def _walk(self, lam: Tensor) -> None:
        """``λ_k = λ_{k+1} + H_k ḡ_k (+ ω ḡ_k)``, in place; the rates' gradient on the way."""
        inner, rule = self.inner, self.inner.rule
        states = [inner.zero, *inner.states] if len(inner.states) == inner.K else []
        after: tuple = ()
        for k in range(inner.K - 1, -1, -1):
            ubar = -inner.lr[k] * lam
            g = None
            if isinstance(rule, Adam):  # g_k from the states around it, as the reference does
                g = (states[k + 1][0] - rule.beta1 * states[k][0]) / (1 - rule.beta1)
            state = states[k + 1] if states else ()
            gbar, decay, after = reference.rule_adjoint(rule, k, ubar, after, state, g)
            theta = inner.thetas[k]
            assert self.product is not None
            gbar = gbar.contiguous()
            if self.rates is None:
                self.product.run(k, theta, gbar, lam, lam)
            else:
                assert self.grad is not None
                before = lam.clone()
                self.product.run(k, theta, gbar, lam, before)
                grad = self.product.seen.stream.gradient(self.grad)
                u = grad
                if not isinstance(rule, SGD):
                    u = reference.rule_step(rule, k, theta, grad, states[k])[0]
                reference._add_rates(self.rates, k, -before * u)
            if decay:
                lam.add_(gbar, alpha=decay)


class Passes:
    """The passes of ``fastmeta.reference`` in a precision ("fp32", "tf32", "fp16", "bf16")."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.graphs = graph.Graphs()

    def _constants(self, net: MLP) -> Constants:
        return _constants(net, self.mode)

    # the network

    @guarded
    def _points(self, c: Constants, params: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Dense rows of both; one network at T tasks' points is one task of T·N."""
        T = max(params.shape[0], x.shape[0])
        if params.shape[0] == 1 and T > 1:
            x = x.reshape(1, -1, x.shape[-1])
        return draw._rows(params)[0], draw._rows(x)[0], max(params.shape[0], x.shape[0])

    def mlp(self, net: MLP, params: Tensor, x: Tensor) -> Tensor:
        return self._mlp(params, x, net)

    @guarded
    def _mlp(self, params: Tensor, x: Tensor, net: MLP) -> Tensor:
        c = self._constants(net)
        T, N = max(params.shape[0], x.shape[0]), x.shape[1]
        params, x, tasks = self._points(c, params, x)
        points = x.shape[1]
        y = empty(x, x.dtype, tasks, points, net.out_features)
        per_point = plan.row_bytes(c, x.dtype, False, keep=False)
        fit = max(4096, plan.up(_budget(None, x) // per_point // tasks, 128))
        weights = Weights(params, shade(c, params, Operands.empty(c, params.shape[0], params)))
        for start in range(0, points, fit):
            part = x[:, start : start + fit]
            s = network(c, tasks, part.shape[1], x, keep=False)
            shown = s.forward(weights, part)
            if part.shape[1] == points:
                return shown.view(T, N, -1)
            y[:, start : start + fit] = shown
        return y.view(T, N, -1)

    def mlp_grad(
        self, net: MLP, params: Tensor, x: Tensor, gy: Tensor, *, want_x: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        gp, gx, *_ = self._back(params, x, net, None, None, gy, False, want_x)
        return gp, gx if want_x else None

    def mlp_dual(
        self, net: MLP, params: Tensor, x: Tensor, v: Tensor | None, w: Tensor | None, gy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        v = torch.zeros_like(params) if v is None else v
        dp, dx, dy = self._back(params, x, net, v, w, gy, True, True)
        return dy.view(gy.shape), dp, dx

    @guarded
    def _back(
        self,
        params: Tensor,
        x: Tensor,
        net: MLP,
        v: Tensor | None,
        w: Tensor | None,
        gy: Tensor,
        dual: bool,
        want_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(p̄, x̄), or dual (p̄̇, x̄̇, ẏ): tasks in chunks that fit the budget."""
        c, shape = self._constants(net), x.shape
        shared = x.shape[0] == 1
        params, x, T = self._points(c, params, x)
        N, real = x.shape[1], x.dtype
        gy = gy.reshape(T, N, net.out_features).contiguous()
        if w is not None:
            w = draw._rows(w.reshape(x.shape))[0]
        if v is not None:
            v = draw._rows(v)[0]
        gp, dy = empty(x, real, T, net.num_params), gy
        gx = empty(x, real, T, N, net.in_features) if want_x else gp
        if dual:
            dy = torch.empty_like(gy)
        operands = Operands.empty(c, params.shape[0], params)
        along = Operands.empty(c, 1 if v is None else v.shape[0], params)
        for ts in chunks(T, plan.task_bytes(c, N, real, dual), _budget(None, x)):
            p, xs, vs, ws = (_take(a, ts) for a in (params, x, v, w))
            n = ts.stop - ts.start
            s: Any = (
                Stream(c, n, N, x, dual=dual, grad=not dual, want_x=want_x, tangent_x=w is not None)
                if want_x or w is not None
                else network(c, n, N, x, dual=dual, grad=not dual)
            )
            mine, scale = shade(c, p, _first(operands, p.shape[0])), None
            if c.mode == "fp16":
                s.scale = _power(gy[ts])
                if vs is not None:
                    tangents = (vs,) if ws is None else (vs, ws)
                    scale = s.v_scale = _power(*tangents).expand(n).contiguous()
                    scale = scale[: vs.shape[0]]
            theirs = None if vs is None else shade(c, vs, _first(along, vs.shape[0]), scale)
            s.forward(Weights(p, mine, vs, theirs), xs, *([] if ws is None else [ws]))
            s.backward(gy[ts])
            s.gradient(gp[ts], tangent=dual)
            if want_x:
                gx[ts] = s.dgx if dual else s.gx
            if dual:
                dy[ts] = s.dy
        if want_x:
            gx = gx.sum(0, keepdim=True) if shared and T > 1 else gx.view(shape)
        return gp, gx, dy

    # losses of tasks

    def loss(
        self, net: MLP, params: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
    ) -> Tensor:
        return self._loss(params, net, batch, step, max_memory, False)[0]

    def loss_grad(
        self, net: MLP, params: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._loss(params, net, batch, step, max_memory, True)

    @guarded
    def _loss(
        self, params: Tensor, net: MLP, batch: Batch, step: int, memory: int | None, grad: bool
    ) -> tuple[Tensor, Tensor]:
        c, real = self._constants(net), params.dtype
        params = draw._rows(params)[0]
        losses = empty(params, real, batch.tasks)
        g = empty(params, real, batch.tasks, net.num_params) if grad else losses
        size = plan.task_bytes(c, _network_points(batch), real, False, back=grad)
        for ts in chunks(batch.tasks, size, _budget(memory, params)):
            seen = Seen(c, _part(batch, ts), back=grad)
            p = _take(params, ts)
            operands = shade(c, p, Operands.empty(c, p.shape[0], p))
            losses[ts] = seen.run(step, Weights(p, operands))
            if grad:
                seen.stream.gradient(g[ts])
        return losses, g

    def loss_hvp(
        self,
        net: MLP,
        params: Tensor,
        v: Tensor,
        batch: Batch,
        step: int = 0,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._hvp(params, net, v, batch, step, max_memory)

    @guarded
    def _hvp(
        self, params: Tensor, net: MLP, v: Tensor, batch: Batch, step: int, memory: int | None
    ) -> tuple[Tensor, Tensor]:
        c, real, T = self._constants(net), params.dtype, batch.tasks
        params, v = params.expand(T, -1).contiguous(), v.expand(T, -1).contiguous()
        g, hv = torch.empty_like(v), torch.empty_like(v)
        size = plan.task_bytes(c, _network_points(batch), real, True)
        for ts in chunks(T, size, _budget(memory, params)):
            product = Product(c, _part(batch, ts), True)
            product.run(step, params[ts], v[ts], hv[ts], None)
            product.seen.stream.gradient(g[ts])
        return g, hv

    # inner loops

    def adapt(
        self,
        net: MLP,
        params: Tensor,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        *,
        keep: bool = False,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._adapt(params, net, batch, lr, rule, keep, max_memory)

    @guarded
    def _adapt(
        self,
        params: Tensor,
        net: MLP,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        keep: bool,
        memory: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        c = self._constants(net)
        K, T, P = lr.shape
        theta, losses = empty(params, params.dtype, T, P), empty(params, params.dtype, K, T)
        thetas = empty(params, params.dtype, K + 1, T, P) if keep else None
        size = plan.task_bytes(c, _network_points(batch), params.dtype, False)
        for ts in chunks(T, size, _budget(memory, params)):
            done = self.graphs.run(
                Inner, c, _take(draw._rows(params)[0], ts), _part(batch, ts), lr[:, ts], rule,
                keep=keep,
            )  # fmt: skip
            theta[ts], losses[:, ts] = done.theta, done.losses
            if thetas is not None:
                thetas[:, ts] = done.more
        return theta, losses, thetas

    def maml(
        self,
        net: MLP,
        init: Tensor,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        *,
        order: int,
        learned: Tensor | None = None,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._maml(init, net, batch, lr, rule, order, learned, max_memory)

    @guarded
    def _maml(
        self,
        init: Tensor,
        net: MLP,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        order: int,
        learned: Tensor | None,
        memory: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        c, T = self._constants(net), batch.tasks
        loss, total = empty(init, init.dtype, T), init.new_zeros(net.num_params)
        rates = None
        if learned is not None:
            rates = torch.zeros_like(learned, memory_format=torch.contiguous_format)
        size = maml_bytes(c, batch, init.dtype, order)
        for ts in chunks(T, size, _budget(memory, init)):
            mine = None if rates is None else _rates_part(rates, T, ts)
            done = self.graphs.run(
                Meta, c, draw._rows(init)[0], _part(batch, ts), lr[:, ts], rule,
                order=order, rates=None if mine is None else mine.shape, tasks=T,
            )  # fmt: skip
            loss[ts] = done.losses
            total += done.more
            if mine is not None:
                mine += done.rates
        return loss, total, rates

    # measurements

    @guarded
    def composite(self, raw: Tensor, t: Tensor, march: March) -> tuple[Tensor, Tensor, Tensor]:
        return render.composite(raw, t, march)

    @guarded
    def composite_grad(
        self, raw: Tensor, t: Tensor, march: March, grgb: Tensor, gdepth: Tensor, gacc: Tensor
    ) -> tuple[Tensor, Tensor]:
        return render.composite_grad(raw, t, march, grgb, gdepth, gacc)

    @guarded
    def composite_dual(
        self,
        raw: Tensor,
        t: Tensor,
        march: March,
        vraw: Tensor,
        vt: Tensor,
        grgb: Tensor,
        gdepth: Tensor,
        gacc: Tensor,
    ) -> tuple[Tensor, ...]:
        return render.composite_dual(raw, t, march, vraw, vt, grgb, gdepth, gacc)

    @guarded
    def project(self, image: Tensor, pixels: Tensor) -> Tensor:
        return project.project(image, pixels)

    @guarded
    def project_adjoint(self, sinogram: Tensor, pixels: Tensor) -> Tensor:
        return project.project_adjoint(sinogram, pixels)


@lru_cache(maxsize=256)
def _constants(net: MLP, mode: str) -> Constants:
    return Constants(net, mode)


def _network_points(batch: Batch) -> int:
    """Points of the network a step takes, of one task."""
    n = batch.per_step or batch.points
    return n * batch.measure.samples if isinstance(batch.measure, March) else n


def _budget(memory: int | None, like: Tensor) -> int:
    return plan.default_memory(like.device) if memory is None else memory


def maml_bytes(c: Constants, batch: Batch, real: torch.dtype, order: int) -> int:
    """Bytes of buffers a task of a meta-gradient needs."""
    size = plan.task_bytes(c, _network_points(batch), real, False)
    if batch.query is not None:
        size += plan.task_bytes(c, _network_points(batch.query), real, False)
    if order == 2:
        size += plan.task_bytes(c, _network_points(batch), real, True)
    return size


def described(
    net: MLP,
    batch: Batch,
    *,
    precision: str | None = None,
    order: int = 2,
    max_memory: int | None = None,
) -> str:
    """What a meta-gradient of this batch runs, in words: kernels, tiles, chunks of tasks, bytes."""
    c, real = _constants(net, precision or "fp32"), batch.y.dtype
    lines = [
        f"{net.activation} {c.net.encoded_features}-{net.width}x{net.depth - 1}-"
        f"{net.out_features}, {c.mode}, sm_{plan.architecture()}"
    ]
    n = _network_points(batch)
    for dual in (False, True)[: max(1, order)]:
        name = "dual" if dual else "plain"
        tile = plan.resident_tile(c, dual)
        if tile is not None:
            lines.append(f"{name}: resident, {tile}; no activations in memory")
            continue
        ahead, back = plan.stream_tiles(c, dual)
        lines.append(f"{name}: ahead {ahead}")
        lines.append(f"{name}: back {back}")
        if net.depth > 2:
            lines.append(f"{name}: weigh {plan.weigh_tile(c, False, dual, False)}")
        if c.encoded:
            lines.append(f"{name}: weigh features {plan.weigh_tile(c, True, dual, False)}")
        lines.append(
            f"{name}: {plan.row_bytes(c, real, dual)} bytes a point, kept as "
            f"{c.kept(real)}, deltas as {c.stored(real)}"
        )
    size = maml_bytes(c, batch, real, order)
    budget = _budget(max_memory, batch.y)
    parts = list(chunks(batch.tasks, size, budget))
    lines.append(
        f"{batch.tasks} tasks of {n} points: {size} bytes each, budget {budget}: "
        f"{len(parts)} chunk(s) of at most {parts[0].stop} tasks"
    )
    return "\n".join(lines)


def _take(rows: Any, ts: slice) -> Any:
    """The rows of some tasks; what all share has one row."""
    return rows if rows is None or rows.shape[0] == 1 else rows[ts]


def _part(batch: Batch, ts: slice) -> Batch:
    """The batch of some tasks, its rows dense."""
    return _dense(batch if ts == slice(0, batch.tasks) else batch.take(ts))


def _dense(batch: Batch) -> Batch:
    x, y = batch.x, batch.y.contiguous()
    query = None if batch.query is None else _dense(batch.query)
    if isinstance(x, Tensor) and not x[0].is_contiguous():
        x = x.contiguous()
    if x is batch.x and y is batch.y and query is batch.query:
        return batch
    return replace(batch, x=x, y=y, query=query)


def _first(operands: Operands, rows: int) -> Operands:
    return Operands(operands.hidden[:rows], operands.first[:rows])


def _rates_part(rates: Tensor, tasks: int, ts: slice) -> Tensor:
    """The view of the rates' gradient that belongs to some tasks: [K,T,P], [T,P] or less, or any
    axis of size 1."""
    if rates.dim() >= 2 and rates.shape[-2] == tasks and tasks > 1:
        return rates[..., ts, :]
    return rates
