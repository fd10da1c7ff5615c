"""Tables of docs/kernels.md: what the Triton kernels take of a multiprocessor of sm_90, compiled
ahead of time, and how long they should run on an H200, which nobody has measured.

    python benchmarks/kernel_table.py [--jobs 2]      writes docs/kernels_table.md; needs no GPU

A kernel's predicted time is the longest of

    products        FLOPs over the rate of their precision, padding counted
    memory          bytes that must pass through memory, each once
    cache           bytes that the tiles read again, from L2
    functions       sines and cosines of the special function units
    issue           instructions: of a resident kernel's loop as compiled, else of activations

and a pass's is their sum and LAUNCH for each launch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS, DOCS = HERE.parent / "tests", HERE.parent / "docs"
sys.path[:0] = [str(HERE), str(HERE.parent), str(TESTS)]

import gpu  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from workloads import Workload  # noqa: E402

from fastmeta import triton as worker  # noqa: E402
from fastmeta.rules import SGD  # noqa: E402
from fastmeta.triton import plan  # noqa: E402
from fastmeta.triton.launch import Launch, recording  # noqa: E402

# One H200: FLOP/s of dense products, bytes/s, sines/s, warp instructions/s (132 multiprocessors of
# 1.98 GHz, 16 sines and 4 instructions a clock). The rate of L2 is an assumption.
RATES = {"bf16": 790e12, "fp16": 790e12, "tf32": 400e12, "fp32": 400e12 / 3}
FMA, MEMORY, CACHE = 67e12, 4.3e12, 5.5e12
SINES, ISSUE = 132 * 16 * 1.98e9, 132 * 4 * 1.98e9
LAUNCH = 3e-6  # s between two kernels of one graph, about
EFFICIENCY = 0.6  # of the products' rate that a Triton kernel may reach: the second prediction
# Instructions of one activation beside its special functions: unpack, scale, round, pack.
VISIT, KEEP, POLYNOMIAL = 12, 12, 30


# What stands in the tables ---


def four() -> list[Workload]:
    names = ("images-T3-N31684", "shapenet-T1-N16384", "ct-pixels-T1-N65536")
    names = (*names, "small-siren64-T1024-N1024")
    found = {c.workload.name: c.workload for c in gpu.contests()}
    return [found[name] for name in names]


def cases() -> dict[str, list[Launch]]:
    """{label: launches} on sm_90: gradients, Hessian-vector products and steps of the four."""
    made = {}
    with plan.architecture_of(90):
        for w in four():
            made |= {f"{w.name} {mode}": launches(w, mode) for mode in ("bf16", "tf32", "fp32")}
    return made


def launches(w: Workload, mode: str) -> list[Launch]:
    problem, passes = workloads.problem(w), worker.at(mode)
    theta = torch.empty(w.tasks, w.net.num_params)
    rate = torch.full((1, 1, 1), 1e-2).expand(1, *theta.shape)
    with recording() as found:
        passes.maml(w.net, theta[:1], problem.batch, rate, SGD(), order=2)
    kept = {}
    for launch in found:
        kept.setdefault(
            (launch.kernel.__name__, str(sorted(launch.consts.items(), key=str))), launch
        )
    return list(kept.values())


# Terms ---


@dataclass
class Terms:
    """Seconds of each kind that a kernel needs."""

    products: float = 0.0
    memory: float = 0.0
    cache: float = 0.0
    functions: float = 0.0
    issue: float = 0.0

    @property
    def longest(self) -> str:
        return max((f.name for f in fields(self)), key=lambda name: getattr(self, name))

    def seconds(self, efficiency: float = 1.0) -> float:
        scaled = {"products": self.products / efficiency}
        return max(scaled.get(f.name, getattr(self, f.name)) for f in fields(self))


def streamed(c: plan.Constants, T: int, N: int, dual: bool, grad: bool) -> dict[str, Terms]:
    """The streamed network: ahead, back, weigh, and gather."""
    ahead, back = plan.stream_tiles(c, dual)
    net, WP, L = c.net, c.width, c.net.depth
    inner, CP, C, D = L - 2, plan.power(c.net.out_features, 16), net.out_features, net.in_features
    tiles = -(-N // ahead.points)
    points = T * tiles * ahead.points
    rate, opening, ways = RATES[c.mode], RATES[c.first], 3 if dual else 1
    real = torch.float32
    e, k = c.stored(real).itemsize, c.kept(real).itemsize
    value = k + (e if dual else 0)  # bytes of a kept unit
    slope = e * (2 if dual else 1)  # of a delta
    sine = net.activation == "sine" and c.mode != "fp32"
    both = 2 if dual else 1  # special functions of a visit
    weights = 2.0 * points * WP * WP * inner  # FLOPs of one product of all hidden layers
    last = 2.0 * points * WP * CP / RATES["fp32"]
    wide = (c.features, opening) if c.encoded else (D, FMA)
    first = 2.0 * points * wide[0] * WP / wide[1]
    streams = T * tiles * WP * WP * inner * e * both  # bytes of weights, once a tile

    def visits(units: float, functions: float, keep: float = 0.0) -> dict[str, float]:
        polynomial = net.activation == "sine" and not sine
        each = VISIT * both + (POLYNOMIAL if polynomial else 0)
        return {
            "functions": units * functions / SINES if sine else 0.0,
            "issue": (units * each + keep * (KEEP + (POLYNOMIAL if polynomial else 0)))
            / 32
            / ISSUE,
        }

    again, unit = WP // ahead.columns, float(points * WP)
    features = points * c.features * again * (POLYNOMIAL if c.encoded else 0) / 32 / ISSUE
    found = {
        "ahead": Terms(
            weights * ways / rate + last * ways + first * both,
            (unit * (L - 1) * value + points * 4 * (D + 2 * C * both)) / MEMORY,
            (streams + unit * inner * value * again) / CACHE,
            **visits(unit * (inner * again + 1), both, unit * (L - 1)),
        ),
        "back": Terms(
            weights * ways / rate + last * (6 if dual else 2),
            (
                unit * (L - 1) * value
                + unit * (L - 1 if c.encoded else inner) * slope
                + 4 * T * tiles * c.thin * both
            )
            / MEMORY,
            (streams + unit * inner * slope * (WP // back.columns)) / CACHE,
            **visits(unit * (L - 1), both),
        ),
    }
    found["ahead"].issue += features
    sums = ((1 if grad else 0) + 2) if dual else 1
    partial = 0
    for label, over, count, speed in (
        ("weigh", False, inner, rate),
        ("weigh, features", True, 1, opening),
    ):
        if over and not c.encoded:
            continue
        tile = plan.weigh_tile(c, over, dual, dual and grad)
        cols = c.features if over else WP
        blocks = T * count * (WP // tile.points) * (cols // tile.columns)
        splits = max(1, min(-(-2 * plan.PROGRAMS // blocks), -(-N // tile.depth) // 4))
        part = 4 * T * splits * count * WP * cols * (2 if dual and grad else 1)
        partial += part
        read = points * count * WP * slope * (cols // tile.columns)
        mine = 0 if over else unit * count * value
        found[label] = Terms(
            2.0 * points * WP * cols * count * (both if over else sums) / speed,
            (points * count * WP * slope + mine + part) / MEMORY,
            (read + mine * (WP // tile.points)) / CACHE,
            **visits(0 if over else unit * count * (WP // tile.points), both),
        )
        if over:
            heads = points * cols * (WP // tile.points)
            found[label].issue += heads * POLYNOMIAL / 32 / ISSUE
    P = net.num_params
    found["gather"] = Terms(memory=(partial + 4 * T * (tiles * c.thin * both + 3 * P)) / MEMORY)
    return found


def resident(
    c: plan.Constants, T: int, N: int, dual: bool, instructions: dict[bool, int]
) -> dict[str, Terms]:
    """The resident network: one launch, and gather. instructions: of its loop, plain and dual, from
    the machine code, which every warp of a tile runs through once."""
    tile = plan.resident_tile(c, dual)
    assert tile is not None
    net, WP, L = c.net, c.width, c.net.depth
    tiles = T * -(-N // tile.points)
    points, CP = tiles * tile.points, plan.power(net.out_features, 16)
    hidden = 2.0 * points * WP * WP * (L - 2) / RATES[c.mode]
    last = 2.0 * points * WP * CP / RATES["fp32"]
    sine = net.activation == "sine" and c.mode != "fp32"
    splits = max(1, min(-(-2 * plan.PROGRAMS // T), -(-N // tile.points)))
    P = net.num_params
    part = 4 * T * splits * (WP * WP * (L - 2) + c.thin)
    return {
        "resident": Terms(
            hidden * (8 if dual else 3) + last * (9 if dual else 3),
            (points * 4 * (net.in_features + net.out_features) + part + 4 * T * P) / MEMORY,
            0.0,
            points * WP * (L - 1) * (4 if dual else 2) / SINES if sine else 0.0,
            tiles * tile.warps * instructions[dual] / ISSUE,
        ),
        "gather": Terms(memory=(part + 4 * T * 3 * P) / MEMORY),
    }


def passes(w: Workload, mode: str, instructions: dict[bool, int]) -> dict[str, dict[str, Terms]]:
    """The kernels of a gradient and of a Hessian-vector product."""
    c = plan.Constants(w.net, mode)
    found = {}
    for name, dual in (("gradient", False), ("Hv", True)):
        if plan.resident_tile(c, dual) is None:
            found[name] = streamed(c, w.tasks, w.points, dual, not dual)
        else:
            found[name] = resident(c, w.tasks, w.points, dual, instructions)
    return found


# Launches beside the kernels above: operands made, the loss's sum, elementwise steps of the walk.
BESIDE = {"gradient": 2, "Hv": 5}


def predicted(made: dict[str, dict[str, Terms]], kind: str, efficiency: float) -> float:
    """Seconds of a pass, or of a meta-gradient of two steps: three gradients, two Hv."""
    if kind == "maml K=2":
        return 3 * predicted(made, "gradient", efficiency) + 2 * predicted(made, "Hv", efficiency)
    kernels = made[kind]
    launched = len(kernels) + BESIDE[kind]
    return sum(t.seconds(efficiency) for t in kernels.values()) + launched * LAUNCH


# Text ---


def shape(consts: dict[str, Any]) -> str:
    for names in (("BM", "BN", "BK"), ("BO", "BI", "BR"), ("RAYS", "WIDTH"), ("BP",), ("BM",)):
        if all(name in consts for name in names):
            return " × ".join(str(consts[name]) for name in names)
    return ""


def listed(label: str) -> bool:
    """Not every precision of every network: their kernels differ little."""
    return label.split("-")[0] in ("images", "small") or label.endswith("bf16")


def role(signature: dict[str, str]) -> str:
    """What a launch is besides its name."""
    said = []
    if signature.get("DUAL") == "=True":
        said.append("dual")
    if signature.get("FEATURES") == "=True":
        said.append("features")
    return ", ".join(said)


def budget(rows: list[dict]) -> Iterator[str]:
    head = ["network", "kernel", "tile", "warps", "registers", "stack", "shared", "tensor core"]
    yield "| " + " | ".join([*head, "instructions"]) + " |"
    yield "|---|---|---|" + "--:|" * 6
    seen = set()
    for r in sorted(rows, key=lambda r: (r["label"], r["kernel"], role(r["signature"]))):
        s = {n: v.removeprefix("=") for n, v in r["signature"].items()}
        name = " ".join(filter(None, [r["kernel"], f"({role(r['signature'])})"]))
        name = name.replace(" ()", "")
        cores = f"{r['HGMMA']} HGMMA" if r["HGMMA"] else f"{r['HMMA']} HMMA" if r["HMMA"] else ""
        line = [short(r["label"]), name, shape(s), r["warps"], r["registers"], r["stack"]]
        line += [f"{r['shared'] / 1024:.0f} KB", cores, r["instructions"]]
        shown = r["kernel"] in ("gather", "advance", "shade")
        shown = r["label"].startswith("images") if shown else listed(r["label"])
        text = "| " + " | ".join(map(str, line)) + " |"
        if shown and text not in seen:
            yield text
        seen.add(text)


def short(label: str) -> str:
    name, mode = label.split()
    return f"{name.split('-')[0]} {mode}"


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][A-Z0-9_.]*)(.*)", re.M)


def loop_instructions(launch: Launch) -> int:
    """Of the longest loop in a kernel's machine code: what a tile costs every warp."""
    import triton
    from triton_aot import _specialised

    job = _specialised(launch, 90)
    kernel = triton.compile(job.source, target=job.target, options=job.options)
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True)
    found = [(int(a, 16), op, rest) for a, _, op, rest in _SASS.findall(done.stdout)]
    spans = [
        (int(to[1], 16), at)
        for at, op, rest in found
        if op.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest))
    ]
    return max(
        (sum(to <= at <= end for at, _, _ in found) for to, end in spans if to < end), default=0
    )


