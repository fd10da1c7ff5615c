"""Other packages' words for the inner loop, ``θ_{k+1} = θ_k − α ⊙ u_k(∇_θ L(θ_k))``, on all tasks
at once: higher, learn2learn, optax and TorchOpt, MetaSDF and GradNCP.

For loops that someone has already: the loss is the user's own, of any form, and torch's autograd
walks back through the steps, so memory grows with points and steps. ``fm.MAML`` computes the same
gradient without that graph; its cost is what this package is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convert import from_module
from .nn import BatchedMLP
from .ops.mlp import mlp
from .reference import adam_update, rule_step
from .rules import Adam, Momentum, Rule, resolve
from .spec import MLP

Params = Mapping[str, Tensor]


class Tasks:
    """T networks on their way through an inner loop: ``task(x)`` is y_t at θ_k, ``task.step(loss)``
    makes θ_{k+1}. ``innerloop`` and ``MAML.clone`` make it; ``task.params`` is θ_k [T,P].

    Every weight is adapted, one with ``requires_grad=False`` too, which then gets no meta-gradient.
    Exact second order, in the start and in the rates; in third order (a loss with a derivative in x
    in it) the op raises. With ``first_order`` (FOMAML) ∇L is a constant: λ_0 = λ_K, no second
    derivative at all; ``first_order`` says which it is.
    """

    def __init__(
        self, op: str, model: Any, tasks: int, lr: float | Tensor, rule: Rule, first_order: bool
    ) -> None:
        if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
            raise ValueError(f"{op}: tasks is {tasks!r}; accepted is an integer >= 1")
        self.op, self.tasks, self.lr, self.rule = op, tasks, lr, rule
        self.net, rows, self.options = _start(op, model)
        if rows.shape[0] not in (1, tasks):
            raise ValueError(
                f"{op}: the module holds {rows.shape[0]} networks for {tasks} tasks; accepted are "
                f"1 and {tasks}"
            )
        self.first_order, self.steps = first_order, 0
        self.params = rows.expand(tasks, -1)  # [T,P]
        if not self.params.requires_grad:
            self.params = self.params.detach().requires_grad_()
        self._state: tuple[Tensor, ...] = ()
        if isinstance(lr, Tensor):
            _broadcasts(op, lr, self.params.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """y [T,N,C] at θ_k, of points x [T,N,D], or [N,D] shared by all tasks."""
        return mlp(self.net, self.params, x, **self.options)

    def step(
        self, loss: Tensor, *, first_order: bool | None = None, allow_unused: bool = False
    ) -> None:
        """θ_k becomes θ_{k+1}, by the gradient of each task's own loss.

        Args:
            loss: [T], one a task, of ``self(x)`` since the last step, such as
                ``((task(x) - y) ** 2).mean((1, 2))``. Entry t is to hold task t's network alone:
                the entries are added up, so that a mean over tasks would divide every task's
                gradient by T. For that reason a scalar raises, but where T = 1.
            first_order: of this step; None: as the loop was begun.
            allow_unused: a loss without the networks in it leaves θ as it is, where it otherwise
                raises. No single weight can be unused: the network's gradient is one tensor.

        Raises:
            TypeError, ValueError: another shape, or a loss that is not of the present weights.
        """
        total = _sum(self.op, loss, self.tasks)
        first = self.first_order if first_order is None else bool(first_order)
        grad = None
        if total.requires_grad:
            (grad,) = torch.autograd.grad(
                total, self.params, create_graph=not first, allow_unused=True
            )
        if grad is None and not allow_unused:
            raise ValueError(
                f"{self.op}: loss does not depend on the tasks' present weights; accepted is one "
                "computed from them since the last step, outside torch.no_grad()"
            )
        if grad is None:
            return
        with torch.enable_grad():
            theta = self.params.detach() if first else self.params
            update, self._state = _direction(self.rule, self.steps, theta, grad, self._state)
            self.params = self.params - self.lr * update  # [T,P]
        self.steps += 1

    adapt = step  # as learn2learn calls it

    def clone(self) -> Tasks:
        """The same weights, to go on from along another way; gradients reach the start by both."""
        other = object.__new__(Tasks)
        other.__dict__.update(self.__dict__)
        return other

    def __repr__(self) -> str:
        order = "first order (FOMAML)" if self.first_order else "second order"
        return f"Tasks({self.net}, tasks={self.tasks}, steps={self.steps}, {order})"


@contextmanager
def innerloop(
    net: Any,
    tasks: int,
    lr: float | Tensor,
    *,
    rule: str | Rule = "sgd",
    first_order: bool = False,
) -> Iterator[Tasks]:
    """``θ_{k+1} = θ_k − α ⊙ u_k(∇L(θ_k))`` for T tasks, as ``higher.innerloop_ctx`` for one::

        with innerloop(net, tasks=T, lr=1e-2) as task:
            for _ in range(K):
                task.step(((task(x) - y) ** 2).mean((1, 2)))
            ((task(xq) - yq) ** 2).mean().backward()

    Args:
        net: ``BatchedMLP(spec, 1)``, one start for all tasks (or T, one each), or a module that
            ``fm.from_module`` accepts; gradients go to its parameters (higher's
            ``copy_initial_weights=False``).
        tasks: T, how many.
        lr: α, a number or a tensor that broadcasts to [T,P], such as [T,1] or [P]; differentiable.
        rule: as in ``fm.MAML``; with "meta_sgd" the rates are lr, for the user to hold.
        first_order: FOMAML in place of the exact gradient.

    Yields:
        Tasks. It may be used after the block, which is there for higher's form.

    Raises:
        ValueError, TypeError: a module, rates or a rule that do not fit.

    Source: Grefenstette et al. 2019 (higher); Finn et al. 2017.

    >>> import torch, fastmeta as fm
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> x = torch.rand(8, 50, 1)  # eight tasks
    >>> with fm.compat.innerloop(model, tasks=8, lr=1e-2) as task:
    ...     for _ in range(3):
    ...         task.step(((task(x) - x.sin()) ** 2).mean((1, 2)))
    ...     ((task(x) - x.sin()) ** 2).mean().backward()
    >>> model[0].weight.grad.shape
    torch.Size([16, 1])
    """
    yield Tasks("innerloop", net, tasks, lr, resolve(rule), first_order)


class MAML(nn.Module):
    """``θ_{k+1} = θ_k − α ⊙ ∇L(θ_k)`` in learn2learn's words, T tasks at once::

        l = maml.clone(tasks=T)
        l.adapt(loss(l(x_s), y_s))          # one loss a task, [T]
        loss(l(x_q), y_q).mean().backward()

    Limits: a loss is [T], where learn2learn's is a scalar (``Tasks.step`` says why); ``forward`` is
    the unadapted network. ``fm.MAML`` is another class: a whole inner loop in one call.

    Args:
        model: as ``net`` in ``innerloop``; ``maml.module``, whose parameters are the learned ones.
        lr: as in ``innerloop``; an ``nn.Parameter`` is learned along.
        first_order: FOMAML in place of the exact gradient; of one clone, or one step, where
            ``clone`` or ``adapt`` is told so.

    Source: Arnold et al. 2020 (learn2learn); Finn et al. 2017.

    >>> import torch, fastmeta as fm
    >>> model = fm.nn.BatchedMLP(fm.siren(1, 1, width=16, depth=3), tasks=1)
    >>> maml = fm.compat.MAML(model, lr=1e-2)
    >>> x = torch.rand(8, 50, 1)
    >>> learner = maml.clone(tasks=8)
    >>> learner.adapt(((learner(x) - x.sin()) ** 2).mean((1, 2)))
    >>> ((learner(x) - x.sin()) ** 2).mean().backward()
    >>> all(p.grad is not None for p in maml.parameters())
    True
    >>> learner.adapt(((learner(x) - x.sin()) ** 2).mean())
    Traceback (most recent call last):
    ValueError: compat.MAML: loss has shape []; accepted is one a task, [8], such as ...
    """

    lr: float | Tensor

    def __init__(self, model: Any, lr: float | Tensor, first_order: bool = False) -> None:
        super().__init__()
        _start("compat.MAML", model)
        self.module, self.first_order = model, bool(first_order)
        if isinstance(lr, Tensor) and not isinstance(lr, nn.Parameter):
            self.register_buffer("lr", lr)
        else:
            self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """y at the start's own weights, [T,N,C]."""
        net, rows, options = _start("compat.MAML", self.module)
        return mlp(net, rows, x, **options)

    def clone(self, tasks: int = 1, *, first_order: bool | None = None) -> Tasks:
        """T networks at the start, to be adapted; gradients reach ``parameters()``."""
        first = self.first_order if first_order is None else bool(first_order)
        return Tasks("compat.MAML", self.module, tasks, self.lr, resolve("sgd"), first)


