"""Arrays and files: a .npy, a .npz or an array in memory, known by its header before any data, and
the files below a folder. Every kind of signal opens its sources through these.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # numpy's

Head = tuple[tuple[int, ...], np.dtype]  # shape, dtype


class Stored(NamedTuple):
    """An array whose header has been read: ``load()`` brings the data, mapped where it can be."""

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    names: list[str] | None = None


def one_line(error: Exception) -> str:
    """What an error says, without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def skipped(kind: str, error: Exception, skip_bad: bool) -> list:
    """No items and a warning where bad files are left out; else the error, in one line."""
    if not skip_bad:
        raise error if str(error).startswith(kind) else type(error)(f"{kind}: {error}") from None
    warnings.warn(f"left out: {error}", stacklevel=4)
    return []


# Arrays


def as_array(source: Any) -> Any:
    """A tensor as an array, bfloat16 as float32; anything else as it is."""
    if not isinstance(source, Tensor):
        return source
    source = source.detach().cpu()
    return (source.float() if source.dtype == torch.bfloat16 else source).numpy()


def open_array(kind: str, source: Any, key: str, axes: Sequence[int]) -> Stored:
    """A .npy, a .npz or an array in memory, of which no more than the header is read here.

    Args:
        kind: whom errors speak for.
        key: the array of a .npz to take, unless a single one has a fitting number of axes.
        axes: numbers of axes accepted.

    Raises:
        ValueError: not readable, damaged, pickled, empty, no such array.
    """
    source = as_array(source)
    if isinstance(source, np.ndarray):
        stored = Stored("the array", source.shape, source.dtype, lambda: source)
    elif Path(source).suffix.lower() == ".npz":
        stored = _open_npz(kind, Path(source), key, axes)
    else:
        load = partial(map_npy, kind, Path(source))
        array = load()
        stored = Stored(str(source), array.shape, array.dtype, load)
    if len(stored.shape) not in axes or 0 in stored.shape:
        accepted = f"accepted are arrays of {' or '.join(map(str, axes))} axes, none empty"
        raise ValueError(f"{kind}: {stored.where} has shape {stored.shape}; {accepted}")
    if stored.dtype.kind not in "buif":
        accepted = "accepted are integers, floats and bool"
        raise ValueError(f"{kind}: {stored.where} holds {stored.dtype}; {accepted}")
    return stored


def kept(load: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """``load``, called once: what it returns is held."""
    return lru_cache(maxsize=1)(load)


def map_npy(kind: str, path: Path) -> np.ndarray:
    """The array of a .npy, mapped; raises ValueError where it is none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"{kind}: {path} is no readable .npy ({one_line(error)})") from error


def npz_heads(kind: str, path: Path, wanted: Iterable[str] | None = None) -> dict[str, Head]:
    """Array -> (shape, dtype) of a .npz, or of those wanted that are in it; no data are read."""
    try:
        with zipfile.ZipFile(path) as file:
            there = [n.removesuffix(".npy") for n in file.namelist() if n.endswith(".npy")]
            keys = there if wanted is None else [key for key in wanted if key in there]
            return {key: _head(file, f"{key}.npy") for key in keys}
    except DAMAGE as error:
        raise ValueError(f"{kind}: {path} is no readable .npz ({one_line(error)})") from error


def read_npz(
    kind: str,
    path: Path,
    heads: Mapping[str, Head],
    memory: int = 8 << 30,
    instead: str = "give more memory",
) -> dict[str, np.ndarray]:
    """The arrays of a .npz that ``heads`` names, read whole.

    Args:
        heads: of ``npz_heads``; pickles and sizes are refused by them, before any data is read.
        memory: bytes that are accepted.
        instead: what the message advises for more.

    Raises:
        ValueError: an array is pickled, damaged, or all together need more memory.
    """
    for name, (_, dtype) in heads.items():
        if dtype.hasobject:
            raise ValueError(f"{kind}: {name} in {path} is pickled; accepted are plain arrays")
    need = sum(math.prod(shape) * dtype.itemsize for shape, dtype in heads.values())
    if need > memory:
        came = f"{path} needs {need} bytes, memory is {memory}"
        raise ValueError(f"{kind}: {came}; a .npz is read whole: {instead}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in heads}
    except DAMAGE as error:
        raise ValueError(f"{kind}: {path} is damaged ({one_line(error)})") from error


def _head(file: zipfile.ZipFile, member: str) -> Head:
    with file.open(member) as content:
        one = np.lib.format.read_magic(content) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(content)
    return shape, dtype


def _open_npz(kind: str, path: Path, key: str, axes: Sequence[int]) -> Stored:
    heads = npz_heads(kind, path)
    fitting = [name for name, (shape, _) in heads.items() if len(shape) in axes]
    chosen = fitting[0] if len(fitting) == 1 and key not in heads else key
    if chosen not in heads:
        accepted = f'accepted is an array called "{key}", or a single one of '
        accepted += f"{' or '.join(map(str, axes))} axes"
        raise ValueError(f"{kind}: {path} holds {', '.join(heads) or 'no array'}; {accepted}")

    def load(name: str) -> np.ndarray:
        return read_npz(kind, path, {name: heads[name]})[name]

    (shape, dtype), names = heads[chosen], None
    if "names" in heads and heads["names"][0] == shape[:1] and heads["names"][1].kind in "US":
        names = load("names").astype(str).tolist()
    return Stored(f"{chosen} in {path}", shape, dtype, partial(load, chosen), names)


# Files


def existing(kind: str, source: Any, accepted: str) -> Path:
    """The path of a source that is there."""
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{kind}: source is a {type(source).__name__}; {accepted}")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{kind}: {path} does not exist; {accepted}")
    return path


def files_below(root: Path, endings: tuple[str, ...]) -> list[str]:
    """Files below a folder, by relative path, sorted, hidden ones left out; links to folders are
    followed unless they lead back up."""
    names = []
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder)
        above = {here.resolve(), *here.resolve().parents}
        below[:] = [d for d in below if d[0] != "." and (here / d).resolve() not in above]
        fitting = (f for f in files if f[0] != "." and f.lower().endswith(endings))
        names += [(here.relative_to(root) / f).as_posix() for f in fitting]
    return sorted(names)


def list_files(kind: str, root: Path, endings: tuple[str, ...]) -> list[str]:
    """``files_below``; raises ValueError where there is none."""
    names = files_below(root, endings)
    if not names:
        raise ValueError(f"{kind}: {root} holds no {' or '.join(endings)}; accepted is one or more")
    return names


def by_file(names: Sequence[str]) -> str | None:
    """The group that keeps pieces "file#piece" of one file together; None if all are of one."""
    return r"(?s)^(.*)#" if len({name.rpartition("#")[0] for name in names}) > 1 else None
