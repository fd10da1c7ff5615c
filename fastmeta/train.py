"""Meta-training: configuration, loop, validation, logs, checkpoints, resumption.

Everything random is a function of (seed, outer step): the order of tasks, the points of an inner
step, the start. A run's whole state is therefore weights, optimiser moments and the step; it is
written to ``last.safetensors`` beside its final name and renamed, and a run that was killed ends
bit for bit where it would have ended (on the same machine, with the same threads).
"""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .batch import Batch, March
from .checkpoint import atomic_write, load_start, save_start
from .config import CONFIG, Config, as_json, network, open_data, saved_config
from .meta.baselines import standard
from .meta.eikonal import Eikonal
from .meta.evaluate import Start, reached
from .meta.maml import MAML
from .meta.reptile import Reptile
from .spec import MLP
from .tasks import kind_of, module
from .tasks.sets import feed
from .tasks.views import alive

LAST, BEST = "last.safetensors", "best.safetensors"
LOG, TABLE = "log.jsonl", "log.csv"
COLUMNS = ("step", "loss", "psnr", "grad_norm", "seconds", "val_score")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch.optim.Adam's state
# What may differ between a run and its resumption; anything else would be another run.
_MAY_CHANGE = ("iterations", "device", "threads", "impl", "save_every", "log_every")


def place(device: str, threads: int | None) -> torch.device:
    """The device a name stands for ("auto": cuda where there is one), and torch's threads set."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; accepted is an integer >= 1")
        torch.set_num_threads(threads)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accepted = "accepted are auto, cpu, cuda, cuda:1, ..."
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {device!r}; {accepted}")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {device!r} ({reason}); {accepted}") from None
    return chosen


def make_folder(path: Path) -> None:
    """A folder for results, with its parents; OSError in one line where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        came = f"{path}: the output folder cannot be made ({error.strerror})"
        raise OSError(f"{came}; accepted is a folder that can be written to") from None


def seen_at_test(
    config: Config, tasks: Any, net: MLP, count: int | None, *, chunk: int = 4, seed: int = 0
) -> Iterator[Batch]:
    """The tasks of a set as they are at test, so many at a time; task i has the same seed whatever
    the chunk."""
    kind = module(kind_of(config.signal))
    per_step = config.per_step if config.test_per_step is None else config.test_per_step
    seeds = rng.task_seeds(seed, 2**32 - 1, len(tasks))  # a step that no training reaches
    for at in range(0, len(tasks), chunk):
        these = range(at, min(at + chunk, len(tasks)))
        items = [tasks[i] for i in these]
        part = seeds[at : at + chunk]
        yield kind.observe(items, config.signal, net, part, count=count, per_step=per_step)


@dataclass
class _Run:
    """What changes while a run goes on."""

    learner: MAML | Reptile | Eikonal
    optimizer: torch.optim.Adam
    step: int = 0
    best: float = -math.inf
    rows: list[dict] = field(default_factory=list)


