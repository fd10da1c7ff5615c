"""Other packages' words for the inner loop, against fm.MAML, fm.adapt and torch.func over an
independent network."""

import pytest
import torch
from helpers import IMPLS, error, parameters, plain_mlp, rand
from torch.func import grad, vmap

import fastmeta as fm
from fastmeta import compat
from fastmeta.nn import BatchedMLP

NETS = {"sine": fm.siren(2, 3, 7, 3, 5.0, 9.0, output_shift=0.5), "relu": fm.MLP(2, 3, 9, 3)}
T, N, K, LR = 3, 17, 3, 0.05
X, Y = rand(T, N, 2, seed=1), rand(T, N, 3, seed=2)
XQ, YQ = rand(T, N + 5, 2, seed=3), rand(T, N + 5, 3, seed=4)
BATCH = fm.Batch(X, Y, query=fm.Batch(XQ, YQ))
# float64; sums of a few hundred terms in another order, through 3 steps: some 1e-14
CLOSE = 1e-10
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
orders = pytest.mark.parametrize("order", [1, 2])
impls = pytest.mark.parametrize("impl", IMPLS)


def mse(y, target):
    """[T], one a task."""
    return ((y - target) ** 2).mean((1, 2))


def by_torch_func(net, init, lr=LR, order=2):
    """(meta-loss, its gradient [P]) with grad and vmap of torch.func, over plain_mlp."""

    def task(p, x, y, xq, yq):
        def loss(q):
            return ((plain_mlp(net, q, x) - y) ** 2).mean()

        for _ in range(K):
            g = grad(loss)(p)
            p = p - lr * (g if order == 2 else g.detach())
        return ((plain_mlp(net, p, xq) - yq) ** 2).mean()

    p = init.clone().requires_grad_()
    meta = vmap(task, (None, 0, 0, 0, 0))(p, X, Y, XQ, YQ).mean()
    return meta, torch.autograd.grad(meta, p)[0]


def by_maml(net, init, impl, order=2, rule="sgd", lr=LR):
    maml = fm.MAML(net, K, lr, order=order, init=init, rule=rule, impl=impl)
    loss = maml(BATCH)
    loss.backward()
    return loss, maml.init.grad


def flat_grad(module):
    """[P] of all parameters' gradients, in their order."""
    return torch.cat([p.grad.reshape(-1) for p in module.parameters()])


def agree(got, *wanted):
    for want in wanted:
        assert error(got[0], want[0]) < CLOSE
        assert error(got[1], want[1]) < CLOSE


@impls
@nets
@orders
def test_innerloop_is_maml_and_torch_func(net, order, impl):
    init = parameters(net, 1)[0]
    model = BatchedMLP(net, 1, init=init, impl=impl)
    with compat.innerloop(model, T, LR, first_order=order == 1) as task:
        for _ in range(K):
            task.step(mse(task(X), Y))
        loss = mse(task(XQ), YQ).mean()
        loss.backward()
    got = loss, flat_grad(model)
    agree(got, by_maml(net, init, impl, order), by_torch_func(net, init, order=order))
    ended = fm.adapt(net, init, fm.Batch(X, Y), K, LR, impl=impl).params
    assert error(task.params, ended) < CLOSE
    other = by_torch_func(net, init, order=3 - order)[1]
    assert error(got[1], other) > 1e-3  # first order is another gradient, and seen as such
    assert ("FOMAML" in repr(task)) == (order == 1)


@impls
@orders
def test_clone_and_adapt_as_learn2learn_writes_it(order, impl):
    net, init = NETS["sine"], parameters(NETS["sine"], 1)[0]
    model = BatchedMLP(net, 1, init=init, impl=impl)
    maml = compat.MAML(model, LR, first_order=order == 1)
    learner = maml.clone(tasks=T)
    for _ in range(K):
        learner.adapt(mse(learner(X), Y))
    loss = mse(learner(XQ), YQ).mean()
    loss.backward()
    assert [p is q for p, q in zip(maml.parameters(), model.parameters(), strict=True)] == [
        True
    ] * 6
    agree(
        (loss, flat_grad(maml)),
        by_maml(net, init, impl, order),
        by_torch_func(net, init, LR, order),
    )
    assert error(maml(X[0])[0], plain_mlp(net, init, X[0])) < CLOSE  # forward is the start


