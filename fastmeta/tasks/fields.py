"""Signed distance fields: grids of distances, and what they are read or computed from: images,
arrays, packed drawings, meshes. ``sdf.py`` makes tasks of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .arrays import as_array, existing, files_below, map_npy, npz_heads, one_line, read_npz
from .files import open_images
from .sets import TaskSet, refuse_changed

if TYPE_CHECKING:
    from .sdf import SDF

MESHES = (".obj", ".ply", ".stl", ".off", ".glb")
_SOURCES = (
    "accepted are images (a folder, npz, npy), an npz with sdf, sdf_i8 or bits, a folder of npy "
    f"grids, meshes ({' '.join(MESHES)}), and an array [n,H,W] or [n,D,H,W]"
)
_HELD = 1 << 30  # bytes of fields kept for the next time
_NPZ = ("sdf", "sdf_i8", "scale", "names", "n_train", "n_val", "bits", "shape", "char")


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


def open_fields(source: Any, options: SDF) -> tuple[TaskSet, int | None]:
    """(all fields, how many of them are for training or None)."""
    source = as_array(source)
    if isinstance(source, np.ndarray):
        return _from_array("the array", source, options), None
    path = existing("sdf", source, _SOURCES)
    if path.is_dir():
        for endings, read in ((MESHES, mesh_field), ((".npy",), _read_npy)):
            names = files_below(path, endings)
            if names:
                _refuse_of_images(options, str(path))
                return _from_files(path, names, read, options), None
    elif path.suffix.lower() in MESHES:
        return _from_files(path.parent, [path.name], mesh_field, options), None
    elif path.suffix.lower() == ".npz":
        return _from_npz(path, options)
    elif path.suffix.lower() == ".npy":
        return _from_array(str(path), map_npy("sdf", path), options), None
    return _from_images(path, options), None


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


def _refuse_of_images(options: SDF, where: str) -> None:
    """Distances have no ink, and the size that they are stored in."""
    refuse_changed(options, f"distances, as {where} holds them", "ink", "size")


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
    headers = {"headers": 0} if options.skip_bad else {}
    images = open_images(source, size=options.size, channels=1, **headers)
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
    _refuse_of_images(options, where)
    return _set([str(i) for i in range(len(array))], options, lambda row: array[row])


def _read_npy(path: Path, options: SDF) -> np.ndarray:
    values = map_npy("sdf", path)
    if values.dtype.kind != "f":
        raise ValueError(f"sdf: {path} holds {values.dtype}; accepted in a folder are floats")
    return values


def _from_npz(path: Path, options: SDF) -> tuple[TaskSet, int | None]:
    arrays = read_npz("sdf", path, npz_heads("sdf", path, _NPZ))
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
    _refuse_of_images(options, str(path))
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
        what = f"sdf: {path.name} cannot be read (trimesh: {one_line(error)})"
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
