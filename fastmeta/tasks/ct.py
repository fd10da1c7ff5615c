"""Computed tomography: a task is a slice, seen as its projections at a few angles.

``loss(project(mlp(params, grid), angles), sinogram)``: the sinogram is the mean along parallel
lines (``fastmeta.project``). Slices are random Shepp-Logan phantoms, images, arrays or DICOM files;
scans are sinograms that were measured, of which there is no image.

Source: Tancik et al. 2021, CT notebook.
"""

from __future__ import annotations

import importlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..batch import Batch, Project
from ..ops.mlp import mlp
from ..ops.project import project
from ..spec import MLP
from .files import FORMATS, ImageSet, Memory, Splits, open_images
from .images import grid, to_pixels
from .sets import Shape, TaskSet, at_least, folders_or_split, refuse_changed

COUNTED, METRIC, PLANAR = "angles", "psnr", True


@dataclass(frozen=True)
class CT:
    """Slices seen as projections; the defaults are the paper's but for the size, 256 there."""

    size: int = 64
    """height and width of a slice; photographs and DICOM slices are cropped and resized"""
    angles: int = 20
    """projections of each training task"""
    spacing: Literal["random", "even"] = "random"
    """random: angles drawn for each task; even: the same for all, arc / angles apart, from 0"""
    arc: float = 180.0
    """degrees; angles lie in [0, arc), 180 is the full turn and less a limited angle"""
    photons: int | None = None
    """sent to each detector bin, so that counts are noisy; none: no noise"""
    attenuation: float = 4.0
    """of a slice of ones from side to side, where there are photons: exp(-4), 1.8 %, arrive"""
    hu_low: float = -1000.0
    """Hounsfield units of DICOM files that become 0; -1000 is air"""
    hu_high: float = 1000.0
    """Hounsfield units that become 1; 1000 is dense bone"""
    phantoms: int = 100_000
    """phantoms to learn from, where data is "phantoms"; the paper takes as many outer steps"""
    validation: float = 0.1
    """share of the files for validation (of the groups, where there is a pattern)"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match, such as a patient's slices,
    stay in one part; neighbouring slices are near-copies"""

    def __post_init__(self) -> None:
        at_least("ct", self, 8, "size")
        at_least("ct", self, 1, "angles", "photons", "phantoms")
        if self.spacing not in ("random", "even"):
            raise ValueError(f"ct: spacing is {self.spacing!r}; accepted are random and even")
        if not 0 < self.arc <= 360:
            raise ValueError(f"ct: arc is {self.arc}; accepted are degrees > 0, at most 360")
        if not (self.attenuation > 0 and math.isfinite(self.attenuation)):
            raise ValueError(f"ct: attenuation is {self.attenuation}; accepted is a number > 0")
        if not (self.hu_low < self.hu_high and math.isfinite(self.hu_high - self.hu_low)):
            came = f"hu_low is {self.hu_low}, hu_high {self.hu_high}"
            raise ValueError(f"ct: {came}; accepted are numbers, hu_low < hu_high")
        if not (min(self.validation, self.test) >= 0 and self.validation + self.test <= 1):
            came = f"validation is {self.validation}, test {self.test}"
            raise ValueError(f"ct: {came}; accepted are shares >= 0 that sum to at most 1")
        if self.photons is None:
            refuse_changed(self, "no photons", "attenuation")


@dataclass(frozen=True, eq=False)
class Scan:
    """What was measured of a slice that nobody has: sinogram [A,W], angles [A] in radians."""

    sinogram: Tensor
    angles: Tensor


# Opening


