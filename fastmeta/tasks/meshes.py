"""Triangle meshes as pictures: a reader of Wavefront OBJ, and a rasteriser with textures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arrays import one_line

CAMERA_ANGLE_X = 0.6911112070083618  # of the paper's ShapeNet data, in radians
_LIGHT = np.array([0.4, -0.5, 0.77]) / np.linalg.norm([0.4, -0.5, 0.77])  # above, right, in front
_GROUND = 0.3  # the ground's light, the sky's being 1
_TEXELS = 64  # a texture is averaged down to this, about what an object's width has in pixels
_CANDIDATES = 1 << 20  # pixels tested against their triangle at a time: about 100 MB


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
        raise ValueError(f"a texture cannot be read: {one_line(error)}") from error
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
