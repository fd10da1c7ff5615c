"""The Triton worker under its interpreter: roundings, tails, chunks, repeated bits, captured loops.

Values in float64 are compared with ``fastmeta.reference``; every precision with
``rounded_triton.py``, which rounds where the kernels round. The interpreter is chosen when triton
is imported, so these tests need TRITON_INTERPRET=1.
"""

import contextlib
import inspect
import math
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import error, generator, parameters, rand
from rounded_triton import Rounding, rounded

import fastmeta as fm
from fastmeta import reference
from fastmeta.batch import LOSSES
from fastmeta.ops import dispatch
from fastmeta.rules import RULES, SGD, Adam, Momentum
from fastmeta.tasks.text import text_images

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip(
        "kernels run without a GPU under Triton's interpreter only: set TRITON_INTERPRET=1",
        allow_module_level=True,
    )
pytest.importorskip("triton")

import triton
import triton.language as tl

import fastmeta.triton as worker
from fastmeta.triton import activation, graph, mlp, number, plan
from fastmeta.triton.launch import recording
from fastmeta.triton.passes import Passes
from fastmeta.triton.plan import Constants

# numbers beyond a branch's range overflow in the branch that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MODES = ("fp32", "tf32", "fp16", "bf16")
EPS32 = 2.0**-23


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN: what a kernel forgets to write, or reads before it wrote, shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "streamed"])
def family(request, monkeypatch):
    """Small networks by the resident kernels, and as if they were wide."""
    if request.param == "streamed":
        monkeypatch.setattr(plan, "resident_tile", lambda c, dual: None)


# The border ---


def test_both_sides_list_the_same():
    assert activation.ACTIVATIONS == fm.spec.ACTIVATIONS
    assert dispatch.PRECISIONS == worker.PRECISIONS == MODES
    assert tuple(plan.OPERANDS) == MODES
    assert set(RULES) == {"sgd", "momentum", "adam", "meta_sgd"}  # the branches of step.advance
    assert LOSSES == ("mse", "l1")  # those of loss.loss_slope


def test_passes_have_the_references_signatures():
    names = [n for n, f in vars(Passes).items() if callable(f) and n[0] != "_"]
    assert len(names) == 13
    for name in names:
        mine = list(inspect.signature(getattr(Passes, name)).parameters)[1:]
        ours = inspect.signature(inspect.unwrap(getattr(reference, name))).parameters
        if mine != ["args", "kwargs"]:  # composite and project, behind a decorator
            assert mine == [n for n in ours if n in mine], name
            assert all(
                ours[n].default is not inspect.Parameter.empty for n in set(ours) - set(mine)
            )


def case(**changes):
    made = dict(op="mlp", dtype=torch.float32, device="cuda", net=fm.siren(2, 3, 64, 3))
    return dispatch.Case(**{**made, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"precision": "fp16"}, None),
        ({"device": "cpu"}, "device cpu (cuda only)"),
        ({"dtype": torch.float64}, "dtype torch.float64 (float32 only)"),
        ({"net": fm.siren(2, 3, 512, 3)}, None),
        ({"net": fm.siren(2, 3, 513, 3)}, "width 513 (512 at most)"),
        ({"net": fm.siren(2, 64, 32, 3)}, None),
        ({"net": fm.siren(2, 65, 32, 3)}, "65 outputs (64 at most)"),
    ],
)
def test_objections_on_a_gpu(monkeypatch, changes, reason):
    monkeypatch.setattr(worker, "INTERPRETED", False)
    assert worker.objections(case(**changes)) == ([reason] if reason else [])


