"""One op, every transform: eager autograd, torch.func, forward mode, torch.compile, torch.library
and autocast give the numbers of plain torch, or raise."""

import copy
import pickle

import pytest
import torch
from helpers import IMPLS, error, parameters, plain_mlp, rand
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import fastmeta as fm
from fastmeta.ops import doors

NET = fm.siren(2, 3, 8, 3, 5.0)
CODED = fm.MLP(2, 3, 7, 3, "tanh", encoding=fm.Encoding.frequencies(2, 2, 1.0), output="softplus")
MARCH = fm.March(6, density="softplus")
ANGLES = rand(2, 3, seed=8, high=3.1)
FIELD = fm.MLP(3, 4, 7, 3, "tanh")

# float64 on both sides, a few hundred operations deep: 1e-12 is 4500 roundings.
CLOSE = 1e-12


def plain_rows(net):
    """The network of each row at its points, by ``plain_mlp``; one row of either serves all."""

    def f(p, x):
        T = max(p.shape[0], x.shape[0])
        p, x = p.expand(T, -1), x.expand(T, -1, -1)
        return torch.stack([plain_mlp(net, p[t], x[t]) for t in range(T)])

    return f


def plain_composite(raw, t):
    sigma = torch.nn.functional.softplus(raw[..., 3], threshold=1e9)
    last = torch.full_like(t[..., :1], MARCH.last_interval)
    alpha = 1 - torch.exp(-sigma * torch.cat([t[..., 1:] - t[..., :-1], last], -1))
    ones = torch.ones_like(alpha[..., :1])
    T = torch.cumprod(torch.cat([ones, (1 - alpha + 1e-10).clamp(max=1)], -1), -1)[..., :-1]
    w = T * alpha
    rgb = (w[..., None] * torch.sigmoid(raw[..., :3])).sum(-2) + 1 - w.sum(-1)[..., None]
    return rgb, (w * t).sum(-1), w.sum(-1)


def plain_project(image):
    k = fm.Project(ANGLES).pixels(6).long()
    flat = torch.cat([image.flatten(1), image.new_zeros(2, 1)], 1)
    return flat.gather(1, torch.where(k < 0, 36, k).flatten(1)).view(2, 3, 6, 6).mean(2)


def ops(impl):
    """name -> (the op, the same in plain torch, its inputs)."""
    points = rand(2, 5, 2, seed=1)
    image = rand(2, 6, 6, seed=4)

    def network(net, tasks):
        inputs = (parameters(net, tasks), points)
        return lambda p, x: fm.mlp(net, p, x, impl=impl), plain_rows(net), inputs

    return {
        "mlp": network(NET, 2),
        "mlp_encoded": network(CODED, 2),
        "mlp_one_row": network(NET, 1),
        "composite": (
            lambda raw, t: fm.composite(raw, t, MARCH, impl=impl),
            plain_composite,
            (rand(2, 3, 6, 4, seed=2, low=-1), rand(2, 3, 6, seed=3).sort(-1)[0]),
        ),
        "project": (lambda i: fm.project(i, ANGLES, impl=impl), plain_project, (image,)),
    }


NAMES = list(ops(None))
TWICE = [name for name in NAMES if name != "project"]  # project is linear: any order
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_op = pytest.mark.parametrize("name", NAMES)


def scalar(f):
    """A function of all outputs whose third derivative is not zero."""
    return lambda *a: sum((y**2).sum() + (y**3).sum() for y in tree_leaves(f(*a)))


def along(inputs):
    """A direction for each input, without torch's generator, which vmap does not take."""
    return tuple(
        torch.cos(torch.arange(a.numel(), dtype=a.dtype) + i).view(a.shape)
        for i, a in enumerate(inputs)
    )


def every(inputs):
    return tuple(range(len(inputs)))


def agree(got, want):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want) and len(got) > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < CLOSE or float((a - b).norm()) < 1e-12


def total(outputs):
    return sum((y**2).sum() for y in tree_leaves(outputs))


# torch.func ---


def all_grads(f, a):
    return grad(f, every(a))(*a)


