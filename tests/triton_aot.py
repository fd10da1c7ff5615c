"""Compiles recorded Triton launches for GPUs that need not be there, and weighs the machine code.

    python tests/triton_aot.py module:function [--archs 80 90 100] [--only PATTERN] [--limit 30]

``module:function`` names a function without arguments that returns {label: launches}, as
``fastmeta.triton.launch.Launch``: ``kernel``, ``args``, ``consts``, ``warps``, ``stages`` are read.
Each launch is specialised by Triton's own binder, as on a GPU: types from the arguments, what is
known to be a multiple of 16, ones and Nones as constants. Allocations count as aligned; a view
counts by its offset.

One JSON object a line, as each compilation ends: what compiles to the same thing is compiled once,
and has a row under each of its labels. A row's keys:

* label, kernel, arch, warps, stages, triton (its version), signature {argument: type, type and
  "/16", or "=constant"};
* error: None, or why there is no machine code; slow: it took more than ``limit`` seconds of
  processor time and was stopped; seconds: of processor time, ptxas included, so that a busy machine
  does not matter;
* registers, stack (bytes of local memory a thread: what spilled), shared (bytes a block), tmem
  (columns of tensor memory, from sm_100 on), instructions (of SASS, padding aside), and of those
  HGMMA, HMMA, UTCMMA (tensor cores of sm_90, sm_80, sm_100), FFMA, LDL, STL (local memory), LDS,
  LDSM, LDG, MUFU, F64 (double arithmetic; tl.sin of float32 has some).

Every compilation has a process of its own, for the compiler may abort. Where TRITON_CACHE_DIR is
set, rows are kept there beside Triton's files, with the seconds of the first time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
# Bytes of shared memory a block may have, and columns of tensor memory.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
TMEM = 512

Row = dict[str, Any]


# --- what the tests call; Triton is not imported ------------------------------------------------


def compiled(
    cases: str,
    archs: Sequence[int] = ARCHS,
    triton_path: str | os.PathLike[str] | None = None,
    *,
    paths: Sequence[str | os.PathLike[str]] = (),
    only: str = "*",
    limit: float = 30.0,
    jobs: int = 1,
    timeout: float | None = None,
) -> list[Row]:
    """The rows of ``cases`` ("module:function"), from a process of its own without the interpreter.

    ``triton_path`` is a folder with another Triton; ``paths`` are folders to import ``cases`` from.
    Raises RuntimeError where the cases themselves cannot be had.
    """
    if triton_path is not None and not (Path(triton_path) / "triton" / "__init__.py").exists():
        raise RuntimeError(f"no triton in {triton_path}")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    first = [os.path.abspath(p) for p in (*([triton_path] if triton_path else []), *paths)]
    env["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, __file__, cases, "--only", only, "--limit", str(limit)]
    command += ["--jobs", str(jobs), "--archs", *map(str, archs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{cases}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if not rows:
        raise RuntimeError(f"{cases}: no launches under labels like {only!r}")
    return rows


def over_budget(
    rows: Iterable[Row], budgets: Mapping[tuple[str, str, int], Mapping[str, Any]]
) -> list[str]:
    """Readable lines: what did not compile, was slow, has no budget, does not fit the GPU, or is
    over its budget. None is good news.

    ``budgets`` maps (label pattern as of fnmatch, kernel, arch) to {"registers": 255, "stack": 0,
    "shared": 65536, "seconds": 10, ...}: any number of a row, at most; and under "at_least" any, at
    least: {"HGMMA": 1}. The first entry that matches counts, so exceptions stand first.
    """
    lines = []
    for row in rows:
        where = f"{row['label']}: {row['kernel']} on sm_{row['arch']} (triton {row['triton']})"
        if row["error"] is not None:
            lines.append(f"{where}: {row['error']}")
            continue
        if row["shared"] > SHARED.get(row["arch"], math.inf):
            limit = SHARED[row["arch"]]
            lines.append(f"{where}: {row['shared']} bytes of shared memory, a block has {limit}")
        if row["tmem"] > TMEM:
            lines.append(f"{where}: {row['tmem']} columns of tensor memory, a block has {TMEM}")
        matches = (
            budget
            for (label, kernel, arch), budget in budgets.items()
            if kernel == row["kernel"] and arch == row["arch"] and fnmatchcase(row["label"], label)
        )
        budget = next(matches, None)
        if budget is None:
            lines.append(f"{where}: no budget for it")
            continue
        for name, most in budget.items():
            if name != "at_least" and row[name] > most:
                lines.append(f"{where}: {name} {row[name]}, budget {most}")
        for name, least in budget.get("at_least", {}).items():
            if row[name] < least:
                lines.append(f"{where}: {name} {row[name]}, at least {least} expected")
    return lines


# --- the script ---------------------------------------------------------------------------------


class _Pointer:
    """What Triton's binder asks of a tensor, at an aligned allocation."""

    def __init__(self, tensor: Any) -> None:
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return 256 + self.offset

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class _Job:
    source: Any
    target: Any
    options: dict[str, Any]
    hash: str
    head: Row


