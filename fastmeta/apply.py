"""A learned start at work: fit new images from it, and compare it with the starts of the paper."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import viz
from .batch import Batch
from .checkpoint import atomic_write, load_start, save_tensors, spec_to_json
from .convert import load_learnit
from .meta import baselines
from .meta.evaluate import Scores, Start, Tuned, evaluate, tune
from .ops.adapt import adapt
from .ops.mlp import mlp
from .spec import MLP
from .tasks import images as pictures
from .tasks import text
from .tasks.images import ImageSet
from .train import BEST, Config, at_least, first, make_folder, open_data, place, saved_config


@dataclass(frozen=True, eq=False)
class Learned:
    """A start on disk with what is known of how it was learned; config: of a run's folder."""

    name: str
    net: MLP
    start: Start
    inner_steps: int
    size: int | None
    config: Config | None


def builtin() -> list[str]:
    """Names of the starts that come with the package."""
    return sorted(path.stem for path in _starts().glob("*.safetensors"))


def _starts() -> Path:
    return Path(str(resources.files("fastmeta"))) / "starts"


def open_start(
    run: str, where: torch.device, *, lr: float | None = None, rule: str | None = None
) -> Learned:
    """A learned start for images, in float32 on a device.

    Args:
        run: a run's folder (its best start), a file of ``save_init``, the authors' .pkl or .npz, or
            the name of a start that comes with the package.
        lr, rule: instead of what it was learned with.

    Raises:
        ValueError, FileNotFoundError: not one of these, damaged, or not a network of images.
    """
    path, config = Path(run), None
    if path.is_dir():
        config = saved_config(path)
        path = path / BEST
    elif not path.exists() and run in builtin():
        path = _starts() / f"{run}.safetensors"
    if not path.exists():
        names = "".join(f", {name}" for name in builtin())
        raise FileNotFoundError(
            f"{run}: no start there ({path}); accepted are the folder of a training run, a "
            f".safetensors file, the authors' .pkl or .npz{names and f', and the names{names[1:]}'}"
        )
    extra: dict[str, Tensor] = {}
    if path.suffix in (".pkl", ".npz"):
        net, init = load_learnit(path)
        stored: dict[str, Any] = {"size": 178}  # CelebA's height and width
    else:
        net, init, extra, meta = load_start(path)
        stored = meta["config"] if isinstance(meta.get("config"), dict) else {}
    if net.in_features != 2 or net.out_features not in (1, 3):
        came = f"{run}: a network from {net.in_features} to {net.out_features} features"
        raise ValueError(f"{came}; accepted for images is from 2 to 1 or 3")
    rate: Any = extra.get("inner_lr", stored.get("inner_lr", 1e-2)) if lr is None else lr
    rate = rate.to(where, torch.float32) if isinstance(rate, Tensor) else float(rate)
    rule = stored.get("rule", "sgd") if rule is None else rule
    start = Start(init.to(where, torch.float32), rate, rule)
    steps = int(stored.get("inner_steps", 2))
    return Learned(Path(run).stem, net, start, steps, stored.get("size"), config)


