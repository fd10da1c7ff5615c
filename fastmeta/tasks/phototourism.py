"""Photos of a landmark as tasks: one scene, and each photo's own light, weather and camera.

A task is one photo: ``x`` = rays of its pixels, ``y`` = their colours, composited along each ray.
A network fitted to it shows the landmark in the photo's appearance from anywhere.
Source: Tancik et al. 2021, Phototourism notebook.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, March, Rays
from ..spec import MLP
from .arrays import DAMAGE, one_line
from .cameras import Seen, check_kinv, check_poses, ray_batch, rays_from_kinv, render_rays
from .files import ENDINGS, Memory, with_image
from .sets import (
    Shape,
    TaskSet,
    at_least,
    by_part,
    not_counted,
    readable,
    refuse_changed,
    split,
)
from .views import check_march

COUNTED, METRIC, PLANAR = None, "psnr", False
_MEMORY = 2 << 30  # bytes of decoded photos that are held
_SOURCES = (
    "accepted is a folder with dense/images and, one row for each image by name, c2w_mats.npy "
    "[n,4,4], kinv_mats.npy [n,3,3], bds.npy [n,2] and, if there, res_mats.npy [n,2]"
)


@dataclass(frozen=True)
class Phototourism:
    """Photos of one landmark, each a task, by cameras whose poses are known."""

    shrink: int = 1
    """photos are reduced by this factor, each pixel the mean of a block"""
    world_scale: float = 0.05
    """what the world is multiplied by"""
    near_factor: float = 0.9
    """rays begin at this times the nearest depth stored for a photo"""
    far_factor: float = 1.2
    """rays end at this times the farthest depth"""
    samples: int = 128
    """points on a ray"""
    last_interval: float = 1e10
    """the length that the last point on a ray stands for: what lies behind it is not seen"""
    density: Literal["relu", "softplus"] = "relu"
    """what makes densities positive: relu is the paper's, and can die; softplus cannot"""
    picture_size: int | None = 256
    """longer side of rendered photos at most, in pixels; none: as large as they are"""
    train_photos: int | None = None
    """the first n photos by name are learnt from, then come validation and test in the proportion
    of their shares; none: parts by the hash of a name"""
    validation: float = 0.1
    """share of the photos for validation"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part"""
    skip_bad: bool = False
    """leave out photos that cannot be read, naming them, instead of stopping"""

    def __post_init__(self) -> None:
        at_least("phototourism", self, 1, "shrink", "picture_size", "train_photos")
        at_least("phototourism", self, 2, "samples")
        for name in ("world_scale", "near_factor", "far_factor"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                came = f"{name} is {value}"
                raise ValueError(f"phototourism: {came}; accepted is a finite number above 0")
        if self.train_photos is not None:
            refuse_changed(self, "train_photos", "group")
        check_march("phototourism", self.last_interval, self.density)


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo, in the scaled world.

    Args:
        image: [H,W,3] float32 in [0,1].
        pose: camera-to-world [4,4].
        kinv: K⁻¹ [3,3] of this image's own pixels, column i and row j, no half pixel.
        near, far: bounds of its rays, as depths along the optical axis.
    """

    image: Tensor
    pose: Tensor
    kinv: Tensor
    near: float
    far: float


# Sets


def open_splits(
    source: Any, options: Phototourism, seed: int = 0
) -> tuple[TaskSet, TaskSet, TaskSet]:
    """(train, validation, test) of a source's photos: by ``train_photos``, else ``sets.split``.

    Raises:
        ValueError, OSError: as ``open_all``; more photos to learn from than there are.
    """
    photos = open_all(source, options)
    shares = (options.validation, options.test)
    if options.train_photos is None:
        return split(photos, validation=shares[0], test=shares[1], seed=seed, group=options.group)
    rest = len(photos) - options.train_photos
    if rest < 0 or min(shares) < 0:
        came = f"train_photos is {options.train_photos} of {len(photos)}, shares {shares}"
        raise ValueError(f"phototourism: {came}; accepted are that many at most, shares >= 0")
    checks = math.ceil(rest * shares[0] / sum(shares)) if sum(shares) else 0
    first, second = options.train_photos, options.train_photos + checks
    return by_part(photos, [(i >= first) + (i >= second) for i in range(len(photos))])


def open_all(source: Any, options: Phototourism) -> TaskSet:
    """The photos of a folder, decoded when asked for and held up to 2 GiB.

    Args:
        source: a folder with ``dense/images`` and, beside it, one row for each image sorted by
            name: c2w_mats.npy [n,4,4], kinv_mats.npy [n,3,3], bds.npy [n,2] (nearest and farthest
            depth) and, if there, res_mats.npy [n,2] (height, width), which is then compared.

    Raises:
        ValueError, OSError: files that are absent, damaged, or of different lengths; poses that are
            none, singular intrinsics, bounds that are not 0 < near < far; on reading a photo
            damaged or differently sized images. With ``skip_bad`` these photos are left out, except
            that lengths must agree.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"phototourism: source is a {type(source).__name__}; {_SOURCES}")
    root = Path(source).expanduser()
    folder = root / "dense" / "images"
    if not folder.is_dir():
        raise FileNotFoundError(f"phototourism: {folder} is no folder; {_SOURCES}")
    files = sorted(p.name for p in folder.iterdir())
    names = tuple(n for n in files if n[:1] != "." and n.lower().endswith(ENDINGS))
    if not names:
        raise ValueError(f"phototourism: {folder} holds no image; {_SOURCES}")
    arrays = _arrays(root, len(names))
    camera = partial(_camera, arrays, names, options)
    if not options.skip_bad:
        for row in range(len(names)):
            camera(row)
    memory = Memory(_MEMORY)

    def read(row: int) -> Photo:
        without = camera(row)
        size = arrays["res_mats"][row].tolist() if "res_mats" in arrays else None
        pixels = _pixels(folder, names[row], row, size, options.shrink, memory)
        return replace(without, image=torch.from_numpy(pixels).float() / 255)

    photos = TaskSet(read, names)
    photos = readable(photos) if options.skip_bad else photos
    if not len(photos):
        raise ValueError(f"phototourism: none of the {len(names)} photos in {root} can be read")
    return photos


