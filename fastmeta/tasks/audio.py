"""Sound as tasks: ``f(t) = amplitude``, windows of recordings.

A task is one window of N samples: ``x`` = i/N [N,1], ``y`` = amplitudes [N,C] in [-1,1]. One of the
signals that sine networks were shown on: Sitzmann et al. 2020 (SIREN), section 4.
"""

from __future__ import annotations

import io
import math
import os
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..ops.mlp import mlp
from ..spec import MLP
from .arrays import Stored, by_file, existing, kept, list_files, open_array, skipped
from .grids import grid_batch, lattice, scored_whole
from .sets import Shape, TaskSet, at_least, folders_or_split, not_counted, readable

COUNTED, METRIC, PLANAR = None, "psnr", False
_SOURCES = "accepted are a folder of wav, a wav, npy, npz, and an array [n,N] or [n,N,C]"
# (format, bits) of a WAV -> how numpy reads it; 24 bits as bytes.
_CODES = {
    (1, 8): "u1",
    (1, 16): "<i2",
    (1, 24): "u1",
    (1, 32): "<i4",
    (3, 32): "<f4",
    (3, 64): "<f8",
}


@dataclass(frozen=True)
class Audio:
    """Sound, cut into windows, each a task."""

    length: int = 4096
    """samples in a task; a file is cut into windows of so many, and what is left is not used"""
    rate: int | None = None
    """resample to so many samples a second; without: as stored, and all files must agree"""
    channels: Literal[1, 2] = 1
    """1: mixed to mono, 2: stereo"""
    validation: float = 0.1
    """share of the files for validation (of the groups, where there is a pattern)"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part; without, the
    windows of a file do, if there are several files"""
    skip_bad: bool = False
    """leave out files that cannot be read or are too short, naming them, instead of stopping"""

    def __post_init__(self) -> None:
        at_least("audio", self, 1, "length", "rate")
        if self.channels not in (1, 2):
            raise ValueError(f"audio: channels is {self.channels!r}; accepted are 1 and 2")


class _Sound(NamedTuple):
    """A recording: ``read(start, stop)`` is float32 [n,c] of those frames, full scale = 1."""

    name: str
    frames: int
    channels: int
    rate: int | None
    read: Callable[[int, int], np.ndarray]


def open_all(source: Any, options: Audio) -> TaskSet:
    """Every window of a source: items float32 [N,C] in [-1,1], named file#k, read when asked for;
    ``about["rate"]`` is their rate (None of an array).

    Args:
        source: a folder of WAV files (any depth), one such file (PCM of 8, 16, 24 or 32 bits, or
            floats), a .npy (mapped), a .npz ("audio" or its only array of 2 or 3 axes, with "names"
            if there), an array or a tensor: rows [n,N] or [n,N,C] of int16, int32, uint8 or floats
            in [-1,1], each cut as a file is.

    Several channels are mixed by their mean; mono becomes stereo twice over. Resampling is
    ``scipy.signal.resample_poly``, of as much as a window needs.

    Raises:
        ValueError, OSError: nothing there, damaged or pickled, shorter than a window, several rates
            without ``rate``; on reading, floats out of [-1,1], NaN.
    """
    tasks = _open(source, options)
    return readable(tasks) if options.skip_bad else tasks


def _open(source: Any, options: Audio) -> TaskSet:
    if isinstance(source, (np.ndarray, Tensor)):
        return _windows(_rows(open_array("audio", source, "audio", (2, 3))), options)
    path = existing("audio", source, _SOURCES)
    if path.is_dir():
        names = list_files("audio", path, (".wav",))
        return _windows([partial(_wav, path / name, name) for name in names], options)
    if path.suffix.lower() == ".wav":
        return _windows([partial(_wav, path, path.name)], options)
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"audio: {path} ends in {path.suffix!r}; {_SOURCES}")
    stored = open_array("audio", path, "audio", (2, 3))
    return _windows(_rows(stored._replace(load=kept(stored.load))), options)


