"""A learned start on disk: its network, its weights, and how it was learned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_start
from ..config import Config, from_json, saved_config
from ..convert import load_learnit
from ..meta.evaluate import Start
from ..spec import MLP
from ..tasks import kind_of, module, options
from ..train import BEST


@dataclass(frozen=True, eq=False)
class Learned:
    """A start with what is known of how it was learned.

    ``config`` is the run's, or where a file tells of none, what its network allows (then ``known``
    is False, and ``config.data`` empty).
    """

    name: str
    net: MLP
    start: Start
    config: Config
    known: bool = True

    @property
    def kind(self) -> str:
        """The kind of signal it was learned for."""
        return kind_of(self.config.signal)

    @property
    def row(self) -> str:
        """What a table calls it."""
        return self.config.algorithm if self.known else "learned"


def builtin() -> list[str]:
    """Names of the starts that come with the package."""
    return sorted(path.stem for path in _starts().glob("*.safetensors"))


def _starts() -> Path:
    return Path(str(resources.files("fastmeta"))) / "starts"


def open_start(
    run: str, where: torch.device, *, lr: float | None = None, rule: str | None = None
) -> Learned:
    """A learned start, in float32 on a device.

    Args:
        run: a run's folder (its best start), a file of ``save_init``, the authors' .pkl or .npz, or
            the name of a start that comes with the package.
        lr, rule: instead of what it was learned with.

    Raises:
        ValueError, FileNotFoundError: not one of these, damaged, or a network of no known kind of
            signal.
    """
    path = Path(run)
    if path.is_dir():
        saved_config(path)  # a folder of something else says so here
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
    stored: dict[str, Any] = {}
    if path.suffix in (".pkl", ".npz"):
        net, init = load_learnit(path)
    else:
        net, init, extra, meta = load_start(path)
        stored = meta["config"] if isinstance(meta.get("config"), dict) else {}
    if Path(run).is_dir():
        config = saved_config(Path(run))
    elif stored:
        try:
            config = from_json(stored, Path())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{run}: not the configuration of a run: {error}") from None
    else:
        config = _guess(run, net, authors=path.suffix in (".pkl", ".npz"))
    rate: Any = extra.get("inner_lr", config.inner_lr) if lr is None else lr
    rate = rate.to(where, torch.float32) if isinstance(rate, Tensor) else float(rate)
    chosen = config.rule if rule is None else rule
    start = Start(init.to(where, torch.float32), rate, chosen, config.eikonal)
    learned = Learned(Path(run).stem, net, start, config, known=bool(config.data))
    _check_shape(run, learned)
    return learned


def _guess(run: str, net: MLP, *, authors: bool) -> Config:
    """A configuration for a bare file, from the shape of its network; at test as in the paper."""
    D, C = net.in_features, net.out_features
    if (D, C) == (2, 1) and net.coords == "unit_xy":
        signal, rest = options("ct")(), {"test_counts": (1, 2, 4, 8), "inner_lr": 10.0}
    elif D == 2 and C in (1, 3):
        size = {"size": 178} if authors else {}  # CelebA's height and width
        signal, rest = options("images")(channels=C, **size), {"inner_lr": 1e-2}
    elif (D, C) == (3, 4):
        test = {"test_counts": (1, 25), "test_steps": 1000, "test_per_step": 64}
        signal, rest = options("views")(), {"inner_lr": 0.5, "per_step": 128, **test}
    else:
        came = f"{run}: a network from {D} to {C} features, and nothing that tells of its training"
        raise ValueError(
            f"{came}; accepted are 2 to 1 or 3 (images, ct), 3 to 4 (views), and runs of any kind"
        )
    return Config(data="", out=Path(), signal=signal, **rest)  # type: ignore[arg-type]


def _check_shape(run: str, learned: Learned) -> None:
    wanted = module(learned.kind).shape(learned.config.signal)
    found = (learned.net.in_features, learned.net.out_features)
    if found != wanted[:2]:
        came = f"{run}: a network from {found[0]} to {found[1]} features"
        raise ValueError(f"{came}; accepted for {learned.kind} is {wanted[0]} to {wanted[1]}")


def resized(learned: Learned, size: int) -> Any:
    """The signal's options at another size; ValueError where the kind has none."""
    if "size" not in {f.name for f in dataclasses.fields(learned.config.signal)}:
        raise ValueError(f"size is {size} with {learned.kind}; accepted is without, it has no size")
    return dataclasses.replace(learned.config.signal, size=size)
