"""meta/eikonal.py: the term, its gradient, and the two first-order outer directions."""

import math

import pytest
import torch
from helpers import IMPLS, error, parameters, plain_mlp, rand

import fastmeta as fm
from fastmeta import rng
from fastmeta.meta.eikonal import Eikonal, adapt_eikonal
from fastmeta.rules import Adam, Momentum

# Sums in another order, in float64: a few hundred roundings, some steps long.
CLOSE = 1e-11
RULES = ["sgd", "momentum", "adam", Momentum(0.7, True, 0.01), Adam(0.8, 0.9, 1e-3)]


def network(activation="softplus", inputs=3, **more):
    return fm.MLP(inputs, 1, 9, 3, activation, coords="world", **more)


def batch(net, tasks=3, points=17, seed=True, **more):
    x = rand(tasks, points, net.in_features, seed=1, low=-1.0)
    y = rand(tasks, points, 1, seed=2, low=-0.5, high=0.5)
    return fm.Batch(x, y, seed=torch.arange(5, 5 + tasks) if seed else None, **more)


def plain_loss(net, theta, b, task, step, weight):
    """L + w E of one task in torch's own functions, differentiable by autograd."""
    x, y = b.x[task], b.y[task]
    if b.per_step is not None:
        upper = b.points if b.counts is None else int(b.counts[task])
        key = b.seed[task : task + 1]
        index = rng.integers(key, b.per_step, upper, step, rng.POINTS)[0]
        x, y = x[index], y[index]
    elif b.counts is not None:
        x, y = x[: b.counts[task]], y[: b.counts[task]]
    kind, clamp = b.loss_parts
    if kind == "mse":
        data = ((plain_mlp(net, theta, x) - y) ** 2).mean()
    else:
        data = (plain_mlp(net, theta, x).clamp(-clamp, clamp) - y.clamp(-clamp, clamp)).abs().mean()
    at = x
    if b.seed is not None:
        rows = b.points if b.per_step is None else b.per_step
        key = b.seed[task : task + 1]
        free = rng.uniform(key, rows * 3, step, rng.SURFACE, torch.float64).view(rows, 3)
        at = torch.cat([x, 2 * free[: len(x)] - 1])
    at = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(plain_mlp(net, theta, at).sum(), at, create_graph=True)
    return data + weight * (((slope**2).sum(-1).sqrt() - 1) ** 2).mean()


def plain_descent(net, params, b, steps, lr, weight, task):
    """(θ_K, losses) of one task by SGD."""
    theta, losses = params.clone(), []
    for k in range(steps):
        theta = theta.detach().requires_grad_()
        loss = plain_loss(net, theta, b, task, k, weight)
        (g,) = torch.autograd.grad(loss, theta)
        losses.append(loss.detach())
        theta = theta - lr * g
    return theta.detach(), torch.stack(losses)


def ragged(net, filler=0.0):
    b = batch(net, counts=torch.tensor([17, 4, 9]))
    beyond = (torch.arange(17) >= b.counts[:, None])[..., None]
    x, y = b.x.masked_fill(beyond, filler), b.y.masked_fill(beyond, filler)
    return fm.Batch(x, y, seed=b.seed, counts=b.counts)


