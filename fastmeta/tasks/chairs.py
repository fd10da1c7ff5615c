"""Chairs made on this machine: Debian's furniture models, rendered as posed photos of objects.

Each chair is centred, scaled into a ball of radius 1.25, z up, its front towards −y, and drawn from
cameras that look at it from a sphere of radius 4. The folders written are those of the paper's
ShapeNet data (Tancik et al. 2021, ShapeNet notebook): ``<object>/transforms.json``, ``r_000.png``
... (RGBA), ``chair_splits.json``; and ATTRIBUTION.tsv, which the models' licences ask for.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import rng
from .files import _DAMAGE, _line
from .sets import TaskSet, split

MODELS = Path("/usr/share/sweethome3d/furniture")
PACKAGE = "sweethome3d-furniture"  # 1.8-1 in Debian 12: 61 chairs, CC0 and CC BY 3.0
CAMERA_ANGLE_X = 0.6911112070083618  # of the paper's data, in radians
RADIUS = 4.0  # of the sphere the cameras are on
BALL = 1.25  # of the ball that holds an object: 58 of 64 pixels across
_HEIGHTS = (-0.25, 0.95)  # of cameras, in radii: from a little below the seat to almost above
_LARGEST = 150.0  # cm; wider or deeper are loungers, and a car called Seat
_WORDS = re.compile(r"\b(arm)?(chair|stool|seat)s?\b", re.IGNORECASE)
_CATALOGUE = "PluginFurnitureCatalog.properties"
_LIGHT = np.array([0.4, -0.5, 0.77]) / np.linalg.norm([0.4, -0.5, 0.77])  # above, right, in front
_GROUND = 0.3  # the ground's light, the sky's being 1
_TEXELS = 64  # a texture is averaged down to this, about what an object's width has in pixels
_CANDIDATES = 1 << 20  # pixels tested against their triangle at a time: about 100 MB


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


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles and what they look like.

    Args:
        corners: [F,3,3] float64, where they are.
        uv: [F,3,2], where in their texture, v upwards; 0 where there is none.
        colours: [F,3] in [0,1].
        texture: [F], which of the textures multiplies the colour (as MTL has it); −1: none.
        textures: RGBA [h,w,4] in [0,1]; less than half opaque is a hole.
    """

    corners: np.ndarray
    uv: np.ndarray
    colours: np.ndarray
    texture: np.ndarray
    textures: tuple[np.ndarray, ...] = ()


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
            raise type(error)(f"chairs: {out} cannot be written ({_line(error)})") from error
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
    except _DAMAGE as error:
        raise ValueError(f"chairs: {name} in {archive} cannot be read ({_line(error)})") from error


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
        raise ValueError(f"chairs: {model.source} is damaged ({_line(error)})") from error
    corners = mesh.corners @ turn.T @ np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, −z, y)
    corners = corners - (corners.min((0, 1)) + corners.max((0, 1))) / 2
    radius = np.linalg.norm(corners, axis=2).max()
    if not (0 < radius < math.inf):
        raise ValueError(f"chairs: {model.source} is damaged (no extent)")
    return replace(mesh, corners=corners * (BALL / radius))


def _beside(archive: Path, folder: str, name: str) -> bytes | None:
    return _member(archive, f"{folder}/{name}".lstrip("/"))