def _specialised(launch: Any, arch: int) -> _Job:
    """What Triton's JIT would compile for this launch on this architecture."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler.compiler import get_cache_key
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    asked = dict(num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True)
    args = {k: _Pointer(v) if hasattr(v, "data_ptr") else v for k, v in launch.args.items()}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, rest = bind(**args, **launch.consts, **asked)
    if unknown := set(rest) - set(asked):
        raise TypeError(f"{kernel.__name__} has no arguments {', '.join(sorted(unknown))}")
    options, signature, constants, attrs = kernel._pack_args(backend, rest, bound, special, rest)
    source = ASTSource(kernel, signature, constants, attrs)
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    written = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            written[name] = f"={constants[(i,)]}"
        else:
            written[name] = kind + ("/16" if attrs.get((i,)) else "")
    head = dict(kernel=kernel.__name__, arch=arch, warps=launch.warps, stages=launch.stages)
    head |= dict(triton=triton.__version__, signature=written)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return _Job(source, target, dict(options.__dict__), digest, head)


_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_EXACT = ("HGMMA", "HMMA", "LDL", "STL", "LDS", "LDSM", "LDG", "MUFU")
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")


def _counts(sass: str) -> dict[str, int]:
    opcodes = Counter(op for op in _OPCODE.findall(sass) if op != "NOP")
    bases: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        bases[opcode.split(".")[0]] += count
    counts = {"instructions": sum(bases.values())} | {name: bases[name] for name in _EXACT}
    counts["FFMA"] = bases["FFMA"] + bases["FFMA2"]
    counts["UTCMMA"] = sum(n for op, n in bases.items() if re.match(r"UTC\w*MMA", op))
    counts["F64"] = sum(n for op, n in opcodes.items() if op.startswith(_DOUBLE) or ".F64" in op)
    return counts


def _processor_seconds() -> float:
    return sum(os.times()[:4])


def _measure(job: _Job) -> Row:
    import triton

    start = _processor_seconds()
    kernel = triton.compile(job.source, target=job.target, options=job.options)
    row: Row = {"seconds": round(_processor_seconds() - start, 2)}
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True)
            for what in ("--dump-resource-usage", "-sass")
        )
    # A function that was not inlined has a line of its own.
    per = [dict(re.findall(r"(\w+):(\d+)", line)) for line in re.findall(r"REG:.*", usage.stdout)]
    row["registers"] = max(int(one["REG"]) for one in per)
    row["stack"] = sum(int(one["STACK"]) + int(one["LOCAL"]) for one in per)
    row["shared"] = kernel.metadata.shared
    row["tmem"] = getattr(kernel.metadata, "tmem_size", None) or 0
    return row | _counts(sass.stdout)


def _in_child(job: _Job, limit: float, out: str) -> int:
    """Starts a process that writes the row to ``out`` (and what it says to ``out``.log)."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # whichever of the two comes first
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        # One second over, so that whoever is stopped by it has been slow; ptxas inherits it.
        seconds = math.ceil(limit) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where ptxas fails Triton prints all the PTX
        os.dup2(os.open(out + ".log", os.O_WRONLY | os.O_CREAT), 2)
        try:
            row = _measure(job)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:2000]}
        Path(out).write_text(json.dumps(row))
        os._exit(0)
    finally:
        os._exit(1)


