"""BatchedMLP: T networks as one module, against T networks of torch's own parts."""

import copy
import io
import pickle

import pytest
import torch
from helpers import error, generator, parameters, plain_mlp, rand
from torch.func import functional_call, stack_module_state

import fastmeta as fm
from fastmeta.nn import BatchedMLP

SIREN = fm.siren(2, 3, 7, 3, 5.0, 9.0, output_shift=0.5)
FOURIER = fm.fourier_mlp(2, 1, 9, 3, features=5, scale=3.0)
modes = pytest.mark.parametrize("per_task", [False, True], ids=["stacked", "per_task"])


def stacked(net=SIREN, tasks=3, **options):
    """(module, its weights [T,P]), float64."""
    weights = parameters(net, tasks)
    return BatchedMLP(net, tasks, init=weights, **options), weights


def plain(net, weights, x):
    """[T,N,C] of the networks one after the other."""
    xs = x.expand(len(weights), *x.shape[-2:])
    return torch.stack([plain_mlp(net, w, p) for w, p in zip(weights, xs, strict=True)])


class Layers(torch.nn.Module):
    """Linear layers under to_module's names, an encoding's tensors as buffers."""

    def __init__(self, net, row):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(i, o).double() for i, o in net.sizes)
        torch.nn.utils.vector_to_parameters(row, self.parameters())
        if net.encoding is not None:
            self.encoding = torch.nn.Module()
            self.encoding.register_buffer("B", net.encoding.B)
            self.encoding.register_buffer("phi", net.encoding.phi)


def sequential(seed: int, activation=torch.nn.Tanh, dtype=torch.float64):
    """What a user of torch has: 2 -> 6 -> 6 -> 1."""
    torch.manual_seed(seed)
    nn = torch.nn
    parts = [nn.Linear(2, 6), activation(), nn.Linear(6, 6), activation(), nn.Linear(6, 1)]
    return nn.Sequential(*parts).to(dtype)


# values ---


@modes
@pytest.mark.parametrize("net", [SIREN, FOURIER], ids=["siren", "fourier"])
@pytest.mark.parametrize("points", [(3, 11), (1, 11), (11,), (4, 3, 5), (2, 4, 1, 5)])
def test_values_with_shared_points_and_leading_axes(net, points, per_task):
    module, weights = stacked(net, per_task=per_task)
    x = rand(*points, 2, seed=3)
    wide = x.expand(*points[:-2], 3, points[-1], 2)  # [...,T,N,D]
    flat = wide.reshape(-1, 3, points[-1], 2)
    want = torch.stack([plain(net, weights, part) for part in flat]).view(*wide.shape[:-1], -1)
    got = module(x)
    assert got.shape == want.shape and error(got, want) < 1e-13


def test_params_in_place_of_its_own():
    module, _ = stacked()
    other = parameters(SIREN, 3, seed=9)
    x = rand(3, 11, 2, seed=3)
    want = plain(SIREN, other, x)
    assert error(module(x, params=other), want) < 1e-13
    named = {
        f"layers.{i}.{kind}": part
        for i, pair in enumerate(SIREN.layers(other))
        for kind, part in zip(("weight", "bias"), pair, strict=True)
    }
    assert error(module(x, params=named), want) < 1e-13
    reverse = dict(reversed(named.items()))  # a mapping has no order
    assert error(module(x, params=reverse), want) < 1e-13
    one = {name: part[0] for name, part in named.items()}
    assert error(module(x, params=one), plain(SIREN, other[:1].expand(3, -1), x)) < 1e-13
    assert module(x[0], params=one).shape == (11, 3)
    mixed = {**named, "layers.0.bias": named["layers.0.bias"][:1]}
    rows = other.clone()
    SIREN.layers(rows)[0][1][:] = other[:1, 14:21]
    assert error(module(x, params=mixed), plain(SIREN, rows, x)) < 1e-13


def test_weights_with_several_leading_axes():
    module, _ = stacked()
    many = parameters(SIREN, 6, seed=4).view(2, 3, -1)
    x = rand(3, 11, 2, seed=3)
    want = torch.stack([plain(SIREN, rows, x) for rows in many])
    got = module(x, params=many)
    assert got.shape == (2, 3, 11, 3) and error(got, want) < 1e-13
    with pytest.raises(ValueError, match=r"accepted are leading axes that broadcast"):
        module(rand(4, 11, 2), params=many)


