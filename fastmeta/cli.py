"""``fastmeta train | fit | eval | info``: the command line."""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, env
from .apply import Eval, Fit, builtin, evaluate_run, fit
from .ops import dispatch
from .rules import RULES
from .spec import ACTIVATIONS, MLP
from .train import CONFIG, Config, saved_config, train

# What a user can mend, as opposed to a fault of ours: one line, exit code 2.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)

USAGE = """usage: fastmeta COMMAND [options]      fastmeta COMMAND --help for its options

  train images --data DIR|text --out RUN    meta-train a start on images; --resume continues a run
  fit RUN --data DIR [--out DIR]            fit new images from a learned start
  eval RUN [--data DIR]                     compare a learned start with others on held-out images
  info                                      which implementation runs here, and why not the others
  --version

RUN is the folder of a training run, a .safetensors file, the authors' .pkl or .npz, or one of: {builtin}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input (one line says what), 130 for an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt as error:
        print(
            f"fastmeta: interrupted: {error}" if str(error) else "fastmeta: interrupted",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        return 0
    except _USER_ERRORS as error:
        if env.debug():
            traceback.print_exc()
        print(f"fastmeta: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("", "-h", "--help"):
        print(USAGE.format(builtin=", ".join(builtin())), end="")
        return 0 if command else 2
    if command in ("-V", "--version"):
        print(f"fastmeta {__version__}")
    elif command == "info":
        print(info())
    elif command == "train" and rest[:1] == ["images"]:
        best = train(_options(Config, "train images", rest[1:], _resumed(rest[1:])))
        print(f"best start: {best}")
    elif command == "train":
        came = rest[0] if rest else "nothing"
        raise ValueError(
            f"train: the kind of signal is {came}; accepted is images, as in: fastmeta train images --help"
        )
    elif command == "fit":
        options = _options(Fit, "fit", rest)
        out = fit(options)
        print((out / "scores.csv").read_text(), end="")
        print(f"pictures, weights (fits.safetensors) and scores.csv: {out}")
    elif command == "eval":
        out = evaluate_run(_options(Eval, "eval", rest))
        print((out / "table.md").read_text())
        print(f"table.md, table.csv, scores.json and the pictures curve.png, strip.png: {out}")
    else:
        raise ValueError(
            f"{command}: no such command; accepted are train, fit, eval, info, --version, --help"
        )
    return 0


def _options(kind: Callable[..., Any], name: str, arguments: list[str], default: Any = None) -> Any:
    import tyro

    if arguments and not arguments[0].startswith("-"):  # fastmeta fit RUN ...
        arguments = ["--run", *arguments]
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=f"fastmeta {name}", args=arguments, **given)


def _resumed(arguments: list[str]) -> Config | None:
    """With --resume, the run's own options are the defaults."""
    if "--resume" not in arguments:
        return None
    at = [i for i, a in enumerate(arguments) if a == "--out"]
    out = arguments[at[-1] + 1] if at and at[-1] + 1 < len(arguments) else None
    out = next(
        (a.removeprefix("--out=") for a in reversed(arguments) if a.startswith("--out=")), out
    )
    return saved_config(Path(out)) if out is not None and (Path(out) / CONFIG).exists() else None


# info -----------------------------------------------------------------------------------------------------------------


def cases() -> list[tuple[tuple[str, str, str, str], list[dispatch.Case]]]:
    """((op, measure, rule, order), one case per activation) of everything fastmeta computes, on the CPU in float32."""
    rows = []
    plan: list[tuple[str, tuple[str, ...], tuple[str | None, ...], tuple[int, ...]]] = [
        ("mlp", ("none",), (None,), (1, 2)),
        ("composite", ("march",), (None,), (1, 2)),
        ("project", ("project",), (None,), (1, 2)),
        ("loss_grad", ("none", "project", "march"), (None,), (1,)),
        ("loss_hvp", ("none", "project", "march"), (None,), (2,)),
        ("adapt", ("none", "project", "march"), tuple(RULES), (1,)),
        ("maml", ("none", "project", "march"), tuple(RULES), (1, 2)),
        ("reptile", ("none", "project", "march"), tuple(r for r in RULES if r != "meta_sgd"), (1,)),
    ]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for op, measures, rules, orders in plan:
        for measure in measures:
            for rule in rules:
                for order in orders:
                    nets: list[MLP | None] = [None]
                    if op not in ("composite", "project"):
                        nets = [_small(activation, measure) for activation in ACTIVATIONS]
                    made = [
                        dispatch.Case(op, torch.float32, where, None, n, measure, rule, order)
                        for n in nets
                    ]
                    rows.append(((op, measure, rule or "", str(order)), made))
    return rows


def _small(activation: str, measure: str) -> MLP:
    inputs, outputs = {"none": (2, 3), "project": (2, 1), "march": (3, 4)}[measure]
    return MLP(inputs, outputs, 64, 4, activation)


def info() -> str:
    """Versions, workers with the reason why one cannot run, and the table op × measure × rule × order × worker.

    A cell says for how many of the activations a worker accepts the case ("all", "6/8", "-").
    """
    lines = [
        f"fastmeta {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"{torch.get_num_threads()} threads, CUDA device: "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        "",
    ]
    for name, reason in dispatch.available().items():
        lines.append(f"  {name:<10} {'runs' if reason is None else f'cannot run: {reason}'}")
    workers = list(dispatch.WORKERS)
    lines += [
        "",
        f"{'op':<10} {'measure':<8} {'rule':<9} order  " + "".join(f"{w:<10} " for w in workers),
    ]
    for (op, measure, rule, order), made in cases():
        cells = []
        for worker in workers:
            taken = sum(not dispatch.objections(case, worker) for case in made)
            cells.append("all" if taken == len(made) else f"{taken}/{len(made)}" if taken else "-")
        lines.append(
            f"{op:<10} {measure:<8} {rule:<9} {order:<5}  " + "".join(f"{c:<10} " for c in cells)
        )
    lines.append(
        "\nall: of the activations " + ", ".join(ACTIVATIONS) + "; render is mlp and composite"
    )
    return "\n".join(line.rstrip() for line in lines)
