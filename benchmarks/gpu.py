"""The benchmark of a GPU worker: ours against what a user would write instead, in fp32, tf32 and
bf16, interleaved in one process; rows to OUT/results.csv, the same as a table to OUT/table.md.

    python benchmarks/gpu.py --out runs/gpu --seconds 150        the most important rows first
    python benchmarks/gpu.py --prepare 0/4                       only fill torch.compile's cache
    python benchmarks/gpu.py --dry                               its logic, tiny, on the CPU

Times are medians of CUDA events around one call, competitors in turn; before each call 256 MiB are
written, so that nobody finds his tensors in the cache, and the targets take other values. JAX,
whose stream the events do not see, is timed by the wall clock over calls in a row, with neither.
A row states

* gflop, mbytes: what must be computed and moved (``workloads.cost``); sines beside them;
* of_roof: of the rate that a product of 8192³ of the same precision reaches here, measured first
  (for fp32 of plain float32, which three TF32 products can pass);
* of_floor: of the time that FLOPs at that rate, bytes at the rate of a copy and sines at the rate
  of the special function units need, whichever is longest;
* peak_mb: memory on top of the problem's own; error: against the float64 reference, relative (of
  θ_K: what the steps added). Competitors in bf16 round their first layer too, which costs accuracy
  that ours keeps.

The competitors are those of ``competitors`` (loop, vmap, bmm, compiled, jax), and of these under a
CUDA graph of our making ("bmm graph", "compiled graph"); "compiled" for maml is torch.compile of
torch.func.grad over the unrolled loop. "fastmeta graph" is one call under a graph, for the ops that
do not use one themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import competitors
import torch
import workloads
from competitors import Autograd
from rows import COLUMNS, append, commit, processor, version
from torch import Tensor
from workloads import Problem, Workload, small

import fastmeta as fm
from fastmeta.ops import dispatch

EXTRA = ["floor_ms", "of_floor", "peak_mb", "error", "triton"]
PRECISIONS = ("bf16", "tf32", "fp32")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Sines and cosines of a special function unit: 16 a clock and multiprocessor.
SPECIAL = 16 * 1.98e9
FLUSH = 256 * 2**20  # bytes, several times any cache
CALLS, LEAST = 15, 5  # samples of each competitor, and where time is short
CHECKED = 4  # tasks compared with the float64 reference where results are one row a task
SLOWEST = 25.0  # s that one competitor may take to be made and called once


# What is raced ---


@dataclass(frozen=True)
class Contest:
    """One row of the table for each precision and competitor."""

    workload: Workload
    kind: str  # gradient, adapt, maml, outer
    steps: int = 2
    who: tuple[str, ...] = ("compiled graph", "bmm graph", "bmm", "vmap", "jax")
    precisions: tuple[str, ...] = PRECISIONS

    @property
    def what(self) -> str:
        return f"{self.kind} K={self.steps}" if self.steps else self.kind

    def __str__(self) -> str:
        return f"{self.workload}:{self.what}"


def images(T: int, width: int = 256) -> Workload:
    name = f"images-T{T}-N31684" if width == 256 else f"width{width}-T{T}-N31684"
    return Workload(name, fm.siren(2, 3, width, 5, 200.0, output_shift=0.5), T, 178 * 178)


def contests() -> list[Contest]:
    """The most important first: whatever the clock leaves out stands last."""
    tiny = small("siren", 64, 1024, 1024)
    objects = Workload("shapenet-T1-N16384", fm.nerf_mlp(256, 6), 1, 128 * 128)
    scan = Workload("ct-pixels-T1-N65536", fm.fourier_mlp(2, 1, 256, 5), 1, 256 * 256)
    most, few = ("compiled graph", "bmm graph", "loop", "vmap", "jax"), ("compiled graph", "jax")
    meta = ("compiled graph", "bmm graph", "bmm", "vmap", "jax")
    sweep = [
        Contest(images(3, width), "gradient", 0, ("compiled graph",), ("bf16", "tf32"))
        for width in (64, 128, 32, 16, 512)
    ]
    return [
        Contest(images(3), "gradient", 0, most),
        Contest(tiny, "adapt", 5, few),
        Contest(tiny, "gradient", 0, few),
        Contest(images(3), "maml", 2, meta),
        Contest(images(3), "outer", 2, ("bmm",)),
        Contest(tiny, "maml", 2, few),
        Contest(images(64), "gradient", 0, ("compiled graph", "bmm graph"), ("bf16", "tf32")),
        Contest(images(1), "gradient", 0, few, ("bf16", "tf32")),
        Contest(objects, "gradient", 0, few),
        Contest(scan, "gradient", 0, few),
        *sweep[:2],
        Contest(images(1), "maml", 2, ("bmm graph",), ("bf16", "tf32")),
        *sweep[2:],
        Contest(images(3), "forward", 0, ("compiled graph", "loop"), ("bf16", "tf32")),
        Contest(images(3), "gradient", 0, (), ("fp16",)),
        Contest(small("siren", 32, 1024, 1024), "adapt", 5, few, ("bf16", "tf32")),
        Contest(small("siren", 16, 1024, 1024), "adapt", 5, few, ("bf16", "tf32")),
    ]


def shrunk(contest: Contest) -> Contest:
    """The same, tiny: for a dry run."""
    w = contest.workload
    made = replace(w, net=replace(w.net, width=8), tasks=min(w.tasks, 2), points=64)
    who = tuple(n for n in contest.who if n in ("loop", "vmap", "bmm"))
    return replace(contest, workload=made, who=who, precisions=("fp32",))


# The device ---


@dataclass(frozen=True)
class Machine:
    """Where it runs; ``roofs`` by precision in GFLOP/s, bytes and sines a second."""

    device: str
    columns: dict[str, Any]
    roofs: dict[str, float]
    bandwidth: float
    sines: float


def machine(device: str) -> Machine:
    """Roofs measured now: a copy of 1 GiB, products of 8192³ of random numbers (CPU: tiny)."""
    cuda = device == "cuda"
    clock = Clock(device)
    size, bytes_ = (8192, 2**30) if cuda else (256, 2**22)
    pair = torch.rand(2, bytes_ // 4, device=device)
    copied = 2 * bytes_ / clock.median(lambda pair=pair: pair[0].copy_(pair[1]), 10)
    del pair
    roofs = {}
    for precision in ("fp32", "tf32", "bf16", "fp16") if cuda else ("fp32",):
        a = torch.rand(size, size, device=device).to(LOW.get(precision, torch.float32)) - 0.5
        with arithmetic(precision, device, autocast=False):
            roofs[precision] = 2e-9 * size**3 / clock.median(lambda a=a: torch.mm(a, a), 6)
    columns = {
        "roof_kind": "torch mm",
        "threads": torch.get_num_threads(),
        "isa": "cpu",
        "mkl": "",
        "device": processor(),
        "torch": torch.__version__,
        "jax": version("jax"),
        "commit": commit(),
        "triton": version("triton"),
    }
    sines = 1e9
    if cuda:
        p = torch.cuda.get_device_properties(0)
        columns |= {"isa": f"sm_{p.major}{p.minor}", "device": p.name}
        sines = SPECIAL * p.multi_processor_count
    return Machine(device, columns, roofs, copied, sines)


@contextlib.contextmanager
def arithmetic(precision: str, device: str = "cuda", autocast: bool = True) -> Iterator[None]:
    """torch's (and JAX's) own products in a precision, where they follow a global setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    low = LOW.get(precision)
    # without its cache of cast weights, which a graph must not keep
    cast = torch.autocast(device, low, enabled=low is not None and autocast, cache_enabled=False)
    try:
        with cast:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class OutOfTime(Exception):
    pass


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block once so many seconds have passed."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Seconds of a call on the device; on the CPU by the wall clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSH // 4, device=device) if self.cuda else None

    def sample(self, function: Callable) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        if isinstance(function, Jitted):
            return function.seconds()
        assert self.flush is not None
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def median(self, function: Callable, calls: int) -> float:
        function()
        return statistics.median(self.sample(function) for _ in range(calls))


