"""Posed views of objects on disk: the learnit and nerf_synthetic folders, and .npz.

Nothing here knows of networks or rays; ``views.py`` makes tasks of what this reads.
"""

from __future__ import annotations

import json
import math
import posixpath
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .arrays import npz_heads, one_line, read_npz
from .cameras import check_poses
from .files import ENDINGS, with_image

if TYPE_CHECKING:
    from .views import Views

_MEMORY = 2 << 30  # bytes of a .npz, which is read whole

_OWN_SPLIT = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
SOURCES = (
    "accepted are a folder with transforms.json or transforms_train.json, a folder of such "
    "folders, and a .npz of images, poses and camera_angle_x"
)
_ARRAYS = ("images", "poses", "camera_angle_x", "names", "n_train", "n_val")


@dataclass(frozen=True, eq=False)
class Described:
    """What is known before pixels are read."""

    files: tuple[str, ...]  # below the object's folder; of a .npz empty
    poses: Tensor  # [V,4,4]
    angle: float  # camera_angle_x
    learn: int


@dataclass(frozen=True, eq=False)
class Source:
    """Objects of a folder or a .npz before pixels are read, and how to read them."""

    names: tuple[str, ...]
    describe: Callable[[int], Described]
    pixels: Callable[[int, Described], list[np.ndarray]]  # V times uint8 [H,W,3 or 4]
    places: dict[str, int] | None  # name -> 0 train, 1 validation, 2 test


def described(
    name: str, files: Sequence[str], poses: Any, angle: Any, learn: int, options: Views
) -> Described:
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
    return Described(tuple(files[:used]), checked[:used], float(angle), learn)


# Folders


def open_folder(root: Path, options: Views) -> Source:
    """The objects in a folder of either layout; errors as ``views.open_all``."""
    single = _is_object(root)
    folders = [root.resolve()] if single else sorted(p for p in root.iterdir() if p.is_dir())
    if not any(map(_is_object, folders)):
        arrays = sorted(p.name for p in root.glob("*.npz"))
        hint = f"; {arrays[0]} in it can be given by its own path" if arrays else ""
        raise ValueError(f"views: {root} holds no object; {SOURCES}{hint}")
    folders = [p for p in folders if p.name[:1] != "." and (_is_object(p) or _has_images(p))]
    names = tuple(p.name for p in folders)

    def describe(row: int) -> Described:
        return _of_folder(folders[row], names[row], options)

    def pixels(row: int, known: Described) -> list[np.ndarray]:
        above = folders[row].parent
        return [with_image(above, f"{names[row]}/{file}", _rgba) for file in known.files]

    return Source(names, describe, pixels, None if single else _parts(root, names, options))


def _is_object(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("transforms.json", _OWN_SPLIT[0]))


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in ENDINGS for p in folder.iterdir())


def _of_folder(folder: Path, name: str, options: Views) -> Described:
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
    return described(name, files, poses, angles[0], learn, options)


def _frames(folder: Path, name: str, file: str) -> tuple[Any, list[str], list[Any]]:
    """(camera_angle_x, files, matrices) of one transforms file."""
    where, content = f"{name}/{file}", _json(folder / file, f"{name}/{file}")
    try:
        angle, frames = content["camera_angle_x"], content["frames"]
        paths = [frame["file_path"] for frame in frames]
        matrices = [frame["transform_matrix"] for frame in frames]
    except (KeyError, TypeError) as error:
        accepted = "camera_angle_x and frames, each with file_path and transform_matrix"
        came = f"{where} lacks what it needs ({type(error).__name__}: {one_line(error)})"
        raise ValueError(f"views: {came}; accepted are {accepted}") from error
    return angle, [_inside(path, where) for path in paths], matrices


def _inside(path: Any, where: str) -> str:
    """A frame's file below the folder of its object, with its ending."""
    clean = posixpath.normpath(path) if isinstance(path, str) and path else ".."
    if clean.startswith(("..", "/")) or any(c in clean for c in "\\\0:"):
        accepted = "accepted are relative paths that stay in it"
        raise ValueError(f"views: {where} has file_path {path!r}, outside its folder; {accepted}")
    return clean if clean.lower().endswith(ENDINGS) else f"{clean}.png"


def _json(path: Path, where: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"views: {where} is absent; {SOURCES}") from error
    except (OSError, ValueError, RecursionError) as error:
        came = f"{where} is no readable JSON ({one_line(error)})"
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


def open_npz(path: Path, options: Views) -> Source:
    """The objects in a .npz; errors as ``views.open_all``."""
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

    def describe(row: int) -> Described:
        return described(names[row], (), poses[row], angles[row], options.learn_views, options)

    def pixels(row: int, known: Described) -> list[np.ndarray]:
        return list(images[row, : len(known.poses)])

    return Source(names, describe, pixels, _counted_parts(path, arrays, names))


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
    heads = npz_heads("views", path, _ARRAYS)
    absent = [key for key in _ARRAYS[:3] if key not in heads]
    if absent:
        raise ValueError(f"views: {path} lacks {', '.join(absent)}; {SOURCES}")
    sizes, kind = heads["images"]
    if len(sizes) != 5 or sizes[4] not in (3, 4) or 0 in sizes or kind != np.uint8:
        came = f"images in {path} is {kind} {sizes}"
        raise ValueError(f"views: {came}; accepted is uint8 [n,V,H,W,C], C = 3 or 4 (alpha)")
    return read_npz("views", path, heads, _MEMORY, "accepted are folders of any size")
