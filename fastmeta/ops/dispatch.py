"""Which worker computes a case: a worker asked for by name runs or raises; with no name, the first
without objection.

A worker is a module (or an object with the same names) that has ``objections(case) -> list[str]``
and ``at(precision)``, which returns the passes of ``fastmeta.reference`` in that arithmetic. It is
imported when it is first considered, never before.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import env
from ..batch import Batch
from ..rules import Rule
from ..spec import MLP

# Name -> (module, attribute in it or None for the module itself), the fastest first.
WORKERS: dict[str, tuple[str, str | None]] = {
    "cuda": ("fastmeta.native", "cuda"),
    "triton": ("fastmeta.triton", None),
    "cpu": ("fastmeta.native", "cpu"),
    "reference": ("fastmeta.reference", None),
}
# Only where a call or FASTMETA_IMPL names them: until benchmarks/gpu.sh has timed it on a GPU, a
# worker that takes minutes to compile at its first call is nobody's default.
BY_NAME = ("cuda",)
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True)
class Case:
    """What a worker is asked to compute, as far as it may object to it."""

    op: str  # mlp, loss_grad, loss_hvp, composite, render, project, adapt, maml, reptile
    dtype: torch.dtype
    device: str  # "cpu", "cuda", ...
    precision: str | None = None
    net: MLP | None = None
    measure: str = "none"  # none, project, march
    rule: str | None = None  # of the inner loop, where there is one
    order: int = 1  # derivatives the op is asked for


@cache
def load(name: str) -> tuple[Any, str | None]:
    """(worker, None), or (None, the reason it cannot run here)."""
    module, attribute = WORKERS[name]
    try:
        worker: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return None, f"this version of fastmeta has no {name} worker"
        return None, f"{module} needs the package {error.name!r}: pip install {error.name}"
    except ImportError as error:
        return None, f"{module} does not load: {error}"
    worker = worker if attribute is None else getattr(worker, attribute, None)
    if worker is None:
        return None, f"this version of fastmeta has no {name} worker"
    reason = getattr(worker, "unavailable", lambda: None)()
    return (worker, None) if reason is None else (None, reason)


def available() -> dict[str, str | None]:
    """Every worker's name -> None, or the reason it cannot run on this machine.

    >>> import fastmeta as fm
    >>> list(fm.available())
    ['cuda', 'triton', 'cpu', 'reference']
    >>> fm.available()["reference"] is None
    True
    """
    return {name: load(name)[1] for name in WORKERS}


def objections(case: Case, name: str) -> list[str]:
    """Why a worker cannot run a case; empty: it can."""
    worker, reason = load(name)
    return [reason] if reason is not None else list(worker.objections(case))


@lru_cache(maxsize=4096)
def _choose(impl: str | None, *fields: Any) -> Any:
    case = Case(*fields)
    if case.precision is not None and case.precision not in PRECISIONS:
        raise ValueError(
            f"{case.op}: precision is {case.precision!r}; accepted are {', '.join(PRECISIONS)}"
        )
    if impl is not None and impl not in WORKERS:
        raise ValueError(f"{case.op}: impl is {impl!r}; accepted are {', '.join(WORKERS)}")
    refusals = []
    for name in [impl] if impl is not None else WORKERS:
        if impl is None and name in BY_NAME:
            reasons = [load(name)[1] or "runs only where impl or FASTMETA_IMPL names it"]
        else:
            reasons = objections(case, name)
        if not reasons:
            return load(name)[0].at(case.precision)
        refusals.append(f"{name}: {'; '.join(reasons)}")
    asked = "no worker runs this case" if impl is None else f"impl={impl!r} cannot run this case"
    raise ValueError(f"{case.op}: {asked}. " + " | ".join(refusals))


def choose(case: Case, impl: str | None) -> Any:
    """The passes for a case, of the worker named by ``impl`` or FASTMETA_IMPL, or of the first
    without objection.

    Raises:
        ValueError: the named worker, or every worker, objects; the message holds all objections.
    """
    c = case
    return choose_for(impl, c.op, c.dtype, c.device, c.precision, c.net, c.measure, c.rule, c.order)


def choose_for(impl: str | None, *fields: Any) -> Any:
    """``choose(Case(*fields), impl)``, in a tenth of the time on a case met before."""
    return _choose(impl if impl is not None else env.default_impl(), *fields)


# Checks that several ops share ---


_FLOATS = (torch.float32, torch.float64)


def tensor(
    op: str, name: str, value: Any, *, columns: int | None = None, dims: tuple[int, ...] = ()
) -> Tensor:
    """The value, if it is a float tensor with one of the numbers of axes and that many columns.

    Under autocast a float16 or bfloat16 tensor, as torch's own layers return there, becomes
    float32: the op computes in float32 or float64 whatever autocast asks.
    """
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        value = _cast(op, name, value)
    if dims and value.dim() not in dims:
        accepted = " or ".join(str(d) for d in dims)
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}; accepted are {accepted} axes"
        )
    if columns is not None and value.shape[-1] != columns:
        raise ValueError(f"{op}: {name} has {value.shape[-1]} columns, accepted is {columns}")
    return value


def _cast(op: str, name: str, value: Any) -> Tensor:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    if half and torch.is_autocast_enabled(value.device.type):
        return value.float()
    came = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"{op}: {name} is {came}; accepted is a float32 or float64 tensor (under autocast, "
        "float16 and bfloat16 too, computed in float32)"
    )


def agree(op: str, **tensors: Tensor) -> None:
    """Raise unless all tensors have one dtype and one device."""
    first, *others = tensors.values()
    if any(t.dtype != first.dtype or t.device != first.device for t in others):
        came = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{op}: {came}; all must have one dtype and one device")


def network(op: str, net: Any) -> MLP:
    if not isinstance(net, MLP):
        raise TypeError(f"{op}: net is a {type(net).__name__}; accepted is a fastmeta.MLP")
    return net


def parameters(
    op: str, net: MLP, params: Any, tasks: int | None = None, name: str = "params"
) -> Tensor:
    """params (or what else has its shape, by name) as [T,P], or [1,P] where shared; a view."""
    params = tensor(op, name, params, dims=(1, 2))
    if params.shape[-1] != net.num_params:
        raise ValueError(
            f"{op}: {name} has {params.shape[-1]} columns, the network has {net.num_params} "
            "parameters"
        )
    if params.dim() == 1:
        return params[None]
    if params.shape[0] == 0 or (tasks is not None and params.shape[0] not in (1, tasks)):
        raise ValueError(
            f"{op}: {name} has {params.shape[0]} rows for {tasks} tasks; accepted are [P] and [T,P]"
        )
    return params


def task_case(
    op: str,
    net: Any,
    params: Any,
    batch: Any,
    precision: str | None,
    rule: Rule | None = None,
    order: int = 1,
) -> tuple[Tensor, Case]:
    """Checks of the ops that take a network, parameters and a batch: (params [T or 1,P], case)."""
    net = network(op, net)
    if not isinstance(batch, Batch):
        raise TypeError(f"{op}: batch is a {type(batch).__name__}; accepted is a fastmeta.Batch")
    for name, part in (("batch", batch), ("query", batch.query)):
        if part is None:
            continue
        if part.coordinates != net.in_features:
            raise ValueError(
                f"{op}: {name}.x has {part.coordinates} columns, net.in_features is "
                f"{net.in_features}"
            )
        outputs = {"none": part.y.shape[-1], "project": 1, "march": 4}[part.measure_name]
        if outputs != net.out_features:
            raise ValueError(
                f"{op}: {name} needs {outputs} network outputs (measure {part.measure_name}), "
                f"net.out_features is {net.out_features}"
            )
        agree(op, params=params if isinstance(params, Tensor) else part.y, **{name: part.y})
    params = parameters(op, net, params, batch.tasks)
    rule_name = None if rule is None else rule.name
    case = Case(
        op, params.dtype, params.device.type, precision, net, batch.measure_name, rule_name, order
    )
    return params, case


class _Refuse(torch.autograd.Function):
    """Identity whose derivative raises: for results that are detached by definition."""

    @staticmethod
    def forward(ctx: Any, message: str, anchor: Tensor, *outputs: Any) -> Any:
        ctx.message = message
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def refuse_gradient(op: str, faces: str, inputs: tuple, outputs: tuple) -> tuple:
    """Outputs as they are; where an input asks for a gradient, outputs that raise if one is taken
    through them. A forward-mode tangent raises at once."""
    message = f"{op}: no gradient flows through this op; the differentiable ones are {faces}"
    if forward_ad._current_level >= 0:
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise RuntimeError(message)
    anchor = next((t for t in inputs if isinstance(t, Tensor) and t.requires_grad), None)
    if anchor is None or not torch.is_grad_enabled():
        return outputs
    return _Refuse.apply(message, anchor, *outputs)
