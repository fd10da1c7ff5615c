"""Signed distance fields as tasks: options, samples, batches, and what a fitted network shows.

``fields.py`` reads and computes the fields, ``surface.py`` draws them.

A task is ``f(x) ≈ d(x)``: ``x`` = points of the box [-1,1]^D [N,D], ``y`` = the distance to a curve
(D = 2) or a surface (D = 3) [N,1], below 0 inside, in units of the box. Data lie on a grid of cell
centres ``(2i+1)/n − 1``, first axis first: (row, column) of an image, (x, y, z) of a volume, z up
in pictures; between centres they are interpolated linearly.

Where the distances of a source are clipped (at 0.25, say), those beyond say nothing but the sign:
take loss "l1" with ``clamp`` at or below that. A clamped loss has no slope where the network lies
beyond the clamp: a random start may then stand still, a learned one has come from there.

Source: Sitzmann et al. 2020 (MetaSDF); Park et al. 2019 (DeepSDF: samples near the surface, clamp).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..batch import Batch
from ..spec import MLP
from .fields import Field, open_fields
from .grids import lattice
from .sets import Shape, TaskSet, at_least, by_part, fill, folders_or_split, not_counted, readable
from .surface import PIXELS, VIEW, View, contours, distances, shaded, shaded_grid

COUNTED, METRIC, PLANAR = None, "mae", False

_SCORED = (8192, 0.5, 0.05, -1)  # what a 3-D field is scored on: count, near, sigma, seed


@dataclass(frozen=True)
class SDF:
    """Signed distance fields, each a task: of drawings, of volumes, of meshes."""

    dimensions: Literal[2, 3] = 3
    """2: curves, from images; 3: surfaces, from grids and meshes"""
    size: int | None = None
    """height and width that images are resized to; none: as they are"""
    ink: Literal["dark", "light"] = "dark"
    """what is inside in an image: the pixels below 0.5, or those above"""
    points: int = 4096
    """samples of a task, from which the steps draw (MetaSDF: 24000)"""
    near: float = 0.5
    """share of them near the surface; the rest is uniform in the box"""
    sigma: float = 0.05
    """standard deviation of those about the surface, the box being 2 wide"""
    loss: Literal["mse", "l1"] = "mse"
    """of the distances"""
    clamp: float | None = None
    """with l1: distances beyond this count as this (DeepSDF: 0.1)"""
    margin: float = 0.1
    """a mesh is scaled to leave this much of the box free on either side of its longest axis"""
    resolution: int = 64
    """cells along each axis of the grid that a mesh is sampled on"""
    validation: float = 0.1
    """share of the fields for validation (of the groups, where there is a pattern)"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part"""
    skip_bad: bool = False
    """leave out fields that cannot be read, naming them, instead of stopping"""

    def __post_init__(self) -> None:
        at_least("sdf", self, 1, "points", "size")
        at_least("sdf", self, 8, "resolution")
        accepted = {"dimensions": (2, 3), "ink": ("dark", "light"), "loss": ("mse", "l1")}
        for name, values in accepted.items():
            came, listed = getattr(self, name), " and ".join(map(str, values))
            if came not in values:
                raise ValueError(f"sdf: {name} is {came!r}; accepted are {listed}")
        if not 0 <= self.near <= 1:
            raise ValueError(f"sdf: near is {self.near}; accepted is a share in [0,1]")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sdf: sigma is {self.sigma}; accepted is a finite number >= 0")
        if not 0 <= self.margin < 1:
            raise ValueError(f"sdf: margin is {self.margin}; accepted is a number in [0,1)")
        if self.clamp is not None and not (self.loss == "l1" and 0 < self.clamp < math.inf):
            came = f"clamp is {self.clamp} with loss {self.loss}"
            raise ValueError(f"sdf: {came}; accepted is a finite number above 0, with loss l1")


# Sources


def open_splits(source: Any, options: SDF, seed: int = 0) -> tuple[TaskSet, TaskSet, TaskSet]:
    """(train, validation, test): by an .npz's own n_train and n_val, else by folders, else by a
    hash of the names (``sets.folders_or_split``).

    Where n_train and n_val are given, the n_val fields are the test part; validation is split off
    from the others by its share.

    Raises:
        ValueError, OSError: as ``open_all`` and ``sets.split``.
    """
    tasks, given = open_fields(source, options)
    how: dict[str, Any] = {key: getattr(options, key) for key in ("validation", "test", "group")}
    if given is None:
        return folders_or_split(_usable(tasks, options), **how, seed=seed)
    own = by_part(tasks, [0] * given + [2] * (len(tasks) - given))
    train, validation, test = (_usable(part, options) for part in own)
    return fill(train, validation, test, **how, seed=seed)


def open_all(source: Any, options: SDF) -> TaskSet:
    """Every field of a source, read when it is asked for; ``set[i]`` is a ``Field``.

    Args:
        source: in two dimensions images (as ``files.open_images``), a npz of packed drawings
            ("bits" [n,⌈HW/8⌉] and "shape" (n, H, W), 1 is inside, "char" for names); in three a
            folder of meshes or one of them (through trimesh); in both a npz with distances ("sdf"
            [n,...], or "sdf_i8" times "scale"; "names", "n_train", "n_val" if there), a folder of
            .npy grids, an array. Of arrays and .npy files, floats are distances, the rest images.

    Raises:
        ValueError, OSError: nothing there, a wrong shape, pickled objects; on reading, what
            ``Field`` refuses. ImportError: a mesh, and trimesh is absent.
    """
    return _usable(open_fields(source, options)[0], options)