def train(config: Config) -> Path:
    """Meta-train a start; returns the path of the best checkpoint.

    Each outer step draws ``tasks`` tasks, adapts to each for ``inner_steps`` steps and hands the
    (pseudo-)gradient to Adam. ``last.safetensors`` holds the whole state, ``best.safetensors`` the
    start with the best validation score after ``test_steps`` steps: PSNR, or for distance fields
    −20 log10 of the mean absolute error, in dB both. An interrupt (Ctrl-C, SIGTERM)
    finishes the step, saves, and raises KeyboardInterrupt.

    Raises:
        ValueError, OSError: bad data, options or output folder. FloatingPointError: the loss is not
            finite; nothing already saved is touched.

    Source: Tancik et al. 2021, section 3.
    """
    where = place(config.device, config.threads)
    net = network(config)
    _check_folder(config)
    training, validation, _ = open_data(config)
    if len(validation) == 0 and getattr(config.signal, "validation", None) == 0:
        validation = training  # as was asked for; the best is then the best on what was learned
    if len(training) == 0 or len(validation) == 0:
        came = f"{len(training)} tasks to learn from, {len(validation)} to validate"
        raise ValueError(f"train: {came}; accepted is at least one of each")
    checks = list(_checks(config, validation, net, where))
    run = _restore(config, net, where)
    _write_folder(config, run)
    load = partial(_load_tasks, config, net, training)
    span = {"start": run.step, "stop": config.iterations}
    stream: Any = feed(len(training), load, tasks=config.tasks, seed=config.seed, **span)
    with closing(stream), _interrupts() as interrupted, _board(config, run) as board:
        for step, batch, _ in _bar(config, stream, run):
            started = time.perf_counter()
            row = _outer_step(config, run, batch.to(where), step)
            row["seconds"] = round(time.perf_counter() - started, 4)
            run.step = step + 1
            done = run.step == config.iterations
            validated = run.step % config.validate_every == 0 or done
            if validated:
                row["val_score"] = _validate(config, run, checks)
            if validated or run.step % config.log_every == 0:
                _log(config, run, row, board)
            if validated and row["val_score"] > run.best:
                run.best = row["val_score"]
                _save(config.out / BEST, config, run)
            if run.step % config.save_every == 0 or done or interrupted.is_set():
                _save(config.out / LAST, config, run)
            if interrupted.is_set() and not done:
                raise KeyboardInterrupt(
                    f"saved after outer step {run.step} of {config.iterations}; fastmeta train "
                    f"{kind_of(config.signal)} --resume --out {config.out} continues it"
                )
    for name in (LAST, BEST):  # no step was taken, or no validation was finite
        if not (config.out / name).exists():
            _save(config.out / name, config, run)
    return config.out / BEST


def _load_tasks(config: Config, net: MLP, training: Any, step: int, indices: list[int]) -> Batch:
    """The batch of an outer step, from the files on; a function of (seed, step)."""
    kind, seeds = module(kind_of(config.signal)), rng.task_seeds(config.seed, step, len(indices))
    items = [training[i] for i in indices]
    return kind.learn(items, config.signal, net, seeds, config.per_step)


def _checks(config: Config, validation: Any, net: MLP, where: torch.device) -> Iterator[Batch]:
    """What validation scores: the first tasks of its part, seen as at test."""
    chosen = validation.take(range(min(config.validate_tasks, len(validation))))
    count = config.test_counts[0] if config.test_counts else None
    for batch in seen_at_test(config, chosen, net, count, seed=config.seed):
        yield batch.to(where)


def _outer_step(config: Config, run: _Run, batch: Batch, step: int) -> dict[str, Any]:
    """One batch of tasks: loss, gradient, Adam."""
    loss = run.learner(batch)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    largest = math.inf if config.clip is None else config.clip
    norm = nn.utils.clip_grad_norm_(run.learner.parameters(), largest).item()
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise FloatingPointError(
            f"train: at outer step {step + 1} the loss is {value:g} and its gradient's norm "
            f"{norm:g}; accepted are finite ones: a smaller inner_lr ({config.inner_lr:g}) or lr "
            f"({config.lr:g}) may help; saved checkpoints are untouched"
        )
    run.optimizer.step()
    squared = batch.loss_parts[0] == "mse" and not config.eikonal
    return {
        "step": step + 1,
        "loss": value,
        "psnr": round(-10 * math.log10(max(value, 1e-30)), 4) if squared else None,
        "grad_norm": norm,
        "seconds": 0.0,
        "val_score": None,
    }