# Functional optimisers ---


class Optimizer(NamedTuple):
    """``state = init(params)``; ``updates, state = update(grads, state)``, as in optax."""

    init: Callable[[Params], Any]
    update: Callable[..., tuple[dict[str, Tensor], Any]]


class State(NamedTuple):
    """Steps taken, and by name what the rule keeps (momentum: b; Adam: m, v)."""

    steps: int
    slots: dict[str, tuple[Tensor, ...]]


def sgd(lr: float | Tensor, momentum: float = 0.0, nesterov: bool = False) -> Optimizer:
    """``updates = −lr · g``; with momentum ``b' = μ b + g``, ``−lr · b'`` (or ``g + μ b'``).

    Args:
        lr: a number, a tensor [] or, on stacked parameters, [T]: one rate a task. Differentiable.

    The dicts' gradients are taken as they come: with ``create_graph=True`` in
    ``torch.autograd.grad`` the result is exact to second order, without it it is FOMAML.

    >>> import torch, fastmeta as fm
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> optimizer = fm.compat.sgd(0.5)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": torch.tensor([2.0, 2.0])}, state)
    >>> fm.compat.apply_updates(params, updates)
    {'w': tensor([0., 1.])}
    """
    return _optimizer(Momentum(momentum, nesterov) if momentum else resolve("sgd"), lr)


