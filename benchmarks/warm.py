"""Compiles every Triton kernel that the GPU tests and the GPU benchmark launch, in parallel, into
Triton's cache, and fills torch.compile's cache beside it.

    python benchmarks/warm.py [--jobs 16] [--seconds 100]     for the GPU that is here
    python benchmarks/warm.py --list                          counts the kernels; needs no GPU

Each process writes down all launches (over tensors on the CPU that nobody fills), takes every n-th
kernel that is not yet another's, and compiles it as Triton's own JIT would. Launches of the
benchmark come first. What is not done when the time is up is compiled when it is first used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]
COMPILERS = 4  # processes for torch.compile


def launches() -> Iterator[Any]:
    """Every launch of the benchmark's contests, then of the tests' cases."""
    import gpu
    import test_gpu
    import torch
    import workloads

    from fastmeta import triton as worker
    from fastmeta.rules import SGD
    from fastmeta.triton.launch import recording

    for contest in gpu.contests():
        w, kind = contest.workload, contest.kind
        problem = workloads.problem(w)
        rate = torch.full((1, 1, 1), workloads.LR).expand(contest.steps, w.tasks, w.net.num_params)
        for precision in contest.precisions:
            passes = worker.at(precision)
            with recording() as found:
                if kind == "forward":
                    passes.mlp(w.net, problem.params, problem.batch.x[None])
                elif kind == "gradient":
                    passes.loss_grad(w.net, problem.params, problem.batch)
                elif kind == "adapt":
                    passes.adapt(w.net, problem.params[:1], problem.batch, rate, SGD())
                else:
                    passes.maml(w.net, problem.params[:1], problem.batch, rate, SGD(), order=2)
            yield from found
    for case in test_gpu.cases():
        with recording() as found:
            case.run(worker.at(case.precision), "cpu")
        yield from found


def signature(launch: Any) -> tuple:
    """What decides whether two launches are one kernel, as far as Triton's JIT looks."""
    seen = []
    for name, value in launch.args.items():
        if hasattr(value, "data_ptr"):
            seen.append((name, str(value.dtype), value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            seen.append((name, value == 1, value % 16 == 0, value >= 2**31))
        else:
            seen.append((name, str(value)))
    consts = tuple(sorted((name, str(value)) for name, value in launch.consts.items()))
    return launch.kernel.__name__, tuple(seen), consts, launch.warps, launch.stages


def unique() -> dict[tuple, Any]:
    found: dict[tuple, Any] = {}
    for launch in launches():
        found.setdefault(signature(launch), launch)
    return found


def compile_part(index: int, count: int, deadline: float) -> int:
    """The kernels index, index + count, ...: machine code, and the launcher beside it. How many did
    not compile."""
    import torch

    torch.cuda.init()
    done = failed = 0
    for launch in list(unique().values())[index::count]:
        if time.monotonic() > deadline:
            break
        try:
            kernel = launch.kernel.warmup(
                **launch.args,
                **launch.consts,
                grid=launch.grid,
                num_warps=launch.warps,
                num_stages=launch.stages,
                enable_fp_fusion=True,
            )
            with contextlib.suppress(AttributeError):
                kernel._init_handles()
            done += 1
        except Exception as error:
            failed += 1
            name = launch.kernel.__name__
            print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
    print(f"part {index}: {done} kernels, {failed} failed", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--part", metavar="I/N", help="compile one part in this process")
    how = parser.parse_args()
    start = time.monotonic()
    if how.list:
        names = Counter(key[0] for key in unique())
        for name, number in sorted(names.items()):
            print(f"{name} {number}")
        print(f"all {sum(names.values())}, {time.monotonic() - start:.1f} s")
        return 0
    if how.part:
        index, count = (int(n) for n in how.part.split("/"))
        return int(compile_part(index, count, start + how.seconds) > 0)
    seconds = ["--seconds", str(how.seconds)]
    jobs = [[__file__, "--part", f"{i}/{how.jobs}", *seconds] for i in range(how.jobs)] + [
        [str(HERE / "gpu.py"), "--prepare", f"{i}/{COMPILERS}", *seconds] for i in range(COMPILERS)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, *job], env=environment) for job in jobs]
    return max(process.wait() for process in running)


if __name__ == "__main__":
    sys.exit(main())