# Who races ---


class Jitted:
    """JAX: calls in a row by the wall clock, since they return before the device has done them."""

    def __init__(self, problem: Problem, kind: str, steps: int, precision: str) -> None:
        import jax

        lib = competitors.jax_library(problem.params.device.type)
        function, *arguments = competitors._functional(lib, problem, kind, steps)
        self.arguments = jax.tree.map(lib.array, arguments)
        name = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "BF16_BF16_F32"}[precision]
        with jax.default_matmul_precision(name):
            self.compiled = jax.jit(function).lower(*self.arguments).compile()
        self.wait, self.calls = jax.block_until_ready, 1

    def __call__(self) -> Any:
        return self.wait(self.compiled(*self.arguments))

    def seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.calls):
            last = self.compiled(*self.arguments)
        self.wait(last)
        seconds = (time.perf_counter() - start) / self.calls
        self.calls = max(1, min(20, int(0.01 / seconds)))
        return seconds


def graphed(function: Callable) -> Callable:
    """The launches of a call as one CUDA graph; its result stays where it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def stacked(problem: Problem, kind: str, steps: int, compile: bool) -> Callable:
    """All tasks in one baddbmm a layer. Inductor differentiates once only: a compiled meta-gradient
    is torch.func's, unrolled inside the graph."""
    if compile and kind == "maml":
        function, *arguments = competitors._functional(competitors.SINGLE, problem, kind, steps)
        return functools.partial(torch.compile(function, dynamic=False), *arguments)
    made: Autograd = competitors._stacked(problem)
    return (made.compiled() if compile else made).run(kind, steps)


