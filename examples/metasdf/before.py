"""MAML over pictures as MetaSDF and GradNCP write it: the weights come with the call, stacked over
T tasks; gradients with create_graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared import Siren, outcome, pictures


class MetaSiren(Siren):
    """``forward(x, params)``, as torchmeta's modules: weights [T,out,in], biases [T,out]."""

    def meta_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.named_parameters()

    def forward(self, x: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        params = OrderedDict(self.meta_named_parameters()) if params is None else params
        for n, layer in enumerate(self.layers):
            weight, bias = (params[f"layers.{n}.linear.{part}"] for part in ("weight", "bias"))
            z = x.matmul(weight.transpose(-1, -2)) + bias.unsqueeze(-2)  # [T,N,out]
            x = z + 0.5 if layer.last else torch.sin(30 * z)
        return x


def main(
    outer_steps: int = 3, tasks: int = 16, side: int = 32, net: nn.Module | None = None
) -> dict[str, Tensor]:
    x, y = pictures(tasks, side)  # [1,N,2], [T,N,3]
    torch.manual_seed(0)
    net = MetaSiren() if net is None else net
    outer = torch.optim.Adam(net.parameters(), lr=1e-4)
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        params = OrderedDict(
            (name, p[None].repeat(tasks, *[1] * p.dim())) for name, p in net.meta_named_parameters()
        )
        for _ in range(5):
            loss = F.mse_loss(net(x, params=params), y) * tasks
            grads = torch.autograd.grad(loss, params.values(), create_graph=True)
            params = OrderedDict(
                (name, p - 1e-2 * g) for (name, p), g in zip(params.items(), grads, strict=True)
            )
        loss = F.mse_loss(net(x, params=params), y)
        loss.backward()
        outer.step()
        losses.append(loss.item())
    return outcome(losses, net.parameters())


if __name__ == "__main__":
    print(main()["losses"])
