"""What several test files share: networks and batches to test with, and an independent plain-torch
network."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

import fastmeta as fm
from fastmeta import reference
from fastmeta.spec import ACTIVATIONS

# The workers under test: those that FASTMETA_TEST_IMPLS names, else those that run here.
IMPLS = [name for name in os.environ.get("FASTMETA_TEST_IMPLS", "").split(",") if name] or [
    name for name, reason in fm.available().items() if reason is None
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform float64."""
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64) * (high - low) + low


def parameters(net: fm.MLP, tasks: int, seed: int = 0) -> Tensor:
    """[T,P] float64: the network's own start plus noise, so that no bias is zero."""
    noise = torch.randn(tasks, net.num_params, generator=generator(seed + 1), dtype=torch.float64)
    return net.init(tasks, generator=generator(seed)).double() + 0.02 * noise


def nets(inputs: int = 2, outputs: int = 3, width: int = 7, depth: int = 3) -> list[fm.MLP]:
    """One network for each activation, and others for each output, encoding and shift."""
    made = [
        fm.MLP(inputs, outputs, width, depth, name, **({"w0": 12.0} if name == "sine" else {}))
        for name in ACTIVATIONS
    ]
    made.append(fm.siren(inputs, outputs, width, depth, 5.0, 9.0, output_shift=0.5))
    made.append(fm.fourier_mlp(inputs, outputs, width, depth, features=5, scale=3.0))
    ladder = fm.Encoding.frequencies(inputs, 3, 2.0, pi=True, include_input=True)
    for output in ("relu", "tanh", "softplus"):
        made.append(fm.MLP(inputs, outputs, width, depth, "tanh", encoding=ladder, output=output))
    return made


def plain_mlp(net: fm.MLP, theta: Tensor, x: Tensor) -> Tensor:
    """y [N,C] of one parameter row at x [N,D], in torch's own functions, differentiable by autograd
    any times."""
    h = x
    if net.encoding is not None:
        features = torch.sin(x @ net.encoding.B.to(x) + net.encoding.phi.to(x))
        h = torch.cat([x, features], -1) if net.encoding.include_input else features
    at = 0
    functions = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
        "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
        "silu": lambda z: z * torch.sigmoid(z),
        "none": lambda z: z,
        "linear": lambda z: z,
    }
    for layer, (i, o) in enumerate(net.sizes):
        weight = theta[at : at + i * o].view(o, i)
        bias = theta[at + i * o : at + i * o + o]
        at += i * o + o
        z = h @ weight.T + bias
        if layer == len(net.sizes) - 1:
            h = functions[net.output](z)
        elif net.activation == "sine":
            h = torch.sin((net.w0_first if layer == 0 else net.w0) * z)
        else:
            h = functions[net.activation](z)
    return h + net.output_shift


def error(a: Tensor, b: Tensor) -> float:
    """``‖a − b‖ / ‖b‖``; NaN anywhere counts as infinite."""
    a, b = a.detach().double(), b.detach().double()
    if not torch.isfinite(a).all():
        return math.inf
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def cancelling(raw, t, march, vraw, vt, g) -> dict[int, float]:
    """How large the terms are that cancel in aċc (output 7), which is 0 where α_S = 1, and in t̄̇
    (output 9): ``Σ |ẇ|``, and the tangent of ``s T e w̄``, from which the later samples' part is
    taken."""
    b = reference.Dual(t, vt)
    *_, m = reference.composite_forward(reference.Dual(raw, vraw), b, march)
    gw = (g[0][..., None, :] * (m.colour - float(march.white_background))).sum(-1)
    gw = gw + g[1][..., None] * b + g[2][..., None]
    own = m.density * (m.T * m.e * gw)
    return {7: float(m.w.d.abs().sum(-1).norm()), 9: float(own.d[..., :-1].norm())}
