"""Objects seen from many sides as tasks: posed views, read from files, and batches of their rays.

A task is one object: ``x`` = rays of the views it is learnt from, ``y`` = their colours, composited
along each ray; other views are held out. Source: Tancik et al. 2021, ShapeNet notebook.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import warnings
import zipfile
from collections.abc import Callable, Sequence
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
from .cameras import Seen, check_poses, pinhole, ray_batch, render_rays
from .files import _DAMAGE, _ENDINGS, Memory, _line, _npy_head, _with_image
from .sets import Shape, TaskSet, at_least, by_part, fill, readable, split

COUNTED, METRIC, PLANAR = "views", "psnr", False
_MEMORY = 2 << 30  # bytes of decoded views that are held
_OWN_SPLIT = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
_SOURCES = (
    "accepted are a folder with transforms.json or transforms_train.json, a folder of such "
    "folders, and a .npz of images, poses and camera_angle_x"
)
_ARRAYS = ("images", "poses", "camera_angle_x", "names", "n_train", "n_val")


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
        source: a folder of objects, each with ``transforms.json`` (camera_angle_x; frames with
            file_path and transform_matrix) and its images; or, as nerf_synthetic has it, with
            ``transforms_train.json`` (learnt from), ``_val`` and ``_test`` (held out); such an
            object itself; or a .npz: images [n,V,H,W,3 or 4] uint8, poses [n,V,4,4],
            camera_angle_x (one or [n]), and if there names [n], n_train, n_val.

    Raises:
        ValueError, OSError: nothing there, damaged files, poses that are none, paths that leave the
            folder of an object; and on reading an object damaged images, views of different sizes.
            With ``skip_bad`` these objects are left out: all are read once then.
    """
    return _open(source, options)[0]


def shape(options: Views) -> Shape:
    """A point in the world -> raw colour and density."""
    return Shape(3, 4, "world", False)


@dataclass(frozen=True, eq=False)
class _Object:
    """What is known before pixels are read."""

    files: tuple[str, ...]  # below the object's folder; of a .npz empty
    poses: Tensor  # [V,4,4]
    angle: float  # camera_angle_x
    learn: int


@dataclass(frozen=True, eq=False)
class _Source:
    names: tuple[str, ...]
    describe: Callable[[int], _Object]
    pixels: Callable[[int, _Object], list[np.ndarray]]  # V times uint8 [H,W,3 or 4]
    places: dict[str, int] | None  # name -> 0 train, 1 validation, 2 test


def _open(source: Any, options: Views) -> tuple[TaskSet, list[int | None] | None]:
    """The set, and the part of each object where the source says."""
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"views: source is a {type(source).__name__}; {_SOURCES}")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"views: {path} does not exist; {_SOURCES}")
    if not path.is_dir() and path.suffix.lower() != ".npz":
        raise ValueError(f"views: {path} is neither a folder nor a .npz; {_SOURCES}")
    found = _folder(path, options) if path.is_dir() else _npz(path, options)
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


def _scene(found: _Source, row: int, known: _Object, options: Views, memory: Memory) -> Scene:
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


def _object(
    name: str, files: Sequence[str], poses: Any, angle: Any, learn: int, options: Views
) -> _Object:
    """Checked, and cut to the views that are used."""
    checked = check_poses(f"views: {name}", poses)
    V = len(checked)
    if learn >= V:
        came = f"{name} has {V} views, {learn} of them are to be learnt from"
        raise ValueError(f"views: {came}; accepted are fewer, so that one is held out")
    if not isinstance(angle, (int, float, np.number)) or not 0 < angle < math.pi:
        came = f"camera_angle_x of {name} is {angle!r}"
        raise ValueError(f"views: {came}; accepted are radians above 0 and below pi")
    used = V if options.held_out_views is None else min(V, learn + options.held_out_views)
    return _Object(tuple(files[:used]), checked[:used], float(angle), learn)


# Folders


