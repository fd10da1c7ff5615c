"""Images as tasks: sets read from files or arrays, their split, and batches of pixels on a grid.

A task is one image: ``x`` = where its pixels lie [H*W,2], ``y`` = their colours [H*W,C] in [0,1].
Source: Tancik et al. 2021.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..batch import Batch
from ..spec import COORDS, MLP

FORMATS = ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
MASKS = ("left", "top", "center", "random:SHARE with 0 < SHARE < 1", "every:N with N >= 2")
_ENDINGS = tuple(f".{name}" for name in FORMATS)
_SOURCES = f"accepted are a folder, {', '.join(FORMATS)}, npy, npz, and an array [n,H,W,C]"
_PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}  # folder -> part
_HEADERS = 10_000  # files looked into when a set is opened

_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # numpy's
Splits = tuple["ImageSet", "ImageSet", "ImageSet"]


@dataclass
class Memory:
    """Decoded images kept for the next time, up to ``budget`` bytes; what came first stays.

    An epoch visits every image once: then a fixed share held is read less often than the latest.
    """

    budget: int = 2 << 30
    used: int = 0
    held: dict[int, np.ndarray] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size: ``set[i]`` is float32 [H,W,C] in [0,1], read when it is asked for.

    Args:
        read: row -> [H,W,C] as uint8, uint16, bool or floats in [0,1]; called from many threads.
        names: one for each image; splits go by name.
        size, channels: (H, W) and C.
        memory: what is held decoded, shared with every set taken from this one.
        rows: the reader's row of each image; None: 0, 1, 2, ...

    Raises:
        ValueError, OSError: on reading an image that is damaged, of another size, or not in [0,1].
    """

    read: Callable[[int], np.ndarray]
    names: tuple[str, ...]
    size: tuple[int, int]
    channels: int
    memory: Memory = field(default_factory=Memory)
    rows: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        index = range(len(self))[index]
        row, memory = index if self.rows is None else self.rows[index], self.memory
        pixels = memory.held.get(row)
        if pixels is None:
            pixels = self.read(row)
            if pixels.shape != (*self.size, self.channels):
                came, accepted = pixels.shape, (*self.size, self.channels)
                raise ValueError(f"images: {self.names[index]} is {came}; accepted is {accepted}")
            with memory.lock:
                if row not in memory.held and memory.used + pixels.nbytes <= memory.budget:
                    memory.held[row] = pixels
                    memory.used += pixels.nbytes
        return torch.from_numpy(_unit(pixels, self.names[index]))

    @property
    def cached(self) -> int:
        """How many of this set's images are held decoded."""
        rows = range(len(self)) if self.rows is None else self.rows
        return sum(row in self.memory.held for row in rows)

    def take(self, indices: Iterable[int]) -> ImageSet:
        """The set of some of the images, in the order given; the memory is shared."""
        chosen = [range(len(self))[int(i)] for i in indices]
        rows = chosen if self.rows is None else [self.rows[i] for i in chosen]
        return replace(self, names=tuple(self.names[i] for i in chosen), rows=rows)


