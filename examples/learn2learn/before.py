"""MAML over pictures with learn2learn: T clones one after the other, five steps of adapt each."""

from __future__ import annotations

import learn2learn as l2l
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
    maml = l2l.algorithms.MAML(net, lr=1e-2)
    outer = torch.optim.Adam(maml.parameters(), lr=1e-4)
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        total = 0.0
        for target in y.split(1):  # [1,N,3]
            learner = maml.clone()
            for _ in range(5):
                learner.adapt(F.mse_loss(learner(x), target))
            loss = F.mse_loss(learner(x), target) / tasks
            loss.backward()
            total += loss.item()
        outer.step()
        losses.append(total)
    return outcome(losses, maml.parameters())


if __name__ == "__main__":
    print(main()["losses"])
