"""What a step sees: points or rays drawn anew, their samples, zeros where padding is.

    index = mulhi(Philox(seed; i, step, POINTS), count)      x, y, o, d gathered by it
    t_s = near + (far − near) s / (S − 1) + U(seed; r S + s, step, JITTER) (far − near) / S
    x = o + t d

The numbers are those of ``fastmeta.rng``: Philox4x32-10, key = the task's seed, counter = (index,
step, stream, 0), first word. Indices and jitter are the same bits on every worker; t and x are
rounded once less where the compiler fuses a product with a sum.

One launch. A program owns 128 points of one task (columns padded to a power of two), or 8 rays,
whose samples it walks 128 at a time. Nothing is kept, nothing is summed.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import rng
from ..batch import Batch, March, Rays
from .launch import launch

_POINTS = tl.constexpr(rng.POINTS)
_JITTER = tl.constexpr(rng.JITTER)

POINTS_TILE = 128
RAYS_TILE, SAMPLES_TILE = 8, 128


class Drawn(NamedTuple):
    """The points of a step: of rays, the samples x = o + t d, ray by ray."""

    x: Tensor  # [T or 1,N,D], rays [T,R·S,3]
    y: Tensor  # [T,N,C], [T,R,3] or [T,A,W]
    t: Tensor | None  # [T,R,S]
    counts: Tensor | None  # [T] int32: how many points or rays are real; None: all


@triton.jit
def words(seed, index, step, STREAM: tl.constexpr):
    """The first word of Philox4x32-10 (uint32) for a block of indices; seed int64, step int32."""
    step = tl.zeros(index.shape, tl.int32) + step
    zero = tl.zeros(index.shape, tl.int32)
    return tl.philox(seed, index.to(tl.int32), step, zero + STREAM, zero)[0]


@triton.jit
def _source(seed, own, count, step, DRAWN: tl.constexpr):
    """Which of a task's rows a place shows: a drawn one, or its own."""
    if DRAWN:
        word = words(seed, own, step, _POINTS)
        upper = (tl.zeros(own.shape, tl.int32) + count).to(tl.uint32)
        return tl.umulhi(word, upper).to(tl.int32)
    return own


@triton.jit
def _copy_rows(to, source, index, own, filled, inside, width, PADDED: tl.constexpr):
    """``to[own] = source[index]`` where filled, else 0: rows of ``width`` numbers."""
    column = tl.arange(0, PADDED)
    real = column[None, :] < width
    at = index.to(tl.int64)[:, None] * width + column[None, :]
    v = tl.load(source + at, mask=filled[:, None] & real, other=0.0)  # [B,PADDED]
    at = own.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to + at, v, mask=inside[:, None] & real)