FUNC = {
    "grad": lambda f, a: all_grads(scalar(f), a),
    "grad_of_grad": lambda f, a: all_grads(lambda *b: total(all_grads(scalar(f), b)), a),
    "vjp": lambda f, a: vjp(scalar(f), *a)[1](torch.tensor(0.7).double()),
    "jvp": lambda f, a: jvp(f, a, along(a)),
    "jvp_first_input": lambda f, a: jvp(lambda q: f(q, *a[1:]), a[:1], along(a)[:1]),
    "jvp_last_input": lambda f, a: jvp(lambda q: f(*a[:-1], q), a[-1:], along(a)[-1:]),
    "jvp_of_grad": lambda f, a: jvp(grad(scalar(f), every(a)), a, along(a)),
    "grad_of_jvp": lambda f, a: all_grads(lambda *b: total(jvp(f, b, along(a))[1]), a),
    "grad_in_the_tangent": lambda f, a: all_grads(lambda *u: total(jvp(f, a, u)[1]), along(a)),
    "jacrev": lambda f, a: jacrev(f, every(a))(*a),
    "jacfwd": lambda f, a: jacfwd(f, every(a))(*a),
    "hessian": lambda f, a: hessian(scalar(f), every(a))(*a),
    "jacrev_of_jacfwd": lambda f, a: jacrev(jacfwd(scalar(f)))(*a),
}


@every_impl
@every_op
@pytest.mark.parametrize("transform", FUNC)
def test_torch_func(impl, name, transform):
    f, plain, inputs = ops(impl)[name]
    agree(FUNC[transform](f, inputs), FUNC[transform](plain, inputs))


def stacked(inputs, axes):
    """Four of each input along its axis; None: one for all."""

    def four(a, d):
        return torch.stack([a + 0.01 * i * rand(*a.shape, seed=i) for i in range(4)], d)

    return tuple(a if d is None else four(a, d) for a, d in zip(inputs, axes, strict=True))


@every_impl
@every_op
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 2), (2, None)])
@pytest.mark.parametrize(
    "inner", ["value", "grad", "grad_of_grad", "jvp", "jvp_of_grad", "grad_of_jvp"]
)
def test_vmap_is_a_loop(impl, name, axes, inner):
    f, plain, inputs = ops(impl)[name]
    axes = axes[: len(inputs)]
    if axes == (None,):
        pytest.skip("nothing is vmapped")
    many = stacked(inputs, axes)

    def of(g):
        return g if inner == "value" else lambda *a: FUNC[inner](g, a)

    got = vmap(of(f), axes)(*many)
    one = [
        of(plain)(*[a if d is None else a.select(d, i) for a, d in zip(many, axes, strict=True)])
        for i in range(4)
    ]
    agree(got, [torch.stack(parts) for parts in zip(*map(tree_leaves, one), strict=True)])


@every_impl
@pytest.mark.parametrize("shared", ["params", "x"])
def test_vmap_sums_over_what_tasks_share_and_not_over_the_vmapped_axis(impl, shared):
    """T = 3 tasks share params or x within each of 4 vmapped calls."""
    p = parameters(NET, 1 if shared == "params" else 3)
    x = rand(4, 3 if shared == "params" else 1, 5, 2, seed=2)
    got = vmap(grad(scalar(lambda p, x: fm.mlp(NET, p, x, impl=impl)), (0, 1)), (None, 0))(p, x)
    want = [grad(scalar(plain_rows(NET)), (0, 1))(p, x[i]) for i in range(4)]
    agree(got, [torch.stack(parts) for parts in zip(*want, strict=True)])


@every_impl
def test_vmap_of_rays_with_common_times(impl):
    """One ray per call and one t for all of them: rows of raw that t has not."""
    raw, t = rand(5, 6, 4, low=-1), rand(6).sort()[0]
    got = vmap(lambda r: fm.composite(r, t, MARCH, impl=impl))(raw)
    agree(got, plain_composite(raw, t.expand(5, -1)))
    agree(
        vmap(vmap(lambda r: fm.composite(r, t, MARCH, impl=impl)))(raw[None]),
        [y[None] for y in got],
    )


