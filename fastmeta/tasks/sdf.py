"""Signed distance fields as tasks: sources, samples, and what a fitted network shows.

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
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..batch import Batch
from ..ops.mlp import mlp
from ..spec import MLP
from .files import _DAMAGE, _line, _npy_head, open_images
from .images import grid
from .sets import Shape, TaskSet, at_least, by_part, fill, folders_or_split, not_counted

COUNTED, METRIC, PLANAR = None, "mae", False

MESHES = (".obj", ".ply", ".stl", ".off", ".glb")
_SOURCES = (
    "accepted are images (a folder, npz, npy), an npz with sdf, sdf_i8 or bits, a folder of npy "
    f"grids, meshes ({' '.join(MESHES)}), and an array [n,H,W] or [n,D,H,W]"
)
_HELD = 1 << 30  # bytes of fields kept for the next time

_SCORED = (8192, 0.5, 0.05, -1)  # what a 3-D field is scored on: count, near, sigma, seed

View = tuple[float, float] | Tensor
VIEW = (0.9, 0.4)  # azimuth, elevation in radians
PIXELS = 128


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


@dataclass(frozen=True, eq=False)
class Field:
    """Distances at the cell centres of [-1,1]^D, below 0 inside.

    Args:
        values: float32 [H,W] or [D,H,W], at least 2 cells along each axis, of either sign.
        name: for messages.

    Raises:
        ValueError: another dtype or shape, NaN or infinity, no surface.
    """

    values: Tensor
    name: str = "field"

    def __post_init__(self) -> None:
        v = self.values
        if v.dtype != torch.float32 or v.dim() not in (2, 3) or min(v.shape) < 2:
            came = f"{self.name} is {v.dtype} {tuple(v.shape)}"
            raise ValueError(f"sdf: {came}; accepted is float32 [H,W] or [D,H,W], each >= 2")
        low, high = (float(x) for x in v.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"sdf: {self.name} holds NaN or infinity; accepted are finite numbers")
        if not low < 0 <= high:
            came = f"{self.name} goes from {low:g} to {high:g}"
            raise ValueError(f"sdf: {came}, so it has no surface; accepted are both signs")

    @property
    def dimensions(self) -> int:
        """D."""
        return self.values.dim()

    @cached_property
    def surface(self) -> Tensor:
        """[M,D] float32: centres of the cells that have a neighbour of the other sign."""
        inside = self.values < 0
        touching = torch.zeros_like(inside)
        for axis, n in enumerate(inside.shape):
            change = inside.narrow(axis, 1, n - 1) ^ inside.narrow(axis, 0, n - 1)
            touching.narrow(axis, 1, n - 1).logical_or_(change)
            touching.narrow(axis, 0, n - 1).logical_or_(change)
        return (2 * touching.nonzero() + 1) / torch.tensor(inside.shape) - 1

    def at(self, x: Tensor) -> Tensor:
        """Linear interpolation between cell centres at x [N,D], the border's value beyond: [N]."""
        values = self.values.to(x)
        where = x.flip(-1).view(1, -1, *[1] * (self.dimensions - 1), self.dimensions)
        found = torch.nn.functional.grid_sample(
            values[None, None], where, "bilinear", "border", align_corners=False
        )
        return found.flatten()


# Sources


def open_splits(source: Any, options: SDF, seed: int = 0) -> tuple[TaskSet, TaskSet, TaskSet]:
    """(train, validation, test): by an .npz's own n_train and n_val, else by folders, else by a
    hash of the names (``sets.folders_or_split``).

    Where n_train and n_val are given, the n_val fields are the test part; validation is split off
    from the others by its share.

    Raises:
        ValueError, OSError: as ``open_all`` and ``sets.split``.
    """
    tasks, given = _open(source, options)
    how: dict[str, Any] = {key: getattr(options, key) for key in ("validation", "test", "group")}
    if given is None:
        return folders_or_split(tasks, **how, seed=seed)
    own = by_part(tasks, [0] * given + [2] * (len(tasks) - given))
    return fill(*own, **how, seed=seed)


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
    return _open(source, options)[0]


