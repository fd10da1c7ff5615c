"""The CT projector and its adjoint.

    sino[a,c] = (1/N) Σ_r image[k(a,r,c)]          k < 0 counts as 0
    īmage[p] = (1/N) Σ_{a,r,c: k(a,r,c) = p} s̄ino[a,c]

Forward: a program owns 64 columns of one angle and adds 32 rows at a time. Adjoint: the entries
(a,r,c) are sorted by pixel once (``inverse``), and a program owns 64 pixels and adds the entries of
each, 16 at a time. Each sum is one program's, in an order that the sizes alone fix: the same bits
every run, no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..batch import Inverse
from ..batch import inverse_pixels as inverse
from .launch import launch

ROWS_TILE, COLUMNS_TILE = 32, 64
PIXELS_TILE, ENTRIES_TILE = 64, 16


@triton.jit
def _project(
    image, pixels, sino, angles, blocks, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """COLUMNS sums of one angle."""
    pair = (tl.program_id(0) // blocks).to(tl.int64)  # task · A + angle
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    image += (pair // angles) * (SIZE * SIZE)
    pixels += pair * (SIZE * SIZE)
    total = tl.zeros((ROWS, BLOCK), image.dtype.element_ty)
    for start in range(0, SIZE, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        k = tl.load(pixels + r * SIZE + c, mask=(r < SIZE) & (c < SIZE), other=-1)  # [ROWS,BLOCK]
        total += tl.load(image + k, mask=k >= 0, other=0.0)
    tl.store(sino + pair * SIZE + c, (tl.sum(total, 0) / SIZE)[None, :], mask=c < SIZE)


@triton.jit
def _adjoint(
    sino,
    order,
    starts,
    image,
    angles,
    blocks,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """BLOCK pixels of one task, each the sum of its own entries."""
    task = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = p < SIZE * SIZE
    starts += task * (SIZE * SIZE + 1)
    order += task * angles * (SIZE * SIZE)
    sino += task * angles * SIZE
    start = tl.load(starts + p, mask=inside, other=0)  # [BLOCK]
    end = tl.load(starts + p + 1, mask=inside, other=0)
    total = tl.zeros((BLOCK, ENTRIES), sino.dtype.element_ty)
    for first in range(0, tl.max(end - start), ENTRIES):
        entry = start[:, None] + first + tl.arange(0, ENTRIES)[None, :]  # [BLOCK,ENTRIES]
        mine = entry < end[:, None]
        from_ = tl.load(order + entry, mask=mine, other=0)
        total += tl.load(sino + from_, mask=mine, other=0.0)
    tl.store(image + task * (SIZE * SIZE) + p, tl.sum(total, 1) / SIZE, mask=inside)


def project(image: Tensor, pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """``sino[a,c] = (1/N) Σ_r image[k(a,r,c)]``: image [T,W,W], pixels [T,A,W,W] int32, -1 outside
    -> [T,A,W]."""
    T, A, W, _ = pixels.shape
    sino = image.new_empty(T, A, W) if out is None else out
    blocks = triton.cdiv(W, COLUMNS_TILE)
    args = {
        "image": image.contiguous(),
        "pixels": pixels.contiguous(),
        "sino": sino,
        "angles": A,
        "blocks": blocks,
    }
    consts = {"SIZE": W, "ROWS": ROWS_TILE, "BLOCK": COLUMNS_TILE}
    launch(_project, (T * A * blocks,), args, consts)
    return sino


def project_adjoint(
    sinogram: Tensor, pixels: Tensor, inverse: Inverse | None = None, out: Tensor | None = None
) -> Tensor:
    """``īmage[p] = (1/N) Σ_{a,r,c: k(a,r,c) = p} s̄ino[a,c]``: [T,A,W] -> [T,W,W]. ``inverse`` is
    that of the pixels; without it they are sorted here."""
    T, A, W, _ = pixels.shape
    order, starts = _inverse(pixels) if inverse is None else inverse
    image = sinogram.new_empty(T, W, W) if out is None else out
    blocks = triton.cdiv(W * W, PIXELS_TILE)
    args = {
        "sino": sinogram.contiguous(),
        "order": order,
        "starts": starts,
        "image": image,
        "angles": A,
        "blocks": blocks,
    }
    consts = {"SIZE": W, "BLOCK": PIXELS_TILE, "ENTRIES": ENTRIES_TILE}
    launch(_adjoint, (T * blocks,), args, consts)
    return image


_inverse = inverse  # project_adjoint has an argument of that name