@every_impl
def test_vmap_over_angles(impl):
    image, angles = rand(2, 6, 6), torch.stack([ANGLES, ANGLES + 0.5])
    got = vmap(lambda a: fm.project(image, a, impl=impl))(angles)
    agree(got, torch.stack([fm.project(image, a, impl="reference") for a in angles]))
    with pytest.raises(ValueError, match="angles asks for a gradient"):
        grad(lambda a: fm.project(image, a, impl=impl).sum())(ANGLES)
    with pytest.raises(RuntimeError, match="project: a tangent came for what has no derivative"):
        jvp(lambda a: fm.project(image, a, impl=impl), (ANGLES,), (ANGLES,))


@every_impl
def test_maml_as_torch_func_users_write_it(impl):
    """grad(vmap(inner loop)): 3 tasks, 2 exact second-order steps, one start."""
    x, y = rand(3, 7, 2), rand(3, 7, 3, seed=5)

    def meta_gradient(f):
        def task(p, x, y):
            def loss(p):
                return ((f(p, x) - y) ** 2).mean()

            for _ in range(2):
                p = p - 0.1 * grad(loss)(p)
            return loss(p)

        start = parameters(NET, 1)[0]
        return grad(lambda p: vmap(task, (None, 0, 0))(p, x, y).mean())(start)

    got = meta_gradient(lambda p, x: fm.mlp(NET, p, x, impl=impl))
    agree(got, meta_gradient(lambda p, x: plain_mlp(NET, p, x)))
    maml = fm.MAML(NET, 2, 0.1, init=parameters(NET, 1)[0], impl=impl)
    maml(fm.Batch(x, y)).backward()
    agree(got, maml.init.grad)


class Network(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.theta = torch.nn.Parameter(parameters(NET, 1)[0])

    def forward(self, x):
        return self.function(self.theta, x)


@every_impl
def test_functional_call(impl):
    ours = Network(lambda p, x: fm.mlp(NET, p, x, impl=impl))
    plain = Network(lambda p, x: plain_mlp(NET, p, x))
    many = {"theta": parameters(NET, 3, seed=4)}
    x = rand(5, 2)

    def gradients(module):
        def loss(p):
            return (functional_call(module, p, (x,)) ** 2).sum()

        return vmap(grad(loss))(many)

    agree(gradients(ours), gradients(plain))


@every_impl
@every_op
def test_forward_mode_without_torch_func(impl, name):
    """dual_level, over values computed in it and over a backward of values computed outside."""
    f, plain, inputs = ops(impl)[name]

    def tangents(g):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(a, u) for a, u in zip(inputs, along(inputs), strict=True)]
            return [forward_ad.unpack_dual(y).tangent for y in tree_leaves(g(*duals))]

    def backward_along(g):
        leaves = [a.clone().requires_grad_() for a in inputs]
        y = tree_leaves(g(*leaves))[0]
        with forward_ad.dual_level():
            c = forward_ad.make_dual(rand(*y.shape, seed=7), rand(*y.shape, seed=8))
            made = torch.autograd.grad(y, leaves, c)
            return [part for q in made for part in forward_ad.unpack_dual(q)]

    agree(tangents(f), tangents(plain))
    agree(backward_along(f), backward_along(plain))


