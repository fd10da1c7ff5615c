"""A learned start at work: fit new images from it, and compare it with the starts of the paper."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import viz
from .checkpoint import atomic_write, load_start, save_tensors, spec_to_json
from .convert import load_learnit
from .meta import baselines
from .meta.evaluate import Scores, Start, evaluate, tune
from .ops.adapt import adapt
from .ops.mlp import mlp
from .spec import MLP
from .tasks import images as pictures
from .tasks.images import ImageSet
from .train import BEST, Config, device, first, open_data, saved_config


@dataclass(frozen=True, eq=False)
class Learned:
    """A start on disk with what is known of how it was learned."""

    name: str
    net: MLP
    start: Start
    inner_steps: int
    size: int | None
    config: Config | None


def builtin() -> list[str]:
    """Names of the starts that come with the package."""
    folder = resources.files("fastmeta") / "starts"
    return sorted(
        p.name.removesuffix(".safetensors")
        for p in folder.iterdir()
        if p.name.endswith(".safetensors")
    )


def open_start(run: str, *, lr: float | None = None, rule: str | None = None) -> Learned:
    """A run's folder (its best start), a file of ``save_init``, the authors' .pkl or .npz, or the name of a start that
    comes with the package; lr and rule override what it was learned with.

    Raises:
        ValueError, FileNotFoundError: not one of these, or damaged.
    """
    path = Path(run)
    if path.suffix in (".pkl", ".npz") and path.exists():
        net, init = load_learnit(path)
        return Learned(
            path.stem, net, Start(init, 1e-2 if lr is None else lr, rule or "sgd"), 2, 178, None
        )
    if not path.exists() and run in builtin():
        path = Path(str(resources.files("fastmeta") / "starts" / f"{run}.safetensors"))
    config = None
    if path.is_dir():
        config = saved_config(path)
        path = path / BEST
    if not path.exists():
        raise FileNotFoundError(
            f"{run}: no start there; accepted are the folder of a training run, a .safetensors file, the authors' .pkl "
            f"or .npz, and the names {', '.join(builtin())}"
        )
    net, init, extra, meta = load_start(path)
    stored = meta.get("config") if isinstance(meta.get("config"), dict) else {}
    rate = extra.get("inner_lr", stored.get("inner_lr", 1e-2)) if lr is None else lr
    start = Start(init, rate, rule or stored.get("rule", "sgd"))
    return Learned(
        Path(run).stem, net, start, int(stored.get("inner_steps", 2)), stored.get("size"), config
    )


@dataclass(frozen=True)
class Fit:
    """Fit images from a learned start; writes the fitted weights, the pictures and their scores."""

    run: str
    """folder of a training run, a .safetensors file, the authors' .pkl or .npz, or a start that comes along"""
    data: str
    """an image, a folder of images, an .npz or .npy file"""
    out: Path = Path("fits")
    steps: int | None = None
    """gradient steps; none: as many as the start was learned for"""
    lr: float | None = None
    rule: Literal["sgd", "momentum", "adam"] | None = None
    size: int | Literal["native"] | None = None
    """height and width; none: as in training"""
    mask: str | None = None
    """what is seen of each image: left, top, center, random:SHARE, every:N; the rest is scored too"""
    seed: int = 0
    """of a random mask"""
    device: str = "auto"
    threads: int | None = None
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None


