"""MAML over pictures with torch.func: grad in the inner loop, vmap over tasks, functional_call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from examples.shared import Siren, outcome, pictures


def main(
    outer_steps: int = 3, tasks: int = 16, side: int = 32, net: nn.Module | None = None
) -> dict[str, Tensor]:
    x, y = pictures(tasks, side)  # [1,N,2], [T,N,3]
    torch.manual_seed(0)
    net = Siren() if net is None else net
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def task_loss(params: dict[str, Tensor], target: Tensor) -> Tensor:
        def loss(p: dict[str, Tensor]) -> Tensor:
            return F.mse_loss(functional_call(net, p, (x,)), target)

        for _ in range(5):
            grads = grad(loss)(params)
            params = {name: p - 1e-2 * grads[name] for name, p in params.items()}
        return loss(params)

    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        params = dict(net.named_parameters())
        loss = vmap(task_loss, (None, 0))(params, y[:, None]).mean()  # a target is [1,N,3]
        loss.backward()
        outer.step()
        losses.append(loss.item())
    return outcome(losses, net.parameters())


if __name__ == "__main__":
    print(main()["losses"])
