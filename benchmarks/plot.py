"""Figures and tables of results.csv: time of each competitor over ours.

    python benchmarks/plot.py            draws docs/speed.png
    python benchmarks/plot.py --table    prints the same as Markdown

Of each workload × what × who × mkl the last row counts.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
SCALING = "gradient, scaling"
FAMILIES = ["images", "nerf", "ct", "small"]
PANELS = {"gradient": "gradient", "maml K=2": "second-order MAML gradient, K = 2"}
# Okabe and Ito's colours, which colour-blind readers tell apart; every competitor has its own mark.
STYLE = {
    "loop": ("#E69F00", "o"),
    "vmap": ("#56B4E9", "s"),
    "bmm": ("#009E73", "^"),
    "compiled": ("#CC79A7", "D"),
    "jax": ("#D55E00", "X"),
}

Rows = dict[tuple[str, str, str], dict]  # (workload, what, who) -> row


def last_rows(path: Path = RESULTS, mkl: str = "default") -> Rows:
    with open(path, newline="") as file:
        return {
            (row["workload"], row["what"], row["who"]): row
            for row in csv.DictReader(file)
            if row["mkl"] == mkl
        }


def workloads_of(rows: Rows, what: str) -> list[str]:
    seen = {w for w, kind, who in rows if kind == what and who in STYLE}
    return sorted((w for w in seen if w.split("-")[0] in FAMILIES), key=_order)


def _order(name: str) -> tuple:
    """By family, and images-T3 before images-T16."""
    numbered = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]
    return FAMILIES.index(name.split("-")[0]), numbered


def speed(rows: Rows, path: Path) -> None:
    """Dots on a logarithmic axis, one line a workload; right of 1 we are faster."""
    names = sorted({w for what in PANELS for w in workloads_of(rows, what)}, key=_order)
    figure, axes = plt.subplots(
        1, 2, sharex=True, sharey=True, figsize=(8, max(3, 0.9 + 0.27 * len(names)))
    )
    for axis, (what, title) in zip(axes, PANELS.items(), strict=True):
        for who, (colour, mark) in STYLE.items():
            at = [y for y, w in enumerate(names) if (w, what, who) in rows]
            ratios = [float(rows[names[y], what, who]["ratio"]) for y in at]
            axis.plot(ratios, at, mark, color=colour, label=who, markersize=7, alpha=0.9)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}×")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("time over fastmeta's", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize=10)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(STYLE), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=200)
    plt.close(figure)


def table(rows: Rows) -> str:
    """Markdown: our milliseconds and share of the roof, then each competitor's time over ours."""
    lines = []
    for what, title in PANELS.items():
        lines += [f"| {title} | ms | of the roof | {' | '.join(STYLE)} |", "|---" * 8 + "|"]
        for name in workloads_of(rows, what):
            ours = rows[name, what, "fastmeta"]
            found = [rows.get((name, what, who)) for who in STYLE]
            cells = [name, ours["median_ms"], f"{float(ours['of_roof']):.0%}"]
            cells += [row["ratio"] + "×" if row else "" for row in found]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


# Scaling ---


def scaling(rows: Rows, path: Path) -> None:
    """Time against T and against N, log-log; draws and prints the exponents of least squares over
    the four largest sizes."""
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 4))
    _curves(axes[0], rows, "T", "N256")
    _curves(axes[1], rows, "N", "T1")
    axes[0].set_xlabel("tasks T (N = 256)")
    axes[1].set_xlabel("points N (T = 1)")
    axes[0].set_ylabel("gradient, ms")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("")
    figure.tight_layout()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _curves(axis: Axes, rows: Rows, letter: str, fixed: str) -> None:
    """One panel: time against T or N, the other one fixed."""
    for width, colour in ((32, "#0072B2"), (256, "#D55E00")):
        for who, mark in (("fastmeta", "o-"), ("bmm", "x:")):
            x, ms = _series(rows, letter, fixed, width, who)
            if len(x) < 2:
                continue
            slope = np.polyfit(np.log(x[-4:]), np.log(ms[-4:]), 1)[0]  # beyond the fixed cost
            label = f"{who}, width {width}: {letter}^{slope:.2f}"
            axis.loglog(x, ms, mark, color=colour, label=label)
            print(f"gradient at {fixed}, {label}")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def _series(rows: Rows, letter: str, fixed: str, width: int, who: str) -> tuple[list, list]:
    """(T or N, ms), sorted, of the rows where the other one is fixed."""
    points = []
    for (name, what, by), row in rows.items():
        tags = name.split("-")
        if what == SCALING and by == who and f"siren{width}" in tags and fixed in tags:
            size = next(tag for tag in tags[2:] if tag[0] == letter)
            points.append((int(size[1:]), float(row["median_ms"])))
    x, ms = zip(*sorted(points), strict=True) if points else ((), ())
    return list(x), list(ms)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures and tables of results.csv.")
    parser.add_argument("--table", action="store_true", help="print Markdown instead of drawing")
    parser.add_argument("--mkl", default="default", help="rows of this mkl column")
    options = parser.parse_args()
    rows = last_rows(RESULTS, options.mkl)
    if options.table:
        print(table(rows))
    else:
        speed(rows, HERE.parent / "docs" / "speed.png")


if __name__ == "__main__":
    main()