@every_impl
@every_op
def test_against_differences_in_forward_mode(impl, name):
    """gradcheck's own: tangents, and tangents of gradients, against finite differences."""
    f, _, inputs = ops(impl)[name]
    leaves = [a.clone().requires_grad_() for a in inputs]
    assert gradcheck(f, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(f, leaves, check_fwd_over_rev=True, fast_mode=True)


@every_impl
@pytest.mark.parametrize("name", TWICE)
def test_what_two_passes_do_not_give_raises(impl, name):
    f, _, inputs = ops(impl)[name]
    g, (u, *_) = (lambda q: scalar(f)(q, *inputs[1:])), along(inputs)
    a = inputs[0]
    third = f"{name.split('_')[0]}: a third derivative was asked for"
    with pytest.raises(RuntimeError, match=third):
        grad(lambda q: total(grad(lambda r: total(grad(g)(r)))(q)))(a)
    with pytest.raises(RuntimeError, match=third):
        jvp(grad(lambda q: total(grad(g)(q))), (a,), (u,))
    with pytest.raises(RuntimeError, match="forward mode over forward mode was asked for"):
        jvp(lambda q: jvp(g, (q,), (u,))[1], (a,), (u,))


@every_impl
@every_op
def test_batches_of_cotangents_raise_with_the_way_out(impl, name):
    f, _, inputs = ops(impl)[name]
    leaves = [a.clone().requires_grad_() for a in inputs]
    y = tree_leaves(f(*leaves))[0]
    with pytest.raises(NotImplementedError, match="accepted are torch.func.vmap, jacrev"):
        torch.autograd.grad(y, leaves[0], rand(3, *y.shape), is_grads_batched=True)


@every_impl
def test_project_has_derivatives_of_any_order(impl):
    f, plain, inputs = ops(impl)["project"]

    def third(g):
        return grad(lambda q: total(grad(lambda r: total(grad(scalar(g))(r)))(q)))(*inputs)

    agree(third(f), third(plain))
    u = along(inputs)
    twice = [jvp(lambda q: jvp(scalar(g), (q,), u)[1], inputs, u) for g in (f, plain)]  # noqa: B023
    agree(*twice)


@every_impl
@every_op
def test_without_torchs_private_names(impl, name, monkeypatch):
    """Where a version of torch has no way to ask for transforms, every call takes their door."""
    monkeypatch.setattr(doors, "_functorch_active", None)
    monkeypatch.setattr(doors, "_legacy", None)
    f, plain, inputs = ops(impl)[name]
    agree(grad(scalar(f), every(inputs))(*inputs), grad(scalar(plain), every(inputs))(*inputs))
    agree(second_order(f, inputs), second_order(plain, inputs))


def second_order(f, inputs):
    leaves = [a.clone().requires_grad_() for a in inputs]
    first = torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=True)
    return first, torch.autograd.grad(total(first), leaves)


# torch.compile ---


@pytest.fixture
def fresh():
    """No graph of another test; autograd.grad may be traced."""
    torch._dynamo.reset()
    traced = getattr(torch._dynamo.config, "trace_autograd_ops", None)
    if traced is not None:
        torch._dynamo.config.trace_autograd_ops = True
    yield traced is not None
    if traced is not None:
        torch._dynamo.config.trace_autograd_ops = traced
    torch._dynamo.reset()


def compiled(f, backend="aot_eager"):
    return torch.compile(f, fullgraph=True, backend=backend)


def first_order(f, inputs):
    leaves = [a.clone().requires_grad_() for a in inputs]
    y = f(*leaves)
    return y, torch.autograd.grad(scalar(lambda: y)(), leaves)


@every_impl
@every_op
def test_compiled_forward_and_backward(impl, name, fresh):
    f, plain, inputs = ops(impl)[name]
    agree(first_order(compiled(f), inputs), first_order(plain, inputs))
    agree(compiled(f)(*inputs), plain(*inputs))  # no gradient


