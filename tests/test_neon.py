"""The NEON kernels, cross-compiled and run by an emulator: float against double, double against
central differences."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "-static"]


def test_gradients_on_neon(tmp_path):
    for tool in (CXX, QEMU):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (Debian: apt install g++-aarch64-linux-gnu qemu-user)")
    sources = [Path(__file__).with_name("neon_check.cpp"), CSRC / "cpu" / "isa_baseline.cpp"]
    program = tmp_path / "neon_check"
    subprocess.run([CXX, *FLAGS, *sources, "-o", program], check=True, timeout=200)
    run = [QEMU, program]
    out = subprocess.run(run, check=True, capture_output=True, text=True, timeout=200).stdout
    assert out.startswith("neon") and out.endswith("OK\n"), out
