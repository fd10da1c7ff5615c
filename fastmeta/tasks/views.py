"""Objects seen from many sides as tasks: posed views, read from files, and batches of their rays.

A task is one object: ``x`` = rays of the views it is learnt from, ``y`` = their colours, composited
along each ray; other views are held out. Source: Tancik et al. 2021, ShapeNet notebook.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..batch import Batch, March, Rays
from ..ops.mlp import mlp
from ..reference import ray_times
from ..spec import MLP
from .cameras import Seen, pinhole, ray_batch, render_rays
from .chairs import chairs_folder
from .files import Memory
from .scenes import SOURCES, Described, Source, open_folder, open_npz
from .sets import Shape, TaskSet, at_least, by_part, fill, readable, split

COUNTED, METRIC, PLANAR = "views", "psnr", False
_MEMORY = 2 << 30  # bytes of decoded views that are held


@dataclass(frozen=True)
class Views:
    """Objects, each a task, seen from many sides by cameras whose poses are known."""

    size: int | None = None
    """width of the views in pixels, heights in proportion; none: as they are stored"""
    near: float = 2.0
    """where rays begin, in units of their directions"""
    far: float = 6.0
    """where rays end"""
    learn_views: int = 25
    """views 0 .. n - 1 are learnt from, the others held out; scenes with a transforms_train.json
    say so themselves"""
    held_out_views: int | None = None
    """how many of the held-out views are read and scored, from the first; none: all"""
    samples: int = 128
    """points on a ray"""
    last_interval: float = 1e-3
    """the length that the last point on a ray stands for"""
    white_background: bool = True
    """a ray that meets nothing is white"""
    density: Literal["relu", "softplus"] = "relu"
    """what makes densities positive: relu is the paper's, and can die; softplus cannot"""
    validation: float = 0.1
    """share of the objects for validation, where the data has no such part"""
    test: float = 0.1
    """share held out for `fastmeta eval`, where the data has no such part"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part"""
    skip_bad: bool = False
    """leave out objects that cannot be read, naming them, instead of stopping"""

    def __post_init__(self) -> None:
        at_least("views", self, 1, "size", "learn_views", "held_out_views")
        at_least("views", self, 2, "samples")
        if not 0 <= self.near < self.far < math.inf:
            came = f"near is {self.near}, far is {self.far}"
            raise ValueError(f"views: {came}; accepted are finite numbers, 0 <= near < far")
        check_march("views", self.last_interval, self.density)


def check_march(kind: str, last_interval: float, density: str) -> None:
    """What ``March`` refuses, under the name of the kind of signal."""
    try:
        March(last_interval=last_interval, density=density)
    except ValueError as error:
        raise ValueError(f"{kind}: {str(error).removeprefix('March: ')}") from error


@dataclass(frozen=True, eq=False)
class Scene:
    """One object.

    Args:
        images: [V,H,W,3] float32 in [0,1], on white.
        poses: camera-to-world [V,4,4].
        focal: in pixels.
        near, far: bounds of the rays.
        learn: how many views, the first ones, are learnt from; the others are held out.
    """

    images: Tensor
    poses: Tensor
    focal: float
    near: float
    far: float
    learn: int


# Sets


def open_splits(source: Any, options: Views, seed: int = 0) -> tuple[TaskSet, TaskSet, TaskSet]:
    """(train, validation, test) of a source's objects: its own parts where it has them, else
    ``sets.split``.

    A folder brings its own parts in one ``*_splits.json`` with lists "train", "val" and "test", a
    .npz in ``n_train`` and ``n_val``, the rest being test. An absent part is split off from train
    by its share; of "val" without "test", the given objects become the test part, since they are
    the ones that are reported, and validation is split off from train.

    Raises:
        ValueError, OSError: as ``open_all``; a splits file that names what is not there.
    """
    tasks, places = _open(source, options)
    shares: dict[str, Any] = {
        "validation": options.validation,
        "test": options.test,
        "seed": seed,
        "group": options.group,
    }
    if places is None:
        return split(tasks, **shares)
    train, validation, test = by_part(tasks, places)
    if not len(test):
        validation, test = test, validation
    return fill(train, validation, test, **shares)