def adam(lr: float | Tensor, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """``updates = −lr · m'/(c1 (√(v'/c2) + ε))``, as ``optax.adam`` and ``torch.optim.Adam``.

    Differentiable as ``sgd`` is; the square root has derivative 0 at v = 0, where optax and
    torch give NaN.

    >>> import torch, fastmeta as fm
    >>> optimizer = fm.compat.adam(torch.tensor([0.5, 0.25]))  # a rate a task
    >>> state = optimizer.init({"w": torch.zeros(2, 3)})
    >>> updates, state = optimizer.update({"w": torch.ones(2, 3)}, state)
    >>> updates["w"]
    tensor([[-0.5000, -0.5000, -0.5000],
            [-0.2500, -0.2500, -0.2500]])
    """
    return _optimizer(Adam(b1, b2, eps), lr)


def apply_updates(params: Params, updates: Params) -> dict[str, Tensor]:
    """``{name: params[name] + updates[name]}``, new tensors."""
    _same("apply_updates", "updates", params, updates)
    return {name: p + updates[name] for name, p in params.items()}


def _optimizer(rule: Rule, lr: float | Tensor) -> Optimizer:
    if isinstance(lr, Tensor) and lr.dim() > 1:
        raise ValueError(
            f"compat.{rule.name}: lr has shape {list(lr.shape)}; accepted are [] and [T]"
        )

    def rate(g: Tensor) -> float | Tensor:
        if not isinstance(lr, Tensor) or lr.dim() == 0:
            return lr
        if g.dim() == 0 or g.shape[0] != lr.shape[0]:
            raise ValueError(
                f"compat.{rule.name}: lr has {lr.shape[0]} rates, a gradient the shape "
                f"{list(g.shape)}; accepted are parameters stacked over that many tasks"
            )
        return lr.view(-1, *[1] * (g.dim() - 1))  # [T,1,..]

    def init(params: Params) -> State:
        slots = {n: tuple(torch.zeros_like(p) for _ in rule.state) for n, p in params.items()}
        return State(0, slots)

    def update(
        grads: Params, state: State, params: Params | None = None
    ) -> tuple[dict[str, Tensor], State]:
        _same(f"compat.{rule.name}", "grads", state.slots, grads)
        updates, slots = {}, {}
        for name, g in grads.items():
            u, slots[name] = _direction(rule, state.steps, g, g, state.slots[name])
            updates[name] = -rate(g) * u
        return updates, State(state.steps + 1, slots)

    return Optimizer(init, update)


# A network whose weights come with the call ---


class MetaMLP(nn.Module):
    """``y_t = mlp(net, θ_t, x_t)`` with θ in the call, as MetaSDF and GradNCP have it::

        params = OrderedDict((n, p[None].repeat(T, *[1] * p.dim()))
                             for n, p in model.meta_named_parameters())
        y = model(coords, params=params)

    Limits: ``params`` holds every name (torchmeta takes a part of them), all stacked alike. The
    parameters that an optimiser sees have an axis of 1 in front, which ``meta_named_parameters``
    takes off; y is a tensor, in ``net``'s own output.

    Args:
        net: the specification.
        init, generator, impl, precision: as in ``fm.nn.BatchedMLP``.

    Source: Sitzmann et al. 2020 (MetaSDF); Kim et al. 2023 (GradNCP).

    >>> import torch, fastmeta as fm
    >>> model = fm.compat.MetaMLP(fm.siren(2, 3, width=16, depth=3))
    >>> params = {n: p[None].repeat(4, *[1] * p.dim()) for n, p in model.meta_named_parameters()}
    >>> params["layers.0.weight"].shape
    torch.Size([4, 16, 2])
    >>> model(torch.rand(4, 50, 2), params=params).shape
    torch.Size([4, 50, 3])
    """

    def __init__(self, net: MLP, **options: Any) -> None:
        super().__init__()
        self.batched = BatchedMLP(net, 1, **options)

    def forward(self, coords: Tensor, params: Params | None = None) -> Tensor:
        """y [T,N,C] of coords [T,N,D] or [N,D]; params by name, [T,out,in] and [T,out], or one
        network's. None: the module's own."""
        return self.batched(coords, params)

    def meta_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight [out,in] or bias [out]): views, differentiable to the parameters."""
        for name, p in self.batched.named_parameters():
            yield name, p[0]

    def meta_parameters(self) -> Iterator[Tensor]:
        """The parameters themselves, in the order of ``meta_named_parameters``."""
        for _, p in self.meta_named_parameters():
            yield p


# What they share ---


def _start(op: str, model: Any) -> tuple[MLP, Tensor, dict[str, Any]]:
    """(specification, weights [1 or T,P] that lead to the module's parameters, options of mlp)."""
    if isinstance(model, MetaMLP):
        model = model.batched
    if isinstance(model, BatchedMLP):
        return model.net, model.flat(), {"impl": model.impl, "precision": model.precision}
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: the network is a {type(model).__name__}; accepted are fm.nn.BatchedMLP and a "
            "module that fm.from_module takes"
        )
    net, row = from_module(model)
    flat = torch.cat([p.reshape(-1) for p in model.parameters()])
    if flat.shape != row.shape or not torch.equal(flat.detach(), row):
        raise ValueError(
            f"{op}: the module's parameters are not one weight and one bias a layer, in order; "
            "accepted is a module where each nn.Linear has its own of both"
        )
    return net, flat[None], {}


