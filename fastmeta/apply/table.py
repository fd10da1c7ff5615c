"""``fastmeta eval``: the paper's tables. Rows are starts, columns are gradient steps, or numbers of
angles (CT) or of views (objects) after so many steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..config import open_data
from ..meta import baselines
from ..meta.evaluate import Tuned, rates, reached, ssim, tune
from ..tasks import module
from ..tasks.sets import at_least
from ..train import make_folder, place, seen_at_test
from . import sheet
from .sheet import Column, Row
from .start import Learned, open_start


@dataclass(frozen=True)
class Eval:
    """Compare learned starts with others on held-out tasks; writes tables and pictures."""

    run: str
    """as in fit; may come first, without --run"""
    also: tuple[str, ...] = ()
    """other runs on the same kind of signal: further rows"""
    data: str | None = None
    """tasks to evaluate on; none: the run's own test split"""
    out: Path | None = None
    """none: RUN/eval"""
    table: Path | None = None
    """write the table (Markdown) here too"""
    count: int = 50
    """tasks, at most"""
    steps: int | None = None
    """gradient steps; none: 5 for images, else as at the test of the run"""
    counts: tuple[int, ...] = ()
    """numbers of angles or views, a column each; none: the run's test_counts"""
    tune_tasks: int = 8
    """training tasks (with --data: its last ones) on which the other starts are tuned"""
    tune_at: int | None = None
    """steps for which they are tuned; none: as many as the run learned for, or each column's"""
    mean_steps: int = 50
    """steps for each task behind the mean start"""
    starts: tuple[Literal["standard", "mean", "matched", "shuffled"], ...] = (
        "standard",
        "mean",
        "matched",
        "shuffled",
    )
    """rows beside the learned ones"""
    pictures: int = 4
    """tasks in the strip"""
    seed: int = 0
    """of the random starts, and of angles, views and draws"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int | None = None
    """of torch; none: its own default"""
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """worker; none: the fastest that accepts the case"""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """arithmetic of the hidden layers"""


def evaluate_run(options: Eval) -> Path:
    """Score learned starts and the paper's others on tasks never learned from.

    Every start but a learned one is fitted with the best of SGD and Adam over at least five rates
    each, chosen on training tasks: where angles or views are counted for each column, else for the
    number of steps the start was learned for. Writes table.md, table.csv, scores.json, curve.png
    and strip.png; returns their folder.

    Raises:
        ValueError, OSError: a start, data or options that do not fit.
    """
    at_least("eval", options, 0, "steps", "pictures", "seed")
    at_least("eval", options, 1, "count", "tune_tasks", "tune_at", "mean_steps")
    where = place(options.device, options.threads)
    runs = [open_start(run, where) for run in (options.run, *options.also)]
    learned, out = runs[0], options.out
    for other in runs[1:]:
        _check_alike(learned, other)
    columns = _columns(options, learned)
    training, held_out = _evaluation_data(options, learned)
    held_out = held_out.take(range(min(options.count, len(held_out))))
    for other in runs[1:] if options.data is None else []:
        _check_unseen(learned, other, held_out)
    kind = module(learned.kind)
    if kind.PLANAR and kind.truth(held_out[0], learned.config.signal) is None:
        came = f"eval: of {held_out.names[0]} the image itself is not known"
        raise ValueError(f"{came}, so nothing can be scored; accepted are images or slices")
    tuning = training.take(range(min(options.tune_tasks, len(training))))
    if out is None:
        run = Path(options.run)
        out = run / "eval" if run.is_dir() else Path(f"eval-{learned.name}")
    make_folder(out)
    rows = []
    for name, tuned in _starts(options, runs, columns, tuning, where):
        rows.append(_row(name, tuned, learned, held_out, columns, options, where))
    sheet.write(out, rows, columns, learned, held_out, options)
    return out


def _check_alike(first: Learned, other: Learned) -> None:
    if first.config.signal != other.config.signal or first.net.in_features != other.net.in_features:
        came = f"{other.name} learned {other.config.signal}, {first.name} {first.config.signal}"
        raise ValueError(f"eval: {came}; accepted in one table are runs on the same kind of task")
    if first.net != other.net:
        came = f"{other.name} has the network {other.net}, {first.name} {first.net}"
        raise ValueError(f"eval: {came}; accepted in one table are runs with the same network")


def _check_unseen(first: Learned, other: Learned, held_out: Any) -> None:
    """Refuse to score a run on tasks that it learned from: another seed splits data otherwise."""
    a, b = first.config, other.config
    if not other.known or a.data != b.data or a.seed == b.seed:
        return
    training, validation, _ = open_data(b)
    seen = set(held_out.names) & {*training.names, *validation.names}
    if seen:
        came = f"{other.name} has learned from {min(seen)}, or chosen its best start by it"
        accepted = "accepted are runs whose --seed leaves the same tasks for test, and --data"
        raise ValueError(f"eval: {came}; {accepted}")


def _columns(options: Eval, learned: Learned) -> list[Column]:
    config, counted = learned.config, module(learned.kind).COUNTED
    tested = config.inner_steps if config.test_steps is None else config.test_steps
    if counted is not None:
        steps = tested if options.steps is None else options.steps
        counts = sorted(options.counts or config.test_counts)
        one = {1: counted.removesuffix("s")}
        return [Column(f"{n} {one.get(n, counted)}", n, steps) for n in counts]
    if options.counts:
        came = f"eval: counts is {options.counts} with {learned.kind}"
        raise ValueError(f"{came}, where nothing is counted; accepted is without")
    last = options.steps
    if last is None:
        last = 5 if learned.kind == "images" else tested
    some = [k for k in (0, 1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if k < last]
    shown = some if last <= 5 else [k for k in some if k not in (3, 4)]
    return [Column(f"{k} step{'s' * (k != 1)}", None, k) for k in [*shown, last]]


def _evaluation_data(options: Eval, learned: Learned) -> tuple[Any, Any]:
    """(tasks to tune on, tasks to score): a run's training and test split, or of --data."""
    if options.data is None:
        if not learned.known or not Path(options.run).is_dir():
            came = f"eval: {options.run} is not the folder of a run, so it has no test split"
            raise ValueError(f"{came}; accepted is one, or --data")
        training, _, test = open_data(learned.config)
        if len(test) == 0:
            came = f"eval: {learned.config.data} left no test tasks"
            raise ValueError(f"{came}; accepted are --data, and a run with a share for --test")
        return training, test
    signal, kind = learned.config.signal, module(learned.kind)
    if options.data in NAMED:
        training, _, test = kind.open_splits(options.data, _bare(signal), options.seed)
        return training, test
    found = kind.open_all(options.data, signal)
    if len(found) < 2:
        raise ValueError(f"eval: {options.data} holds {len(found)} task; accepted are 2 and more")
    spare = min(options.tune_tasks, len(found) // 5 + 1)
    return found.take(range(len(found) - spare, len(found))), found.take(range(len(found) - spare))


def _bare(signal: Any) -> Any:
    """The options without those of files, which data that fastmeta makes leave without effect."""
    made = ("validation", "test", "group", "skip_bad", "hu_low", "hu_high")
    own = {f.name: f.default for f in dataclasses.fields(signal) if f.name in made}
    return dataclasses.replace(signal, **own)


_KEPT = 1 << 30
NAMED = ("text", "phantoms", "chairs")  # data that fastmeta makes itself


def _batches(
    learned: Learned, tasks: Any, count: int | None, where: torch.device, seed: int, kept: int = 1
) -> Iterator[Batch]:
    """The tasks as they are seen, few enough at a time that ``kept`` sets of weights of each fit
    into ``_KEPT`` bytes."""
    chunk = 8 if learned.kind == "images" else 4
    chunk = max(1, min(chunk, _KEPT // (4 * kept * learned.net.num_params)))
    for batch in seen_at_test(learned.config, tasks, learned.net, count, chunk=chunk, seed=seed):
        yield batch.to(where)


def _how(options: Eval) -> dict[str, Any]:
    return {"impl": options.impl, "precision": options.precision}


def _starts(
    options: Eval, runs: list[Learned], columns: list[Column], tuning: Any, where: torch.device
) -> Iterator[tuple[str, list[Tuned]]]:
    """(name, how it is fitted in each column) of every row."""
    learned, how = runs[0], _how(options)
    kind, names = module(learned.kind), [run.row for run in runs]
    for i, run in enumerate(runs):
        name = run.row if names.count(run.row) == 1 else f"{run.row} {run.name}-{i + 1}"
        yield name, [Tuned(run.start, math.nan, True)] * len(columns)
    lr = learned.start.lr
    grid = rates(float(lr.mean()) if isinstance(lr, Tensor) else lr)
    settings = {"grid": grid, "metric": kind.METRIC, "eikonal": learned.config.eikonal, **how}
    for name in options.starts:
        init = _baseline(name, learned, tuning, options, where)
        if kind.COUNTED is None:
            steps = learned.config.inner_steps if options.tune_at is None else options.tune_at
            steps = max(1, min(steps, columns[-1].steps))
            seen = list(_batches(learned, tuning, None, where, options.seed + 1))
            yield name, [tune(learned.net, init, seen, steps, **settings)] * len(columns)
            continue
        found = []
        for column in columns:
            seen = list(_batches(learned, tuning, column.count, where, options.seed + 1))
            steps = column.steps if options.tune_at is None else options.tune_at
            found.append(tune(learned.net, init, seen, steps, **settings))
        yield name, found


def _baseline(
    name: str, learned: Learned, tuning: Any, options: Eval, where: torch.device
) -> Tensor:
    """One of the paper's starts [P]."""
    net, seed = learned.net, options.seed
    if name == "standard":
        return baselines.standard(net, seed=seed + 1).to(where)  # not the one the run began with
    if name == "mean":
        kind, config = module(learned.kind), learned.config
        items, T = [tuning[i] for i in range(len(tuning))], len(tuning)
        seeds = torch.arange(T) + (seed << 32)
        batch = kind.learn(items, config.signal, net, seeds, config.per_step).to(where)
        lr = 1e-4 if net.activation == "sine" else 1e-3
        how = _how(options)
        return baselines.mean(net, batch, options.mean_steps, lr, seed=seed + 1, **how).to(where)
    make = {"matched": baselines.matched, "shuffled": baselines.shuffled}[name]
    return make(net, learned.start.init, seed=seed)


def _row(
    name: str,
    tuned: list[Tuned],
    learned: Learned,
    held_out: Any,
    columns: list[Column],
    options: Eval,
    where: torch.device,
) -> Row:
    """Fit every held-out task from a start, for every column."""
    net, how, kind = learned.net, _how(options), module(learned.kind)
    signal = learned.config.signal
    groups = [columns] if kind.COUNTED is None else [[c] for c in columns]
    pictures: list[list[Tensor]] = [[] for _ in range(options.pictures)]
    scores, similar = [], []
    for number, group in enumerate(groups):
        found, start, at = [], tuned[number].start, 0
        steps = [column.steps for column in group]
        kept = max(steps) + 1 if len(steps) > 1 else 1  # ``reached`` keeps a trajectory
        for batch in _batches(learned, held_out, group[0].count, where, options.seed, kept):
            reached_, thetas = reached(net, start, batch, steps, kind.METRIC, **how)
            found.append(reached_.double().cpu())
            for t in range(batch.tasks):
                wanted = kind.PLANAR and number == len(groups) - 1
                if at + t >= options.pictures and not wanted:
                    continue
                item = held_out[at + t]
                shown = thetas if at + t < options.pictures else thetas[-1:]
                drawn = [kind.picture(net, th[t], item, signal, **how).cpu() for th in shown]
                if at + t < options.pictures:
                    pictures[at + t] += drawn
                if wanted:
                    similar.append(ssim(drawn[-1], kind.truth(item, signal)))
            at += batch.tasks
        scores.append(torch.cat(found))
    similarity = torch.tensor(similar, dtype=torch.float64) if kind.PLANAR else None
    return Row(name, tuned, torch.cat(scores, 1), similarity, pictures[: len(held_out)])