@dataclass(frozen=True)
class Fit:
    """Fit images from a learned start; writes the fitted weights, the pictures and their scores."""

    run: str
    """a run's folder, a .safetensors, the authors' .pkl or .npz, or a start that comes along; may
    come first, without --run"""
    data: str
    """an image, a folder of images, an .npz or .npy file"""
    out: Path = Path("fits")
    """folder of the results"""
    steps: int | None = None
    """gradient steps; none: as many as the start was learned for"""
    lr: float | None = None
    """rate of the steps; none: as in training"""
    rule: Literal["sgd", "momentum", "adam"] | None = None
    """rule of the steps; none: as in training"""
    size: int | Literal["native"] | None = None
    """height and width; native: each image as it is; none: as in training"""
    mask: str | None = None
    """what is seen of each image: left, top, center, random:SHARE, every:N; the rest is scored"""
    seed: int = 0
    """of a random mask"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int | None = None
    """of torch; none: its own default"""
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """worker; none: the fastest that accepts the case"""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """arithmetic of the hidden layers"""


def fit(options: Fit) -> Path:
    """Run the inner loop from a learned start on every image; returns the folder with the results.

    ``fits.safetensors`` holds the weights [n,P] with the network's specification, the names and the
    sizes; ``scores.csv`` the PSNR of each image before each step and after the last; and each
    image has a picture of what its network shows.

    Raises:
        ValueError, OSError: a start, data or options that do not fit. FloatingPointError: a fit
            diverged.
    """
    at_least("fit", options, 0, "steps", "seed")
    where = place(options.device, options.threads)
    learned = open_start(options.run, where, lr=options.lr, rule=options.rule)
    net, start = learned.net, learned.start
    steps = learned.inner_steps if options.steps is None else options.steps
    _keep_apart(options)
    how: dict[str, Any] = {"impl": options.impl, "precision": options.precision}
    rows: list[dict] = []
    weights, sizes, taken = [], [], set[str]()
    for names, images in _chunks(options, learned):
        T, H, W, _ = images.shape
        seen = None
        if options.mask is not None:  # of each image by its number, whatever the chunks
            seeds = range(options.seed + len(rows), options.seed + len(rows) + T)
            seen = torch.cat([pictures.mask(options.mask, H, W, 1, seed) for seed in seeds])
        batch = pictures.image_batch(images.to(where), net, seen=seen)
        fitted = adapt(net, start.init, batch, steps, start.lr, rule=start.rule, **how)
        x = pictures.grid(H, W, net.coords).to(where)
        shown = pictures.to_pixels(mlp(net, fitted.params, x, **how), (H, W)).cpu()  # [T,H,W,C]
        make_folder(options.out)
        for t, name in enumerate(names):
            if not bool(shown[t].isfinite().all()):
                came = f"fit: {name} diverged within {steps} steps"
                raise FloatingPointError(f"{came}; a smaller --lr may help")
            row: dict[str, Any] = {"name": name, "picture": _picture_name(name, taken)}
            unseen = None if seen is None else ~seen[t]
            rows.append(row | _scores(fitted.losses[:, t], shown[t], images[t], unseen))
            viz.save_png(options.out / row["picture"], shown[t])
        weights.append(fitted.params.cpu())
        sizes += [[H, W]] * T
    spec, tensors = spec_to_json(net)
    tensors["params"] = torch.cat(weights)
    listed = {key: [row[key] for row in rows] for key in ("name", "picture")}
    meta = {"kind": "fits", "net": spec, "sizes": sizes, **listed}
    save_tensors(options.out / "fits.safetensors", tensors, meta)
    _write_csv(options.out / "scores.csv", rows)
    return options.out


def summary(out: Path) -> str:
    """One line on what ``fit`` left in a folder: mean PSNR before the first step and at the end."""
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    means = {k: sum(float(row[k]) for row in rows) / len(rows) for k in rows[0] if k[:5] == "psnr_"}
    steps = max(int(k[5:]) for k in means if k != "psnr_unseen")
    line = f"{len(rows)} images, mean PSNR {means['psnr_0']:.2f} dB at the start"
    line += f", {means[f'psnr_{steps}']:.2f} dB after {steps} steps" if steps else ""
    unseen = means.get("psnr_unseen")
    return line if unseen is None else f"{line}, {unseen:.2f} dB where nothing was seen"


def _keep_apart(options: Fit) -> None:
    """Refuse to write pictures where the images lie: one could replace the other."""
    source, out = Path(options.data).resolve(), options.out.resolve()
    inside = out.is_relative_to(source) if source.is_dir() else out == source.parent
    if inside and source.exists():
        came = f"fit: --out {options.out} lies where the images of --data are"
        raise ValueError(f"{came}; accepted is a folder apart from them")


def _chunks(options: Fit, learned: Learned) -> Iterator[tuple[list[str], Tensor]]:
    """(names, images [T,H,W,C]): two million pixels and 128 MiB of weights at a time, at most;
    images of native size one by one."""
    channels, source = learned.net.out_features, Path(options.data)
    size = learned.size if options.size is None else options.size
    if size in ("native", None) and source.is_dir():
        for name in pictures.open_images(source, channels=channels).names:
            one = pictures.open_images(source / name, size=None, channels=channels)
            yield [name], one[0][None]
        return
    size = None if size == "native" else size
    images = pictures.open_images(source, size=size, channels=channels)
    H, W = images.size
    many = max(1, min(2**21 // (H * W), 2**25 // learned.net.num_params))
    for at in range(0, len(images), many):
        index = range(at, min(at + many, len(images)))
        yield [images.names[i] for i in index], torch.stack([images[i] for i in index])


def _scores(losses: Tensor, shown: Tensor, truth: Tensor, unseen: Tensor | None) -> dict:
    """PSNR where the image was seen, before each step and after the last, and on the rest."""
    error = (shown - truth) ** 2  # [H,W,C]
    last = error.mean() if unseen is None else error[~unseen].mean()
    values = {f"psnr_{k}": _decibels(v) for k, v in enumerate([*losses.tolist(), float(last)])}
    if unseen is not None:
        values["psnr_unseen"] = _decibels(float(error[unseen].mean()))
    return values


def _decibels(mse: float) -> float:
    return round(-10 * math.log10(max(mse, 1e-30)), 3)


def _picture_name(name: str, taken: set[str]) -> str:
    """NAME.png, folders flattened; a number is added where another image has that name already."""
    stem = re.sub(r"[/\\:\0]", "_", os.path.splitext(name)[0])
    tries = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    free = next(t for t in tries if t.casefold() not in taken)
    taken.add(free.casefold())
    return f"{free}.png"


@dataclass(frozen=True)
class Eval:
    """Compare a learned start with others on held-out images; writes tables and pictures."""

    run: str
    """as in fit; may come first, without --run"""
    data: str | None = None
    """images to evaluate on; none: the run's own test split"""
    out: Path | None = None
    """none: RUN/eval"""
    count: int = 50
    """images, at most"""
    steps: int = 5
    """gradient steps"""
    tune_images: int = 8
    """training images (with --data: its last ones) on which the other starts are tuned"""
    mean_steps: int = 50
    """steps for each image behind the mean start"""
    starts: tuple[Literal["standard", "mean", "matched", "shuffled"], ...] = (
        "standard",
        "mean",
        "matched",
        "shuffled",
    )
    pictures: int = 4
    """images in the strip"""
    seed: int = 0
    """of the random starts"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int | None = None
    """of torch; none: its own default"""
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """worker; none: the fastest that accepts the case"""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """arithmetic of the hidden layers"""


def evaluate_run(options: Eval) -> Path:
    """Score the learned start and the paper's others on images never learned from.

    Every start but the learned one is fitted with the best of SGD and Adam over at least five rates
    each, chosen on training images for PSNR after the steps the start was learned for. Writes
    table.md, table.csv, scores.json, curve.png and strip.png; returns their folder.

    Raises:
        ValueError, OSError: a start, data or options that do not fit.
    """
    at_least("eval", options, 0, "steps", "pictures", "seed")
    at_least("eval", options, 1, "count", "tune_images", "mean_steps")
    where = place(options.device, options.threads)
    learned = open_start(options.run, where)
    net, out = learned.net, options.out
    training, held_out = _evaluation_data(options, learned)
    if out is None:
        out = Path(f"eval-{learned.name}") if learned.config is None else Path(options.run, "eval")
    make_folder(out)
    how: dict[str, Any] = {"impl": options.impl, "precision": options.precision}
    tasks = first(training, options.tune_images, net, where)
    steps = max(1, min(learned.inner_steps, options.steps))
    named = {"learned": Tuned(learned.start, math.nan, True)}
    for name in options.starts:
        init = _baseline(name, learned, tasks, options, how).to(where)
        named[name] = tune(net, init, tasks, steps, **how)
    batch = first(held_out, options.count, net, where)
    scores = {
        name: evaluate(
            net, t.start, batch, held_out.size, options.steps, pictures=options.pictures, **how
        )
        for name, t in named.items()
    }
    _write_evaluation(out, named, scores, batch, held_out.size, options, steps)
    return out


def _baseline(name: str, learned: Learned, tasks: Batch, options: Eval, how: dict) -> Tensor:
    """One of the paper's starts [P]."""
    net, seed = learned.net, options.seed
    if name == "standard":
        return baselines.standard(net, seed=seed + 1)  # not the one the run itself began with
    if name == "mean":
        return baselines.mean(net, tasks, options.mean_steps, 1e-4, seed=seed + 1, **how)
    make = {"matched": baselines.matched, "shuffled": baselines.shuffled}[name]
    return make(net, learned.start.init, seed=seed)