def _usable(tasks: TaskSet, options: SDF) -> TaskSet:
    return readable(tasks) if options.skip_bad else tasks


# Tasks


def shape(options: SDF) -> Shape:
    """D coordinates of the box [-1,1]^D, one distance of any size."""
    return Shape(options.dimensions, 1, "world", False)


def sample(field: Field, count: int, near: float, sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points of a field and their distances: x [count,D] in [-1,1]^D, y [count,1].

    The first ``round(near · count)``: a cell of ``field.surface``, a place in it, plus
    ``σ N(0,1)`` along each axis (Box-Muller), held to the box; the others uniform in the box.
    A function of (field, count, near, sigma, seed). Its draws are those of steps −3, −2 and −1:
    what is drawn at an inner step is not among them.
    """
    key = torch.tensor([seed])
    D, shape = field.dimensions, torch.tensor(field.values.shape)
    close = round(near * count)
    parts = []
    if close:
        cells = field.surface
        chosen = rng.integers(key, close, len(cells), -3, rng.SURFACE)[0]
        place, a, b = rng.uniform(key, close * D * 3, -2, rng.SURFACE).view(3, close, D)
        normal = (-2 * torch.log1p(-a)).sqrt() * torch.cos(2 * math.pi * b)
        parts.append((cells[chosen] + (2 * place - 1) / shape + sigma * normal).clamp(-1, 1))
    if close < count:
        far = rng.uniform(key, (count - close) * D, -1, rng.SURFACE)
        parts.append(2 * far.view(-1, D) - 1)
    x = torch.cat(parts)
    return x, field.at(x)[:, None]


def learn(
    items: Sequence[Field], options: SDF, net: MLP, seeds: Tensor, per_step: int | None
) -> Batch:
    """``options.points`` samples of each field, drawn by its seed; ``per_step`` of them at a step.

    The batch always carries the seeds, so that an eikonal term may draw points of its own.
    """
    return _batch(items, options, net, seeds, per_step, None)


def observe(
    items: Sequence[Field],
    options: SDF,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """The same, with what is scored as the query: in 2-D every cell of the grid (of one shape), in
    3-D 8192 points, half of them near the surface (σ = 0.05), the same whatever the seeds.

    The query's loss is the metric: L1, clamped where the options' is.
    """
    not_counted("sdf", count)
    metric = "l1" if options.clamp is None else ("l1", options.clamp)
    if options.dimensions == 3:
        x, y = _samples(items, *_SCORED[:3], torch.full_like(seeds, _SCORED[3]))
        return _batch(items, options, net, seeds, per_step, Batch(x, y, loss=metric))
    shapes = sorted({tuple(f.values.shape) for f in items})
    if len(shapes) > 1:
        came = f"a batch has grids of {shapes[0]} and {shapes[1]}"
        raise ValueError(f"sdf: {came}; accepted is one shape, as option size gives images")
    x, y = lattice(shapes[0], "centers"), torch.stack([f.values.reshape(-1, 1) for f in items])
    return _batch(items, options, net, seeds, per_step, Batch(x, y, loss=metric))


def _batch(
    items: Sequence[Field],
    options: SDF,
    net: MLP,
    seeds: Tensor,
    per_step: int | None,
    query: Batch | None,
) -> Batch:
    if (net.in_features, net.out_features) != (options.dimensions, 1):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"sdf: {came}; accepted is {options.dimensions} to 1")
    x, y = _samples(items, options.points, options.near, options.sigma, seeds)
    loss = options.loss if options.clamp is None else (options.loss, options.clamp)
    return Batch(x, y, loss=loss, per_step=per_step, seed=seeds, query=query)


def _samples(
    items: Sequence[Field], count: int, near: float, sigma: float, seeds: Tensor
) -> tuple[Tensor, Tensor]:
    """``sample`` of each field: x [T,N,D], y [T,N,1]."""
    keys = seeds.tolist()
    pairs = [sample(f, count, near, sigma, key) for f, key in zip(items, keys, strict=True)]
    x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
    return x, y


# What a field looks like


def picture(
    net: MLP,
    params: Tensor,
    item: Field,
    options: SDF,
    *,
    view: View = VIEW,
    size: int = PIXELS,
    **how: Any,
) -> Tensor:
    """A fitted network [P] as an image in [0,1]: 2-D its ``contours`` on the item's grid [H,W,3],
    3-D its surface, ``shaded``."""
    if item.dimensions == 3:
        return shaded(net, params, view, size, **how)
    x = lattice(tuple(item.values.shape), "centers").to(params)
    return contours(distances(net, params, x, **how).view(item.values.shape))


def truth(item: Field, options: SDF, *, view: View = VIEW, size: int = PIXELS) -> Tensor:
    """The field itself, in the same way."""
    return shaded_grid(item, view, size) if item.dimensions == 3 else contours(item.values)