def open_all(source: Any, options: Views) -> TaskSet:
    """The objects of a folder or a .npz; views are read when an object is asked for, and held
    decoded up to 2 GiB.

    Args:
        source: "chairs" (made from Debian's furniture on first use, ``chairs.make_chairs``;
            ./chairs for such a folder); a folder of objects, each with ``transforms.json``
            (camera_angle_x; frames with file_path and transform_matrix) and its images; or, as
            nerf_synthetic has it, with ``transforms_train.json`` (learnt from), ``_val`` and
            ``_test`` (held out); such an object itself; or a .npz: images [n,V,H,W,3 or 4] uint8,
            poses [n,V,4,4], camera_angle_x (one or [n]), and if there names [n], n_train, n_val.

    Raises:
        ValueError, OSError: nothing there, damaged files, poses that are none, paths that leave the
            folder of an object; and on reading an object damaged images, views of different sizes.
            With ``skip_bad`` these objects are left out: all are read once then.
    """
    return _open(source, options)[0]


def shape(options: Views) -> Shape:
    """A point in the world -> raw colour and density."""
    return Shape(3, 4, "world", False)


def _open(source: Any, options: Views) -> tuple[TaskSet, list[int | None] | None]:
    """The set, and the part of each object where the source says."""
    if isinstance(source, str) and source == "chairs":
        source = chairs_folder()
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"views: source is a {type(source).__name__}; {SOURCES}")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"views: {path} does not exist; {SOURCES}")
    if not path.is_dir() and path.suffix.lower() != ".npz":
        raise ValueError(f"views: {path} is neither a folder nor a .npz; {SOURCES}")
    found = open_folder(path, options) if path.is_dir() else open_npz(path, options)
    rows = range(len(found.names))
    objects = {} if options.skip_bad else {row: found.describe(row) for row in rows}
    memory = Memory(_MEMORY)

    def read(row: int) -> Scene:
        if row not in objects:
            objects[row] = found.describe(row)
        return _scene(found, row, objects[row], options, memory)

    tasks = TaskSet(read, found.names)
    if options.skip_bad:
        tasks = readable(tasks)
    if not len(tasks):
        raise ValueError(f"views: none of the {len(rows)} objects in {path} can be read")
    places = found.places
    return tasks, None if places is None else [places.get(name) for name in tasks.names]


def _scene(found: Source, row: int, known: Described, options: Views, memory: Memory) -> Scene:
    pixels = memory.held.get(row)  # [V,H,W,3 or 4]
    if pixels is None:
        pixels = _stacked(found.pixels(row, known), found.names[row], options.size)
        with memory.lock:
            if row not in memory.held and memory.used + pixels.nbytes <= memory.budget:
                memory.held[row] = pixels
                memory.used += pixels.nbytes
    images = torch.from_numpy(pixels).float() / 255
    if images.shape[-1] == 4:
        images = images[..., :3] * images[..., 3:] + (1 - images[..., 3:])
    focal = images.shape[2] / 2 / math.tan(known.angle / 2)
    return Scene(images, known.poses, focal, options.near, options.far, known.learn)


def _stacked(views: list[np.ndarray], name: str, width: int | None) -> np.ndarray:
    """[V,H,W,3 or 4] of views of one size."""
    first = views[0].shape[:2]
    for n, view in enumerate(views):
        if view.shape[:2] != first:
            came = f"view {n} of {name} is {view.shape[:2]}, view 0 is {first} (height, width)"
            raise ValueError(f"views: {came}; all views of an object must agree")
    return np.stack([_sized(view, width) for view in views])


def _sized(view: np.ndarray, width: int | None) -> np.ndarray:
    """uint8 [h,w,c] at a width (Lanczos, colours weighted by alpha)."""
    from PIL import Image

    h, w = view.shape[:2]
    if width is None or width == w:
        return np.ascontiguousarray(view)
    size = (width, max(1, round(h * width / w)))
    return np.asarray(Image.fromarray(view).resize(size, Image.Resampling.LANCZOS))


# Batches and pictures


def march(options: Views) -> March:
    """How rays are sampled and composited under these options."""
    return March(options.samples, options.last_interval, options.white_background, options.density)


def learn(
    items: Sequence[Scene],
    options: Views,
    net: MLP,
    seeds: Tensor,
    per_step: int | None = None,
) -> Batch:
    """Every ray of the views that are learnt from: y [T,R,3], R = views · H · W.

    Args:
        seeds: [T] int64, of the draws of rays and of the jitter along them.
        per_step: rays drawn anew at each inner step; None: all.
    """
    seen = [_seen(item, list(range(item.learn))) for item in items]
    return ray_batch(seen, march(options), per_step=per_step, seed=seeds)