@every_impl
@every_op
def test_gradients_taken_within_the_graph_are_exact_to_second_order(impl, name, fresh):
    """autograd.grad(create_graph=True) inside, backward outside: no silent first order."""
    if not fresh:
        pytest.skip("this torch does not trace autograd.grad")
    f, plain, inputs = ops(impl)[name]

    def step(g):
        def run(*a):
            made = torch.autograd.grad(scalar(g)(*a), a, create_graph=True)
            return total(g(*[q - 0.01 * d for q, d in zip(a, made, strict=True)]))

        return run

    leaves = [a.clone().requires_grad_() for a in inputs]
    got, want = compiled(step(f))(*leaves), step(plain)(*leaves)
    agree(got, want)
    agree(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("name", TWICE)
def test_compiled_third_derivatives_raise(name, fresh):
    if not fresh:
        pytest.skip("this torch does not trace autograd.grad")
    f, _, inputs = ops("reference")[name]
    a = inputs[0].clone().requires_grad_()

    def run(q):
        (g,) = torch.autograd.grad(scalar(f)(q, *inputs[1:]), q, create_graph=True)
        (h,) = torch.autograd.grad(total(g), q, create_graph=True)
        return total(h)

    with pytest.raises(Exception, match="a third derivative was asked for"):
        compiled(run)(a).backward()


@every_op
def test_second_derivatives_of_a_compiled_result_raise(name, fresh):
    """torch has none for any op: loud, not first order."""
    f, _, inputs = ops("reference")[name]
    leaves = [a.clone().requires_grad_() for a in inputs]
    made = torch.autograd.grad(scalar(compiled(f))(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        total(made).backward()


@every_op
def test_torch_func_within_a_graph_raises_or_is_right(name, fresh):
    f, plain, inputs = ops("reference")[name]
    a, rest, u = inputs[0], inputs[1:], along(inputs)[0]
    with pytest.raises(Exception, match="a forward-mode tangent reached"):
        compiled(lambda q: jvp(lambda r: f(r, *rest), (q,), (u,))[1])(a)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a torch.func gradient reached"):
        compiled(lambda q: grad(lambda r: scalar(f)(r, *rest))(q))(a)
    torch._dynamo.reset()
    (many,) = stacked((a,), (0,))
    got = compiled(lambda m: vmap(lambda q: f(q, *rest))(m))(many)
    want = [plain(q, *rest) for q in many]
    agree(got, [torch.stack(parts) for parts in zip(*map(tree_leaves, want), strict=True)])


@every_op
@pytest.mark.filterwarnings("ignore:Dynamo")  # after a break it looks into the frames below
@pytest.mark.parametrize("transform", ["grad", "jvp_first_input", "jvp_of_grad"])
def test_torch_func_around_a_graph_break_is_right(name, transform, fresh):
    f, plain, inputs = ops("reference")[name]
    run = torch.compile(lambda *a: FUNC[transform](f, a), backend="aot_eager")
    agree(run(*inputs), FUNC[transform](plain, inputs))


@every_op
def test_tangents_into_a_compiled_function_raise(name, fresh):
    f, _, inputs = ops("reference")[name]
    a, *rest = inputs
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="a forward-mode tangent"),
    ):
        compiled(f)(forward_ad.make_dual(a, a), *rest)


@pytest.mark.slow
@every_impl
@every_op
def test_inductor(impl, name, fresh):
    f, plain, inputs = ops(impl)[name]
    agree(first_order(compiled(f, "inductor"), inputs), first_order(plain, inputs))


@every_impl
def test_detached_results_have_no_silent_tangents(impl):
    p, batch = parameters(NET, 2), fm.Batch(rand(2, 5, 2), rand(2, 5, 3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p, p)
        for call in (
            lambda: fm.loss_grad(NET, dual, batch, impl=impl),
            lambda: fm.loss_hvp(NET, p, dual, batch, impl=impl),
            lambda: fm.adapt(NET, dual, batch, 1, 0.1, impl=impl),
        ):
            with pytest.raises(RuntimeError, match="no gradient flows through this op"):
                call()


@pytest.mark.parametrize("name", ["mlp", "composite", "project"])
def test_operators_refuse_what_they_would_lose(name):
    """Forward mode over a custom operator of torch is zero without a word; over ours it raises."""
    a, run = {
        "mlp": (parameters(NET, 2), lambda q, op: op(q, rand(2, 5, 2), NET.key, None, None)),
        "composite": (rand(3, 6, 4), lambda q, op: op(q, rand(3, 6), MARCH.key, None, None)),
        "project": (rand(2, 6, 6), lambda q, op: op(ANGLES, q, None, None)),
    }[name]
    op = getattr(torch.ops.fastmeta, name)
    with pytest.raises(NotImplementedError, match="a forward-mode tangent reached"):
        jvp(lambda q: run(q, op), (a,), (a,))
    with pytest.raises(NotImplementedError, match="a torch.func gradient reached"):
        grad(lambda q: total(run(q, op)))(a)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="a forward-mode tangent"),
    ):
        run(forward_ad.make_dual(a, a), op)