@triton.jit(do_not_specialize=["step"])
def draw_points(
    x,
    y,
    seed,
    counts,
    to_x,
    to_y,
    to_counts,
    step,
    blocks,
    points,
    drawn,
    x_stride,
    y_stride,
    width,
    channels,
    DRAWN: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``to_x[i], to_y[i] = x[index_i], y[index_i]``: BLOCK points of one task."""
    task = (tl.program_id(0) // blocks).to(tl.int64)
    own = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = own < drawn
    count = points
    if COUNTS:
        count = tl.load(counts + task).to(tl.int32)
        if not DRAWN:
            tl.store(to_counts + task, count, mask=tl.program_id(0) % blocks == 0)
    key = task
    if DRAWN:
        key = tl.load(seed + task)
    index = _source(key, own, count, step, DRAWN)  # [BLOCK]
    filled = inside & (index < count)
    x += task * x_stride
    y += task * y_stride
    to_x += task * drawn * width
    to_y += task * drawn * channels
    _copy_rows(to_x, x, index, own, filled, inside, width, WIDTH)
    _copy_rows(to_y, y, index, own, filled, inside, channels, CHANNELS)


@triton.jit
def _bound(rows, number, task, ROWS: tl.constexpr, REAL: tl.constexpr):
    """A task's own bound, or the float64 whose bits the integer holds, rounded."""
    if ROWS:
        return tl.load(rows + task).to(REAL)
    bits = tl.zeros((1,), tl.int64) + number
    return tl.sum(bits.to(tl.float64, bitcast=True)).to(REAL)


@triton.jit(do_not_specialize=["step"])
def draw_rays(
    origins,
    directions,
    y,
    seed,
    counts,
    near,
    far,
    to_x,
    to_y,
    to_t,
    to_counts,
    step,
    near_bits,
    far_bits,
    blocks,
    rays,
    drawn,
    o_stride,
    d_stride,
    y_stride,
    DRAWN: tl.constexpr,
    COUNTS: tl.constexpr,
    JITTERED: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    SAMPLES: tl.constexpr,
    RAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """t and ``x = o + t d`` of RAYS rays of one task, BLOCK samples at a time, and targets."""
    task = (tl.program_id(0) // blocks).to(tl.int64)
    own = (tl.program_id(0) % blocks) * RAYS + tl.arange(0, RAYS)
    inside = own < drawn
    count = rays
    if COUNTS:
        count = tl.load(counts + task).to(tl.int32)
        if not DRAWN:
            tl.store(to_counts + task, count, mask=tl.program_id(0) % blocks == 0)
    key = task
    if DRAWN or JITTERED:
        key = tl.load(seed + task)
    index = _source(key, own, count, step, DRAWN)
    filled = inside & (index < count)
    if DRAWN or COUNTS:
        _copy_rows(to_y + task * drawn * 3, y + task * y_stride, index, own, filled, inside, 3, 4)
    at = index.to(tl.int64) * 3
    origins += task * o_stride
    directions += task * d_stride
    o0 = tl.load(origins + at, mask=filled, other=0.0)[:, None]  # [RAYS,1]
    o1 = tl.load(origins + at + 1, mask=filled, other=0.0)[:, None]
    o2 = tl.load(origins + at + 2, mask=filled, other=0.0)[:, None]
    d0 = tl.load(directions + at, mask=filled, other=0.0)[:, None]
    d1 = tl.load(directions + at + 1, mask=filled, other=0.0)[:, None]
    d2 = tl.load(directions + at + 2, mask=filled, other=0.0)[:, None]
    low = _bound(near, near_bits, task, NEAR, REAL)
    span = _bound(far, far_bits, task, FAR, REAL) - low
    samples = tl.full((1, 1), SAMPLES, REAL)
    to_t += task * drawn * SAMPLES
    to_x += task * drawn * (3 * SAMPLES)
    row = own.to(tl.int64)[:, None] * SAMPLES
    for start in range(0, SAMPLES, BLOCK):
        s = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (s < SAMPLES)
        part = _quotient(s.to(REAL), samples - 1.0)
        t = tl.broadcast_to(low + span * part, (RAYS, BLOCK))
        if JITTERED:  # the index wraps at 2³², as the counter's word does
            word = words(key, own[:, None] * SAMPLES + s, step, _JITTER)
            u = (word >> 8).to(tl.int32).to(REAL) * (1.0 / 16777216.0)
            t = t + u * _quotient(tl.zeros((1, 1), REAL) + span, samples)
        tl.store(to_t + row + s, t, mask=mask)
        to = to_x + (row + s) * 3
        tl.store(to, o0 + t * d0, mask=mask)
        tl.store(to + 1, o1 + t * d1, mask=mask)
        tl.store(to + 2, o2 + t * d2, mask=mask)


@triton.jit
def _quotient(a, b):
    """a / b, rounded to nearest."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


def room(batch: Batch) -> Drawn | None:
    """Tensors for ``draw`` to write into, or None where the batch is seen as it is. What passes
    through a draw untouched stands in its place."""
    y, n = batch.y, batch.per_step or batch.points
    ragged = batch.counts is not None and batch.per_step is None
    moved = ragged or batch.per_step is not None
    counts = y.new_empty(batch.tasks, dtype=torch.int32) if ragged else None
    if isinstance(batch.x, Rays):
        assert isinstance(batch.measure, March)
        S = batch.measure.samples
        x, t = y.new_empty(batch.tasks, n * S, 3), y.new_empty(batch.tasks, n, S)
        return Drawn(x, y.new_empty(batch.tasks, n, 3) if moved else y, t, counts)
    if not moved:
        return None
    x = y.new_empty(batch.tasks, n, batch.coordinates)
    return Drawn(x, y.new_empty(batch.tasks, n, y.shape[-1]), None, counts)


def draw(batch: Batch, step: int, out: Drawn | None = None) -> Drawn:
    """The points or rays of a step, ``reference.draw`` and the samples of its rays.

    Args:
        out: what ``room`` gave for this batch, or for one of the same shapes. With it nothing is
            allocated, and no call waits for the device.
    """
    x = batch.x
    if not isinstance(x, Rays) and batch.per_step is None and batch.counts is None:
        return Drawn(x if x.dim() == 3 else x[None], batch.y, None, None)
    out = room(batch) if out is None else out
    assert out is not None
    y, y_stride = _rows(batch.y)
    seed = y if batch.seed is None else batch.seed.contiguous()  # a stand-in is never read
    counts = y if batch.counts is None else batch.counts.contiguous()
    shared = {
        "y": y,
        "seed": seed,
        "counts": counts,
        "to_x": out.x,
        "to_y": out.y,
        "to_counts": y if out.counts is None else out.counts,
        "step": (step + 2**31) % 2**32 - 2**31,
        "drawn": batch.per_step or batch.points,
        "y_stride": y_stride,
    }
    flags = {"DRAWN": batch.per_step is not None, "COUNTS": batch.counts is not None}
    if isinstance(x, Rays):
        _start_rays(batch, x, shared, flags, out)
        return out if flags["DRAWN"] or flags["COUNTS"] else out._replace(y=batch.y)
    blocks = triton.cdiv(shared["drawn"], POINTS_TILE)
    dense, x_stride = _rows(x if x.dim() == 3 else x[None])
    width, channels = x.shape[-1], y.shape[-1]
    args = {
        "x": dense,
        **shared,
        "blocks": blocks,
        "points": batch.points,
        "x_stride": x_stride,
        "width": width,
        "channels": channels,
    }
    consts = {
        **flags,
        "BLOCK": POINTS_TILE,
        "WIDTH": triton.next_power_of_2(width),
        "CHANNELS": triton.next_power_of_2(channels),
    }
    launch(draw_points, (batch.tasks * blocks,), args, consts)
    return out


def _start_rays(batch: Batch, rays: Rays, shared: dict, flags: dict, out: Drawn) -> None:
    assert isinstance(batch.measure, March)
    blocks = triton.cdiv(shared["drawn"], RAYS_TILE)
    origins, o_stride = _rows(rays.origins)
    directions, d_stride = _rows(rays.directions)
    near, near_bits = _end(rays.near, origins)
    far, far_bits = _end(rays.far, origins)
    args = {
        "origins": origins,
        "directions": directions,
        **shared,
        "near": origins if near is None else near,
        "far": origins if far is None else far,
        "to_t": out.t,
        "near_bits": near_bits,
        "far_bits": far_bits,
        "blocks": blocks,
        "rays": batch.points,
        "o_stride": o_stride,
        "d_stride": d_stride,
    }
    S = batch.measure.samples
    consts = {
        **flags,
        "JITTERED": batch.seed is not None,
        "NEAR": near is not None,
        "FAR": far is not None,
        "SAMPLES": S,
        "RAYS": RAYS_TILE,
        "BLOCK": min(SAMPLES_TILE, triton.next_power_of_2(S)),
        "REAL": tl.float64 if origins.dtype == torch.float64 else tl.float32,
    }
    launch(draw_rays, (batch.tasks * blocks,), args, consts)


def _rows(a: Tensor) -> tuple[Tensor, int]:
    """[T or 1,...] with dense rows, and the distance between them: 0 where there is one."""
    if not a[0].is_contiguous():
        a = a.contiguous()
    return a, a.stride(0) if a.shape[0] > 1 else 0


def _end(value: float | Tensor, like: Tensor) -> tuple[Tensor | None, int]:
    """A ray's end as a tensor [T] on the device, or the bits of a float64, which need no copy."""
    if isinstance(value, Tensor) and (value.dim() or value.device.type != "cpu"):
        return value.to(like.device).expand(len(like)).contiguous(), 0
    number = float(torch.as_tensor(value))  # rounded as ``Rays.bounds`` rounds it
    return None, struct.unpack("<q", struct.pack("<d", number))[0]
