"""What stands between a network and its loss in the CUDA worker, on the emulator: points, rays and
pixels laid out, loss and adjoint, compositing and the projector, against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import error, rand
from test_cuda import build, library, poisoned, same  # noqa: F401

import fastmeta as fm
from fastmeta import native, reference
from fastmeta.reference import Dual, value


@pytest.fixture
def place(library):  # noqa: F811
    return native.Device(library((32, "fp32")), "fp32")


def close(name, ours, plain, truth):
    """At most twice the error of plain torch in float32, plus a rounding of the largest term."""
    for i, (a, p, c) in enumerate(zip(ours, plain, truth, strict=True)):
        away, allowed = error(a, c), 2 * error(p, c) + 4e-7
        assert away <= allowed, (name, i, away, allowed)


# Points and losses ---


def outputs(net, batch, points, dual):
    """What a network might say at T tasks' points: [planes,T,M,C]."""
    shape = (2 if dual else 1, batch.tasks, points, net.out_features)
    return rand(*shape, seed=21, low=-1, high=2).float()


def measured(place, net, batch, step, dual, back=True, slices=None):
    """(x [T,M,D], y's adjoint [planes,T,M,C], loss [T], y) of the kernels, a chunk at a time."""
    call = native._Call(place, "loss", net, batch.y)
    call.batch(call.job.data, batch)
    call.job.step = step
    kernels, T = place.library, batch.tasks
    M = kernels.network_points(call.job)
    y = outputs(net, batch, M, dual)
    xs, bars, losses = [], [], []
    for first, tasks in slices or [(0, T)]:
        room = torch.empty(kernels.measure_room(call.job, tasks, dual))
        x, loss = torch.empty(tasks, M, net.in_features), torch.empty(tasks)
        mine = y[:, first : first + tasks].clone()
        where = room.data_ptr()
        kernels.lay_points(call.job, first, tasks, x.data_ptr(), where)
        before = [mine.data_ptr(), loss.data_ptr(), where]
        kernels.measure_loss(call.job, first, tasks, dual, back, *before)
        xs, bars, losses = [*xs, x], [*bars, mine], [*losses, loss]
    return torch.cat(xs), torch.cat(bars, 1), torch.cat(losses), y


def expected(net, batch, step, y, dtype):
    """The same by the reference, with nothing of a network in between."""
    batch = batch.to(dtype)
    y = y.to(dtype)
    sample = reference.draw(batch, step)
    number = Dual(y[0], y[1]) if len(y) == 2 else y[0]
    every = slice(None)
    loss, bar = reference._seed_adjoint(batch, sample, every, every, number)
    x = sample.x.expand(batch.tasks, -1, -1)
    return x, value(bar), along(bar) if len(y) == 2 else bar, loss


def along(bar):
    """The tangent; zeros where the reference has none."""
    d = bar.d if isinstance(bar, Dual) else None
    return torch.zeros_like(value(bar)) if d is None else d


def point_batches(outputs):
    T, N = 3, 300
    x, y = rand(T, N, 2, seed=1).float(), rand(T, N, outputs, seed=2).float()
    seed, counts = torch.tensor([5, -(2**40), 7]), torch.tensor([1, 290, 300])
    beyond = torch.arange(N)[:, None] >= counts[:, None, None]
    x_padded, y_padded = (torch.where(beyond, float("nan"), q) for q in (x, y))
    return {
        "all": fm.Batch(x, y),
        "shared": fm.Batch(x[0], y, loss="l1"),
        "ragged": fm.Batch(x_padded, y_padded, counts=counts, loss=("l1", 0.6)),
        "drawn": fm.Batch(x_padded, y_padded, counts=counts, per_step=150, seed=seed),
    }


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("outputs", [1, 3, 9])
@pytest.mark.parametrize("kind", ["all", "shared", "ragged", "drawn"])
def test_points(place, kind, outputs, dual):
    net, step = fm.siren(2, outputs, 32, 3), 4
    batch = point_batches(outputs)[kind]
    x, bar, loss, y = measured(place, net, batch, step, dual)
    truth, plain = (expected(net, batch, step, y, t) for t in (torch.float64, torch.float32))
    assert torch.equal(x, plain[0])
    close(kind, (bar[0], bar[-1], loss), plain[1:], truth[1:])
    split = measured(place, net, batch, step, dual, slices=[(0, 1), (1, 2)])
    assert same(split[:3], (x, bar, loss))
    kept = measured(place, net, batch, step, dual, back=False)
    assert torch.equal(kept[1], y) and torch.equal(kept[2], loss)