def _folder(root: Path, options: Views) -> _Source:
    single = _is_object(root)
    folders = [root.resolve()] if single else sorted(p for p in root.iterdir() if p.is_dir())
    if not any(map(_is_object, folders)):
        arrays = sorted(p.name for p in root.glob("*.npz"))
        hint = f"; {arrays[0]} in it can be given by its own path" if arrays else ""
        raise ValueError(f"views: {root} holds no object; {_SOURCES}{hint}")
    folders = [p for p in folders if p.name[:1] != "." and (_is_object(p) or _has_images(p))]
    names = tuple(p.name for p in folders)

    def describe(row: int) -> _Object:
        return _described(folders[row], names[row], options)

    def pixels(row: int, known: _Object) -> list[np.ndarray]:
        above = folders[row].parent
        return [_with_image(above, f"{names[row]}/{file}", _rgba) for file in known.files]

    return _Source(names, describe, pixels, None if single else _parts(root, names, options))


def _is_object(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("transforms.json", _OWN_SPLIT[0]))


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in _ENDINGS for p in folder.iterdir())


def _described(folder: Path, name: str, options: Views) -> _Object:
    own = (folder / _OWN_SPLIT[0]).exists()
    listed = [f for f in _OWN_SPLIT if (folder / f).exists()] if own else ["transforms.json"]
    parts = [_frames(folder, name, file) for file in listed]
    angles = [angle for angle, _, _ in parts]
    if angles.count(angles[0]) != len(angles):
        came = f"{name} has camera_angle_x {', '.join(map(str, angles))}"
        raise ValueError(f"views: {came}; {', '.join(listed)} must agree")
    files = [file for _, some, _ in parts for file in some]
    poses = [pose for _, _, some in parts for pose in some]
    learn = len(parts[0][1]) if own else options.learn_views
    return _object(name, files, poses, angles[0], learn, options)


def _frames(folder: Path, name: str, file: str) -> tuple[Any, list[str], list[Any]]:
    """(camera_angle_x, files, matrices) of one transforms file."""
    where, content = f"{name}/{file}", _json(folder / file, f"{name}/{file}")
    try:
        angle, frames = content["camera_angle_x"], content["frames"]
        paths = [frame["file_path"] for frame in frames]
        matrices = [frame["transform_matrix"] for frame in frames]
    except (KeyError, TypeError) as error:
        accepted = "camera_angle_x and frames, each with file_path and transform_matrix"
        came = f"{where} lacks what it needs ({type(error).__name__}: {_line(error)})"
        raise ValueError(f"views: {came}; accepted are {accepted}") from error
    return angle, [_inside(path, where) for path in paths], matrices


def _inside(path: Any, where: str) -> str:
    """A frame's file below the folder of its object, with its ending."""
    clean = posixpath.normpath(path) if isinstance(path, str) and path else ".."
    if clean.startswith(("..", "/")) or any(c in clean for c in "\\\0:"):
        accepted = "accepted are relative paths that stay in it"
        raise ValueError(f"views: {where} has file_path {path!r}, outside its folder; {accepted}")
    return clean if clean.lower().endswith(_ENDINGS) else f"{clean}.png"


def _json(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"views: {where} is absent; {_SOURCES}") from error
    except (OSError, ValueError, RecursionError) as error:
        came = f"{where} is no readable JSON ({_line(error)})"
        raise ValueError(f"views: {came}; accepted is a whole JSON file") from error


def _parts(root: Path, names: tuple[str, ...], options: Views) -> dict[str, int] | None:
    """Name -> part by the folder's ``*_splits.json``; None where there is none."""
    files = sorted(root.glob("*_splits.json"))
    if not files:
        return None
    where = files[0].name
    if len(files) > 1:
        raise ValueError(f"views: {root} holds {len(files)} splits files; accepted is one")
    lists = _json(files[0], where)
    lists = lists if isinstance(lists, dict) else {}
    parts = [lists.get(key, []) for key in ("train", "val", "test")]
    listed = [name for part in parts if isinstance(part, list) for name in part]
    if not listed or not all(isinstance(name, str) for name in listed):
        accepted = 'accepted are lists of names: "train", "val", "test"'
        raise ValueError(f"views: {where} lists no objects; {accepted}")
    gone = sorted(set(listed) - set(names))
    if gone and not options.skip_bad:
        came = f"{where} names {gone[0]!r} ({len(gone)} such)"
        raise ValueError(f"views: {came}; accepted are folders of objects beside it")
    if gone:
        left = f"{where} names {len(gone)} objects that are not there"
        warnings.warn(f"views: {left}: {', '.join(gone)}", stacklevel=2)
    return {name: k for k, part in reversed(list(enumerate(parts))) for name in part}