@modes
def test_gradients_and_second_derivatives(per_task):
    module, weights = stacked(per_task=per_task)
    weights.requires_grad_()
    x = rand(3, 11, 2, seed=3).requires_grad_()
    own = list(module.parameters())
    first, second = [], []
    for y, leaves in ((module(x), own), (plain(SIREN, weights, x), [weights])):
        loss = y.square().mean((1, 2)).sum()
        grads = torch.autograd.grad(loss, [*leaves, x], create_graph=True)
        first.append(grads)
        curvature = sum(g.square().sum() for g in grads)
        second.append(torch.autograd.grad(curvature, [*leaves, x]))
    for mine, theirs in (first, second):
        *parts, gx = mine
        flat = (
            torch.stack(parts) if per_task else torch.cat([p.flatten(1) for p in parts], 1)
        )  # [T,P]
        assert error(flat, theirs[0]) < 1e-11 and error(gx, theirs[1]) < 1e-11


def test_a_loop_over_dictionaries_as_metasdf_and_gradncp_write_it():
    """One set repeated T times, K steps with create_graph; the meta-gradient is MAML's own."""
    net, steps, lr = SIREN, 2, 1e-2
    start = parameters(net, 1)[0]
    x, y = rand(3, 11, 2, seed=3), rand(3, 11, 3, seed=4)
    model = BatchedMLP(net, 1, init=start)
    params = {n: p[0][None].repeat(3, *[1] * (p.dim() - 1)) for n, p in model.named_parameters()}
    for _ in range(steps):
        loss = (model(x, params=params) - y).square().mean()
        grads = torch.autograd.grad(loss * 3, params.values(), create_graph=True)
        params = {n: p - lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
    loss = (model(x, params=params) - y).square().mean()
    loss.backward()
    maml = fm.MAML(net, steps, lr, init=start)
    expected = maml(fm.Batch(x, y))
    expected.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert error(loss, expected) < 1e-13 and error(got, maml.init.grad) < 1e-11


# the layout of stack_module_state ---


@modes
@pytest.mark.parametrize("net", [SIREN, FOURIER], ids=["siren", "fourier"])
def test_state_is_what_stack_module_state_gives_and_takes(net, per_task):
    module, weights = stacked(net, per_task=per_task)
    state = module.state_dict()
    theirs, buffers = stack_module_state([Layers(net, row) for row in weights])
    assert list(state) == list(theirs)
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)
    fresh = BatchedMLP(net, 3, init=parameters(net, 3, seed=7), per_task=per_task)
    fresh.load_state_dict({**theirs, **buffers})
    assert torch.equal(fresh.flat(), weights)
    one = fm.to_module(net, weights[0])
    one.load_state_dict({name: value[2] for name, value in state.items()}, strict=False)
    x = rand(11, 2)
    assert error(one(x), plain_mlp(net, weights[2], x)) < 1e-13


@modes
def test_sequentials_by_their_order(per_task):
    modules = [sequential(seed) for seed in range(3)]
    x = rand(3, 11, 2)
    want = torch.stack([m(p) for m, p in zip(modules, x, strict=True)])
    net = fm.MLP(2, 1, 6, 3, "tanh")
    module = BatchedMLP(net, 3, init=parameters(net, 3), per_task=per_task)
    module.load_state_dict(stack_module_state(modules)[0])
    assert error(module(x), want) < 1e-13
    assert error(BatchedMLP.from_modules(modules, per_task=per_task)(x), want) < 1e-13
    for part, module_t in zip(BatchedMLP.from_modules(modules).to_modules(), modules, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(part.parameters(), module_t.parameters(), strict=True)
        )


def test_vmap_users_code_gives_the_same():
    """stack_module_state, functional_call and vmap over torch's own modules."""
    modules = [sequential(seed) for seed in range(3)]
    params, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = rand(3, 11, 2)
    want = torch.vmap(lambda p, b, q: functional_call(base, (p, b), (q,)))(params, buffers, x)
    module = BatchedMLP.from_modules(modules)
    assert error(module(x), want) < 1e-13
    renamed = dict(zip(module.state_dict(), params.values(), strict=True))
    empty = BatchedMLP(module.net, 3, init=torch.zeros_like(module.flat().detach()))
    assert error(functional_call(empty, renamed, (x,)), want) < 1e-13