def fit(options: Fit) -> Path:
    """Run the inner loop from a learned start on every image; returns the folder with the results.

    ``fits.safetensors`` holds the weights [n,P] with the network's specification, ``scores.csv`` the PSNR of each
    image before each step and after the last, and ``NAME.png`` what the network shows.

    Raises:
        ValueError, OSError: a start, data or options that do not fit.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = device(options.device)
    learned = open_start(options.run, lr=options.lr, rule=options.rule)
    net, start = learned.net, learned.start
    steps = learned.inner_steps if options.steps is None else options.steps
    if steps < 0:
        raise ValueError(f"fit: steps is {steps}; accepted is an integer >= 0")
    _make_folder(options.out)
    init, rate = (
        start.init.to(where),
        start.lr.to(where) if isinstance(start.lr, Tensor) else start.lr,
    )
    names, weights, rows = [], [], []
    for found, pixels in _chunks(options, learned):
        T, H, W, _ = pixels.shape
        seen = (
            None
            if options.mask is None
            else pictures.mask(options.mask, H, W, T, options.seed + len(names))
        )
        batch = pictures.image_batch(pixels.to(where), net, seen=seen)
        result = adapt(
            net,
            init,
            batch,
            steps,
            rate,
            rule=start.rule,
            impl=options.impl,
            precision=options.precision,
        )
        x = pictures.grid(H, W, net.coords).to(where)
        out = mlp(net, result.params, x, impl=options.impl, precision=options.precision)
        shown = pictures.to_pixels(out, (H, W)).cpu()  # [T,H,W,C]
        for t, name in enumerate(found):
            rows.append(
                {
                    "name": name,
                    **_scores(
                        result.losses[:, t], shown[t], pixels[t], None if seen is None else seen[t]
                    ),
                }
            )
            pictures.save_png(_picture_path(options.out, name), shown[t])
        names += found
        weights.append(result.params.cpu())
    spec, tensors = spec_to_json(net)
    tensors["params"] = torch.cat(weights)
    save_tensors(
        options.out / "fits.safetensors", tensors, {"kind": "fits", "net": spec, "names": names}
    )
    _write_csv(options.out / "scores.csv", rows)
    return options.out


def _chunks(options: Fit, learned: Learned) -> Iterator[tuple[list[str], Tensor]]:
    """(names, images [T,H,W,C]) of up to about two million pixels at a time; native sizes come one by one."""
    channels = learned.net.out_features
    size = learned.size if options.size is None else options.size
    if size == "native" or size is None:
        whole = pictures.open_images(
            options.data, channels=channels
        )  # lists the names, at any size
        root = Path(options.data)
        for name in whole.names:
            source = root / name if root.is_dir() else root
            one = pictures.open_images(source, size=None, channels=channels)
            if not root.is_dir():
                yield from ((one.names[i : i + 1], one[i][None]) for i in range(len(one)))
                return
            yield [name], one[0][None]
        return
    images = pictures.open_images(options.data, size=size, channels=channels)
    many = max(1, 2**21 // (size * size))
    for at in range(0, len(images), many):
        index = range(at, min(at + many, len(images)))
        yield [images.names[i] for i in index], torch.stack([images[i] for i in index])


def _scores(losses: Tensor, shown: Tensor, truth: Tensor, seen: Tensor | None) -> dict[str, float]:
    """PSNR on what was seen, before each step and after the last, and on the rest where there is a mask."""
    error = (shown - truth) ** 2
    last = error.mean() if seen is None else error[seen].mean()
    values = {
        f"psnr_{k}": _decibels(float(v)) for k, v in enumerate([*losses.tolist(), float(last)])
    }
    if seen is not None:
        values["psnr_unseen"] = _decibels(float(error[~seen].mean()))
    return values


def _decibels(mse: float) -> float:
    return round(-10 * math.log10(max(mse, 1e-30)), 3) if math.isfinite(mse) else math.nan


def _picture_path(out: Path, name: str) -> Path:
    """out/NAME.png, sub-folders flattened."""
    return out / (os.path.splitext(name)[0].replace(os.sep, "_").replace("/", "_") + ".png")


@dataclass(frozen=True)
class Eval:
    """Compare a learned start with others on held-out images; writes tables, curves and a strip of pictures."""

    run: str
    """as in fit"""
    data: str | None = None
    """images to evaluate on; none: the run's own test split"""
    out: Path | None = None
    """none: RUN/eval"""
    count: int = 50
    """images, at most"""
    steps: int = 5
    tune_images: int = 8
    """training images (with --data: the last ones) on which each other start gets its best rule and rate"""
    mean_steps: int = 50
    """steps for each image behind the mean start"""
    starts: tuple[Literal["standard", "mean", "matched", "shuffled"], ...] = (
        "standard",
        "mean",
        "matched",
        "shuffled",
    )
    pictures: int = 4
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None