def open_splits(source: Any, options: Audio, seed: int = 0) -> tuple[TaskSet, TaskSet, TaskSet]:
    """(train, validation, test): by folders of these names, or by ``split``.

    The windows of a file stay in one part unless there is a group, or no other file.
    """
    tasks = open_all(source, options)
    group = by_file(tasks.names) if options.group is None else options.group
    shares = {"validation": options.validation, "test": options.test}
    return folders_or_split(tasks, seed=seed, group=group, **shares)


def _windows(sounds: Sequence[Callable[[], _Sound]], options: Audio) -> TaskSet:
    """The windows of recordings, of which the headers are read here."""
    opened: list[_Sound] = []
    for open_sound in sounds:
        try:
            opened.append(_fitting(open_sound(), options))
        except (ValueError, OSError) as error:
            skipped("audio", error, options.skip_bad)
    if not opened:
        raise ValueError("audio: no file can be read; accepted is one or more")
    first = opened[0]
    for sound in opened if options.rate is None else []:
        if sound.rate != first.rate:
            came = f"{sound.name} is at {sound.rate} Hz, {first.name} at {first.rate}"
            raise ValueError(f"audio: {came}; without a rate to resample to all must agree")
    rows = [(s, k * options.length) for s in opened for k in range(_count(s, options))]
    names = tuple(f"{sound.name}#{start // options.length}" for sound, start in rows)
    about = {"rate": options.rate or first.rate}
    return TaskSet(lambda row: _read(*rows[row], options), names, about=about)


def _fitting(sound: _Sound, options: Audio) -> _Sound:
    if sound.channels > 2 and options.channels == 2:
        came = f"{sound.name} has {sound.channels} channels"
        raise ValueError(f"audio: {came}; accepted for stereo are 1 and 2")
    if sound.rate is None and options.rate is not None:
        came = f"rate is {options.rate}, and an array does not say what its own is"
        raise ValueError(f"audio: {came}; accepted for arrays is None")
    if _count(sound, options) == 0:
        came = f"{sound.name} has {_length(sound, options)} samples"
        raise ValueError(f"audio: {came}; accepted is a window, {options.length}, and more")
    return sound


def _ratio(sound: _Sound, options: Audio) -> tuple[int, int]:
    """(up, down), without a common factor; (1, 1): as stored."""
    if options.rate is None or sound.rate is None:
        return 1, 1
    common = math.gcd(options.rate, sound.rate)
    return options.rate // common, sound.rate // common


def _length(sound: _Sound, options: Audio) -> int:
    up, down = _ratio(sound, options)
    return -(-sound.frames * up // down)


def _count(sound: _Sound, options: Audio) -> int:
    return _length(sound, options) // options.length


# Files


def _wav(path: Path, name: str) -> _Sound:
    """The header of a RIFF file.

    Not by scipy, which reads 24 bits whole, tells of a file cut short by a warning (no business of
    loader threads), and cannot read a window of a mapped file without keeping it open.
    """
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        start = file.read(12)
        if start[:4] != b"RIFF" or start[8:] != b"WAVE":
            raise ValueError(f"audio: {name} is no WAV (RIFF) file; accepted are WAV files")
        form, size = b"", -1
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                break
            body = file.read(min(size, 40)) if head[:4] == b"fmt " else b""
            form = body or form
            file.seek(size + size % 2 - len(body), os.SEEK_CUR)
        offset = file.tell()
    if len(head) < 8 or len(form) < 16 or size > total - offset:
        what = "its header ends early" if len(head) < 8 or len(form) < 16 else "data are missing"
        raise ValueError(f"audio: {name} is truncated ({what}); accepted are whole WAV files")
    tag, channels, rate, bits = (
        int.from_bytes(form[a:b], "little") for a, b in ((0, 2), (2, 4), (4, 8), (14, 16))
    )
    tag = int.from_bytes(form[24:26], "little") if tag == 0xFFFE else tag  # WAVE_FORMAT_EXTENSIBLE
    if (tag, bits) not in _CODES or channels < 1 or rate < 1:
        came = f"{name} holds {channels} channels at {rate} Hz, format {tag} of {bits} bits"
        raise ValueError(f"audio: {came}; accepted are PCM of 8, 16, 24, 32 bits and floats")
    frames = size // (channels * bits // 8)
    read = partial(_frames, path, offset, channels, tag, bits)
    return _Sound(name, frames, channels, rate, read)


def _frames(
    path: Path, offset: int, channels: int, tag: int, bits: int, start: int, stop: int
) -> np.ndarray:
    """Frames start .. stop − 1 of a file, float32 [n,c]."""
    width = 3 if bits == 24 else 1
    count, at = (stop - start) * channels * width, offset + start * channels * bits // 8
    raw = np.fromfile(path, _CODES[tag, bits], count, offset=at)
    if len(raw) < count:
        raise ValueError(f"audio: {path} has become shorter; accepted are whole WAV files")
    if bits == 24:
        wide = np.zeros((count // 3, 4), np.uint8)  # 24 bits become the upper ones of 32
        wide[:, 1:] = raw.reshape(-1, 3)
        raw = wide.view("<i4")[:, 0]
    return _unit(raw).reshape(-1, channels)


def _rows(stored: Stored) -> list[Callable[[], _Sound]]:
    """The rows of an array [n,N] or [n,N,C], each a recording without a rate."""
    frames, channels = (*stored.shape, 1)[1:3]
    if stored.dtype.kind != "f" and stored.dtype not in (np.uint8, np.int16, np.int32):
        accepted = "accepted are int16, int32, uint8 and floats in [-1,1]"
        raise ValueError(f"audio: {stored.where} holds {stored.dtype}; {accepted}")

    def read(row: int, start: int, stop: int) -> np.ndarray:
        return _unit(stored.load()[row, start:stop]).reshape(-1, channels)

    names = stored.names or [str(i) for i in range(stored.shape[0])]
    sounds = [
        _Sound(name, frames, channels, None, partial(read, i)) for i, name in enumerate(names)
    ]
    return [partial(lambda sound: sound, sound) for sound in sounds]


def _unit(values: np.ndarray) -> np.ndarray:
    """float32: int16 / 2¹⁵, int32 / 2³¹, (uint8 − 128) / 2⁷, floats as they are."""
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    half = 2.0 ** (8 * values.dtype.itemsize - 1)
    return ((values - (half if values.dtype.kind == "u" else 0.0)) / half).astype(np.float32)


def _read(sound: _Sound, start: int, options: Audio) -> Tensor:
    """float32 [N,C]: one window, from sample ``start`` at the rate asked for."""
    N, (up, down) = options.length, _ratio(sound, options)
    if up == down:
        samples = _mixed(sound, start, start + N, options)
    else:
        from scipy.signal import resample_poly

        # The filter reaches 10 max(up, down) steps of the upsampled signal; a start at a multiple
        # of ``down`` puts frame 0 of the piece on a sample of the output.
        reach = -(-10 * max(up, down) // up) + 1
        blocks = max(0, start // up - -(-reach // down))
        stop = min(sound.frames, -(-(start + N) * down // up) + reach)
        piece = _mixed(sound, blocks * down, stop, options)
        samples = resample_poly(piece, up, down, axis=0)[start - blocks * up :][:N]
        samples = np.clip(samples, -1, 1).astype(np.float32)  # the filter overshoots
    return torch.from_numpy(samples)


def _mixed(sound: _Sound, start: int, stop: int, options: Audio) -> np.ndarray:
    """Frames start .. stop − 1 in C channels, checked."""
    samples = sound.read(start, stop)
    low, high = samples.min(), samples.max()
    if not (low >= -1 and high <= 1):  # or NaN
        came = f"{sound.name} has values from {low:g} to {high:g}"
        raise ValueError(f"audio: {came}; accepted are floats in [-1,1]")
    if sound.channels == options.channels:
        return samples
    mono = samples.mean(1, keepdims=True, dtype=np.float32)
    return mono if options.channels == 1 else np.repeat(mono, 2, 1)


def wav_bytes(samples: Tensor, rate: int) -> bytes:
    """A WAV file of 16 bits: ``round(2¹⁵ · y)``, clipped to [-2¹⁵, 2¹⁵ − 1].

    Args:
        samples: [N,C] in [-1,1].
        rate: samples a second.

    Raises:
        ValueError: another shape, NaN, a rate that is no integer >= 1.
    """
    if samples.dim() != 2 or 0 in samples.shape or bool(samples.isnan().any()):
        came = f"samples {tuple(samples.shape)}{' with NaN' if samples.isnan().any() else ''}"
        raise ValueError(f"wav_bytes: {came}; accepted is [N,C] without NaN")
    if not isinstance(rate, int) or not 1 <= rate < 2**32:
        raise ValueError(f"wav_bytes: rate is {rate!r}; accepted is an integer >= 1")
    whole = samples.detach().cpu().double().mul(2**15).round().clamp(-(2**15), 2**15 - 1)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.numpy().astype("<i2").tobytes())
    return buffer.getvalue()


# Tasks


def shape(options: Audio) -> Shape:
    """Time in [0,1), C amplitudes in [-1,1]."""
    return Shape(1, options.channels, "unit", False)


def learn(
    items: Sequence[Tensor], options: Audio, net: MLP, seeds: Tensor, per_step: int | None
) -> Batch:
    """Windows [N,C] as a batch: ``x`` = i/N [N,1], shared (another convention where net.coords says
    so), ``y`` = amplitudes [T,N,C]."""
    return grid_batch("audio", items, net, seeds, per_step)


def observe(
    items: Sequence[Tensor],
    options: Audio,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """The same, scored as a whole."""
    not_counted("audio", count)
    return scored_whole(grid_batch("audio", items, net, seeds, per_step))


def truth(item: Tensor, options: Audio) -> Tensor:
    """The window drawn as a waveform, ``waveform``."""
    return waveform(item)


def picture(net: MLP, params: Tensor, item: Tensor, options: Audio, **how: Any) -> Tensor:
    """What a network [P] says over the same window, drawn."""
    return waveform(mlp(net, params, lattice((len(item),), net.coords).to(params), **how))


def waveform(samples: Tensor, height: int = 96, width: int = 384) -> Tensor:
    """[C·height,width,3] in [0,1]: per channel a band, from +1 at its top to −1 at its bottom.

    A column spans the least to the largest of its samples, the next column's first among them, so
    that the line does not break. Values beyond ±1 lie on the edge.
    """
    N, C = samples.shape
    values = torch.nan_to_num(samples.detach().cpu().double()).clamp(-1, 1).numpy()
    first = np.arange(width) * N // width
    after = values[np.minimum((np.arange(width) + 1) * N // width, N - 1)]
    low = np.minimum(np.minimum.reduceat(values, first), after)  # [width,C]
    high = np.maximum(np.maximum.reduceat(values, first), after)
    top, bottom = (np.floor((1 - v) / 2 * (height - 1) + 0.5) for v in (high, low))
    row = np.arange(height)[:, None, None]
    inked = ((row >= top) & (row <= bottom)).transpose(2, 0, 1)  # [C,height,width]
    image = np.ones((C, height, width, 3), np.float32)
    image[:, (height - 1) // 2] = 0.8  # where silence is
    image[inked] = (0.12, 0.29, 0.53)
    return torch.from_numpy(image.reshape(C * height, width, 3))