def _validate(config: Config, run: _Run, checks: list[Batch]) -> float:
    """Mean score of the validation tasks after the steps of a test, in dB."""
    learner, kind = run.learner, module(kind_of(config.signal))
    rate = learner.inner_lr.detach() if isinstance(learner.inner_lr, Tensor) else learner.inner_lr
    start = Start(learner.init.detach(), rate, learner.rule, config.eikonal)
    steps = config.inner_steps if config.test_steps is None else config.test_steps
    how = {"impl": config.impl, "precision": config.precision}
    _warn_dead(run, start.init, checks[0], how)
    scores = [reached(learner.net, start, b, [steps], kind.METRIC, **how)[0] for b in checks]
    return round(float(torch.cat(scores)[:, -1].mean()), 4)


def _warn_dead(run: _Run, init: Tensor, batch: Batch, how: dict) -> None:
    """Say so where a radiance field draws nothing at all."""
    march = batch.measure
    if isinstance(march, March) and not alive(run.learner.net, init, batch, march, **how):
        warnings.warn(
            f"outer step {run.step}: no density is above 0 on the rays of {batch.tasks} validation "
            "tasks: nothing is drawn, and ReLU densities have no gradient that could change it; "
            "--density softplus cannot die, a smaller --inner-lr may not",
            stacklevel=1,
        )


# State on disk


def _check_folder(config: Config) -> None:
    """Refuse to run over another run, and to resume one that is not there or was another.

    A run is there once it has a checkpoint: what was killed before may be begun again.
    """
    out = config.out
    if not config.resume:
        if (out / LAST).exists() or (out / BEST).exists():
            accepted = "accepted are --resume, or a folder of its own with --out"
            raise ValueError(f"{out}: holds a run already; {accepted}")
        return
    before, now = as_json(saved_config(out)), as_json(config)
    before |= {name: None for name in now.keys() - before.keys()}  # another kind of signal
    changed = [k for k in now if k not in _MAY_CHANGE and now[k] != before[k]]
    if changed:
        came = ", ".join(f"{k} {before[k]} -> {now[k]}" for k in changed)
        accepted = f"accepted to change: {', '.join(_MAY_CHANGE)}"
        raise ValueError(f"{out}: --resume with other options ({came}); {accepted}")


def _write_folder(config: Config, run: _Run) -> None:
    """The run's folder, its configuration, and both logs from the rows up to the checkpoint: what
    came after it will come again. What a kill left half written is removed."""
    make_folder(config.out)
    for half in config.out.glob(".fastmeta-*.tmp"):
        half.unlink(missing_ok=True)
    stored = json.dumps(as_json(config), indent=1) + "\n"
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(run.rows)
    atomic_write(config.out / CONFIG, lambda path: path.write_text(stored))
    atomic_write(config.out / LOG, lambda path: path.write_text(lines))
    atomic_write(config.out / TABLE, lambda path: path.write_text(table.getvalue(), newline=""))


def _restore(config: Config, net: MLP, where: torch.device) -> _Run:
    """The run at its last checkpoint, or a new one."""
    learner = _learner(config, net).to(where)
    run = _Run(learner, torch.optim.Adam(learner.parameters(), lr=config.lr))
    if config.resume and (config.out / LAST).exists():
        _load(config.out / LAST, config, run)
    return run


def _learner(config: Config, net: MLP) -> Any:
    """MAML, Reptile, or their first-order kin with an eikonal term, at a standard start."""
    shared: dict[str, Any] = {"init": standard(net, seed=config.seed)}
    for name in ("rule", "impl", "precision"):
        shared[name] = getattr(config, name)
    inner = (config.inner_steps, config.inner_lr)
    if config.eikonal:
        algorithm: Any = "reptile" if config.algorithm == "reptile" else "fomaml"
        return Eikonal(net, *inner, config.eikonal, algorithm=algorithm, **shared)
    shared["max_memory"] = config.max_memory
    if config.algorithm == "reptile":
        return Reptile(net, *inner, **shared)
    return MAML(net, *inner, order=config.order, **shared)


