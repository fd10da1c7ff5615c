"""``fastmeta train | fit | eval | render | info``: the command line."""

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

from . import __version__, env, recipes
from .apply import Eval, Fit, Render, builtin, evaluate_run, fit, render, summary
from .batch import MEASURES
from .config import CONFIG, Config, in_effect, saved_config
from .ops import dispatch
from .rules import RULES
from .spec import ACTIVATIONS, MLP
from .tasks import KINDS, kind_of, options
from .train import train

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

  train KIND --data DATA --out RUN      meta-train a start; KIND is {kinds}
  train KIND --resume --out RUN         continue a run that was stopped
  train KIND --recipe NAME ...          with the paper's values ({recipes}), each of which
                                        an option may change; --scale small: minutes on two cores
  fit RUN --data DATA [--out DIR]       fit new signals from a learned start
  eval RUN [--also RUN2] [--data DATA]  compare learned starts with others on held-out signals
  render FITS [--out DIR]               videos, meshes, pictures of what was fitted
  info                                  which implementation runs here, and why not the others
  --version

DATA is a folder or a file; or made here: text (images), phantoms (ct), chairs (views).
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
        print(usage(), end="")
        return 0 if arguments else 2
    if command in ("-V", "--version"):
        print(f"fastmeta {__version__}")
        return 0
    if command == "info":
        print(info())
        return 0
    known: dict[str, tuple[Callable[..., Any], Callable[[Any], None]]] = {
        "fit": (Fit, _fit),
        "eval": (Eval, _eval),
        "render": (Render, _render),
    }
    if command == "train":
        kind, given = rest[0], rest[1:]
        if kind not in KINDS:
            accepted = f"accepted are {', '.join(KINDS)}, as in: fastmeta train images --help"
            raise ValueError(f"train: the kind of signal is {kind}; {accepted}")
        given, default = _begin(kind, given)
        form: Any = Config[options(kind)]  # type: ignore[misc]
        chosen = _options(form, f"train {kind}", given, default)
        act: Callable[[Any], None] = _train
    elif command in known:
        form, act = known[command]
        chosen = _options(form, command, rest)
    else:
        accepted = "accepted are train, fit, eval, render, info, --version, --help"
        raise ValueError(f"{command}: no such command; {accepted}")
    if chosen is not None:
        act(chosen)
    return 0


def usage() -> str:
    """What ``fastmeta`` alone prints."""
    names = ", ".join(builtin())
    paper = ", ".join(name for name, recipe in recipes.RECIPES.items() if recipe.paper)
    return USAGE.format(
        builtin=names and f",\nor the name of one that comes along: {names}",
        kinds=", ".join(KINDS),
        recipes=paper,
    )


def _begin(kind: str, arguments: list[str]) -> tuple[list[str], Config | None]:
    """(arguments left, what they change): a run's own options with --resume, else a recipe's."""
    arguments, name = _take(arguments, "--recipe")
    arguments, scale = _take(arguments, "--scale")
    resumed = _resumed(arguments)
    if resumed is not None:
        if name is not None or scale is not None:
            given = "--recipe" if name is not None else "--scale"
            raise ValueError(f"train: {given} with --resume; accepted is one of them")
        if kind_of(resumed.signal) != kind:
            came = f"{resumed.out}: a run on {kind_of(resumed.signal)}, resumed as {kind}"
            raise ValueError(f"train: {came}; accepted is train {kind_of(resumed.signal)}")
        return arguments, resumed
    scale = scale or ("small" if name is None else "paper")
    name = recipes.of_kind(kind) if name is None else name
    if name in recipes.RECIPES and recipes.RECIPES[name].kind != kind:
        right = recipes.RECIPES[name].kind
        raise ValueError(f"train: recipe {name} with {kind}; accepted is train {right}")
    import tyro

    made = recipes.configure(name, scale, data=tyro.MISSING, out=tyro.MISSING)
    return arguments, made


def _take(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """(the other arguments, the value of an option that only this file knows)."""
    left, value = [], None
    rest = iter(arguments)
    for word in rest:
        if word == option:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"train: {option} has no value; accepted is one after it")
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
        else:
            left.append(word)
    return left, value


def _train(config: Config) -> None:
    print(" ".join(f"{k}={v}" for k, v in in_effect(config).items()), flush=True)
    print(f"best start: {train(config)}")


def _fit(options: Fit) -> None:
    out = fit(options)
    print(f"{summary(out)}\nwhat they show, fits.safetensors (weights), scores.csv: {out}")


def _eval(options: Eval) -> None:
    out = evaluate_run(options)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"table.md, table.csv, scores.json, and the pictures curve.png and strip.png: {out}")


def _render(options: Render) -> None:
    print("\n".join(str(path) for path in render(options)))


def _options(kind: Callable[..., Any], name: str, arguments: list[str], default: Any = None) -> Any:
    """A dataclass from the command line; None where only help was asked for."""
    import tyro

    if arguments and not arguments[0].startswith("-"):  # fastmeta fit RUN ...
        arguments = ["--fits" if name == "render" else "--run", *arguments]
    given = {} if default is None else {"default": default}
    arguments = ["None" if word == "none" else word for word in arguments]  # as the help has it
    panel = io.StringIO()
    try:
        with redirect_stderr(panel):
            flat = (tyro.conf.OmitArgPrefixes,)  # the signal's options stand beside the others
            return tyro.cli(kind, prog=f"fastmeta {name}", args=arguments, config=flat, **given)
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
