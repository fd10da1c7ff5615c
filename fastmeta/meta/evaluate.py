"""How good a start is: scores of held-out tasks after so many inner steps, in dB; its best rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, March, Rays
from ..ops.adapt import Adapted, adapt
from ..ops.mlp import mlp
from ..ops.project import project
from ..rules import Rule
from ..spec import MLP
from ..tasks.cameras import render_rays
from .eikonal import adapt_eikonal

METRICS = ("psnr", "mae")


@dataclass(frozen=True, eq=False)
class Start:
    """Initial weights [P] and how they are fitted at test time; eikonal: weight of that term."""

    init: Tensor
    lr: float | Tensor
    rule: str | Rule = "sgd"
    eikonal: float = 0.0


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


def fitted(
    net: MLP, start: Start, batch: Batch, steps: int, *, keep: bool = False, **how: Any
) -> Adapted:
    """The inner loop from a start on every task of a batch, with its eikonal term where it has
    one."""
    options: dict[str, Any] = {"rule": start.rule, "keep": keep, **how}
    if not start.eikonal:
        return adapt(net, start.init, batch, steps, start.lr, **options)
    return adapt_eikonal(net, start.init, batch, steps, start.lr, start.eikonal, **options)


def predicted(net: MLP, params: Tensor, batch: Batch, **how: Any) -> Tensor:
    """``measure(mlp(params, x))`` of networks [T,P] (or [P]) in the shape of ``batch.y``: all
    points, no jitter; colours of rays clipped to [0,1]."""
    x, measure = batch.x, batch.measure
    if isinstance(measure, March):
        assert isinstance(x, Rays)
        return render_rays(net, params, x, measure, **how)[0].clamp(0, 1)
    assert isinstance(x, Tensor)
    y = mlp(net, params, x, **how)  # [T,N,C]
    y = y.expand(batch.tasks, *y.shape[-2:])
    if measure is None:
        return y
    W = batch.y.shape[-1]
    return project(y.reshape(batch.tasks, W, W), measure.angles, **how)


def score(prediction: Tensor, batch: Batch, metric: str = "psnr") -> Tensor:
    """[T] in dB over the valid points: psnr ``−10 log10 mean(e²)``, mae ``−20 log10 mean|e|``, both
    sides clipped where the batch's loss clips them.

    Args:
        prediction: [T,N,C], as ``predicted``.
    """
    if metric not in METRICS:
        raise ValueError(f"score: metric is {metric!r}; accepted are {', '.join(METRICS)}")
    power, clamp = 2 if metric == "psnr" else 1, batch.loss_parts[1]
    target = batch.y
    if clamp is not None:
        prediction, target = prediction.clamp(-clamp, clamp), target.clamp(-clamp, clamp)
    error = (prediction - target).abs() ** power  # [T,N,C]
    if batch.counts is None:
        mean = error.mean((1, 2))
    else:
        place = torch.arange(batch.points, device=error.device)
        valid = (place < batch.counts[:, None])[..., None]  # [T,N,1]
        mean = torch.where(valid, error, 0).sum((1, 2)) / (batch.counts * error.shape[-1])
    return -20 / power * torch.log10(mean)


def reached(
    net: MLP, start: Start, batch: Batch, steps: Sequence[int], metric: str = "psnr", **how: Any
) -> tuple[Tensor, list[Tensor]]:
    """(scores [T,len(steps)] in dB on the query set, weights [T,P] for each) after these numbers of
    inner steps.

    The inner steps see the support set; the query set is the same where the batch has none. One
    number of steps keeps no trajectory; several keep one, (K+1)·T·P numbers.
    """
    scored = batch if batch.query is None else batch.query
    ended = fitted(net, start, batch, max(steps), keep=len(steps) > 1, **how)
    thetas = [ended.params if k == max(steps) else ended.trajectory[k] for k in steps]  # type: ignore[index]
    scores = [score(predicted(net, theta, scored, **how), scored, metric) for theta in thetas]
    return torch.stack(scores, 1), thetas


class Tuned(NamedTuple):
    """The best way found to fit a start; inside: no end of the rates tried with its rule."""

    start: Start
    score: float
    inside: bool


def rates(lr: float) -> dict[str, tuple[float, ...]]:
    """What a start may be fitted with, where ``tune`` begins: SGD about a rate, Adam about 1e-3."""
    return {
        "sgd": tuple(lr * f for f in (0.1, 0.3, 1.0, 3.0, 10.0)),
        "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    }


def tune(
    net: MLP,
    init: Tensor,
    batches: Batch | Sequence[Batch],
    steps: int,
    *,
    grid: dict[str, tuple[float, ...]] | None = None,
    beyond: int = 3,
    metric: str = "psnr",
    eikonal: float = 0.0,
    impl: str | None = None,
    precision: str | None = None,
) -> Tuned:
    """The rule and rate with the best mean score after K steps on batches of training tasks.

    A baseline is given its best, so that a comparison with it means something: where the best rate
    of a rule lies at an end of the grid (None: ``rates(1e-2)``), up to ``beyond`` more are tried
    there, each 3 times further. A fit that diverges counts as the worst.

    Raises:
        ValueError: every rate diverged.
    """
    best = Tuned(Start(init, 0.0), -math.inf, False)
    batches = [batches] if isinstance(batches, Batch) else batches
    how: dict[str, Any] = {"impl": impl, "precision": precision}
    for rule, tried in (rates(1e-2) if grid is None else grid).items():

        def mean_score(lr: float, rule: str = rule) -> float:
            start = Start(init, lr, rule, eikonal)
            scores = [reached(net, start, batch, [steps], metric, **how)[0] for batch in batches]
            mean = float(torch.cat(scores).mean())
            return -math.inf if math.isnan(mean) else mean

        lr, found, inside = _best_rate(mean_score, tried, beyond)
        if found > best.score:
            best = Tuned(Start(init, lr, rule, eikonal), found, inside)
    if best.score == -math.inf:
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
