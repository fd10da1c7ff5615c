"""Counter-based random draws: Philox4x32-10, the same numbers on every worker.

Key = the task's seed (int64, low word first), counter = (index, step, stream, 0), and the first
output word is used: an integer in [0,R) is ``mulhi(u32, R)``, a float in [0,1) is ``(u32 >>
8)·2⁻²⁴``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The third word of the counter says what a draw is for.
POINTS, JITTER, SEEDS, SHUFFLE, MASKS, TEXT, ANGLES, PHANTOMS, VIEWS, NOISE, SURFACE = range(11)

_MASK = 0xFFFFFFFF


def philox(
    seed: Tensor, index: Tensor, step: int, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four words in [0, 2³²) as int64, in the shape that seed and index
    broadcast to."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = index & _MASK, torch.full_like(index, step & _MASK)
    c2, c3 = torch.full_like(index, stream & _MASK), torch.zeros_like(index)
    for _ in range(10):
        p0, p1 = (
            c0 * 0xD2511F53,
            c2 * 0xCD9E8D57,
        )  # int64 wraps, the 64 bits of the product are all there
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(seed: Tensor, count: int, step: int, stream: int) -> Tensor:
    index = torch.arange(count, device=seed.device)
    return philox(seed[:, None], index[None, :], step, stream)[0]  # [T,count]


def integers(seed: Tensor, count: int, upper: Tensor | int, step: int, stream: int) -> Tensor:
    """[T,count] int64 in [0, upper), with replacement; seed [T] int64, upper one number or [T],
    below 2³¹."""
    upper = upper[:, None] if isinstance(upper, Tensor) else upper
    return (_words(seed, count, step, stream) * upper) >> 32


def uniform(
    seed: Tensor, count: int, step: int, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[T,count] in [0,1), multiples of 2⁻²⁴ (exact in float32)."""
    return (_words(seed, count, step, stream) >> 8).to(dtype) * 2.0**-24


def task_seeds(run_seed: int, outer_step: int, tasks: int) -> Tensor:
    """[T] int64: a hash of run seed, outer step and task, by Philox itself (two of its words)."""
    key = torch.tensor([signed(run_seed)])
    low, high, _, _ = philox(key, torch.arange(tasks), outer_step, SEEDS)
    return low | (high << 32)


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """[size] int64: the order of an epoch, a function of (seed, epoch) alone."""
    words = philox(torch.tensor([signed(seed)]), torch.arange(size), epoch, SHUFFLE)
    return torch.argsort(words[0] << 31 | words[1] >> 1, stable=True)


def signed(seed: int) -> int:
    """Any Python integer as the int64 with the same low 64 bits."""
    return ((seed + 2**63) % 2**64) - 2**63