def outer(problem: Problem, steps: int, meta: Callable[[], Any], leaves: list[Tensor]) -> Callable:
    """A whole outer step: meta-gradient, then Adam."""
    optimizer = torch.optim.Adam(leaves, lr=1e-5, fused=problem.params.is_cuda)

    def run() -> list[Tensor]:
        found = meta()
        for leaf, grad in zip(leaves, found, strict=True):
            leaf.grad = grad
        optimizer.step()
        return list(found)

    return run


def ours(contest: Contest, problem: Problem, precision: str, impl: str) -> Callable:
    how = {"impl": impl, "precision": precision}
    if contest.kind != "outer":
        return competitors.fastmeta(problem, contest.kind, contest.steps, **how)
    net, lr = problem.workload.net, workloads.LR
    maml = fm.MAML(net, contest.steps, lr, init=problem.init, **how)
    fused = problem.params.is_cuda
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-5, fused=fused)

    def run() -> Tensor:
        optimizer.zero_grad()
        maml(problem.batch).backward()
        optimizer.step()
        return maml.init.grad

    return run


def competitor(contest: Contest, problem: Problem, who: str, precision: str) -> Callable:
    """A competitor's call; whatever of its kind does not exist raises."""
    kind, steps, device = contest.kind, contest.steps, problem.params.device.type
    name = who.split()[0]
    if name == "jax":
        return Jitted(problem, kind, steps, precision)
    if kind == "outer":
        init = [
            w.requires_grad_() for w in competitors.unflatten(problem.workload.net, problem.init)
        ]
        made = replace(competitors._stacked(problem), init=init)
        function = outer(problem, steps, made.run("maml", steps), init)
    elif name in ("bmm", "compiled"):
        function = stacked(problem, kind, steps, name == "compiled")
    else:
        function = competitors.FACTORIES[name](problem, kind, steps)

    def run() -> Any:
        with arithmetic(precision, device):
            return function()

    return graphed(run) if who.endswith("graph") else run


# Races ---


def floor(contest: Contest, where: Machine, precision: str) -> float:
    """Seconds that the longest of products, memory and sines needs."""
    w, kind = contest.workload, contest.kind
    cost = workloads.cost(w, "maml" if kind == "outer" else kind, contest.steps)
    units = w.tasks * w.points * w.net.width * (w.net.depth - 1)
    K = contest.steps
    # a sine a unit forward, sine and cosine on the way back; a dual pass as many
    passes = {"forward": 1, "gradient": 2, "adapt": 2 * K, "maml": 4 * K + 2, "outer": 4 * K + 2}
    sines = units * passes[kind] if w.net.activation == "sine" else 0
    rate = where.roofs.get(precision, where.roofs["fp32"])
    return max(cost.gflop / rate, cost.mbytes * 1e6 / where.bandwidth, sines / where.sines)


def truth(contest: Contest, problem: Problem) -> tuple[competitors.Truth, int | None]:
    """What results are held to, and how many tasks of them (None: all, already summed)."""
    kind = "maml" if contest.kind == "outer" else contest.kind
    rows = None if kind == "maml" else min(CHECKED, problem.workload.tasks)
    part = problem if rows is None else problem.take(rows)
    return competitors.truth(part, kind, contest.steps), rows