def _outcome(out: str, status: int, seconds: float, limit: float) -> Row:
    """A whole row of what a child left behind; seconds are all that it and ptxas used."""
    code = os.waitstatus_to_exitcode(status)
    row: Row = {"error": None, "slow": False, "seconds": round(seconds, 2)}
    if code == 0:
        row |= json.loads(Path(out).read_text())
    elif code < 0:
        row["error"] = f"the compiler was ended by {signal.Signals(-code).name}"
    else:
        row["error"] = f"the compiler ended with exit status {code}"
    spent = seconds if row["error"] else row["seconds"]
    if spent > limit or code in (-signal.SIGXCPU, -signal.SIGKILL) and seconds > limit:
        row["slow"] = True
        row["error"] = f"slow: {row['seconds']} s of compilation, limit {limit:g} s"
    elif row["error"] and (log := Path(out + ".log")).exists():
        row["error"] += "".join(f"\n{part}" for part in [log.read_text()[-1000:].strip()] if part)
    return row


def _finished(jobs: Sequence[_Job], at_once: int, limit: float) -> Iterator[tuple[_Job, Row]]:
    """Each job with its row, as it ends."""
    waiting, running = list(jobs), dict[int, tuple[_Job, str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    out = os.path.join(folder, job.hash)
                    running[_in_child(job, limit, out)] = (job, out, time.monotonic())
                for pid, (job, out, start) in list(running.items()):
                    if time.monotonic() - start > 4 * limit + 60:
                        os.killpg(pid, signal.SIGKILL)  # waits for something, or nobody lets it run
                    done, status, usage = os.wait4(pid, os.WNOHANG)
                    if done:
                        del running[pid]
                        yield job, _outcome(out, status, usage.ru_utime + usage.ru_stime, limit)
                time.sleep(0.01)
        finally:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _kept(job: _Job) -> Path | None:
    """The file of a row in Triton's cache; another version of this file has others."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return Path(cache) / "rows" / f"{job.hash}-{version}.json" if cache else None


def _keep(job: _Job, row: Row) -> None:
    if (file := _kept(job)) is None or row["error"]:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(row))
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", help="module:function")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--only", default="*", help="labels, as of fnmatch")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a compilation may take")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at once")
    asked = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # Triton looks when it defines a kernel
    import triton

    module, _, function = asked.cases.partition(":")
    cases = getattr(importlib.import_module(module), function)()
    jobs: dict[str, _Job] = {}
    labels: dict[str, list[str]] = {}

    def write(head: Row, row: Row) -> None:
        print(json.dumps(head | row), flush=True)

    for label in (name for name in cases if fnmatchcase(name, asked.only)):
        if not cases[label]:
            sys.exit(f"{label}: no launches")
        for launch in cases[label]:
            for arch in asked.archs:
                try:
                    job = _specialised(launch, arch)
                except Exception as error:
                    head = dict(label=label, kernel=launch.kernel.__name__, arch=arch)
                    head |= dict(triton=triton.__version__)
                    message = f"{type(error).__name__}: {error}"[:2000]
                    write(head, {"error": message, "slow": False, "seconds": 0.0})
                    continue
                jobs[job.hash] = job
                if label not in labels.setdefault(job.hash, []):
                    labels[job.hash].append(label)

    new = []
    for job in jobs.values():
        if (file := _kept(job)) is not None and file.exists():
            for label in labels[job.hash]:
                write({"label": label} | job.head, json.loads(file.read_text()))
        else:
            new.append(job)
    for job, row in _finished(new, asked.jobs, asked.limit):
        _keep(job, row)
        for label in labels[job.hash]:
            write({"label": label} | job.head, row)


if __name__ == "__main__":
    main()
