"""Benchmarks: interleaved competitors, medians of undisturbed samples, FLOPs, bytes and the
fraction of the measured roof; rows to results.csv."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import competitors
import pytest
import torch
import workloads
from rows import append, commit, processor, version
from workloads import Cost, Workload

RESULTS = Path(__file__).with_name("results.csv")
PAUSE = 5e-3  # s, at least, between competitors
SPAN = 0.02  # s of calls in a sample, at least
DELAY = 0.06  # of wall time × threads: a sample that waited longer for a core is dropped

Check = Callable[[str, object], None]


# Where this runs ---


class Roof(NamedTuple):
    gflops: float
    kind: str


def native() -> ModuleType | None:
    """The compiled worker's module, where that worker runs."""
    try:
        from fastmeta import native
    except ImportError:
        return None
    return native if native.cpu.unavailable() is None else None


def roof() -> Roof:
    """Float32 GFLOP/s of nothing but fused multiply-adds on all threads, measured before and after
    each race, since clocks drift and neighbours steal; the higher one counts. Without the native
    worker those of torch's own 1024³ product."""
    worker = native()
    _settle()
    if worker is None:
        return Roof(_product_peak(), "torch mm")
    return Roof(worker.fma_peak(torch.get_num_threads()), "fma")


def _product_peak() -> float:
    a = torch.rand(1024, 1024)
    times = [_sample(lambda: torch.mm(a, a)).seconds for _ in range(9)]
    return 2 * 1024**3 / statistics.median(times) / 1e9


@pytest.fixture
def machine() -> dict:
    """The columns that all rows of a race share."""
    before = roof()
    return {
        "roof_gflops": round(before.gflops, 1),
        "roof_kind": before.kind,
        "threads": torch.get_num_threads(),
        "isa": native().cpu.passes.isa if native() else torch.backends.cpu.get_cpu_capability(),
        "mkl": os.environ.get("FASTMETA_BENCH_MKL", "default"),
        "device": processor(),
        "torch": torch.__version__,
        "jax": version("jax"),
        "commit": commit(),
    }


# Samples ---


class Sample(NamedTuple):
    seconds: float
    clean: bool | None  # None: this kernel does not say


def _waited() -> dict[str, int] | None:
    """Nanoseconds each thread of this process has waited for a core; None: unknown here."""
    waited = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited[path.parent.name] = int(path.read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return waited or None


def _sample(function: Callable, calls: int = 1) -> Sample:
    """Seconds per call of so many calls in a row."""
    before = _waited()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = time.perf_counter() - start
    after = _waited()
    if before is None or after is None:
        return Sample(seconds / calls, None)
    delay = sum(ns - before.get(thread, 0) for thread, ns in after.items()) * 1e-9
    return Sample(seconds / calls, delay <= DELAY * seconds * torch.get_num_threads())


def _samples(entries: dict[str, Callable]) -> dict[str, list[Sample]]:
    """Seven rounds, the competitors in turn; five for those that take longer than a second.

    Inner loops call back to back, so a turn is one call that is not timed and then as many as fill
    SPAN: threads are awake and buffers in the cache, for everybody alike.
    """
    samples: dict[str, list[Sample]] = {who: [] for who in entries}
    for index in range(7):
        for who, function in entries.items():
            last = samples[who][-1].seconds if samples[who] else SPAN
            if index < 5 or last < 1:
                _settle()
                if last < 1:
                    function()
                samples[who].append(_sample(function, max(1, int(SPAN / last))))
    return samples


def _settle() -> None:
    """Waits until this process is idle: some thread pools spin on for long after their work."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < 0.1 * PAUSE:
            return


def _median(samples: list[Sample]) -> tuple[float, int | str]:
    """(seconds, how many samples were clean): of the clean ones where these are three or more."""
    clean = [s.seconds for s in samples if s.clean]
    used = clean if len(clean) >= 3 else [s.seconds for s in samples]
    return statistics.median(used), "" if samples[0].clean is None else len(clean)


# Races ---


@pytest.fixture
def race(benchmark, machine) -> Callable:
    """race(workload, what, {who: function}, cost, check): calls each once, has its result checked,
    runs them in turn and records medians.

    The first name is ours; ratio = a competitor's median over it. pytest-benchmark shows our own
    time.
    """

    def run(
        workload: str, what: str, entries: dict[str, Callable], cost: Cost, check: Check
    ) -> None:
        for who, function in entries.items():
            check(who, function())
        timed = {who: _median(samples) for who, samples in _samples(entries).items()}
        ours = next(iter(entries))
        machine["roof_gflops"] = max(machine["roof_gflops"], round(roof().gflops, 1))
        rows = [
            {"workload": workload, "what": what, "who": who, **machine}
            | _columns(seconds, clean, timed[ours][0], cost, machine["roof_gflops"])
            for who, (seconds, clean) in timed.items()
        ]
        append(RESULTS, rows)
        _ROWS.extend(rows)
        benchmark.pedantic(entries[ours], rounds=1, iterations=1)

    return run


@pytest.fixture
def contest(race) -> Callable:
    """contest(workload, kind, steps): ours against every competitor, held to the float64
    reference."""

    def run(workload: Workload, kind: str, steps: int = 2) -> None:
        problem = workloads.problem(workload)
        what = f"{kind} K={steps}" if kind in ("adapt", "maml") else kind
        check = competitors.truth(problem, kind, steps).check
        entries = competitors.entries(problem, kind, steps)
        race(workload.name, what, entries, workloads.cost(workload, kind, steps), check)

    return run


def _columns(seconds: float, clean: int | str, ours: float, cost: Cost, roof: float) -> dict:
    return {
        "median_ms": round(seconds * 1e3, 3),
        "ratio": round(seconds / ours, 2),
        "gflop": round(cost.gflop, 3),
        "mbytes": round(cost.mbytes, 2),
        "gflops": round(cost.gflop / seconds, 1),
        "of_roof": round(cost.gflop / seconds / roof, 3),
        "clean": clean,
    }


_ROWS: list[dict] = []


def pytest_terminal_summary(terminalreporter) -> None:
    """The rows of this run, and which competitors could not take part."""
    for row in _ROWS:
        terminalreporter.write_line(
            f"{row['workload']:<24} {row['what']:<18} {row['who']:<9} {row['median_ms']:>10} ms  "
            f"x{row['ratio']:<6} {row['of_roof']:.0%} of the roof, {row['clean']} clean"
        )
    for who, reason in competitors.left_out().items():
        terminalreporter.write_line(f"left out: {who}, {reason}")
