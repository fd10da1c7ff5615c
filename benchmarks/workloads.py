"""The workloads of the benchmarks as frozen data, their tensors, and how much each must compute and
move.

A workload is T networks of one shape at N points (R rays of S samples for radiance fields) with a
mean squared error on what is seen. All random numbers come from one seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import fastmeta as fm

LR = 1e-2  # of every inner step


@dataclass(frozen=True)
class Workload:
    """T networks at N points; R rays where ``samples`` is above 1, CT where ``angles`` is above
    0."""

    name: str
    net: fm.MLP
    tasks: int
    points: int
    samples: int = 1
    angles: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def side(self) -> int:
        """W of the W × W grid that the points are."""
        return math.isqrt(self.points)

    @property
    def seen(self) -> tuple[int, int, int]:
        """The shape of what is seen: [T,N,C], [T,R,3] or [T,A,W]."""
        if self.angles:
            return self.tasks, self.angles, self.side
        return self.tasks, self.points, 3 if self.samples > 1 else self.net.out_features


def _images() -> list[Workload]:
    net = fm.siren(2, 3, 256, 5, 200.0, output_shift=0.5)
    return [
        Workload(f"images-T{T}-N{N}", net, T, N) for T in (1, 3, 16) for N in (64 * 64, 178 * 178)
    ]


def small(kind: str, width: int, tasks: int, points: int) -> Workload:
    """2 -> width × 3 -> 3, a sine network (w0 = 30) or a ReLU one."""
    net = fm.siren(2, 3, width, 4, 30.0) if kind == "siren" else fm.MLP(2, 3, width, 4)
    return Workload(f"small-{kind}{width}-T{tasks}-N{points}", net, tasks, points)


def _ct() -> list[Workload]:
    plain = Workload("ct-pixels-N65536", fm.fourier_mlp(2, 1, 256, 5), 1, 256 * 256)
    return [plain, replace(plain, name="ct-project-N65536", angles=4)]


IMAGES = _images()
NERF = [Workload("nerf-R128-S128", fm.nerf_mlp(256, 6), 1, 128, samples=128)]
SMALL = [
    small(kind, width, T, N)
    for kind in ("siren", "relu")
    for width in (32, 64)
    for T, N in ((64, 1024), (512, 256))
]
CT = _ct()
ALL = [*IMAGES, *NERF, *SMALL, *CT]
# Meta-gradients: not every pair of T and N, which would take an hour.
META = [w for w in IMAGES if w.points == 4096 or w.tasks == 1] + SMALL


# Tensors ---


@dataclass(frozen=True, eq=False)
class Problem:
    """A workload with its tensors: params [T,P], whose first row is the start of inner loops;
    basis, (B, φ) of an encoding or nothing, for whoever encodes by himself."""

    workload: Workload
    batch: fm.Batch
    params: Tensor
    basis: tuple[Tensor, ...] = ()

    @property
    def init(self) -> Tensor:
        return self.params[0]

    def double(self) -> Problem:
        return replace(self, batch=self.batch.to(torch.float64), params=self.params.double())

    def to(self, device: str) -> Problem:
        moved = {"batch": self.batch.to(device), "params": self.params.to(device)}
        return replace(self, **moved, basis=tuple(b.to(device) for b in self.basis))

    def take(self, tasks: int) -> Problem:
        """The first tasks alone."""
        return replace(self, batch=self.batch.take(slice(tasks)), params=self.params[:tasks])


def problem(workload: Workload) -> Problem:
    """Coordinates, targets U[0,1) and starting weights; biases are put to the size of the weights,
    since a check on zero biases could not see a wrong one."""
    g = torch.Generator().manual_seed(0)
    params = workload.net.init(workload.tasks, generator=g)
    for weight, bias in workload.net.layers(params):
        bias.uniform_(-1, 1, generator=g).mul_(weight.abs().max())
    y = torch.rand(workload.seen, generator=g)
    if workload.samples > 1:
        batch = fm.Batch(_rays(workload, g), y, measure=fm.March(workload.samples))
    elif workload.angles:
        angles = torch.arange(workload.angles) * (math.pi / workload.angles) + 0.1
        batch = fm.Batch(_grid(workload.side), y, measure=fm.Project(angles[None]))
    elif workload.net.in_features == 2:
        batch = fm.Batch(_grid(workload.side), y)
    else:
        batch = fm.Batch(torch.rand(workload.points, workload.net.in_features, generator=g), y)
    encoding = workload.net.encoding
    return Problem(workload, batch, params, () if encoding is None else (encoding.B, encoding.phi))


def _grid(side: int) -> Tensor:
    u = torch.arange(side) / side
    return torch.cartesian_prod(u, u)  # [W·W,2]


def _rays(workload: Workload, g: torch.Generator) -> fm.Rays:
    """From a sphere of radius 4 to points around its centre, 2 <= t <= 6."""
    shape = (workload.tasks, workload.points, 3)
    origins = 4 * torch.nn.functional.normalize(torch.randn(shape, generator=g), dim=-1)
    to = 0.3 * torch.randn(shape, generator=g)
    return fm.Rays(origins, torch.nn.functional.normalize(to - origins, dim=-1), 2.0, 6.0)


# What must be computed and moved ---


class Cost(NamedTuple):
    gflop: float
    mbytes: float


def cost(workload: Workload, kind: str, steps: int = 2) -> Cost:
    """FLOPs and bytes of "forward", "gradient", "adapt" (K steps) or "maml" (K steps, order 2).

    FLOPs a point, products only: 2 Σ in·out forward; three times that for a gradient, less the
    first layer's way back to the coordinates, which nobody needs (4 in·out there instead of 6); K
    gradients for adapt. MAML is counted for an implementation that keeps activations between
    passes: K + 1 gradients of 3 units of 2 Σ in·out, and 6 units for each of the K Hessian-vector
    products (two each for the tangents of outputs, of weight gradients and of what goes back): 21
    units for K = 2, the first layer's savings ignored.

    Bytes are those that must move at least, each number once: parameters and coordinates read,
    targets read (forward: outputs written instead), gradients or θ_K written.
    """
    layers = [i * o for i, o in workload.net.sizes]
    points = workload.tasks * workload.points * workload.samples
    gradient = 6 * sum(layers) - 2 * layers[0]
    flops = {
        "forward": 2 * sum(layers),
        "gradient": gradient,
        "adapt": steps * gradient,
        "maml": (3 * (steps + 1) + 6 * steps) * 2 * sum(layers),
    }[kind]
    return Cost(flops * points / 1e9, 4e-6 * _numbers(workload, kind))


def _numbers(workload: Workload, kind: str) -> int:
    T, P = workload.tasks, workload.net.num_params
    weights = {"forward": T * P, "gradient": 2 * T * P, "adapt": P + T * P, "maml": 2 * P}[kind]
    rays = 6 * T * workload.points
    coordinates = rays if workload.samples > 1 else workload.net.in_features * workload.points
    return weights + coordinates + math.prod(workload.seen)
