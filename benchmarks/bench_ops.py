"""Forward passes and gradients of every workload, and compositing and projection by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import competitors
import pytest
import torch
from torch import Tensor
from workloads import ALL, Cost

import fastmeta as fm


@pytest.mark.parametrize("kind", ["forward", "gradient"])
@pytest.mark.parametrize("workload", ALL, ids=str)
def test_network(contest, workload, kind):
    contest(workload, kind)


def compete(race, workload: str, kind: str, x: Tensor, cost: Cost, ours: Callable, plain: Callable):
    """ours(x, impl) against plain(x), eager and compiled: the value, or the gradient in x of a
    weighted sum of it."""
    torch.compiler.reset()
    weights = torch.rand(plain(x).shape, generator=torch.Generator().manual_seed(1))

    def entry(function: Callable, x: Tensor) -> Callable:
        if kind == "forward":
            return lambda: torch.no_grad()(function)(x)
        leaf, w = x.clone().requires_grad_(), weights.to(x.dtype)
        return lambda: torch.autograd.grad((function(leaf) * w).sum(), leaf)[0]

    entries = {"fastmeta": entry(lambda x: ours(x, None), x), "torch": entry(plain, x)}
    if "compiled" not in competitors.left_out():
        entries["compiled"] = entry(torch.compile(plain, dynamic=False), x)
    exact, near = (entry(lambda x: ours(x, "reference"), v) for v in (x.double(), x))
    race(workload, kind, entries, cost, competitors.Truth(exact, near).check)


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_composite(race, kind):
    """1024 rays of 128 samples. Counted: about 30 FLOPs a sample each way; raw read (and its
    gradient written)."""
    R, S, march = 1024, 128, fm.March(128)
    raw = torch.randn(R, S, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(2, 6, S)
    ways = 1 if kind == "forward" else 2
    cost = Cost(30e-9 * ways * R * S, 4e-6 * (4 * ways * R * S + R * S + 3 * R))

    def ours(raw: Tensor, impl: str | None) -> Tensor:
        return fm.composite(raw, t.to(raw).expand(R, S), march, impl=impl)[0]

    def plain(raw: Tensor) -> Tensor:
        return competitors.composite(competitors.STACKED, raw, t.to(raw).expand(R, S), march)

    compete(race, f"composite-R{R}-S{S}", kind, raw, cost, ours, plain)


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_project(race, kind):
    """Four angles of a 256 × 256 image; one addition a sample each way. ``fm.project`` finds the
    pixels of its angles at every call, torch has them given."""
    W, A = 256, 4
    image = torch.rand(1, W, W, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(A)[None] * (math.pi / A) + 0.1
    index = competitors.gather_index(fm.Project(angles), W)
    ways = 1 if kind == "forward" else 2
    cost = Cost(1e-9 * ways * A * W * W, 4e-6 * (W * W + A * W))

    def ours(image: Tensor, impl: str | None) -> Tensor:
        return fm.project(image, angles, impl=impl)

    def plain(image: Tensor) -> Tensor:
        return competitors.project(competitors.STACKED, image.flatten(1), index, A)

    compete(race, f"project-A{A}-W{W}", kind, image, cost, ours, plain)