def read_obj(text: str, fetch: Callable[[str], bytes | None]) -> Mesh:
    """Triangles of a Wavefront OBJ and its MTL: v, vt, f, usemtl, mtllib; Kd, d, map_Kd.

    Args:
        fetch: the content of a file that it names; None: absent (two textures of 1.8-1 are), and
            then the plain colour shows.

    Raises:
        ValueError, IndexError: numbers that are none, vertices that are not there, no face.
    """
    places: list[list[float]] = []
    marks: list[list[float]] = [[0.0, 0.0]]
    faces: list[tuple[list[int], list[int], int]] = []
    looks, names, now = [_Look()], {}, 0
    for line in text.replace("\\\n", " ").splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind == "v":
            places.append([float(v) for v in rest.split()[:3]])
        elif kind == "vt":
            marks.append([float(v) for v in rest.split()[:2]])
        elif kind == "f":
            points = [point.split("/") for point in rest.split()]
            at = [_index(p[0], len(places)) for p in points]
            uv = [1 + _index(p[1], len(marks) - 1) if len(p) > 1 and p[1] else 0 for p in points]
            for k in range(1, len(points) - 1):  # a fan
                faces.append(([at[0], at[k], at[k + 1]], [uv[0], uv[k], uv[k + 1]], now))
        elif kind == "mtllib":
            for name, look in _looks((fetch(rest.strip()) or b"").decode("latin-1")).items():
                names[name] = len(looks)
                looks.append(look)
        elif kind == "usemtl":
            now = names.get(rest.strip(), 0)
    faces = [face for face in faces if looks[face[2]].opacity >= 0.5]
    if not faces:
        raise ValueError("no face that can be seen")
    owner = np.array([face[2] for face in faces])
    contents = {file: fetch(file) for file in sorted({looks[k].texture for k in set(owner)} - {""})}
    images = {file: _texture(content) for file, content in contents.items() if content is not None}
    number = [list(images).index(k.texture) if k.texture in images else -1 for k in looks]
    return Mesh(
        np.array(places)[np.array([face[0] for face in faces])],
        np.array(marks)[np.array([face[1] for face in faces])],
        np.array([look.colour for look in looks])[owner],
        np.array(number)[owner],
        tuple(images.values()),
    )


def _index(word: str, count: int) -> int:
    """0-based, of OBJ's 1-based or, below 0, counted from the latest."""
    index = int(word)
    index = index - 1 if index > 0 else count + index
    if not 0 <= index < count:
        raise IndexError(f"{word} of {count} points")
    return index


class _Look(NamedTuple):
    """A material: diffuse colour in [0,1], opacity, the file of its texture."""

    colour: tuple[float, ...] = (0.8, 0.8, 0.8)
    opacity: float = 1.0
    texture: str = ""


def _looks(text: str) -> dict[str, _Look]:
    found: dict[str, _Look] = {}
    name = ""
    for line in text.splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind == "newmtl":
            name = rest.strip()
            found[name] = _Look()
        elif kind == "Kd" and name:
            colour = tuple(min(max(float(v), 0.0), 1.0) for v in rest.split()[:3])
            found[name] = found[name]._replace(colour=colour)
        elif kind == "d" and name:
            found[name] = found[name]._replace(opacity=float(rest.split()[-1]))
        elif kind == "map_Kd" and name:
            found[name] = found[name]._replace(texture=rest.strip())
    return found


