"""MAML over pictures with higher: T tasks one after the other, five differentiable steps each."""

from __future__ import annotations

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared import Siren, outcome, pictures


def main(
    outer_steps: int = 3, tasks: int = 16, side: int = 32, net: nn.Module | None = None
) -> dict[str, Tensor]:
    x, y = pictures(tasks, side)  # [1,N,2], [T,N,3]
    torch.manual_seed(0)
    net = Siren() if net is None else net
    inner = torch.optim.SGD(net.parameters(), lr=1e-2)
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        total = 0.0
        for target in y.split(1):  # [1,N,3]
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
                for _ in range(5):
                    diffopt.step(F.mse_loss(fnet(x), target))
                loss = F.mse_loss(fnet(x), target) / tasks
                loss.backward()
            total += loss.item()
        outer.step()
        losses.append(total)
    return outcome(losses, net.parameters())


if __name__ == "__main__":
    print(main()["losses"])
