"""Images from files and arrays: sets of one size, read when they are needed.

Nothing here knows of networks; ``images.py`` makes tasks of what this reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rng import signed
from .arrays import as_array, existing, files_below, map_npy, npz_heads, one_line, read_npz

FORMATS = ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm")
ENDINGS = tuple(f".{name}" for name in FORMATS)
_SOURCES = f"accepted are a folder, {', '.join(FORMATS)}, npy, npz, and an array [n,H,W,C]"


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


Splits = tuple[ImageSet, ImageSet, ImageSet]
_FAR = 1 << 30  # of a drawn sequence validation starts here, test at twice this


def drawn_images(
    name: str,
    draw: Callable[..., np.ndarray],
    count: int,
    *,
    size: tuple[int, int],
    channels: int,
    seed: int,
    first: int,
    memory: int,
) -> ImageSet:
    """Images first .. first + count − 1 of an endless sequence, drawn when they are asked for.

    Args:
        name: what they are: image i is called NAME-SEED-i.
        draw: (key, i) -> [H,W,C]; key [1] int64 is the seed's low 64 bits, i counts from 0.
        size: (H, W), at least 8.

    Raises:
        ValueError: a number out of range.
    """
    whole = all(isinstance(n, int) for n in (count, first, *size))
    if not whole or min(count, first) < 0 or first + count > 2**32 or min(size) < 8:
        came = f"count is {count}, first {first}, size {size}"
        raise ValueError(f"{name}_images: {came}; accepted are 0 to 2**32 - 1, size at least 8")
    key = torch.tensor([signed(seed)])
    names = tuple(f"{name}-{seed}-{i}" for i in range(first, first + count))
    return ImageSet(lambda row: draw(key, first + row), names, size, channels, Memory(memory))


def drawn_splits(name: str, make: Callable[..., ImageSet], counts: tuple[int, int, int]) -> Splits:
    """(train, validation, test): ranges of one sequence, from 0, 2³⁰ and 2³¹, so that none moves
    when another grows; ``make(n, first=)`` draws a range. ValueError: more than 2³⁰ in a part."""
    if max(counts) > _FAR:
        raise ValueError(f"{name}_splits: {counts} images; accepted are at most 2**30 each")
    learn, check, held_out = (make(n, first=k * _FAR) for k, n in enumerate(counts))
    return learn, check, held_out


def open_images(
    source: Any,
    *,
    size: int | tuple[int, int] | None = 64,
    channels: int = 3,
    memory: int = 2 << 30,
    headers: int = 10_000,
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
        headers: of so many files the headers are read now, so that damage is found early; with
            size=None of all.

    Raises:
        ValueError, OSError: nothing there, no image, a wrong shape or dtype, pickled objects. Of
            files the headers are read here (as ``headers`` says), pixels later.
    """
    size = None if size is None else size_pair("images", size)
    if channels not in (1, 3) or memory < 0:
        came = f"channels is {channels!r}, memory {memory}"
        raise ValueError(f"images: {came}; accepted are channels 1 or 3, memory >= 0 bytes")
    source = as_array(source)
    if isinstance(source, np.ndarray):
        return _from_array("the array", source, None, size, channels, memory)
    path = existing("images", source, _SOURCES)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _from_files(path, _list(path), size, channels, memory, headers)
    if suffix == ".npy":
        return _from_array(str(path), map_npy("images", path), None, size, channels, memory)
    if suffix == ".npz":
        array, names = _load_npz(path, memory)
        return _from_array(str(path), array, names, size, channels, memory - array.nbytes)
    if suffix not in ENDINGS:
        raise ValueError(f"images: {path} ends in {path.suffix!r}; {_SOURCES}")
    return _from_files(path.parent, [path.name], size, channels, memory, headers)


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
    """Images below a folder, ``files_below``."""
    names = files_below(root, ENDINGS)
    if not names:
        arrays = sorted(p.name for p in root.iterdir() if p.suffix.lower() in (".npy", ".npz"))
        hint = f"; {arrays[0]} in it can be given by its own path" if arrays else ""
        raise ValueError(f"images: {root} holds no image, accepted are {', '.join(FORMATS)}{hint}")
    return names


def _from_files(
    root: Path,
    names: list[str],
    size: tuple[int, int] | None,
    channels: int,
    memory: int,
    headers: int,
) -> ImageSet:
    heads = [with_image(root, n, _head) for n in (names[:headers] if size else names)]
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
        return _fit(with_image(root, names[row], load), names[row], size, channels)

    return ImageSet(read, tuple(names), size, channels, Memory(memory))


def with_image(root: Path, name: str, use: Callable[[Any], Any]) -> Any:
    """``use(image)`` of an opened file; whatever goes wrong in a decoder becomes one line."""
    from PIL import Image

    try:
        with open(root / name, "rb") as file:
            return use(Image.open(file))
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(f"images: {name} cannot be opened ({one_line(error)})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damage
        what = f"images: {name} is truncated or not an image (Pillow: {one_line(error)})"
        raise OSError(f"{what}; accepted are {', '.join(FORMATS)}") from error


def _head(image: Any) -> tuple[int, int]:
    """(H, W) after EXIF's turn. Pillow turns TIFF itself; late EXIF in a PNG needs the pixels."""
    known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    turned = known and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


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
    heads = npz_heads("images", path)
    fitting = [key for key, (shape, _) in heads.items() if len(shape) in (3, 4)]
    key = fitting[0] if len(fitting) == 1 and "images" not in heads else "images"
    if key not in heads:
        accepted = 'accepted is an array called "images", or a single one of 3 or 4 axes'
        raise ValueError(f"images: {path} holds {', '.join(heads) or 'no array'}; {accepted}")
    some = {name: heads[name] for name in (key, "names") if name in heads}
    instead = "save it as .npy, which is not, or give more memory"
    found = read_npz("images", path, some, memory, instead)
    array, names = found[key], found.get("names")
    if names is not None and (names.shape != array.shape[:1] or names.dtype.kind not in "US"):
        came = f"{names.dtype} {names.shape}"
        raise ValueError(f"images: names in {path} is {came}; accepted are {len(array)} strings")
    return array, None if names is None else names.astype(str).tolist()


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