def shape(options: Phototourism) -> Shape:
    """A point in the scaled world -> raw colour and density."""
    return Shape(3, 4, "world", False)


def _arrays(root: Path, count: int) -> dict[str, np.ndarray]:
    """The arrays beside the images, of their lengths and shapes."""
    arrays = {}
    needed = {"c2w_mats": (4, 4), "kinv_mats": (3, 3), "bds": (2,), "res_mats": (2,)}
    for name, accepted in needed.items():
        path = root / f"{name}.npy"
        if name == "res_mats" and not path.exists():
            continue
        try:
            array = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"phototourism: {path} is absent; {_SOURCES}") from error
        except DAMAGE as error:
            came = f"{path} is no readable .npy ({one_line(error)})"
            raise ValueError(f"phototourism: {came}; {_SOURCES}") from error
        wanted = (count, *accepted)
        if (
            not isinstance(array, np.ndarray)
            or array.shape != wanted
            or array.dtype.kind not in "fiu"
        ):
            came = f"{path} is {getattr(array, 'dtype', 'no array')} {np.shape(array)}"
            raise ValueError(f"phototourism: {came}; accepted for {count} images is {wanted}")
        arrays[name] = array
    return arrays


def _camera(
    arrays: dict[str, np.ndarray], names: Sequence[str], options: Phototourism, row: int
) -> Photo:
    """A photo without its pixels: world × world_scale, bounds × factors × world_scale; a block of
    s pixels is seen along its middle, ``K⁻¹ (s i + (s − 1)/2, s j + (s − 1)/2, 1)``."""
    where = f"phototourism: {names[row]}"
    pose = check_poses(where, arrays["c2w_mats"][row : row + 1])[0]
    pose[:3, 3] *= options.world_scale
    kinv = check_kinv(where, arrays["kinv_mats"][row : row + 1])[0]
    factors = (options.near_factor * options.world_scale, options.far_factor * options.world_scale)
    near, far = (float(b) * f for b, f in zip(arrays["bds"][row], factors, strict=True))
    if not 0 < near < far < math.inf:
        came = f"near is {near:g}, far is {far:g} (bds times factors)"
        raise ValueError(f"{where}: {came}; accepted are finite numbers, 0 < near < far")
    return Photo(torch.zeros(0, 0, 3), pose, _reduced_kinv(kinv, options.shrink), near, far)


def _pixels(
    folder: Path, name: str, row: int, size: list | None, shrink: int, memory: Memory
) -> np.ndarray:
    """uint8 [H,W,3], reduced; the pixels as they are stored, whatever EXIF says: so were the
    cameras found."""
    held = memory.held.get(row)
    if held is not None:
        return held

    def use(image: Any) -> tuple[Any, int, int]:
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode}, accepted are 8 bits a channel")
        return image.convert("RGB"), image.height, image.width

    image, H, W = with_image(folder, name, use)
    if size not in (None, [H, W]):
        came = f"{name} has {H} x {W} pixels, res_mats.npy says {size[0]:g} x {size[1]:g}"
        raise ValueError(f"phototourism: {came}; accepted are equal sizes (height, width)")
    h, w = H // shrink * shrink, W // shrink * shrink
    if not h or not w:
        came = f"{name} has {H} x {W} pixels, shrink is {shrink}"
        raise ValueError(f"phototourism: {came}; accepted is at most the shorter side")
    pixels = np.array(image.reduce(shrink, (0, 0, w, h)))
    with memory.lock:
        if row not in memory.held and memory.used + pixels.nbytes <= memory.budget:
            memory.held[row] = pixels
            memory.used += pixels.nbytes
    return pixels


