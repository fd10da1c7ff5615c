"""Pictures and videos. Matplotlib is imported to draw one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import atomic_write


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


def learning_curves(
    path: Path,
    curves: dict[str, Tensor],
    *,
    x: Sequence[float] | None = None,
    across: str = "gradient steps",
    up: str = "PSNR [dB]",
    title: str = "",
) -> None:
    """Scores over steps (or angles, views): the mean of each start, its standard error as a band.

    Args:
        path: a .png.
        curves: name -> scores [n,m] in dB.
        x: where the m columns lie; None: 0..m-1. From 20 on the axis is logarithmic beyond 1.
        across, up: names of the axes.
    """
    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    for name, values in curves.items():
        mean = values.double().mean(0)  # [m]
        error = values.double().std(0, correction=min(1, len(values) - 1)) / math.sqrt(len(values))
        steps = list(range(len(mean))) if x is None else list(x)
        (line,) = axes.plot(steps, mean.tolist(), marker="o", markersize=3, label=name)
        low, high = (mean - error).tolist(), (mean + error).tolist()
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if x is not None and max(x) >= 20:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(list(x), [f"{value:g}" for value in x])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # over no curve
    axes.set_title(title)
    figure.tight_layout()
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=130))


def strip(
    path: Path,
    targets: Sequence[Tensor],
    rows: dict[str, list[list[tuple[Tensor, str]]]],
    heads: Sequence[str],
    *,
    least: int = 96,
) -> None:
    """A block per task: its picture, beside it a row per start: what it shows, and a caption.

    Args:
        path: a .png.
        targets: m pictures [H,W,C] in [0,1].
        rows: start -> for each task, for each head, (picture, caption); shown clipped to [0,1].
        heads: what stands above the columns.
        least: smaller pictures are enlarged by a whole factor to about this height (nearest pixel).
    """
    count = len(targets)
    H, W, _ = targets[0].shape
    unit = max(1, round(least / H))
    across, down = max(W * unit, 72) + 6, H * unit + 18  # pixels from cell to cell; captions fit
    label, head, apart = 78, 24, 12
    block = down * len(rows) + apart
    width, height = across * (len(heads) + 1) + label + 6, head + block * count
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

    for cell, name in enumerate(["target", *heads]):
        write(6 + cell * across + (label if cell else 0) + W * unit / 2, head / 2, name)
    for task in range(count):
        top = head + block * task
        show(targets[task], 6, top + (block - apart - down) / 2, "")
        for number, (name, cells) in enumerate(rows.items()):
            y = top + down * number
            write(across + label, y + H * unit / 2, name, ha="right")
            for cell, (shown, caption) in enumerate(cells[task]):
                show(shown, 6 + (cell + 1) * across + label, y, caption)
    atomic_write(path, lambda beside: figure.savefig(beside, format="png", dpi=100))


def save_video(path: str | os.PathLike, frames: Sequence[Tensor], fps: float = 24.0) -> None:
    """Frames [H,W,3] in [0,1] as a .gif, or an .mp4 (H.264, sides made even by a white edge).

    Raises:
        ValueError: no frame, or another ending. ImportError: an .mp4 without imageio-ffmpeg.
        OSError: it could not be written.
    """
    import imageio.v3 as imageio
    import numpy as np

    ending = os.path.splitext(path)[1].lower()
    if not len(frames) or ending not in (".gif", ".mp4") or not fps > 0:
        came = f"{len(frames)} frames, {path}, {fps} frames a second"
        raise ValueError(f"save_video: {came}; accepted are frames, .gif or .mp4, fps above 0")
    pixels = np.stack([(_rgb(f) * 255).round().astype(np.uint8) for f in frames])
    if ending == ".gif":
        options: dict[str, Any] = {"duration": 1000 / fps, "loop": 0, "extension": ".gif"}
    else:
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            need = "imageio-ffmpeg, pip install imageio-ffmpeg"
            raise ImportError(f"save_video: an .mp4 needs {need}; a .gif does not") from None
        H, W = pixels.shape[1:3]
        pixels = np.pad(pixels, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), constant_values=255)
        options = {"fps": fps, "extension": ".mp4", "macro_block_size": 1, "output_params": []}
    encoded = imageio.imwrite("<bytes>", pixels, **options)
    atomic_write(path, lambda beside: beside.write_bytes(encoded))


def depth_picture(depth: Tensor, acc: Tensor, near: float, far: float) -> Tensor:
    """[H,W,3]: near is dark, far is light (viridis), white where nothing is (opacity)."""
    from matplotlib import colormaps

    place = ((depth / acc.clamp(min=1e-6) - near) / (far - near)).clamp(0, 1)
    colour = torch.from_numpy(colormaps["viridis"](place.cpu().numpy())[..., :3]).float()
    a = acc.cpu()[..., None].clamp(0, 1)
    return colour * a + (1 - a)


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
