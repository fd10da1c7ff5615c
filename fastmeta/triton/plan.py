"""What is launched for a network: constants, tiles by a written table, buffers and their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..spec import MLP, encoding_tensors

# Bare coordinates up to this number are multiplied in float32; more of them are taken as features.
BARE = 4
# Programs that fill a GPU once: an H200 has 132 multiprocessors.
PROGRAMS = 132
# Bytes of buffers in a call where max_memory is None: this, and at most an eighth of the device's.
DEFAULT_MEMORY = 4 * 2**30

OPERANDS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def up(n: int, multiple: int) -> int:
    """n, rounded up to a multiple."""
    return -(-n // multiple) * multiple


def power(n: int, least: int = 1) -> int:
    """The least power of two not below n and least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@dataclass(frozen=True)
class Constants:
    """A network in a precision, as the kernels' constants name it."""

    net: MLP
    mode: str

    @property
    def encoded(self) -> bool:
        """Whether the first layer takes features; more than BARE coordinates are features too."""
        return self.net.encoding is not None or self.net.in_features > BARE

    @property
    def width(self) -> int:
        """WP: a power of two to 256, then a multiple of 128."""
        W = self.net.width
        return power(W, 16) if W <= 256 else up(W, 128)

    @property
    def features(self) -> int:
        """EP, where the first layer takes features."""
        E = self.net.encoded_features
        return power(E, 16) if E <= 64 else up(E, 64)

    @property
    def first(self) -> str:
        """Precision of a first layer on features: the network's, but fp32 in front of sines."""
        return "fp32" if self.net.activation == "sine" else self.mode

    @property
    def thin(self) -> int:
        """TH: numbers in a tile's thin sums."""
        net = self.net
        opening = 0 if self.encoded else net.in_features * net.width
        return opening + (net.depth - 1) * net.width + (net.width + 1) * net.out_features

    @property
    def operand(self) -> torch.dtype:
        return OPERANDS[self.mode]

    def kept(self, real: torch.dtype) -> torch.dtype:
        """What stays of a pre-activation between the passes; see ``activation.keep``."""
        if self.net.activation == "sine" and self.mode != "fp32":
            return torch.int16
        if self.net.activation in ("relu", "none") and real == torch.float32:
            return self.operand
        return real

    def stored(self, real: torch.dtype) -> torch.dtype:
        """Deltas and tangents between the passes."""
        return self.operand if real == torch.float32 else real

    def shapes(self) -> dict[str, Any]:
        """The constants that every kernel takes some of."""
        net = self.net
        w0_first, w0 = net.frequencies[0], net.w0
        if net.activation != "sine":
            w0_first = w0 = 1.0
        identity = net.in_features
        if net.encoding is not None and not net.encoding.include_input:
            identity = 0
        return {
            "D": net.in_features,
            "DP": power(net.in_features, 2),
            "E": net.encoded_features,
            "EP": self.features,
            "IDENTITY": identity,
            "W": net.width,
            "WP": self.width,
            "L": net.depth,
            "C": net.out_features,
            "CP": power(net.out_features, 16),
            "ACT": net.activation,
            "OUT": net.output,
            "W0_FIRST": float(w0_first),
            "W0": float(w0),
            "SHIFT": float(net.output_shift),
            "MODE": self.mode,
            "FIRST": self.first,
            "ENCODED": self.encoded,
        }


@lru_cache(maxsize=64)
def basis(net: MLP, features: int, device: torch.device, dtype: torch.dtype) -> tuple:
    """(B [D,EP], φ [EP]) with the coordinates themselves in front where they are features, zero
    where there are none."""
    D = net.in_features
    B, phi = torch.zeros(D, features, dtype=dtype), torch.zeros(features, dtype=dtype)
    at = 0
    if net.encoding is None or net.encoding.include_input:
        B[:, :D] = torch.eye(D, dtype=dtype)
        at = D
    if net.encoding is not None:
        own, phase = encoding_tensors(net.encoding, torch.device("cpu"), dtype)
        B[:, at : at + own.shape[1]], phi[at : at + own.shape[1]] = own, phase
    return B.to(device), phi.to(device)


# Tiles ---

_architecture: list[int] = []  # of whoever asks what another GPU would get


@contextmanager
def architecture_of(compute: int) -> Iterator[None]:
    """Plans inside are those of a GPU of that compute capability (80, 90, 100)."""
    _architecture.append(compute)
    try:
        yield
    finally:
        _architecture.pop()


def architecture() -> int:
    """The current device's compute capability times ten; 90 where there is none."""
    if _architecture:
        return _architecture[-1]
    return _capability(torch.cuda.current_device()) if torch.cuda.is_available() else 90


def small_shared() -> bool:
    """Whether a block has 99 KB of shared memory only: consumer GPUs."""
    return architecture() in (86, 89, 120, 121)


def classic_products() -> bool:
    """Whether operands of products stand in registers (mma.sync)."""
    return architecture() < 90 or small_shared()


@lru_cache(maxsize=16)
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Tile:
    """Points, columns and depth of a block, warps, stages of loads in flight, and columns at a time
    beside the last layer."""

    points: int
    columns: int
    depth: int
    warps: int
    stages: int
    last: int = 32


def stream_tiles(c: Constants, dual: bool) -> tuple[Tile, Tile]:
    """Of ``ahead`` and ``back``: accumulators of points × columns, twice where dual; ``back`` holds
    more beside them, so a dual one has half the points (at 128 it spilled 770 bytes, sm_90) and two
    stages (three spilled 248 under Triton 3.6; a piece of 48 KB in flight is about what L2 delivers
    meanwhile). Where the operands of products stand in registers (mma.sync: before sm_90, and on
    consumer GPUs), blocks are smaller; so they are for fp32, whose operands are three times as
    many."""
    WP, wide = c.width, c.mode in ("fp16", "bf16")
    classic = classic_products()
    heavy = dual and not wide
    points = 128 if wide and not dual else 32 if heavy and classic else 64
    depth = 64 if wide and not (dual and classic) else 32
    last = 16 if classic or heavy else 32
    if WP <= 64:
        tile = Tile(min(points, 64), WP, min(WP, depth), 4, 2, last)
        return tile, tile
    stages = 3 if wide and not classic else 2
    columns = 256 if WP == 256 and points == 128 and not classic else 128
    ahead = Tile(points, 64 if heavy and not classic else columns, depth, 8, stages, last)
    back = replace(ahead, columns=min(ahead.columns, 128))
    if dual and wide and not classic:
        ahead = replace(ahead, points=128, depth=32, last=16)
        back = replace(back, stages=2)
    return ahead, back


def resident_tile(c: Constants, dual: bool) -> Tile | None:
    """Of ``resident``, or None where activations and sums do not fit the registers, or operands the
    shared memory. Blocks of 32 points: at 64 it spilled 400 bytes and more at width 64 (sm_90)."""
    WP, L = c.width, c.net.depth
    features = c.features if c.encoded else 0
    if WP > 64 or features > 64 or c.net.out_features > 16 or (4 if dual else 6) < L:
        return None
    if WP == 64 and (c.mode == "fp32" or (dual and c.mode == "tf32")):
        return None
    if WP == 64 and small_shared() and (dual or c.mode == "tf32"):
        return None
    points = 16 if c.mode == "fp32" and dual else 32
    return Tile(points, WP, WP, 8 if WP == 64 else 4, 1)


def weigh_tile(c: Constants, features: bool, dual: bool, both: bool) -> Tile:
    """Of ``weigh``: blocks of (points: rows of W, columns: its columns) over ``depth`` points a
    turn; both: the gradient beside its tangent."""
    inner = c.features if features else c.width
    wide, classic = c.mode in ("fp16", "bf16"), classic_products()
    small = both or not wide or (dual and classic)
    depth = 32 if not wide or (dual and classic) else 64
    rows = min(c.width, 64 if small else 128)
    columns = min(inner, 256 if wide and not dual and not classic and inner == 256 else 128)
    # Split products of dual numbers at 128: 544 columns of tensor memory under Triton 3.6, of 512.
    crowded = c.mode == "fp32" and dual and not classic and architecture() >= 100
    columns = min(columns, 64) if crowded or inner % columns else columns
    stages = 3 if wide and not classic else 2
    return Tile(rows, columns, depth, 8 if rows * columns >= 64 * 128 else 4, stages)


# Memory ---


def row_bytes(c: Constants, real: torch.dtype, dual: bool, keep: bool = True) -> int:
    """Bytes of buffers a point needs."""
    layers = c.net.depth - 1 if keep else min(2, c.net.depth - 1)
    size = c.kept(real).itemsize * layers * c.width
    if keep:
        size += c.stored(real).itemsize * layers * c.width
    if dual:
        size += c.stored(real).itemsize * layers * c.width * (2 if keep else 1)
    return size + real.itemsize * (4 if dual else 2) * 2 * c.net.out_features


def task_bytes(c: Constants, points: int, real: torch.dtype, dual: bool, back: bool = True) -> int:
    """Bytes of buffers a task needs, one partial sum of the weights included."""
    numbers = 2 if dual else 1
    weights = max(0, c.net.depth - 2) * c.width**2 + c.encoded * c.width * c.features
    if resident_tile(c, dual) is not None:
        sums = weights + c.thin if back else 0
        return numbers * real.itemsize * (points * c.net.out_features + sums)
    total = row_bytes(c, real, dual, back) * up(points, 128)
    if back:
        tiles = -(-points // stream_tiles(c, dual)[1].points)
        total += numbers * real.itemsize * (weights + tiles * c.thin)
    return total


def default_memory(device: torch.device) -> int:
    """Bytes of buffers in a call where max_memory is None."""
    if device.type != "cuda":
        return DEFAULT_MEMORY
    return min(DEFAULT_MEMORY, torch.cuda.get_device_properties(device).total_memory // 8)


def chunks(tasks: int, per_task: int, budget: int) -> Iterator[slice]:
    """Tasks that fit the budget at a time; always one at least."""
    fit = max(1, budget // max(per_task, 1))
    count = -(-tasks // fit)
    size = -(-tasks // count)  # equal chunks
    for start in range(0, tasks, size):
        yield slice(start, min(start + size, tasks))


def empty(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