def _save(path: Path, config: Config, run: _Run) -> None:
    """Weights, learned rates and the step in one file; in ``last`` Adam's moments too."""
    extra: dict[str, Tensor] = {n: p for n, p in run.learner.named_parameters() if n != "init"}
    for name, parameter in run.learner.named_parameters() if path.name == LAST else ():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            extra[f"adam.{name}.{key}"] = torch.as_tensor(value)
    meta = {"step": run.step, "best": run.best, "config": as_json(config)}
    save_start(path, run.learner.net, run.learner.init, extra=extra, meta=meta)


def _load(path: Path, config: Config, run: _Run) -> None:
    """What ``_save`` wrote, into the run."""
    net, init, extra, meta = load_start(path)
    if net != run.learner.net:
        raise ValueError(f"{path}: holds {net}; accepted is the run's {run.learner.net}")
    stored = {"init": init, **extra}
    try:
        run.step, run.best = int(meta["step"]), float(meta["best"])
        for name, parameter in run.learner.named_parameters():
            parameter.data.copy_(stored[name])
            if run.step:
                moments: Any = {k: stored[f"adam.{name}.{k}"] for k in _MOMENTS}
                moments.update({k: moments[k].to(parameter.device) for k in _MOMENTS[1:]})
                run.optimizer.state[parameter] = moments
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}; accepted is a checkpoint of this run") from None
    if run.step > config.iterations:
        came = f"{path}: is at outer step {run.step}, iterations is {config.iterations}"
        raise ValueError(f"{came}; accepted are {run.step} and more")
    run.rows = [row for row in _read_log(config.out / LOG) if row["step"] <= run.step]


def _read_log(path: Path) -> list[dict]:
    """Rows of a log; a last line cut short by a kill is left out."""
    rows: list[dict] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _log(config: Config, run: _Run, row: dict[str, Any], board: Any) -> None:
    """One row more in both logs, TensorBoard, and where no bar can be shown on standard output."""
    run.rows.append(row)
    table = io.StringIO()
    csv.DictWriter(table, COLUMNS).writerow(row)
    for name, line in ((LOG, json.dumps(row) + "\n"), (TABLE, table.getvalue())):
        try:
            with open(config.out / name, "a", newline="") as file:
                file.write(line)
        except OSError as error:
            came = f"{config.out / name}: could not be written ({error.strerror})"
            raise OSError(f"{came}; saved checkpoints are untouched") from error
    if board is not None:
        for name in COLUMNS[1:]:
            if row[name] is not None:
                board.add_scalar(name, row[name], row["step"])
    if row["val_score"] is not None and not sys.stderr.isatty():
        psnr = "" if row["psnr"] is None else f"PSNR {row['psnr']:.2f} dB, "
        print(
            f"outer step {row['step']} of {config.iterations}: loss {row['loss']:.5f}, "
            f"{psnr}validation {row['val_score']:.2f} dB",
            flush=True,
        )


@contextmanager
def _board(config: Config, run: _Run) -> Iterator[Any]:
    """A TensorBoard writer where the package is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(config.out / "tensorboard"), purge_step=run.step + 1) as board:
        yield board


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set once; a second one interrupts at once.

    In the main thread only: elsewhere Python handles no signals.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt("stopped at once; the last checkpoint is intact")
        event.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def _bar(config: Config, feed: Iterator, run: _Run) -> Iterator:
    """The feed, with loss and PSNR on a bar where standard error is a terminal."""
    from tqdm import tqdm

    shape = {"total": config.iterations, "initial": run.step, "desc": config.algorithm}
    with tqdm(feed, file=sys.stderr, disable=None, mininterval=0.5, **shape) as bar:
        for item in bar:
            yield item
            if run.rows:
                row = run.rows[-1]
                shown = {"loss": f"{row['loss']:.4f}"}
                if row["psnr"] is not None:
                    shown["PSNR"] = f"{row['psnr']:.2f} dB"
                if run.best > -math.inf:
                    shown["best val"] = f"{run.best:.2f} dB"
                bar.set_postfix(shown, refresh=False)
