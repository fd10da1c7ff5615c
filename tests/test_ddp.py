"""fm.MAML and fm.Reptile inside other packages' data parallelism: two processes with half the tasks
each have the gradient of one with all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import error, parameters, rand

import fastmeta as fm

NET = fm.siren(2, 3, 9, 3, 5.0, 9.0, output_shift=0.5)
T, K = 6, 2


def learner(kind):
    init = parameters(NET, 1)[0]
    if kind == "reptile":
        return fm.Reptile(NET, K, 0.05, init=init)
    rule = "meta_sgd" if kind == "meta_sgd" else "sgd"
    return fm.MAML(NET, K, 0.05, init=init, rule=rule)


def tasks(part):
    """A batch of some of the T tasks."""
    x, y = rand(T, 17, 2, seed=1), rand(T, 17, 3, seed=2)
    return fm.Batch(x[part], y[part])


KINDS = ("maml", "meta_sgd", "reptile")
distributed = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def whole(kind, steps):
    """name -> parameter after some outer steps, and the first gradient, in one process."""
    module = learner(kind)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    first = {}
    for step in range(steps):
        optimizer.zero_grad()
        module(tasks(slice(None))).backward()
        if step == 0:
            first = {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
    return first, {name: p.detach() for name, p in module.named_parameters()}


def main(rank, meeting, out):
    """One of the two processes: what ``whole`` gives for each kind, to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    results = {}
    for kind in KINDS:
        module = torch.nn.parallel.DistributedDataParallel(learner(kind))
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        first = {}
        for step in range(2):
            optimizer.zero_grad()
            module(tasks(slice(rank * T // 2, (rank + 1) * T // 2))).backward()
            if step == 0:
                first = {name: p.grad.clone() for name, p in module.module.named_parameters()}
            optimizer.step()
        results[kind] = first, {n: p.detach() for n, p in module.module.named_parameters()}
    torch.save(results, out)
    del module, optimizer  # freed after its group, it can wait for gloo for ever
    torch.distributed.destroy_process_group()


@distributed
def test_two_processes_have_the_gradient_of_one(tmp_path):
    here = Path(__file__).resolve()
    root = os.pathsep.join(
        [str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, str(here), str(rank), str(tmp_path / "meeting"), str(out)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for worker in workers:
            _, stderr = worker.communicate(timeout=100)
            assert worker.returncode == 0, stderr
    finally:
        for worker in workers:
            worker.kill()
    both = [torch.load(out) for out in outs]
    for kind in KINDS:
        first, last = whole(kind, 2)
        for rank in range(2):
            for got, want in zip(both[rank][kind], (first, last), strict=True):
                assert got.keys() == want.keys()
                for name in want:
                    # float64; a sum over tasks in two halves
                    assert error(got[name], want[name]) < 1e-12, (kind, rank, name)
        halves = learner(kind)
        halves(tasks(slice(0, T // 2))).backward()
        assert error(halves.init.grad, first["init"]) > 1e-2  # one half alone is another gradient


class OverTensors(torch.nn.Module):
    """forward(x, y) for Fabric, which converts every argument of a wrapped module, and refuses a
    frozen dataclass, as fm.Batch is, with an error."""

    def __init__(self, learner):
        super().__init__()
        self.learner = learner

    def forward(self, x, y):
        return self.learner(fm.Batch(x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_fabric(kind):
    fabric_of = pytest.importorskip("lightning.fabric", reason="lightning is not installed").Fabric
    fabric = fabric_of(accelerator="cpu", devices=1, precision="64-true")
    module = OverTensors(learner(kind))
    module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))
    batch = tasks(slice(None))
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(module(batch.x, batch.y))
        optimizer.step()
    want = whole(kind, 2)[1]
    for name, p in module.module.learner.named_parameters():
        assert error(p, want[name]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    module = learner(kind)
    module, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), 0.1))
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(module(tasks(slice(None))))
        optimizer.step()
    want = whole(kind, 2)[1]
    for name, p in accelerator.unwrap_model(module).named_parameters():
        assert error(p, want[name]) < 1e-12


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