def open_splits(source: Any, options: CT, seed: int = 0) -> tuple[Any, Any, Any]:
    """(train, validation, test) of a source: "phantoms" (./phantoms for such a folder), or files.

    Items are slices [N,N,1] in [0,1], or ``Scan``s. Files are split by their folders, else by name.

    Args:
        source: "phantoms"; a DICOM file, or a folder with such at any depth (``open_dicom``); an
            .npz of scans, with "sinogram" and "angles" (``open_scans``); or what ``open_images``
            reads, in grey, as it is in [0,1].

    Raises:
        ValueError, OSError: nothing there, damaged, options that this source leaves without effect.
        ImportError: DICOM files without pydicom.
    """
    if isinstance(source, str) and source == "phantoms":
        files = ("hu_low", "hu_high", "validation", "test", "group")
        refuse_changed(options, "data phantoms", *files)
        return phantom_splits(options.size, options.phantoms, seed=seed)
    kind, found = _open(source, options)
    idle = {
        "images": ("hu_low", "hu_high"),
        "DICOM": (),
        "scans": ("hu_low", "hu_high", "arc", "photons", "attenuation"),
    }
    refuse_changed(options, f"data that are {kind}", "phantoms", *idle[kind])
    return folders_or_split(
        found,
        validation=options.validation,
        test=options.test,
        seed=seed,
        group=options.group,
    )


def open_all(source: Any, options: CT) -> Any:
    """Every slice or scan of a source, unsplit; of "phantoms" the 200 held out with seed 0.

    Sources and errors as for ``open_splits``; options without effect are let be, since a start that
    learned from phantoms fits scans with the options it came with.
    """
    if isinstance(source, str) and source == "phantoms":
        return phantom_splits(options.size)[2]
    return _open(source, options)[1]