def _texture(content: bytes) -> np.ndarray:
    """RGBA [h,w,4] in [0,1], at most 64 × 64."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content)).convert("RGBA")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damage
        raise ValueError(f"a texture cannot be read: {_line(error)}") from error
    small = (min(image.width, _TEXELS), min(image.height, _TEXELS))
    return np.asarray(image.resize(small, Image.Resampling.BOX)) / 255


# Pictures


def draw(mesh: Mesh, pose: np.ndarray, size: int, samples: int = 3) -> np.ndarray:
    """[size,size,4] uint8: straight RGBA of a mesh, all of it before the camera, from a pose.

    Pixel (i, j) is the mean of samples × samples rays about ``((i − W/2)/f, −(j − W/2)/f, −1)``, f
    = W/2 / tan(camera_angle_x / 2), so the rays of the paper's notebook (no half pixel) go through
    the pixels' middles. Its alpha is the share of rays that hit. A surface shows its colour times
    ``(1 + n·l)/2 + 0.3 (1 − n·l)/2``: Lambert's, under a sky about l and a darker ground; n is the
    triangle's normal on the side that is seen.
    """
    n = size * samples
    focal = size / 2 / math.tan(CAMERA_ANGLE_X / 2)
    seen = (mesh.corners - pose[:3, 3]) @ pose[:3, :3]  # [F,3,3]: right, up, backward
    nearness = -1 / seen[..., 2]  # [F,3]: affine over the picture, unlike the depth
    image = seen[..., :2] * nearness[..., None] * focal * np.array([1, -1]) + size / 2
    owner, weights = _visible(mesh, image * samples + (samples - 1) / 2, nearness, n)
    hit = owner >= 0
    face = owner[hit]
    shares = weights[hit] * nearness[face]
    shares /= shares.sum(1, keepdims=True)  # of the corners, in space
    colour = _colours(mesh, face, shares)[:, :3] * _shade(mesh, pose)[face, None]
    canvas = np.zeros((n * n, 4))
    canvas[hit] = np.concatenate([colour, np.ones((len(face), 1))], 1)
    mean = canvas.reshape(size, samples, size, samples, 4).mean((1, 3))  # colours times alpha
    mean[..., :3] /= np.maximum(mean[..., 3:], 1e-12)
    return np.floor(mean * 255 + 0.5).astype(np.uint8)


def _shade(mesh: Mesh, pose: np.ndarray) -> np.ndarray:
    """[F] in [0.3,1]."""
    a, b, c = mesh.corners.swapaxes(0, 1)
    normal = np.cross(b - a, c - a)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    normal *= np.sign(((pose[:3, 3] - a) * normal).sum(1, keepdims=True))
    sky = (1 + normal @ _LIGHT) / 2
    return sky + _GROUND * (1 - sky)


def _colours(mesh: Mesh, face: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[m,4]: colour and opacity of points given as shares [m,3] of their faces' corners."""
    out = np.concatenate([mesh.colours[face], np.ones((len(face), 1))], 1)
    for number, texture in enumerate(mesh.textures):
        here = mesh.texture[face] == number
        uv = (shares[here, :, None] * mesh.uv[face[here]]).sum(1) % 1  # repeated
        h, w = texture.shape[:2]
        column, row = (uv[:, 0] * w).astype(int), ((1 - uv[:, 1]) * h).astype(int)
        out[here] *= texture[np.minimum(row, h - 1), np.minimum(column, w - 1)]
    return out


def _visible(
    mesh: Mesh, image: np.ndarray, nearness: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """(owner [n²] or −1, weights [n²,3]): the nearest triangle at each sample and where in it, in
    the picture. image [F,3,2]: corners as (column, row)."""
    low = np.clip(np.ceil(image.min(1)), 0, n).astype(int)  # [F,2]
    wide, tall = np.maximum(np.clip(np.floor(image.max(1)), -1, n - 1).astype(int) - low + 1, 0).T
    a, b, c = image.swapaxes(0, 1)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    faces = np.flatnonzero((wide * tall > 0) & (np.abs(area) > 1e-12))
    through = np.array([len(t) > 0 and bool((t[..., 3] < 0.5).any()) for t in mesh.textures])
    owner, weights, best = np.full(n * n, -1), np.zeros((n * n, 3)), np.zeros(n * n)
    ends = np.cumsum((wide * tall)[faces])
    groups = np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, _CANDIDATES)[1:])
    for some in np.split(faces, groups):
        count = (wide * tall)[some]
        face = np.repeat(some, count)
        k = np.arange(len(face)) - np.repeat(np.cumsum(count) - count, count)
        column, row = low[face, 0] + k % wide[face], low[face, 1] + k // wide[face]
        x, y = column - a[face, 0], row - a[face, 1]
        to_b, to_c = (b - a)[face], (c - a)[face]
        second = (x * to_c[:, 1] - y * to_c[:, 0]) / area[face]
        third = (y * to_b[:, 0] - x * to_b[:, 1]) / area[face]
        inside = np.flatnonzero((second >= 0) & (third >= 0) & (second + third <= 1))
        face, second, third = face[inside], second[inside], third[inside]
        pixel = row[inside] * n + column[inside]
        parts = np.stack([1 - second - third, second, third], 1)  # [m,3]
        near = (parts * nearness[face]).sum(1)
        if through.any():
            solid = _colours(mesh, face, parts * nearness[face] / near[:, None])[:, 3] >= 0.5
            face, pixel, parts, near = face[solid], pixel[solid], parts[solid], near[solid]
        np.maximum.at(best, pixel, near)
        first = near == best[pixel]
        owner[pixel[first]], weights[pixel[first]] = face[first], parts[first]
    return owner, weights
