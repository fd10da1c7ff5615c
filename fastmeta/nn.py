"""Stacked networks as modules of torch: ``y_t = mlp(net, θ_t, x_t)``, as torch stacks parameters.

Names are those of ``to_module``, shapes those that ``torch.func.stack_module_state`` gives for T
modules: ``layers.0.weight`` [T,out,in], ``layers.0.bias`` [T,out], .... (``stack_module_state``
takes modules of one class, which two of ``to_module`` are not: ``BatchedMLP.from_modules``.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .convert import from_module, to_module
from .ops import dispatch
from .ops.mlp import mlp
from .spec import MLP


class BatchedMLP(nn.Module):
    """T networks of one shape, each with weights of its own: ``y_t = mlp(net, θ_t, x_t)``.

    A step of an optimiser on ``losses.sum()`` (one loss a task) is T separate steps; a mean over
    tasks would divide every task's gradient by T.

    Args:
        net: the networks' specification.
        tasks: T, how many networks.
        init: weights to begin with, [T,P], or [P] for all tasks alike; copied, and the module takes
            dtype and device from it. None: ``net.init(tasks, generator=generator)``.
        generator: of that draw.
        per_task: keep one parameter [P] a task (``rows.0``, ``rows.1``, ...) in place of stacked
            ones a layer, so that an optimiser's groups can give each task a rate (``task_groups``).
            The state_dict is the same; T is then the number of parameters an optimiser walks.
        impl, precision: as in ``fm.mlp``.

    Parameters are stacked by layer, weight [T,out,in] and bias [T,out], and put side by side at
    each call. One flat [T,P] parameter would save that copy (of forward and backward 11 % at T =
    16, width 64, 256 points, 5 % at 1024 points, 1 % at T = 4, width 256; 2 cores), but has no
    groups by layer, and ``torch.func.functional_call`` could not take what ``stack_module_state``
    gives.

    state_dict: the stacked layout in both modes. ``load_state_dict`` takes, besides its own: what
    ``stack_module_state`` gives for ``nn.Sequential``, by order (``0.weight``, ``2.weight``, ...);
    and an encoding's ``encoding.B``, ``encoding.phi``, which must be those of ``net``.

    Differentiable as ``fm.mlp`` is: twice, in the parameters and in x.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    >>> import torch, fastmeta as fm
    >>> nets = fm.nn.BatchedMLP(fm.siren(2, 3, width=16, depth=3), tasks=4)
    >>> nets(torch.rand(4, 100, 2)).shape
    torch.Size([4, 100, 3])
    >>> {name: list(p.shape) for name, p in nets.named_parameters()}["layers.0.weight"]
    [4, 16, 2]
    >>> x = torch.rand(100, 2)
    >>> torch.allclose(nets[1](x), nets(x)[1], atol=1e-5)  # a module of torch's own parts
    True
    """

    def __init__(
        self,
        net: MLP,
        tasks: int,
        *,
        init: Tensor | None = None,
        generator: torch.Generator | None = None,
        per_task: bool = False,
        impl: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.net = dispatch.network("BatchedMLP", net)
        if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
            raise ValueError(f"BatchedMLP: tasks is {tasks!r}; accepted is an integer >= 1")
        if init is not None and generator is not None:
            raise ValueError("BatchedMLP: init and generator came; accepted is one of the two")
        self.tasks, self.per_task = tasks, bool(per_task)
        self.impl, self.precision = impl, precision
        if init is None:
            init = net.init(tasks, generator=generator)
        rows = dispatch.parameters("BatchedMLP", net, init, tasks, name="init").detach()
        rows = rows.expand(tasks, -1)  # [T,P]
        if self.per_task:
            self.rows = nn.ParameterList([nn.Parameter(row.clone()) for row in rows])
        else:
            self.layers = nn.ModuleList(_Layer(w, b) for w, b in net.layers(rows))
        self.register_state_dict_post_hook(_stack_rows)
        self.register_load_state_dict_pre_hook(_own_names)

    def forward(self, x: Tensor, params: Mapping[str, Tensor] | Tensor | None = None) -> Tensor:
        """y of every network at its points.

        ``y[..., t, n, :] = mlp(net, θ_t, x[..., t, n, :])``

        Args:
            x: [T,N,D]; [N,D] or [1,N,D] shared by all tasks; [...,T,N,D], leading axes folded into
                the points, so that the weights are not copied.
            params: weights in place of the module's own: a mapping with its names, weight
                [T,out,in] (or [out,in], shared by all tasks) and bias likewise, or flat [T,P] or
                [P]. With several axes in front, [...,T,P], they go with x's by broadcasting. None:
                the module's own.

        Returns:
            y [T,N,C], and x's leading axes in front; [N,C] where neither has a task axis.

        Raises:
            ValueError, TypeError: names, shapes, dtypes or devices that do not fit.
        """
        flat = self.flat() if params is None else self._flat_of(params)
        x = dispatch.tensor("BatchedMLP", "x", x)
        if x.dim() < 2:
            raise ValueError(
                f"BatchedMLP: x has shape {tuple(x.shape)}; "
                "accepted are [N,D], [T,N,D] and [...,T,N,D]"
            )
        if flat.dim() > 2:
            return self._each(flat, x)
        if x.dim() <= 3:
            return self._mlp(flat, x)
        tasks = flat.shape[0] if flat.dim() == 2 else 1
        if tasks != 1 and x.shape[-3] not in (1, tasks):
            raise ValueError(
                f"BatchedMLP: x has shape {tuple(x.shape)}, {x.shape[-3]} in the task axis; "
                f"accepted are {tasks} and 1 there"
            )
        points = x.movedim(-3, 0)  # [T,...,N,D]
        y = self._mlp(flat, points.flatten(1, -2))
        return y.unflatten(1, points.shape[1:-1]).movedim(0, -3)  # [...,T,N,C]

    def flat(self) -> Tensor:
        """[T,P], the weights as ``fm.mlp`` takes them; differentiable, a copy."""
        if self.per_task:
            return torch.stack(list(self.rows))
        return torch.cat([p.flatten(1) for p in self.layers.parameters()], 1)

    def task_groups(self, rates: Iterable[float]) -> list[dict[str, Any]]:
        """Groups for an optimiser of torch, task t at rate lr_t: ``SGD(net.task_groups(rates))``.

        Args:
            rates: T numbers.

        Raises:
            ValueError: not T rates, or a module without ``per_task=True``.
        """
        rates = [float(rate) for rate in rates]
        if not self.per_task:
            raise ValueError(
                "BatchedMLP.task_groups: parameters are stacked over tasks, and a group has one "
                "rate; accepted is a module made with per_task=True"
            )
        if len(rates) != self.tasks:
            raise ValueError(
                f"BatchedMLP.task_groups: rates has {len(rates)} entries; accepted are {self.tasks}"
            )
        return [{"params": [row], "lr": lr} for row, lr in zip(self.rows, rates, strict=True)]

    def __len__(self) -> int:
        return self.tasks

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.to_modules())

    def __getitem__(self, task: int) -> nn.Module:
        """Task t alone, of torch's own parts (``fm.to_module``): a copy that trains by itself."""
        if not isinstance(task, int) or isinstance(task, bool):
            raise TypeError(
                f"BatchedMLP: index is {type(task).__name__}; accepted is a task's number"
            )
        if not -self.tasks <= task < self.tasks:
            raise IndexError(f"BatchedMLP: task {task}; accepted are 0 to {self.tasks - 1}")
        return to_module(self.net, self.flat().detach()[task])

    def to_modules(self) -> list[nn.Module]:
        """``[net[0], ..., net[T-1]]``: T modules of torch's own parts, copies."""
        return [to_module(self.net, row) for row in self.flat().detach()]

    @classmethod
    def from_modules(
        cls, modules: Sequence[nn.Module], *, coords: str = "unit", **options: Any
    ) -> BatchedMLP:
        """T modules that ``fm.from_module`` accepts, of one shape, as one; weights are copied.

        Args:
            modules: ``nn.Sequential`` of linear layers and activations, or made by ``to_module``.
            coords: as in ``fm.from_module``.
            options: ``per_task``, ``impl``, ``precision``.

        Raises:
            ValueError: none, one that cannot be converted, or two that differ in more than weights.
        """
        pairs = [from_module(module, coords=coords) for module in modules]
        if not pairs:
            raise ValueError("BatchedMLP.from_modules: modules is empty; accepted are one or more")
        net, first = pairs[0]
        for index, (other, row) in enumerate(pairs):
            if other != net:
                raise ValueError(
                    f"BatchedMLP.from_modules: module {index} is {other}, module 0 is {net}; "
                    "accepted are modules of one shape"
                )
            if (row.dtype, row.device) != (first.dtype, first.device):
                raise ValueError(
                    f"BatchedMLP.from_modules: module {index} is {row.dtype} on {row.device}, "
                    f"module 0 is {first.dtype} on {first.device}; accepted is one for all"
                )
        return cls(net, len(pairs), init=torch.stack([row for _, row in pairs]), **options)

    def extra_repr(self) -> str:
        return f"{self.net}, tasks={self.tasks}" + (", per_task=True" if self.per_task else "")

    def _mlp(self, flat: Tensor, x: Tensor) -> Tensor:
        return mlp(self.net, flat, x, impl=self.impl, precision=self.precision)

    def _each(self, flat: Tensor, x: Tensor) -> Tensor:
        """Weights with several leading axes: every pair of weights and points is a task."""
        try:
            lead = torch.broadcast_shapes(flat.shape[:-1], x.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"BatchedMLP: params has shape {tuple(flat.shape)}, x {tuple(x.shape)}; "
                "accepted are leading axes that broadcast"
            ) from None
        rows = flat.expand(*lead, -1).reshape(-1, flat.shape[-1])
        points = x.expand(*lead, -1, -1).reshape(-1, *x.shape[-2:])
        return self._mlp(rows, points).unflatten(0, lead)

    def _flat_of(self, params: Mapping[str, Tensor] | Tensor) -> Tensor:
        """[...,P] of a mapping from the names to the weights; a tensor as it is."""
        if isinstance(params, Tensor):
            return params
        if not isinstance(params, Mapping):
            raise TypeError(
                f"BatchedMLP: params is {type(params).__name__}; "
                "accepted are a mapping from names to tensors, and a tensor [T,P] or [P]"
            )
        shapes = _shapes(self.net)
        if params.keys() != shapes.keys():
            wrong = sorted(params.keys() ^ shapes.keys())[0]
            known = "missing" if wrong in shapes else "unknown"
            raise ValueError(f"BatchedMLP: params: {wrong!r} is {known}; accepted are {[*shapes]}")
        for name, shape in shapes.items():
            if not isinstance(params[name], Tensor) or (
                tuple(params[name].shape[-len(shape) :]) != shape
            ):
                part: Any = params[name]
                came = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                accepted = ",".join(["T", *map(str, shape)])
                raise ValueError(
                    f"BatchedMLP: params[{name!r}] is {came}; accepted is [{accepted}]"
                )
        dispatch.agree("BatchedMLP", **params)
        leads = {name: params[name].shape[: -len(shape)] for name, shape in shapes.items()}
        try:
            lead = torch.broadcast_shapes(*leads.values())
        except RuntimeError:
            raise ValueError(
                f"BatchedMLP: params: the axes before the weights are "
                f"{ {name: list(axes) for name, axes in leads.items()} }; accepted are equal ones"
            ) from None
        parts = [
            params[name].expand(*lead, *shape).flatten(len(lead)) for name, shape in shapes.items()
        ]
        return torch.cat(parts, -1)


