"""How good a start is: PSNR and SSIM of held-out images after 0..K inner steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..ops.adapt import adapt
from ..ops.mlp import mlp
from ..rules import Rule
from ..spec import MLP

# What a start may be fitted with: the grid that ``tune`` searches. The paper's inner rate lies in the middle.
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
    """psnr [n,K+1] in dB, ssim [n,K+1], and the reconstructions [K+1,m,H,W,C] of the first m images."""

    psnr: Tensor
    ssim: Tensor
    pictures: Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """``−10 log10 mean((a − b)²)`` in dB over the last two axes (points, channels), values in [0,1], not clipped."""
    return -10 * torch.log10(((a - b) ** 2).mean((-2, -1)))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two images [H,W,C] in [0,1]: Gaussian window σ = 1.5 (Wang et al. 2004, skimage)."""
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
    net: MLP, start: Start, batch: Batch, steps: int, *, impl: str | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """(PSNR [T,K+1] on the query set, predictions there [K+1,T,N,C]) after 0..K inner steps on the support set.

    The query set is the support set where the batch has none. Points beyond ``counts`` are not scored.
    """
    kept = adapt(
        net, start.init, batch, steps, start.lr, rule=start.rule, keep=True, impl=impl, precision=precision
    ).trajectory
    assert kept is not None
    seen = batch if batch.query is None else batch.query
    assert isinstance(seen.x, Tensor)
    x, y = seen.x, seen.y
    valid = None
    if seen.counts is not None:
        valid = (torch.arange(seen.points, device=y.device) < seen.counts[:, None])[..., None]  # [T,N,1]
        x = torch.where(valid, x, 0)
    out = torch.stack([mlp(net, theta, x, impl=impl, precision=precision) for theta in kept])  # [K+1,T,N,C]
    if valid is None:
        return psnr(out, y).T, out
    assert seen.counts is not None
    error = torch.where(valid, (out - y) ** 2, 0).sum((-2, -1)) / (seen.counts * y.shape[-1])
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
        similarity.append([[ssim(image[t], truth[t]) for image in images] for t in range(part.tasks)])
        kept.append(images[:, : max(0, pictures - first)])
    return Scores(
        torch.cat(quality).cpu(),
        torch.tensor([row for rows in similarity for row in rows]),
        torch.cat(kept, 1).cpu(),
    )


def tune(
    net: MLP,
    init: Tensor,
    batch: Batch,
    steps: int,
    *,
    grid: dict[str, tuple[float, ...]] = GRID,
    impl: str | None = None,
    precision: str | None = None,
) -> tuple[Start, float]:
    """The rule and rate of the grid with the best mean PSNR after K steps on a batch of training tasks, and that PSNR.

    A baseline is given its best, so that a comparison with it means something.
    """
    best: tuple[Start, float] | None = None
    for rule, rates in grid.items():
        for lr in rates:
            start = Start(init, lr, rule)
            score = float(curve(net, start, batch, steps, impl=impl, precision=precision)[0][:, -1].mean())
            if score == score and (best is None or score > best[1]):  # a diverged fit is NaN
                best = (start, score)
    if best is None:
        raise ValueError("tune: every rate of the grid diverged; accepted is a grid with at least one that does not")
    return best