def _open(source: Any, options: CT) -> tuple[str, Any]:
    """(images, DICOM or scans; the set)."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        root, names = _list_dicom(path)
        if names:
            window = (options.hu_low, options.hu_high)
            return "DICOM", _from_dicom(root, names, options.size, window)
        if path.suffix.lower() == ".npz" and path.is_file() and _holds_scans(path):
            return "scans", open_scans(path, options.size)
    return "images", open_images(source, size=options.size, channels=1)


# Phantoms

# Value, half axes, centre, angle in degrees, in the square [-1,1)², y up. Source: Shepp & Logan
# 1974, with the contrasts of Toft 1996 ("modified": the soft tissue can be seen).
ELLIPSES = np.array(
    [
        [1.0, 0.69, 0.92, 0.0, 0.0, 0.0],
        [-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0],
        [-0.2, 0.11, 0.31, 0.22, 0.0, -18.0],
        [-0.2, 0.16, 0.41, -0.22, 0.0, 18.0],
        [0.1, 0.21, 0.25, 0.0, 0.35, 0.0],
        [0.1, 0.046, 0.046, 0.0, 0.1, 0.0],
        [0.1, 0.046, 0.046, 0.0, -0.1, 0.0],
        [0.1, 0.046, 0.023, -0.08, -0.605, 0.0],
        [0.1, 0.023, 0.023, 0.0, -0.606, 0.0],
        [0.1, 0.023, 0.046, 0.06, -0.605, 0.0],
    ]
)
# (middle, range): a draw is uniform in middle ± range.
HEAD_TILT = (0.0, 15.0)  # degrees, of the whole head
HEAD_SHIFT = (0.0, 0.02)  # of its centre, along each axis
HEAD_SCALE = (0.95, 0.10)  # a factor for each axis; what lies inside is scaled too
SKULL_INSIDE = (0.97, 0.03)  # a factor on the inner ellipse: the wall is thickened, never opened
SKULL_VALUE = (1.0, 0.1)  # a factor on each of the first two values
CENTRE = (0.0, 0.04)  # of the eight ellipses inside, along each axis
AXES = (1.0, 0.2)  # a factor on each of their half axes
ANGLE = (0.0, 20.0)  # degrees
VALUE = (1.0, 0.5)  # a factor
_FAR = 1 << 30  # validation starts here, test at twice this


def phantom_images(
    count: int, *, size: int = 64, seed: int = 0, first: int = 0, memory: int = 256 << 20
) -> ImageSet:
    """Random Shepp-Logan phantoms [N,N,1] in [0,1]; image i is a function of (seed, first + i,
    size).

    ``clip(Σ_e value_e · cover_e, 0, 1)`` over the ten ellipses of ``ELLIPSES``. The head as a whole
    is tilted by ±15°, shifted by ±0.02 and scaled by 0.85 to 1.05 along each axis; the inside of
    the skull takes 0.94 to 1 of its half axes, the first two values 0.9 to 1.1. The eight ellipses
    inside move by ±0.04, their half axes take 0.8 to 1.2, their angles ±20°, their values 0.5 to
    1.5. All of it lies in the unit circle, so every angle sees the whole. How the paper randomised
    its phantoms is not published; these ranges are ours.

    Antialiased, since nearest-pixel sums see steps at edges otherwise: ``cover`` is the share of a
    pixel in the ellipse, to first order. Pixel (i,j) is a box about x = 2j/N − 1, y = 1 − 2i/N, so
    the centre is pixel (N/2, N/2), about which ``project`` turns.

    Args:
        count: n, how many.
        size: N, at least 8.
        first: ranges first .. first + count − 1 that do not meet give separate sets.
        memory: bytes of phantoms to hold.

    Raises:
        ValueError: a number out of range.
    """
    whole = all(isinstance(n, int) for n in (count, size, first))
    if not whole or min(count, first) < 0 or first + count > 2**32 or size < 8:
        came = f"count is {count}, first {first}, size {size}"
        raise ValueError(f"phantom_images: {came}; accepted are 0 to 2**32 - 1, size at least 8")
    names = tuple(f"phantom-{seed}-{i}" for i in range(first, first + count))
    read = partial(_phantom, seed=seed, first=first, size=size)
    return ImageSet(read, names, (size, size), 1, Memory(memory))


def phantom_splits(
    size: int = 64, train: int = 100_000, validation: int = 200, test: int = 200, seed: int = 0
) -> Splits:
    """(train, validation, test) of so many phantoms; none moves when another part grows.

    They are ranges of one sequence, from 0, 2³⁰ and 2³¹. Errors as ``phantom_images``.
    """
    counts = (train, validation, test)
    if max(counts) > _FAR:
        raise ValueError(f"phantom_splits: {counts} phantoms; accepted are at most 2**30 each")
    learned, check, held_out = (
        phantom_images(n, size=size, seed=seed, first=k * _FAR) for k, n in enumerate(counts)
    )
    return learned, check, held_out


def _phantom(row: int, *, seed: int, first: int, size: int) -> np.ndarray:
    """[N,N,1] float32 of one phantom."""
    key = torch.tensor([((seed + 2**63) % 2**64) - 2**63])
    draws = rng.uniform(key, 66, first + row, rng.PHANTOMS, torch.float64)[0].numpy()
    return paint(jitter(2 * draws[:6] - 1, 2 * draws[6:].reshape(10, 6) - 1), size)[..., None]


def jitter(head: np.ndarray, each: np.ndarray) -> np.ndarray:
    """Ten ellipses [10,6] of draws in [-1,1]: of the head [6] (tilt, shift x, y, scale x, y,
    inside) and of each ellipse [10,6], in the order of ``ELLIPSES``; zeros: the middles."""

    def within(bounds: tuple[float, float], draw: Any) -> Any:
        return bounds[0] + bounds[1] * draw

    table = ELLIPSES.copy()
    table[:2, 0] *= within(SKULL_VALUE, each[:2, 0])
    table[1, 1:3] *= within(SKULL_INSIDE, head[5])
    table[2:, 0] *= within(VALUE, each[2:, 0])
    table[2:, 1:3] *= within(AXES, each[2:, 1:3])
    table[2:, 3:5] += within(CENTRE, each[2:, 3:5])
    table[2:, 5] += within(ANGLE, each[2:, 5])
    scale = within(HEAD_SCALE, head[3:5])
    tilt = within(HEAD_TILT, head[0])
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    turn = np.array([[cos, -sin], [sin, cos]])
    table[:, 1:3] *= scale
    table[:, 3:5] = table[:, 3:5] * scale @ turn.T + within(HEAD_SHIFT, head[1:3])
    table[:, 5] += tilt
    return table


def paint(table: np.ndarray, size: int) -> np.ndarray:
    """[N,N] float32: ``clip(Σ_e value_e · cover_e, 0, 1)`` of ellipses [n,6] as in ``ELLIPSES``.

    ``cover = clip(1/2 − d N/2, 0, 1)``, d the distance to the edge to first order,
    ``(r − 1) r / |(p/a, q/b)|`` with p, q along the axes in units of a, b, and r = |(p, q)|.
    """
    value, a, b, x0, y0, degrees = table.astype(np.float32).T[..., None, None]  # each [n,1,1]
    u = (2 * np.arange(size) / size - 1).astype(np.float32)
    x, y = u - x0, -u[:, None] - y0  # [n,1,N], [n,N,1]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    p, q = (x * cos + y * sin) / a, (y * cos - x * sin) / b  # [n,N,N]
    r = np.maximum(np.hypot(p, q), 1e-6)
    distance = (r - 1) * r / np.maximum(np.hypot(p / a, q / b), 1e-6)
    cover = np.clip(0.5 - distance * (size / 2), 0, 1)
    return np.clip((value * cover).sum(0), 0, 1)


# DICOM

_TAGS = [
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "InstanceNumber",
    "ImageType",
    "Rows",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
]
_OTHERS = tuple(f".{name}" for name in (*FORMATS, "npy", "npz"))


def open_dicom(
    source: str | os.PathLike[str],
    *,
    size: int = 64,
    hu_low: float = -1000.0,
    hu_high: float = 1000.0,
) -> ImageSet:
    """DICOM files, one slice each, as images [N,N,1]: the window hu_low..hu_high becomes [0,1].

    ``(slope · stored + intercept − hu_low) / (hu_high − hu_low)``, clipped, cropped about the
    centre to a square and resized. Sorted by series, then by the position along the slices' normal,
    or by the instance number where there is no position. Left out: DICOMDIR, what has no pixels
    (reports, structures), and localizers.

    Args:
        source: a file, or a folder with files that end in .dcm or begin as DICOM does.

    Raises:
        OSError: a file is damaged, or pydicom has no decoder for its compression. ValueError: no
            slice there, files of many frames or in colour. ImportError: no pydicom.
    """
    root, names = _list_dicom(Path(source).expanduser())
    if not names:
        raise ValueError(
            f"ct: {source} holds no DICOM file; accepted are .dcm, or DICM at byte 128"
        )
    return _from_dicom(root, names, size, (hu_low, hu_high))


def _list_dicom(path: Path) -> tuple[Path, list[str]]:
    """(folder, DICOM files below it), or of the one file; hidden ones are left out."""
    if path.is_file():
        return path.parent, [path.name] if _is_dicom(path) else []
    names = []
    for folder, below, files in os.walk(path):
        below[:] = [d for d in below if d[0] != "."]
        here = Path(folder)
        fitting = (f for f in files if f[0] != "." and f != "DICOMDIR" and _is_dicom(here / f))
        names += [(here.relative_to(path) / f).as_posix() for f in fitting]
    return path, sorted(names)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    if path.name.lower().endswith(_OTHERS) or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _from_dicom(root: Path, names: list[str], size: int, window: tuple[float, float]) -> ImageSet:
    keys = {name: _with_dicom(root, name, _key, stop_before_pixels=True) for name in names}
    slices = sorted((n for n in names if keys[n] is not None), key=lambda n: (*keys[n], n))
    if not slices:
        raise ValueError(f"ct: {root} holds DICOM files, but no slice; accepted is one at least")

    def read(row: int) -> np.ndarray:
        unit = _with_dicom(root, slices[row], partial(_window, window=window))  # [h,w]
        return open_images(unit[None], size=size, channels=1, memory=0)[0].numpy()

    return ImageSet(read, tuple(slices), (size, size), 1)


def _with_dicom(root: Path, name: str, use: Callable[[Any, str], Any], **how: Any) -> Any:
    """``use(data, name)`` of a file; whatever goes wrong in a decoder becomes one line."""
    try:
        pydicom = importlib.import_module("pydicom")
    except ImportError as error:
        came = f"{name} is a DICOM file, and pydicom is not installed"
        raise ImportError(f"ct: {came}; accepted is with it: pip install pydicom") from error
    packed = None
    try:
        data = pydicom.dcmread(root / name, specific_tags=_TAGS if how else None, **how)
        syntax = data.file_meta.TransferSyntaxUID
        packed = syntax.name if syntax.is_encapsulated else None
        return use(data, name)
    except _Unfit:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(f"ct: {name} cannot be opened ({error.strerror})") from error
    except Exception as error:  # pydicom raises AttributeError, struct.error, ... on damage
        reason = " ".join(str(error).split()) or type(error).__name__
        if packed is not None:
            came = f"{name} is compressed ({packed}) and was not decoded (pydicom: {reason})"
            accepted = "not compressed, or with a decoder: pip install 'pylibjpeg[all]'"
            raise OSError(f"ct: {came}; accepted are slices {accepted}") from error
        what = f"ct: {name} is truncated or not DICOM (pydicom: {reason})"
        raise OSError(f"{what}; accepted are DICOM files of one slice") from error


class _Unfit(ValueError):
    """A DICOM file that is whole, but no slice in grey."""


def _key(data: Any, name: str) -> tuple[str, bool, float] | None:
    """What a slice is sorted by: series, has no position, position or number; None: no slice."""
    if data.get("Rows") is None or "LOCALIZER" in (data.get("ImageType") or ()):
        return None
    frames, samples = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel") or 1)
    colours = data.get("PhotometricInterpretation", "MONOCHROME2")
    if (frames, samples, colours) != (1, 1, "MONOCHROME2"):
        came = f"{name} has {frames} frames of {samples} samples, {colours}"
        raise _Unfit(f"ct: {came}; accepted is one frame of one sample, MONOCHROME2")
    series = str(data.get("SeriesInstanceUID", ""))
    position, axes = data.get("ImagePositionPatient"), data.get("ImageOrientationPatient")
    if position is None or axes is None:
        return series, True, float(data.get("InstanceNumber") or 0)
    along, down = np.array(axes, float).reshape(2, 3)
    return series, False, float(np.cross(along, down) @ np.array(position, float))


def _window(data: Any, name: str, *, window: tuple[float, float]) -> np.ndarray:
    """[h,w] float32 in [0,1]."""
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    units = data.pixel_array * float(1 if slope is None else slope) + float(intercept or 0)
    low, high = window
    return np.clip((units - low) / (high - low), 0, 1).astype(np.float32)


# Scans


def open_scans(path: str | os.PathLike[str], size: int) -> TaskSet:
    """Measured sinograms as a set of ``Scan``s.

    Args:
        path: an .npz with "sinogram" [n,A,W] or [A,W], the mean of a slice along each line (the
            line integral over the side of the square), and "angles" [n,A], or [A] for all, in
            radians, both as ``fastmeta.project`` has them; "names" [n], where there.
        size: W.

    Raises:
        ValueError: no such arrays, not finite, shapes that do not fit, degrees for radians.
    """
    found = _load_scans(Path(path))
    sinogram, angles = found["sinogram"], found["angles"]
    if sinogram.ndim == 2:
        sinogram = sinogram[None]
    if sinogram.ndim != 3 or 0 in sinogram.shape:
        came = f"sinogram in {path} has shape {sinogram.shape}"
        raise ValueError(f"ct: {came}; accepted are [n,A,W] and [A,W], none empty")
    n, A, W = sinogram.shape
    if angles.shape not in ((A,), (n, A)):
        came = f"angles in {path} has shape {angles.shape}"
        raise ValueError(f"ct: {came}; accepted for these sinograms are {(A,)} and {(n, A)}")
    if size != W:
        raise ValueError(f"ct: size is {size}; accepted for the scans in {path} is their width {W}")
    if np.abs(angles).max() > 6.3:
        came = f"angles in {path} reach {np.abs(angles).max():g}"
        raise ValueError(f"ct: {came}; accepted are radians from -2π to 2π")
    names = found.get("names", np.arange(n)).astype(str)
    if names.shape != (n,):
        raise ValueError(f"ct: names in {path} is {names.shape}; accepted are {n} names")
    y = torch.from_numpy(sinogram.astype(np.float32))
    theta = torch.from_numpy(np.broadcast_to(angles, (n, A)).astype(np.float32))
    return TaskSet(lambda row: Scan(y[row], theta[row]), tuple(names.tolist()))


_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _holds_scans(path: Path) -> bool:
    """Whether an .npz has a sinogram; one that is damaged is left to who reads images."""
    try:
        with zipfile.ZipFile(path) as file:
            return "sinogram.npy" in file.namelist()
    except _DAMAGE:
        return False


def _load_scans(path: Path) -> dict[str, np.ndarray]:
    """The arrays of scans, finite numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in ("sinogram", "angles", "names") if key in file}
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"ct: {path} is no readable .npz of plain arrays ({reason})") from error
    for key in ("sinogram", "angles"):
        if key not in found:
            came = f"{path} holds no array called {key!r}"
            raise ValueError(f'ct: {came}; accepted are "sinogram" and "angles"')
        if found[key].dtype.kind not in "fiu" or not np.isfinite(found[key]).all():
            came = f"{key} in {path} is {found[key].dtype}, or holds NaN or infinity"
            raise ValueError(f"ct: {came}; accepted are finite real numbers")
    return found


