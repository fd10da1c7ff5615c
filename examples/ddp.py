"""fm.MAML over several processes: each has its part of the tasks, DistributedDataParallel averages
the meta-gradients.

    torchrun --nproc-per-node 2 -m examples.ddp [OUT]

Parts of equal size have the gradient of one process with all tasks, since the loss is a mean over
tasks. Without torchrun it runs as one process. OUT.0, OUT.1, ...: what each process ends with.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastmeta as fm
from examples.shared import outcome, pictures

# torchrun sets both.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def main(outer_steps: int = 3, tasks: int = 16, side: int = 32) -> dict[str, Tensor]:
    if tasks % PROCESSES:
        raise ValueError(f"ddp: {tasks} tasks, {PROCESSES} processes; accepted is a multiple")
    x, y = pictures(tasks, side)  # [1,N,2], [T,N,3]
    torch.manual_seed(0)
    net = fm.siren(2, 3, width=64, depth=4, w0=30.0, output_shift=0.5)
    maml = module = fm.MAML(net, inner_steps=5, inner_lr=1e-2)
    if PROCESSES > 1:
        dist.init_process_group("gloo")
        module = DistributedDataParallel(maml)
    outer = torch.optim.Adam(module.parameters(), lr=1e-4)
    batch = fm.Batch(x[0], y[RANK::PROCESSES])
    losses = []
    for _ in range(outer_steps):
        outer.zero_grad()
        loss = module(batch)
        loss.backward()  # the mean over processes, in each of them
        outer.step()
        mean = loss.detach() / PROCESSES
        if PROCESSES > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    if PROCESSES > 1:
        del module  # before its process group: after it, it can wait for gloo for ever
        dist.destroy_process_group()
    return outcome(losses, maml.parameters())


if __name__ == "__main__":
    result = main()
    print(f"process {RANK} of {PROCESSES}: {result['losses'].tolist()}")
    if len(sys.argv) > 1:
        torch.save(result, f"{sys.argv[1]}.{RANK}")