def _open(source: Any, options: SDF) -> tuple[TaskSet, int | None]:
    """(all fields, how many of them are for training or None)."""
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_array("the array", source, options), None
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"sdf: source is a {type(source).__name__}; {_SOURCES}")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"sdf: {path} does not exist; {_SOURCES}")
    if path.is_dir():
        for endings, read in ((MESHES, mesh_field), ((".npy",), _read_npy)):
            names = _list(path, endings)
            if names:
                return _from_files(path, names, read, options), None
    elif path.suffix.lower() in MESHES:
        return _from_files(path.parent, [path.name], mesh_field, options), None
    elif path.suffix.lower() == ".npz":
        return _from_npz(path, options)
    elif path.suffix.lower() == ".npy":
        return _from_array(str(path), _load_npy(path), options), None
    return _from_images(path, options), None


def _list(root: Path, endings: tuple[str, ...]) -> list[str]:
    """Files below a folder, by relative path, sorted; hidden ones left out."""
    found = (p.relative_to(root) for p in root.rglob("*") if p.suffix.lower() in endings)
    return sorted(p.as_posix() for p in found if not any(part[0] == "." for part in p.parts))


def _set(names: Sequence[str], options: SDF, read: Callable[[int], np.ndarray]) -> TaskSet:
    """Fields by row, checked; the first that fit into ``_HELD`` bytes are kept."""
    held: dict[int, Field] = {}

    def get(row: int) -> Field:
        field = held.get(row)
        if field is None:
            values = np.array(read(row), dtype=np.float32, order="C")
            _same_dimensions(names[row], values.ndim, options)
            field = Field(torch.from_numpy(values), names[row])
            if (len(held) + 1) * values.nbytes <= _HELD:
                held[row] = field
        return field

    return TaskSet(get, tuple(names))


def _same_dimensions(where: str, found: int, options: SDF) -> None:
    if found != options.dimensions:
        came = f"{where} has {found} dimensions, option dimensions is {options.dimensions}"
        raise ValueError(f"sdf: {came}; both must agree")


def _from_files(
    root: Path, names: list[str], read: Callable[[Path, SDF], np.ndarray], options: SDF
) -> TaskSet:
    if read is mesh_field:
        _same_dimensions("a source of meshes", 3, options)
    return _set(names, options, lambda row: read(root / names[row], options))


def _from_images(
    source: Any, options: SDF, *, dark: bool | None = None, names: Sequence[str] | None = None
) -> TaskSet:
    _same_dimensions("a source of images", 2, options)
    images = open_images(source, size=options.size, channels=1)
    below = options.ink == "dark" if dark is None else dark

    names = images.names if names is None else names

    def read(row: int) -> np.ndarray:
        pixels = images[row][..., 0].numpy()  # [H,W]
        inside = pixels < 0.5 if below else pixels >= 0.5
        if inside.all() or not inside.any():
            came = f"{names[row]} has every pixel {'inside' if inside.all() else 'outside'}"
            raise ValueError(f"sdf: {came} at the threshold of 0.5; accepted are some of each")
        return signed_distance(inside)

    return _set(names, options, read)


def signed_distance(inside: np.ndarray) -> np.ndarray:
    """Exact Euclidean distance of every pixel's centre to the border of a region, [H,W] float32,
    below 0 inside, the image being the box [-1,1]².

    The border is made of the edges between pixels inside and outside, half-way between centres; the
    image's own frame is none, so where all pixels are alike the distance is infinite.

    Args:
        inside: [H,W] bool.

    From a centre the nearest point of a pixel's edge is its middle or an end. On a lattice of half
    pixels both are nodes, so the transform there is exact.
    """
    from scipy.ndimage import (  # type: ignore[import-untyped,unused-ignore]
        distance_transform_edt,
    )

    H, W = inside.shape
    free = np.ones((2 * H + 1, 2 * W + 1), bool)
    i, j = np.nonzero(inside[1:] != inside[:-1])  # an edge below pixel (i, j)
    for k in range(3):
        free[2 * i + 2, 2 * j + k] = False
    i, j = np.nonzero(inside[:, 1:] != inside[:, :-1])  # an edge right of it
    for k in range(3):
        free[2 * i + k, 2 * j + 2] = False
    if free.all():
        return np.where(inside, -np.inf, np.inf).astype(np.float32)
    distance = distance_transform_edt(free, sampling=(1 / H, 1 / W))[1::2, 1::2]
    return np.where(inside, -distance, distance).astype(np.float32)


def _from_array(where: str, array: np.ndarray, options: SDF) -> TaskSet:
    if array.dtype.kind != "f":
        return _from_images(array, options)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(f"sdf: {where} has shape {array.shape}; accepted are [n,H,W], [n,D,H,W]")
    _same_dimensions(where, array.ndim - 1, options)
    return _set([str(i) for i in range(len(array))], options, lambda row: array[row])


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"sdf: {path} is no readable .npy ({_line(error)})") from error


