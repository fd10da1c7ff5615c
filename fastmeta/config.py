"""A meta-training run as data: every choice, its checks, the network and the data it stands for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from .spec import MLP, Encoding
from .tasks import kind_of, module, options
from .tasks.images import Images
from .tasks.sets import at_least, refuse_changed

CONFIG = "config.json"  # in the folder of a run
Signal = TypeVar("Signal")


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
