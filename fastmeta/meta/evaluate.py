"""How good a start is: PSNR and SSIM of held-out images after 0..K inner steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..ops.adapt import adapt
from ..ops.mlp import mlp
from ..rules import Rule
from ..spec import MLP

# What a start may be fitted with: where ``tune`` begins, the paper's rate in the middle.
GRID: dict[str, tuple[float, ...]] = {
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}


@dataclass(frozen=True, eq=False)
class Start:
    """Initial weights [P] and how they are fitted at test time."""

    init: Tensor
    lr: float | Tensor
    rule: str | Rule = "sgd"


class Scores(NamedTuple):
    """psnr [n,K+1] in dB, ssim [n,K+1], reconstructions [K+1,m,H,W,C] of the first m images."""

    psnr: Tensor
    ssim: Tensor
    pictures: Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """``−10 log10 mean((a − b)²)`` in dB over the last two axes (points, channels); not clipped."""
    return -10 * torch.log10(((a - b) ** 2).mean((-2, -1)))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two images [H,W,C] in [0,1]: Gaussian window of σ = 1.5, 11 pixels
    wide (narrower where the image is), mean over channels. Source: Wang et al. 2004; skimage."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            a.double().cpu().numpy(),
            b.double().cpu().numpy(),
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            win_size=min(11, (min(a.shape[:2]) - 1) // 2 * 2 + 1),
        )
    )


def curve(
    net: MLP,
    start: Start,
    batch: Batch,
    steps: int,
    *,
    impl: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(PSNR [T,K+1] on the query set, predictions there [K+1,T,N,C]) after 0..K inner steps.

    The inner steps see the support set; the query set is the same where the batch has none. Points
    beyond ``counts`` are not scored, and the predictions there mean nothing.
    """
    how: dict[str, Any] = {"impl": impl, "precision": precision}
    kept = adapt(net, start.init, batch, steps, start.lr, rule=start.rule, keep=True, **how)
    assert kept.trajectory is not None
    scored = batch if batch.query is None else batch.query
    assert isinstance(scored.x, Tensor)
    y, counts = scored.y, scored.counts
    out = torch.stack(
        [mlp(net, theta, scored.x, **how) for theta in kept.trajectory]
    )  # [K+1,T,N,C]
    if counts is None:
        return psnr(out, y).T, out
    valid = (torch.arange(scored.points, device=y.device) < counts[:, None])[..., None]  # [T,N,1]
    error = torch.where(valid, (out - y) ** 2, 0).sum((-2, -1)) / (counts * y.shape[-1])  # [K+1,T]
    return -10 * torch.log10(error).T, out


def evaluate(
    net: MLP,
    start: Start,
    batch: Batch,
    size: tuple[int, int],
    steps: int,
    *,
    pictures: int = 0,
    chunk: int = 8,
    impl: str | None = None,
    precision: str | None = None,
) -> Scores:
    """PSNR and SSIM of every image of a batch after 0..K inner steps.

    Args:
        net, start: the network and the start it is given.
        batch: T whole images as tasks, points in row-major order of pixels.
        size: (H, W).
        steps: K.
        pictures: how many images' reconstructions to keep.
        chunk: tasks in flight, which bounds the memory (K+1)·chunk·P.

    Source: Tancik et al. 2021, section 4.1 and figure 3.
    """
    quality, similarity, kept = [], [], []
    for first in range(0, batch.tasks, chunk):
        part = batch.take(slice(first, first + chunk))
        scores, out = curve(net, start, part, steps, impl=impl, precision=precision)
        quality.append(scores)
        images, truth = out.unflatten(2, size), part.y.unflatten(1, size)
        similarity.append(
            [[ssim(image[t], truth[t]) for image in images] for t in range(part.tasks)]
        )
        kept.append(images[:, : max(0, pictures - first)])
    return Scores(
        torch.cat(quality).cpu(),
        torch.tensor([row for rows in similarity for row in rows]),
        torch.cat(kept, 1).cpu(),
    )


class Tuned(NamedTuple):
    """The best way found to fit a start; inside: no end of the rates tried with its rule."""

    start: Start
    psnr: float
    inside: bool


def tune(
    net: MLP,
    init: Tensor,
    batch: Batch,
    steps: int,
    *,
    grid: dict[str, tuple[float, ...]] = GRID,
    beyond: int = 3,
    impl: str | None = None,
    precision: str | None = None,
) -> Tuned:
    """The rule and rate with the best mean PSNR after K steps on a batch of training tasks.

    A baseline is given its best, so that a comparison with it means something: where the best rate
    of a rule lies at an end of the grid, up to ``beyond`` more are tried there, each 3 times
    further. A fit that diverges counts as the worst.

    Raises:
        ValueError: every rate diverged.
    """
    best = Tuned(Start(init, 0.0), -math.inf, False)
    for rule, rates in grid.items():

        def score(lr: float, rule: str = rule) -> float:
            start = Start(init, lr, rule)
            reached, _ = curve(net, start, batch, steps, impl=impl, precision=precision)
            mean = float(reached[:, -1].mean())
            return -math.inf if math.isnan(mean) else mean

        lr, reached, inside = _best_rate(score, rates, beyond)
        if reached > best.psnr:
            best = Tuned(Start(init, lr, rule), reached, inside)
    if best.psnr == -math.inf:
        raise ValueError("tune: every rate diverged; accepted is a grid with one that does not")
    return best


def _best_rate(
    score: Callable[[float], float], rates: tuple[float, ...], beyond: int
) -> tuple[float, float, bool]:
    """(rate, its score, whether rates on both sides of it were tried and are no better)."""
    tried = {lr: score(lr) for lr in rates}
    for _ in range(beyond):
        best = max(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            break
        further = best * 3 if best == max(tried) else best / 3
        tried[further] = score(further)
    best = max(tried, key=tried.__getitem__)
    return best, tried[best], min(tried) < best < max(tried)
