"""The table of README.md: for each peer and each way of using fastmeta the lines that change, the
difference in result, and time and memory of an outer step, at T = 16, N = 1024, K = 5, width 64.

    python -m examples.measure [--threads 1] [--rounds 9] [--peers higher metasdf ...]

Time: medians over rounds in which all take their turn, in one process; wall clock, and in brackets
CPU seconds, which a busy machine distorts less. Peak memory: growth of the resident set over one
outer step in a process of its own, the worker's working memory with it; of JAX, which takes all
cores, XLA's own figure of temporaries. Saved tensors: those that torch holds for backward at a
time, counted exactly; the worker's memory is not in them, nor does torch.func let them be counted.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmeta as fm
from examples import after as with_maml
from examples.shared import Siren, pictures

HERE = Path(__file__).parent
PEERS = ("higher", "learn2learn", "torch_func", "metasdf", "learnit")
# Ways, beside the peer's own script; an idiom where the folder has one.
WAYS = {
    "before": "the peer",
    "module": "its loop, fastmeta's module",
    "idiom": "its words, `fm.compat`",
    "after": "`fm.MAML`",
    "least": "`fm.MAML(max_memory=0)`",
}


def module(peer: str) -> torch.nn.Module:
    """What takes the place of Siren() in a peer's own loop: the same start, fastmeta's op."""
    torch.manual_seed(0)
    spec, start = fm.convert.from_state_dict(Siren().state_dict(), "gradncp")
    if peer == "metasdf":
        return fm.compat.MetaMLP(spec, init=start)
    return fm.nn.BatchedMLP(spec, 1, init=start)


def ways(peer: str) -> dict[str, Callable[..., dict[str, Tensor]]]:
    """way -> main(outer_steps, tasks, side). Raises what importing the peer raises."""

    def script(name: str) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers' own imports
            return importlib.import_module(f"examples.{peer}.{name}")

    before = script("before")
    if peer == "learnit":
        after, path = script("after"), Path(_folder().name) / "start.pkl"
        before.checkpoint(path)
        return {way: partial(of.main, path) for way, of in (("before", before), ("after", after))}
    made = {
        "before": before.main,
        "module": lambda *sizes: before.main(*sizes, net=module(peer)),
        "after": with_maml.main,
        "least": lambda *sizes: with_maml.main(*sizes, max_memory=0),
    }
    if (HERE / peer / "idiom.py").exists():
        made["idiom"] = script("idiom").main
    return {way: made[way] for way in WAYS if way in made}


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """A folder for the checkpoint, as long as this process lives."""
    return tempfile.TemporaryDirectory()


def changed(peer: str, way: str) -> str:
    """Lines taken out and put in between the peer's script and ours, doc strings and empty ones
    left out; of the module the two that make it."""
    if way == "module":
        return "−1 +2"
    sides, ours = [], HERE / peer / ("idiom.py" if way == "idiom" else "after.py")
    for path in (HERE / peer / "before.py", ours if ours.exists() else HERE / "after.py"):
        text = path.read_text().split('"""', 2)[2]
        sides.append([line for line in text.splitlines() if line.strip()])
    marks = [line[0] for line in difflib.ndiff(*sides)]
    return f"−{marks.count('-')} +{marks.count('+')}"


# Memory ---


@contextmanager
def saved() -> Iterator[Callable[[], int]]:
    """Counts bytes of tensors saved for backward within: yields () -> the most held at a time. A
    storage counts once."""
    held: dict[int, int] = {}
    size = most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal size, most
            self.tensor, storage = tensor.detach(), tensor.untyped_storage()
            self.at, self.bytes = storage.data_ptr(), storage.nbytes()
            held[self.at] = held.get(self.at, 0) + 1
            size += self.bytes * (held[self.at] == 1)
            most = max(most, size)

        def __del__(self) -> None:
            nonlocal size
            held[self.at] -= 1
            size -= self.bytes * (held[self.at] == 0)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda packed: packed.tensor):
        yield lambda: most


