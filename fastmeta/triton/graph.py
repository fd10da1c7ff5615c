"""Inner loops as CUDA graphs: all launches of K steps of T tasks are one replay.

A loop of the same shapes runs once as it is, which compiles its kernels, and is then captured over
tensors of its own; later calls copy their inputs in, replay, and copy the results out. On the CPU,
under Triton's interpreter, and inside a capture of the caller's, a loop simply runs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, March, Project, Rays

# Captured loops kept at a time; each holds its buffers.
KEPT = 4


class Graphs:
    """Captured loops by their shapes, the latest few."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Any, _Captured] = OrderedDict()

    def run(
        self, make: Any, c: Any, params: Tensor, batch: Batch, lr: Tensor, rule: Any, **options: Any
    ) -> Any:
        """``make(c, params, batch, lr, rule, **options).run()``: an ``Inner`` or a ``Meta``."""
        if not capturable(params):
            return make(c, params, batch, lr, rule, **options).run()
        key: Any = (make, c, _shape(params), _signature(batch), _rate_key(lr), rule)
        key = (*key, tuple(sorted(options.items())), params.device)
        captured = self.kept.pop(key, None)
        if captured is None:
            while len(self.kept) >= KEPT:
                self.kept.popitem(last=False)
            captured = _Captured(make, c, params, batch, lr, rule, options)
        self.kept[key] = captured
        return captured.run(params, batch, lr)


def capturable(tensor: Tensor) -> bool:
    """Whether launches on this tensor's device can be captured, and nobody captures already."""
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


class _Captured:
    def __init__(
        self, make: Any, c: Any, params: Tensor, batch: Batch, lr: Tensor, rule: Any, options: dict
    ) -> None:
        self.params, self.batch, self.lr = params.clone(), own(batch), _compact(lr).clone()
        self.loop = make(c, self.params, self.batch, self.lr.expand(lr.shape), rule, **options)
        self.graph: Any = None
        self.results: Any = None

    def run(self, params: Tensor, batch: Batch, lr: Tensor) -> Any:
        self.params.copy_(params)
        self.lr.copy_(_compact(lr))
        for mine, new in zip(leaves(self.batch), leaves(batch), strict=True):
            mine.copy_(new)
        for part in (self.batch, self.batch.query):
            if part is not None and isinstance(part.measure, Project):
                part.measure._pixels.clear()  # they belong to the angles before
        self.loop.refresh()
        if self.graph is None:
            results = self.loop.run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            copies = _copied(results)
            with torch.cuda.graph(self.graph):
                self.results = self.loop.run()
            return copies
        self.graph.replay()
        return _copied(self.results)


def _copied(results: Any) -> Any:
    return type(results)(*[None if a is None else a.clone() for a in results])


def _compact(lr: Tensor) -> Tensor:
    """A broadcast view without its repetitions."""
    for axis in range(lr.dim()):
        if lr.stride(axis) == 0:
            lr = lr.narrow(axis, 0, min(1, lr.shape[axis]))
    return lr


def leaves(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in a fixed order; the query's last."""
    found: list[Tensor] = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Rays):
            ends = [v for v in (value.near, value.far) if isinstance(v, Tensor)]
            found += [value.origins, value.directions, *ends]
        elif isinstance(value, Project):
            found.append(value.angles)
        elif isinstance(value, Batch):
            found += leaves(value)
    return found


def own(batch: Batch) -> Batch:
    """The same batch over tensors of its own."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    x, measure = batch.x, batch.measure
    if isinstance(x, Rays):
        x = Rays(copy(x.origins), copy(x.directions), copy(x.near), copy(x.far))
    return replace(
        batch,
        x=copy(x),
        y=copy(batch.y),
        measure=Project(copy(measure.angles)) if isinstance(measure, Project) else measure,
        seed=copy(batch.seed),
        counts=copy(batch.counts),
        query=None if batch.query is None else own(batch.query),
    )


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _rate_key(lr: Tensor) -> Any:
    return tuple(lr.shape), tuple(s == 0 for s in lr.stride())


def _signature(batch: Batch) -> Any:
    """What must be equal for a captured loop to serve another batch."""
    x, measure = batch.x, batch.measure
    where: Any = _shape(x)
    if isinstance(x, Rays):
        where = (_shape(x.origins), _shape(x.near), _shape(x.far))
    return (
        where,
        _shape(batch.y),
        batch.measure_name,
        measure.key if isinstance(measure, March) else None,
        _shape(measure.angles) if isinstance(measure, Project) else None,
        batch.loss,
        batch.per_step,
        batch.seed is not None,
        _shape(batch.counts),
        None if batch.query is None else _signature(batch.query),
    )
