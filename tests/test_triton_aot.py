"""Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, under the installed Triton and
the one in the folder that FASTMETA_TEST_TRITON names: how they are weighed, and what the worker's
own may cost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_aot import ARCHS, Row, compiled, over_budget
from triton_budgets import budgets

if "triton" not in os.environ.get("FASTMETA_TEST_IMPLS", ""):
    pytest.importorskip("triton")

OTHER = os.environ.get("FASTMETA_TEST_TRITON")
TRITONS = [None] + ([os.path.abspath(OTHER)] if OTHER else [])
HERE = Path(__file__).parent

# Kernels whose machine code is known beforehand, as far as the tests look at it.
KERNELS = '''
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass
class Launch:
    kernel: object
    args: dict
    consts: dict
    warps: int = 4
    stages: int = 1


@triton.jit
def product(a, b, c, n, one, big, offset, KIND: tl.constexpr, SIZE: tl.constexpr):
    """c = a b, 64 by 64 of bfloat16: tensor cores."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    if offset is None:
        at += n * one
    p = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(c + at + big, p.to(KIND))


@triton.jit
def spilling(x, y, SIZE: tl.constexpr):
    """512 values a thread that all live until their sum is known: twice the registers there are."""
    i = tl.arange(0, SIZE)
    v = tl.load(x + i)
    tl.store(y + i, v * tl.sum(v, 0))


@triton.jit
def wide(x, y, REAL: tl.constexpr):
    i = tl.arange(0, 32)
    v = tl.load(x + i).to(REAL)
    tl.store(y + i, (v * v + v).to(tl.float32))


@triton.jit
def mistyped(x, y):
    tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 64)))


class Trap:
    def __lt__(self, other):
        os.abort()


@triton.jit
def crashing(x, TRAP: tl.constexpr):
    if TRAP < 1:
        tl.store(x, 1.0)


@triton.jit
def endless(x):
    v = tl.load(x)
    for i in tl.static_range(1000000):
        v = v * i + 1
    tl.store(x, v)


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def a_product(offset=None, first=0):
    a = tensor(64 * 64 + 16, dtype=torch.bfloat16)[first:]
    b, c = tensor(64, 64, dtype=torch.bfloat16), tensor(64, 64, dtype=torch.float16)
    args = dict(a=a, b=b, c=c, n=48, one=1, big=2**31, offset=offset)
    return Launch(product, args, dict(KIND=tl.float16, SIZE=64))


def good():
    spill = Launch(spilling, dict(x=tensor(16384), y=tensor(16384)), dict(SIZE=16384), warps=1)
    x = dict(x=tensor(32), y=tensor(32))
    plain, double = (Launch(wide, x, dict(REAL=real)) for real in (tl.float32, tl.float64))
    return {
        "one": [a_product(), a_product(), spill],
        "two": [a_product()],
        "askew": [a_product(first=1)],
        "float": [plain],
        "double": [double],
    }


def bad():
    x, y = tensor(64), tensor(64)
    return {
        "mistyped": [Launch(mistyped, dict(x=x, y=y), {})],
        "misnamed": [Launch(mistyped, dict(x=x, y=y, z=y), {})],
        "crashing": [Launch(crashing, dict(x=x), dict(TRAP=Trap()))],
        "endless": [Launch(endless, dict(x=x), {})],
        "fine": [a_product()],
    }


def nothing():
    return {"empty": []}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("aot")
    (path / "aot_kernels.py").write_text(KERNELS)
    return path


