"""Signals on a grid: where the samples of images, sound and volumes lie, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..batch import Batch
from ..spec import COORDS, MLP


def lattice(
    sizes: tuple[int, ...],
    coords: str = "unit",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[Πsizes,D]: where each sample of a grid lies, the first axis outermost.

    Along an axis of n samples, unit: ``i/n``; unit_xy: the same, last axis first; centers:
    ``(2i+1)/n − 1``; corners: ``2i/(n−1) − 1``, 0 where n = 1. Kept for the next call: not to be
    written to. Raises ValueError for "world" and for what is not in ``spec.COORDS``.
    """
    return _lattice(sizes, coords, torch.device(device), dtype)


@lru_cache(maxsize=32)
def _lattice(
    sizes: tuple[int, ...], coords: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if coords not in COORDS or coords == "world":
        what = "pixels" if len(sizes) == 2 else "samples"
        accepted = ", ".join(name for name in COORDS if name != "world")
        raise ValueError(f"grid: coords is {coords!r}; accepted for {what} are {accepted}")

    def axis(n: int) -> Tensor:
        i = torch.arange(n, dtype=torch.float64)
        if coords == "centers":
            return (2 * i + 1) / n - 1
        return (2 * i / (n - 1) - 1 if n > 1 else i) if coords == "corners" else i / n

    places = torch.meshgrid(*map(axis, sizes), indexing="ij")
    ordered = places[::-1] if coords == "unit_xy" else places
    return torch.stack(ordered, -1).reshape(-1, len(sizes)).to(device, dtype)


def grid_batch(
    kind: str, items: Sequence[Tensor], net: MLP, seeds: Tensor | None, per_step: int | None
) -> Batch:
    """Items [...,C] on one grid as a batch: x [N,D] shared, y [T,N,C]."""
    y = torch.stack(list(items))  # [T,...,C]
    sizes, C = tuple(y.shape[1:-1]), y.shape[-1]
    if (net.in_features, net.out_features) != (len(sizes), C):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"{kind}: {came}; accepted for these is {len(sizes)} to {C}")
    x = lattice(sizes, net.coords, y.device, y.dtype)  # [N,D]
    seed = None if per_step is None else seeds
    return Batch(x, y.flatten(1, -2), seed=seed, per_step=per_step)


def scored_whole(batch: Batch) -> Batch:
    """A batch that draws points, with all of them as its query."""
    if batch.per_step is None:
        return batch
    query = Batch(batch.x, batch.y)
    return Batch(batch.x, batch.y, seed=batch.seed, per_step=batch.per_step, query=query)
