"""Pictures: learning curves and strips of reconstructions. Matplotlib and Pillow are imported when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import atomic_write


def learning_curves(path: Path, curves: dict[str, Tensor], *, title: str = "") -> None:
    """PSNR over inner steps, the mean of each start with its standard error as a band.

    Args:
        path: a .png.
        curves: name -> PSNR [n,K+1] in dB.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    for name, values in curves.items():
        mean = values.double().mean(0)
        error = (
            values.double().std(0, correction=1) / math.sqrt(len(values))
            if len(values) > 1
            else mean * 0
        )
        steps = list(range(len(mean)))
        (line,) = axes.plot(steps, mean.tolist(), marker="o", markersize=3, label=name)
        low, high = (mean - error).tolist(), (mean + error).tolist()
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("PSNR [dB]")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    if title:
        axes.set_title(title)
    figure.tight_layout()
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=130))


def strip(
    path: Path, target: Tensor, rows: dict[str, Tensor], steps: list[int], *, least: int = 96
) -> None:
    """One block per image: the target, then each start's reconstructions at some steps, with captions.

    Args:
        path: a .png.
        target: [m,H,W,C] in [0,1].
        rows: start -> reconstructions [K+1,m,H,W,C]; clipped to [0,1].
        steps: which of the K+1 to show.
        least: smaller images are enlarged to about this height (nearest pixel).
    """
    count, H, W, _ = target.shape
    across, down = len(steps) + 1, count * len(rows)
    unit = max(1, round(least / H))
    figure = _figure((W * unit * across + 70) / 100, (H * unit + 4) * down / 100 + 0.3)
    grid = figure.subplots(down, across, squeeze=False)
    for image in range(count):
        for number, (name, out) in enumerate(rows.items()):
            line = grid[image * len(rows) + number]
            for cell, axes in enumerate(line):
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if cell == 0 and number:
                    continue
                picture = target[image] if cell == 0 else out[steps[cell - 1], image]
                axes.imshow(_rgb(picture), interpolation="nearest")
                if image == 0 and number == 0:
                    axes.set_title("target" if cell == 0 else f"step {steps[cell - 1]}", fontsize=8)
            line[1].set_ylabel(name, fontsize=8)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.28 / figure.get_figheight(), 0.04, 0.04)
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=100))


def _rgb(image: Tensor) -> object:
    """[H,W,3] numpy in [0,1] of [H,W,C]."""
    image = torch.nan_to_num(image.detach().float().cpu()).clamp(0, 1)
    return image.expand(-1, -1, 3).numpy() if image.shape[-1] == 1 else image.numpy()


def _figure(width: float, height: float) -> object:
    """A figure without pyplot: no window system, nothing global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure
