"""Pictures: learning curves and strips of reconstructions. Matplotlib is imported to draw one."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import atomic_write
from .meta.evaluate import psnr


def save_png(path: str | os.PathLike, image: Tensor) -> None:
    """Writes ``round(255 · clip(image, 0, 1))``, beside the path first and then renamed over it.

    Args:
        image: [H,W,C], C = 1 or 3.

    Raises:
        ValueError: another shape, or NaN. OSError: the folder is absent or cannot be written.
    """
    from PIL import Image

    shape, nan = tuple(image.shape), bool(image.isnan().any())
    if len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape or nan:
        came = f"image has shape {shape}{' and holds NaN' if nan else ''}"
        raise ValueError(f"save_png: {came}; accepted is [H,W,C] with C = 1 or 3, without NaN")
    pixels = image.detach().cpu().double().clamp(0, 1).mul(255).round().byte().numpy()
    picture = Image.fromarray(pixels.squeeze(2) if shape[2] == 1 else pixels)
    atomic_write(path, lambda beside: picture.save(beside, format="PNG"))


def learning_curves(path: Path, curves: dict[str, Tensor], *, title: str = "") -> None:
    """PSNR over inner steps: the mean of each start, its standard error as a band.

    Args:
        path: a .png.
        curves: name -> PSNR [n,K+1] in dB.
    """
    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    for name, values in curves.items():
        mean = values.double().mean(0)  # [K+1]
        error = values.double().std(0, correction=min(1, len(values) - 1)) / math.sqrt(len(values))
        steps = list(range(len(mean)))
        (line,) = axes.plot(steps, mean.tolist(), marker="o", markersize=3, label=name)
        low, high = (mean - error).tolist(), (mean + error).tolist()
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("PSNR [dB]")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # over no curve
    axes.set_title(title)
    figure.tight_layout()
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=130))


def strip(
    path: Path, target: Tensor, rows: dict[str, Tensor], steps: list[int], *, least: int = 96
) -> None:
    """A block per image: the target, beside it a row per start: its reconstructions and their PSNR.

    Args:
        path: a .png.
        target: [m,H,W,C] in [0,1].
        rows: start -> reconstructions [K+1,m,H,W,C]; shown clipped to [0,1].
        steps: which of the K+1 to show.
        least: smaller images are enlarged by a whole factor to about this height (nearest pixel).
    """
    count, H, W, _ = target.shape
    unit = max(1, round(least / H))
    across, down = max(W * unit, 72) + 6, H * unit + 18  # pixels from cell to cell; captions fit
    label, head, apart = 78, 24, 12
    block = down * len(rows) + apart
    width, height = across * (len(steps) + 1) + label + 6, head + block * count
    figure = _figure(width / 100, height / 100)

    def show(image: Tensor, left: float, top: float, caption: str) -> None:
        box = (left / width, 1 - (top + H * unit) / height, W * unit / width, H * unit / height)
        axes = figure.add_axes(box)
        axes.imshow(_rgb(image), interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="0.8", linewidth=0.5)  # a white image has edges too
        write(left + W * unit / 2, top + H * unit + 8, caption, size=7)

    def write(x: float, y: float, words: str, size: int = 8, **where: Any) -> None:
        where = {"ha": "center", "va": "center", **where}
        figure.text(x / width, 1 - y / height, words, fontsize=size, **where)

    for cell, name in enumerate(["target", *[f"step {k}" for k in steps]]):
        write(6 + cell * across + (label if cell else 0) + W * unit / 2, head / 2, name)
    for image in range(count):
        top = head + block * image
        show(target[image], 6, top + (block - apart - down) / 2, "")
        for number, (name, out) in enumerate(rows.items()):
            y = top + down * number
            write(across + label, y + H * unit / 2, name, ha="right")
            for cell, k in enumerate(steps):
                reached = float(psnr(out[k, image].flatten(0, 1), target[image].flatten(0, 1)))
                left = 6 + (cell + 1) * across + label
                show(out[k, image], left, y, f"{reached:.1f} dB")
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=100))


def _rgb(image: Tensor) -> Any:
    """[H,W,3] numpy in [0,1] of [H,W,C]."""
    image = torch.nan_to_num(image.detach().float().cpu()).clamp(0, 1)
    return image.expand(-1, -1, 3).numpy()


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot: no window system, nothing global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure
