"""Meta-training on images: configuration, loop, validation, logs, checkpoints, resumption.

Everything random is a function of (seed, outer step): the order of images, the points of an inner
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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import rng
from .batch import Batch
from .checkpoint import atomic_write, load_start, save_start
from .meta.baselines import standard
from .meta.evaluate import Start, curve
from .meta.maml import MAML
from .meta.reptile import Reptile
from .spec import MLP, fourier_mlp, siren
from .tasks import text
from .tasks.images import ImageSet, batches, image_batch, open_splits

LAST, BEST, CONFIG = "last.safetensors", "best.safetensors", "config.json"
LOG, TABLE = "log.jsonl", "log.csv"
COLUMNS = ("step", "loss", "psnr", "grad_norm", "seconds", "val_psnr")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch.optim.Adam's state
# What may differ between a run and its resumption; anything else would be another run.
_MAY_CHANGE = ("iterations", "device", "threads", "impl", "save_every", "log_every")


@dataclass(frozen=True)
class Config:
    """A meta-training run on images. The defaults suit 64 × 64 images on a CPU."""

    data: str
    """a folder of images, .npz, .npy, or "text" (strings rendered; ./text for such a folder)"""
    out: Path
    """folder of the run: checkpoints, logs, configuration"""
    algorithm: Literal["maml", "reptile"] = "maml"
    """maml: the gradient through the inner steps; reptile: towards where they end"""
    order: Literal[1, 2] = 2
    """of MAML's gradient: 2 is exact, 1 is first order (FOMAML)"""
    iterations: int = 600
    """outer steps"""
    tasks: int = 3
    """images per outer step"""
    inner_steps: int = 2
    """gradient steps on each image, K"""
    inner_lr: float = 3e-2
    """rate of the inner steps; with meta_sgd where the learned rates begin"""
    rule: Literal["sgd", "momentum", "adam", "meta_sgd"] = "sgd"
    """inner rule; meta_sgd learns one rate per parameter"""
    lr: float = 1e-4
    """rate of the outer Adam"""
    clip: float | None = None
    """largest norm of the outer gradient; none: no clipping"""
    per_step: int | None = None
    """pixels drawn anew at each inner step; none: all"""
    size: int = 64
    """height and width; photographs are cropped about the centre and resized"""
    channels: Literal[1, 3] = 3
    """of the images: 3 colour, 1 grey"""
    network: Literal["siren", "fourier"] = "siren"
    """siren: sine layers; fourier: ReLU layers on Gaussian features"""
    width: int = 128
    """neurons in a hidden layer"""
    depth: int = 5
    """linear layers"""
    w0: float = 100.0
    """sine frequency of a siren"""
    features: int = 256
    """Gaussian features of a fourier network"""
    scale: float = 30.0
    """their standard deviation"""
    validation: float = 0.1
    """share of the images for validation (of the groups, where there is a pattern)"""
    test: float = 0.1
    """share held out for `fastmeta eval`"""
    group: str | None = None
    """regular expression with one group: names with the same match stay in one part"""
    validate_every: int = 100
    """outer steps between validations"""
    validate_images: int = 16
    """images of the validation part that are scored, at most"""
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
        at_least("train", self, 1, "tasks", "inner_steps", "size", "features", "per_step")
        at_least("train", self, 1, "validate_every", "validate_images", "save_every", "log_every")
        at_least("train", self, 0, "iterations", "seed")
        if not self.lr > 0 or (self.clip is not None and not self.clip > 0):
            came = f"lr is {self.lr}, clip {self.clip}"
            raise ValueError(f"train: {came}; accepted are lr > 0, clip > 0 or none")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise where an option was given that the others leave without effect."""
        idle = {
            ("algorithm", "reptile"): ("order",),
            ("network", "siren"): ("features", "scale"),
            ("network", "fourier"): ("w0",),
            ("data", "text"): ("validation", "test", "group"),
        }
        standing = {f.name: f.default for f in dataclasses.fields(self)}
        for (option, chosen), names in idle.items():
            for name in names if getattr(self, option) == chosen else ():
                if getattr(self, name) != standing[name]:
                    came = f"{name} is {getattr(self, name)!r} with {option} {chosen}"
                    raise ValueError(f"train: {came}, where it has no effect; accepted is without")


def at_least(op: str, options: object, least: int, *names: str) -> None:
    """Raise unless each of these options is None or an integer in [least, 2⁶²)."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (isinstance(value, int) and least <= value < 2**62):
            raise ValueError(f"{op}: {name} is {value!r}; accepted is an integer >= {least}")


def network(config: Config) -> MLP:
    """The network a configuration names."""
    if config.network == "fourier":
        return fourier_mlp(
            2, config.channels, config.width, config.depth, config.features, config.scale
        )
    return siren(2, config.channels, config.width, config.depth, config.w0, output_shift=0.5)


def open_data(config: Config) -> tuple[ImageSet, ImageSet, ImageSet]:
    """(train, validation, test) of a configuration; the same for the same data and seed."""
    if config.data == "text":
        if config.channels != 3:
            raise ValueError(f"train: channels is {config.channels}; the text class has 3")
        return text.text_splits(config.size, seed=config.seed)
    return open_splits(
        config.data,
        size=config.size,
        channels=config.channels,
        seed=config.seed,
        validation=config.validation,
        test=config.test,
        group=config.group,
    )


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


def first(images: ImageSet, count: int, net: MLP, where: torch.device) -> Batch:
    """The first images of a set as one batch of whole images."""
    pixels = torch.stack([images[i] for i in range(min(count, len(images)))])
    return image_batch(pixels.to(where), net)


@dataclass
class _Run:
    """What changes while a run goes on."""

    learner: MAML | Reptile
    optimizer: torch.optim.Adam
    step: int = 0
    best: float = -math.inf
    rows: list[dict] = field(default_factory=list)