@modes
def test_what_does_not_load_is_reported(per_task):
    module, weights = stacked(per_task=per_task)
    before = weights.clone()
    for change, said in [
        (lambda s: s.pop("layers.1.bias"), "layers.1.bias|Missing"),
        (lambda s: s.update({"layers.3.bias": torch.zeros(3, 7)}), "layers.3.bias|[Uu]nexpected"),
        (lambda s: s.update({"layers.0.weight": torch.zeros(3, 7, 3)}), r"layers.0.weight"),
        (lambda s: s.update({"layers.0.weight": torch.zeros(2, 7, 2)}), r"layers.0.weight"),
        (lambda s: s.update({"encoding.B": torch.zeros(2, 5)}), "encoding.B is not that of"),
    ]:
        state = module.state_dict()
        change(state)
        with pytest.raises(RuntimeError, match=said):
            BatchedMLP(SIREN, 3, init=before, per_task=per_task).load_state_dict(state)
    other = BatchedMLP(FOURIER, 2, per_task=per_task)
    state = {**other.state_dict(), "encoding.B": FOURIER.encoding.B + 1}
    with pytest.raises(RuntimeError, match="encoding.B is not that of"):
        other.load_state_dict(state)


# what users of nn.Module do ---


@modes
def test_inside_another_module(per_task):
    outer = torch.nn.Module()
    outer.field, weights = stacked(per_task=per_task)
    outer.gain = torch.nn.Parameter(torch.ones(1))
    state = outer.state_dict()
    assert {"gain", "field.layers.0.weight", "field.layers.2.bias"} < set(state)
    again = copy.deepcopy(outer)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(state)
    assert torch.equal(again.field.flat(), weights) and again.gain == 1


@modes
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_are_equal_and_independent(way, per_task):
    module, weights = stacked(FOURIER, per_task=per_task)
    if way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = rand(3, 11, 2)
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        next(iter(module.parameters())).add_(1.0)
    assert torch.equal(other.flat(), weights)  # its own memory
    other.load_state_dict(module.state_dict())  # and its own hooks
    assert torch.equal(other.flat(), module.flat())


@modes
def test_dtypes(per_task):
    module, weights = stacked(per_task=per_task)
    x = rand(3, 11, 2)
    module.float()
    assert module(x.float()).dtype == torch.float32
    assert torch.equal(module.flat(), weights.float())
    with pytest.raises(ValueError, match="one dtype and one device"):
        module(x)
    module.half()
    with pytest.raises(TypeError, match="accepted is a float32 or float64 tensor"):
        module(x.float())


@modes
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_optimisers_step_every_task_as_if_alone(kind, per_task):
    module, weights = stacked(per_task=per_task)
    x, y = rand(3, 11, 2, seed=3), rand(3, 11, 3, seed=4)
    optimiser = getattr(torch.optim, kind)(module.parameters(), lr=1e-2)
    for _ in range(4):
        optimiser.zero_grad()
        (module(x) - y).square().mean((1, 2)).sum().backward()
        optimiser.step()
    for t in range(3):
        alone = weights[t].clone().requires_grad_()
        own = getattr(torch.optim, kind)([alone], lr=1e-2)
        for _ in range(4):
            own.zero_grad()
            (plain_mlp(SIREN, alone, x[t]) - y[t]).square().mean().backward()
            own.step()
        assert error(module.flat()[t], alone) < 1e-11


def test_a_rate_for_each_task():
    module, weights = stacked(per_task=True)
    x, y, rates = rand(3, 11, 2, seed=3), rand(3, 11, 3, seed=4), [1e-2, 0.0, 3e-3]
    optimiser = torch.optim.Adam(module.task_groups(rates))
    for _ in range(3):
        optimiser.zero_grad()
        (module(x) - y).square().mean((1, 2)).sum().backward()
        optimiser.step()
    assert torch.equal(module.flat()[1], weights[1])
    for t in (0, 2):
        alone = weights[t].clone().requires_grad_()
        own = torch.optim.Adam([alone], lr=rates[t])
        for _ in range(3):
            own.zero_grad()
            (plain_mlp(SIREN, alone, x[t]) - y[t]).square().mean().backward()
            own.step()
        assert error(module.flat()[t], alone) < 1e-11
    with pytest.raises(ValueError, match="accepted is a module made with per_task=True"):
        stacked()[0].task_groups(rates)
    with pytest.raises(ValueError, match="rates has 2 entries; accepted are 3"):
        module.task_groups(rates[:2])


def test_groups_by_layer():
    module, weights = stacked()
    optimiser = torch.optim.SGD(
        [
            {"params": module.layers[:-1].parameters(), "lr": 0.0},
            {"params": module.layers[-1].parameters(), "lr": 1e-2},
        ]
    )
    module(rand(11, 2)).square().mean().backward()
    optimiser.step()
    last = 3 * 7 + 3
    assert torch.equal(module.flat()[:, :-last], weights[:, :-last])
    assert not torch.equal(module.flat()[:, -last:], weights[:, -last:])


