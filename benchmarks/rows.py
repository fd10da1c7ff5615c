"""Rows of results.csv: their columns, where they were measured, and how they get into the file."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = [
    "workload",
    "what",
    "who",
    "median_ms",
    "ratio",
    "gflop",
    "mbytes",
    "gflops",
    "of_roof",
    "roof_gflops",
    "roof_kind",
    "threads",
    "clean",
    "isa",
    "mkl",
    "device",
    "torch",
    "jax",
    "commit",
]


def commit() -> str:
    """FASTMETA_COMMIT where a checkout travelled without its repository, else git's."""
    if named := os.environ.get("FASTMETA_COMMIT"):
        return named
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def append(path: Path, rows: list[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Rows to the end of the file, under a line of column names where it is new."""
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