def _read_npy(path: Path, options: SDF) -> np.ndarray:
    values = _load_npy(path)
    if values.dtype.kind != "f":
        raise ValueError(f"sdf: {path} holds {values.dtype}; accepted in a folder are floats")
    return values


def _from_npz(path: Path, options: SDF) -> tuple[TaskSet, int | None]:
    arrays = _load_npz(path)
    if "bits" in arrays:
        return _from_bits(path, arrays, options), None
    if "sdf" not in arrays and "sdf_i8" not in arrays:
        return _from_images(path, options), None
    values = arrays["sdf" if "sdf" in arrays else "sdf_i8"]
    scale = 1.0 if "sdf" in arrays else arrays.get("scale")
    if values.ndim not in (3, 4) or 0 in values.shape or values.dtype.kind not in "fi":
        came = f"{values.dtype} {values.shape}"
        raise ValueError(f"sdf: {path} holds {came}; accepted are [n,H,W] and [n,D,H,W]")
    if scale is None or np.shape(scale) != () or not 0 < float(scale) < math.inf:
        raise ValueError(f"sdf: scale in {path} is {scale}; accepted with sdf_i8 is a number > 0")
    _same_dimensions(str(path), values.ndim - 1, options)
    n = len(values)
    given, rest = (arrays.get(key) for key in ("n_train", "n_val"))
    if given is not None and rest is not None and not 0 < int(given) == n - int(rest):
        came = f"n_train is {given} and n_val {rest} of {n} fields"
        raise ValueError(f"sdf: {path}: {came}; accepted are two numbers that add up")
    factor = np.float32(scale)
    tasks = _set(_names(path, arrays.get("names"), n), options, lambda row: values[row] * factor)
    return tasks, None if given is None or rest is None else int(given)


def _names(path: Path, names: np.ndarray | None, count: int) -> list[str]:
    if names is None:
        return [str(i) for i in range(count)]
    if names.shape != (count,) or names.dtype.kind not in "US":
        came = f"names in {path} is {names.dtype} {names.shape}"
        raise ValueError(f"sdf: {came}; accepted are {count} strings")
    return names.astype(str).tolist()


def _from_bits(path: Path, arrays: dict[str, np.ndarray], options: SDF) -> TaskSet:
    """Packed drawings: names are "character/number", the number within the character."""
    bits, shape = arrays["bits"], arrays.get("shape", np.zeros(0)).tolist()
    n, h, w = shape if len(shape) == 3 else (0, 0, 0)
    if n < 1 or bits.dtype != np.uint8 or bits.shape != (n, (h * w + 7) // 8):
        came = f"bits {bits.dtype} {bits.shape} and shape {shape}"
        raise ValueError(f"sdf: {path} holds {came}; accepted are uint8 [n,⌈HW/8⌉] and (n, H, W)")
    drawings = np.unpackbits(bits, axis=1, count=h * w).reshape(n, h, w).astype(bool)
    labels = _names(path, arrays.get("char"), n)
    seen: dict[str, int] = {}
    names = []
    for label in labels:
        names.append(f"{label}/{seen.get(label, 0)}" if "char" in arrays else label)
        seen[label] = seen.get(label, 0) + 1
    return _from_images(drawings, options, dark=False, names=names)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """What a npz holds of what is looked for, refused from its headers where it is pickled."""
    wanted = ("sdf", "sdf_i8", "scale", "names", "n_train", "n_val", "bits", "shape", "char")
    try:
        with zipfile.ZipFile(path) as file:
            there = [key for key in wanted if f"{key}.npy" in file.namelist()]
            pickled = [key for key in there if _npy_head(file, f"{key}.npy")[1].hasobject]
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in there if not pickled}
    except _DAMAGE as error:
        raise ValueError(f"sdf: {path} is no readable .npz ({_line(error)})") from error
    if pickled:
        raise ValueError(f"sdf: {pickled[0]} in {path} is pickled; accepted are plain arrays")
    return found