def observe(
    items: Sequence[Scene],
    options: Views,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """``count`` of the views that are learnt from, drawn by the task's seed (None: all); the query
    is every held-out view, without jitter. Fewer views of one seed are among its more.

    Raises:
        ValueError: count above the number of views to learn from, or below 1.
    """
    least = min(item.learn for item in items)
    if count is not None and not 1 <= count <= least:
        raise ValueError(f"views: count is {count}; accepted are 1 to {least} views, and None")
    seen = []
    for item, seed in zip(items, seeds.split(1), strict=True):
        order = rng.uniform(seed, item.learn, 0, rng.VIEWS)[0].argsort(stable=True)
        seen.append(_seen(item, sorted(order[:count].tolist())))
    held_out = [_seen(item, list(range(item.learn, len(item.images)))) for item in items]
    query = ray_batch(held_out, march(options))
    return ray_batch(seen, march(options), per_step=per_step, seed=seeds, query=query)


def _seen(item: Scene, views: list[int]) -> Seen:
    images = item.images[views]  # [v,H,W,3]
    H, W = images.shape[1:3]
    origins, directions = pinhole(H, W, item.focal, item.poses[views])  # [v,H*W,3]
    colours = images.reshape(-1, 3)
    return Seen(origins.flatten(0, 1), directions.flatten(0, 1), colours, item.near, item.far)


def picture(net: MLP, params: Tensor, item: Scene, options: Views, **how: Any) -> Tensor:
    """[H,W,3] in [0,1]: the first held-out view, rendered from parameters [P]."""
    H, W = item.images.shape[1:3]
    pose, bounds = item.poses[item.learn], (item.near, item.far)
    view = render_view(net, params, pose, H, W, item.focal, *bounds, march(options), **how)
    return view[0].clamp(0, 1)


def truth(item: Scene, options: Views) -> Tensor:
    """[H,W,3]: the first held-out view."""
    return item.images[item.learn]


def render_view(
    net: MLP,
    params: Tensor,
    pose: Tensor,
    height: int,
    width: int,
    focal: float,
    near: float,
    far: float,
    march: March,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rgb [H,W,3], depth [H,W], acc [H,W]) of parameters [P] from one pose [4,4], in bounded
    memory; not clipped, no jitter, no gradient. Arguments as ``pinhole``, ``Rays`` and
    ``render_rays``."""
    origins, directions = pinhole(height, width, focal, pose)
    rays = Rays(origins[None], directions[None], near, far)
    rgb, depth, acc = render_rays(net, params, rays, march, **how)
    size = (height, width)
    return rgb[0].unflatten(0, size), depth[0].unflatten(0, size), acc[0].unflatten(0, size)


def alive(
    net: MLP, params: Tensor, data: Batch | Rays, march: March, *, most: int = 256, **how: Any
) -> float:
    """The share of samples whose density is above 0: at 0 nothing is drawn, and ReLU densities
    have no gradient that could change it. 1 for softplus.

    Args:
        params: [P] or [T,P].
        data: rays, or a batch of them.
        most: at most so many rays of each task are looked at, evenly spaced.
        how: impl, precision.
    """
    rays, counts = (data.x, data.counts) if isinstance(data, Batch) else (data, None)
    if not isinstance(rays, Rays):
        raise ValueError(
            "alive: the batch has points, not rays; accepted are Rays and such a Batch"
        )
    T, R = rays.origins.shape[:2]
    upper = torch.full((T,), R) if counts is None else counts.cpu()
    looked = min(most, int(upper.min()))
    index = (torch.arange(looked) * upper[:, None] // looked).to(rays.origins.device)  # [T,looked]
    o, d = (
        v.gather(1, index[..., None].expand(-1, -1, 3)) for v in (rays.origins, rays.directions)
    )
    some = Rays(o, d, rays.near, rays.far).to(params.device, params.dtype)
    t = ray_times(some, march, None, 0)  # [T,looked,S]
    x = some.origins[:, :, None] + t[..., None] * some.directions[:, :, None]
    raw = mlp(net, params.detach(), x.flatten(1, 2), **how)[..., 3]  # [T,looked*S]
    above = torch.ones_like(raw) if march.density == "softplus" else raw > 0
    return float(above.double().mean())
