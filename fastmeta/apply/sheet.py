"""What ``fastmeta eval`` leaves: the table in Markdown and CSV, all scores, curves, pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import viz
from ..checkpoint import atomic_write
from ..meta.evaluate import Tuned
from ..tasks import module
from .start import Learned
from .write import write_csv, write_text

if TYPE_CHECKING:
    from .table import Eval


@dataclass(frozen=True)
class Column:
    """A column of the table: seen through ``count`` angles or views (None: nothing is counted),
    after ``steps`` gradient steps."""

    head: str
    count: int | None
    steps: int

    @property
    def x(self) -> int:
        """What goes across: angles, views, or steps."""
        return self.steps if self.count is None else self.count


@dataclass(frozen=True, eq=False)
class Row:
    """A start in the table: how it was fitted in each column, scores [n,columns] in dB, SSIM [n] in
    the last column where it means something, and pictures [task][column]."""

    name: str
    tuned: list[Tuned]
    scores: Tensor
    similarity: Tensor | None
    pictures: list[list[Tensor]]


def write(
    out: Path,
    rows: list[Row],
    columns: list[Column],
    learned: Learned,
    held_out: Any,
    options: Eval,
) -> None:
    """table.csv, table.md (also where ``--table`` says), scores.json, curve.png and strip.png."""
    kind = module(learned.kind)
    table = [_table_row(row, columns, kind.METRIC) for row in rows]
    write_csv(out / "table.csv", table)
    written = _markdown(table, rows, columns, learned, len(held_out), options)
    write_text(out / "table.md", written)
    if options.table is not None:
        write_text(options.table, written)
    raw = {row.name: {"score": row.scores.tolist()} for row in rows}
    for row in rows:
        if row.similarity is not None:
            raw[row.name]["ssim"] = row.similarity.tolist()
    atomic_write(out / "scores.json", lambda path: path.write_text(json.dumps(raw)))
    x = [c.x for c in columns]
    label = {"psnr": "PSNR [dB]", "mae": "−20 log10 of mean absolute error [dB]"}[kind.METRIC]
    across = "gradient steps" if kind.COUNTED is None else kind.COUNTED
    curves = {row.name: row.scores for row in rows}
    viz.learning_curves(out / "curve.png", curves, x=x, across=across, up=label)
    kept = min(options.pictures, len(held_out))
    if kept:
        _strip(out / "strip.png", rows, columns, learned, held_out, kept)


def _strip(
    path: Path, rows: list[Row], columns: list[Column], learned: Learned, tasks: Any, kept: int
) -> None:
    """Learned starts above the standard one (or whatever else there is), a few of the columns."""
    kind, signal = module(learned.kind), learned.config.signal
    shown = [row for row in rows if row.name in ("maml", "reptile", "learned", "standard")] or rows
    places = list(range(len(columns)))
    if len(columns) > 5:
        wanted = {0, 1, 2, 5, columns[-1].x}
        places = [i for i, c in enumerate(columns) if c.x in wanted]
    cells = {
        row.name: [
            [(row.pictures[t][i], _caption(float(row.scores[t, i]), kind.METRIC)) for i in places]
            for t in range(kept)
        ]
        for row in shown
    }
    targets = [kind.truth(tasks[t], signal) for t in range(kept)]
    viz.strip(path, targets, cells, [columns[i].head for i in places])


def _caption(value: float, metric: str) -> str:
    return f"{value:.1f} dB" if metric == "psnr" else f"{10 ** (-value / 20):.4f}"


def _shown(scores: Tensor, metric: str) -> Tensor:
    """Scores in dB as the table's unit: dB of PSNR, or the mean absolute error × 1000."""
    return scores if metric == "psnr" else 1000 * 10 ** (-scores / 20)


def _fitted_with(tuned: Tuned) -> str:
    rule, lr = tuned.start.rule, tuned.start.lr
    words = f"{rule if isinstance(rule, str) else rule.name} "
    words += "learned rates" if isinstance(lr, Tensor) else f"{lr:.3g}"
    return words + "*" * (not tuned.inside)


def _table_row(row: Row, columns: list[Column], metric: str) -> dict[str, str | float]:
    """A start, how it was fitted, then for each column the mean and its standard error."""
    ways = [_fitted_with(t) for t in row.tuned]
    line: dict[str, str | float] = {"start": row.name}
    line["fitted_with"] = ways[0] if len(set(ways)) == 1 else ", ".join(ways)
    values = _shown(row.scores, metric)
    error = values.std(0, correction=min(1, len(values) - 1)) / math.sqrt(len(values))
    for i, column in enumerate(columns):
        line[f"{metric}_{column.x}"] = round(float(values[:, i].mean()), 3)
        line[f"stderr_{column.x}"] = round(float(error[i]), 3)
    if row.similarity is not None:
        line["ssim"] = round(float(row.similarity.mean()), 4)
    return line


def _markdown(
    table: list[dict],
    rows: list[Row],
    columns: list[Column],
    learned: Learned,
    count: int,
    options: Eval,
) -> str:
    """The table for people."""
    kind = module(learned.kind)
    what = "PSNR in dB" if kind.METRIC == "psnr" else "Mean absolute error × 1000"
    head = ["start", "fitted with", *[c.head for c in columns]]
    head += [f"SSIM, {columns[-1].head}"] if kind.PLANAR else []
    if kind.COUNTED is None:
        steps = learned.config.inner_steps if options.tune_at is None else options.tune_at
        best = f"after {max(1, min(steps, columns[-1].steps))} steps"
        after = "gradient steps"
    else:
        steps = columns[0].steps if options.tune_at is None else options.tune_at
        best = f"after {steps} steps, for each column"
        after = f"{columns[0].steps} gradient steps, by {kind.COUNTED} seen"
    lines = [
        f"{what} after {after}, mean ± standard error over {count} tasks never learned from. Every "
        f"start but the learned has the rule and rate that are best for it on training tasks "
        f"{best}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for line in table:
        cells = [str(line["start"]), str(line["fitted_with"])]
        for column in columns:
            mean, error = line[f"{kind.METRIC}_{column.x}"], line[f"stderr_{column.x}"]
            cells.append(f"{mean:.2f} ± {error:.2f}")
        cells += [f"{line['ssim']:.3f}"] if kind.PLANAR else []
        lines.append("| " + " | ".join(cells) + " |")
    if any(not tuned.inside for row in rows for tuned in row.tuned):
        lines += ["", "\\* the best rate tried, with none beyond it: another may be better still."]
    return "\n".join(lines) + "\n"
