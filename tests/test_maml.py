"""Meta-gradients against autograd through the unrolled inner loop, and what MAML and Reptile
promise."""

import copy
import weakref

import pytest
import torch
from helpers import IMPLS, error, generator, parameters, plain_mlp, rand
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta as fm
from fastmeta.rules import SGD, Adam, MetaSGD, Momentum

pytestmark = pytest.mark.parametrize("impl", IMPLS)
RULES = [SGD(), MetaSGD(), Momentum(0.8), Momentum(0.9, nesterov=True, weight_decay=0.01), Adam()]
NETS = {
    "sine": fm.siren(2, 3, 9, 4, 10.0, output_shift=0.5),
    "relu": fm.MLP(2, 3, 9, 4, "relu"),
}


def unrolled(net, init, batch, steps, lr, rule, order):
    """The meta-loss as the paper writes it, differentiable by autograd: every task on its own,
    nothing shared."""
    total, query = 0.0, batch.query or batch
    rates = lr.expand(steps, batch.tasks, net.num_params)
    for t in range(batch.tasks):

        def loss(theta, data, t=t):
            x = data.x if data.x.dim() == 2 else data.x[t]
            return ((plain_mlp(net, theta, x) - data.y[t]) ** 2).mean()

        theta, state = init, None
        for k in range(steps):
            (g,) = torch.autograd.grad(loss(theta, batch), theta, create_graph=order == 2)
            if isinstance(rule, Momentum):
                # first order drops every second derivative, weight decay's identity with them
                g = g + rule.weight_decay * (theta if order == 2 else theta.detach())
                state = g if state is None else rule.mu * state + g
                u = g + rule.mu * state if rule.nesterov else state
            elif isinstance(rule, Adam):
                m, v = (0.0, 0.0) if state is None else state
                state = (
                    rule.beta1 * m + (1 - rule.beta1) * g,
                    rule.beta2 * v + (1 - rule.beta2) * g * g,
                )
                m, v = (
                    s / (1 - b ** (k + 1))
                    for s, b in zip(state, (rule.beta1, rule.beta2), strict=True)
                )
                alive = v > 0  # √v with derivative 0 at 0, which autograd needs spelled out
                u = m / (torch.where(alive, v, 1).sqrt() * alive + rule.eps)
            else:
                u = g
            theta = theta - rates[k, t] * u
        total = total + loss(theta, query)
    return total / batch.tasks


def batch_of(tasks, query=True):
    other = fm.Batch(rand(tasks, 13, 2, seed=3), rand(tasks, 13, 3, seed=4)) if query else None
    return fm.Batch(rand(tasks, 23, 2, seed=1), rand(tasks, 23, 3, seed=2), query=other)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.name}{getattr(r, 'nesterov', '')}")
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_meta_gradient_and_rate_gradient(impl, net, order, tasks, steps, rule):
    init = parameters(net, 1, seed=tasks)[0]
    batch = batch_of(tasks)
    for shape in ((), (net.num_params,), (steps, 1, 1), (tasks, 1)):
        lr = torch.nn.Parameter(rand(*shape, seed=steps, low=1e-3, high=1e-2))
        maml = fm.MAML(net, steps, lr, order=order, rule=rule, init=init, impl=impl)
        loss = maml(batch)
        loss.backward()
        start, rate = init.clone().requires_grad_(), lr.detach().clone().requires_grad_()
        want = unrolled(net, start, batch, steps, rate, rule, order)
        want.backward()
        assert error(loss, want) < 1e-12
        assert error(maml.init.grad, start.grad) < 1e-9
        assert maml.inner_lr.grad.shape == lr.shape and error(maml.inner_lr.grad, rate.grad) < 1e-9


def test_the_loss_is_the_same_without_a_gradient(impl):
    """Evaluation under no_grad takes another way through the workers."""
    net, batch = NETS["sine"], batch_of(2)
    maml = fm.MAML(net, 2, 1e-2, init=parameters(net, 1)[0], impl=impl)
    with torch.no_grad():
        alone = maml(batch)
    assert error(alone, maml(batch)) < 1e-14
    theta = fm.adapt(net, parameters(net, 1)[0], batch, 2, 1e-2, impl=impl).params
    assert error(alone, fm.loss_grad(net, theta, batch.query, impl=impl)[0].mean()) < 1e-14


@pytest.mark.parametrize("order", [1, 2])
def test_without_query_the_support_set_is_the_query(impl, order):
    net, batch = NETS["sine"], batch_of(2, query=False)
    maml = fm.MAML(net, 2, 1e-2, order=order, init=parameters(net, 1)[0], impl=impl)
    maml(batch).backward()
    start = maml.init.detach().clone().requires_grad_()
    unrolled(net, start, batch, 2, torch.tensor(1e-2, dtype=torch.float64), SGD(), order).backward()
    assert error(maml.init.grad, start.grad) < 1e-9


