"""Gradients and second-order meta-gradients of many small networks, against what a user would write
instead.

Each workload: FLOPs counted as autodiff needs them (6 Σ in·out a point for a gradient; 21 units of
2 Σ in·out for MAML with K = 2), bytes that must move at least (parameters read, gradients written,
coordinates and targets read).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmeta as fm

WORKLOADS = {
    "siren 2-256x4-3, T=1, N=4096": (fm.siren(2, 3, 256, 5, 200.0, output_shift=0.5), 1, 4096),
    "siren 2-128x4-3, T=3, N=4096": (fm.siren(2, 3, 128, 5, 100.0, output_shift=0.5), 3, 4096),
    "siren 2-32x3-3, T=64, N=1024": (fm.siren(2, 3, 32, 4, 30.0, output_shift=0.5), 64, 1024),
}


def stacked(net: fm.MLP, params: Tensor, x: Tensor) -> Tensor:
    """The hand-written baseline: one baddbmm a layer for all tasks."""
    h = x.expand(params.shape[0], -1, -1)
    layers = net.layers(params)
    for index, (weight, bias) in enumerate(layers):
        h = torch.baddbmm(bias[:, None], h, weight.mT)
        if index < len(layers) - 1:
            h = torch.sin(net.w0 * h)
    return h + net.output_shift


def one(net: fm.MLP, theta: Tensor, x: Tensor) -> Tensor:
    h = x
    layers = net.layers(theta)
    for index, (weight, bias) in enumerate(layers):
        h = torch.nn.functional.linear(h, weight, bias)
        if index < len(layers) - 1:
            h = torch.sin(net.w0 * h)
    return h + net.output_shift


def data(net: fm.MLP, T: int, N: int) -> tuple[fm.Batch, Tensor]:
    g = torch.Generator().manual_seed(0)
    batch = fm.Batch(torch.rand(N, 2, generator=g), torch.rand(T, N, 3, generator=g))
    return batch, net.init(T, generator=g)


@pytest.mark.parametrize("name", WORKLOADS)
def test_gradient(race, name):
    net, T, N = WORKLOADS[name]
    batch, params = data(net, T, N)

    def loop():
        grads = []
        for t in range(T):
            theta = params[t].detach().requires_grad_()
            loss = ((one(net, theta, batch.x) - batch.y[t]) ** 2).mean()
            grads.append(torch.autograd.grad(loss, theta)[0])
        return torch.stack(grads)

    def bmm():
        theta = params.detach().requires_grad_()
        loss = ((stacked(net, theta, batch.x) - batch.y) ** 2).mean((1, 2)).sum()
        return torch.autograd.grad(loss, theta)[0]

    vmapped = torch.func.vmap(
        torch.func.grad(lambda theta, y: ((one(net, theta, batch.x) - y) ** 2).mean())
    )
    entries = {
        "fastmeta": lambda: fm.loss_grad(net, params, batch)[1],
        "loop of modules": loop,
        "baddbmm autograd": bmm,
        "vmap(grad)": lambda: vmapped(params, batch.y),
    }
    truth = fm.loss_grad(net, params.double(), batch.to(torch.float64))[1]
    for who, function in entries.items():
        assert (function().double() - truth).norm() < 1e-4 * truth.norm(), who
    macs = sum(i * o for i, o in net.sizes) * N * T
    race(
        name,
        "gradient",
        entries,
        6 * macs / 1e9,
        4e-6 * (2 * params.numel() + batch.y.numel() + 2 * N),
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_meta_gradient(race, name):
    net, T, N = WORKLOADS[name]
    batch, params = data(net, T, N)
    maml = fm.MAML(net, 2, 1e-2, init=params[0])

    def ours():
        maml.init.grad = None
        maml(batch).backward()
        return maml.init.grad

    def bmm():
        init = params[0].detach().requires_grad_()
        theta = init.expand(T, -1)
        for _ in range(2):
            loss = ((stacked(net, theta, batch.x) - batch.y) ** 2).mean((1, 2)).sum()
            theta = theta - 1e-2 * torch.autograd.grad(loss, theta, create_graph=True)[0]
        loss = ((stacked(net, theta, batch.x) - batch.y) ** 2).mean((1, 2)).mean()
        return torch.autograd.grad(loss, init)[0]

    entries = {"fastmeta": ours, "baddbmm, create_graph": bmm}
    exact = fm.MAML(net, 2, 1e-2, init=params[0].double())
    exact(batch.to(torch.float64)).backward()
    for who, function in entries.items():
        assert (function().double() - exact.init.grad).norm() < 1e-3 * exact.init.grad.norm(), who
    macs = sum(i * o for i, o in net.sizes) * N * T
    race(
        name,
        "MAML K=2",
        entries,
        21 * 2 * macs / 1e9,
        4e-6 * (9 * params.numel() + batch.y.numel()),
        rounds=5,
    )
