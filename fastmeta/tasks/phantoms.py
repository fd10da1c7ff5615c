"""Random Shepp-Logan phantoms, drawn when they are asked for; nothing to download.

Source: Shepp & Logan 1974. How Tancik et al. 2021 randomised theirs is not published.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import rng
from .files import ImageSet, Splits, drawn_images, drawn_splits

# Value, half axes, centre, angle in degrees, in the square [-1,1)², y up. Source: Shepp & Logan
# 1974, with the contrasts of Toft 1996 ("modified": the soft tissue can be seen).
ELLIPSES = np.array(
    [
        [1.0, 0.69, 0.92, 0.0, 0.0, 0.0],
        [-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0],
        [-0.2, 0.11, 0.31, 0.22, 0.0, -18.0],
        [-0.2, 0.16, 0.41, -0.22, 0.0, 18.0],
        [0.1, 0.21, 0.25, 0.0, 0.35, 0.0],
        [0.1, 0.046, 0.046, 0.0, 0.1, 0.0],
        [0.1, 0.046, 0.046, 0.0, -0.1, 0.0],
        [0.1, 0.046, 0.023, -0.08, -0.605, 0.0],
        [0.1, 0.023, 0.023, 0.0, -0.606, 0.0],
        [0.1, 0.023, 0.046, 0.06, -0.605, 0.0],
    ]
)
# (middle, range): a draw is uniform in middle ± range.
HEAD_TILT = (0.0, 15.0)  # degrees, of the whole head
HEAD_SHIFT = (0.0, 0.02)  # of its centre, along each axis
HEAD_SCALE = (0.95, 0.10)  # a factor for each axis; what lies inside is scaled too
SKULL_INSIDE = (0.97, 0.03)  # a factor on the inner ellipse: the wall is thickened, never opened
SKULL_VALUE = (1.0, 0.1)  # a factor on each of the first two values
CENTRE = (0.0, 0.04)  # of the eight ellipses inside, along each axis
AXES = (1.0, 0.2)  # a factor on each of their half axes
ANGLE = (0.0, 20.0)  # degrees
VALUE = (1.0, 0.5)  # a factor


def phantom_images(
    count: int, *, size: int = 64, seed: int = 0, first: int = 0, memory: int = 256 << 20
) -> ImageSet:
    """Random Shepp-Logan phantoms [N,N,1] in [0,1]; image i is a function of (seed, first + i,
    size).

    ``clip(Σ_e value_e · cover_e, 0, 1)`` over the ten ellipses of ``ELLIPSES``. The head as a whole
    is tilted by ±15°, shifted by ±0.02 and scaled by 0.85 to 1.05 along each axis; the inside of
    the skull takes 0.94 to 1 of its half axes, the first two values 0.9 to 1.1. The eight ellipses
    inside move by ±0.04, their half axes take 0.8 to 1.2, their angles ±20°, their values 0.5 to
    1.5. All of it lies in the unit circle, so every angle sees the whole. How the paper randomised
    its phantoms is not published; these ranges are ours.

    Antialiased, since nearest-pixel sums see steps at edges otherwise: ``cover`` is the share of a
    pixel in the ellipse, to first order. Pixel (i,j) is a box about x = 2j/N − 1, y = 1 − 2i/N, so
    the centre is pixel (N/2, N/2), about which ``project`` turns.

    Args:
        count: n, how many.
        size: N, at least 8.
        first: ranges first .. first + count − 1 that do not meet give separate sets.
        memory: bytes of phantoms to hold.

    Raises:
        ValueError: a number out of range.
    """
    shape: dict[str, Any] = {"size": (size, size), "channels": 1, "seed": seed, "first": first}
    return drawn_images("phantom", partial(_phantom, size=size), count, memory=memory, **shape)


def phantom_splits(
    size: int = 64, train: int = 100_000, validation: int = 200, test: int = 200, seed: int = 0
) -> Splits:
    """(train, validation, test) of so many phantoms; none moves when another part grows.

    They are ranges of one sequence, from 0, 2³⁰ and 2³¹. Errors as ``phantom_images``.
    """
    make = partial(phantom_images, size=size, seed=seed)
    return drawn_splits("phantom", make, (train, validation, test))


def _phantom(key: Tensor, index: int, *, size: int) -> np.ndarray:
    """[N,N,1] float32 of one phantom."""
    draws = rng.uniform(key, 66, index, rng.PHANTOMS, torch.float64)[0].numpy()
    return paint(jitter(2 * draws[:6] - 1, 2 * draws[6:].reshape(10, 6) - 1), size)[..., None]


def jitter(head: np.ndarray, each: np.ndarray) -> np.ndarray:
    """Ten ellipses [10,6] of draws in [-1,1]: of the head [6] (tilt, shift x, y, scale x, y,
    inside) and of each ellipse [10,6], in the order of ``ELLIPSES``; zeros: the middles."""

    def within(bounds: tuple[float, float], draw: Any) -> Any:
        return bounds[0] + bounds[1] * draw

    table = ELLIPSES.copy()
    table[:2, 0] *= within(SKULL_VALUE, each[:2, 0])
    table[1, 1:3] *= within(SKULL_INSIDE, head[5])
    table[2:, 0] *= within(VALUE, each[2:, 0])
    table[2:, 1:3] *= within(AXES, each[2:, 1:3])
    table[2:, 3:5] += within(CENTRE, each[2:, 3:5])
    table[2:, 5] += within(ANGLE, each[2:, 5])
    scale = within(HEAD_SCALE, head[3:5])
    tilt = within(HEAD_TILT, head[0])
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    turn = np.array([[cos, -sin], [sin, cos]])
    table[:, 1:3] *= scale
    table[:, 3:5] = table[:, 3:5] * scale @ turn.T + within(HEAD_SHIFT, head[1:3])
    table[:, 5] += tilt
    return table


def paint(table: np.ndarray, size: int) -> np.ndarray:
    """[N,N] float32: ``clip(Σ_e value_e · cover_e, 0, 1)`` of ellipses [n,6] as in ``ELLIPSES``.

    ``cover = clip(1/2 − d N/2, 0, 1)``, d the distance to the edge to first order,
    ``(r − 1) r / |(p/a, q/b)|`` with p, q along the axes in units of a, b, and r = |(p, q)|.
    """
    value, a, b, x0, y0, degrees = table.astype(np.float32).T[..., None, None]  # each [n,1,1]
    u = (2 * np.arange(size) / size - 1).astype(np.float32)
    x, y = u - x0, -u[:, None] - y0  # [n,1,N], [n,N,1]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    p, q = (x * cos + y * sin) / a, (y * cos - x * sin) / b  # [n,N,N]
    r = np.maximum(np.hypot(p, q), 1e-6)
    distance = (r - 1) * r / np.maximum(np.hypot(p / a, q / b), 1e-6)
    cover = np.clip(0.5 - distance * (size / 2), 0, 1)
    return np.clip((value * cover).sum(0), 0, 1)