def _reduced_kinv(kinv: Tensor, factor: int) -> Tensor:
    """K⁻¹ for the coordinates of blocks: pixel ``s i + (s − 1)/2`` is the middle of block i."""
    s, middle = float(factor), (factor - 1) / 2
    blocks = torch.tensor([[s, 0.0, middle], [0.0, s, middle], [0.0, 0.0, 1.0]])
    return (kinv.double() @ blocks.double()).float()


# Batches and pictures


def march(options: Phototourism) -> March:
    """How rays are sampled and composited under these options: no background."""
    return March(options.samples, options.last_interval, False, options.density)


def learn(
    items: Sequence[Photo],
    options: Phototourism,
    net: MLP,
    seeds: Tensor,
    per_step: int | None = None,
) -> Batch:
    """Every ray of each photo: y [T,R,3], R = H · W, ragged where sizes differ.

    Args:
        seeds: [T] int64, of the draws of rays and of the jitter along them.
        per_step: rays drawn anew at each inner step; None: all.
    """
    seen = [_seen(item, slice(None), slice(None)) for item in items]
    return ray_batch(seen, march(options), per_step=per_step, seed=seeds)


def observe(
    items: Sequence[Photo],
    options: Phototourism,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """The left half is fitted, the right half is the query, every second row and column of both; no
    jitter in the query.

    Raises:
        ValueError: a count, which this kind has none of; a photo less than two pixels wide.
    """
    not_counted("phototourism", count)
    halves = []
    for item in items:
        half = item.image.shape[1] // 2
        if not half:
            raise ValueError("phototourism: a photo is 1 pixel wide; accepted are 2 and more")
        second = slice(None, None, 2)
        left = _seen(item, second, slice(0, half, 2))
        halves.append((left, _seen(item, second, slice(half, None, 2))))
    support, rest = zip(*halves, strict=True)
    query = ray_batch(rest, march(options))
    return ray_batch(support, march(options), per_step=per_step, seed=seeds, query=query)


def _seen(item: Photo, rows: slice, columns: slice) -> Seen:
    """What a photo shows at some of its rows and columns."""
    size = (item.image.shape[0], item.image.shape[1])
    rays = rays_from_kinv(*size, item.kinv, item.pose)
    o, d = (v.unflatten(0, size)[rows, columns].reshape(-1, 3) for v in rays)
    return Seen(o, d, item.image[rows, columns].reshape(-1, 3), item.near, item.far)


def picture(net: MLP, params: Tensor, item: Photo, options: Phototourism, **how: Any) -> Tensor:
    """[H,W,3] in [0,1]: the whole photo, ``picture_size`` at most, rendered from parameters [P]."""
    small = _small(item, options.picture_size)
    return render_photo(net, params, small, march(options), **how)[0].clamp(0, 1)


def truth(item: Photo, options: Phototourism) -> Tensor:
    """[H,W,3]: the photo, ``picture_size`` at most."""
    return _small(item, options.picture_size).image


def _small(item: Photo, largest: int | None) -> Photo:
    """The photo, reduced by the least whole factor that brings it to a size; rays stay true."""
    H, W = item.image.shape[:2]
    s = 1 if largest is None else min(H, W, math.ceil(max(H, W) / largest))
    blocks = item.image[: H // s * s, : W // s * s].unflatten(1, (-1, s)).unflatten(0, (-1, s))
    return replace(item, image=blocks.mean((1, 3)), kinv=_reduced_kinv(item.kinv, s))


def render_photo(
    net: MLP, params: Tensor, item: Photo, march: March, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb [H,W,3], depth [H,W] in the scaled world, acc [H,W]) of parameters [P] by a photo's
    camera, in bounded memory; not clipped. Another pose: ``replace(item, pose=...)``."""
    size = (item.image.shape[0], item.image.shape[1])
    origins, directions = rays_from_kinv(*size, item.kinv, item.pose)
    rays = Rays(origins[None], directions[None], item.near, item.far)
    rgb, depth, acc = render_rays(net, params, rays, march, **how)
    return rgb[0].unflatten(0, size), depth[0].unflatten(0, size), acc[0].unflatten(0, size)


def blend(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """[steps,P]: ``(1 − u) θ_a + u θ_b``, u = 0 .. 1: from one photo's appearance to another's.

    Weights fitted from one start in few steps lie close together, and so do the networks between.

    Raises:
        ValueError: weights that are not two [P], fewer than 2 steps.
    """
    if first.dim() != 1 or first.shape != last.shape or steps < 2:
        came = f"weights are {tuple(first.shape)} and {tuple(last.shape)}, steps is {steps}"
        raise ValueError(f"blend: {came}; accepted are two [P] and steps >= 2")
    share = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device)
    return torch.lerp(first, last, share[:, None])
