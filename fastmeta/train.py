"""Meta-training: configuration, loop, validation, logs, checkpoints, resumption.

Everything random is a function of (seed, outer step): the order of tasks, the points of an inner
step, the start. A run's whole state is therefore weights, optimiser moments and the step; it is
written to ``last.safetensors`` beside its final name and renamed, and a run that was killed ends
bit for bit where it would have ended (on the same machine, with the same threads).
"""

from __future__ import annotations

import csv
import dataclasses
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
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import rng
from .batch import Batch, March
from .checkpoint import atomic_write, load_start, save_start
from .meta.baselines import standard
from .meta.eikonal import Eikonal
from .meta.evaluate import Start, reached
from .meta.maml import MAML
from .meta.reptile import Reptile
from .spec import MLP, Encoding
from .tasks import kind_of, module, options
from .tasks.images import Images
from .tasks.sets import at_least, feed, refuse_changed
from .tasks.views import alive

Signal = TypeVar("Signal")

LAST, BEST, CONFIG = "last.safetensors", "best.safetensors", "config.json"
LOG, TABLE = "log.jsonl", "log.csv"
COLUMNS = ("step", "loss", "psnr", "grad_norm", "seconds", "val_score")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch.optim.Adam's state
# What may differ between a run and its resumption; anything else would be another run.
_MAY_CHANGE = ("iterations", "device", "threads", "impl", "save_every", "log_every")


@dataclass(frozen=True)
class Config(Generic[Signal]):
    """A meta-training run on one kind of signal. Defaults suit 64 × 64 images on a CPU; those of
    other kinds, and the paper's, are in ``recipes``."""

    data: str
    """a folder or a file; or a name: "text" (images), "phantoms" (ct), "chairs" (views); ./text for
    a folder of such a name"""
    out: Path
    """folder of the run: checkpoints, logs, configuration"""
    signal: Signal = field(default_factory=Images)  # type: ignore[assignment]
    """what a task is and how the data is read: ``Images()``, ``CT()``, ..."""
    algorithm: Literal["maml", "reptile"] = "maml"
    """maml: the gradient through the inner steps; reptile: towards where they end"""
    order: Literal[1, 2] = 2
    """of MAML's gradient: 2 is exact, 1 is first order (FOMAML)"""
    iterations: int = 600
    """outer steps"""
    tasks: int = 3
    """tasks per outer step"""
    inner_steps: int = 2
    """gradient steps on each task, K"""
    inner_lr: float = 3e-2
    """rate of the inner steps; with meta_sgd where the learned rates begin"""
    rule: Literal["sgd", "momentum", "adam", "meta_sgd"] = "sgd"
    """inner rule; meta_sgd learns one rate per parameter"""
    lr: float = 1e-4
    """rate of the outer Adam"""
    clip: float | None = None
    """largest norm of the outer gradient; none: no clipping"""
    per_step: int | None = None
    """pixels, points or rays drawn anew at each inner step; none: all"""
    eikonal: float = 0.0
    """weight of (‖∇f‖ − 1)² in the loss of a distance field; with reptile, or maml of order 1"""
    network: Literal["siren", "fourier", "frequencies", "relu"] = "siren"
    """siren: sine layers; fourier: ReLU on Gaussian features; frequencies: ReLU on a ladder of
    frequencies (NeRF's); relu: ReLU on bare coordinates"""
    width: int = 128
    """neurons in a hidden layer"""
    depth: int = 5
    """linear layers"""
    w0: float = 100.0
    """sine frequency of a siren"""
    features: int = 256
    """Gaussian features of a fourier network"""
    feature_scale: float = 30.0
    """their standard deviation"""
    frequencies: int = 20
    """frequencies of a ladder, from 2⁰"""
    max_exponent: float = 8.0
    """to 2 to this power"""
    test_counts: tuple[int, ...] = ()
    """angles or views that a task is seen through at test; the first also in validation"""
    test_steps: int | None = None
    """gradient steps at test and in validation; none: as many as in training"""
    test_per_step: int | None = None
    """points or rays drawn at each of them; none: as in training"""
    validate_every: int = 100
    """outer steps between validations"""
    validate_tasks: int = 16
    """tasks of the validation part that are scored, at most; without such a part (its share is 0)
    of those that are learned from"""
    save_every: int = 100
    """outer steps between checkpoints"""
    log_every: int = 10
    """outer steps between rows of the logs"""
    seed: int = 0
    """of everything random"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int | None = None
    """of torch; none: its own default"""
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """worker; none: the fastest that accepts the case"""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """arithmetic of the hidden layers"""
    max_memory: int | None = None
    """bytes of activations held at a time"""
    resume: bool = False
    """continue the run in --out; options not given are the run's own"""

    def __post_init__(self) -> None:
        at_least("train", self, 1, "tasks", "inner_steps", "features", "frequencies", "per_step")
        at_least("train", self, 1, "validate_every", "validate_tasks", "save_every", "log_every")
        at_least("train", self, 1, "test_steps", "test_per_step")
        at_least("train", self, 0, "iterations", "seed")
        if not self.lr > 0 or (self.clip is not None and not self.clip > 0):
            came = f"lr is {self.lr}, clip {self.clip}"
            raise ValueError(f"train: {came}; accepted are lr > 0, clip > 0 or none")
        if any(not isinstance(n, int) or n < 1 for n in self.test_counts):
            came = f"test_counts is {self.test_counts}"
            raise ValueError(f"train: {came}; accepted are integers >= 1")
        for option, chosen, *names in _IDLE:
            if getattr(self, option) == chosen:
                refuse_changed(self, f"{option} {chosen}", *names)
        self._check_signal()

    def _check_signal(self) -> None:
        """What the kind of signal asks of the rest."""
        kind = kind_of(self.signal)
        counted = module(kind).COUNTED
        if counted is None and self.test_counts:
            came = f"test_counts is {self.test_counts} with {kind}"
            raise ValueError(f"train: {came}, where nothing is counted; accepted is without")
        if counted is not None and not self.test_counts:
            raise ValueError(f"train: test_counts is empty; {kind} needs numbers of {counted}")
        if not self.eikonal >= 0 or (self.eikonal and kind != "sdf"):
            came = f"eikonal is {self.eikonal} with {kind}"
            raise ValueError(f"train: {came}; accepted is a weight >= 0 with sdf, else 0")
        if self.eikonal:
            refuse_changed(self, "eikonal", "max_memory")
        if self.eikonal and self.algorithm == "maml" and self.order == 2:
            came = "eikonal with order 2 would need a third derivative of the network"
            raise ValueError(
                f"train: {came}; accepted are algorithm reptile, and maml with order 1"
            )