def _rgba(image: Any) -> np.ndarray:
    """uint8 [h,w,4] of 8-bit images."""
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode}, accepted are 8 bits a channel")
    return np.asarray(image.convert("RGBA"))


# Arrays


def _npz(path: Path, options: Views) -> _Source:
    arrays = _load_npz(path)
    images, poses, angle = (arrays[key] for key in _ARRAYS[:3])
    n = len(images)
    names = tuple(arrays.get("names", np.arange(n)).astype(str).tolist())
    angles = np.broadcast_to(angle, (n,)) if angle.size == 1 else angle
    lengths = {"poses": poses.shape[:2], "camera_angle_x": angles.shape, "names": (len(names),)}
    for key, came in lengths.items():
        if came != images.shape[: len(came)]:
            accepted = f"accepted for images {images.shape} is {images.shape[: len(came)]}"
            raise ValueError(f"views: {key} in {path} goes with {came} objects, views; {accepted}")

    def describe(row: int) -> _Object:
        return _object(names[row], (), poses[row], angles[row], options.learn_views, options)

    def pixels(row: int, known: _Object) -> list[np.ndarray]:
        return list(images[row, : len(known.poses)])

    return _Source(names, describe, pixels, _counted_parts(path, arrays, names))


def _counted_parts(
    path: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...]
) -> dict[str, int] | None:
    if "n_train" not in arrays:
        return None
    train, check = (arrays.get(key, np.zeros((), np.int64)) for key in ("n_train", "n_val"))
    whole = all(a.shape == () and a.dtype.kind in "iu" for a in (train, check))
    if not whole or not 1 <= train <= train + check <= len(names) or check < 0:
        came = f"n_train is {train}, n_val {check} in {path}"
        raise ValueError(f"views: {came}; accepted are integers, together at most {len(names)}")
    last = int(train) + int(check)
    return {name: (i >= int(train)) + (i >= last) for i, name in enumerate(names)}


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz that are known here; what is wrong shows in its headers."""
    try:
        with zipfile.ZipFile(path) as file:
            inside = [n for n in file.namelist() if n.removesuffix(".npy") in _ARRAYS]
            heads = {n.removesuffix(".npy"): _npy_head(file, n) for n in inside}
    except _DAMAGE as error:
        raise ValueError(f"views: {path} is no readable .npz ({_line(error)})") from error
    absent = [key for key in _ARRAYS[:3] if key not in heads]
    if absent:
        raise ValueError(f"views: {path} lacks {', '.join(absent)}; {_SOURCES}")
    pickled = [key for key, (_, dtype) in heads.items() if dtype.hasobject]
    if pickled:
        raise ValueError(f"views: {pickled[0]} in {path} is pickled; accepted are plain arrays")
    sizes, kind = heads["images"]
    if len(sizes) != 5 or sizes[4] not in (3, 4) or 0 in sizes or kind != np.uint8:
        came = f"images in {path} is {kind} {sizes}"
        raise ValueError(f"views: {came}; accepted is uint8 [n,V,H,W,C], C = 3 or 4 (alpha)")
    need = sum(math.prod(s) * dtype.itemsize for s, dtype in heads.values())
    if need > _MEMORY:
        advice = f"accepted are {_MEMORY}, since a .npz is read whole, or folders of any size"
        raise ValueError(f"views: {path} needs {need} bytes; {advice}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in heads}
    except _DAMAGE as error:
        raise ValueError(f"views: {path} is damaged ({_line(error)})") from error


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