def open_images(
    source: Any,
    *,
    size: int | tuple[int, int] | None = 64,
    channels: int = 3,
    memory: int = 2 << 30,
) -> ImageSet:
    """A folder, a file or an array as a set of images of one size.

    Each is turned as EXIF says, blended onto white where it has alpha, converted to C channels
    (grey: ITU-R 601 luma), cropped about the centre to the aspect ratio asked for, and resized
    (Lanczos, antialiased). More than 8 bits are kept where Pillow gives them: arrays, grey files.

    Args:
        source: a folder (``FORMATS`` at any depth, sorted by relative path, hidden ones left out),
            one such file, a .npy (mapped, never read whole), a .npz ("images" or its only array of
            3 or 4 axes, with "names" if there), or an array or tensor [n,H,W] or [n,H,W,C] of
            uint8, uint16, bool or floats in [0,1], C = 1, 3 or 4 (alpha).
        size: n for (n, n), (H, W), or None: as they are, and then all must agree.
        channels: C, 1 or 3.
        memory: bytes of decoded images to hold; the rest is read again when it is needed.

    Raises:
        ValueError, OSError: nothing there, no image, a wrong shape or dtype, pickled objects. Of
            files the headers are read here (10 000 at most unless size is None), pixels later.
    """
    size = None if size is None else size_pair("images", size)
    if channels not in (1, 3) or memory < 0:
        came = f"channels is {channels!r}, memory {memory}"
        raise ValueError(f"images: {came}; accepted are channels 1 or 3, memory >= 0 bytes")
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if isinstance(source, np.ndarray):
        return _from_array("the array", source, None, size, channels, memory)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"images: source is a {type(source).__name__}; {_SOURCES}")
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return _from_files(path, _list(path), size, channels, memory)
    if not path.exists():
        raise FileNotFoundError(f"images: {path} does not exist; {_SOURCES}")
    if suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except _DAMAGE as error:
            raise ValueError(f"images: {path} is no readable .npy ({_line(error)})") from error
        return _from_array(str(path), array, None, size, channels, memory)
    if suffix == ".npz":
        array, names = _load_npz(path, memory)
        return _from_array(str(path), array, names, size, channels, memory - array.nbytes)
    if suffix not in _ENDINGS:
        raise ValueError(f"images: {path} ends in {path.suffix!r}; {_SOURCES}")
    return _from_files(path.parent, [path.name], size, channels, memory)


def size_pair(where: str, size: Any) -> tuple[int, int]:
    """(H, W) of n or (H, W), checked."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_size, pair)):
        raise ValueError(f"{where}: size is {size!r}; accepted are n and (H, W), integers >= 1")
    return tuple(pair)


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and n >= 1


# Sources


def _list(root: Path) -> list[str]:
    """Images below a folder; links to folders are followed unless they lead back up."""
    names = []
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder)
        above = {here.resolve(), *here.resolve().parents}
        below[:] = [d for d in below if d[0] != "." and (here / d).resolve() not in above]
        fitting = (f for f in files if f[0] != "." and f.lower().endswith(_ENDINGS))
        names += [(here.relative_to(root) / f).as_posix() for f in fitting]
    if not names:
        arrays = sorted(p.name for p in root.iterdir() if p.suffix.lower() in (".npy", ".npz"))
        hint = f"; {arrays[0]} in it can be given by its own path" if arrays else ""
        raise ValueError(f"images: {root} holds no image, accepted are {', '.join(FORMATS)}{hint}")
    return sorted(names)


def _from_files(
    root: Path, names: list[str], size: tuple[int, int] | None, channels: int, memory: int
) -> ImageSet:
    heads = [_with_image(root, n, _head) for n in (names[:_HEADERS] if size else names)]
    if size is None:
        size = heads[0]
        for name, head in zip(names, heads, strict=True):
            if head != size:
                came = f"{name} has {head} pixels (height, width), {names[0]} has {size}"
                raise ValueError(f"images: {came}; with size=None all must agree, or give a size")

    def load(image: Any) -> Any:
        from PIL import ImageOps

        w, h = image.size
        for s in (8, 4, 2):  # a JPEG of twice the target or more: 12 megapixels in 35 ms, not 255
            if min(w, h) >= 2 * s * max(size) and w % s == h % s == 0:
                image.draft(None, (w // s, h // s))
                break
        return ImageOps.exif_transpose(image)

    def read(row: int) -> np.ndarray:
        return _fit(_with_image(root, names[row], load), names[row], size, channels)

    return ImageSet(read, tuple(names), size, channels, Memory(memory))


def _with_image(root: Path, name: str, use: Callable[[Any], Any]) -> Any:
    """``use(image)`` of an opened file; whatever goes wrong in a decoder becomes one line."""
    from PIL import Image

    try:
        with open(root / name, "rb") as file:
            return use(Image.open(file))
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(f"images: {name} cannot be opened ({_line(error)})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damage
        what = f"images: {name} is truncated or not an image (Pillow: {_line(error)})"
        raise OSError(f"{what}; accepted are {', '.join(FORMATS)}") from error


def _head(image: Any) -> tuple[int, int]:
    """(H, W) after EXIF's turn. Pillow turns TIFF itself; late EXIF in a PNG needs the pixels."""
    known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    turned = known and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _from_array(
    where: str,
    array: np.ndarray,
    names: list[str] | None,
    size: tuple[int, int] | None,
    channels: int,
    memory: int,
) -> ImageSet:
    shape, dtype = array.shape, array.dtype
    if array.ndim == 3 and shape[2] in (3, 4):
        raise ValueError(f"images: {where} has shape {shape}, one image; accepted is [n,H,W,C]")
    if array.ndim not in (3, 4) or 0 in shape or (array.ndim == 4 and shape[3] not in (1, 3, 4)):
        accepted = "[n,H,W] and [n,H,W,C], channels last, C = 1, 3 or 4 (alpha), none empty"
        raise ValueError(f"images: {where} has shape {shape}; accepted are {accepted}")
    if dtype.kind not in "bf" and (dtype.kind != "u" or dtype.itemsize > 2):
        accepted = "uint8, uint16, bool and floats in [0,1]"
        raise ValueError(f"images: {where} holds {dtype}; accepted are {accepted}")
    names = [str(i) for i in range(shape[0])] if names is None else names
    size = shape[1:3] if size is None else size
    same = size == shape[1:3] and channels == (*shape, 1)[3]
    mapped = isinstance(array, np.memmap)

    def read(row: int) -> np.ndarray:
        pixels = array[row] if array.ndim == 4 else array[row][..., None]
        if not same:
            return _fit(pixels, names[row], size, channels)
        return np.array(pixels) if mapped else pixels

    held = 0 if same and not mapped else memory  # what lies in memory is not held twice
    return ImageSet(read, tuple(names), size, channels, Memory(held))


