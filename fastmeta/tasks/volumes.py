"""Volumes as tasks: ``f(z, y, x) = value``, densities or colours on a grid in three dimensions.

A task is one volume, resized, or one block of a larger one: ``x`` = where its voxels lie
[n³,3], ``y`` = their values [n³,C] in [0,1]. Images in one more dimension, as in Tancik et al.
2021, section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..ops.mlp import mlp
from ..spec import MLP
from .arrays import Stored, by_file, existing, kept, list_files, open_array, skipped
from .grids import grid_batch, lattice, scored_whole
from .sets import Shape, TaskSet, at_least, folders_or_split, not_counted, readable

COUNTED, METRIC, PLANAR = None, "psnr", False
_SOURCES = "accepted are npy, npz, an array [n,D,H,W] or [n,D,H,W,C], a folder of npy and npz"
_SLAB = 1 << 22  # voxels of the source held as float32 at a time while resizing: 16 MiB


@dataclass(frozen=True)
class Volumes:
    """Volumes on a grid, each a task; resized to a cube, or cut into blocks."""

    size: int = 32
    """voxels along each edge of a task"""
    blocks: bool = False
    """cut each volume into blocks of size³ voxels, each a task, instead of resizing it"""
    window: tuple[float, float] | None = None
    """values shown as 0 and 1, others clipped to them; without: 8 or 16 bits, floats in [0,1]"""
    channels: int = 1
    """values per voxel"""
    validation: float = 0.1
    """share of the volumes for validation (of the groups, where there is a pattern)"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part; without, the
    blocks of a volume do, if there are several volumes"""
    skip_bad: bool = False
    """leave out files that cannot be read, naming them, instead of stopping"""

    def __post_init__(self) -> None:
        at_least("volumes", self, 1, "size", "channels")
        if self.window is not None:
            low, high = self.window
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                accepted = "accepted are two finite numbers, low < high"
                raise ValueError(f"volumes: window is {self.window}; {accepted}")


# Sets


class _Part(NamedTuple):
    """One task: a volume of an array (or the array, None), and a corner where it is a block."""

    name: str
    stored: Stored
    volume: int | None
    corner: tuple[int, int, int] | None


def open_all(source: Any, options: Volumes) -> TaskSet:
    """Every volume of a source, or every block: items float32 [n,n,n,C] in [0,1].

    Args:
        source: a .npy (mapped, never read whole), a .npz ("volumes" or its only array of 3 to 5
            axes, with "names" if there), an array or a tensor: [n,D,H,W], [n,D,H,W,C], or one
            volume [D,H,W] ([D,H,W,C] where C > 1); or a folder of .npy and .npz at any depth, each
            one volume. A .npz is read whole, once; those of a folder whenever they are needed.

    Resized by averaging where voxels are lost, linearly where they are gained, along each axis.
    Blocks are named volume#z,y,x, counted in blocks; what is left at the far ends is not used.

    Raises:
        ValueError, OSError: nothing there, a wrong shape or dtype, pickled objects, a volume
            smaller than a block; on reading, values out of [0,1] without a window, NaN.
    """
    tasks = _open(source, options)
    return readable(tasks) if options.skip_bad else tasks


def _open(source: Any, options: Volumes) -> TaskSet:
    if isinstance(source, (np.ndarray, Tensor)):
        return _set(_volumes(open_array("volumes", source, "volumes", (3, 4, 5)), options), options)
    path = existing("volumes", source, _SOURCES)
    if path.is_dir():
        names = list_files("volumes", path, (".npy", ".npz"))
        return _set([p for name in names for p in _of_folder(path, name, options)], options)
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"volumes: {path} ends in {path.suffix!r}; {_SOURCES}")
    stored = open_array("volumes", path, "volumes", (3, 4, 5))
    stored = stored._replace(load=kept(stored.load))
    return _set(_volumes(stored, options, path.stem), options)


def open_splits(source: Any, options: Volumes, seed: int = 0) -> tuple[TaskSet, TaskSet, TaskSet]:
    """(train, validation, test): by folders of these names, or by ``split``.

    The blocks of a volume stay in one part unless there is a group, or no other volume.
    """
    tasks, group = open_all(source, options), options.group
    if group is None and options.blocks:
        group = by_file(tasks.names)
    shares = {"validation": options.validation, "test": options.test}
    return folders_or_split(tasks, seed=seed, group=group, **shares)


def _of_folder(root: Path, name: str, options: Volumes) -> list[_Part]:
    """One volume; none where it cannot be opened and skip_bad lets it go."""
    try:
        stored = open_array("volumes", root / name, "volumes", (3, 4))
        return _cut(_Part(name, stored, None, None), stored.shape, options)
    except (ValueError, OSError) as error:
        return skipped("volumes", error, options.skip_bad)


def _volumes(stored: Stored, options: Volumes, stem: str = "0") -> list[_Part]:
    """The volumes of an array [n,D,H,W(,C)], or of one [D,H,W(,C)]."""
    shape, C = stored.shape, options.channels
    one = len(shape) == 3 or (len(shape) == 4 and C > 1 and shape[3] == C)
    if one:
        return _cut(_Part(stem, stored, None, None), shape, options)
    names = stored.names or [str(i) for i in range(shape[0])]
    parts = [_Part(name, stored, i, None) for i, name in enumerate(names)]
    return [piece for part in parts for piece in _cut(part, shape[1:], options)]


def _cut(part: _Part, shape: tuple[int, ...], options: Volumes) -> list[_Part]:
    """The part itself, or its blocks; shape [D,H,W] or [D,H,W,C] and the dtype are checked."""
    C, dtype, n = (*shape, 1)[3], part.stored.dtype, options.size
    if options.channels != C:
        came = f"{part.stored.where} has {C} values per voxel, channels is {options.channels}"
        raise ValueError(f"volumes: {came}; both must agree")
    if options.window is None and dtype.kind not in "bf" and dtype not in (np.uint8, np.uint16):
        accepted = "accepted without a window (low, high) are uint8, uint16, bool and floats"
        raise ValueError(f"volumes: {part.stored.where} holds {dtype}; {accepted}")
    if not options.blocks:
        return [part]
    counts = [m // n for m in shape[:3]]
    if 0 in counts:
        came = f"{part.stored.where} has {' x '.join(map(str, shape[:3]))} voxels"
        raise ValueError(f"volumes: {came}; accepted is {n} and more along each axis, a block")
    corners = itertools.product(*map(range, counts))
    return [
        part._replace(name=f"{part.name}#{k},{j},{i}", corner=(k * n, j * n, i * n))
        for k, j, i in corners
    ]


def _set(parts: list[_Part], options: Volumes) -> TaskSet:
    if not parts:
        raise ValueError("volumes: no volume can be read; accepted is one or more")
    return TaskSet(lambda row: _read(parts[row], options), tuple(p.name for p in parts))


# Voxels


def _read(part: _Part, options: Volumes) -> Tensor:
    """float32 [n,n,n,C] in [0,1]."""
    volume, n, C = part.stored.load(), options.size, options.channels
    if part.volume is not None:
        volume = volume[part.volume]
    if part.corner is not None:
        volume = volume[tuple(slice(at, at + n) for at in part.corner)]
    D, H, W = volume.shape[:3]
    if volume.shape[:3] == (n, n, n):
        return torch.from_numpy(_unit(volume, part.name, options)).view(n, n, n, C)
    thick = max(1, _SLAB // (H * W * C))
    slabs = (_unit(volume[k : k + thick], part.name, options) for k in range(0, D, thick))
    planes = [torch.from_numpy(s).view(-1, H, W, C).permute(0, 3, 1, 2) for s in slabs]
    flat = torch.cat([_resized(p, n, n) for p in planes])  # [D,C,n,n]
    upright = flat.permute(1, 0, 2, 3).reshape(1, C, D, n * n)
    cube = _resized(upright, n, n * n).view(C, n, n, n)
    return cube.permute(1, 2, 3, 0).clamp(0, 1).contiguous()


def _resized(planes: Tensor, rows: int, columns: int) -> Tensor:
    """[d,C,h,w] -> [d,C,rows,columns]: a tent as wide as the larger of the two spacings."""
    size = (rows, columns)
    return torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)


def _unit(values: np.ndarray, name: str, options: Volumes) -> np.ndarray:
    """A new float32 array: ``clip((v − low) / (high − low), 0, 1)``; without a window uint8 / 255,
    uint16 / 65535, or as they are."""
    whole = {"u": float(np.iinfo(values.dtype).max)} if values.dtype.kind == "u" else {}
    low, high = options.window or (0.0, whole.get(values.dtype.kind, 1.0))
    wide = np.float64 if values.dtype.itemsize > 2 else np.float32  # large offsets keep their bits
    scaled = (np.asarray(values, wide) - wide(low)) / wide(high - low)
    if options.window is not None:
        if np.isnan(scaled).any():
            raise ValueError(f"volumes: {name} holds NaN; accepted are numbers")
        np.clip(scaled, 0, 1, out=scaled)
    elif not (scaled.min() >= 0 and scaled.max() <= 1):  # or NaN
        came = f"{name} has values from {values.min():g} to {values.max():g}"
        raise ValueError(f"volumes: {came}; accepted without a window are floats in [0,1]")
    return scaled.astype(np.float32, order="C", copy=False)


# Tasks


def shape(options: Volumes) -> Shape:
    """Three coordinates of the unit cube, C values in [0,1]."""
    return Shape(3, options.channels, "unit", True)


def learn(
    items: Sequence[Tensor], options: Volumes, net: MLP, seeds: Tensor, per_step: int | None
) -> Batch:
    """Volumes [n,n,n,C] as a batch: ``x`` = (i/n, j/n, k/n) [n³,3], shared, the first axis
    outermost, ``y`` = values [T,n³,C]; in another convention where net.coords says so."""
    return grid_batch("volumes", items, net, seeds, per_step)


def observe(
    items: Sequence[Tensor],
    options: Volumes,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """The same, scored as a whole."""
    not_counted("volumes", count)
    return scored_whole(grid_batch("volumes", items, net, seeds, per_step))


def truth(item: Tensor, options: Volumes) -> Tensor:
    """The middle slices across the first, second and third axis, side by side: [n,3n,C] of
    [n,n,n,C]; C = 1 or 3, of other numbers of channels the first alone."""
    k, j, i = (n // 2 for n in item.shape[:3])
    slices = torch.cat([item[k], item[:, j], item[:, :, i]], 1)
    return slices if slices.shape[2] in (1, 3) else slices[..., :1]


def picture(net: MLP, params: Tensor, item: Tensor, options: Volumes, **how: Any) -> Tensor:
    """The same slices of a fitted network [P]; not clipped."""
    n = item.shape[0]
    x = lattice((n, n, n), net.coords).view(n, n, n, 3)
    k = n // 2
    x = torch.cat([x[k], x[:, k], x[:, :, k]], 1).to(params)  # [n,3n,3]
    y = mlp(net, params, x.flatten(0, 1), **how).view(n, 3 * n, -1)
    return y if y.shape[2] in (1, 3) else y[..., :1]