def mesh_field(path: Path, options: SDF) -> np.ndarray:
    """Distance to a mesh at the cell centres of a cube, [n,n,n] float32, below 0 inside.

    The mesh's bounding box is centred, and scaled so that its longest axis fills the box but for
    ``margin`` on either side. Within three cells of the surface distances are exact; beyond, to
    vertices no further apart than a cell h: too large by h²/(6d) at most. Inside and outside come
    from ray tests in the cells that the surface may cut, and spread from cell to cell elsewhere:
    two centres, h apart and both more than h/2 from the surface, are on one side of it.

    Raises:
        ImportError: trimesh, or the rtree it needs, is absent. ValueError: no triangles. Warns
            where the mesh is not watertight after its holes were filled: signs may be wrong.
    """
    try:
        import rtree  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
        import trimesh  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        what = f"sdf: {path.name} is a mesh, which needs {error.name}"
        raise ImportError(f"{what}: pip install trimesh rtree") from error
    from scipy.ndimage import label  # type: ignore[import-untyped,unused-ignore]
    from scipy.spatial import cKDTree  # type: ignore[import-untyped,unused-ignore]

    mesh = _load_mesh(trimesh, path, options.margin)
    n = options.resolution
    axis, h = (2 * np.arange(n) + 1) / n - 1, 2 / n
    centres = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    fine, _ = trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, h, max_iter=32)
    distance = cKDTree(fine).query(centres)[0]
    for at in _chunks(np.flatnonzero(distance < 4 * h)):  # a cell more than said: over-estimates
        distance[at] = trimesh.proximity.closest_point(mesh, centres[at])[1]

    cut = distance <= 0.5001 * h
    rooms, count = label(~cut.reshape(n, n, n))
    rooms = rooms.reshape(-1)
    inside = np.zeros(n**3, bool)
    for at in _chunks(np.flatnonzero(cut)):
        inside[at] = mesh.contains(centres[at])
    if count:  # one cell of each room, the furthest from the surface, answers for it
        order = np.argsort(distance)
        deepest = np.zeros(count + 1, np.int64)
        deepest[rooms[order]] = order
        answers = np.concatenate([mesh.contains(centres[at]) for at in _chunks(deepest[1:])])
        inside[~cut] = answers[rooms[~cut] - 1]
    return np.where(inside, -distance, distance).reshape(n, n, n).astype(np.float32)


def _chunks(indices: np.ndarray) -> list[np.ndarray]:
    """So many at a time: trimesh holds a candidate list per point."""
    return [indices[at : at + 2048] for at in range(0, len(indices), 2048)]


def _load_mesh(trimesh: Any, path: Path, margin: float) -> Any:
    """A mesh centred and scaled into the box."""
    try:
        mesh = trimesh.load_mesh(str(path))
    except Exception as error:  # a reader for each format, each with its own errors
        what = f"sdf: {path.name} cannot be read (trimesh: {_line(error)})"
        raise ValueError(f"{what}; accepted are {' '.join(MESHES)}") from error
    if not len(getattr(mesh, "faces", ())) or not float(mesh.extents.max()) > 0:
        raise ValueError(f"sdf: {path.name} holds no triangles; accepted is a mesh of a solid")
    if not mesh.is_watertight:
        mesh.fill_holes()
    if not mesh.is_watertight:
        what = f"sdf: {path.name} is not watertight; what is inside was settled by rays"
        warnings.warn(f"{what} and may be wrong", stacklevel=2)
    mesh.apply_translation(-mesh.bounds.mean(0))
    mesh.apply_scale((1 - margin) * 2 / mesh.extents.max())
    return mesh


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
    x, y = _centres(shapes[0]), torch.stack([f.values.reshape(-1, 1) for f in items])
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


def _centres(shape: Sequence[int]) -> Tensor:
    """[N,D] float32: the cell centres of a grid, the last axis fastest."""
    if len(shape) == 2:
        return grid(shape[0], shape[1], "centers")
    axes = [(2 * torch.arange(n) + 1) / n - 1 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))


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
    x = _centres(item.values.shape).to(params)
    return contours(_values(net, params, x, **how).view(item.values.shape))


def truth(item: Field, options: SDF, *, view: View = VIEW, size: int = PIXELS) -> Tensor:
    """The field itself, in the same way."""
    return shaded_grid(item, view, size) if item.dimensions == 3 else contours(item.values)


def contours(values: Tensor) -> Tensor:
    """Distances [H,W] as colours [H,W,3]: blue inside, sand outside, darker towards the curve,
    a darker line every 0.1 and a white one at 0."""
    far = values.abs()[..., None]
    ground = values.new_tensor([0.95, 0.75, 0.45]), values.new_tensor([0.40, 0.65, 0.95])
    colour = torch.where(values[..., None] < 0, ground[1], ground[0])
    colour = (
        colour * (1 - 0.6 * torch.exp(-8 * far)) * (0.85 + 0.15 * torch.cos(far * 20 * torch.pi))
    )
    line = (1 - far * min(values.shape) / 2).clamp(0, 1)  # a pixel on either side
    return colour + (1 - colour) * line