def first(result: Any, rows: int | None) -> Any:
    """The rows that are checked."""
    if rows is None:
        return result
    if isinstance(result, (list, tuple)):
        return [part[:rows] for part in result]
    return result[:rows]


class Race:
    """One contest in one precision, and what it leaves behind."""

    def __init__(self, contest: Contest, where: Machine, impl: str, deadline: float) -> None:
        self.contest, self.where, self.impl, self.deadline = contest, where, impl, deadline
        self.problem = workloads.problem(contest.workload).to(where.device)
        self.truth, self.rows = truth(contest, self.problem)
        self.targets = [torch.rand_like(self.problem.batch.y) for _ in range(3)]
        self.original = self.problem.batch.y.clone()
        self.clock = Clock(where.device)

    def run(self, precision: str) -> list[dict]:
        entries: dict[str, Callable] = {}
        known: dict[str, dict] = {}
        self.problem.batch.y.copy_(self.original)
        for who in self._names():
            spent = min(SLOWEST, self.deadline - time.monotonic())
            try:
                with limit(spent):
                    entries[who], known[who] = self._made(who, precision)
            except (Exception, OutOfTime) as error:
                kind = type(error).__name__
                say(f"left out: {self.contest} {precision} {who}: {kind}: {str(error)[:200]}")
                gc.collect()
                if self.where.device == "cuda":
                    torch.cuda.empty_cache()
        if not any(who.startswith("fastmeta") for who in entries):
            return []
        return self._rows(precision, self._times(entries), known)

    def _names(self) -> list[str]:
        cuda, kind = self.where.device == "cuda", self.contest.kind
        graph = ["fastmeta graph"] if cuda and kind in ("gradient", "forward") else []
        return ["fastmeta", *graph, *self.contest.who]

    def _made(self, who: str, precision: str) -> tuple[Callable, dict]:
        """The callable after its first call, its error and its memory."""
        cuda = self.where.device == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        if who.startswith("fastmeta"):
            function = ours(self.contest, self.problem, precision, self.impl)
            function = graphed(function) if who.endswith("graph") else function
        else:
            function = competitor(self.contest, self.problem, who, precision)
        result = function()
        error = self.truth.error(first(result, self.rows))
        if precision == "fp32" and not error <= self.truth.bound:
            wrong = f"relative error {error:.1e}, accepted {self.truth.bound:.1e}"
            if not who.startswith("fastmeta"):
                raise ValueError(wrong)
            say(f"WRONG: {self.contest} {precision} {who}: {wrong}")
        peak = ""
        if cuda and who != "jax":
            torch.cuda.synchronize()
            peak = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f}"
        return function, {"error": f"{error:.1e}", "peak_mb": peak}

    def _times(self, entries: dict[str, Callable]) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {who: [] for who in entries}
        stop = min(time.monotonic() + 4.0, self.deadline)
        for turn in range(CALLS):
            if turn >= LEAST and time.monotonic() > stop:
                break
            for who, function in entries.items():
                self.problem.batch.y.copy_(self.targets[turn % len(self.targets)])
                samples[who].append(self.clock.sample(function))
        return samples

    def _rows(self, precision: str, samples: dict[str, list[float]], known: dict) -> list[dict]:
        c, where = self.contest, self.where
        cost = workloads.cost(c.workload, "maml" if c.kind == "outer" else c.kind, c.steps)
        base = floor(c, where, precision)
        roof = where.roofs.get(precision, where.roofs["fp32"])
        seconds = {who: statistics.median(times) for who, times in samples.items()}
        reference = seconds.get("fastmeta", min(seconds.values()))
        return [
            where.columns
            | {
                "workload": c.workload.name,
                "what": f"{c.what} {precision}",
                "who": who,
                "median_ms": round(s * 1e3, 4),
                "ratio": round(s / reference, 2),
                "gflop": round(cost.gflop, 3),
                "mbytes": round(cost.mbytes, 2),
                "gflops": round(cost.gflop / s, 1),
                "of_roof": round(cost.gflop / s / roof, 3),
                "roof_gflops": round(roof, 1),
                "clean": len(samples[who]),
                "floor_ms": round(base * 1e3, 4),
                "of_floor": round(base / s, 3),
            }
            | known[who]
            for who, s in seconds.items()
        ]