@pytest.fixture(scope="module", params=TRITONS, ids=lambda path: Path(path or "installed").name)
def good(request, folder) -> tuple[str | None, list[Row]]:
    """A Triton, and the rows of the kernels that compile, under it and with an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / f"cache{TRITONS.index(request.param)}"))
        patch.setenv("TRITON_INTERPRET", "1")  # the script takes no notice
        return request.param, compiled(
            "aot_kernels:good", triton_path=request.param, paths=[folder]
        )


def pick(rows: list[Row], label: str, kernel: str, arch: int) -> Row:
    (row,) = (r for r in rows if (r["label"], r["kernel"], r["arch"]) == (label, kernel, arch))
    return row


def test_rows_are_one_for_each_label_launch_and_arch(good):
    path, rows = good
    expected = [("one", "product"), ("one", "spilling"), ("two", "product"), ("askew", "product")]
    expected += [("float", "wide"), ("double", "wide")]
    assert sorted((r["label"], r["kernel"], r["arch"]) for r in rows) == sorted(
        (*pair, arch) for pair in expected for arch in ARCHS
    )
    assert all(r["error"] is None and not r["slow"] and r["seconds"] > 0 for r in rows)
    without = {r["arch"]: {**r, "label": ""} for r in rows if r["label"] == "two"}
    for arch in ARCHS:  # compiled once: the very same seconds
        assert {**pick(rows, "one", "product", arch), "label": ""} == without[arch]
    (version,) = {r["triton"] for r in rows}
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__, triton.__file__)"],
        env={**os.environ, "PYTHONPATH": path or ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(f"{version} {path or ''}")


def test_launches_are_specialised_as_by_the_jit(good):
    assert pick(good[1], "one", "product", 90)["signature"] == {
        "a": "*bf16/16",
        "b": "*bf16/16",
        "c": "*fp16/16",
        "n": "i32/16",
        "one": "=1",
        "big": "i64/16",
        "offset": "=None",
        "KIND": "=fp16",
        "SIZE": "=64",
    }
    assert pick(good[1], "askew", "product", 90)["signature"]["a"] == "*bf16"


def test_tensor_cores_are_counted(good):
    on80, on90, on100 = (pick(good[1], "one", "product", arch) for arch in ARCHS)
    # 64×64×64 by 4 warps: 16×8×16 a step is 32 steps a warp; 64×64×16 is 4 steps for all.
    assert (on80["HMMA"], on80["HGMMA"], on80["UTCMMA"]) == (32, 0, 0) and on80["LDSM"] > 0
    assert (on90["HMMA"], on90["HGMMA"], on90["UTCMMA"]) == (0, 4, 0)
    assert (on100["HMMA"], on100["HGMMA"], on100["UTCMMA"]) == (0, 0, 4)
    assert on100["tmem"] == 64 and on80["tmem"] == on90["tmem"] == 0
    for row in (on80, on90, on100):
        assert row["stack"] == row["LDL"] == row["STL"] == row["F64"] == 0
        # at least one operand lies in shared memory, two bytes each
        assert row["shared"] >= 2 * 64 * 64 and 32 < row["registers"] <= 255
        assert row["instructions"] > 100
    # what is not known to be aligned is loaded value by value
    assert pick(good[1], "askew", "product", 90)["LDG"] > on90["LDG"]


def test_what_spills_is_seen(good):
    for arch in ARCHS:
        row = pick(good[1], "one", "spilling", arch)
        # 512 values, at most 255 registers, 4 bytes each
        assert row["stack"] >= 4 * (512 - 255) and row["LDL"] > 0 and row["STL"] > 0


def test_double_arithmetic_is_seen(good):
    for arch in ARCHS:
        assert pick(good[1], "float", "wide", arch)["F64"] == 0
        assert pick(good[1], "double", "wide", arch)["F64"] > 0


def test_a_second_run_reads_the_first_ones_rows(good, folder, monkeypatch):
    path, rows = good
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / f"cache{TRITONS.index(path)}"))
    again = compiled("aot_kernels:good", [90], path, paths=[folder], only="[ot]*")
    expected = [r for r in rows if r["arch"] == 90 and r["label"] in ("one", "two")]
    assert sorted(again, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("path", TRITONS, ids=lambda path: Path(path or "installed").name)
def test_failures_are_rows(path, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = compiled("aot_kernels:bad", [80], path, paths=[folder], limit=2, jobs=2)
    rows = {row["label"]: row for row in rows}
    assert len(rows) == 5
    assert "CompilationError" in rows["mistyped"]["error"]
    assert rows["misnamed"]["error"] == "TypeError: mistyped has no arguments z"
    assert "SIGABRT" in rows["crashing"]["error"]
    assert rows["endless"]["slow"] and "limit 2 s" in rows["endless"]["error"]
    assert rows["fine"]["error"] is None and rows["fine"]["HMMA"] == 32
    assert [row for row in rows.values() if row["slow"]] == [rows["endless"]]
    lines = over_budget(rows.values(), {("*", "product", 80): {}})
    assert len(lines) == 4 and all("on sm_80" in line for line in lines)


def test_cases_that_cannot_be_had_raise(folder):
    with pytest.raises(RuntimeError, match="No module named 'aot_absent'"):
        compiled("aot_absent:good", paths=[folder])
    with pytest.raises(RuntimeError, match=f"no triton in {folder}"):
        compiled("aot_kernels:good", triton_path=folder, paths=[folder])
    with pytest.raises(RuntimeError, match="empty: no launches"):
        compiled("aot_kernels:nothing", paths=[folder])
    with pytest.raises(RuntimeError, match="no launches under labels like 'absent'"):
        compiled("aot_kernels:good", paths=[folder], only="absent")


def row(**changes) -> Row:
    made = dict(label="grad H64", kernel="k", arch=90, triton="3.9.0", error=None, slow=False)
    made |= dict(seconds=2.0, registers=200, stack=0, shared=1000, tmem=0, HGMMA=8)
    return made | changes


def test_budgets():
    budgets = {
        ("grad H64", "k", 90): dict(registers=200, stack=64, at_least=dict(HGMMA=8)),
        ("grad *", "k", 90): dict(registers=128, stack=0, shared=999, seconds=1.5),
    }
    at = "k on sm_90 (triton 3.9.0)"
    assert over_budget([row(), row(stack=64)], budgets) == []
    assert over_budget([row(stack=68, HGMMA=7)], budgets) == [
        f"grad H64: {at}: stack 68, budget 64",
        f"grad H64: {at}: HGMMA 7, at least 8 expected",
    ]
    assert over_budget([row(label="grad H32")], budgets) == [
        f"grad H32: {at}: registers 200, budget 128",
        f"grad H32: {at}: shared 1000, budget 999",
        f"grad H32: {at}: seconds 2.0, budget 1.5",
    ]
    others = [row(label="forward"), row(kernel="other"), row(arch=100)]
    assert [line.split(": ")[-1] for line in over_budget(others, budgets)] == [
        "no budget for it"
    ] * 3
    with pytest.raises(KeyError, match="registres"):
        over_budget([row()], {("*", "k", 90): dict(registres=1)})


def test_what_no_gpu_could_run_is_over_any_budget():
    budgets = {("*", "k", arch): {} for arch in (80, 90, 100)}
    assert over_budget([row(shared=232448), row(arch=80, shared=166912)], budgets) == []
    assert over_budget([row(shared=232449), row(arch=100, tmem=513)], budgets) == [
        "grad H64: k on sm_90 (triton 3.9.0): 232449 bytes of shared memory, a block has 232448",
        "grad H64: k on sm_100 (triton 3.9.0): 513 columns of tensor memory, a block has 512",
    ]


# The worker's own kernels ---

# One pass of each family, and what each architecture does differently; the rest is slow.
FEW = [
    (90, "siren H64 bf16 plain"),
    (90, "siren H256 bf16 plain"),
    (80, "siren H128 bf16 hvp"),
    (100, "siren H256 fp32 points"),
]


def within_budget(path, arch, pattern, **options):
    rows = compiled(
        f"triton_cases:sm{arch}", [arch], path, paths=[HERE, HERE.parent], only=pattern, **options
    )
    assert over_budget(rows, budgets(old=path is not None)) == []


@pytest.fixture(
    params=TRITONS if OTHER else [None, ""],
    ids=lambda p: Path(p or "installed").name if p != "" else "other",
)
def some_triton(request):
    if request.param == "":
        pytest.skip("FASTMETA_TEST_TRITON names no folder with another Triton")
    return request.param


@pytest.mark.parametrize(("arch", "pattern"), FEW)
def test_kernels_keep_their_budgets(some_triton, arch, pattern):
    within_budget(some_triton, arch, pattern)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_keeps_its_budget(some_triton, arch):
    within_budget(some_triton, arch, "*", limit=60.0)