def test_first_order_of_one_clone_or_one_step():
    net, init = NETS["sine"], parameters(NETS["sine"], 1)[0]

    def gradient(clone_first, steps_first):
        model = BatchedMLP(net, 1, init=init)
        learner = compat.MAML(model, LR).clone(tasks=T, first_order=clone_first)
        for _ in range(K):
            learner.adapt(mse(learner(X), Y), first_order=steps_first)
        mse(learner(XQ), YQ).mean().backward()
        return flat_grad(model)

    first, second = (by_torch_func(net, init, order=order)[1] for order in (1, 2))
    assert error(gradient(True, None), first) < CLOSE
    assert error(gradient(None, True), first) < CLOSE
    assert error(gradient(True, False), second) < CLOSE


@pytest.mark.parametrize("rule", ["momentum", "adam", fm.rules.Momentum(0.8, True, 0.01)], ids=str)
@orders
def test_every_inner_rule(rule, order):
    net, init = NETS["sine"], parameters(NETS["sine"], 1)[0]
    model = BatchedMLP(net, 1, init=init)
    with compat.innerloop(model, T, 0.01, rule=rule, first_order=order == 1) as task:
        for _ in range(K):
            task.step(mse(task(X), Y))
        loss = mse(task(XQ), YQ).mean()
        loss.backward()
    agree((loss, flat_grad(model)), by_maml(net, init, None, order, rule, 0.01))


def test_learned_rates_get_the_gradient_that_maml_gives():
    net, init = NETS["sine"], parameters(NETS["sine"], 1)[0]
    maml = fm.MAML(net, K, LR, init=init, rule="meta_sgd")
    maml(BATCH).backward()
    rates = torch.nn.Parameter(torch.full((net.num_params,), LR, dtype=torch.float64))
    learner = compat.MAML(BatchedMLP(net, 1, init=init), rates)
    assert len(list(learner.parameters())) == 7
    task = learner.clone(tasks=T)
    for _ in range(K):
        task.adapt(mse(task(X), Y))
    mse(task(XQ), YQ).mean().backward()
    assert error(rates.grad, maml.inner_lr.grad) < CLOSE


def test_gradients_reach_a_module_of_torchs_own():
    torch.manual_seed(1)
    parts = torch.nn
    model = parts.Sequential(parts.Linear(2, 9), parts.Tanh(), parts.Linear(9, 3)).double()
    net, init = fm.from_module(model)
    with compat.innerloop(model, T, LR) as task:
        for _ in range(K):
            task.step(mse(task(X), Y))
        loss = mse(task(XQ), YQ).mean()
        loss.backward()
    agree((loss, flat_grad(model)), by_torch_func(net, init))
    for own in (
        fm.to_module(net, init),
        compat.MetaMLP(net, init=init),
        BatchedMLP(net, T, init=init),
    ):
        y = compat.MAML(own, LR)(X)
        assert error(y, torch.stack([plain_mlp(net, init, x) for x in X])) < CLOSE


def test_a_start_for_each_task():
    net, starts = NETS["sine"], parameters(NETS["sine"], T)
    model = BatchedMLP(net, T, init=starts)
    with compat.innerloop(model, T, LR) as task:
        task.step(mse(task(X), Y))
        mse(task(XQ), YQ).sum().backward()
    got = torch.cat([p.grad.flatten(1) for p in model.parameters()], 1)
    for t in range(T):
        p = starts[t].clone().requires_grad_()
        inner = ((plain_mlp(net, p, X[t]) - Y[t]) ** 2).mean()
        (g,) = torch.autograd.grad(inner, p, create_graph=True)
        outer = ((plain_mlp(net, p - LR * g, XQ[t]) - YQ[t]) ** 2).mean()
        assert error(got[t], torch.autograd.grad(outer, p)[0]) < CLOSE


def test_a_clone_goes_its_own_way():
    net = NETS["sine"]
    task = compat.MAML(BatchedMLP(net, 1, init=parameters(net, 1)[0]), LR).clone(tasks=T)
    task.adapt(mse(task(X), Y))
    at = task.params
    other = task.clone()
    other.adapt(mse(other(X), Y))
    assert task.params is at and task.steps == 1 and other.steps == 2
    task.adapt(mse(task(X), Y))
    assert torch.equal(task.params, other.params)


