"""``fastmeta train | fit | eval | info``: the command line."""

from __future__ import annotations

import io
import itertools
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from . import __version__, env
from .apply import Eval, Fit, builtin, evaluate_run, fit, summary
from .batch import MEASURES
from .ops import dispatch
from .rules import RULES
from .spec import ACTIVATIONS, MLP
from .train import CONFIG, Config, saved_config, train

# What a user can mend, as opposed to a fault of ours: one line, exit code 2.
_USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    torch.OutOfMemoryError,
)

USAGE = """usage: fastmeta COMMAND [options]      fastmeta COMMAND --help for its options

  train images --data DIR|text --out RUN    meta-train a start on images
  train images --resume --out RUN           continue a run that was stopped
  fit RUN --data DIR [--out DIR]            fit new images from a learned start
  eval RUN [--data DIR|text]                compare a learned start with others on held-out images
  info                                      which implementation runs here, and why not the others
  --version

RUN is the folder of a training run, a .safetensors file, the authors' .pkl or .npz{builtin}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 2 for bad input, with one line on standard error that says what came and what is accepted;
    130 for an interrupt. Anything else is a fault of fastmeta and shows its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt as error:
        _say(f"interrupted: {error}" if str(error) else "interrupted")
        return 130
    except BrokenPipeError:
        return 0
    except _USER_ERRORS as error:
        if env.debug():
            traceback.print_exc()
        _say(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        return 2


def _say(line: str) -> None:
    print(f"fastmeta: {line}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    asked = not arguments or command in ("-h", "--help")
    if asked or (command == "train" and rest[:1] in ([], ["-h"], ["--help"])):
        names = ", ".join(builtin())
        print(
            USAGE.format(builtin=names and f",\nor the name of one that comes along: {names}"),
            end="",
        )
        return 0 if arguments else 2
    if command in ("-V", "--version"):
        print(f"fastmeta {__version__}")
        return 0
    if command == "info":
        print(info())
        return 0
    if command == "train" and rest[0] != "images":
        accepted = "accepted is images, as in: fastmeta train images --help"
        raise ValueError(f"train: the kind of signal is {rest[0]}; {accepted}")
    known: dict[str, tuple[Callable[..., Any], Callable[[Any], None]]] = {
        "train": (Config, _train),
        "fit": (Fit, _fit),
        "eval": (Eval, _eval),
    }
    if command not in known:
        accepted = "accepted are train, fit, eval, info, --version, --help"
        raise ValueError(f"{command}: no such command; {accepted}")
    kind, act = known[command]
    if command == "train":
        options = _options(kind, "train images", rest[1:], _resumed(rest[1:]))
    else:
        options = _options(kind, command, rest)
    if options is not None:
        act(options)
    return 0


def _train(options: Config) -> None:
    print(f"best start: {train(options)}")


def _fit(options: Fit) -> None:
    out = fit(options)
    print(f"{summary(out)}\npictures, fits.safetensors (weights), scores.csv: {out}")


def _eval(options: Eval) -> None:
    out = evaluate_run(options)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"table.md, table.csv, scores.json, and the pictures curve.png and strip.png: {out}")


def _options(kind: Callable[..., Any], name: str, arguments: list[str], default: Any = None) -> Any:
    """A dataclass from the command line; None where only help was asked for."""
    import tyro

    if arguments and not arguments[0].startswith("-"):  # fastmeta fit RUN ...
        arguments = ["--run", *arguments]
    given = {} if default is None else {"default": default}
    panel = io.StringIO()
    try:
        with redirect_stderr(panel):
            return tyro.cli(kind, prog=f"fastmeta {name}", args=arguments, **given)
    except SystemExit as end:
        if not end.code:
            return None
    words = [line.strip("│╭╮╰╯─|+ ") for line in panel.getvalue().splitlines()]
    message = " ".join(word for word in words if word).split(" For full helptext")[0]
    raise ValueError(f"{name}: {message}; accepted is what fastmeta {name} --help lists")


def _resumed(arguments: list[str]) -> Config | None:
    """With --resume, the run's own options are the defaults."""
    out = None
    for option, following in zip(arguments, [*arguments[1:], None], strict=False):
        if option == "--out":
            out = following
        elif option.startswith("--out="):
            out = option.removeprefix("--out=")
    if "--resume" not in arguments or out is None or not (Path(out) / CONFIG).exists():
        return None
    return saved_config(Path(out))


# info


def cases() -> list[tuple[tuple[str, str, str, str], list[dispatch.Case]]]:
    """((op, measure, rule, order), one case per activation) of all that fastmeta computes, in
    float32 on this machine's device."""
    rows = []
    plan: list[tuple[str, tuple[str, ...], tuple[str | None, ...], tuple[int, ...]]] = [
        ("mlp", ("none",), (None,), (1, 2)),
        ("composite", ("march",), (None,), (1, 2)),
        ("project", ("project",), (None,), (1, 2)),
        ("loss_grad", MEASURES, (None,), (1,)),
        ("loss_hvp", MEASURES, (None,), (2,)),
        ("adapt", MEASURES, tuple(RULES), (1,)),
        ("maml", MEASURES, tuple(RULES), (1, 2)),
        ("reptile", MEASURES, tuple(r for r in RULES if r != "meta_sgd"), (1,)),
    ]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for op, measures, rules, orders in plan:
        for measure, rule, order in itertools.product(measures, rules, orders):
            nets: list[MLP | None] = [None]
            if op not in ("composite", "project"):
                nets = [_small(activation, measure) for activation in ACTIVATIONS]
            made = [
                dispatch.Case(op, torch.float32, where, None, net, measure, rule, order)
                for net in nets
            ]
            rows.append(((op, measure, rule or "", str(order)), made))
    return rows


def _small(activation: str, measure: str) -> MLP:
    inputs, outputs = {"none": (2, 3), "project": (2, 1), "march": (3, 4)}[measure]
    return MLP(inputs, outputs, 64, 4, activation)


def info() -> str:
    """Versions, workers with the reason why one cannot run, and what each worker takes: the table
    op × measure × rule × order × worker.

    A cell says for how many of the activations a worker accepts the case ("all", "6/8", "-").
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"fastmeta {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads, CUDA device: {device}",
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
