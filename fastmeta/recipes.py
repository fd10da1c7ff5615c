"""The paper's recipes, and small ones of the same shape that show the effect in minutes on a CPU.

A recipe is a kind of signal with values for its options and for ``config.Config``; what it does not
name has its default. ``--recipe celeba`` is exactly what the paper and its notebooks did, batches
of 1 or 3 tasks included; larger meta-batches, by ``--tasks``, are another algorithm. Source: Tancik
et al. 2021 and its notebooks; Sitzmann et al. 2020 (MetaSDF, 3-D); the small ones are ours.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config
from .tasks import KINDS, options

SCALES = ("paper", "small")


class Recipe(NamedTuple):
    """kind; at each scale the signal's options and the rest of the configuration."""

    kind: str
    paper: dict[str, Any] | None
    small: dict[str, Any]


_NERF = {"network": "frequencies", "width": 256, "depth": 6, "frequencies": 20, "max_exponent": 8.0}

RECIPES = {
    "celeba": Recipe(
        "images",
        {
            "size": 178, "network": "siren", "width": 256, "depth": 5, "w0": 200.0,
            "algorithm": "maml", "inner_steps": 2, "inner_lr": 1e-2, "tasks": 3,
            "lr": 1e-5, "iterations": 150_000, "validate_every": 200, "save_every": 1000,
        },
        {},
    ),
    "ct": Recipe(
        "ct",
        {
            "size": 256, "angles": 20, "network": "fourier", "width": 256, "depth": 5,
            "features": 256, "feature_scale": 30.0, "algorithm": "reptile", "inner_steps": 12,
            "inner_lr": 10.0, "tasks": 1, "lr": 5e-5, "iterations": 100_000,
            "test_counts": (1, 2, 4, 8), "test_steps": 1000, "validate_every": 5000,
            "validate_tasks": 4, "save_every": 1000,
        },
        {
            "size": 64, "angles": 20, "network": "fourier", "width": 128, "depth": 5,
            "features": 128, "feature_scale": 10.0, "algorithm": "reptile", "inner_steps": 12,
            "inner_lr": 10.0, "tasks": 1, "lr": 5e-4, "iterations": 2000,
            "test_counts": (4, 1, 2, 8), "test_steps": 50, "validate_every": 200,
        },
    ),
    "shapenet": Recipe(
        "views",
        {
            "size": 128, "samples": 128, **_NERF, "algorithm": "reptile", "inner_steps": 32,
            "inner_lr": 0.5, "per_step": 128, "tasks": 1, "lr": 5e-4, "iterations": 100_000,
            "test_counts": (1, 25), "test_steps": 1000, "test_per_step": 64,
            "validate_every": 1000, "validate_tasks": 4, "save_every": 1000,
        },
        {
            "size": 64, "samples": 48, "network": "frequencies", "width": 128, "depth": 5,
            "frequencies": 10, "max_exponent": 5.0, "algorithm": "reptile", "inner_steps": 32,
            "inner_lr": 0.5, "per_step": 128, "tasks": 1, "lr": 5e-4, "iterations": 3000,
            "test_counts": (1, 2, 5, 25), "test_steps": 200, "validate_every": 250,
            "validate_tasks": 4,
        },
    ),
    "phototourism": Recipe(
        "phototourism",
        {
            "samples": 128, **_NERF, "algorithm": "reptile", "inner_steps": 64, "inner_lr": 1.0,
            "per_step": 64, "tasks": 1, "lr": 5e-4, "iterations": 150_000, "test_steps": 256,
            "validate_every": 1000, "validate_tasks": 4, "save_every": 1000,
        },
        {
            "shrink": 4, "samples": 48, "network": "frequencies", "width": 64, "depth": 5,
            "frequencies": 16, "max_exponent": 8.0, "algorithm": "reptile", "inner_steps": 64,
            "inner_lr": 0.3, "per_step": 128, "tasks": 1, "lr": 5e-4, "iterations": 1500,
            "test_steps": 128, "validate_every": 250,
        },
    ),
    # MetaSDF sums over its 24 000 points, fastmeta takes their mean: 5e-3 there is 5e-3 · 24 000
    "sdf": Recipe(
        "sdf",
        {
            "dimensions": 3, "points": 24_000, "loss": "l1", "network": "relu", "width": 512,
            "depth": 9, "algorithm": "maml", "rule": "meta_sgd", "inner_steps": 5,
            "inner_lr": 120.0, "tasks": 32, "lr": 5e-4, "iterations": 100_000,
            "validate_every": 1000, "save_every": 1000,
        },
        {
            "dimensions": 3, "points": 4096, "loss": "mse", "network": "relu", "width": 64,
            "depth": 5, "algorithm": "maml", "rule": "meta_sgd", "inner_steps": 5, "inner_lr": 0.1,
            "per_step": 512, "tasks": 4, "lr": 1e-3, "clip": 1.0, "iterations": 2000,
            "test_steps": 100, "validate_every": 200,
        },
    ),
    "audio": Recipe(
        "audio",
        None,
        {"network": "siren", "width": 128, "depth": 5, "w0": 300.0, "inner_lr": 1e-2},
    ),
    "volumes": Recipe(
        "volumes",
        None,
        {"network": "siren", "width": 128, "depth": 5, "w0": 30.0, "inner_lr": 1e-2},
    ),
}  # fmt: skip


def of_kind(kind: str) -> str:
    """The recipe of a kind of signal."""
    return next(name for name, recipe in RECIPES.items() if recipe.kind == kind)


def configure(
    name: str, scale: str = "paper", *, data: Any, out: Any, **changes: Any
) -> Config[Any]:
    """The configuration of a recipe, with some values changed.

    Args:
        name: one of ``RECIPES``. scale: one of ``SCALES``.
        data, out, changes: fields of ``config.Config`` and options of the kind of signal.

    Raises:
        ValueError: no such recipe, scale or option; audio and volumes at the paper's scale, which
            has none.
    """
    if name not in RECIPES or scale not in SCALES:
        came = f"recipe is {name}, scale {scale}"
        accepted = f"{', '.join(RECIPES)}, at scale {' or '.join(SCALES)}"
        raise ValueError(f"{came}; accepted are {accepted}")
    kind, paper, small = RECIPES[name]
    values = paper if scale == "paper" else small
    if values is None:
        raise ValueError(f"recipe {name} is not the paper's; accepted for it is scale small")
    values = {**values, **changes}
    own = {f.name for f in fields(options(kind))}
    unknown = sorted(set(values) - own - {f.name for f in fields(Config)})
    if unknown:
        raise ValueError(f"recipe {name}: {unknown[0]} is no option of {kind} or of training")
    signal = options(kind)(**{k: v for k, v in values.items() if k in own})
    rest = {k: v for k, v in values.items() if k not in own}
    return Config(data=data, out=out if isinstance(out, str) is False else Path(out),
                  signal=signal, **rest)  # fmt: skip


def default(kind: str, *, data: Any, out: Any) -> Config[Any]:
    """What ``fastmeta train KIND`` begins with: the small recipe of the kind."""
    if kind not in KINDS:
        raise ValueError(f"the kind of signal is {kind}; accepted are {', '.join(KINDS)}")
    return configure(of_kind(kind), "small", data=data, out=out)