def shaded(net: MLP, params: Tensor, view: View = VIEW, size: int = PIXELS, **how: Any) -> Tensor:
    """A picture [size,size,3] of the surface where the network [P] is 0, on white.

    Args:
        view: (azimuth, elevation) in radians, z up; or a pose [4,4], camera to world, as OpenGL's.
        how: impl, precision, as in ``mlp``.
    """
    params = params.detach()
    return _render(lambda x: mlp(net, params, x, **how)[..., 0], view, size, params)


def shaded_grid(field: Field, view: View = VIEW, size: int = PIXELS) -> Tensor:
    """The same picture of a field's own surface."""
    return _render(field.at, view, size, field.values)


def look(azimuth: float, elevation: float, radius: float = 3.2) -> Tensor:
    """[4,4] float64 camera to world (right, up, back, eye), looking at the origin, z up."""
    ca, sa, ce, se = (f(v) for v in (azimuth, elevation) for f in (math.cos, math.sin))
    back = torch.tensor([ce * ca, ce * sa, se], dtype=torch.float64)
    right = torch.tensor([-sa, ca, 0.0], dtype=torch.float64)
    up = torch.linalg.cross(back, right)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.stack([right, up, back, radius * back], 1)
    return pose


def _render(f: Callable[[Tensor], Tensor], view: View, size: int, like: Tensor) -> Tensor:
    """Lambert and ambient light on what ``trace`` finds, rays spreading 0.42 to either side."""
    pose = (view if isinstance(view, Tensor) else look(*view)).to(like)
    if tuple(pose.shape) != (4, 4):
        raise ValueError(f"sdf: view has shape {tuple(pose.shape)}; accepted are two angles, [4,4]")
    across = 0.42 * ((2 * torch.arange(size).to(like) + 1) / size - 1)
    v, u = torch.meshgrid(-across, across, indexing="ij")
    directions = torch.stack([u, v, -torch.ones_like(u)], -1).view(-1, 3) @ pose[:3, :3].mT
    directions = directions / directions.norm(dim=-1, keepdim=True)
    origins = pose[:3, 3].expand_as(directions)
    t, hit = trace(f, origins, directions)
    image = like.new_ones(size * size, 3)
    if bool(hit.any()):
        x = (origins + t[:, None] * directions)[hit]
        light = torch.nn.functional.normalize(
            pose[:3, :3] @ like.new_tensor([-0.5, 0.7, 1.0]), dim=0
        )
        lambert = (_normals(f, x) @ light).clamp(min=0)[:, None]
        image[hit] = like.new_tensor([0.62, 0.70, 0.82]) * (0.3 + 0.9 * lambert)
    return image.clamp(max=1).view(size, size, 3)