def _sum(op: str, loss: Any, tasks: int) -> Tensor:
    """The sum of one loss a task, [T]."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{op}: loss is {type(loss).__name__}; accepted is a tensor [T]")
    if tuple(loss.shape) != (tasks,) and not (tasks == 1 and loss.numel() == 1):
        raise ValueError(
            f"{op}: loss has shape {list(loss.shape)}; accepted is one a task, [{tasks}], such as "
            "((task(x) - y) ** 2).mean((1, 2)): a mean over tasks would divide each task's step by "
            "their number"
        )
    return loss.sum()


def _broadcasts(op: str, lr: Tensor, shape: torch.Size) -> None:
    try:
        lr.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: lr has shape {tuple(lr.shape)}; accepted is what broadcasts to [T,P] = "
            f"{tuple(shape)}"
        ) from None


def _direction(
    rule: Rule, k: int, theta: Tensor, g: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(u_k, the rule's next state), differentiable in g, also where Adam's v is 0."""
    u, state = rule_step(rule, k, theta, g, state)
    if isinstance(rule, Adam):
        m, v = state
        u = adam_update(rule, k, m, torch.where(v > 0, v, v.detach()))[0]
    return u, state


def _same(op: str, name: str, wanted: Mapping[str, Any], came: Params) -> None:
    if wanted.keys() != came.keys():
        raise ValueError(f"{op}: {name} has the names {[*came]}; accepted are {[*wanted]}")