def _load_npz(path: Path, memory: int) -> tuple[np.ndarray, list[str] | None]:
    """(images, names or None); shapes and dtypes come from the headers, before any data."""
    try:
        with zipfile.ZipFile(path) as file:
            members = [n for n in file.namelist() if n.endswith(".npy")]
            heads = {n.removesuffix(".npy"): _npy_head(file, n) for n in members}
    except _DAMAGE as error:
        raise ValueError(f"images: {path} is no readable .npz ({_line(error)})") from error
    fitting = [key for key, (shape, _) in heads.items() if len(shape) in (3, 4)]
    key = fitting[0] if len(fitting) == 1 and "images" not in heads else "images"
    if key not in heads:
        accepted = 'accepted is an array called "images", or a single one of 3 or 4 axes'
        raise ValueError(f"images: {path} holds {', '.join(heads) or 'no array'}; {accepted}")
    wanted = [name for name in (key, "names") if name in heads]
    for name in wanted:
        if heads[name][1].hasobject:
            raise ValueError(f"images: {name} in {path} is pickled; accepted are plain arrays")
    need = sum(math.prod(heads[name][0]) * heads[name][1].itemsize for name in wanted)
    if need > memory:
        advice = "a .npz is read whole: save it as .npy, which is not, or give more memory"
        raise ValueError(f"images: {path} needs {need} bytes, memory is {memory}; {advice}")
    try:
        with np.load(path, allow_pickle=False) as file:
            array, *names = (file[name] for name in wanted)
    except _DAMAGE as error:
        raise ValueError(f"images: {path} is damaged ({_line(error)})") from error
    if names and (names[0].shape != array.shape[:1] or names[0].dtype.kind not in "US"):
        came = f"{names[0].dtype} {names[0].shape}"
        raise ValueError(f"images: names in {path} is {came}; accepted are {len(array)} strings")
    return array, names[0].astype(str).tolist() if names else None