CASES = {
    "all points": lambda net: batch(net),
    "no seeds": lambda net: batch(net, seed=False),
    "drawn": lambda net: batch(net, per_step=6),
    "drawn, ragged": lambda net: batch(net, per_step=6, counts=torch.tensor([17, 4, 9])),
    "ragged": ragged,
    "padded with NaN": lambda net: ragged(net, math.nan),
    "l1": lambda net: batch(net, loss=("l1", 0.3)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_autograd(case, impl):
    ladder = fm.Encoding.frequencies(3, 2, 1.0, include_input=True)
    for net in (network(), network("relu"), network("sine", w0=5.0), network(encoding=ladder)):
        b, params = CASES[case](net), parameters(net, 3)
        got = adapt_eikonal(net, params, b, 3, 0.05, 0.1, keep=True, impl=impl)
        for task in range(3):
            theta, losses = plain_descent(net, params[task], b, 3, 0.05, 0.1, task)
            assert error(got.losses[:, task], losses) < CLOSE
            assert error(got.params[task] - params[task], theta - params[task]) < CLOSE
        assert got.trajectory.shape == (4, 3, net.num_params)
        assert got.trajectory[0].equal(params) and got.trajectory[3].equal(got.params)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weight_0_is_adapt(case, rule):
    net = network()
    b, shared = CASES[case](net), parameters(net, 1)[0]
    lr = rand(4, 1, 1, seed=3, low=0.01, high=0.05)
    got = adapt_eikonal(net, shared, b, 4, lr, 0.0, rule=rule, keep=True)
    wanted = fm.adapt(net, shared, b, 4, lr, rule=rule, keep=True)
    for mine, theirs in zip(got, wanted, strict=True):
        assert error(mine, theirs) < CLOSE


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    Momentum(0.7, True, 0.01): lambda p: torch.optim.SGD(
        p, 0.05, momentum=0.7, nesterov=True, weight_decay=0.01
    ),
    Adam(0.8, 0.9, 1e-3): lambda p: torch.optim.Adam(p, 0.05, betas=(0.8, 0.9), eps=1e-3),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_is_torchs_optimiser(rule):
    net = network()
    b, params = batch(net, per_step=6), parameters(net, 3)
    got = adapt_eikonal(net, params, b, 4, 0.05, 0.3, rule=rule).params
    theta = torch.nn.Parameter(params[1].clone())
    optimiser = OPTIMISERS[rule]([theta])
    for k in range(4):
        optimiser.zero_grad()
        plain_loss(net, theta, b, 1, k, 0.3).backward()
        optimiser.step()
    # Adam's first step divides g by |g|: a gradient of 1e-8 carries its rounding 1e-17/1e-8 over
    assert error(got[1], theta) < 1e-9


def test_steps_0_and_one_set_for_all_tasks():
    net = network()
    b, params = batch(net), parameters(net, 1)
    none = adapt_eikonal(net, params[0], b, 0, 0.1, 1.0)
    assert none.losses.shape == (0, 3) and none.params.equal(params.expand(3, -1))
    shared = adapt_eikonal(net, params[0], b, 2, 0.1, 1.0)
    assert shared.params.equal(adapt_eikonal(net, params.expand(3, -1), b, 2, 0.1, 1.0).params)
    with torch.no_grad():  # the term takes derivatives of its own
        assert adapt_eikonal(net, params[0], b, 2, 0.1, 1.0).params.equal(shared.params)


def test_a_task_does_not_know_of_the_others():
    net = network()
    b, params = batch(net, per_step=6), parameters(net, 3)
    whole = adapt_eikonal(net, params, b, 3, 0.05, 0.5)
    alone = adapt_eikonal(net, params[1:2], b.take(slice(1, 2)), 3, 0.05, 0.5)
    assert error(alone.params[0], whole.params[1]) < CLOSE


def test_a_dead_network_gives_no_nan():
    net = network("relu")
    params = torch.zeros(1, net.num_params, dtype=torch.float64)
    got = adapt_eikonal(net, params, batch(net, 1), 2, 0.1, 0.5)
    b = batch(net, 1)
    assert float(got.losses[0]) == pytest.approx(float((b.y**2).mean()) + 0.5)  # (0 − 1)² is 1
    assert bool(torch.isfinite(got.params).all())
    weights = [w for w, _ in net.layers(got.params)]
    assert all(float(w.abs().max()) == 0 for w in weights)  # only the last bias moved


def test_the_term_brings_slopes_to_1():
    """Fitted to nothing but the sign of a plane's two sides, the slope is another with and without
    the term."""
    net = fm.MLP(2, 1, 16, 3, "softplus", coords="world")
    x = rand(1, 200, 2, seed=4, low=-1.0)
    b = fm.Batch(x, 0.2 * x[..., :1], loss=("l1", 0.02), seed=torch.tensor([3]))

    def slope(weight):
        theta = adapt_eikonal(net, parameters(net, 1), b, 300, 0.01, weight, rule="adam").params
        at = rand(1, 500, 2, seed=9, low=-1.0).requires_grad_()
        (g,) = torch.autograd.grad(fm.mlp(net, theta, at).sum(), at)
        return g.norm(dim=-1)

    with_term, without = slope(0.1), slope(0.0)
    assert float((with_term - 1).abs().mean()) < 0.1 < 0.5 < float((without - 1).abs().mean())


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_reptile_puts_the_distance_walked(rule):
    net = network()
    b, init = batch(net, per_step=6), parameters(net, 1)[0]
    learner = Eikonal(net, 3, 0.05, 0.2, rule=rule, init=init)
    loss = learner(b)
    (2.5 * loss).backward()
    theta = adapt_eikonal(net, init, b, 3, 0.05, 0.2, rule=rule).params
    assert error(learner.init.grad, 2.5 * (init - theta.mean(0))) < CLOSE
    parts = [plain_loss(net, theta[t], b, t, 3, 0.2).detach() for t in range(3)]
    assert error(loss, torch.stack(parts).mean()) < CLOSE


def test_fomaml_puts_the_gradient_where_the_steps_end():
    net = network()
    x, y = rand(3, 5, 3, seed=7, low=-1.0), rand(3, 5, 1, seed=8)
    query = fm.Batch(x, y, seed=torch.arange(3))
    b, init = batch(net, per_step=6), parameters(net, 1)[0]
    both = fm.Batch(b.x, b.y, seed=b.seed, per_step=6, query=query)
    for support, outer in ((b, b), (both, query)):
        learner = Eikonal(net, 3, 0.05, 0.2, algorithm="fomaml", init=init)
        loss = learner(support)
        loss.backward()
        theta = adapt_eikonal(net, init, support, 3, 0.05, 0.2).params.requires_grad_()
        wanted = sum(plain_loss(net, theta[t], outer, t, 3, 0.2) for t in range(3)) / 3
        (g,) = torch.autograd.grad(wanted, theta)
        assert error(loss, wanted) < CLOSE and error(learner.init.grad, g.sum(0)) < CLOSE
    plain = fm.MAML(net, 3, 0.05, order=1, init=init)
    plain(both).backward()
    learner = Eikonal(net, 3, 0.05, 0.0, algorithm="fomaml", init=init)
    learner(both).backward()
    assert error(learner.init.grad, plain.init.grad) < CLOSE  # weight 0


def test_what_is_on_the_module():
    net = network()
    rates = torch.full((net.num_params,), 0.05)
    learner = Eikonal(net, 2, rates, 0.1, rule="adam")
    assert [name for name, _ in learner.named_parameters()] == ["init"]
    assert learner.inner_lr.equal(rates) and learner.rule == Adam() and learner.inner_steps == 2
    assert learner.net is net and "reptile" in repr(learner)
    loss = learner(batch(net).to(torch.float32))
    with torch.no_grad():
        assert float(learner(batch(net).to(torch.float32))) == float(loss)


def refused(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_refusals():
    net, wide = network(), fm.MLP(3, 2, 9, 3)
    b, params = batch(net), parameters(net, 1)[0]
    two = fm.Batch(b.x, b.y.expand(-1, -1, 2))
    for weight in (-1.0, math.nan, math.inf, "1"):
        refused("weight is .*accepted is a finite", adapt_eikonal, net, params, b, 1, 0.1, weight)
        refused("Eikonal: weight is ", Eikonal, net, 1, 0.1, weight)
    few = parameters(wide, 1)[0]
    refused("adapt_eikonal: net.out_features is 2", adapt_eikonal, wide, few, two, 1, 0.1, 1.0)
    refused("Eikonal: net.out_features is 2; accepted is 1", Eikonal, wide, 1, 0.1, 1.0)
    sinogram = fm.Batch(
        rand(16, 2), rand(1, 3, 4), measure=fm.Project(torch.zeros(1, 3, dtype=torch.float64))
    )
    flat = network(inputs=2)
    start = parameters(flat, 1)[0]
    refused("has measure project; accepted is none", adapt_eikonal, flat, start, sinogram, 1, 1, 1)
    refused("has measure project", Eikonal(flat, 1, 0.1, 1.0, init=start), sinogram)
    refused("steps is -1", adapt_eikonal, net, params, b, -1, 0.1, 1.0)
    refused("lr has shape", adapt_eikonal, net, params, b, 2, torch.zeros(5), 1.0)
    refused("x has 3 columns, net.in_features is 2", adapt_eikonal, flat, start, b, 1, 0.1, 1.0)
    refused("impl is 'gpu'", adapt_eikonal, net, params, b, 1, 0.1, 1.0, impl="gpu")
    for algorithm in ("maml", 2):
        why = "accepted are reptile and fomaml: .* third derivative"
        refused(why, Eikonal, net, 1, 0.1, 1.0, algorithm=algorithm)
    learned = torch.nn.Parameter(torch.tensor(0.1))
    refused("learned inner rates", Eikonal, net, 1, learned, 1.0)
    refused("learned inner rates", Eikonal, net, 1, 0.1, 1.0, rule="meta_sgd")
    refused("steps is 0; accepted is an integer >= 1", Eikonal, net, 0, 0.1, 1.0)
    asked = fm.Batch(b.x, b.y, query=b)
    refused("has a query set; accepted with reptile", Eikonal(net, 1, 0.1, 1.0, init=params), asked)


def test_no_gradient_where_there_is_none():
    net = network()
    params = parameters(net, 1)[0].requires_grad_()
    got = adapt_eikonal(net, params, batch(net), 2, 0.1, 0.1)
    with pytest.raises(RuntimeError, match="no gradient flows through this op"):
        got.params.sum().backward()
    learner = Eikonal(net, 2, 0.1, 0.1, init=params)
    (g,) = torch.autograd.grad(learner(batch(net)), learner.init, create_graph=True)
    with pytest.raises(RuntimeError, match="Eikonal: a derivative of the outer gradient"):
        g.sum().backward()
