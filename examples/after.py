"""What takes the place of higher/, learn2learn/, metasdf/ and torch_func/before.py: the inner loop
of all tasks is one call of fm.MAML."""

from __future__ import annotations

import torch
from torch import Tensor

import fastmeta as fm
from examples.shared import Siren, outcome, pictures


def main(
    outer_steps: int = 3, tasks: int = 16, side: int = 32, max_memory: int | None = None
) -> dict[str, Tensor]:
    x, y = pictures(tasks, side)  # [1,N,2], [T,N,3]
    torch.manual_seed(0)
    spec, start = fm.convert.from_state_dict(Siren().state_dict(), "gradncp")
    maml = fm.MAML(spec, inner_steps=5, inner_lr=1e-2, init=start, max_memory=max_memory)
    outer = torch.optim.Adam(maml.parameters(), lr=1e-4)
    batch = fm.Batch(x[0], y)
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        loss = maml(batch)
        loss.backward()
        outer.step()
        losses.append(loss.item())
    return outcome(losses, maml.parameters())


if __name__ == "__main__":
    print(main()["losses"])