def train(config: Config) -> Path:
    """Meta-train a start; returns the path of the best checkpoint.

    Each outer step draws ``tasks`` images, adapts to each for ``inner_steps`` steps and hands the
    (pseudo-)gradient to Adam. ``last.safetensors`` holds the whole state, ``best.safetensors`` the
    start with the best validation PSNR after ``inner_steps`` steps. An interrupt (Ctrl-C, SIGTERM)
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
    if len(training) == 0 or len(validation) == 0:
        came = f"{len(training)} images to learn from, {len(validation)} to validate"
        raise ValueError(f"train: {came}; accepted is at least one of each")
    checks = first(validation, config.validate_images, net, where)
    run = _restore(config, net, where)
    _write_folder(config, run)
    feed: Any = batches(
        training, tasks=config.tasks, seed=config.seed, start=run.step, stop=config.iterations
    )
    with closing(feed), _interrupts() as interrupted, _board(config, run) as board:
        for step, pixels, _ in _bar(config, feed, run):
            started = time.perf_counter()
            row = _outer_step(config, run, net, pixels.to(where), step)
            row["seconds"] = round(time.perf_counter() - started, 4)
            run.step = step + 1
            done = run.step == config.iterations
            validated = run.step % config.validate_every == 0 or done
            if validated:
                row["val_psnr"] = _validate(config, run, checks)
            if validated or run.step % config.log_every == 0:
                _log(config, run, row, board)
            if validated and row["val_psnr"] > run.best:
                run.best = row["val_psnr"]
                _save(config.out / BEST, config, run)
            if run.step % config.save_every == 0 or done or interrupted.is_set():
                _save(config.out / LAST, config, run)
            if interrupted.is_set() and not done:
                raise KeyboardInterrupt(
                    f"saved after outer step {run.step} of {config.iterations}; "
                    f"fastmeta train images --resume --out {config.out} continues it"
                )
    for name in (LAST, BEST):  # no step was taken, or no validation was finite
        if not (config.out / name).exists():
            _save(config.out / name, config, run)
    return config.out / BEST


def _outer_step(config: Config, run: _Run, net: MLP, pixels: Tensor, step: int) -> dict[str, Any]:
    """One batch of tasks: loss, gradient, Adam."""
    seed = None
    if config.per_step is not None:
        seed = rng.task_seeds(config.seed, step, pixels.shape[0]).to(pixels.device)
    batch = image_batch(pixels, net, seed=seed, per_step=config.per_step)
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
    return {
        "step": step + 1,
        "loss": value,
        "psnr": round(-10 * math.log10(max(value, 1e-30)), 4),
        "grad_norm": norm,
        "seconds": 0.0,
        "val_psnr": None,
    }


def _validate(config: Config, run: _Run, checks: Batch) -> float:
    """Mean PSNR of the validation images after the inner steps."""
    learner = run.learner
    rate = learner.inner_lr.detach() if isinstance(learner.inner_lr, Tensor) else learner.inner_lr
    start = Start(learner.init.detach(), rate, learner.rule)
    how = {"impl": config.impl, "precision": config.precision}
    scores = [
        curve(learner.net, start, checks.take(slice(i, i + 4)), config.inner_steps, **how)[0]
        for i in range(0, checks.tasks, 4)
    ]
    return round(float(torch.cat(scores)[:, -1].mean()), 4)


# State on disk


def saved_config(folder: Path) -> Config:
    """The configuration of a run's folder."""
    path = folder / CONFIG
    try:
        stored = json.loads(path.read_text())
        known = {f.name for f in dataclasses.fields(Config)}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise ValueError(f"unknown options {', '.join(unknown)}")
        return Config(**{**stored, "out": folder, "resume": False})
    except FileNotFoundError:
        came = f"{folder}: no {CONFIG} there"
        raise FileNotFoundError(f"{came}; accepted is the folder of a training run") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a run: {error}") from None


def _as_json(config: Config) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    return {k: v for k, v in plain.items() if k not in ("out", "resume")}


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
    before, now = _as_json(saved_config(out)), _as_json(config)
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
    stored = json.dumps(_as_json(config), indent=1) + "\n"
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
    kind: Any = MAML if config.algorithm == "maml" else Reptile
    options: dict[str, Any] = {"order": config.order} if config.algorithm == "maml" else {}
    for name in ("rule", "impl", "precision", "max_memory"):
        options[name] = getattr(config, name)
    init = standard(net, seed=config.seed)
    learner = kind(net, config.inner_steps, config.inner_lr, init=init, **options).to(where)
    run = _Run(learner, torch.optim.Adam(learner.parameters(), lr=config.lr))
    if config.resume and (config.out / LAST).exists():
        _load(config.out / LAST, config, run)
    return run


def _save(path: Path, config: Config, run: _Run) -> None:
    """Weights, learned rates and the step in one file; in ``last`` Adam's moments too."""
    extra: dict[str, Tensor] = {n: p for n, p in run.learner.named_parameters() if n != "init"}
    for name, parameter in run.learner.named_parameters() if path.name == LAST else ():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            extra[f"adam.{name}.{key}"] = torch.as_tensor(value)
    meta = {"step": run.step, "best": run.best, "config": _as_json(config)}
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
    if row["val_psnr"] is not None and not sys.stderr.isatty():
        print(
            f"outer step {row['step']} of {config.iterations}: loss {row['loss']:.5f}, "
            f"PSNR {row['psnr']:.2f} dB, validation {row['val_psnr']:.2f} dB",
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
                shown = {"loss": f"{row['loss']:.4f}", "PSNR": f"{row['psnr']:.2f} dB"}
                if run.best > -math.inf:
                    shown["best val"] = f"{run.best:.2f} dB"
                bar.set_postfix(shown, refresh=False)