class _Layer(nn.Module):
    """weight [T,out,in], bias [T,out]. A class of its own: higher puts a mixin in front of each
    module's class, and in front of ``nn.Module`` itself that cannot be done."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())


def _shapes(net: MLP) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one task's part, in the order of the flat row."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (i, o) in enumerate(net.sizes):
        shapes[f"layers.{index}.weight"], shapes[f"layers.{index}.bias"] = (o, i), (o,)
    return shapes


def _stack_rows(module: BatchedMLP, state: dict[str, Any], prefix: str, _: Any) -> None:
    """state_dict of one parameter a task -> the stacked layout."""
    if not module.per_task:
        return
    rows = torch.stack([state.pop(f"{prefix}rows.{t}") for t in range(module.tasks)])
    for index, (weight, bias) in enumerate(module.net.layers(rows)):
        state[f"{prefix}layers.{index}.weight"] = weight
        state[f"{prefix}layers.{index}.bias"] = bias


def _own_names(module: BatchedMLP, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """What load_state_dict is given -> the module's own names; what does not fit is reported."""
    errors: list[str] = rest[-1]
    net = module.net
    for name in ("B", "phi"):
        came = state.pop(f"{prefix}encoding.{name}", None)
        if came is None:
            continue
        own = None if net.encoding is None else getattr(net.encoding, name)
        if own is None or not bool((came.to("cpu", torch.float32) == own).all()):
            errors.append(f"BatchedMLP: {prefix}encoding.{name} is not that of {net}")
    shapes = _shapes(net)
    names = [key[len(prefix) :] for key in state if key.startswith(prefix)]
    if len(names) == len(shapes) and all(re.fullmatch(r"\d+\.(weight|bias)", n) for n in names):
        ends = [name.split(".")[1] for name in names]
        if ends == ["weight", "bias"] * net.depth:
            for name, own_name in zip(names, shapes, strict=True):
                state[prefix + own_name] = state.pop(prefix + name)
    if not module.per_task or not all(prefix + name in state for name in shapes):
        return
    parts = [state.pop(prefix + name) for name in shapes]
    wanted = [(module.tasks, *shape) for shape in shapes.values()]
    for name, part, shape in zip(shapes, parts, wanted, strict=True):
        if tuple(part.shape) != shape:
            errors.append(f"BatchedMLP: {name} is {list(part.shape)}; accepted is {list(shape)}")
    if not errors:
        rows = torch.cat([part.flatten(1) for part in parts], 1)
        state.update({f"{prefix}rows.{t}": row for t, row in enumerate(rows)})