def _evaluation_data(options: Eval, learned: Learned) -> tuple[ImageSet, ImageSet]:
    """(images to tune on, images to score): a run's training and test split, or of --data."""
    if options.data is None:
        if learned.config is None:
            came = f"eval: {options.run} is not the folder of a run, so it has no test split"
            raise ValueError(f"{came}; accepted is one, or --data")
        training, _, test = open_data(learned.config)
        if len(test) == 0:
            came = f"eval: {learned.config.data} left no test images"
            raise ValueError(f"{came}; accepted are --data, and a run with --test above 0")
        return training, test
    size = learned.size or 64
    if options.data == "text":
        training, _, test = text.text_splits(size, seed=options.seed)
        return training, test
    found = pictures.open_images(options.data, size=size, channels=learned.net.out_features)
    spare = min(options.tune_images, len(found) // 5 + 1)
    if len(found) < 2:
        raise ValueError(f"eval: {options.data} holds {len(found)} image; accepted are 2 and more")
    return found.take(range(len(found) - spare, len(found))), found.take(range(len(found) - spare))


def _write_evaluation(
    out: Path,
    named: dict[str, Tuned],
    scores: dict[str, Scores],
    batch: Batch,
    size: tuple[int, int],
    options: Eval,
    tuned_for: int,
) -> None:
    table = [_table_row(name, named[name], scores[name]) for name in named]
    _write_csv(out / "table.csv", table)
    written = _markdown(table, options.steps, batch.tasks, tuned_for)
    atomic_write(out / "table.md", lambda path: path.write_text(written, encoding="utf-8"))
    raw = {name: {"psnr": s.psnr.tolist(), "ssim": s.ssim.tolist()} for name, s in scores.items()}
    atomic_write(out / "scores.json", lambda path: path.write_text(json.dumps(raw)))
    viz.learning_curves(out / "curve.png", {name: s.psnr for name, s in scores.items()})
    shown = {name: s.pictures for name, s in scores.items() if name in ("learned", "standard")}
    kept = min(options.pictures, batch.tasks)
    if kept:
        target = batch.y[:kept].unflatten(1, size).cpu()
        steps = sorted({k for k in (0, 1, 2, 5) if k < options.steps} | {min(5, options.steps)})
        viz.strip(out / "strip.png", target, shown, steps)


def _table_row(name: str, tuned: Tuned, scores: Scores) -> dict[str, str | float]:
    """A start, how it was fitted, then for each step mean PSNR, its standard error, mean SSIM."""
    rule, lr = tuned.start.rule, tuned.start.lr
    fitted = f"{rule if isinstance(rule, str) else rule.name} "
    fitted += "learned rates" if isinstance(lr, Tensor) else f"{lr:.3g}"
    row: dict[str, str | float] = {"start": name, "fitted_with": fitted + "*" * (not tuned.inside)}
    error = scores.psnr.double().std(0, correction=1) / math.sqrt(len(scores.psnr))
    for k in range(scores.psnr.shape[1]):
        row[f"psnr_{k}"] = round(float(scores.psnr[:, k].double().mean()), 3)
        row[f"stderr_{k}"] = round(float(error[k]), 3) if len(scores.psnr) > 1 else 0.0
        row[f"ssim_{k}"] = round(float(scores.ssim[:, k].double().mean()), 4)
    return row


def _markdown(table: list[dict], last: int, count: int, tuned_for: int) -> str:
    """The table for people: PSNR ± its standard error at every step, SSIM at the last."""
    steps = [f"{k} step{'s' * (k != 1)}" for k in range(last + 1)]
    head = ["start", "fitted with", *steps, f"SSIM, {steps[-1]}"]
    lines = [
        f"PSNR in dB after gradient steps, mean ± standard error over {count} images never learned "
        "from. Every start but the learned one has the rule and rate that are best for it on "
        f"training images after {steps[tuned_for]}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in table:
        cells = [f"{row[f'psnr_{k}']:.2f} ± {row[f'stderr_{k}']:.2f}" for k in range(last + 1)]
        cells = [row["start"], row["fitted_with"], *cells, f"{row[f'ssim_{last}']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row["fitted_with"].endswith("*") for row in table):
        lines += ["", "\\* the best rate tried, with none beyond it: another may be better still."]
    return "\n".join(lines) + "\n"


def _write_csv(path: Path, rows: list[dict]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    written = table.getvalue()
    atomic_write(path, lambda beside: beside.write_text(written, encoding="utf-8", newline=""))
