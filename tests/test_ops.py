"""Every op on every named worker against an independent computation: values, gradients, duals,
refusals."""

import math

import pytest
import torch
from helpers import IMPLS, error, generator, nets, parameters, plain_mlp, rand
from torch.autograd import gradcheck, gradgradcheck

import fastmeta as fm
from fastmeta import reference

pytestmark = pytest.mark.parametrize("impl", IMPLS)
BY_NAME = {"ids": lambda n: f"{n.activation}-{n.output}" if isinstance(n, fm.MLP) else None}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN: what a worker forgets to write, or reads before it wrote, shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# mlp ---


@pytest.mark.parametrize("net", nets(), **BY_NAME)
@pytest.mark.parametrize(
    ("tasks", "shared_params", "shared_x", "points"),
    [
        (1, False, False, 1),
        (3, False, False, 17),
        (3, True, False, 16),
        (3, False, True, 15),
        (1, True, True, 63),
    ],
)
def test_mlp_values_and_gradients(impl, net, tasks, shared_params, shared_x, points):
    params = parameters(net, tasks)[0 if shared_params else slice(None)].requires_grad_()
    x = rand(*(() if shared_x else (tasks,)), points, 2, seed=3).requires_grad_()
    rows = params.expand(tasks, -1)
    columns = x.expand(tasks, points, 2)
    want = torch.stack([plain_mlp(net, rows[t], columns[t]) for t in range(tasks)])
    got = fm.mlp(net, params, x, impl=impl)
    if shared_params and shared_x:
        got = got[None]
    assert error(got, want) < 1e-13
    cotangent = rand(*want.shape, seed=4, low=-1)
    grads = [torch.autograd.grad(y, (params, x), cotangent, create_graph=True) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert a.shape == b.shape and error(a, b) < 1e-12
    u, w = rand(*params.shape, seed=5, low=-1), rand(*x.shape, seed=6, low=-1)
    second = [
        torch.autograd.grad((g[0] * u).sum() + (g[1] * w).sum(), (params, x), allow_unused=True)
        for g in grads
    ]
    for a, b in zip(*second, strict=True):
        # relu and none have no curvature along some directions: compare with zeros there
        b = torch.zeros_like(a) if b is None else b
        assert error(a, b) < 1e-11 or float((a - b).norm()) < 1e-12


@pytest.mark.parametrize(
    "net", [n for n in nets(width=3) if "relu" not in (n.activation, n.output)], **BY_NAME
)
def test_mlp_gradcheck(impl, net):
    """Against differences. Networks with kinks are left to the test above, whose truth is
    autograd."""
    params = parameters(net, 2).requires_grad_()
    x = rand(2, 3, 2, seed=1).requires_grad_()

    def f(p, q):
        return fm.mlp(net, p, q, impl=impl)

    assert gradcheck(f, (params, x), atol=1e-6)
    assert gradgradcheck(f, (params, x), atol=1e-5)


def test_mlp_third_derivative_raises(impl):
    net = fm.siren(2, 3, 8, 3, 5.0)
    x = rand(1, 5, 2).requires_grad_()
    (g,) = torch.autograd.grad(
        fm.mlp(net, parameters(net, 1), x, impl=impl).sum(), x, create_graph=True
    )
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="mlp: a third derivative was asked for"):
        h.sum().backward()


