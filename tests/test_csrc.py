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


KERNEL = """
#include "math/activation.h"
#include "math/composite.h"
#include "math/loss.h"
#include "math/philox.h"
#include "math/project.h"
#include "math/rules.h"
namespace fastmeta {
__global__ void all(float* x, Rule rule, const int32_t* pixels) {
  const int i = threadIdx.x;
  Dual<float> z{x[i], x[i + 32]}, h, slope, ell_slope;
  with_activation(hidden_twin(Output::k_tanh), 
                  [&](auto tag) { activate<decltype(tag)::kValue>(z, 30.0f, h, slope); });
  activate<Activation::k_gelu>(h, 1.0f, h, slope);
  float ell, s0 = 0, s1 = 0, mask;
  loss_terms(Loss::k_l1, 0.1f, h, x[i], ell, ell_slope);
  Dual<float> e, alpha, f, G{0, 0};
  interval_terms(h, slope, e, alpha, f, mask);
  const Dual<float> k = march_back(G, ell_slope, alpha, f, mask);
  const RuleAt<float> r = rule_at<float>(rule, 2);
  const float u = rule_step(r, x[i], k.a, s0, s1);
  x[i] = u + k.d + rule_adjoint(r, u, k.d, s0, s1, x[0], x[1]) + draw_uniform(3, i, 0, kJitter);
  project_angle(x, pixels, 4, x + 64);
  project_angle_adjoint(x, pixels, 4, 0, 16, x + 128);
}
}
"""


def test_the_mathematics_compiles_for_the_device(tmp_path):
    """Every header of csrc/math in one CUDA kernel, on plain and dual numbers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert "cuda" not in os.environ.get("FASTMETA_TEST_IMPLS", ""), "nvcc is needed"
        pytest.skip("no nvcc")
    (tmp_path / "all.cu").write_text(KERNEL)
    command = [nvcc, "-std=c++17", "-arch=sm_90", f"-I{CSRC}", "-c", "all.cu", "-o", "all.o"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