def test_distributed_data_parallel_of_one_process(tmp_path):
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch without gloo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module, _ = stacked()
        alone = copy.deepcopy(module)
        x = rand(3, 11, 2)
        wrapped = torch.nn.parallel.DistributedDataParallel(module)
        for one in (wrapped, alone):
            one(x).square().mean().backward()
        # freed after its group, with the interpreter's lock held, it can wait for gloo for ever
        del wrapped
    finally:
        dist.destroy_process_group()
    for a, b in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# one task, and many ---


@modes
def test_one_task_is_a_copy_of_torchs_own_parts(per_task):
    module, weights = stacked(FOURIER, per_task=per_task)
    assert len(module) == len(list(module)) == 3
    x = rand(11, 2)
    for index in (0, 2, -1):
        one = module[index]
        assert error(one(x), plain_mlp(FOURIER, weights[index], x)) < 1e-13
        net, row = fm.from_module(one)
        assert net == FOURIER and torch.equal(row, weights[index])
        with torch.no_grad():
            next(one.parameters()).zero_()
    assert torch.equal(module.flat(), weights)
    assert torch.equal(BatchedMLP.from_modules(module.to_modules()).flat(), weights)
    with pytest.raises(IndexError, match="task 3; accepted are 0 to 2"):
        module[3]
    with pytest.raises(TypeError, match="index is slice"):
        module[:2]


def test_starts():
    net = fm.siren(2, 3, 8, 3)
    drawn = BatchedMLP(net, 4, generator=generator(5)).flat()
    assert torch.equal(drawn, net.init(4, generator=generator(5)))
    row = net.init()[0]
    module = BatchedMLP(net, 4, init=row)
    assert torch.equal(module.flat(), row.expand(4, -1))
    module.layers[0].weight.data.zero_()
    assert row.abs().min() >= 0 and not (row[:16] == 0).all()  # copied


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: BatchedMLP("net", 3), "net is a str"),
        (lambda: BatchedMLP(SIREN, 0), "tasks is 0; accepted is an integer >= 1"),
        (lambda: BatchedMLP(SIREN, True), "tasks is True"),
        (lambda: BatchedMLP(SIREN, 3, init=torch.zeros(2, SIREN.num_params)), "2 rows for 3"),
        (lambda: BatchedMLP(SIREN, 3, init=torch.zeros(3, 5)), "init has 5 columns"),
        (
            lambda: BatchedMLP(SIREN, 1, init=SIREN.init(), generator=generator()),
            "accepted is one of the two",
        ),
        (lambda: stacked()[0](rand(2)), "accepted are"),
        (lambda: stacked()[0](rand(4, 5, 2)), "params has 3 tasks, x has 4"),
        (lambda: stacked()[0](rand(2, 4, 5, 2)), "4 in the task axis; accepted are 3 and 1"),
        (lambda: stacked()[0](rand(5, 3)), "x has 3 columns"),
        (lambda: stacked()[0](rand(5, 2), params=[1]), "params is list"),
        (lambda: stacked()[0](rand(5, 2), params={}), "'layers.0.bias' is missing"),
        (
            lambda: stacked()[0](
                rand(5, 2), params={**stacked()[0].state_dict(), "layers.9.bias": torch.zeros(1)}
            ),
            "'layers.9.bias' is unknown",
        ),
        (
            lambda: stacked()[0](
                rand(5, 2), params={**stacked()[0].state_dict(), "layers.0.bias": torch.zeros(3, 6)}
            ),
            r"'layers.0.bias'\] is \[3, 6\]; accepted is \[T,7\]",
        ),
        (lambda: BatchedMLP.from_modules([]), "modules is empty"),
        (
            lambda: BatchedMLP.from_modules([sequential(0), sequential(1, torch.nn.ReLU)]),
            "module 1 is MLP",
        ),
        (
            lambda: BatchedMLP.from_modules([sequential(0), sequential(1, dtype=torch.float32)]),
            "module 1 is torch.float32",
        ),
        (lambda: BatchedMLP.from_modules([torch.nn.Conv1d(1, 1, 1)]), "module is Conv1d"),
    ],
)
def test_refusals(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


@modes
def test_no_part_is_a_bare_module(per_task):
    """higher patches a module by a class of two bases, which nn.Module itself cannot be one of."""
    module, _ = stacked(per_task=per_task)
    assert all(type(part) is not torch.nn.Module for part in module.modules())
