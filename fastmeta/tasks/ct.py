"""Computed tomography: a task is a slice, seen as its projections at a few angles.

``loss(project(mlp(params, grid), angles), sinogram)``: the sinogram is the mean along parallel
lines (``fastmeta.project``). Slices are random Shepp-Logan phantoms, images, arrays or DICOM files;
scans are sinograms that were measured, of which there is no image.

Source: Tancik et al. 2021, CT notebook.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from .arrays import DAMAGE, one_line
from .dicom import from_dicom, list_dicom
from .files import open_images
from .images import grid, to_pixels
from .phantoms import phantom_splits
from .sets import Shape, TaskSet, at_least, folders_or_split, readable, refuse_changed

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
    skip_bad: bool = False
    """leave out files that cannot be read, naming them, instead of stopping"""

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
        files = ("hu_low", "hu_high", "validation", "test", "group", "skip_bad")
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
        root, names = list_dicom(path)
        if names:
            window = (options.hu_low, options.hu_high)
            return "DICOM", _usable(
                from_dicom(root, names, options.size, window, options.skip_bad), options
            )
        if path.suffix.lower() == ".npz" and path.is_file() and _holds_scans(path):
            return "scans", open_scans(path, options.size)
    headers = {"headers": 0} if options.skip_bad else {}
    found = open_images(source, size=options.size, channels=1, **headers)
    return "images", _usable(found, options)


def _usable(found: Any, options: CT) -> Any:
    return readable(found) if options.skip_bad else found


# Scans


def open_scans(path: str | os.PathLike[str], size: int) -> TaskSet:
    """Measured sinograms as a set of ``Scan``s.

    Args:
        path: an .npz with "sinogram" [n,A,W] or [A,W], the mean of a slice along each line (the
            line integral over the side of the square), and "angles" [n,A], or [A] for all, in
            radians, both as ``fastmeta.project`` has them; "names" [n], where there.
        size: W, in pixels.

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


def _holds_scans(path: Path) -> bool:
    """Whether an .npz has a sinogram; one that is damaged is left to who reads images."""
    try:
        with zipfile.ZipFile(path) as file:
            return "sinogram.npy" in file.namelist()
    except DAMAGE:
        return False


def _load_scans(path: Path) -> dict[str, np.ndarray]:
    """The arrays of scans, finite numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in ("sinogram", "angles", "names") if key in file}
    except DAMAGE as error:
        came = f"{path} is no readable .npz of plain arrays ({one_line(error)})"
        raise ValueError(f"ct: {came}") from error
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
