"""A GPU worker's kernels once each on two small networks, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/smoke.py

Without torch's cache every tensor is an allocation of its own, so that a step over its end is seen;
CUDA graphs need the cache, so inner loops run launch by launch.
"""

from __future__ import annotations

import sys

import torch

import fastmeta as fm
from fastmeta.ops import dispatch
from fastmeta.rules import SGD, Adam


def main(impl: str) -> None:
    if impl == "triton":
        from fastmeta.triton import graph

        graph.capturable = lambda tensor: False
    g = torch.Generator().manual_seed(0)
    passes = dispatch.load(impl)[0].at("bf16")
    for net, N in ((fm.siren(2, 3, 32, 5, 30.0), 129), (fm.siren(2, 3, 128, 5, 30.0), 129)):
        T = 2
        p = net.init(T, generator=g).cuda()
        x, y = (torch.rand(T, N, n, generator=g).cuda() for n in (2, 3))
        batch = fm.Batch(x, y)
        lr = torch.full((1, 1, 1), 1e-3, device="cuda").expand(1, T, net.num_params)
        found = [
            passes.mlp(net, p, x),
            *passes.mlp_grad(net, p, x, y),
            *passes.mlp_dual(net, p, x, p, x, y),
            *passes.loss_hvp(net, p, p, batch),
            *passes.maml(net, p[:1], batch, lr, SGD(), order=2)[:2],
        ]
        torch.cuda.synchronize()
        assert all(bool(torch.isfinite(f).all()) for f in found)
    one = fm.siren(2, 3, 32, 4, 30.0)  # few tasks of many points: several blocks a task
    x, y = (torch.rand(1, 1500, n, generator=g).cuda() for n in (2, 3))
    lr = torch.full((1, 1, 1), 1e-3, device="cuda").expand(2, 1, one.num_params)
    passes.maml(one, one.init(1, generator=g).cuda(), fm.Batch(x, y), lr, Adam(), order=2)
    o, d = (torch.rand(2, 9, 3, generator=g).cuda() for _ in range(2))
    seed = torch.arange(2, device="cuda")
    more = {"measure": fm.March(40), "per_step": 5, "seed": seed}
    batch = fm.Batch(fm.Rays(o, d, 0.5, 2.5), torch.rand(2, 9, 3, generator=g).cuda(), **more)
    for field in (fm.MLP(3, 4, 32, 3, "tanh"), fm.nerf_mlp(32, 4, 6), fm.nerf_mlp(96, 4, 6)):
        p = field.init(2, generator=g).cuda()
        assert all(bool(torch.isfinite(f).all()) for f in passes.loss_hvp(field, p, p, batch))
    pixels = fm.Project(torch.rand(2, 3, generator=g)).pixels(17).cuda()
    image = torch.rand(2, 17, 17, generator=g).cuda()
    passes.project_adjoint(passes.project(image, pixels), pixels)
    torch.cuda.synchronize()
    print("smoke: every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "triton")
