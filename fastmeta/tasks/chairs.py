"""Chairs made on this machine: Debian's furniture models, rendered as posed photos of objects.

Each chair is centred, scaled into a ball of radius 1.25, z up, its front towards −y, and drawn from
cameras that look at it from a sphere of radius 4. The folders written are those of the paper's
ShapeNet data (Tancik et al. 2021, ShapeNet notebook): ``<object>/transforms.json``, ``r_000.png``
... (RGBA), ``chair_splits.json``; and ATTRIBUTION.tsv, which the models' licences ask for.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import rng
from .arrays import DAMAGE, one_line
from .meshes import CAMERA_ANGLE_X, Mesh, draw, read_obj
from .sets import TaskSet, split

MODELS = Path("/usr/share/sweethome3d/furniture")
PACKAGE = "sweethome3d-furniture"  # 1.8-1 in Debian 12: 61 chairs, CC0 and CC BY 3.0
RADIUS = 4.0  # of the sphere the cameras are on
BALL = 1.25  # of the ball that holds an object: 58 of 64 pixels across
_HEIGHTS = (-0.25, 0.95)  # of cameras, in radii: from a little below the seat to almost above
_LARGEST = 150.0  # cm; wider or deeper are loungers, and a car called Seat
_WORDS = re.compile(r"\b(arm)?(chair|stool|seat)s?\b", re.IGNORECASE)
_CATALOGUE = "PluginFurnitureCatalog.properties"


class Model(NamedTuple):
    """A chair of a catalogue: its name here, what the catalogue says, and where its model is."""

    name: str
    title: str
    author: str
    licence: str
    archive: Path
    member: str
    rotation: str | None

    @property
    def source(self) -> str:
        return f"{self.archive.name}:/{self.member}"


def chairs_folder() -> Path:
    """Where the chairs are: fastmeta/chairs-64 in XDG_CACHE_HOME (~/.cache), made on first use.

    64 × 64 pixels, 30 views, seed 0; about half a minute on one core. Errors as
    ``make_chairs``.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    folder = root / "fastmeta" / "chairs-64"
    if not folder.is_dir():
        try:
            make_chairs(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def make_chairs(
    out: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    size: int = 64,
    views: int = 30,
    seed: int = 0,
) -> Path:
    """Render every chair of the installed furniture models; returns ``out``.

    The folder appears when it is complete. Views are a function of (seed, object's name, view), the
    split one of (seed, name): 80 % train, 10 % val, 10 % test.

    Args:
        out: a folder that does not exist yet.
        source: a folder of .sh3f archives, or one; None: where Debian's package puts them.
        size: pixels along each edge.
        views: pictures of each chair.

    Raises:
        FileNotFoundError: no models; the message names the package that brings them.
        FileExistsError: ``out`` is there. ValueError, OSError: a damaged archive, a number out of
            range, a folder that cannot be written.
    """
    for what, number in (("size", size), ("views", views)):
        if not isinstance(number, int) or not 1 <= number <= 1000:
            raise ValueError(f"chairs: {what} is {number!r}; accepted are integers from 1 to 1000")
    out = Path(out).expanduser()
    if os.path.lexists(out):
        raise FileExistsError(f"chairs: {out} exists; accepted is a new folder")
    models = chair_models(source)
    beside = out.parent / f".fastmeta-{uuid.uuid4().hex}.tmp"
    try:
        beside.mkdir(parents=True)
        _write_all(beside, models, size, views, seed)
        os.rename(beside, out)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise type(error)(f"chairs: {out} cannot be written ({one_line(error)})") from error
        raise
    return out


def _write_all(folder: Path, models: list[Model], size: int, views: int, seed: int) -> None:
    from tqdm import tqdm

    for model in tqdm(models, "rendering chairs", unit="chair", disable=None):
        _write(folder / model.name, model, size, views, seed)
    tasks = TaskSet(lambda row: row, tuple(m.name for m in models))
    parts = split(tasks, validation=0.1, test=0.1, seed=seed)
    lists = {key: part.names for key, part in zip(("train", "val", "test"), parts, strict=True)}
    (folder / "chair_splits.json").write_text(json.dumps(lists, indent=1), encoding="utf-8")
    rows = [("object", "name", "author", "licence", f"model in {PACKAGE}, rendered")]
    rows += [(m.name, m.title, m.author, m.licence, m.source) for m in models]
    table = "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows)
    (folder / "ATTRIBUTION.tsv").write_text(table, encoding="utf-8")


def _write(folder: Path, model: Model, size: int, views: int, seed: int) -> None:
    """One object's pictures and transforms.json."""
    from PIL import Image

    mesh = read_model(model)
    folder.mkdir()
    frames = []
    for view, pose in enumerate(orbit(model.name, views, seed)):
        name = f"r_{view:03d}"
        Image.fromarray(draw(mesh, pose, size)).save(folder / f"{name}.png")
        frames.append({"file_path": f"./{name}", "transform_matrix": pose.tolist()})
    transforms = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(transforms), encoding="utf-8")


