"""benchmarks/gpu.sh and what it runs, without a GPU: stages, limits, rows, floors."""

import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAGES = ["0_env", "1_warm", "2_tests", "3_sanitizer", "4_bench"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def run(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"SCRATCH": str(out / "scratch"), "FASTMETA_COMMIT": "abc1234"} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("gpu")
    return run(out, "--dry"), out


def rows(out: Path) -> list[dict]:
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_stage_ends_well_and_leaves_its_log(dry):
    done, out = dry
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-len(STAGES) - 1 :]
    for name, line in zip(STAGES, summary, strict=False):
        assert line.split()[0] == name and line.split()[1] in ("ok", "skipped"), line
        assert (out / f"{name}.log").stat().st_size > 0
    # at most eight files, so that all of them come back from a machine that is lent
    assert len([path for path in out.iterdir() if path.is_file()]) <= 8
    log = (out / "0_env.log").read_text()
    assert f"torch {torch.__version__}" in log and "reference runs" in log


def test_rows_are_those_of_the_results_file_and_the_table_shows_them(dry, gpu):
    _, out = dry
    found = rows(out)
    head = (ROOT / "benchmarks" / "results.csv").read_text().splitlines()[0].split(",")
    assert list(found[0]) == [*head, *gpu.EXTRA]
    wanted = {(c.workload.name, f"{c.what} fp32") for c in gpu.contests()}
    assert {(r["workload"], r["what"]) for r in found if r["who"] == "fastmeta"} == wanted
    assert {r["who"] for r in found} == {"fastmeta", "loop", "vmap", "bmm"}
    for r in found:
        assert r["commit"] == "abc1234" and r["torch"] == torch.__version__ and r["device"]
        assert float(r["median_ms"]) > 0 and float(r["error"]) < 1e-3
        of_floor = float(r["floor_ms"]) / float(r["median_ms"])
        assert math.isclose(of_floor, float(r["of_floor"]), rel_tol=0.05, abs_tol=2e-3)
        if r["who"] == "fastmeta":
            assert float(r["ratio"]) == 1
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(found)
    assert all(r["median_ms"] in line for r, line in zip(found, table[2:], strict=True))


def test_a_cut_keeps_what_was_done_and_is_named(tmp_path):
    start = time.monotonic()
    done = run(tmp_path, "--dry", LIMIT="0")
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    failed = done.stdout.splitlines()[-1]
    assert failed.startswith("failed: ") and "2_tests" in failed and "4_bench" in failed
    assert "no table" in done.stdout and "cut" in done.stdout
    assert "no time left" in (tmp_path / "4_bench.log").read_text()


def test_unknown_arguments_are_refused(tmp_path):
    done = run(tmp_path / "never", "--fast")
    assert done.returncode == 2 and "--fast; accepted are --dry, triton, cuda" in done.stderr
    assert not (tmp_path / "never").exists()


def test_without_a_gpu_the_benchmark_says_so(gpu, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device; --dry"):
        gpu.main()


# --- floors, against numbers worked out by hand for one H200


def h200(gpu):
    roofs = {"bf16": 790e3, "tf32": 400e3, "fp32": 67e3}
    return gpu.Machine("cuda", {}, roofs, 4.3e12, 16 * 132 * 1.98e9)


@pytest.mark.parametrize(
    "name, precision, microseconds",
    [
        ("images-T1-N31684:gradient", "bf16", 47.6),  # products: 37.6 GFLOP
        ("images-T1-N31684:gradient", "tf32", 94.0),
        ("images-T3-N31684:gradient", "fp32", 1683.0),
        ("images-T3-N31684:gradient", "bf16", 142.7),
        ("shapenet-T1-N16384:gradient", "bf16", 35.3),
        ("ct-pixels-T1-N65536:gradient", "bf16", 141.6),
        ("small-siren64-T1024-N1024:gradient", "bf16", 96.2),  # sines: 2 · 2²⁰ · 192
        ("small-siren64-T1024-N1024:adapt K=5", "bf16", 481.0),
        ("width16-T3-N31684:gradient", "bf16", 2.9),
    ],
)
def test_floors(gpu, name, precision, microseconds):
    (contest,) = [c for c in gpu.contests() if str(c) == name and precision in c.precisions]
    floor = gpu.floor(contest, h200(gpu), precision) * 1e6
    assert math.isclose(floor, microseconds, rel_tol=0.02), floor


# --- races


def small_race(gpu, **changes):
    (contest,) = [c for c in gpu.contests() if str(c) == "images-T3-N31684:maml K=2"]
    contest = gpu.shrunk(contest)
    return gpu.Race(contest, gpu.machine("cpu"), "reference", time.monotonic() + 60, **changes)


def test_a_competitor_that_fails_is_left_out_and_said(gpu, monkeypatch, capsys):
    make = gpu.competitor

    def broken(contest, problem, who, precision):
        if who == "bmm":
            raise RuntimeError("no memory")
        function = make(contest, problem, who, precision)
        return lambda: [2 * part for part in function()]  # wrong

    monkeypatch.setattr(gpu, "competitor", broken)
    found = small_race(gpu).run("fp32")
    assert [r["who"] for r in found] == ["fastmeta"]
    said = capsys.readouterr().out
    assert "maml K=2 fp32 bmm: RuntimeError: no memory" in said
    assert "vmap: ValueError: relative error 1.0e+00" in said


def test_a_competitor_that_takes_too_long_is_left_out(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SLOWEST", 0.5)
    monkeypatch.setattr(gpu, "competitor", lambda *_: time.sleep(30))
    start = time.monotonic()
    found = small_race(gpu).run("fp32")
    assert time.monotonic() - start < 20 and [r["who"] for r in found] == ["fastmeta"]
    assert capsys.readouterr().out.count("OutOfTime: more than 0 s") == len(
        gpu.shrunk(gpu.contests()[3]).who
    )


def test_arithmetic_is_put_back(gpu):
    before = torch.get_float32_matmul_precision()
    a, b = torch.rand(8, 8), torch.rand(8, 8)
    with gpu.arithmetic("tf32", "cpu"):
        assert torch.get_float32_matmul_precision() == "high" and (a @ b).dtype == torch.float32
    with gpu.arithmetic("bf16", "cpu"):
        assert (a @ b).dtype == torch.bfloat16
    assert torch.get_float32_matmul_precision() == before and (a @ b).dtype == torch.float32