def test_mlp_second_derivative_without_one_of_the_two(impl):
    """An eikonal term needs ∂/∂p of ‖x̄‖²; params alone may be the leaf that asks."""
    net = fm.MLP(3, 1, 9, 3, "softplus")
    p, x = parameters(net, 2).requires_grad_(), rand(2, 7, 3).requires_grad_()
    got, want = [], []
    for out, y in (
        (got, fm.mlp(net, p, x, impl=impl)),
        (want, torch.stack([plain_mlp(net, p[t], x[t]) for t in range(2)])),
    ):
        (gx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (gp,) = torch.autograd.grad(((gx.norm(dim=-1) - 1) ** 2).mean(), p)
        out.append(gp)
    assert error(got[0], want[0]) < 1e-12


@pytest.mark.parametrize(
    ("params", "x", "message"),
    [
        (lambda P: torch.zeros(P), torch.zeros(4, 3), "x has 3 columns, net.in_features is 2"),
        (lambda P: torch.zeros(P + 1), torch.zeros(4, 2), "the network has"),
        (lambda P: torch.zeros(2, P), torch.zeros(3, 4, 2), "params has 2 tasks, x has 3"),
        (lambda P: torch.zeros(P).double(), torch.zeros(4, 2), "one dtype and one device"),
        (lambda P: torch.zeros(P), torch.zeros(0, 2), "none empty"),
        (
            lambda P: torch.zeros(P).half(),
            torch.zeros(4, 2).half(),
            "x is torch.float16; accepted is a float32",
        ),
        (lambda P: torch.zeros(P), [[0.0, 0.0]], "x is list; accepted is"),
    ],
)
def test_mlp_refuses(impl, params, x, message):
    net = fm.siren(2, 3, 8, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        fm.mlp(net, params(net.num_params), x, impl=impl)


def test_float32_products_are_full_float32_whatever_the_settings(impl):
    """Autocast and torch's float32 precision must not reach the arithmetic."""
    net = fm.siren(2, 3, 64, 4, 30.0)
    p, x = net.init(2, generator=generator(0)), rand(2, 100, 2).float()
    truth = fm.mlp(net, p.double(), x.double(), impl=impl)
    plain = error(fm.mlp(net, p, x, impl=impl), truth)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(fm.mlp(net, p, x, impl=impl), truth) == plain
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    # at most twice the error of plain torch, plus one rounding
    torchs = torch.stack([plain_mlp(net, p[t], x[t]) for t in range(2)])
    assert plain <= 2 * error(torchs, truth) + 6e-8


# loss_grad, loss_hvp ---


def ct_batch(tasks, size=9, angles=4):
    x = (
        torch.stack(torch.meshgrid(*[torch.arange(size) / size] * 2, indexing="xy"), -1)
        .view(-1, 2)
        .double()
    )
    theta = rand(tasks, angles, seed=8, high=math.pi)
    return fm.Batch(x, rand(tasks, angles, size, seed=9), measure=fm.Project(theta))


def ray_batch(tasks, rays=5, samples=6, **options):
    where = rand(tasks, rays, 3, seed=10, low=-0.3, high=0.3)
    march = fm.March(
        samples,
        options.pop("last", 1e-3),
        options.pop("white", True),
        options.pop("density", "softplus"),
    )
    return fm.Batch(
        fm.Rays(
            where, rand(tasks, rays, 3, seed=11, low=-1), 0.5, torch.linspace(2, 3, tasks).double()
        ),
        rand(tasks, rays, 3, seed=12),
        measure=march,
        **options,
    )


def plain_loss(net, theta, batch, task):
    """One task's loss by autograd's own means, for batches without draws."""
    if isinstance(batch.measure, fm.March):
        near, far = batch.x.bounds
        t = torch.linspace(
            float(near[task]), float(far[task]), batch.measure.samples, dtype=torch.float64
        )
        o, d = batch.x.origins[task], batch.x.directions[task]
        x = o[:, None] + t[:, None] * d[:, None]
        raw = plain_mlp(net, theta, x.reshape(-1, 3)).view(*x.shape[:2], 4)
        sigma = torch.nn.functional.softplus(raw[..., 3], threshold=1e9)
        delta = torch.cat(
            [t[1:] - t[:-1], torch.tensor([batch.measure.last_interval], dtype=torch.float64)]
        )
        alpha = 1 - torch.exp(-sigma * delta)
        T = torch.cumprod(
            torch.cat([torch.ones_like(alpha[:, :1]), (1 - alpha + 1e-10).clamp(max=1)], 1), 1
        )[:, :-1]
        w = alpha * T
        y = (w[..., None] * torch.sigmoid(raw[..., :3])).sum(1)
        if batch.measure.white_background:
            y = y + 1 - w.sum(1, keepdim=True)
    else:
        x = batch.x if batch.x.dim() == 2 else batch.x[task]
        x = x if batch.counts is None else x[: batch.counts[task]]
        y = plain_mlp(net, theta, x)
        if isinstance(batch.measure, fm.Project):
            size = batch.y.shape[-1]
            k = batch.measure.pixels(size)[task].long()
            flat = torch.cat([y[:, 0], torch.zeros(1).double()])
            y = flat[torch.where(k < 0, size * size, k)].mean(1)
    target = batch.y[task]
    if batch.counts is not None:
        target = target[: batch.counts[task]]
    kind, clamp = batch.loss_parts
    if kind == "mse":
        return ((y - target) ** 2).mean()
    if clamp is not None:
        y, target = y.clamp(-clamp, clamp), target.clamp(-clamp, clamp)
    return (y - target).abs().mean()


def loss_cases():
    ragged = torch.tensor([4, 17, 9])
    poison = torch.arange(17) >= ragged[:, None]
    x, y = rand(3, 17, 2), rand(3, 17, 3)
    x[poison], y[poison] = math.nan, math.inf
    cases = [(net, fm.Batch(rand(3, 17, 2), rand(3, 17, 3))) for net in nets()]
    sine = fm.siren(2, 3, 7, 3, 5.0)
    cases.append((sine, fm.Batch(rand(19, 2), rand(3, 19, 3))))
    cases.append((sine, fm.Batch(x, y, counts=ragged)))
    cases.append((sine, fm.Batch(rand(3, 17, 2), rand(3, 17, 3), loss="l1")))
    cases.append((sine, fm.Batch(rand(3, 17, 2), rand(3, 17, 3, low=-1), loss=("l1", 0.3))))
    cases.append((fm.MLP(2, 1, 7, 3, "tanh", output="sigmoid"), ct_batch(3)))
    field = fm.MLP(3, 4, 7, 3, "tanh", encoding=fm.Encoding.frequencies(3, 2, 1.0))
    cases += [(field, ray_batch(3)), (field, ray_batch(2, last=1e10, white=False))]
    return cases


@pytest.mark.parametrize(("net", "batch"), loss_cases())
@pytest.mark.parametrize("shared", [False, True])
def test_loss_gradient_and_hessian_product(impl, net, batch, shared):
    T = batch.tasks
    params = parameters(net, T)[0 if shared else slice(None)].requires_grad_()
    rows = params.expand(T, -1)
    v = rand(T, net.num_params, seed=20, low=-1)
    want_loss, want_grad, want_hv = [], [], []
    for t in range(T):
        theta = rows[t].detach().requires_grad_()
        loss = plain_loss(net, theta, batch, t)
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        hv = torch.zeros_like(g)
        if g.requires_grad:
            (hv_,) = torch.autograd.grad(g, theta, v[t], allow_unused=True)
            hv = hv if hv_ is None else hv_
        want_loss.append(loss.detach())
        want_grad.append(g.detach())
        want_hv.append(hv)
    loss, grad = fm.loss_grad(net, params.detach(), batch, impl=impl)
    assert error(loss, torch.stack(want_loss)) < 1e-13
    assert error(grad, torch.stack(want_grad)) < 1e-11
    grad, hv = fm.loss_hvp(net, params.detach(), v, batch, impl=impl)
    assert error(grad, torch.stack(want_grad)) < 1e-11
    want = torch.stack(want_hv)
    assert error(hv, want) < 1e-10 or float((hv - want).norm()) < 1e-13


@pytest.mark.parametrize("memory", [0, 100_000, None])
def test_tiles_do_not_change_the_sum(impl, memory):
    """N beyond a tile, and rays that must stay whole; 1000 points of width 64 are four tiles at
    max_memory=0."""
    net = fm.siren(2, 3, 64, 3, 5.0)
    batch = fm.Batch(rand(3, 1000, 2), rand(3, 1000, 3))
    p = parameters(net, 3)
    got = fm.adapt(net, p, batch, 2, 1e-2, max_memory=memory, impl=impl)
    want = fm.adapt(net, p, batch, 2, 1e-2, max_memory=10**12, impl=impl)
    assert error(got.params, want.params) < 1e-13 and error(got.losses, want.losses) < 1e-13
    field = fm.MLP(3, 4, 32, 3, "tanh")
    rays = ray_batch(2, rays=100, samples=7)
    got = fm.adapt(field, parameters(field, 2), rays, 1, 1e-2, max_memory=memory, impl=impl)
    want = fm.adapt(field, parameters(field, 2), rays, 1, 1e-2, max_memory=10**12, impl=impl)
    assert error(got.params, want.params) < 1e-13


def test_one_task_is_the_same_alone_and_in_a_batch(impl):
    """No inner gradient depends on T."""
    net = fm.siren(2, 3, 9, 3, 5.0)
    batch = fm.Batch(rand(3, 20, 2), rand(3, 20, 3))
    p = parameters(net, 3)
    together = fm.adapt(net, p, batch, 3, 1e-2, impl=impl).params
    for t in range(3):
        alone = fm.adapt(net, p[t], batch.take(slice(t, t + 1)), 3, 1e-2, impl=impl).params
        assert error(alone, together[t : t + 1]) < 1e-14


def test_draws_are_the_named_ones(impl):
    """per_step with a seed equals a batch put together by hand from rng's numbers; another step is
    another draw."""
    from fastmeta import rng

    net = fm.siren(2, 3, 9, 3, 5.0)
    seed = torch.tensor([3, -7])
    counts = torch.tensor([11, 5])
    x, y = rand(2, 12, 2), rand(2, 12, 3)
    batch = fm.Batch(x, y, per_step=30, seed=seed, counts=counts)
    p = parameters(net, 2)
    index = rng.integers(seed, 30, counts, 4, rng.POINTS)
    assert bool((index < counts[:, None]).all())
    by_hand = fm.Batch(
        torch.stack([x[t, index[t]] for t in range(2)]),
        torch.stack([y[t, index[t]] for t in range(2)]),
    )
    got = fm.loss_grad(net, p, batch, step=4, impl=impl)
    want = fm.loss_grad(net, p, by_hand, impl=impl)
    assert error(got[0], want[0]) < 1e-14 and error(got[1], want[1]) < 1e-13
    assert error(fm.loss_grad(net, p, batch, step=5, impl=impl)[1], want[1]) > 1e-3


def test_ray_jitter_is_the_named_one(impl):
    from fastmeta import rng

    field = fm.MLP(3, 4, 8, 3, "tanh")
    seed = torch.tensor([5, 6])
    batch = ray_batch(2, seed=seed)
    p = parameters(field, 2)
    march, rays = batch.measure, batch.x
    near, far = rays.bounds
    t = near[:, None, None] + (far - near)[:, None, None] * torch.linspace(
        0, 1, march.samples, dtype=torch.float64
    )
    u = rng.uniform(seed, 5 * march.samples, 2, rng.JITTER, torch.float64).view(2, 5, -1)
    t = t + u * ((far - near) / march.samples)[:, None, None]
    x = rays.origins[:, :, None] + t[..., None] * rays.directions[:, :, None]
    raw = fm.mlp(field, p, x.flatten(1, 2), impl=impl).unflatten(1, t.shape[1:])
    rgb = fm.composite(raw, t, march, impl=impl)[0]
    want = ((rgb - batch.y) ** 2).mean((1, 2))
    assert error(fm.loss_grad(field, p, batch, step=2, impl=impl)[0], want) < 1e-13
    rendered = fm.render(field, p, rays, march, seed=seed, impl=impl)[0]
    still = fm.render(field, p, rays, march, impl=impl)[0]
    assert error(rendered, still) > 1e-4
    assert error(rendered, rgb) > 1e-4  # render draws step 0


def test_inputs_need_not_be_dense(impl):
    """Transposed coordinates, targets repeated by expand, columns of a wider matrix."""
    net = fm.siren(2, 3, 9, 3, 5.0)
    p = parameters(net, 2)
    x, y = rand(2, 2, 20).mT, rand(1, 20, 3).expand(2, -1, -1)
    for a, b in ((x, y), (rand(2, 20, 5)[..., 1:3], rand(2, 3, 20).mT), (rand(2, 20).mT, y)):
        batch, dense = fm.Batch(a, b), fm.Batch(a.contiguous(), b.contiguous())
        wide = torch.cat([p, p], 1)[:, : net.num_params]
        for got, want in zip(
            fm.loss_grad(net, wide, batch, impl=impl),
            fm.loss_grad(net, p, dense, impl=impl),
            strict=True,
        ):
            assert error(got, want) < 1e-15
        assert error(fm.mlp(net, wide, a, impl=impl), fm.mlp(net, p, dense.x, impl=impl)) < 1e-15


def test_detached_results_raise_when_a_gradient_is_asked_for(impl):
    net = fm.siren(2, 3, 9, 3, 5.0)
    batch = fm.Batch(rand(2, 8, 2), rand(2, 8, 3))
    p = parameters(net, 2)
    assert not fm.adapt(net, p, batch, 1, 1e-2, impl=impl).params.requires_grad
    q = p.clone().requires_grad_()
    for out in (
        fm.loss_grad(net, q, batch, impl=impl)[0],
        fm.loss_hvp(net, q, p, batch, impl=impl)[1],
        fm.adapt(net, q, batch, 1, 1e-2, impl=impl).params,
        fm.adapt(net, p, batch, 1, torch.tensor(1e-2).double().requires_grad_(), impl=impl).params,
    ):
        with pytest.raises(RuntimeError, match="no gradient flows through this op"):
            out.sum().backward()
    with torch.no_grad():
        assert not fm.adapt(net, q, batch, 1, 1e-2, impl=impl).params.requires_grad


# adapt ---


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adam", "meta_sgd"])
def test_adapt_is_torchs_optimiser_on_each_task(impl, rule):
    net = fm.siren(2, 3, 9, 3, 5.0, output_shift=0.5)
    batch = fm.Batch(rand(3, 21, 2), rand(3, 21, 3))
    p = parameters(net, 1)[0]
    named = {
        "nesterov": fm.rules.Momentum(0.8, nesterov=True, weight_decay=0.01),
        "momentum": fm.rules.Momentum(0.7),
    }
    got = fm.adapt(net, p, batch, 4, 3e-3, rule=named.get(rule, rule), keep=True, impl=impl)
    for t in range(3):
        theta = p.clone().requires_grad_()
        optimiser = {
            "sgd": lambda q: torch.optim.SGD(q, 3e-3),
            "meta_sgd": lambda q: torch.optim.SGD(q, 3e-3),
            "momentum": lambda q: torch.optim.SGD(q, 3e-3, momentum=0.7),
            "nesterov": lambda q: torch.optim.SGD(
                q, 3e-3, momentum=0.8, nesterov=True, weight_decay=0.01
            ),
            "adam": lambda q: torch.optim.Adam(q, 3e-3),
        }[rule]([theta])
        for k in range(4):
            assert error(got.trajectory[k, t], theta) < 1e-12
            loss = plain_loss(net, theta, batch, t)
            assert abs(float(got.losses[k, t] - loss.detach())) < 1e-13
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert error(got.params[t], theta) < 1e-12
    assert torch.equal(got.trajectory[-1], got.params)


def test_rates_broadcast(impl):
    net = fm.siren(2, 3, 5, 3, 5.0)
    batch = fm.Batch(rand(2, 8, 2), rand(2, 8, 3))
    p, P = parameters(net, 2), net.num_params
    full = rand(3, 2, P, seed=2, high=1e-2)
    for lr in (full[:1, :1, :1], full[0, 0], full[0, :, :1], full[:, :1, :1], full):
        got = fm.adapt(net, p, batch, 3, lr, impl=impl).params
        theta = p
        for k in range(3):
            theta = theta - lr.expand(3, 2, P)[k] * fm.loss_grad(net, theta, batch, impl=impl)[1]
        assert error(got, theta) < 1e-14
    with pytest.raises(
        ValueError, match=r"lr has shape \(4,\); accepted is what broadcasts to \[K,T,P\]"
    ):
        fm.adapt(net, p, batch, 3, torch.zeros(4).double(), impl=impl)
    assert torch.equal(fm.adapt(net, p, batch, 0, 1.0, impl=impl).params, p)
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="steps is"):
            fm.adapt(net, p, batch, bad, 1.0, impl=impl)


# composite, render, project ---


@pytest.mark.parametrize("density", ["relu", "softplus"])
@pytest.mark.parametrize(("last", "white"), [(1e-3, True), (1e10, False)])
def test_composite_gradcheck(impl, density, last, white):
    march = fm.March(5, last, white, density)
    raw = rand(3, 5, 4, seed=1, low=-1, high=2)
    # away from relu's kink, and with the last density off zero, where 1e10 makes a cliff
    raw[..., 3] = torch.where(raw[..., 3].abs() < 0.05, 0.3, raw[..., 3])
    raw[:, -1, 3] = torch.tensor([0.5, -0.5, 0.7]) if density == "relu" else 0.2
    t = torch.linspace(1, 2, 5).double().expand(3, 5) + rand(3, 5, seed=2, high=0.05)
    inputs = (raw.requires_grad_(), t.requires_grad_())
    if density == "softplus" and last == 1e10:
        inputs[0].data[:, -1, 3] = 5.0

    def f(a, b):
        return fm.composite(a, b, march, impl=impl)

    assert gradcheck(f, inputs, atol=1e-6)
    assert gradgradcheck(f, inputs, atol=1e-5)


def test_composite_by_hand_and_conventions(impl):
    raw = torch.zeros(1, 3, 4).double()
    raw[0, :, 3] = torch.tensor([0.0, 2.0, 50.0])
    raw[0, 1, :3] = torch.tensor([100.0, -100.0, 0.0])
    t = torch.tensor([[1.0, 2.0, 4.0]]).double()
    a1 = 1 - math.exp(-2 * 2.0)
    for last, white in ((1e-3, True), (1e10, False)):
        a2 = 1 - math.exp(-50.0 * last)
        w = torch.tensor([0.0, a1, (1 - a1) * a2], dtype=torch.float64)
        c = torch.sigmoid(raw[0, :, :3])
        rgb = (w[:, None] * c).sum(0) + (1 - w.sum() if white else 0)
        got = fm.composite(raw, t, fm.March(3, last, white), impl=impl)
        for x, y in zip(got, (rgb[None], (w * t[0]).sum()[None], w.sum()[None]), strict=True):
            assert error(x, y) < 1e-9  # the 1e-10 inside the clamp
    empty = raw.clone()
    empty[..., 3] = -1.0
    rgb, depth, acc = fm.composite(empty, t, fm.March(3), impl=impl)
    assert rgb.eq(1).all() and depth.eq(0).all() and acc.eq(0).all()
    assert fm.composite(empty, t, fm.March(3, white_background=False), impl=impl)[0].eq(0).all()


def test_dead_density_has_no_gradient_and_a_far_last_interval_no_nan(impl):
    march = fm.March(4, 1e10, False)
    raw = torch.zeros(2, 4, 4, dtype=torch.float32)
    raw[0, :, 3] = torch.tensor([0.0, 0.0, 0.0, 1e-10])
    raw[1, :, 3] = -1.0
    raw.requires_grad_()
    t = torch.linspace(1, 2, 4).expand(2, 4)
    rgb, _, acc = fm.composite(raw, t, march, impl=impl)
    (g,) = torch.autograd.grad(rgb.sum() + acc.sum(), raw, create_graph=True)
    assert g[1, :, 3].eq(0).all()
    assert g[0, -1, 3] > 1e9  # dα/dσ = 1e10 e^{-1}: float32 holds it
    (h,) = torch.autograd.grad(g[0, -1, 3], raw)
    assert torch.isfinite(h).all() and h.abs().max() > 1e18


def test_render_gradients(impl):
    net = fm.MLP(3, 4, 6, 3, "tanh")
    march = fm.March(4, density="softplus")
    o, d = rand(2, 3, 3, seed=1).requires_grad_(), rand(2, 3, 3, seed=2, low=-1).requires_grad_()
    p = parameters(net, 2).requires_grad_()

    def f(p, o, d):
        return fm.render(net, p, fm.Rays(o, d, 0.5, 2.0), march, impl=impl)

    assert gradcheck(f, (p, o, d), atol=1e-6)
    for bad in ([1, 2], torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(
            ValueError, match=r"render: seed is .*; accepted is an int64 tensor \[2\]"
        ):
            fm.render(net, p, fm.Rays(o, d, 0.5, 2.0), march, seed=bad, impl=impl)
    with pytest.raises(ValueError, match="the network is 2 -> 3; accepted is 3 -> 4"):
        fm.render(fm.siren(2, 3), p, fm.Rays(o, d, 0.5, 2.0), march, impl=impl)


def test_projector_on_an_image_of_ones(impl):
    """The paper's operator: 1 at θ = 0; at π/4 min 0.418, mean 0.828; at π/2 0.996."""
    ones = torch.ones(1, 256, 256, dtype=torch.float64)
    sino = fm.project(ones, torch.tensor([[0.0, math.pi / 4, math.pi / 2]]).double(), impl=impl)[0]
    assert sino[0].eq(1).all()
    assert (round(float(sino[1].min()), 3), round(float(sino[1].mean()), 3)) == (0.418, 0.828)
    assert round(float(sino[2].mean()), 3) == 0.996


def test_projector_is_linear_with_its_adjoint(impl):
    angles = rand(2, 5, high=math.pi)
    image, sino = rand(2, 11, 11, seed=1).requires_grad_(), rand(2, 5, 11, seed=2)
    out = fm.project(image, angles, impl=impl)
    (back,) = torch.autograd.grad(out, image, sino, create_graph=True)
    assert abs(float(((out * sino).sum() - (image * back).sum()).detach())) < 1e-12
    assert gradgradcheck(lambda q: fm.project(q, angles, impl=impl), (image,))
    at_zero = fm.project(image, torch.zeros(2, 1).double(), impl=impl)[:, 0]
    assert error(at_zero, image.detach().mean(1)) < 1e-15
    with pytest.raises(ValueError, match=r"image has shape \(2, 11, 10\)"):
        fm.project(image[..., :10], angles, impl=impl)
    with pytest.raises(ValueError, match="angles asks for a gradient"):
        fm.project(image, angles.clone().requires_grad_(), impl=impl)


def test_rounding_goes_away_from_zero(impl):
    """An index of exactly n + 1/2 rounds up, of −1/2 down to −1, which is outside."""
    from fastmeta.batch import nearest_pixels

    k = nearest_pixels(torch.tensor([[0.0, math.pi]]).double(), 4)[0]
    assert k[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    # at π, index 0 maps to 4 (outside), 1 to 3, 2 to 2, 3 to 1, up to the sine of π
    assert k[1].tolist() == [[-1, -1, -1, -1], [-1, 15, 14, 13], [-1, 11, 10, 9], [-1, 7, 6, 5]]


def test_reference_reads_padding_never(impl):
    """The reference's own draw puts zeros into padding before anything is computed from it."""
    x = torch.full((1, 3, 2), math.nan).double()
    x[0, 0] = 0.5
    batch = fm.Batch(x, x[..., :1], counts=torch.tensor([1]))
    sample = reference.draw(batch, 0)
    assert sample.x.tolist() == [
        [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]
    ] and sample.numbers.tolist() == [1.0]
