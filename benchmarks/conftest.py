"""Benchmarks: interleaved competitors, medians, FLOPs, bytes and the fraction of the measured roof;
rows to results.csv."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).with_name("results.csv")


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return done.stdout.strip() or "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@pytest.fixture(scope="session")
def roof() -> float:
    """GFLOP/s of torch's own 1024³ product in this process: the roof that a torch worker has."""
    a = torch.rand(1024, 1024)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(times) / 1e9


@pytest.fixture
def race(benchmark, roof) -> Callable:
    """race(workload, what, {who: function}, gflop, mbytes): runs them in turn, records medians of
    each.

    The first name is ours; ratio = its competitor's median over its own. pytest-benchmark shows our
    own times.
    """

    def run(
        workload: str,
        what: str,
        entries: dict[str, Callable],
        gflop: float,
        mbytes: float,
        rounds: int = 7,
    ) -> dict:
        for function in entries.values():
            function()
        times: dict[str, list[float]] = {who: [] for who in entries}
        for _ in range(rounds):
            for who, function in entries.items():
                start = time.perf_counter()
                function()
                times[who].append(time.perf_counter() - start)
        medians = {who: statistics.median(values) for who, values in times.items()}
        ours = medians[next(iter(entries))]
        fixed = {
            "workload": workload,
            "what": what,
            "gflop": round(gflop, 3),
            "mbytes": round(mbytes, 2),
            "roof_gflops": round(roof, 1),
            "threads": torch.get_num_threads(),
            "device": processor(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        rows = [
            {
                **fixed,
                "who": who,
                "median_ms": round(seconds * 1e3, 3),
                "ratio": round(seconds / ours, 2),
                "gflops": round(gflop / seconds, 1),
                "of_roof": round(gflop / seconds / roof, 3),
            }
            for who, seconds in medians.items()
        ]
        _append(rows)
        for row in rows:
            share = f"{row['of_roof']:.0%} of the roof"
            print(f"{row['who']:<24} {row['median_ms']:>10} ms  x{row['ratio']:<6} {share}")
        benchmark.extra_info.update(medians)
        benchmark.pedantic(entries[next(iter(entries))], rounds=1, iterations=1)
        return medians

    return run


def _append(rows: list[dict]) -> None:
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