# Tasks


def shape(options: CT) -> Shape:
    """Two coordinates of the unit square, x first; one density in [0,1]."""
    return Shape(2, 1, "unit_xy", True)


def learn(
    items: Sequence[Tensor | Scan],
    options: CT,
    net: MLP,
    seeds: Tensor,
    per_step: int | None = None,
) -> Batch:
    """``x`` = grid of net.coords [N·N,2], shared; ``y`` = sinograms [T,A,N]; A = options.angles.

    Args:
        items: slices [N,N,1], or scans, of which A angles are taken, at random or evenly.
        seeds: [T]; angles and photons of task t depend on seeds[t] alone.

    Raises:
        ValueError: per_step (a sinogram needs every pixel), items or a network that do not fit.
    """
    return _seen(items, options, net, seeds, options.angles, per_step, options.spacing)


def observe(
    items: Sequence[Tensor | Scan],
    options: CT,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """As ``learn`` from ``count`` angles; the query is the slice itself, [T,N·N,1].

    Of scans ``count`` angles are taken evenly, and there is no query.

    Args:
        count: None: options.angles; of scans all.
    """
    if isinstance(items[0], Scan):
        count = items[0].angles.numel() if count is None else count
        return _seen(items, options, net, seeds, count, per_step, "even")
    count = options.angles if count is None else count
    batch = _seen(items, options, net, seeds, count, per_step, options.spacing)
    images = torch.stack([item for item in items if isinstance(item, Tensor)])  # [T,N,N,1]
    return replace(batch, query=Batch(batch.x, images.flatten(1, 2)))


def _seen(
    items: Sequence[Any],
    options: CT,
    net: MLP,
    seeds: Tensor,
    count: int,
    per_step: int | None,
    spacing: str,
) -> Batch:
    if per_step is not None:
        raise ValueError(f"ct: per_step is {per_step}; accepted is none, a line needs every pixel")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"ct: count is {count!r}; accepted is an integer >= 1 of angles")
    if (net.in_features, net.out_features) != (2, 1):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"ct: {came}; accepted is 2 to 1")
    if isinstance(items[0], Scan):
        angles, y = _chosen(items, seeds, count, spacing)
    else:
        images = torch.stack(list(items))  # [T,N,N,1]
        if images.dim() != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 1:
            came = f"slices are {tuple(images.shape[1:])}"
            raise ValueError(f"ct: {came}; accepted are square ones in grey, [N,N,1]")
        angles = draw_angles(seeds, count, spacing=options.spacing, arc=options.arc)
        y = project(images[..., 0], angles)
        if options.photons is not None:
            y = count_photons(y, seeds, photons=options.photons, attenuation=options.attenuation)
    W = y.shape[-1]
    return Batch(grid(W, W, net.coords).to(y), y, measure=Project(angles))


