"""The C++ headers against their Python twins, compiled with the machine's own compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmeta import rng
from fastmeta.spec import ACTIVATIONS

CSRC = Path(__file__).parents[1] / "csrc"
PROGRAM = r"""
#include <cstdio>
#include "abi.h"
#include "math/philox.h"
using namespace fastmeta;
int main() {
  const long long seeds[] = {0, 1, -1, 4611686018427400249LL};
  for (long long seed : seeds)
    for (unsigned i = 0; i < 5; ++i)
      std::printf("%u %.9g\n", draw_integer(seed, i, 3, kPoints, 1000),
                  draw_uniform(seed, i, 5, kJitter));
  std::printf("%d\n", static_cast<int>(Activation::k_none));
}
"""


def test_draws_are_the_same_in_cpp(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        if "cpu" in os.environ.get("FASTMETA_TEST_IMPLS", ""):
            pytest.fail("FASTMETA_TEST_IMPLS names cpu, and there is no C++ compiler")
        pytest.skip("no C++ compiler (set CXX)")
    (tmp_path / "draws.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run([*command, "draws.cpp", "-o", "draws"], check=True, cwd=tmp_path, timeout=120)
    out = subprocess.run(
        [tmp_path / "draws"], check=True, capture_output=True, text=True
    ).stdout.split()
    seed = torch.tensor([0, 1, -1, 2**62 + 12345])
    integers = rng.integers(seed, 5, 1000, 3, rng.POINTS).flatten().tolist()
    floats = rng.uniform(seed, 5, 5, rng.JITTER).flatten()
    assert [int(v) for v in out[:-1:2]] == integers
    assert torch.equal(torch.tensor([float(v) for v in out[1:-1:2]]), floats)
    assert int(out[-1]) == ACTIVATIONS.index("none")