def test_the_incoming_cotangent_scales_the_gradient(impl):
    net, batch = NETS["sine"], batch_of(2)
    one, three = (
        fm.MAML(net, 2, 1e-2, rule="meta_sgd", init=parameters(net, 1)[0], impl=impl)
        for _ in range(2)
    )
    one(batch).backward()
    (3 * three(batch)).backward()
    assert error(three.init.grad, 3 * one.init.grad) < 1e-14
    assert error(three.inner_lr.grad, 3 * one.inner_lr.grad) < 1e-14


def test_adam_with_a_dead_unit_is_finite_and_right(impl):
    """√v has slope ∞ at 0, where autograd gives 0·∞; entries whose gradients are all zero drop out
    exactly."""
    net, batch = NETS["relu"], batch_of(2)
    init = parameters(net, 1)[0]
    weight, bias = net.layers(init)[1]
    weight[2], bias[2] = -weight[2].abs(), -5.0  # a unit that no input wakes
    maml = fm.MAML(net, 3, 1e-3, rule="adam", init=init, impl=impl)
    maml(batch).backward()
    assert torch.isfinite(maml.init.grad).all()
    probe = fm.MAML(net, 3, 1e-3, rule="adam", init=init, impl=impl)
    h = 1e-6
    for index in torch.randperm(net.num_params, generator=generator(3))[:40].tolist():
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                probe.init.copy_(init)
                probe.init[index] += sign * h
                values.append(float(probe(batch)))
        difference = (values[0] - values[1]) / (2 * h)
        # central differences of a float64 loss near 0.3: about 1e-10 / h of rounding
        assert abs(float(maml.init.grad[index]) - difference) < 1e-6 * max(1.0, abs(difference))


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
@pytest.mark.parametrize("rule", [SGD(), Momentum(), Adam(), Adam(eps=1e-3)], ids=repr)
def test_float32_is_as_good_as_plain_torch(impl, rule, steps):
    """At most twice the error of autograd in float32, plus one rounding.

    In Adam's first step the two paths of ū cancel to six digits: float32 needs the closed form.
    """
    net, init = NETS["sine"], parameters(NETS["sine"], 1)[0]
    batch = fm.Batch(rand(2, 200, 2), rand(2, 200, 3))
    grads = []
    for dtype in (torch.float64, torch.float32):
        maml = fm.MAML(net, steps, 1e-3, rule=rule, init=init.to(dtype), impl=impl)
        maml(batch.to(dtype)).backward()
        grads.append(maml.init.grad)
    start = init.float().requires_grad_()
    unrolled(net, start, batch.to(torch.float32), steps, torch.tensor(1e-3), rule, 2).backward()
    ours, torchs = error(grads[1], grads[0]), error(start.grad, grads[0])
    assert ours <= 2 * torchs + 6e-8, (ours, torchs)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_draws_reach_the_meta_gradient(impl, rule):
    """With per_step, step k's own draw is drawn again on the way back; the query of the outer step
    has index K."""
    from fastmeta import rng

    net, seed = NETS["sine"], torch.tensor([3, 9])
    x, y = rand(2, 23, 2), rand(2, 23, 3)
    batch = fm.Batch(x, y, per_step=11, seed=seed)
    init = parameters(net, 1)[0]
    maml = fm.MAML(net, 3, 1e-2, rule=rule, init=init, impl=impl)
    loss = maml(batch)
    loss.backward()

    class Drawn:
        def __init__(self, step):
            index = rng.integers(seed, 11, 23, step, rng.POINTS)
            self.x = torch.stack([x[t, index[t]] for t in range(2)])
            self.y = torch.stack([y[t, index[t]] for t in range(2)])

    start = init.clone().requires_grad_()
    total = 0.0
    for t in range(2):
        theta, m, v = start, 0.0, 0.0
        for k in range(4):
            data = Drawn(k)
            value = ((plain_mlp(net, theta, data.x[t]) - data.y[t]) ** 2).mean()
            if k == 3:
                total = total + value / 2
                break
            (g,) = torch.autograd.grad(value, theta, create_graph=True)
            if rule == "adam":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                g = m / (1 - 0.9 ** (k + 1)) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
            theta = theta - 1e-2 * g
    total.backward()
    assert error(loss, total) < 1e-13 and error(maml.init.grad, start.grad) < 1e-9


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_reptile(impl, rule):
    net, batch = NETS["sine"], batch_of(3, query=False)
    init = parameters(net, 1)[0]
    reptile = fm.Reptile(net, 4, 1e-2, rule=rule, init=init, impl=impl)
    loss = reptile(batch)
    (2 * loss).backward()
    fitted = fm.adapt(net, init, batch, 4, 1e-2, rule=rule, impl=impl).params
    assert error(reptile.init.grad, 2 * (init - fitted.mean(0))) < 1e-14
    assert error(loss, fm.loss_grad(net, fitted, batch, impl=impl)[0].mean()) < 1e-14
    with pytest.raises(ValueError, match="has a query set"):
        reptile(batch_of(3))
    for bad in ({"rule": "meta_sgd"}, {"inner_lr": torch.nn.Parameter(torch.ones(()))}):
        with pytest.raises(ValueError, match="learned inner rates were asked for"):
            fm.Reptile(**{"net": net, "inner_steps": 2, "inner_lr": 1e-2, "impl": impl, **bad})