def draw_angles(
    seeds: Tensor, count: int, *, spacing: str = "random", arc: float = 180.0
) -> Tensor:
    """[T,A] float32 in radians, in [0, arc): uniform draws, or ``arc · i / A`` for every task.

    Random angles are a function of (seeds[t], i): fewer are the first of more.
    """
    if spacing == "even":
        unit = torch.arange(count, dtype=torch.float64).expand(len(seeds), count) / count
    else:
        unit = rng.uniform(seeds, count, 0, rng.ANGLES, torch.float64)
    return (unit * math.radians(arc)).float()


def count_photons(sinogram: Tensor, seeds: Tensor, *, photons: float, attenuation: float) -> Tensor:
    """A sinogram [T,A,W] as a detector that counts sees it.

    ``n ~ Poisson(photons · exp(−attenuation · s))``, ``s' = −log(max(n, 1) / photons) /
    attenuation``. The noise of task t is a function of seeds[t] alone (numpy's Philox, keyed by
    it).

    Source: the Lambert-Beer law; Leuschner et al. 2021, LoDoPaB-CT, where an empty bin counts 0.1.
    """
    rates = photons * torch.exp(-attenuation * sinogram.double())  # [T,A,W]
    rows = []
    for seed, rate in zip(seeds.tolist(), rates, strict=True):
        key = np.array([seed % 2**64, rng.NOISE], np.uint64)
        drawn = np.random.Generator(np.random.Philox(key=key)).poisson(rate.numpy())
        rows.append(torch.from_numpy(drawn))
    counts = torch.stack(rows).double().clamp(min=1)
    return (-torch.log(counts / photons) / attenuation).to(sinogram)


