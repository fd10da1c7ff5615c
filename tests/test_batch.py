"""Batches, rays and measures: what is accepted, what is refused, moving and taking."""

import math

import pytest
import torch

import fastmeta as fm
from fastmeta import rng


def rays(T=2, R=5, **change):
    return fm.Rays(
        **{
            "origins": torch.rand(T, R, 3),
            "directions": torch.rand(T, R, 3),
            "near": 1.0,
            "far": 2.0,
            **change,
        }
    )


X, Y = torch.rand(2, 9, 2), torch.rand(2, 9, 3)
THETA = torch.rand(2, 4)
BAD = [
    (lambda: fm.Batch(X, Y[:, :8]), "x has 9 points, y has 8"),
    (lambda: fm.Batch(X, Y[:1]), "x has 2 tasks, y has 1"),
    (lambda: fm.Batch(X, Y[0]), r"y has shape \(9, 3\); accepted is \[T,N,C\]"),
    (lambda: fm.Batch(X[:, :0], Y[:, :0]), "none empty"),
    (lambda: fm.Batch(X.double(), Y), "x is torch.float64 on cpu, y is torch.float32"),
    (lambda: fm.Batch(X.half(), Y.half()), "accepted is a float32 or float64 tensor"),
    (lambda: fm.Batch(X.numpy(), Y), "x is a ndarray; accepted are a Tensor and Rays"),
    (lambda: fm.Batch(X, Y, loss="huber"), "loss is 'huber'; accepted are 'mse', 'l1'"),
    (lambda: fm.Batch(X, Y, loss=("mse", 0.1)), "loss is"),
    (lambda: fm.Batch(X, Y, loss=("l1", -0.1)), "clamp above 0"),
    (lambda: fm.Batch(X, Y, per_step=4), "it needs seed"),
    (lambda: fm.Batch(X, Y, per_step=0, seed=torch.zeros(2).long()), "per_step is 0"),
    (lambda: fm.Batch(X, Y, seed=torch.zeros(3).long()), r"accepted is an integer tensor \[2\]"),
    (lambda: fm.Batch(X, Y, seed=torch.zeros(2)), "seed is torch.float32; accepted is int64"),
    (
        lambda: fm.Batch(X, Y, counts=torch.tensor([0, 9])),
        "counts goes from 0 to 9; accepted are 1 to 9",
    ),
    (lambda: fm.Batch(X, Y, counts=torch.tensor([1, 10])), "counts goes from 1 to 10"),
    (lambda: fm.Batch(X, Y, counts=torch.tensor([1.0, 2.0])), "counts is torch.float32"),
    (lambda: fm.Batch(X, Y, query=fm.Batch(X[:1], Y[:1])), "query has 1 tasks, the batch 2"),
    (lambda: fm.Batch(X, Y, query=fm.Batch(X, Y, query=fm.Batch(X, Y))), "no query of its own"),
    (lambda: fm.Batch(X, Y, measure="march"), "measure is 'march'; accepted are None"),
    (lambda: fm.Batch(X, Y, measure=fm.March(8)), "March needs x to be Rays"),
    (lambda: fm.Batch(rays(), torch.rand(2, 5, 3)), "Rays need measure=March"),
    (lambda: fm.Batch(rays(), torch.rand(2, 4, 3), measure=fm.March(8)), r"March needs \[T,5,3\]"),
    (
        lambda: fm.Batch(X, torch.rand(2, 4, 3), measure=fm.Project(THETA[:, :3])),
        "Project needs W·W points",
    ),
    (lambda: fm.Batch(X[:, :8], torch.rand(2, 4, 3), measure=fm.Project(THETA)), "x has 8 points"),
    (
        lambda: fm.Batch(
            X, torch.rand(2, 4, 3), measure=fm.Project(THETA), counts=torch.tensor([1, 2])
        ),
        "do not go with Project",
    ),
    (
        lambda: fm.Batch(X, Y, seed=torch.zeros(2, dtype=torch.int64, device="meta")),
        "seed is on meta, y on cpu; both must agree",
    ),
    (lambda: fm.Project(torch.rand(3)), r"angles has shape \(3,\); accepted is \[T,A\]"),
    (lambda: fm.Project(torch.full((1, 2), math.nan)), "NaN or infinity"),
    (lambda: rays(near=2.0), "near is 2.0, far is 2.0; accepted are finite numbers, near < far"),
    (lambda: rays(far=torch.tensor([2.0, math.nan])), "near < far"),
    (lambda: rays(near=torch.rand(3)), r"near has shape \(3,\); accepted are a number or \[2\]"),
    (lambda: rays(origins=torch.rand(2, 4, 3)), "accepted are two"),
    (lambda: rays(origins=torch.rand(2, 5, 3).double()), "origins are torch.float64"),
    (lambda: fm.March(1), "samples is 1; accepted is an integer >= 2"),
    (lambda: fm.March(density="exp"), "density is 'exp'; accepted are relu, softplus"),
    (lambda: fm.March(last_interval=math.inf), "last_interval is inf"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_batches_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_ops_refuse_batches_of_another_network():
    net = fm.siren(3, 3, 8, 3)
    p = torch.zeros(net.num_params)
    for batch, message in (
        (fm.Batch(X, Y), "loss_grad: batch.x has 2 columns, net.in_features is 3"),
        (fm.Batch(torch.rand(9, 3), Y[..., :2]), "needs 2 network outputs"),
        (
            fm.Batch(rays(), torch.rand(2, 5, 3), measure=fm.March(4)),
            "needs 4 network outputs .measure march.",
        ),
        (fm.Batch(torch.rand(9, 3).double(), Y.double()), "one dtype and one device"),
        (fm.Batch(torch.rand(9, 3), Y, query=fm.Batch(X, Y)), "query.x has 2 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            fm.loss_grad(net, p, batch)
    with pytest.raises(ValueError, match="params has 3 rows for 2 tasks"):
        fm.loss_grad(net, torch.zeros(3, net.num_params), fm.Batch(torch.rand(9, 3), Y))
    with pytest.raises(ValueError, match="loss_hvp: v has 3 columns, the network has"):
        fm.loss_hvp(net, p, torch.zeros(3), fm.Batch(torch.rand(9, 3), Y))
    with pytest.raises(TypeError, match="batch is a tuple; accepted is a fastmeta.Batch"):
        fm.loss_grad(net, p, (X, Y))


def test_to_moves_floats_and_keeps_integers():
    batch = fm.Batch(
        rays(near=torch.tensor([0.5, 0.6])),
        torch.rand(2, 5, 3),
        measure=fm.March(4),
        seed=torch.tensor([1, 2]),
        counts=torch.tensor([3, 5]),
        query=fm.Batch(rays(), torch.rand(2, 5, 3), measure=fm.March(4)),
    ).to(torch.float64)
    assert (
        batch.y.dtype
        == batch.x.origins.dtype
        == batch.x.near.dtype
        == batch.query.y.dtype
        == torch.float64
    )
    assert batch.seed.dtype == batch.counts.dtype == torch.int64
    ct = fm.Batch(X, torch.rand(2, 4, 3), measure=fm.Project(THETA)).to(torch.float64)
    assert ct.measure.angles.dtype == torch.float64


def test_take_is_the_batch_of_some_tasks():
    net = fm.MLP(3, 4, 8, 3)
    batch = fm.Batch(
        rays(3, far=torch.tensor([2.0, 3.0, 4.0])),
        torch.rand(3, 5, 3),
        measure=fm.March(4),
        seed=torch.tensor([1, 2, 3]),
        counts=torch.tensor([3, 5, 4]),
    )
    p = net.init(3)
    loss, grad = fm.loss_grad(net, p, batch)
    part, rows = fm.loss_grad(net, p[1:], batch.take(slice(1, 3)))
    assert torch.allclose(loss[1:], part, rtol=1e-6) and torch.allclose(grad[1:], rows, atol=1e-7)
    ct = fm.Batch(
        X, torch.rand(2, 4, 3), measure=fm.Project(THETA), query=fm.Batch(X, torch.rand(2, 9, 1))
    )
    one = ct.take(slice(1, 2))
    assert torch.equal(one.measure.angles, THETA[1:]) and one.query.tasks == 1
    assert torch.equal(one.measure.pixels(3), ct.measure.pixels(3)[1:])


def test_moving_a_batch_keeps_every_bit_of_its_seeds():
    """A seed has 64 bits, a float32 24: draws after a change of dtype are those before it."""
    seed = rng.task_seeds(1, 2, 2)
    assert seed.float().long().ne(seed).all() and seed.double().long().ne(seed).any()
    x, y = torch.rand(2, 5, 3, dtype=torch.float64), torch.rand(2, 5, 1, dtype=torch.float64)
    batch = fm.Batch(x, y, seed=seed, per_step=3, counts=torch.tensor([5, 4]))
    for dtype in (torch.float32, torch.float64):
        moved = batch.to(dtype)
        assert moved.y.dtype == dtype and moved.seed.equal(seed)
        assert moved.counts.tolist() == [5, 4]