def resident(main: Callable, tasks: int = 16, side: int = 32) -> float | None:
    """MB by which one outer step raises the peak of this process; None: this system does not say.

    What is loaded and made once is made before, on a small case; the compiled worker's working
    memory is not, and counts.
    """
    pictures(tasks, side)
    fm.available()  # loads the workers
    os.environ["FASTMETA_IMPL"] = "reference"
    main(1, 1, 8)
    del os.environ["FASTMETA_IMPL"]
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _status("VmRSS")
    main(1, tasks, side)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory(peer: str, way: str, threads: int) -> dict[str, float | None]:
    """resident and saved MB of one outer step, in a process of its own."""
    command = [sys.executable, "-m", "examples.measure", "--memory", peer, way]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "FASTMETA_IMPL": ""}
    done = subprocess.run(
        command, cwd=HERE.parent, env=env, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _memory_here(peer: str, way: str) -> dict[str, float | None]:
    main = ways(peer)[way]
    if (peer, way) == ("learnit", "before"):
        return {"resident": _temporaries(), "saved": None}
    grown = resident(main)
    if peer == "torch_func" and way in ("before", "module"):
        return {"resident": grown, "saved": None}  # its transforms refuse saved_tensors_hooks
    with saved() as most:
        main(1)
    return {"resident": grown, "saved": most() / 1e6}


def _temporaries() -> float:
    """MB that XLA says its compiled outer step needs, arguments and results aside."""
    import jax
    import jax.numpy as jnp

    before = importlib.import_module("examples.learnit.before")
    x, y = (jnp.asarray(part.numpy()) for part in pictures(16, 32))
    params = before.model.init(jax.random.PRNGKey(0), x[0])
    compiled = before.outer.lower(params, x[0], y).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


# Time ---


def seconds(mains: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """way -> (wall, CPU) seconds of an outer step: of three more of them, medians of the rounds."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in mains}
    for main in mains.values():
        main(1)
    for _ in range(rounds):
        for way, main in mains.items():
            clocks = [(time.perf_counter(), time.process_time())]
            for steps in (4, 1):
                main(steps)
                clocks.append((time.perf_counter(), time.process_time()))
            a, b, c = clocks
            times[way].append(tuple((2 * q - p - r) / 3 for p, q, r in zip(a, b, c, strict=True)))
    return {
        way: tuple(statistics.median(t) for t in zip(*of, strict=True)) for way, of in times.items()
    }


def rows(peer: str, threads: int, rounds: int) -> Iterator[str]:
    """The peer's lines of the table."""
    torch.set_num_threads(threads)
    mains = ways(peer)
    want = mains["before"]()
    timed = seconds(mains, rounds)
    used = {way: memory(peer, way, threads) for way in mains}
    for way, main in mains.items():
        wall, cpu = timed[way]
        cells = [peer.replace("_", ".") if way == "before" else "", WAYS[way]]
        if way == "before":
            cells += ["", "", f"{wall * 1e3:.0f} ms ({cpu * 1e3:.0f})"]
        else:
            far = max(_far(part, want[name]) for name, part in main().items())
            ratios = timed["before"][0] / wall, timed["before"][1] / cpu
            cells += [changed(peer, way), f"{far:.0e}"]
            cells.append(
                f"{wall * 1e3:.0f} ms ({cpu * 1e3:.0f}): {ratios[0]:.1f}× ({ratios[1]:.1f}×)"
            )
        for kind in ("resident", "saved"):
            value, peers = used[way][kind], used["before"][kind]
            if value is None:
                cells.append("")
            elif (
                way == "before" or peers is None or (kind == "saved" and way in ("after", "least"))
            ):
                cells.append(f"{value:.1f} MB")
            else:
                less = f"1/{peers / value:.0f}" if value > 0 else "none"
                cells.append(f"{value:.1f} MB: {less}")
        yield f"| {' | '.join(cells)} |"


def _far(got: Any, want: Any) -> float:
    """|got − want| / |want|."""
    a, b = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(_memory_here(*args.memory)))
        return
    titles = ["peer", "way", "lines", "difference", "time", "peak memory", "saved tensors"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for peer in args.peers:
        try:
            ways(peer)
        except Exception as error:  # learn2learn: RuntimeError where torchvision is not torch's
            print(f"{peer} is left out: {error}", file=sys.stderr)
            continue
        for row in rows(peer, args.threads, args.rounds):
            print(row, flush=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"\ntorch {torch.__version__}, {args.threads} threads, load {load:.1f}")


if __name__ == "__main__":
    main()