@every_impl
def test_compiled_render_and_networks_told_apart(impl, fresh):
    """One compiled function, several networks of one size: a graph belongs to one specification."""
    p = parameters(FIELD, 2)
    rays = fm.Rays(rand(2, 3, 3, low=-0.3, high=0.3), rand(2, 3, 3, seed=1, low=-1), 0.5, 2.0)
    seed = torch.tensor([3, 4])
    run = compiled(lambda q, r, s: fm.render(FIELD, q, r, MARCH, seed=s, impl=impl))
    for s in (None, seed):
        agree(run(p, rays, s), fm.render(FIELD, p, rays, MARCH, seed=s, impl="reference"))
    other = fm.siren(2, 3, 8, 3, 9.0)
    run = compiled(lambda net, q, x: fm.mlp(net, q, x, impl=impl))
    q = parameters(NET, 2)
    for points in (5, 6, 7):  # the third size makes the axis dynamic
        x = rand(2, points, 2)
        for net in (NET, other):
            agree(run(net, q, x), plain_rows(net)(q, x))
        agree(run(NET, q[0], x[0]), plain_mlp(NET, q[0], x[0]))


@every_impl
def test_render_under_torch_func(impl):
    p = parameters(FIELD, 2)
    o, d = rand(2, 3, 3, low=-0.3, high=0.3), rand(2, 3, 3, seed=1, low=-1)

    def ours(p, o, d):
        return fm.render(FIELD, p, fm.Rays(o, d, 0.5, 2.0), MARCH, impl=impl)

    def plain(p, o, d):
        t = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).expand(2, 3, 6)
        x = o[:, :, None] + t[..., None] * d[:, :, None]
        return plain_composite(plain_rows(FIELD)(p, x.flatten(1, 2)).unflatten(1, (3, 6)), t)

    for transform in ("grad", "grad_of_grad", "jvp", "jvp_of_grad"):
        agree(FUNC[transform](ours, (p, o, d)), FUNC[transform](plain, (p, o, d)))
    many = torch.stack([p, 1.1 * p, 0.9 * p])
    got = vmap(grad(scalar(lambda q: ours(q, o, d))))(many)
    agree(got, torch.stack([grad(scalar(lambda q: plain(q, o, d)))(q) for q in many]))


def test_a_compiled_call_keeps_the_dispatchers_word(fresh):
    p, x = parameters(NET, 1), rand(1, 4, 2)
    with pytest.raises(ValueError, match="impl is 'gpu'; accepted are"):
        compiled(lambda p, x: fm.mlp(NET, p, x, impl="gpu"))(p, x)
    with pytest.raises(ValueError, match="impl='reference' cannot run this case"):
        compiled(lambda p, x: fm.mlp(NET, p, x, impl="reference", precision="bf16"))(p, x)
    with pytest.raises(Exception, match="x has 3 columns, net.in_features is 2"):
        compiled(lambda p, x: fm.mlp(NET, p, x))(p, rand(1, 4, 3))


@every_impl
def test_traced_graphs_hold_the_operator(impl):
    """make_fx sees one operator; a kernel called behind its back would leave an empty tensor."""
    from torch.fx.experimental.proxy_tensor import make_fx

    p, x = parameters(NET, 2), rand(2, 5, 2)
    graph = make_fx(lambda p, x: fm.mlp(NET, p, x, impl=impl))(p, x)
    agree(graph(2 * p, x), plain_rows(NET)(2 * p, x))


# torch.library ---


def operator_cases():
    p, x, gy = parameters(NET, 2), rand(2, 5, 2), rand(2, 5, 3, low=-1)
    raw, t = rand(4, 6, 4, low=-1), rand(4, 6).sort(-1)[0]
    shown = (rand(4, 3), rand(4), rand(4))
    net, march = (NET.key, None, None), (MARCH.key, None, None)
    sinogram = rand(2, 3, 6)
    return [
        ("mlp", (p, x, *net)),
        ("mlp", (parameters(CODED, 1), x, CODED.key, None, None)),
        ("mlp_grad", (p, x, gy, [True, True], *net)),
        ("mlp_grad", (p, x, gy, [True, False], *net)),
        ("mlp_grad", (p, x[:1], gy, [False, True], *net)),
        ("mlp_dual", (p, x, p, None, gy, *net)),
        ("mlp_dual", (p, x, None, x, gy, *net)),
        ("composite", (raw, t, *march)),
        ("composite_grad", (raw, t, *shown, [True, True], *march)),
        ("composite_dual", (raw, t, raw, None, *shown, *march)),
        ("project", (ANGLES, rand(2, 6, 6), None, None)),
        ("project_adjoint", (ANGLES, sinogram, None, None)),
    ]


@every_impl
@pytest.mark.parametrize(("name", "args"), operator_cases())
def test_opcheck(impl, name, args):
    """Schema, registration, fakes and traced derivatives; the dual pass has no derivative to
    trace."""
    asks = not name.endswith("_dual")
    args = tuple(
        a.clone().requires_grad_(asks) if isinstance(a, torch.Tensor) and a is not ANGLES else a
        for a in args
    )
    torch.library.opcheck(getattr(torch.ops.fastmeta, name), (*args[:-2], impl, None))


# Autocast ---


@every_impl
@pytest.mark.parametrize("compiling", [False, True])
def test_autocast_computes_in_float32_and_takes_half(impl, compiling, fresh):
    """The op's numbers are the same inside; half tensors, as torch's layers return there, are cast,
    and their gradients come back in half. Outside they are refused."""
    p, x = parameters(NET, 2).float(), rand(2, 5, 2).float()

    def f(p, x):
        return fm.mlp(NET, p, x, impl=impl)

    run = compiled(f) if compiling else f
    half = x.bfloat16().requires_grad_()
    want = f(p, half.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(p, x), f(p, x)) and run(p, x).dtype == torch.float32
        y = run(p, half)
    assert torch.equal(y, want)
    (gx,) = torch.autograd.grad((y**2).sum(), half)
    exact = half.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad((f(p, exact) ** 2).sum(), exact)
    assert gx.dtype == torch.bfloat16 and torch.equal(gx, wanted.bfloat16())
    with pytest.raises(TypeError, match="x is torch.bfloat16; accepted is a float32 or float64"):
        f(p, half)


@every_impl
def test_autocast_for_composite_and_project(impl):
    raw, t, image = rand(3, 6, 4), rand(3, 6).sort(-1)[0], rand(2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = fm.composite(raw.bfloat16(), t.float(), MARCH, impl=impl)
        sinogram = fm.project(image.bfloat16(), ANGLES, impl=impl)
    want = fm.composite(raw.bfloat16().float(), t.float(), MARCH, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(sinogram, fm.project(image.bfloat16().float(), ANGLES, impl=impl))


# Specifications as strings ---


@pytest.mark.parametrize(
    "net", [NET, CODED, fm.nerf_mlp(8, 3), fm.fourier_mlp(2, 1, 8, 3, features=4)]
)
def test_a_network_is_its_key(net):
    assert fm.MLP.from_key(net.key) == net and hash(fm.MLP.from_key(net.key)) == hash(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.copy(net)):
        assert twin == net and twin.key == net.key and twin.num_params == net.num_params
    other = fm.MLP(2, 3, 8, 3, "sine", 5.5)
    assert other.key != net.key and other != net


def test_a_march_is_its_key():
    assert fm.March.from_key(MARCH.key) == MARCH
    assert fm.March(6, density="softplus", last_interval=1e10).key != MARCH.key


def test_another_process_finds_the_encoding(tmp_path):
    """A pickled network brings its encoding, so that its key can be read where it was not made."""
    import subprocess
    import sys

    (tmp_path / "net").write_bytes(pickle.dumps(CODED))
    code = (
        "import pickle, sys, fastmeta as fm\n"
        "net = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert fm.MLP.from_key(sys.argv[2]) == net\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "net"), CODED.key], check=True)