def _npy_head(file: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with file.open(name) as member:
        one = np.lib.format.read_magic(member) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    return shape, dtype


# Pixels


def _unit(pixels: np.ndarray, name: str) -> np.ndarray:
    """A new float32 array in [0,1]: uint8 / 255, uint16 / 65535, bool, or floats already there."""
    if pixels.dtype.kind == "u":
        return np.divide(pixels, 255 if pixels.dtype.itemsize == 1 else 65535, dtype=np.float32)
    if pixels.dtype.kind == "f" and not (pixels.min() >= 0 and pixels.max() <= 1):  # or NaN
        came = f"{name} has values from {pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"images: {came}; accepted are floats in [0,1], uint8 and uint16")
    return np.array(pixels, dtype=np.float32, order="C")


def _fit(image: Any, name: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """A Pillow image or [h,w,c] -> [H,W,C]: 8 bits stay uint8, all else becomes float32."""
    from PIL import Image

    if not isinstance(image, np.ndarray) and image.mode[0] in "IF":  # 16 or 32 bits, grey
        image = np.asarray(image)[..., None]
        if image.dtype.kind == "i":
            if image.min() < 0 or image.max() > 65535:
                came = f"{name} has values from {image.min()} to {image.max()}"
                raise ValueError(f"images: {came}; accepted are 8 or 16 bits, and floats in [0,1]")
            image = image.astype(np.uint16)
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        return _fit_deep(_unit(image, name), size, channels)
    if isinstance(image, np.ndarray):
        flat = image[..., 0] if image.shape[2] == 1 else image
        image = Image.fromarray(np.ascontiguousarray(flat))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    pixels = np.asarray(_resize(image.convert("RGB" if channels == 3 else "L"), size))
    return pixels if channels == 3 else pixels[..., None]


def _fit_deep(unit: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """float32 [h,w,c] -> [H,W,C], plane by plane."""
    from PIL import Image

    if unit.shape[2] == 4:
        unit = unit[..., :3] * unit[..., 3:] + (1 - unit[..., 3:])
    if unit.shape[2] == 3 and channels == 1:
        unit = unit @ np.array([[0.299], [0.587], [0.114]], np.float32)
    sources = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(unit, 2, 0)]
    planes = [np.asarray(_resize(source, size)) for source in sources]
    return np.clip(np.stack(planes * (channels // len(planes)), 2), 0, 1)  # Lanczos overshoots


def _resize(image: Any, size: tuple[int, int]) -> Any:
    """The largest centred box of the target's aspect ratio, at the target's size."""
    from PIL import Image

    (w, h), (H, W) = image.size, size
    wide, tall = (max(1, round(h * W / H)), h) if w * H > h * W else (w, max(1, round(w * H / W)))
    if (wide, tall) == (W, H):
        left, top = (w - W) // 2, (h - H) // 2
        return image.crop((left, top, left + W, top + H))
    box = ((w - wide) / 2, (h - tall) / 2, (w + wide) / 2, (h + tall) / 2)
    return image.resize((W, H), Image.Resampling.LANCZOS, box)


# Splits


def split(
    images: ImageSet,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    group: str | None = None,
) -> Splits:
    """(train, validation, test), by a hash of (seed, group): new images move no others.

    ``u = hash / 2⁶⁴``: validation where u < validation, test where u < validation + test, else
    train. A part that has a share but no image takes the smallest hash of the largest other part
    (and may give it back as a set grows), so three groups always suffice for three parts.

    Args:
        validation, test: shares in [0,1], together at most 1.
        group: None: each name by itself; or a regular expression with one group, searched for in
            the name: equal groups stay together, as with r"(\\d+)_", a person's number.

    Raises:
        ValueError: shares out of range, an expression that is wrong or does not match a name.
    """
    shares = (1 - validation - test, validation, test)
    if not all(-1e-9 <= share <= 1 for share in shares):
        came = f"validation is {validation}, test {test}"
        raise ValueError(f"split: {came}; accepted are shares >= 0 that sum to at most 1")
    keys = list(images.names) if group is None else _groups(images.names, group)

    def digest(key: str) -> tuple[int, str]:
        text = f"{seed}/{key}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big"), key

    parts: list[list[str]] = [[], [], []]
    for number, key in sorted(map(digest, set(keys))):
        u = number / 2**64
        parts[1 if u < validation else 2 if u < validation + test else 0].append(key)
    for part, share in enumerate(shares):
        donor = max((p for p in (2, 1, 0) if p != part), key=lambda p: len(parts[p]))
        if share > 1e-9 and not parts[part] and len(parts[donor]) > (part != 0):
            parts[part].append(parts[donor].pop(0))
    place = {key: part for part, members in enumerate(parts) for key in members}
    return _by_part(images, [place[key] for key in keys])


def _groups(names: Sequence[str], group: str) -> list[str]:
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"split: group {group!r} is no regular expression ({error})") from error
    if pattern.groups != 1:
        raise ValueError(f"split: group {group!r} has {pattern.groups} groups; accepted is one ( )")
    found = []
    for name in names:
        match = pattern.search(name)
        if match is None or match[1] is None:
            raise ValueError(f"split: {name} does not match group {group!r}; every name must")
        found.append(match[1])
    return found


def _by_part(images: ImageSet, places: Sequence[int | None]) -> Splits:
    train, validation, test = ([i for i, p in enumerate(places) if p == k] for k in range(3))
    return images.take(train), images.take(validation), images.take(test)


def open_splits(
    source: Any,
    *,
    size: int | tuple[int, int] | None = 64,
    channels: int = 3,
    memory: int = 2 << 30,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
    group: str | None = None,
) -> Splits:
    """(train, validation, test) of a source: its own sub-folders where it has them, else ``split``.

    A folder with "train" and with "val" ("valid", "validation") or "test" is used as it is: other
    images in it are left out, and a part without a folder is split off from train by its share.
    Arguments and errors as for ``open_images`` and ``split``; the three sets share one memory.
    """
    images = open_images(source, size=size, channels=channels, memory=memory)
    tops = [name.split("/")[0].lower() if "/" in name else "" for name in images.names]
    places = [_PARTS.get(top) for top in tops]
    if 0 not in places or not {1, 2} & set(places):
        return split(images, validation=validation, test=test, seed=seed, group=group)
    train, *given = _by_part(images, places)
    left = [
        0.0 if len(part) else share for part, share in zip(given, (validation, test), strict=True)
    ]
    train, *drawn = split(train, validation=left[0], test=left[1], seed=seed, group=group)
    checks, held_out = (g if len(g) else d for g, d in zip(given, drawn, strict=True))
    return train, checks, held_out


# Batches


def grid(height: int, width: int, coords: str = "unit") -> Tensor:
    """[H*W,2] float32: where each pixel lies, row i outer, column j inner.

    unit: ``(i/H, j/W)``; unit_xy: ``(j/W, i/H)``; centers: ``((2i+1)/H − 1, (2j+1)/W − 1)``;
    corners: ``(2i/(H−1) − 1, 2j/(W−1) − 1)``, and 0 along an axis of one pixel.
    Raises ValueError for "world" and for what is not in ``spec.COORDS``.
    """
    return _grid(height, width, coords, torch.device("cpu"), torch.float32).clone()


@lru_cache(maxsize=16)
def _grid(height: int, width: int, coords: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``grid`` on a device, in a dtype; cached, never to be written to."""
    if coords not in COORDS or coords == "world":
        accepted = ", ".join(name for name in COORDS if name != "world")
        raise ValueError(f"grid: coords is {coords!r}; accepted for pixels are {accepted}")

    def axis(n: int) -> Tensor:
        i = torch.arange(n, dtype=torch.float64)
        if coords == "centers":
            return (2 * i + 1) / n - 1
        return (2 * i / (n - 1) - 1 if n > 1 else i) if coords == "corners" else i / n

    i, j = torch.meshgrid(axis(height), axis(width), indexing="ij")
    pair = (j, i) if coords == "unit_xy" else (i, j)
    return torch.stack(pair, -1).reshape(-1, 2).to(device, dtype)


def image_batch(
    images: Tensor,
    net: MLP,
    *,
    seen: Tensor | None = None,
    seed: Tensor | None = None,
    per_step: int | None = None,
) -> Batch:
    """Images as a batch: ``x`` = grid of net.coords [N,2], shared; ``y`` = pixels [T,N,C]; N = H·W.

    Args:
        images: [T,H,W,C], float32 or float64, C = net.out_features.
        net: a network of two coordinates.
        seen: [T,H,W] bool, what the inner loop sees; the query is the rest. Both come ragged:
            x [T,max,2] and y [T,max,C] in pixel order, zeros behind, and counts [T].
        seed, per_step: as in ``Batch``, for the inner loop.

    Raises:
        ValueError: shapes or dtypes that do not fit, a task with all pixels seen or none.
    """
    if images.dim() != 4 or images.dtype not in (torch.float32, torch.float64):
        came = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"image_batch: images is {came}; accepted is float32 or 64 [T,H,W,C]")
    T, H, W, C = images.shape
    if (net.in_features, net.out_features) != (2, C):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"image_batch: {came}; accepted for these images is 2 to {C}")
    x = _grid(H, W, net.coords, images.device, images.dtype)  # [N,2]
    y = images.reshape(T, H * W, C)
    if seen is None:
        return Batch(x, y, seed=seed, per_step=per_step)
    if seen.dtype != torch.bool or seen.shape != images.shape[:3]:
        came = f"{seen.dtype} {tuple(seen.shape)}"
        raise ValueError(f"image_batch: seen is {came}; accepted is bool {(T, H, W)}")
    seen = seen.to(images.device).reshape(T, H * W)
    for task, count in enumerate(seen.sum(1).tolist()):
        if count in (0, H * W):
            came = f"task {task} has {count} of {H * W} pixels seen"
            raise ValueError(f"image_batch: {came}; accepted is some seen and some not")
    query = Batch(**_ragged(x, y, ~seen))
    return Batch(**_ragged(x, y, seen), seed=seed, per_step=per_step, query=query)


def _ragged(x: Tensor, y: Tensor, chosen: Tensor) -> dict[str, Any]:
    """x, y and counts of the points chosen [T,N], in order, padded to the longest with zeros."""
    counts = chosen.sum(1)  # [T]
    order = (~chosen).byte().argsort(dim=1, stable=True)[:, : int(counts.max()), None]  # [T,max,1]
    valid = chosen[..., None].gather(1, order)  # [T,max,1]
    picked = y.gather(1, order.expand(-1, -1, y.shape[2]))  # [T,max,C]
    return {"x": x[order[..., 0]].where(valid, 0), "y": picked.where(valid, 0), "counts": counts}


def mask(kind: str, height: int, width: int, tasks: int, seed: int = 0) -> Tensor:
    """[T,H,W] bool, True where a pixel is seen.

    Args:
        kind: "left", "top": that half, the larger of two; "center": all but a centred box of half
            the height and width; "random:0.25": that share of the pixels, drawn for each task;
            "every:2": each second row and column, from the first.
        seed: task t of a random mask depends on (seed, t, size).

    Raises:
        ValueError: another kind; a mask under which all pixels are seen, or none.
    """
    name, _, value = kind.partition(":")
    number = float(value) if re.fullmatch(r"\d*\.?\d+", value) else 0.0
    seen = torch.zeros(height, width, dtype=torch.bool)
    if kind == "left":
        seen[:, : (width + 1) // 2] = True
    elif kind == "top":
        seen[: (height + 1) // 2] = True
    elif kind == "center":
        seen[:] = True
        seen[height // 4 : height - height // 4, width // 4 : width - width // 4] = False
    elif name == "every" and number >= 2 and number.is_integer():
        seen[:: int(number), :: int(number)] = True
    elif name == "random" and 0 < number < 1:
        draws = rng.uniform(rng.task_seeds(seed, 0, tasks), height * width, 0, rng.MASKS)  # [T,N]
        first = draws.argsort(dim=1, stable=True)[:, : round(number * height * width)]
        seen = seen.new_zeros(draws.shape).scatter_(1, first, True).view(tasks, height, width)
    else:
        raise ValueError(f"mask: kind is {kind!r}; accepted are {', '.join(MASKS)}")
    if bool(seen.all()) or not bool(seen.any()):
        raise ValueError(f"mask: {kind!r} of {height} x {width} pixels leaves none seen, or all")
    return seen.expand(tasks, height, width).clone()


def to_pixels(y: Tensor, size: int | tuple[int, int]) -> Tensor:
    """[...,H*W,C] -> [...,H,W,C], a view; raises ValueError where y has not H·W points."""
    H, W = size_pair("to_pixels", size)
    if y.dim() < 2 or y.shape[-2] != H * W:
        came = f"y has shape {tuple(y.shape)}"
        raise ValueError(f"to_pixels: {came}; accepted for {H} x {W} is [...,{H * W},C]")
    return y.unflatten(-2, (H, W))


def save_png(path: str | os.PathLike, image: Tensor) -> None:
    """Writes ``round(255 · clip(image, 0, 1))``, beside the path first and then renamed over it.

    Args:
        image: [H,W,C], C = 1 or 3.

    Raises:
        ValueError: another shape, or NaN. OSError: the folder is absent or cannot be written.
    """
    from PIL import Image

    path, shape = Path(path), tuple(image.shape)
    if len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape or bool(image.isnan().any()):
        nan = " and holds NaN" if bool(image.isnan().any()) else ""
        accepted = "accepted is [H,W,C] with C = 1 or 3, without NaN"
        raise ValueError(f"save_png: image has shape {shape}{nan}; {accepted}")
    pixels = image.detach().cpu().double().clamp(0, 1).mul(255).round().byte().numpy()
    beside = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}")
    try:
        Image.fromarray(pixels.squeeze(2) if shape[2] == 1 else pixels).save(beside, format="PNG")
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"save_png: {path} cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def batches(
    images: ImageSet,
    *,
    tasks: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    threads: int = 2,
    ahead: int = 4,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, images [T,H,W,C], indices [T]) for step = start .. stop − 1, without end if None.

    Step s takes positions sT .. sT + T − 1 of the permutations ``rng.permutation(seed, epoch, n)``
    laid end to end: a function of (seed, s), so a run resumed at s sees what it would have seen.

    Args:
        threads, ahead: so many threads decode, so many steps ahead; closing the iterator ends them.

    Raises:
        ValueError: an empty set, a number out of range; and at its step what reading an image does.
    """
    if min(tasks, start + 1, threads, ahead, len(images)) < 1:
        came = (
            f"{len(images)} images, tasks {tasks}, start {start}, {threads} threads, ahead {ahead}"
        )
        raise ValueError(f"batches: {came}; accepted are integers >= 1, start >= 0")
    steps = itertools.count(start) if stop is None else iter(range(start, stop))
    return _batches(images, tasks, seed, steps, threads, ahead)


def _batches(
    images: ImageSet, tasks: int, seed: int, steps: Iterator[int], threads: int, ahead: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    n = len(images)
    order = lru_cache(maxsize=2)(lambda epoch: rng.permutation(seed, epoch, n).tolist())
    pool = ThreadPoolExecutor(threads, "fastmeta-images")
    waiting: deque[Any] = deque()

    def load(indices: list[int]) -> Tensor:
        return torch.stack([images[i] for i in indices])

    try:
        while True:
            for step in itertools.islice(steps, ahead - len(waiting)):
                positions = range(step * tasks, (step + 1) * tasks)
                indices = [order(p // n)[p % n] for p in positions]
                waiting.append((step, torch.tensor(indices), pool.submit(load, indices)))
            if not waiting:
                return
            step, indices, future = waiting.popleft()
            yield step, future.result(), indices
    finally:
        pool.shutdown(cancel_futures=True)
