"""Images as tasks: sets read from files or arrays, their split, and batches of pixels on a grid.

A task is one image: ``x`` = where its pixels lie [H*W,2], ``y`` = their colours [H*W,C] in [0,1].
Source: Tancik et al. 2021.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..batch import Batch
from ..ops.mlp import mlp
from ..spec import MLP
from .files import ImageSet, Splits, open_images, size_pair
from .grids import lattice
from .sets import Shape, at_least, feed, folders_or_split, not_counted, readable, refuse_changed
from .sets import split as split
from .text import text_splits

MASKS = ("left", "top", "center", "random:SHARE with 0 < SHARE < 1", "every:N with N >= 2")
COUNTED, METRIC, PLANAR = None, "psnr", True


@dataclass(frozen=True)
class Images:
    """Images, each a task; photographs are cropped about the centre and resized."""

    size: int = 64
    """height and width"""
    channels: Literal[1, 3] = 3
    """3 colour, 1 grey"""
    validation: float = 0.1
    """share of the images for validation (of the groups, where there is a pattern)"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part"""
    skip_bad: bool = False
    """leave out files that cannot be read, naming them, instead of stopping"""

    def __post_init__(self) -> None:
        at_least("images", self, 1, "size")


def open_splits(source: Any, options: Images, seed: int = 0) -> Splits:
    """(train, validation, test) of a source: "text", or as ``image_splits``.

    Raises:
        ValueError, OSError: as ``image_splits``; options that "text" leaves without effect.
    """
    if isinstance(source, str) and source == "text":
        refuse_changed(options, "data text", "validation", "test", "group", "channels", "skip_bad")
        return text_splits(options.size, seed=seed)
    shares: dict[str, Any] = {f: getattr(options, f) for f in ("validation", "test", "group")}
    return folders_or_split(open_all(source, options), seed=seed, **shares)


def open_all(source: Any, options: Images) -> ImageSet:
    """Every image of a source, unsplit."""
    headers = {"headers": 0} if options.skip_bad else {}
    found = open_images(source, size=options.size, channels=options.channels, **headers)
    return readable(found) if options.skip_bad else found


def shape(options: Images) -> Shape:
    """Two coordinates of the unit square, C colours in [0,1]."""
    return Shape(2, options.channels, "unit", True)


def learn(
    items: Sequence[Tensor], options: Images, net: MLP, seeds: Tensor, per_step: int | None
) -> Batch:
    """Whole images [H,W,C] as a batch, ``image_batch``."""
    seed = None if per_step is None else seeds
    return image_batch(torch.stack(list(items)), net, seed=seed, per_step=per_step)


def observe(
    items: Sequence[Tensor],
    options: Images,
    net: MLP,
    seeds: Tensor,
    count: int | None = None,
    per_step: int | None = None,
) -> Batch:
    """The same: an image is seen, and scored, as a whole."""
    not_counted("images", count)
    return learn(items, options, net, seeds, per_step)


def truth(item: Tensor, options: Images) -> Tensor:
    """The image itself [H,W,C]."""
    return item


def picture(net: MLP, params: Tensor, item: Tensor, options: Images, **how: Any) -> Tensor:
    """What a network [P] shows on the image's grid, [H,W,C]; not clipped."""
    size = (item.shape[0], item.shape[1])
    return to_pixels(mlp(net, params, grid(*size, net.coords).to(params), **how), size)


def image_splits(
    source: Any,
    *,
    size: int | tuple[int, int] | None = 64,
    channels: int = 3,
    memory: int = 2 << 30,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
    group: str | None = None,
) -> Splits:
    """(train, validation, test) of a source: its own sub-folders where it has them, else ``split``.

    A folder with "train" and with "val" ("valid", "validation") or "test" is used as it is: other
    images in it are left out, and a part without a folder is split off from train by its share.
    Arguments and errors as for ``open_images`` and ``split``; the three sets share one memory.
    """
    images = open_images(source, size=size, channels=channels, memory=memory)
    return folders_or_split(images, validation=validation, test=test, seed=seed, group=group)


# Batches


def grid(height: int, width: int, coords: str = "unit") -> Tensor:
    """[H*W,2] float32: where each pixel lies, row i outer, column j inner.

    unit: ``(i/H, j/W)``; unit_xy: ``(j/W, i/H)``; centers: ``((2i+1)/H − 1, (2j+1)/W − 1)``;
    corners: ``(2i/(H−1) − 1, 2j/(W−1) − 1)``, and 0 along an axis of one pixel.
    Raises ValueError for "world" and for what is not in ``spec.COORDS``.
    """
    return lattice((height, width), coords).clone()