def test_old_gpus_and_old_tritons_are_named(monkeypatch):
    monkeypatch.setattr(worker, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker.unavailable().startswith("no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert worker.unavailable() is None
    assert worker.objections(case()) == ["compute capability 7.5 (8.0 or newer)"]
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert worker.unavailable() == "triton is 3.3.1, accepted is 3.4 or newer"


def test_refusals_reach_the_user():
    net = fm.siren(2, 3, 520, 2)
    p, x = torch.zeros(net.num_params), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this case.*width 520 \(512"):
        fm.mlp(net, p, x, impl="triton")
    net = fm.siren(2, 3, 8, 2)
    p = torch.zeros(net.num_params)
    with pytest.raises(ValueError, match="precision 'bf16' of float64 tensors"):
        fm.mlp(net, p.double(), x.double(), impl="triton", precision="bf16")


# Shapes, in float64 against the reference ---


def agrees(net, tasks, points, *, x_too=True, seed=0):
    """Values, gradients and duals of one shape in float64."""
    p = parameters(net, tasks, seed)
    x = rand(tasks, points, net.in_features, seed=seed + 3)
    y = rand(tasks, points, net.out_features, seed=seed + 4)
    v = rand(*p.shape, seed=seed + 5, low=-1)
    passes, batch = Passes("fp32"), fm.Batch(x, y)
    pairs = [
        ((passes.mlp(net, p, x),), (reference.mlp(net, p, x),)),
        ((passes.loss(net, p, batch),), (reference.loss(net, p, batch),)),
        (passes.loss_grad(net, p, batch), reference.loss_grad(net, p, batch)),
        (passes.loss_hvp(net, p, v, batch), reference.loss_hvp(net, p, v, batch)),
    ]
    if x_too:
        w = rand(*x.shape, seed=seed + 6, low=-1)
        pairs += [
            (passes.mlp_grad(net, p, x, y), reference.mlp_grad(net, p, x, y)),
            (passes.mlp_dual(net, p, x, v, w, y), reference.mlp_dual(net, p, x, v, w, y)),
        ]
    for got, want in pairs:
        for a, b in zip(got, want, strict=True):
            # float64: 1e-16 times the square root of the number of terms, and what cancels
            assert a.shape == b.shape and error(a, b) < 1e-12


@pytest.mark.parametrize("width", [16, 40, 64, 100, 128, 256, 300, 512])
def test_widths(width):
    agrees(fm.siren(2, 3, width, 3, 5.0), 1, 3, x_too=width in (16, 100, 300))


@pytest.mark.parametrize("depth", [2, 3, 16])
def test_depths(depth):
    agrees(fm.siren(2, 3, 12, depth, 3.0, 5.0), 2, 5)


@pytest.mark.parametrize("points", [1, 15, 17, 63, 65, 130])
def test_tails_of_points(points, family):
    agrees(fm.MLP(2, 3, 8, 3, "tanh"), 2, points, x_too=points == 65)


@pytest.mark.parametrize("tasks", [1, 3, 64])
def test_tasks(tasks):
    agrees(fm.MLP(2, 1, 9, 3, "gelu"), tasks, 2, x_too=tasks == 3)


@pytest.mark.parametrize("outputs", [1, 16, 17, 64])
def test_outputs(outputs):
    agrees(fm.MLP(3, outputs, 20, 3, "softplus", output="sigmoid"), 2, 7)


@pytest.mark.parametrize("coordinates", [1, 4, 5])
def test_coordinates(coordinates):
    """Five coordinates are features of themselves."""
    agrees(fm.siren(coordinates, 2, 20, 3, 4.0), 2, 7)


def test_features_of_any_number():
    ladder = fm.Encoding.frequencies(3, 5, 3.0, include_input=True)  # 33 features
    agrees(fm.MLP(3, 4, 20, 3, "silu", encoding=ladder), 2, 9)
    agrees(fm.fourier_mlp(2, 1, 20, 3, features=70, scale=2.0), 2, 9)


# Sharing, chunks, bits ---


def test_what_tasks_share_is_read_as_if_each_had_its_own(family):
    net = fm.siren(2, 3, 16, 3, 5.0)
    p, x, gy = parameters(net, 3).float(), rand(3, 20, 2).float(), rand(3, 20, 3, seed=1).float()
    v, passes = parameters(net, 3, 5).float(), Passes("bf16")
    for params, where in ((p[:1], x), (p, x[:1]), (p[:1], x[:1])):
        own, each = params.expand(3, -1).contiguous(), where.expand(3, -1, -1).contiguous()
        few, many = fm.Batch(where if len(where) > 1 else where[0], gy), fm.Batch(each, gy)
        got = (*passes.loss_grad(net, params, few), *passes.loss_hvp(net, params, v, few))
        want = (*passes.loss_grad(net, own, many), *passes.loss_hvp(net, own, v, many))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for params, where in ((p[:1], x), (p, x[:1])):  # sums over tasks of what is shared
        own, each = params.expand(3, -1).contiguous(), where.expand(3, -1, -1).contiguous()
        got = passes.mlp_grad(net, params, where, gy)
        for a, b in zip(got, passes.mlp_grad(net, own, each, gy), strict=True):
            b = b if a.shape == b.shape else b.sum(0, keepdim=True)
            assert a.shape == b.shape and error(a, b) < 4 * EPS32


def ragged(tasks=3, points=40, dtype=torch.float32):
    counts = torch.tensor([points, 1, points - 5])[:tasks]
    x, y = rand(tasks, points, 2).to(dtype), rand(tasks, points, 3, seed=1).to(dtype)
    padding = torch.arange(points) >= counts[:, None]
    x[padding], y[padding] = math.nan, math.nan
    return fm.Batch(x, y, counts=counts)


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_padding_is_never_read(family, mode):
    """NaN there; and each task as it is alone without padding."""
    net = fm.siren(2, 3, 16, 3, 5.0)
    batch, p = ragged(), parameters(net, 3).float()
    v = parameters(net, 3, 5).float()
    passes = Passes(mode)
    got = (*passes.loss_grad(net, p, batch), passes.loss_hvp(net, p, v, batch)[1])
    for t in range(3):
        n = int(batch.counts[t])
        alone = fm.Batch(batch.x[t : t + 1, :n], batch.y[t : t + 1, :n])
        ts = slice(t, t + 1)
        want = (*passes.loss_grad(net, p[ts], alone), passes.loss_hvp(net, p[ts], v[ts], alone)[1])
        for a, b in zip(got, want, strict=True):
            assert error(a[ts], b) < 4 * EPS32


@pytest.mark.parametrize("rule", [SGD(), Momentum(0.8), Adam()], ids=lambda r: r.name)
def test_chunks_and_repetitions_give_the_same_bits(family, rule):
    """Whatever max_memory is; and every time."""
    net = fm.siren(2, 3, 8, 3, 5.0)
    batch, p = ragged(), parameters(net, 3)[0].float()
    lr = (1e-3 * rand(2, 3, net.num_params, seed=8)).float()  # for each step, task, parameter

    def run(memory):
        made = fm.adapt(
            net, p, batch, 2, lr, rule=rule, keep=True, max_memory=memory, impl="triton"
        )
        meta = Passes("fp32").maml(net, p[None], batch, lr, rule, order=2, max_memory=memory)
        return made.params, made.losses, made.trajectory, meta[0], meta[1]

    with torch.no_grad():
        whole = run(None)
        for memory in (None, 0):
            *exact, total = run(memory)
            assert all(torch.equal(a, b) for a, b in zip(exact, whole[:4], strict=True))
            # a sum over tasks, chunk by chunk
            limit = 0.0 if memory is None else 4 * EPS32
            assert error(total, whole[4]) <= limit
    for t in range(3):  # rates of each task's own
        alone = batch.take(slice(t, t + 1))
        got = fm.adapt(net, p, alone, 2, lr[:, t : t + 1], rule=rule, impl="triton")
        assert torch.equal(got.params[0], whole[0][t])


# Roundings ---


def as_good(got, plain, truth):
    """At most twice the error of the reference's own float32, plus a rounding of each number."""
    ours, theirs = (float((v.double() - truth).norm()) for v in (got, plain))
    assert torch.isfinite(got).all()
    assert ours <= 2 * theirs + EPS32 * float(truth.norm()), f"error {ours:.3g}, plain {theirs:.3g}"


@pytest.mark.parametrize(
    "net",
    [
        fm.siren(2, 3, 24, 4, 30.0),
        fm.siren(2, 3, 70, 4, 30.0),
        fm.MLP(2, 3, 24, 4, "relu", encoding=fm.Encoding.frequencies(2, 4, 3.0)),
        fm.MLP(2, 3, 24, 8, "tanh"),
    ],
    ids=lambda n: f"{n.activation}{n.width}",
)
def test_without_a_precision_the_error_is_that_of_float32(net):
    p, x, y = parameters(net, 2).float(), rand(2, 70, 2).float(), rand(2, 70, 3, seed=1).float()
    v = rand(*p.shape, seed=2, low=-1).float()
    results = []
    for passes, cast in ((worker.at(None), None), (reference, None), (reference, torch.float64)):
        q, xs, ys, u = (a if cast is None else a.to(cast) for a in (p, x, y, v))
        batch = fm.Batch(xs, ys)
        results.append((*passes.loss_grad(net, q, batch), passes.loss_hvp(net, q, u, batch)[1]))
    for got, plain, truth in zip(*results, strict=True):
        as_good(got, plain, truth)


def test_operands_round_to_nearest_even():
    for dtype, mode in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        a = torch.randn(1000, generator=generator()) * 10
        a[:3] = torch.tensor([1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-8])  # between two
        assert torch.equal(rounded(a.double(), mode).float(), a.to(dtype).float())
        assert torch.equal(_rounded_in_kernel(a, mode), a.to(dtype).float())
    a = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 1 + 5 * 2.0**-12, 0.0])
    a = torch.cat([a, torch.randn(1000, generator=generator())])
    want = torch.tensor([1.0, 1 + 2.0**-9, -1.0, 1 + 2.0**-10, 0.0])
    assert torch.equal(rounded(a.double(), "tf32")[:5].float(), want)
    assert torch.equal(_rounded_in_kernel(a, "tf32"), rounded(a.double(), "tf32").float())


@triton.jit
def _round(a, out, n, MODE: tl.constexpr):
    i = tl.arange(0, 2048)
    v = number.operand(tl.load(a + i, mask=i < n), MODE)
    tl.store(out + i, v.to(tl.float32), mask=i < n)


def _rounded_in_kernel(a, mode):
    out = torch.empty_like(a)
    _round[(1,)](a, out, len(a), MODE=mode)
    return out


def text(points, tasks=1):
    """Pixels of a rendered text, which the start that comes with the package was trained on."""
    net, init = fm.load_init(
        os.path.join(os.path.dirname(fm.__file__), "starts/text64.safetensors")
    )
    images = torch.stack([text_images(tasks, seed=9)[t] for t in range(tasks)]).float()
    where = torch.randint(64 * 64, (tasks, points), generator=generator(1))
    x = torch.stack([where % 64, where // 64], -1) / 64
    y = torch.stack([image.reshape(-1, 3)[k] for image, k in zip(images, where, strict=True)])
    return net, init.expand(tasks, -1).contiguous(), x.float(), y


def random_start(net, points=70):
    noise = torch.randn(2, net.num_params, generator=generator(2))
    p = net.init(2, generator=generator(1)) + 0.02 * noise
    return (
        net,
        p,
        rand(2, points, net.in_features).float(),
        rand(2, points, net.out_features).float(),
    )


LADDER = fm.Encoding.frequencies(2, 6, 5.0, include_input=True)
STARTS = {
    "text": lambda: text(66),
    "sine": lambda: random_start(fm.siren(2, 3, 24, 4, 30.0, 40.0)),
    "deep sine": lambda: random_start(fm.siren(2, 3, 24, 7, 20.0)),
    "relu": lambda: random_start(fm.MLP(2, 3, 24, 4, "relu", encoding=LADDER)),
    "deep relu": lambda: random_start(fm.MLP(2, 3, 24, 7, "relu", encoding=LADDER)),
    "tanh": lambda: random_start(fm.MLP(2, 2, 40, 4, "tanh", output="sigmoid")),
    "wide tanh": lambda: random_start(fm.MLP(3, 2, 80, 4, "tanh")),
}
# Of the difference that the precision itself makes. Float32 sums differ in the last bits, which
# moves a number near a tie to its other neighbour: rare, so that most numbers of single points are
# exact, and sums over points far nearer than the precision. Measured: 0.005 to 0.11 and 0.0001 to
# 0.03. Where it is not rare (phases of 200 radians), twice what torch's float32 sums do to the
# mirror: 0.15 of the precision's own for x̄̇ in fp16, of which the kernels' do 0.10.
OF_SUMS, OF_POINTS = 0.2, 0.1


def tight(what, got, mirror, tipped, truth, mode):
    """A sum over points by its norm; numbers of single points by their median. ``tipped`` is the
    mirror with float32 sums."""
    assert torch.isfinite(got).all()
    if mode == "fp32":
        # sums of up to 256 float32 products in each of a few layers
        assert error(got, mirror) < 1e-5, f"{what}: {error(got, mirror):.2g}"
        return
    if what == "loss":
        assert error(got, mirror) < 2e-5, f"{what}: {error(got, mirror):.2g}"
        return
    if what in ("y", "dy", "gx", "dgx"):
        ours, sums, own = ((a - mirror).abs().median() for a in (got.double(), tipped, truth))
        limit = OF_POINTS
    else:
        ours, sums, own = (error(a, mirror) for a in (got, tipped, truth))
        limit = OF_SUMS
    assert ours < max(limit * own, 2 * sums), (
        f"{what}: {ours:.2g}, the precision's own {own:.2g}, float32 sums' {sums:.2g}"
    )


def outputs(passes, net, p, x, y, v, w, gy):
    """What the tests of roundings compare, in one form for all who compute it."""
    loss, grad = passes.loss_grad(net, p, fm.Batch(x, y))
    hv = passes.loss_hvp(net, p, v, fm.Batch(x, y))[1]
    gp, gx = passes.mlp_grad(net, p, x, gy)
    dy, dgp, dgx = passes.mlp_dual(net, p, x, v, w, gy)
    shown = passes.mlp(net, p, x)
    return dict(y=shown, loss=loss, grad=grad, hv=hv, gp=gp, gx=gx, dy=dy, dgp=dgp, dgx=dgx)


def mirrored(net, mode, p, x, y, v, w, gy, sums=torch.float64):
    c = Constants(net, mode)
    held, held_dual = (plan.resident_tile(c, dual) is not None for dual in (False, True))
    plain = Rounding(net, mode, not held, sums).run(p, x, y, loss=True)
    dual = Rounding(net, mode, not held_dual, sums).run(p, x, y, v, loss=True)
    full = Rounding(net, mode, True, sums).run(p, x, gy, v, w)  # x̄ is the streamed kernels'
    return dict(
        y=plain.y, loss=plain.loss, grad=plain.grad, hv=dual.dgrad, gp=full.grad, gx=full.gx,
        dy=full.dy, dgp=full.dgrad, dgx=full.dgx,
    )  # fmt: skip


def rounding_case(start, mode):
    net, p, x, y = start
    v = 0.01 * torch.randn(p.shape, generator=generator(3))
    w, gy = (torch.randn(a.shape, generator=generator(4)) for a in (x, y))
    inputs = (p, x, y, v, w, gy)
    got = outputs(Passes(mode), net, *inputs)
    mirror = mirrored(net, mode, *inputs)
    tipped = mirrored(net, mode, *inputs, sums=torch.float32)
    truth = outputs(reference, net, *(a.double() for a in inputs))
    for what in got:
        tight(what, got[what], mirror[what], tipped[what], truth[what], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", STARTS)
def test_kernels_round_where_they_say(start, mode):
    rounding_case(STARTS[start](), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_kernels_round_where_they_say_on_the_authors_weights(mode, data_path):
    """CelebA, w0 = 200, width 256: phases of 200 radians."""
    path = data_path("learnit_celeba_maml/maml_ilr_0.01_olr_1e-05_bs_3_150000.pkl")
    net, init = fm.load_learnit(path)
    x = rand(1, 66, 2).float()
    y = fm.mlp(net, init, x, impl="reference") + 0.1 * torch.randn(1, 66, 3, generator=generator(5))
    rounding_case((net, init[None], x, y), mode)


@triton.jit
def _truncated_tf32(a):
    u = a.to(tl.uint32, bitcast=True)
    return (u & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _coarse_keep(z, ACT: tl.constexpr, W0: tl.constexpr, MODE: tl.constexpr):
    """A phase of 14 bits."""
    turns = tl.floor(activation.phase(W0 * z) * (16384.0 * 0.15915494309189535) + 0.5)
    return (4.0 * turns).to(tl.int32).to(tl.int16)


@triton.jit
def _mul_without_curvature(a, b, DUAL: tl.constexpr):
    v = a[0] * b[0]
    d = v
    if DUAL:
        d = a[0] * b[1]
    return (v, d)


@triton.jit
def _rounded_delta(de, delta, ddelta, where, MODE: tl.constexpr, DUAL: tl.constexpr):
    """δ̇ rounded twice: to bfloat16 and to the operand."""
    tl.store(delta + where, number.operand(de[0], MODE))
    if DUAL:
        tl.store(ddelta + where, number.operand(number.operand(de[1], "bf16"), MODE))


@pytest.mark.parametrize(
    ("where", "name", "fault", "mode"),
    [
        (number, "_nearest_tf32", _truncated_tf32, "tf32"),
        (mlp, "keep", _coarse_keep, "tf32"),
        (mlp, "mul", _mul_without_curvature, "bf16"),
        (mlp, "_store_delta", _rounded_delta, "tf32"),
    ],
    ids=["truncation", "coarse phase", "no curvature", "rounded twice"],
)
def test_planted_faults_are_caught(monkeypatch, where, name, fault, mode):
    start = random_start(fm.siren(2, 3, 24, 7, 20.0), 33)
    rounding_case(start, mode)
    monkeypatch.setattr(where, name, fault)
    with pytest.raises(AssertionError):
        rounding_case(start, mode)


@pytest.mark.parametrize("mode", MODES)
def test_meta_gradient_on_meta_trained_weights(mode):
    """The cosine to float64 of the meta-gradient of two steps."""
    net, p, x, y = text(100)
    lr = torch.full((1, 1, 1), 1e-2).expand(2, 1, net.num_params)
    got = Passes(mode).maml(net, p[:1], fm.Batch(x, y), lr, SGD(), order=2)[1].double()
    batch = fm.Batch(x.double(), y.double())
    want = reference.maml(net, p[:1].double(), batch, lr.double(), SGD(), order=2)[1]
    cosine = float(torch.dot(got.flatten(), want.flatten()) / (got.norm() * want.norm()))
    print(f"cosine {mode}: {cosine:.6f}")
    assert cosine > {"fp32": 0.99995, "tf32": 0.999, "fp16": 0.999, "bf16": 0.99}[mode]


# Captured loops: a stand-in for CUDA graphs, whose replay runs the loop into the same results ---


@pytest.fixture
def captures(monkeypatch):
    """Counts of captures and replays; loops are captured on the CPU."""
    counts = SimpleNamespace(captures=0, replays=0)
    run, current = graph._Captured.run, []

    class Graph:
        def __init__(self):
            self.captured = current[-1]

        def replay(self):
            counts.replays += 1
            mine, new = self.captured.results, self.captured.loop.run()
            for a, b in zip(mine, new, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    a.copy_(b.clone())

    @contextlib.contextmanager
    def capture(_):
        counts.captures += 1
        yield

    def traced(self, *args):
        current.append(self)
        return run(self, *args)

    monkeypatch.setattr(graph._Captured, "run", traced)
    monkeypatch.setattr(graph, "capturable", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return counts


def loop_batches(kind, seed):
    """Two batches of one shape: of points, drawn and ragged points, rays, sinograms, with a
    query."""
    T = 2
    x, y = rand(T, 12, 2, seed=seed), rand(T, 12, 3, seed=seed + 1)
    if kind == "points":
        return fm.siren(2, 3, 9, 3, 5.0), fm.Batch(x, y)
    if kind == "ragged":
        return fm.siren(2, 3, 9, 3, 5.0), fm.Batch(x, y, counts=torch.tensor([3 + seed, 12 - seed]))
    if kind == "drawn":
        key = torch.tensor([seed, -seed - 1])
        return fm.siren(2, 3, 9, 3, 5.0), fm.Batch(x, y, per_step=7, seed=key)
    if kind == "query":
        query = fm.Batch(rand(T, 5, 2, seed=seed + 2), rand(T, 5, 3, seed=seed + 3))
        return fm.siren(2, 3, 9, 3, 5.0), fm.Batch(x, y, query=query)
    if kind == "sinogram":
        grid = torch.stack(torch.meshgrid(*[torch.arange(5.0) / 5] * 2, indexing="xy"), -1)
        angles, sino = rand(T, 3, seed=seed, high=3.0), rand(T, 3, 5, seed=seed + 1)
        batch = fm.Batch(grid.view(-1, 2).double(), sino, measure=fm.Project(angles))
        return fm.MLP(2, 1, 9, 3, "tanh"), batch
    near, far = rand(T, seed=seed), 2 + rand(T, seed=seed + 1)
    rays = fm.Rays(rand(T, 6, 3, seed=seed + 2), rand(T, 6, 3, seed=seed + 3, low=-1), near, far)
    batch = fm.Batch(
        rays, rand(T, 6, 3, seed=seed + 4), measure=fm.March(4), per_step=5,
        seed=torch.tensor([seed, 5 + seed]),
    )  # fmt: skip
    return fm.MLP(3, 4, 9, 3, "tanh"), batch


KINDS = ("points", "ragged", "drawn", "query", "sinogram", "rays")


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_loop_serves_other_data_of_its_shapes(captures, kind):
    passes = Passes("fp32")
    for seed in (0, 1):
        net, batch = loop_batches(kind, seed)
        p = parameters(net, 1, seed)
        lr = (0.01 * (1 + seed) * torch.ones(1, 1, 1).double()).expand(2, 2, net.num_params)
        for rule in (SGD(), Adam()):
            got = (
                *passes.adapt(net, p, batch, lr, rule, keep=True),
                *passes.maml(net, p, batch, lr, rule, order=2)[:2],
            )
            theta, losses, thetas, *_ = reference.adapt(net, p, batch, lr, rule, keep=True)
            want = (
                *(theta, losses, torch.stack(list(thetas))),
                *reference.maml(net, p, batch, lr, rule, order=2)[:2],
            )
            for a, b in zip(got, want, strict=True):
                assert error(a, b) < 1e-9
    assert (captures.captures, captures.replays) == (4, 4)


def test_results_of_a_captured_loop_are_the_callers_own(captures):
    net, batch = loop_batches("points", 0)
    p, passes = parameters(net, 1), Passes("fp32")
    lr = torch.full((1, 1, 1), 0.01).double().expand(2, 2, net.num_params)
    first = [passes.adapt(net, p, batch, lr, SGD(), keep=True) for _ in range(2)]
    kept = [a.clone() for a in first[1]]
    passes.adapt(net, 2 * p, batch, lr, SGD(), keep=True)
    assert all(torch.equal(a, b) for a, b in zip(first[1], kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*first, strict=True))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(), (2, 1), (2, 1, 1), "P"])
def test_learned_rates_in_a_captured_loop(captures, order, shape):
    passes = Passes("fp32")
    for seed in (0, 1):
        net, batch = loop_batches("points", seed)
        shape_ = (net.num_params,) if shape == "P" else shape
        rates = 0.01 * (1 + rand(*shape_, seed=seed))
        lr, p = rates.expand(2, 2, net.num_params), parameters(net, 1, seed)
        for rule in (SGD(), Momentum(0.7)):
            options = dict(order=order, learned=rates)
            got = passes.maml(net, p, batch, lr, rule, **options)
            want = reference.maml(net, p, batch, lr, rule, **options)
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and error(a, b) < 1e-9
    assert (captures.captures, captures.replays) == (2, 2)


def test_only_the_latest_few_loops_are_kept(captures):
    net = fm.siren(2, 3, 9, 3, 5.0)
    p, passes = parameters(net, 1), Passes("fp32")
    lr = torch.full((1, 1, 1), 0.01).double().expand(1, 2, net.num_params)

    def adapt(points, **options):
        batch = fm.Batch(rand(2, points, 2), rand(2, points, 3), **options)
        return passes.adapt(net, p, batch, lr, SGD())

    for points in range(3, 3 + graph.KEPT):
        adapt(points)
    assert (captures.captures, len(passes.graphs.kept)) == (graph.KEPT, graph.KEPT)
    adapt(3)  # the oldest, now the latest
    assert captures.captures == graph.KEPT and captures.replays == 1
    adapt(9, loss="l1")  # another loss, another loop: takes the place of the oldest
    assert len(passes.graphs.kept) == graph.KEPT
    adapt(3)
    assert captures.replays == 2
    adapt(4)
    assert captures.captures == graph.KEPT + 2


# The plan ---


def test_recorded_launches_start_nothing():
    net, batch = loop_batches("points", 0)
    p = parameters(net, 2)
    with recording() as found:
        passes = Passes("fp32")
        loss, _ = passes.loss_grad(net, p, batch)
    assert [one.kernel.__name__ for one in found][-1] == "gather"
    assert not torch.isfinite(loss).any()  # poisoned, never written


def test_tiles_follow_the_architecture():
    c = Constants(fm.siren(2, 3, 256, 5), "bf16")
    with plan.architecture_of(80):
        old = plan.stream_tiles(c, False), plan.weigh_tile(c, False, True, False)
    with plan.architecture_of(90):
        new = plan.stream_tiles(c, False), plan.weigh_tile(c, False, True, False)
    assert old != new
    assert plan.architecture() == 90 or torch.cuda.is_available()


def test_what_will_run_in_words():
    batch = fm.Batch(rand(3, 70, 2).float(), rand(3, 70, 3).float())
    narrow, wide = fm.siren(2, 3, 32, 4), fm.siren(2, 3, 256, 4)
    with plan.architecture_of(90):
        small = worker.described(narrow, batch, precision="bf16", order=1)
        large = worker.described(wide, batch, precision="bf16", max_memory=0)
    assert small.splitlines()[0] == "sine 2-32x3-3, bf16, sm_90"
    assert "plain: resident" in small and "dual" not in small and "1 chunk(s)" in small
    assert "plain: ahead" in large and "dual: weigh" in large and "kept as torch.int16" in large
    assert "3 chunk(s) of at most 1 tasks" in large