def free(device: str) -> None:
    """Captured loops and what torch holds, back."""
    for name in ("triton", "cuda"):
        worker = dispatch.load(name)[0]
        if hasattr(getattr(worker, "at", None), "cache_clear"):
            worker.at.cache_clear()
    dispatch._choose.cache_clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def say(line: str) -> None:
    print(line, flush=True)


# Tables ---


def table(path: Path) -> str:
    """Markdown: a line for each row of a file, ours first, grouped by what was measured."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    head = ["workload", "what", "who", "ms", "× ours", "of roof", "of floor", "peak MB", "error"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 3 + "--:|" * 6]
    for r in rows:
        shown = [r["workload"], r["what"], r["who"], r["median_ms"], r["ratio"]]
        shown += [f"{float(r[k]):.0%}" for k in ("of_roof", "of_floor")]
        lines.append("| " + " | ".join([*shown, r["peak_mb"], r["error"]]) + " |")
    return "\n".join(lines) + "\n"


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=150.0, help="for everything")
    parser.add_argument("--impl", default="triton", help="our worker")
    parser.add_argument("--only", default="*", help="contests (workload:what), as of fnmatch")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, by the cpu worker")
    parser.add_argument("--prepare", metavar="I/N", help="compile the I-th part of N, time nothing")
    return parser.parse_args()


def prepare(chosen: list[Contest], part: str, deadline: float) -> None:
    """torch.compile of every N-th contest and precision, from the I-th: its cache keeps them."""
    index, count = (int(n) for n in part.split("/"))
    pairs = [(c, p) for c in chosen if "compiled graph" in c.who for p in c.precisions]
    for contest, precision in pairs[index::count]:
        start = time.monotonic()
        try:
            with limit(deadline - start):
                problem = workloads.problem(contest.workload).to("cuda")
                competitor(contest, problem, "compiled", precision)()
            torch.cuda.synchronize()
            say(f"compiled {contest} {precision}: {time.monotonic() - start:.1f} s")
        except (Exception, OutOfTime) as error:
            say(f"not compiled {contest} {precision}: {type(error).__name__}: {str(error)[:200]}")
        torch.compiler.reset()
        free("cuda")


def main() -> int:
    how = asked()
    deadline = time.monotonic() + how.seconds
    chosen = [c for c in contests() if fnmatchcase(str(c), how.only)]
    impl, device = how.impl, "cuda"
    if how.dry:
        chosen, device = [shrunk(c) for c in chosen], "cpu"
        impl = "cpu" if dispatch.load("cpu")[0] is not None else "reference"
    elif not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device; --dry runs its logic on the CPU")
    if how.prepare:
        prepare(chosen, how.prepare, deadline)
        return 0
    how.out.mkdir(parents=True, exist_ok=True)
    where = machine(device)
    rates = ", ".join(f"{name} {rate / 1e3:.1f}" for name, rate in where.roofs.items())
    say(f"{where.columns['device']}: copy {where.bandwidth / 1e9:.0f} GB/s; TFLOP/s {rates}")
    done, late = 0, []
    for contest in chosen:
        if time.monotonic() > deadline - (0 if how.dry else 5):
            late.append(str(contest))
            continue
        try:
            race = Race(contest, where, impl, deadline)
            for precision in contest.precisions:
                rows = race.run(precision)
                append(how.out / "results.csv", rows, [*COLUMNS, *EXTRA])
                done += len(rows)
                for r in rows:
                    say(
                        f"{r['workload']:<24} {r['what']:<16} {r['who']:<15} "
                        f"{r['median_ms']:>9} ms  x{r['ratio']:<6} {r['of_floor']:.0%} of the "
                        f"floor, {r['peak_mb'] or '?'} MB, error {r['error']}"
                    )
                if rows:
                    (how.out / "table.md").write_text(table(how.out / "results.csv"))
        except Exception as error:  # one contest's failure is not the others'
            say(f"failed: {contest}: {type(error).__name__}: {str(error)[:300]}")
            late.append(str(contest))
        race = None  # its graphs hold memory
        if device == "cuda":
            torch.compiler.reset()
        free(device)
    if late:
        say(f"not measured: {', '.join(late)}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