def image_batch(
    images: Tensor,
    net: MLP,
    *,
    seen: Tensor | None = None,
    seed: Tensor | None = None,
    per_step: int | None = None,
) -> Batch:
    """Images as a batch: ``x`` = grid of net.coords [N,2], shared; ``y`` = pixels [T,N,C]; N = H·W.

    Args:
        images: [T,H,W,C], float32 or float64, C = net.out_features.
        net: a network of two coordinates.
        seen: [T,H,W] bool, what the inner loop sees; the query is the rest. Both come ragged:
            x [T,max,2] and y [T,max,C] in pixel order, zeros behind, and counts [T].
        seed, per_step: as in ``Batch``, for the inner loop.

    Raises:
        ValueError: shapes or dtypes that do not fit, a task with all pixels seen or none.
    """
    if images.dim() != 4 or images.dtype not in (torch.float32, torch.float64):
        came = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"image_batch: images is {came}; accepted is float32 or 64 [T,H,W,C]")
    T, H, W, C = images.shape
    if (net.in_features, net.out_features) != (2, C):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"image_batch: {came}; accepted for these images is 2 to {C}")
    x = lattice((H, W), net.coords, images.device, images.dtype)  # [N,2]
    y = images.reshape(T, H * W, C)
    if seen is None:
        return Batch(x, y, seed=seed, per_step=per_step)
    if seen.dtype != torch.bool or seen.shape != images.shape[:3]:
        came = f"{seen.dtype} {tuple(seen.shape)}"
        raise ValueError(f"image_batch: seen is {came}; accepted is bool {(T, H, W)}")
    seen = seen.to(images.device).reshape(T, H * W)
    for task, count in enumerate(seen.sum(1).tolist()):
        if count in (0, H * W):
            came = f"task {task} has {count} of {H * W} pixels seen"
            raise ValueError(f"image_batch: {came}; accepted is some seen and some not")
    query = Batch(**_ragged(x, y, ~seen))
    return Batch(**_ragged(x, y, seen), seed=seed, per_step=per_step, query=query)


def _ragged(x: Tensor, y: Tensor, chosen: Tensor) -> dict[str, Any]:
    """x, y and counts of the points chosen [T,N], in order, padded to the longest with zeros."""
    counts = chosen.sum(1)  # [T]
    order = (~chosen).byte().argsort(dim=1, stable=True)[:, : int(counts.max()), None]  # [T,max,1]
    valid = chosen[..., None].gather(1, order)  # [T,max,1]
    picked = y.gather(1, order.expand(-1, -1, y.shape[2]))  # [T,max,C]
    return {"x": x[order[..., 0]].where(valid, 0), "y": picked.where(valid, 0), "counts": counts}


def mask(kind: str, height: int, width: int, tasks: int, seed: int = 0) -> Tensor:
    """[T,H,W] bool, True where a pixel is seen.

    Args:
        kind: "left", "top": that half, the larger of two; "center": all but a centred box of half
            the height and width; "random:0.25": that share of the pixels, drawn for each task;
            "every:2": each second row and column, from the first.
        seed: task t of a random mask depends on (seed, t, size).

    Raises:
        ValueError: another kind; a mask under which all pixels are seen, or none.
    """
    name, _, value = kind.partition(":")
    number = float(value) if re.fullmatch(r"\d*\.?\d+", value) else 0.0
    seen = torch.zeros(height, width, dtype=torch.bool)
    if kind == "left":
        seen[:, : (width + 1) // 2] = True
    elif kind == "top":
        seen[: (height + 1) // 2] = True
    elif kind == "center":
        seen[:] = True
        seen[height // 4 : height - height // 4, width // 4 : width - width // 4] = False
    elif name == "every" and number >= 2 and number.is_integer():
        seen[:: int(number), :: int(number)] = True
    elif name == "random" and 0 < number < 1:
        draws = rng.uniform(rng.task_seeds(seed, 0, tasks), height * width, 0, rng.MASKS)  # [T,N]
        first = draws.argsort(dim=1, stable=True)[:, : round(number * height * width)]
        seen = seen.new_zeros(draws.shape).scatter_(1, first, True).view(tasks, height, width)
    else:
        raise ValueError(f"mask: kind is {kind!r}; accepted are {', '.join(MASKS)}")
    if bool(seen.all()) or not bool(seen.any()):
        raise ValueError(f"mask: {kind!r} of {height} x {width} pixels leaves none seen, or all")
    return seen.expand(tasks, height, width).clone()


def to_pixels(y: Tensor, size: int | tuple[int, int]) -> Tensor:
    """[...,H*W,C] -> [...,H,W,C], a view; raises ValueError where y has not H·W points."""
    H, W = size_pair("to_pixels", size)
    if y.dim() < 2 or y.shape[-2] != H * W:
        came = f"y has shape {tuple(y.shape)}"
        raise ValueError(f"to_pixels: {came}; accepted for {H} x {W} is [...,{H * W},C]")
    return y.unflatten(-2, (H, W))


def batches(
    images: ImageSet,
    *,
    tasks: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    threads: int = 2,
    ahead: int = 4,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, images [T,H,W,C], indices [T]) for step = start .. stop − 1, without end if None.

    Step s takes positions sT .. sT + T − 1 of the permutations ``rng.permutation(seed, epoch, n)``
    laid end to end: a function of (seed, s), so a run resumed at s sees what it would have seen.

    Args:
        threads, ahead: so many threads decode, so many steps ahead; closing the iterator ends them.

    Raises:
        ValueError: an empty set, a number out of range; and at its step what reading an image does.
    """

    def load(step: int, indices: list[int]) -> Tensor:
        return torch.stack([images[i] for i in indices])

    stream = feed(
        len(images),
        load,
        tasks=tasks,
        seed=seed,
        start=start,
        stop=stop,
        threads=threads,
        ahead=ahead,
    )
    return _with_tensors(stream)


def _with_tensors(stream: Iterator) -> Iterator[tuple[int, Tensor, Tensor]]:
    with closing(stream):  # type: ignore[type-var]
        for step, pixels, indices in stream:
            yield step, pixels, torch.tensor(indices)
