"""The same from the same file, without JAX: ``fm.load_learnit``, fm.MAML, fm.adapt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import fastmeta as fm
from examples.shared import outcome, pictures


def main(
    path: str | Path = "start.pkl", outer_steps: int = 3, tasks: int = 16, side: int = 32
) -> dict[str, Tensor]:
    net, start = fm.load_learnit(path)
    x, y = pictures(tasks, side, net.coords)  # [1,N,2], [T,N,3]
    maml = fm.MAML(net, inner_steps=2, inner_lr=1e-2, init=start)
    outer = torch.optim.Adam(maml.parameters(), lr=1e-4)
    batch = fm.Batch(x[0], y)
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        loss = maml(batch)
        loss.backward()
        outer.step()
        losses.append(loss.item())
    fit = fm.adapt(net, maml.init.detach(), fm.Batch(x, y[:1]), steps=3, lr=1e-2)
    return {**outcome(losses, maml.parameters()), "fit": fit.losses[:, 0]}


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    print(result["losses"], result["fit"])