def orbit(name: str, views: int, seed: int) -> np.ndarray:
    """[views,4,4] camera-to-world (OpenGL), looking at the origin from a sphere of radius 4.

    Azimuth uniform, height uniform in [−1, 3.8]; view i is a function of (seed, name, i).
    """
    key = torch.tensor([((seed + 2**63) % 2**64) - 2**63])
    number = zlib.crc32(name.encode())
    draws = rng.uniform(key, 2 * views, number, rng.VIEWS, torch.float64).view(views, 2).numpy()
    azimuth = 2 * math.pi * draws[:, 0]
    z = _HEIGHTS[0] + (_HEIGHTS[1] - _HEIGHTS[0]) * draws[:, 1]
    level, none = np.sqrt(1 - z * z), np.zeros(views)
    back = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), z], 1)  # [views,3]
    right = np.stack([-np.sin(azimuth), np.cos(azimuth), none], 1)
    poses = np.tile(np.eye(4), (views, 1, 1))
    poses[:, :3] = np.stack([right, np.cross(back, right), back, RADIUS * back], 2)
    return poses


# The catalogue


def chair_models(source: str | os.PathLike | None = None) -> list[Model]:
    """The chairs of the archives, by name.

    A piece of furniture is one where a word of its English name is chair, armchair, stool or seat
    (or ends so), and where it is at most 150 cm wide and deep. In version 1.8-1 these are 61.

    Raises:
        FileNotFoundError: no archive. ValueError: a damaged one, or no chair in them.
    """
    root = MODELS if source is None else Path(source).expanduser()
    archives = sorted(root.glob("*.sh3f")) if root.is_dir() else [root] if root.is_file() else []
    if not archives:
        accepted = f"Debian's package {PACKAGE} brings it (apt install {PACKAGE})"
        other = "or give --data a folder of objects, each with transforms.json and its pictures"
        raise FileNotFoundError(f"chairs: {root} holds no furniture (.sh3f); {accepted}; {other}")
    found = {model.name: model for archive in archives for model in _catalogue(archive)}
    if not found:
        accepted = "accepted are names with chair, armchair, stool or seat"
        raise ValueError(f"chairs: the catalogues in {root} list no chair; {accepted}")
    return [found[name] for name in sorted(found)]


def _catalogue(archive: Path) -> list[Model]:
    content = _member(archive, _CATALOGUE)
    if content is None:
        raise ValueError(f"chairs: {archive} has no {_CATALOGUE}; accepted are furniture libraries")
    text = content.decode("latin-1")  # Java's, with escapes for the rest
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    whole = dict(re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)\s*$", text, re.MULTILINE))
    pieces: dict[str, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)[ \t]*=[ \t]*(.*?)\s*$", text, re.MULTILINE):
        pieces.setdefault(number, {})[key] = value
    licence = whole.get("license", "not stated")
    models = []
    for number, piece in pieces.items():
        try:
            wide = max(float(piece["width"]), float(piece["depth"]))
            title, member = piece["name"], piece["model"].lstrip("/")
        except (KeyError, ValueError) as error:
            raise ValueError(f"chairs: piece {number} in {archive} is damaged ({error})") from None
        if _WORDS.search(title) and wide <= _LARGEST and member.lower().endswith(".obj"):
            name = re.sub(r"[^a-z0-9_-]+", "_", member.rpartition("/")[0].lower())
            author = piece.get("creator", "not stated")
            rotation = piece.get("modelRotation")
            models.append(Model(name, title, author, licence, archive, member, rotation))
    return models


def _member(archive: Path, name: str) -> bytes | None:
    """A file of an archive; None where it is not in it."""
    try:
        with zipfile.ZipFile(archive) as file:
            return file.read(name) if name in file.namelist() else None
    except DAMAGE as error:
        raise ValueError(
            f"chairs: {name} in {archive} cannot be read ({one_line(error)})"
        ) from error


# Models


def read_model(model: Model) -> Mesh:
    """A model's triangles, z up, centred by its box, scaled into a ball of radius 1.25.

    The catalogue's rotation is applied; less than half opaque materials (glass) are left out.
    """
    folder = model.member.rpartition("/")[0]
    content = _member(model.archive, model.member)
    if content is None:
        raise ValueError(f"chairs: {model.source} is missing; accepted are whole archives")
    try:
        fetch = partial(_beside, model.archive, folder)
        mesh = read_obj(content.decode("latin-1"), fetch)
        turn = np.eye(3)
        if model.rotation is not None:
            turn = np.array([float(v) for v in model.rotation.split()]).reshape(3, 3)
    except (ValueError, IndexError) as error:
        raise ValueError(f"chairs: {model.source} is damaged ({one_line(error)})") from error
    corners = mesh.corners @ turn.T @ np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, −z, y)
    corners = corners - (corners.min((0, 1)) + corners.max((0, 1))) / 2
    radius = np.linalg.norm(corners, axis=2).max()
    if not (0 < radius < math.inf):
        raise ValueError(f"chairs: {model.source} is damaged (no extent)")
    return replace(mesh, corners=corners * (BALL / radius))


def _beside(archive: Path, folder: str, name: str) -> bytes | None:
    return _member(archive, f"{folder}/{name}".lstrip("/"))