def _chosen(
    scans: Sequence[Scan], seeds: Tensor, count: int, spacing: str
) -> tuple[Tensor, Tensor]:
    """(angles [T,A], sinograms [T,A,W]): so many of each scan's own angles, in its order."""
    angles, y = [], []
    for scan, seed in zip(scans, seeds, strict=True):
        A = scan.angles.numel()
        if count > A:
            raise ValueError(f"ct: {count} angles of a scan that has {A}; accepted are 1 to {A}")
        index = torch.arange(count) * A // count
        if spacing == "random":
            order = rng.uniform(seed[None], A, 0, rng.ANGLES)[0].argsort(stable=True)
            index = order[:count].sort().values
        angles.append(scan.angles[index])
        y.append(scan.sinogram[index])
    return torch.stack(angles), torch.stack(y)


def picture(net: MLP, params: Tensor, item: Tensor | Scan, options: CT, **how: Any) -> Tensor:
    """What a network [P] shows on the slice's grid, [N,N,1]; not clipped."""
    W = item.sinogram.shape[-1] if isinstance(item, Scan) else item.shape[0]
    return to_pixels(mlp(net, params, grid(W, W, net.coords).to(params), **how), W)


def truth(item: Tensor | Scan, options: CT) -> Tensor | None:
    """The slice [N,N,1]; None of a scan, whose slice nobody has."""
    return None if isinstance(item, Scan) else item


def fbp(sinogram: Tensor, angles: Tensor) -> Tensor:
    """Filtered back-projection, the classical answer: sinograms [T,A,W] -> slices [T,W,W].

    ``f(x, y) = (π/A) Σ_a (|ν| ⊛ W s_a)(x cos θ_a + y sin θ_a)``, of angles [T,A] taken to cover the
    half turn evenly; linear between bins, not clipped, 0 outside the circle in the square, which
    some angles do not see. Source: scikit-image, ``iradon``, whose angles run against ours about
    the same pixel (W/2, W/2).
    """
    from skimage.transform import iradon

    W = sinogram.shape[-1]
    slices = [
        iradon(W * s.T, -np.rad2deg(a), circle=True)
        for s, a in zip(sinogram.double().cpu().numpy(), angles.cpu().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(slices)).to(sinogram)
