"""``fastmeta fit``: the inner loop from a learned start on new signals, and what it made of it."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..batch import Batch
from ..checkpoint import save_tensors, spec_to_json
from ..meta.evaluate import Start, fitted, predicted, score
from ..ops.adapt import Adapted, loss_grad
from ..spec import MLP
from ..tasks import images as pictures
from ..tasks import module
from ..tasks.ct import Scan
from ..tasks.sets import at_least
from ..train import make_folder, place
from . import show
from .start import Learned, open_start, resized
from .write import write_csv

_WHOLE = ("ct", "audio", "volumes")  # the query holds what was seen
_SHOWN = (0, 1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)  # steps in scores


@dataclass(frozen=True)
class Fit:
    """Fit signals from a learned start; writes the fitted weights, what they show, and scores."""

    run: str
    """a run's folder, a .safetensors, the authors' .pkl or .npz, or a start that comes along; may
    come first, without --run"""
    data: str
    """what to fit: a file or a folder, as for training"""
    out: Path = Path("fits")
    """folder of the results"""
    steps: int | None = None
    """gradient steps; none: as many as at the test of the run"""
    lr: float | None = None
    """rate of the steps; none: as in training"""
    rule: Literal["sgd", "momentum", "adam"] | None = None
    """rule of the steps; none: as in training"""
    count: int | None = None
    """angles or views that are seen; none: the first of the run's test_counts"""
    per_step: int | None = None
    """points or rays drawn at each step; none: as at the test of the run"""
    names: tuple[str, ...] = ()
    """only these; none: all"""
    size: int | Literal["native"] | None = None
    """height and width of images; native: each as it is; none: as in training"""
    mask: str | None = None
    """what is seen of each image: left, top, center, random:SHARE, every:N; the rest is scored; of
    photos with cameras: left"""
    skip_bad: bool = False
    """leave out what cannot be read, naming it, instead of stopping"""
    seed: int = 0
    """of masks, angles, views and draws"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int | None = None
    """of torch; none: its own default"""
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """worker; none: the fastest that accepts the case"""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """arithmetic of the hidden layers"""


def fit(options: Fit) -> Path:
    """Run the inner loop from a learned start on every task; returns the folder with the results.

    ``fits.safetensors`` holds the weights [n,P] with the network's specification, the names and
    what ``fastmeta render`` needs to know; ``scores.csv`` the score of each before steps and after
    the last; and each has a file of what its network shows (a picture, a mesh, a waveform).

    An interrupt saves the fits that are done and raises KeyboardInterrupt.

    Raises:
        ValueError, OSError: a start, data or options that do not fit. FloatingPointError: a fit
            diverged.
    """
    at_least("fit", options, 0, "steps", "seed")
    at_least("fit", options, 1, "count", "per_step")
    where = place(options.device, options.threads)
    learned = open_start(options.run, where, lr=options.lr, rule=options.rule)
    _check_kind(options, learned)
    _keep_apart(options)
    done = _Done()
    try:
        for names, items, signal in _chunks(options, learned):
            _fit_some(options, learned, names, items, signal, where, done)
    except KeyboardInterrupt:
        if not done.rows:
            raise
        _save(options, learned, done)
        raise KeyboardInterrupt(f"{len(done.rows)} fits are done and in {options.out}") from None
    _save(options, learned, done)
    return options.out


@dataclass
class _Done:
    """What has been fitted so far; taken: names of files, in lower case."""

    rows: list[dict] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    described: list[dict] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)


def _fit_some(
    options: Fit,
    learned: Learned,
    names: list[str],
    items: list[Any],
    signal: Any,
    where: torch.device,
    done: _Done,
) -> None:
    """Some tasks at once: weights, scores, a file for each."""
    net, config = learned.net, learned.config
    trained = config.inner_steps if config.test_steps is None else config.test_steps
    steps = trained if options.steps is None else options.steps
    how: dict[str, Any] = {"impl": options.impl, "precision": options.precision}
    batch = _batch(options, learned, items, signal, len(done.rows)).to(where)
    ended = fitted(net, learned.start, batch, steps, **how)
    scores = _scores(net, learned.start, ended, batch, learned.kind, how)
    make_folder(options.out)
    for t, name in enumerate(names):
        if not math.isfinite(scores[t].pop("last")) or not bool(ended.params[t].isfinite().all()):
            came = f"fit: {name} diverged within {steps} steps"
            raise FloatingPointError(f"{came}; a smaller --lr may help")
        path, weights = options.out / _stem(name, done.taken), ended.params[t]
        made = show.export(learned.kind, path, net, weights, items[t], signal, how)
        done.rows.append({"name": name, "picture": made.name} | scores[t])
        done.described.append(show.describe(learned.kind, items[t], signal))
        done.weights.append(weights.cpu())


def _save(options: Fit, learned: Learned, done: _Done) -> None:
    spec, tensors = spec_to_json(learned.net)
    tensors["params"] = torch.stack(done.weights)
    listed = {key: [row[key] for row in done.rows] for key in ("name", "picture")}
    signal = {"kind": learned.kind, **dataclasses.asdict(learned.config.signal)}
    meta = {"kind": "fits", "net": spec, "signal": signal, "tasks": done.described, **listed}
    save_tensors(options.out / show.FITS, tensors, meta)
    write_csv(options.out / "scores.csv", done.rows)


def summary(out: Path) -> str:
    """One line on what ``fit`` left in a folder: mean score before the first step and after all."""
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    means = {
        k: sum(float(row[k]) for row in rows) / len(rows)
        for k in rows[0]
        if re.fullmatch(r"(psnr|loss)_\d+|(psnr|mae)_(unseen|whole)", k)
    }
    steps = max(int(k.split("_")[1]) for k in means if k[-1].isdigit())
    kind = next(iter(means)).split("_")[0]
    say = "mean PSNR {:.2f} dB" if kind == "psnr" else "mean loss {:.5f}"
    line = f"{len(rows)} tasks, {say.format(means[f'{kind}_0'])} at the start"
    if steps:
        after = say.removeprefix("mean PSNR ").removeprefix("mean loss ")
        line += f", {after.format(means[f'{kind}_{steps}'])} after {steps} steps"
    if "psnr_unseen" in means:
        return f"{line}, {means['psnr_unseen']:.2f} dB where nothing was seen"
    if "psnr_whole" in means:
        return f"{line}, {means['psnr_whole']:.2f} dB on the signal as a whole"
    if "mae_unseen" in means:
        return f"{line}, mean absolute error {means['mae_unseen']:.5f} on other points"
    return line


def _check_kind(options: Fit, learned: Learned) -> None:
    """Options that the kind of signal leaves without effect."""
    counted = module(learned.kind).COUNTED
    if options.count is not None and counted is None:
        came = f"fit: count is {options.count} with {learned.kind}"
        raise ValueError(f"{came}, where nothing is counted; accepted is without")
    for name in ("mask", "size"):
        value = getattr(options, name)
        allowed = learned.kind == "images" or (name == "size" and isinstance(value, int))
        allowed = allowed or (learned.kind, name, value) == ("phototourism", "mask", "left")
        if value is not None and not allowed:
            came = f"fit: {name} is {value!r} with {learned.kind}"
            raise ValueError(f"{came}, where it has no effect; accepted is without")


def _keep_apart(options: Fit) -> None:
    """Refuse to write results where the data lies: one could replace the other."""
    source, out = Path(options.data).resolve(), options.out.resolve()
    inside = out.is_relative_to(source) if source.is_dir() else out == source.parent
    if inside and source.exists():
        came = f"fit: --out {options.out} lies where the images of --data are"
        raise ValueError(f"{came}; accepted is a folder apart from them")


def _chunks(options: Fit, learned: Learned) -> Iterator[tuple[list[str], list[Any], Any]]:
    """(names, items, the signal's options): of images two million pixels and 128 MiB of weights at
    a time, at most; images of native size, and all else, one by one."""
    signal, source = learned.config.signal, Path(options.data)
    size = options.size
    if learned.kind == "images" and not learned.known and size is None and not _authors(options):
        size = "native"
    if size == "native":
        yield from _native(source, signal, options)
        return
    if size is not None:
        signal = resized(learned, size)
    tasks = module(learned.kind).open_all(options.data, _skipping(signal, options))
    tasks = tasks.take(_named(options, tasks.names))
    if learned.kind == "audio" and signal.rate is None:
        signal = dataclasses.replace(signal, rate=tasks.about["rate"])
    many = 1
    if learned.kind == "images":
        many = max(1, min(2**21 // signal.size**2, 2**25 // learned.net.num_params))
    for at in range(0, len(tasks), many):
        index = range(at, min(at + many, len(tasks)))
        yield [tasks.names[i] for i in index], [tasks[i] for i in index], signal


def _skipping(signal: Any, options: Fit) -> Any:
    return dataclasses.replace(signal, skip_bad=options.skip_bad)


def _authors(options: Fit) -> bool:
    return Path(options.run).suffix in (".pkl", ".npz")


def _native(source: Path, signal: Any, options: Fit) -> Iterator[tuple[list[str], list[Any], Any]]:
    names: tuple[str | None, ...] = (None,)
    if source.is_dir():
        found = pictures.open_all(source, _skipping(signal, options))
        names = found.take(_named(options, found.names)).names
    for name in names:
        path = source if name is None else source / name
        images = pictures.open_images(path, size=None, channels=signal.channels)
        for i in range(len(images)):
            yield [images.names[i] if name is None else name], [images[i]], signal


def _named(options: Fit, names: tuple[str, ...]) -> list[int]:
    """Places of the names asked for."""
    missing = [name for name in options.names if name not in names]
    if missing:
        some = ", ".join(names[:5])
        raise ValueError(
            f"fit: names has {missing[0]}; accepted are names in the data: {some}, ..."
        )
    chosen = [i for i, name in enumerate(names) if not options.names or name in options.names]
    if not chosen:
        raise ValueError(f"fit: {options.data} holds nothing to fit; accepted is at least one task")
    return chosen


def _batch(options: Fit, learned: Learned, items: list[Any], signal: Any, at: int) -> Batch:
    """Tasks number at, at + 1, ... as they are seen; each by its number, whatever the chunks."""
    config, net, T = learned.config, learned.net, len(items)
    kind = module(learned.kind)
    if options.mask is not None and learned.kind == "images":
        H, W, _ = items[0].shape
        seeds = range(options.seed + at, options.seed + at + T)
        seen = torch.cat([pictures.mask(options.mask, H, W, 1, seed) for seed in seeds])
        return pictures.image_batch(torch.stack(items), net, seen=seen)
    per_step = config.per_step if config.test_per_step is None else config.test_per_step
    per_step = per_step if options.per_step is None else options.per_step
    count = config.test_counts[0] if config.test_counts else None
    count = count if options.count is None else options.count
    seeds_ = torch.cat([rng.task_seeds(options.seed, at + t, 1) for t in range(T)])
    if learned.kind == "phototourism" and options.mask is None:
        return kind.learn(items, signal, net, seeds_, per_step)  # the whole photo
    if learned.kind == "ct" and options.count is None and isinstance(items[0], Scan):
        count = None  # all angles that were measured
    return kind.observe(items, signal, net, seeds_, count=count, per_step=per_step)


def _scores(
    net: MLP, start: Start, ended: Adapted, batch: Batch, kind: str, how: dict
) -> list[dict[str, float]]:
    """For each task: loss (as PSNR where it is a square) on what was seen, before some of the steps
    and after the last, and the score of the query where it is another set: psnr_unseen or
    mae_unseen, or psnr_whole where what was seen is a part of it, or was seen indirectly."""
    metric = module(kind).METRIC
    params, losses = ended.params, ended.losses
    steps = len(losses)
    last = loss_grad(net, params, batch, step=steps, **how)[0]
    at = [k for k in _SHOWN if k < steps] + [steps]
    if start.eikonal and steps:  # the losses on the way hold its term, which is no distance
        first = loss_grad(net, start.init, batch, **how)[0]
        at, values = [0, steps], torch.stack([first, last]).double().cpu()
    else:
        values = torch.cat([losses, last[None]])[at].double().cpu()  # [len(at),T]
    name = "psnr" if batch.loss_parts[0] == "mse" else "loss"
    rows = []
    unseen = None
    if batch.query is not None:
        unseen = score(predicted(net, params, batch.query, **how), batch.query, metric)
    for t in range(batch.tasks):
        numbers = values[:, t].tolist()
        row = {
            f"{name}_{k}": _decibels(v) if name == "psnr" else round(v, 8)
            for k, v in zip(at, numbers, strict=True)
        }
        if unseen is not None:
            s = float(unseen[t])
            row |= (
                {f"psnr_{'whole' if kind in _WHOLE else 'unseen'}": round(s, 3)}
                if metric == "psnr"
                else {"mae_unseen": round(10 ** (-s / 20), 8)}
            )
        rows.append({**row, "last": numbers[-1]})
    return rows


def _decibels(mse: float) -> float:
    return round(-10 * math.log10(max(mse, 1e-30)), 3) if math.isfinite(mse) else mse


def _stem(name: str, taken: set[str]) -> str:
    """``show.file_stem``; a number is added where another task has that name already."""
    stem = show.file_stem(name)
    tries = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    free = next(t for t in tries if t.casefold() not in taken)
    taken.add(free.casefold())
    return free
