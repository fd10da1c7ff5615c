"""What the examples start from: small pictures of text, a SIREN as people have one, and what a run
hands back."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastmeta.tasks import images
from fastmeta.tasks.text import text_images


def pictures(tasks: int, side: int, coords: str = "corners") -> tuple[Tensor, Tensor]:
    """x [1,N,2], the pixels' coordinates, and y [T,N,3], T pictures of side × side; put your own
    here."""
    kind = torch.get_default_dtype()
    y = torch.stack([text_images(tasks, size=side)[t].flatten(0, 1) for t in range(tasks)])
    return images.grid(side, side, coords)[None].to(kind), y.to(kind)


class Layer(nn.Module):
    """``sin(30 (W x + b))``; of the last layer ``W x + b + 0.5``."""

    def __init__(self, inputs: int, outputs: int, first: bool, last: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(inputs, outputs), last
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return z + 0.5 if self.last else torch.sin(30 * z)


class Siren(nn.Module):
    """2 -> width × (depth − 1) -> 3, with layers as GradNCP names them."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        sizes = [2, *[width] * (depth - 1), 3]
        self.layers = nn.ModuleList(
            Layer(i, o, n == 0, n == depth - 1)
            for n, (i, o) in enumerate(zip(sizes, sizes[1:], strict=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def outcome(losses: list[float], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """losses [S] of the outer steps, the last one's meta-gradient [P], the parameters after it
    [P]."""
    parameters = list(parameters)
    return {
        "losses": torch.tensor(losses),
        "gradient": torch.cat([p.grad.flatten() for p in parameters]),
        "params": torch.cat([p.detach().flatten() for p in parameters]),
    }