def _normals(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``∇f / ‖∇f‖`` [N,3]; 0 where ∇f is."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
    return torch.nn.functional.normalize(gradient, dim=-1)


@torch.no_grad()
def trace(
    f: Callable[[Tensor], Tensor], origins: Tensor, directions: Tensor, *, bound: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Where rays first see f < 0 within [-bound,bound]³: (t [R], whether they do [R]).

    Steps of 0.8 f, at least 0.01 and at most 0.1 of the bound, so that a field which is no true
    distance is crossed all the same; the crossing is then halved 16 times. A part thinner than a
    hundredth of the bound may be missed.

    Args:
        f: x [N,3] -> [N].
        origins, directions: [R,3], directions of length 1.
    """
    slabs = ((s * bound - origins) / directions for s in (-1, 1))  # ±inf along an axis is right
    a, b = (torch.where(s.isnan(), 0, s) for s in slabs)
    near = torch.minimum(a, b).amax(-1).clamp(min=0)
    far = torch.maximum(a, b).amin(-1)
    before, t, hit = near.clone(), near.clone(), torch.zeros_like(near, dtype=torch.bool)
    alive = (near < far).nonzero()[:, 0]
    while len(alive):
        distance = f(origins[alive] + t[alive, None] * directions[alive])
        inside = distance < 0
        hit[alive[inside]] = True
        alive, distance = alive[~inside], distance[~inside]
        alive, distance = (q[t[alive] < far[alive]] for q in (alive, distance))
        before[alive] = t[alive]
        step = (0.8 * distance).clamp(0.01 * bound, 0.1 * bound)
        t[alive] = torch.minimum(t[alive] + step, far[alive])
    low, high, o, d = before[hit], t[hit], origins[hit], directions[hit]
    for _ in range(16 if len(low) else 0):
        middle = (low + high) / 2
        inside = f(o + middle[:, None] * d) < 0
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    t[hit] = high
    return t, hit


# Results


@torch.no_grad()
def _values(net: MLP, params: Tensor, x: Tensor, **how: Any) -> Tensor:
    """The network [P] at x [N,D], 65536 points at a time: [N]."""
    return torch.cat([mlp(net, params, part, **how)[..., 0] for part in x.split(1 << 16)])


def mesh(
    net: MLP, params: Tensor, resolution: int = 128, bound: float = 1.0, **how: Any
) -> tuple[Tensor, Tensor]:
    """The surface where a network [P] is 0, by marching cubes: (vertices [V,3] float32 in the
    network's coordinates, faces [F,3] int64, their normals outward).

    Args:
        resolution: samples along each axis of [-bound,bound]³, end points included, at least 2.
        how: impl, precision, as in ``mlp``.

    Raises:
        ValueError: a network of other features, a number out of range, no surface in the box.

    Source: Lewiner et al. 2003, through scikit-image.
    """
    from skimage.measure import marching_cubes

    if (net.in_features, net.out_features) != (3, 1):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"mesh: {came}; accepted is 3 to 1")
    if resolution < 2 or not 0 < bound < math.inf:
        came = f"resolution is {resolution}, bound {bound}"
        raise ValueError(f"mesh: {came}; accepted are resolution >= 2 and bound > 0")
    axis = torch.linspace(-bound, bound, resolution, dtype=params.dtype, device=params.device)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    values = _values(net, params, x, **how).view(resolution, resolution, resolution)
    low, high = (float(v) for v in values.aminmax())
    if not low < 0 < high:
        came = f"the network goes from {low:g} to {high:g} in the box"
        raise ValueError(f"mesh: {came}, so there is no surface; accepted are both signs")
    vertices, faces, *_ = marching_cubes(
        values.float().cpu().numpy(),
        0.0,
        spacing=(2 * bound / (resolution - 1),) * 3,
        gradient_direction="descent",
    )
    placed, flipped = (vertices - bound).astype(np.float32), np.ascontiguousarray(faces, np.int64)
    return torch.from_numpy(placed), torch.from_numpy(flipped)


def mesh_bytes(vertices: Tensor, faces: Tensor, kind: Literal["ply", "obj"]) -> bytes:
    """A file of triangles: binary little-endian PLY, or OBJ text with six decimals.

    Args:
        vertices: [V,3] finite floats. faces: [F,3] integers in [0,V).

    Raises:
        ValueError: another kind, shapes or indices that do not fit, NaN.
    """
    if kind not in ("ply", "obj"):
        raise ValueError(f"mesh_bytes: kind is {kind!r}; accepted are ply and obj")
    v, f = vertices.detach().cpu().numpy().astype("<f4"), faces.cpu().numpy().astype("<i4")
    if v.shape != (len(v), 3) or f.shape != (len(f), 3) or not np.isfinite(v).all():
        came = f"vertices {v.shape} and faces {f.shape}"
        raise ValueError(f"mesh_bytes: {came}; accepted are finite [V,3] and [F,3]")
    if len(f) and not 0 <= f.min() <= f.max() < len(v):
        came = f"faces go from {f.min()} to {f.max()}"
        raise ValueError(f"mesh_bytes: {came}; accepted are 0 to {len(v) - 1}")
    if kind == "obj":
        lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in v.tolist()]
        lines += [f"f {a} {b} {c}" for a, b, c in (f + 1).tolist()]
        return ("\n".join(lines) + "\n").encode()
    head = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(v)}",
        *(f"property float {axis}" for axis in "xyz"),
        f"element face {len(f)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ]
    rows = np.empty(len(f), [("n", "u1"), ("corners", "<i4", 3)])
    rows["n"], rows["corners"] = 3, f
    return "\n".join(head).encode() + v.tobytes() + rows.tobytes()


def iou(net: MLP, params: Tensor, field: Field, **how: Any) -> float:
    """``|A ∩ B| / |A ∪ B|`` of the cells where the network [P], and where the field, is below 0."""
    x = _centres(field.values.shape).to(params)
    a = _values(net, params, x, **how) < 0
    b = (field.values.flatten() < 0).to(a.device)
    return float((a & b).sum() / (a | b).sum())