def evaluate_run(options: Eval) -> Path:
    """Score the learned start and the paper's others on images never learned from; returns the folder.

    Every start but the learned one is fitted with the best of SGD and Adam over five rates each, chosen on training
    images for PSNR after the steps the start was learned for. Writes table.md, table.csv, scores.json, curve.png and
    strip.png.

    Raises:
        ValueError, OSError: a start, data or options that do not fit.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = device(options.device)
    learned = open_start(options.run)
    training, held_out = _evaluation_data(options, learned)
    out = options.out
    if out is None:
        out = (
            Path(options.run) / "eval"
            if Path(options.run).is_dir()
            else Path(f"eval-{learned.name}")
        )
    _make_folder(out)
    net = learned.net
    how = {"impl": options.impl, "precision": options.precision}
    rate = learned.start.lr
    start = Start(
        learned.start.init.to(where),
        rate.to(where) if isinstance(rate, Tensor) else rate,
        learned.start.rule,
    )
    tasks = first(training, options.tune_images, net, where)
    named = {"learned": start}
    for name in options.starts:
        init = {
            "standard": lambda: baselines.standard(net, seed=options.seed + 1),
            "mean": lambda: baselines.mean(
                net, tasks, options.mean_steps, 1e-4, seed=options.seed + 1, **how
            ),
            "matched": lambda: baselines.matched(net, start.init, seed=options.seed),
            "shuffled": lambda: baselines.shuffled(net, start.init, seed=options.seed),
        }[name]()
        named[name], _ = tune(
            net, init.to(tasks.y), tasks, max(1, min(learned.inner_steps, options.steps)), **how
        )
    batch = first(held_out, options.count, net, where)
    scores = {
        name: evaluate(
            net, s, batch, held_out.size, options.steps, pictures=options.pictures, **how
        )
        for name, s in named.items()
    }
    _write_evaluation(out, named, scores, batch, held_out.size, options)
    return out


def _evaluation_data(options: Eval, learned: Learned) -> tuple[ImageSet, ImageSet]:
    """(images to tune on, images to score): the run's training and test split, or two ends of --data."""
    if options.data is None:
        if learned.config is None:
            raise ValueError(
                f"eval: {options.run} is not the folder of a run, so it has no test split; give --data"
            )
        training, _, test = open_data(learned.config)
        if len(test) == 0:
            raise ValueError(
                f"eval: {learned.config.data} left no test images; give --data, or train with --test > 0"
            )
        return training, test
    size = learned.size or 64
    if options.data == "text":
        from .tasks import text

        training, _, test = text.text_splits(size, seed=options.seed)
        return training, test
    found = pictures.open_images(options.data, size=size, channels=learned.net.out_features)
    if len(found) < 2:
        raise ValueError(f"eval: {options.data} holds {len(found)} image; accepted are at least 2")
    spare = min(options.tune_images, max(1, len(found) // 5))
    return found.take(range(len(found) - spare, len(found))), found.take(range(len(found) - spare))


def _write_evaluation(
    out: Path,
    named: dict[str, Start],
    scores: dict[str, Scores],
    batch: object,
    size: tuple[int, int],
    options: Eval,
) -> None:
    steps = list(range(options.steps + 1))
    table = [table_row(name, named[name], scores[name]) for name in named]
    _write_csv(out / "table.csv", table)
    lines = _markdown(table, steps)
    count = len(scores["learned"].psnr)
    head = f"PSNR in dB after so many gradient steps, mean ± standard error over {count} images never learned from.\n\n"
    atomic_write(out / "table.md", lambda path: path.write_text(head + lines))
    raw = {name: {"psnr": s.psnr.tolist(), "ssim": s.ssim.tolist()} for name, s in scores.items()}
    atomic_write(out / "scores.json", lambda path: path.write_text(json.dumps(raw)))
    viz.learning_curves(out / "curve.png", {name: s.psnr for name, s in scores.items()})
    shown = {name: scores[name].pictures for name in ("learned", "standard") if name in scores}
    kept = shown["learned"].shape[1]
    if kept:
        target = batch.y[:kept].unflatten(1, size).cpu()  # type: ignore[attr-defined]
        viz.strip(out / "strip.png", target, shown, [k for k in (0, 1, 2, 5) if k <= options.steps])


def table_row(name: str, start: Start, scores: Scores) -> dict[str, str | float]:
    """One start's line: how it was fitted, then mean PSNR, its standard error and mean SSIM for each step."""
    rule = start.rule if isinstance(start.rule, str) else start.rule.name
    rate = f"{start.lr:g}" if isinstance(start.lr, float) else "learned"
    row: dict[str, str | float] = {"start": name, "fitted_with": f"{rule} {rate}"}
    for k in range(scores.psnr.shape[1]):
        values = scores.psnr[:, k].double()
        row[f"psnr_{k}"] = round(float(values.mean()), 3)
        row[f"stderr_{k}"] = (
            round(float(values.std() / math.sqrt(len(values))), 3) if len(values) > 1 else 0.0
        )
        row[f"ssim_{k}"] = round(float(scores.ssim[:, k].mean()), 4)
    return row


def _markdown(table: list[dict], steps: list[int]) -> str:
    head = ["start", "fitted with", *[f"{k} steps" for k in steps], f"SSIM, {steps[-1]} steps"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        cells = [f"{row[f'psnr_{k}']:.2f} ± {row[f'stderr_{k}']:.2f}" for k in steps]
        lines.append(
            f"| {row['start']} | {row['fitted_with']} | "
            + " | ".join(cells)
            + f" | {row[f'ssim_{steps[-1]}']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda beside: beside.write_text(text.getvalue(), newline=""))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path}: the output folder cannot be made ({error.strerror})") from None