def test_frozen_modules_are_adapted_and_get_no_gradient():
    net, init = NETS["sine"], parameters(NETS["sine"], 1)[0]
    model = BatchedMLP(net, 1, init=init).requires_grad_(False)
    with compat.innerloop(model, T, LR) as task:
        for _ in range(K):
            task.step(mse(task(X), Y))
    assert error(task.params, fm.adapt(net, init, fm.Batch(X, Y), K, LR).params) < CLOSE
    partly = BatchedMLP(net, 1, init=init)
    next(partly.parameters()).requires_grad_(False)
    with compat.innerloop(partly, T, LR) as task:
        for _ in range(K):
            task.step(mse(task(X), Y))
        mse(task(XQ), YQ).mean().backward()
    first, *rest = partly.parameters()
    want = by_torch_func(net, init)[1]
    assert first.grad is None
    got = torch.cat([p.grad.reshape(-1) for p in rest])
    assert error(got, want[first.numel() :]) < CLOSE


def test_a_third_derivative_raises():
    net = NETS["sine"]
    model = BatchedMLP(net, 1, init=parameters(net, 1)[0])
    x = X.clone().requires_grad_()
    with compat.innerloop(model, T, LR) as task:
        (slope,) = torch.autograd.grad(task(x).sum(), x, create_graph=True)
        task.step(slope.square().mean((1, 2)))
        with pytest.raises(RuntimeError, match="third derivative"):
            mse(task(XQ), YQ).mean().backward()


def test_losses_that_would_mix_tasks_or_miss_the_weights_raise():
    net = NETS["sine"]
    model = BatchedMLP(net, 1, init=parameters(net, 1)[0])
    task = compat.MAML(model, LR).clone(tasks=T)
    for wrong in (mse(task(X), Y).mean(), (task(X) - Y) ** 2):
        with pytest.raises(ValueError, match=r"loss has shape .*; accepted is one a task, \[3\]"):
            task.adapt(wrong)
    with pytest.raises(TypeError, match="loss is float"):
        task.adapt(1.0)
    stale = mse(task(X), Y)
    task.adapt(mse(task(X), Y))
    at = task.params
    with torch.no_grad():
        blind = mse(task(X), Y)
    for loss in (stale, blind, torch.zeros(T, dtype=torch.float64)):
        with pytest.raises(ValueError, match="loss does not depend on the tasks' present weights"):
            task.adapt(loss)
    task.adapt(torch.zeros(T, dtype=torch.float64), allow_unused=True)
    assert task.params is at
    one = compat.MAML(model, LR).clone()
    one.adapt(mse(one(X[:1]), Y[:1]).mean())  # one task: a scalar is its loss
    assert one.steps == 1


def test_arguments_that_do_not_fit_raise():
    net, nn = NETS["sine"], torch.nn
    model = BatchedMLP(net, 2)
    cases = [
        (model, T, LR, "holds 2 networks for 3 tasks; accepted are 1 and 3"),
        (model, 0, LR, "tasks is 0"),
        (model, 2, torch.ones(4), r"lr has shape \(4,\)"),
        (net, 2, LR, "the network is a MLP"),
        (nn.Conv2d(1, 1, 1), 2, LR, "from_module: module is Conv2d"),
        (nn.Sequential(nn.Linear(2, 4, bias=False), nn.Tanh(), nn.Linear(4, 1)), 2, LR, "bias"),
    ]
    for module, tasks, lr, message in cases:
        refused = pytest.raises((ValueError, TypeError), match=message)
        with refused, compat.innerloop(module, tasks, lr):
            pass
    refused = pytest.raises(ValueError, match="rule is 'lion'")
    with refused, compat.innerloop(model, 2, LR, rule="lion"):
        pass


# Functional optimisers ---


def stacked(net, init):
    """OrderedDict of [T,out,in] and [T,out], MetaSDF's lines; and the model."""
    model = compat.MetaMLP(net, init=init)
    named = model.meta_named_parameters()
    return model, {n: p[None].repeat(T, *[1] * p.dim()) for n, p in named}