def test_a_gradient_of_the_meta_gradient_raises(impl):
    net, batch = NETS["sine"], batch_of(2, query=False)
    for module in (fm.MAML(net, 2, 1e-2, impl=impl), fm.Reptile(net, 2, 1e-2, impl=impl)):
        loss = module.double()(batch)
        (g,) = torch.autograd.grad(loss, module.init, create_graph=True)
        with pytest.raises(
            RuntimeError, match="a derivative of the (meta|pseudo)-gradient was asked for"
        ):
            g.sum().backward()


def test_modules_are_modules(impl):
    net, batch = NETS["sine"], batch_of(2)
    maml = fm.MAML(net, 2, 1e-2, rule="meta_sgd", impl=impl).double()
    assert sorted(n for n, _ in maml.named_parameters()) == ["init", "inner_lr"]
    assert maml.inner_lr.shape == (net.num_params,) and maml.inner_lr.eq(torch.tensor(1e-2)).all()
    other = copy.deepcopy(maml)
    with torch.no_grad():
        other.init.add_(1.0)
    other.load_state_dict(maml.state_dict())
    assert torch.equal(other(batch), maml(batch))
    with torch.no_grad():
        assert not maml(batch).requires_grad
    maml.init.requires_grad_(False)
    maml(batch).backward()
    assert maml.init.grad is None and maml.inner_lr.grad is not None
    fixed = fm.MAML(net, 2, torch.full((2, 1, 1), 1e-2), impl=impl)
    assert [n for n, _ in fixed.named_parameters()] == ["init"] and "inner_lr" in dict(
        fixed.named_buffers()
    )


def test_one_adam_step_on_the_meta_gradient_lowers_the_loss(impl):
    net, batch = NETS["sine"], batch_of(3)
    maml = fm.MAML(net, 2, 1e-2, init=parameters(net, 1)[0], impl=impl)
    optimiser = torch.optim.Adam(maml.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        loss = maml(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 3}, "MAML: order is 3; accepted are 1 and 2"),
        ({"inner_steps": 0}, "MAML: steps is 0; accepted is an integer >= 1"),
        ({"rule": "lion"}, "rule is 'lion'; accepted are sgd, momentum, adam, meta_sgd"),
        ({"init": torch.zeros(3)}, "MAML: init has 3 columns, the network has"),
        ({"max_memory": -1}, "max_memory is -1"),
    ],
)
def test_bad_arguments(impl, change, message):
    with pytest.raises(ValueError, match=message):
        fm.MAML(**{"net": NETS["sine"], "inner_steps": 2, "inner_lr": 1e-2, "impl": impl, **change})


class Peak(TorchDispatchMode):
    """Bytes of the storages alive among those made inside, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage.nbytes())
                    self.peak = max(self.peak, self.now)
        return out

    def freed(self, size):
        self.now -= size


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_memory_grows_by_the_trajectory_alone(impl, rule):
    """At max_memory=0 the peak grows with K by K·T·P floats (three times that for Adam), and not
    with N."""
    if impl != "reference":
        pytest.skip("counts torch's storages; other workers count their own memory in their tests")
    net, T = fm.siren(2, 3, 32, 4, 30.0), 4
    peaks = {}
    for K in (3, 9):  # from the third step on, the way back holds the same temporaries
        for N in (500, 4000):
            batch = fm.Batch(rand(N, 2).float(), rand(T, N, 3).float())
            maml = fm.MAML(net, K, 1e-3, rule=rule, max_memory=0, impl=impl)
            with Peak() as measured:
                maml(batch).backward()
            peaks[K, N] = measured.peak
    trajectory = 6 * T * net.num_params * 4 * (3 if rule == "adam" else 1)
    for N in (500, 4000):
        growth = peaks[9, N] - peaks[3, N]
        assert growth <= 1.02 * trajectory, (growth, trajectory)
        assert growth > 0.5 * trajectory  # the measurement sees it
    # y, its sample and the mean: a few numbers a point, no activations (32·4 a point and task would
    # be 7 MB)
    assert peaks[3, 4000] - peaks[3, 500] < 3500 * T * 4 * 16
