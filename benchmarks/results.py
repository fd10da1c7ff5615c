"""The tables and pictures of the README: the small recipe of each kind, trained and evaluated.

    python benchmarks/results.py [ct] [chairs] [photos] [sdf]     none: all, half an hour

Runs are kept under runs/results and continued where they stopped; tables and pictures go to docs/.
The data lie in FASTMETA_DATA, or beside the repository. Every choice (rates of the other starts,
the best checkpoint) is made on training and validation tasks; test tasks are scored once.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from fastmeta.cli import main

ROOT = Path(__file__).resolve().parents[1]
RUNS, DOCS = ROOT / "runs" / "results", ROOT / "docs"
DATA = Path(os.environ.get("FASTMETA_DATA") or ROOT.parent / "shared" / "data")

# name -> kind, its runs (name, options of train), options of eval
STUDIES: dict[str, tuple[str, list[tuple[str, list[str]]], list[str]]] = {
    "ct": (
        "ct",
        [
            ("ct-reptile", ["--data", "phantoms"]),
            # at Reptile's outer rate, unclipped, MAML came apart after 1800 steps
            (
                "ct-maml",
                ["--data", "phantoms", "--algorithm", "maml", "--lr", "2e-4", "--clip", "0.01"],
            ),
        ],
        ["--count", "20", "--counts", "1", "2", "4", "8", "--tune-tasks", "4"],
    ),
    "chairs": (
        "views",
        [("chairs", ["--data", str(DATA / "chairs" / "chairs_64.npz")])],
        ["--count", "4", "--counts", "1", "5", "25", "--tune-tasks", "3"],
    ),
    "photos": (
        "phototourism",
        [
            (
                "photos",
                ["--data", str(DATA / "sacre_coeur"), "--train-photos", "7", "--validation", "0"],
            )
        ],
        ["--count", "3", "--tune-tasks", "4", "--tune-at", "128", "--pictures", "3"],
    ),
    "sdf": (
        "sdf",
        [("sdf", ["--data", str(DATA / "sdf_chairs" / "sdf_chairs_64.npz")])],
        ["--count", "4", "--steps", "200", "--tune-at", "50"],
    ),
}


def run(arguments: list[str]) -> None:
    print("fastmeta", *arguments, flush=True)
    if main(arguments):
        sys.exit(f"fastmeta {' '.join(arguments)} failed")


def study(name: str) -> None:
    """Train what is not trained yet, evaluate, copy what the README shows."""
    kind, runs, evaluation = STUDIES[name]
    started = time.perf_counter()
    for folder, options in runs:
        out = RUNS / folder
        if (out / "config.json").exists():
            run(["train", kind, "--resume", "--out", str(out)])
        else:
            run(["train", kind, *options, "--out", str(out)])
    trained = time.perf_counter()
    first, *others = [str(RUNS / folder) for folder, _ in runs]
    also = ["--also", *others] if others else []
    result = RUNS / f"{name}-eval"
    run(["eval", first, *also, *evaluation, "--out", str(result)])
    for part, ending in (("table", "md"), ("strip", "png"), ("curve", "png")):
        if (name, part) == ("photos", "strip"):
            continue  # it holds photos that are their authors'
        shutil.copyfile(result / f"{part}.{ending}", DOCS / f"{name}_{part}.{ending}")
    if name == "chairs":
        orbit(first, str(DATA / "chairs" / "chairs_64.npz"))
    scored = time.perf_counter() - trained
    print(
        f"{name}: {trained - started:.0f} s of training, {scored:.0f} s of evaluation", flush=True
    )


def orbit(start: str, data: str) -> None:
    """A chair of the test part, fitted to one view, from all sides."""
    name, fits, out = "scopia_white_kitchen_chair", RUNS / "chairs-fit", RUNS / "chairs-orbit"
    run(["fit", start, "--data", data, "--names", name, "--count", "1", "--out", str(fits)])
    size = ["--size", "128", "--frames", "36", "--fps", "18", "--video", "gif"]
    run(["render", str(fits), *size, "--out", str(out)])
    shutil.copyfile(out / f"{name}-orbit.gif", DOCS / "chairs_orbit.gif")


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(STUDIES)
    unknown = [name for name in chosen if name not in STUDIES]
    if unknown:
        sys.exit(f"results: {unknown[0]}; accepted are {', '.join(STUDIES)}")
    for name in chosen:
        study(name)