def loops(made: dict[str, list[Launch]], label: str) -> dict[bool, int]:
    """Instructions of the resident kernels' loops, plain and dual."""
    found = {False: 0, True: 0}
    for launch in made[label]:
        if launch.kernel.__name__ == "resident":
            dual = bool(launch.consts["DUAL"])
            found[dual] = max(found[dual], loop_instructions(launch))
    return found


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.1f}"


def prediction() -> Iterator[str]:
    yield (
        "| workload | pass | precision | kernels, the longest term of each | predicted, µs | "
        "at 60 % of the products' rate | floor, µs |"
    )
    yield "|---|---|---|---|--:|--:|--:|"
    made_of = cases()
    h200 = gpu.Machine("cuda", {}, {m: r / 1e9 for m, r in RATES.items()}, MEMORY, SINES)
    h200.roofs["fp32"] = FMA / 1e9
    for w in four():
        for mode in ("bf16", "tf32", "fp32"):
            made = passes(w, mode, loops(made_of, f"{w.name} {mode}"))
            for kind in ("gradient", "Hv", "maml K=2"):
                kernels = made.get(kind, {})
                said = "; ".join(
                    f"{name} {microseconds(t.seconds())} ({t.longest})"
                    for name, t in kernels.items()
                )
                least = ""
                if kind != "Hv":
                    contest = gpu.Contest(w, kind.split()[0], 2 if "maml" in kind else 0)
                    least = microseconds(gpu.floor(contest, h200, mode))
                yield (
                    f"| {w.name} | {kind} | {mode} | {said or '3 gradients, 2 Hv'} | "
                    f"{microseconds(predicted(made, kind, 1.0))} | "
                    f"{microseconds(predicted(made, kind, EFFICIENCY))} | {least} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DOCS / "kernels_table.md")
    how = parser.parse_args()
    import triton_aot

    rows = triton_aot.compiled(
        "kernel_table:cases", [90], paths=[HERE, HERE.parent], jobs=how.jobs, limit=60
    )
    failed = [r for r in rows if r["error"]]
    for r in failed:
        print(f"{r['label']} {r['kernel']}: {r['error'][:300]}", file=sys.stderr)
    rows = [r for r in rows if not r["error"]]
    version = next(r["triton"] for r in rows)
    text = [f"**Budgets** (sm_90, triton {version}, ahead of time)", "", *budget(rows), ""]
    text += ["**Predicted times** (one H200; not measured)", "", *prediction(), ""]
    how.out.write_text("\n".join(text), encoding="utf-8")
    print(how.out)


if __name__ == "__main__":
    main()