@nets
@orders
def test_the_loop_of_metasdf_and_gradncp(net, order):
    init = parameters(net, 1)[0]
    model, params = stacked(net, init)
    for _ in range(K):
        loss = mse(model(X, params=params), Y).mean() * T  # GradNCP's own scale
        grads = torch.autograd.grad(loss, params.values(), create_graph=order == 2)
        params = {n: p - LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
    loss = mse(model(XQ, params=params), YQ).mean()
    loss.backward()
    agree(
        (loss, flat_grad(model)),
        by_maml(net, init, None, order),
        by_torch_func(net, init, LR, order),
    )
    assert error(model(X), torch.stack([plain_mlp(net, init, x) for x in X])) < CLOSE
    assert [n for n, _ in model.meta_named_parameters()] == [*params]
    assert [p.shape for p in model.meta_parameters()] == [p.shape[1:] for p in params.values()]
    with pytest.raises(ValueError, match="'layers.0.weight' is missing"):
        model(X, params={n: p for n, p in params.items() if n != "layers.0.weight"})


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@orders
def test_functional_optimisers_are_the_rules(rule, order):
    net, init = NETS["relu"], parameters(NETS["relu"], 1)[0]
    make = {
        "sgd": compat.sgd,
        "momentum": lambda lr: compat.sgd(lr, momentum=0.9),
        "adam": compat.adam,
    }[rule]
    model, params = stacked(net, init)
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    optimizer = make(lr)
    state = optimizer.init(params)
    for _ in range(K):
        loss = mse(model(X, params), Y).sum()
        grads = torch.autograd.grad(loss, params.values(), create_graph=order == 2)
        grads = dict(zip(params, grads, strict=True))
        updates, state = optimizer.update(grads, state, params)
        params = compat.apply_updates(params, updates)
    assert state.steps == K
    loss = mse(model(XQ, params), YQ).mean()
    loss.backward()
    agree((loss, flat_grad(model)), by_maml(net, init, None, order, rule, 0.01))
    learned = torch.nn.Parameter(torch.tensor(0.01, dtype=torch.float64))
    maml = fm.MAML(net, K, learned, init=init, rule=rule, order=order)
    maml(BATCH).backward()
    assert error(lr.grad, learned.grad) < CLOSE


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_functional_optimisers_are_torchs_with_a_rate_a_task(kind):
    rates = torch.tensor([0.1, 0.02], dtype=torch.float64)
    make, torchs = {
        "sgd": (compat.sgd, lambda p, lr: torch.optim.SGD(p, lr)),
        "momentum": (
            lambda lr: compat.sgd(lr, 0.8, True),
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, nesterov=True),
        ),
        "adam": (compat.adam, lambda p, lr: torch.optim.Adam(p, lr)),
    }[kind]
    params = {"w": rand(2, 4, 3), "b": rand(2, 4, seed=1)}
    optimizer = make(rates)
    state = optimizer.init(params)
    alone = [{n: p[t].clone().requires_grad_() for n, p in params.items()} for t in range(2)]
    theirs = [torchs(part.values(), float(rates[t])) for t, part in enumerate(alone)]
    for step in range(4):
        grads = {n: rand(*p.shape, seed=10 + step) - 0.5 for n, p in params.items()}
        updates, state = optimizer.update(grads, state)
        params = compat.apply_updates(params, updates)
        for t, part in enumerate(alone):
            for n, p in part.items():
                p.grad = grads[n][t].clone()
            theirs[t].step()
    for t, part in enumerate(alone):
        for n, p in part.items():
            assert error(params[n][t], p) < 1e-12


def test_adam_has_a_derivative_where_a_gradient_was_zero():
    w = torch.tensor([0.0, 0.3], dtype=torch.float64, requires_grad=True)
    optimizer = compat.adam(0.1)
    updates, _ = optimizer.update({"w": 2 * w}, optimizer.init({"w": w}))
    (got,) = torch.autograd.grad(updates["w"].sum(), w)
    # u = g / (|g| + ε): 1/ε at 0 (r has derivative 0 there), ε / (|g| + ε)² elsewhere
    want = torch.tensor([-0.1 * 2 / 1e-8, -0.1 * 2 * 1e-8 / (0.6 + 1e-8) ** 2], dtype=torch.float64)
    assert torch.isfinite(got).all() and error(got[:1], want[:1]) < 1e-12
    assert abs(float(got[1] - want[1])) < 1e-15  # rounding of 1 - |g|/(|g| + ε), times 0.3


def test_functional_optimisers_refuse():
    params = {"w": rand(2, 3)}
    optimizer = compat.sgd(0.1)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"grads has the names \['v'\]; accepted are \['w'\]"):
        optimizer.update({"v": rand(2, 3)}, state)
    with pytest.raises(ValueError, match="apply_updates: updates has the names"):
        compat.apply_updates(params, {})
    with pytest.raises(ValueError, match=r"lr has shape \[2, 2\]"):
        compat.sgd(torch.ones(2, 2))
    rates = compat.adam(torch.ones(5))
    with pytest.raises(ValueError, match="lr has 5 rates"):
        rates.update(params, rates.init(params))
