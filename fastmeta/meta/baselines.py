"""The paper's starts to compare a learned one with: standard, mean, matched, shuffled.

Source: Tancik et al. 2021, section 4; the paper's code for them is not published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..ops.adapt import adapt
from ..rules import Rule
from ..spec import MLP


def standard(net: MLP, *, seed: int = 0) -> Tensor:
    """A random initialisation [P], ``net.init``."""
    return net.init(generator=torch.Generator().manual_seed(seed))[0]


def mean(
    net: MLP,
    batch: Batch,
    steps: int,
    lr: float,
    *,
    rule: str | Rule = "adam",
    seed: int = 0,
    impl: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """``mean_t θ_K`` [P]: the mean of weights fitted to each task of the batch on its own.

    All begin at one standard start: from different ones the hidden neurons would not correspond,
    and their mean would be close to nothing.
    """
    init = standard(net, seed=seed).to(batch.y)
    fitted = adapt(net, init, batch, steps, lr, rule=rule, impl=impl, precision=precision)
    return fitted.params.mean(0)


def matched(net: MLP, init: Tensor, *, seed: int = 0) -> Tensor:
    """Normal draws [P] with mean and standard deviation of each matrix and bias of ``init`` [P]."""
    generator = torch.Generator().manual_seed(seed)
    source = init.detach().cpu()
    drawn = torch.empty_like(source)
    for part, new in _parts(net, source, drawn):
        noise = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)
        new.copy_(part.mean() + part.std(correction=0) * noise)
    return drawn.to(init)


def shuffled(net: MLP, init: Tensor, *, seed: int = 0) -> Tensor:
    """``init`` [P] with the entries of each weight matrix and of each bias permuted."""
    generator = torch.Generator().manual_seed(seed)
    source = init.detach().cpu()
    drawn = torch.empty_like(source)
    for part, new in _parts(net, source, drawn):
        order = torch.randperm(part.numel(), generator=generator)
        new.copy_(part.reshape(-1)[order].view_as(part))
    return drawn.to(init)


def _parts(net: MLP, *params: Tensor) -> list[tuple[Tensor, ...]]:
    """The weight matrices and biases of several parameter sets, side by side."""
    return [
        parts
        for layers in zip(*map(net.layers, params), strict=True)
        for parts in zip(*layers, strict=True)
    ]
