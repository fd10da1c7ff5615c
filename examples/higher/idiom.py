"""The same in higher's words, all tasks at once: ``fm.compat.innerloop``. torch's graph is kept."""

from __future__ import annotations

import torch
from torch import Tensor

import fastmeta as fm
from examples.shared import Siren, outcome, pictures


def main(outer_steps: int = 3, tasks: int = 16, side: int = 32) -> dict[str, Tensor]:
    x, y = pictures(tasks, side)  # [1,N,2], [T,N,3]
    torch.manual_seed(0)
    spec, start = fm.convert.from_state_dict(Siren().state_dict(), "gradncp")
    net = fm.nn.BatchedMLP(spec, 1, init=start)
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        with fm.compat.innerloop(net, tasks, lr=1e-2) as task:
            for _ in range(5):
                task.step((task(x) - y).square().mean((1, 2)))  # one loss a task, [T]
            loss = (task(x) - y).square().mean()
            loss.backward()
        outer.step()
        losses.append(loss.item())
    return outcome(losses, net.parameters())


if __name__ == "__main__":
    print(main()["losses"])