# (option, its value, options that then have no effect)
_IDLE = (
    ("algorithm", "reptile", "order"),
    ("network", "siren", "features", "feature_scale", "frequencies", "max_exponent"),
    ("network", "fourier", "w0", "frequencies", "max_exponent"),
    ("network", "frequencies", "w0", "features", "feature_scale"),
    ("network", "relu", "w0", "features", "feature_scale", "frequencies", "max_exponent"),
)


def network(config: Config) -> MLP:
    """The network a configuration names, of the shape its kind of signal needs.

    Where the signal lies in [0,1] a sine network ends in + 0.5, a ReLU network in a sigmoid.
    """
    D, C, coords, bounded = module(kind_of(config.signal)).shape(config.signal)
    if config.network == "siren":
        shift = 0.5 if bounded else 0.0
        return MLP(
            D, C, config.width, config.depth, "sine", config.w0, output_shift=shift, coords=coords
        )
    encoding = None
    if config.network == "fourier":
        encoding = Encoding.gaussian(D, config.features, config.feature_scale)
    elif config.network == "frequencies":
        encoding = Encoding.frequencies(D, config.frequencies, config.max_exponent)
    output = "sigmoid" if bounded else "linear"
    return MLP(D, C, config.width, config.depth, encoding=encoding, output=output, coords=coords)


def open_data(config: Config) -> tuple[Any, Any, Any]:
    """(train, validation, test) of a configuration; the same for the same data and seed."""
    return module(kind_of(config.signal)).open_splits(config.data, config.signal, config.seed)


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
    if isinstance(checks[0].measure, March) and not _alive(learner, checks[0]):
        warnings.warn(
            f"outer step {run.step}: no density is above 0 on the rays of {checks[0].tasks} "
            "validation tasks: nothing is drawn, and ReLU densities have no gradient that could "
            "change it; --density softplus cannot die, a smaller --inner-lr may not",
            stacklevel=1,
        )
    how = {"impl": config.impl, "precision": config.precision}
    scores = [reached(learner.net, start, b, [steps], kind.METRIC, **how)[0] for b in checks]
    return round(float(torch.cat(scores)[:, -1].mean()), 4)


def _alive(learner: Any, batch: Batch) -> float:
    assert isinstance(batch.measure, March)
    return alive(learner.net, learner.init.detach(), batch, batch.measure)


# State on disk


def saved_config(folder: Path) -> Config:
    """The configuration of a run's folder."""
    path = folder / CONFIG
    try:
        return from_json(json.loads(path.read_text()), folder)
    except FileNotFoundError:
        came = f"{folder}: no {CONFIG} there"
        raise FileNotFoundError(f"{came}; accepted is the folder of a training run") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a run: {error}") from None


def from_json(stored: dict[str, Any], out: Path) -> Config:
    """What ``as_json`` took apart: the kind, its options and the rest, side by side."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    made = options(plain.pop("kind", "images"))
    own = {f.name for f in dataclasses.fields(made)}
    unknown = sorted(set(plain) - own - {f.name for f in dataclasses.fields(Config)})
    if unknown:
        raise ValueError(f"unknown options {', '.join(unknown)}")
    signal = made(**{k: v for k, v in plain.items() if k in own})
    rest = {k: v for k, v in plain.items() if k not in own}
    return Config(**{**rest, "signal": signal, "out": out, "resume": False})


def as_json(config: Config) -> dict[str, Any]:
    """A configuration as plain values, without the folder it lies in."""
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    signal, _, _ = (plain.pop(name) for name in ("signal", "out", "resume"))
    return {"kind": kind_of(signal), **dataclasses.asdict(signal), **plain}


def in_effect(config: Config) -> dict[str, Any]:
    """The values that a run depends on: no options that the others leave without effect."""
    idle = {
        n for option, chosen, *names in _IDLE if getattr(config, option) == chosen for n in names
    }
    plain = as_json(config).items()
    return {k: v for k, v in plain if k not in idle and v is not None and v != ()}


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
