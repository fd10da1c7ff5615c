"""The compiled CPU worker beyond what every worker is tested for: each instruction set, tails,
memory, threads, the vector functions, and the machine code of the hot loops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import IMPLS, error, generator, nets, parameters, rand

import fastmeta as fm
from fastmeta import cli, native, reference
from fastmeta.ops import dispatch
from fastmeta.rules import Adam, Momentum

MISSING = native.cpu.unavailable()
if MISSING is not None and "cpu" in IMPLS:
    pytest.fail(f"FASTMETA_TEST_IMPLS names cpu, which cannot run: {MISSING}", pytrace=False)
if MISSING is not None:
    pytest.skip(f"the cpu worker cannot run: {MISSING}", allow_module_level=True)

ISAS = native._library().isas()


@pytest.fixture(params=ISAS)
def passes(request) -> native.Passes:
    return native.Passes(request.param)


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def agree(name: str, ours, plain, truth) -> None:
    """At most twice the error of plain torch (the reference at the same precision), plus one
    rounding."""
    for index, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        if a is None:
            continue
        eps = torch.finfo(a.dtype).eps
        # a sum of many terms that cancel has an error relative to its terms: plain torch's tells
        mine, torchs = error(a, c), error(b, c)
        small = float((a.double() - c).norm()) <= 4 * eps * c.numel() ** 0.5
        assert mine <= 2 * torchs + eps / 2 or small, (name, index, mine, torchs)


def three(call, *args, passes):
    """A pass by the kernels and by the reference in the arguments' dtype, and by the reference in
    float64."""

    def wide(value):
        if isinstance(value, fm.Batch):
            return value.to(torch.float64)
        return value.double() if isinstance(value, torch.Tensor) else value

    def listed(out):
        return [out] if isinstance(out, torch.Tensor) else list(out)

    doubles = [wide(a) for a in args]
    return (
        listed(getattr(passes, call)(*args)),
        listed(getattr(reference, call)(*args)),
        listed(getattr(reference, call)(*doubles)),
    )


def near(call, *args, passes):
    ours, plain, truth = three(call, *args, passes=passes)
    if args[1].dtype == torch.float64:  # the sum's order is the only difference
        for a, c in zip(ours, truth, strict=True):
            assert error(a, c) < 1e-11 or float((a - c).norm()) < 1e-12
    else:
        agree(call, ours, plain, truth)


# Every op, on every instruction set ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
@pytest.mark.parametrize("net", nets(width=19), ids=lambda n: f"{n.activation}-{n.output}")
def test_passes(passes, net, dtype):
    T, N = 3, 41
    p, v = (parameters(net, T, seed).to(dtype) for seed in (1, 5))
    x, w = rand(T, N, 2, seed=2).to(dtype), rand(T, N, 2, seed=6, low=-1).to(dtype)
    gy = rand(T, N, 3, seed=3, low=-1).to(dtype)
    batch = fm.Batch(x, rand(T, N, 3, seed=4).to(dtype))
    near("mlp", net, p, x, passes=passes)
    near("mlp_grad", net, p, x, gy, passes=passes)
    near("mlp_dual", net, p, x, v, w, gy, passes=passes)
    near("loss", net, p, batch, passes=passes)
    near("loss_grad", net, p, batch, passes=passes)
    near("loss_hvp", net, p, v, batch, passes=passes)


@pytest.mark.parametrize("width", [1, 4, 8, 15, 16, 17, 31, 32, 33, 48, 65, 100])
@pytest.mark.parametrize(
    ("tasks", "points"), [(1, 1), (3, 15), (2, 16), (1, 17), (1, 63), (2, 300)]
)
def test_tails(passes, width, tasks, points):
    net = fm.siren(3, 2, width, 4, 4.0)
    p, v = (parameters(net, tasks, seed).float() for seed in (1, 5))
    batch = fm.Batch(rand(tasks, points, 3).float(), rand(tasks, points, 2, seed=1).float())
    near("loss_grad", net, p, batch, passes=passes)
    near("loss_hvp", net, p, v, batch, passes=passes)
    near("mlp_grad", net, p, batch.x, batch.y, passes=passes)


@pytest.mark.parametrize("depth", [2, 3, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (9, 13), (33, 40)])
def test_depths_and_thin_sides(passes, depth, inputs, outputs):
    net = fm.MLP(inputs, outputs, 21, depth, "tanh")
    p, v = (parameters(net, 2, seed).float() for seed in (1, 5))
    x, y = rand(2, 37, inputs).float(), rand(2, 37, outputs, seed=1).float()
    near("loss_hvp", net, p, v, fm.Batch(x, y), passes=passes)
    near("mlp_dual", net, p, x, v, rand(2, 37, inputs, seed=3).float(), y, passes=passes)


@pytest.mark.parametrize("shared", ["params", "x", "both", "neither"])
@pytest.mark.parametrize("encoded", [False, True])
def test_what_is_shared_is_read_in_place(passes, shared, encoded):
    encoding = fm.Encoding.frequencies(2, 3, 2.0, include_input=True) if encoded else None
    net = fm.MLP(2, 3, 20, 3, "softplus", encoding=encoding)
    p = parameters(net, 1 if shared in ("params", "both") else 3).float()
    x = rand(1 if shared in ("x", "both") else 3, 50, 2).float()
    gy = rand(max(len(p), len(x)), 50, 3, seed=4).float()
    near("mlp", net, p, x, passes=passes)
    near("mlp_grad", net, p, x, gy, passes=passes)
    near("mlp_dual", net, p, x, p.flip(-1), x.flip(-1), gy, passes=passes)
    near("mlp_dual", net, p, x, None, x.flip(-1), gy, passes=passes)
    near("mlp_dual", net, p, x, p.flip(-1), None, gy, passes=passes)


def test_inputs_need_not_be_dense_or_aligned(passes):
    net = fm.siren(2, 3, 17, 3, 5.0)
    p = torch.empty(2, net.num_params + 1)[:, 1:].copy_(parameters(net, 2))
    x = rand(2, 2, 40).float().mT
    y = rand(1, 40, 3, seed=1).float().expand(2, -1, -1)
    near("loss_grad", net, p, fm.Batch(x, y), passes=passes)
    near("loss_grad", net, p[:1].expand(2, -1), fm.Batch(x, y), passes=passes)
    near("mlp_grad", net, parameters(net, 4).float()[::2], x, y, passes=passes)
    lr = (
        torch.rand(net.num_params, 2).T.expand(3, -1, -1) * 1e-2
    )  # parameters are not its last stride
    ours = passes.adapt(net, p, fm.Batch(x, y), lr, fm.rules.SGD())
    want = reference.adapt(net, p, fm.Batch(x, y), lr, fm.rules.SGD())
    assert error(ours[0], want[0]) < 1e-6


def test_no_steps_change_nothing(passes):
    net, batch = fm.siren(2, 3, 17, 3, 5.0), fm.Batch(rand(9, 2), rand(2, 9, 3))
    p = parameters(net, 1)
    out = passes.adapt(net, p, batch, p.expand(0, 2, -1), fm.rules.SGD(), keep=True)
    assert torch.equal(out[0], p.expand(2, -1)) and torch.equal(out[2], p.expand(1, 2, -1))
    assert out[1].shape == (0, 2)


def rays(samples, count=9, **options):
    o, d = rand(2, count, 3, seed=1, low=-0.3, high=0.3), rand(2, count, 3, seed=2, low=-1)
    march = fm.March(samples, **options)
    return fm.Batch(fm.Rays(o, d, 0.5, 2.5), rand(2, count, 3, seed=3), measure=march)


@pytest.mark.parametrize("samples", [2, 7, 16, 150])
@pytest.mark.parametrize("density", ["relu", "softplus"])
def test_rays(passes, samples, density):
    net = fm.MLP(3, 4, 18, 3, "tanh", encoding=fm.Encoding.frequencies(3, 2, 1.0))
    batch = rays(samples, density=density, white_background=samples > 2).to(torch.float32)
    p, v = (parameters(net, 2, seed).float() for seed in (1, 5))
    near("loss_grad", net, p, batch, passes=passes)
    near("loss_hvp", net, p, v, batch, passes=passes)
    raw, t = rand(5, samples, 4, low=-2, high=2).float(), rand(5, samples).cumsum(-1).float()
    bars = rand(5, 3, seed=7).float(), rand(5, seed=8).float(), rand(5, seed=9).float()
    near("composite", raw, t, batch.measure, passes=passes)
    near("composite_grad", raw, t, batch.measure, *bars, passes=passes)
    vt = rand(5, samples, seed=10).float()
    near("composite_dual", raw, t, batch.measure, raw.flip(0), vt, *bars, passes=passes)


@pytest.mark.parametrize("size", [3, 16, 31])
def test_projections(passes, size):
    net = fm.fourier_mlp(2, 1, 20, 3, features=9, scale=3.0)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) / size] * 2, indexing="xy"), -1)
    angles = rand(2, 3, seed=2, high=3.0).float()
    batch = fm.Batch(grid.view(-1, 2), rand(2, 3, size, seed=1).float(), measure=fm.Project(angles))
    p, v = (parameters(net, 2, seed).float() for seed in (1, 5))
    near("loss_grad", net, p, batch, passes=passes)
    near("loss_hvp", net, p, v, batch, passes=passes)
    pixels = batch.measure.pixels(size)
    near("project", rand(2, size, size, seed=3).float(), pixels, passes=passes)
    near("project_adjoint", rand(2, 3, size, seed=4).float(), pixels, passes=passes)


# Meta-gradients: what is kept and what is computed again, threads, memory ---


def meta_cases():
    sine = fm.siren(2, 3, 33, 4, 5.0)
    image = fm.Batch(rand(3, 200, 2), rand(3, 200, 3, seed=1))
    field = fm.MLP(3, 4, 20, 4, "tanh", encoding=fm.Encoding.frequencies(3, 4, 1.0))
    ct = fm.fourier_mlp(2, 1, 20, 4, features=9, scale=3.0)
    grid = torch.stack(torch.meshgrid(*[torch.arange(16) / 16] * 2, indexing="xy"), -1).view(-1, 2)
    views = fm.Project(rand(2, 3, seed=2, high=3.0))
    return {
        "points": (sine, image),
        "rays": (field, rays(20)),
        "projection": (ct, fm.Batch(grid.double(), rand(2, 3, 16), measure=views)),
    }


@pytest.mark.parametrize("memory", [0, 30_000, 200_000, None])
@pytest.mark.parametrize("rule", [fm.rules.SGD(), Momentum(0.8), Adam()], ids=lambda r: r.name)
@pytest.mark.parametrize("case", meta_cases())
def test_kept_activations_change_nothing(passes, case, rule, memory):
    net, batch = meta_cases()[case]
    init = parameters(net, 1)
    lr = torch.full((1, 1, 1), 1e-2, dtype=torch.float64).expand(3, batch.tasks, net.num_params)
    learned = torch.zeros(net.num_params, dtype=torch.float64)
    more = {"order": 2, "learned": learned, "max_memory": memory}
    ours = passes.maml(net, init, batch, lr, rule, **more)
    want = reference.maml(net, init, batch, lr, rule, **more)
    for a, b in zip(ours, want, strict=True):
        assert error(a, b) < 1e-9


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_threads_share_the_work_and_the_bits_stay(threads, count, tasks):
    """Whole tasks, and crews of several threads on one; the same count gives the same bits."""
    threads(count)
    net = fm.siren(2, 3, 24, 4, 5.0)
    batch = fm.Batch(rand(tasks, 500, 2).float(), rand(tasks, 500, 3, seed=1).float())
    lr = torch.full((2, 1, 1), 1e-2).expand(2, tasks, net.num_params)
    init = parameters(net, 1).float()
    run = native.cpu.passes.maml
    more = {"order": 2, "learned": torch.zeros(2, 1, 1)}
    first, second = (run(net, init, batch, lr, fm.rules.SGD(), **more) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    want = reference.maml(
        net, init.double(), batch.to(torch.float64), lr.double(), fm.rules.SGD(), **more
    )
    for a, b in zip(first, want, strict=True):
        assert error(a, b) < 1e-5
    p = parameters(net, tasks).float()
    near("loss_hvp", net, p, p.flip(-1), batch, passes=native.cpu.passes)


def held(net, points, steps, memory, tasks=1):
    """Bytes that one meta-gradient works in."""
    library = native._library()
    batch = fm.Batch(torch.rand(points, 2), torch.rand(tasks, points, 3))
    lr = torch.full((1, 1, 1), 1e-3).expand(steps, tasks, net.num_params)
    library.release()
    native.cpu.passes.maml(net, net.init(1), batch, lr, fm.rules.SGD(), order=2, max_memory=memory)
    return library.held()


PAGE = 2**21  # working memory comes in these


def test_without_a_budget_memory_is_the_trajectory_and_a_tile_per_thread(threads):
    """K+1 rows of parameters per task in flight, and nothing that grows with the points."""
    threads(2)
    net = fm.siren(2, 3, 256, 5, 30.0)
    few, many = held(net, 1000, 2, 0), held(net, 50_000, 2, 0)
    assert many - few <= PAGE
    longer = held(net, 1000, 12, 0)
    assert abs(longer - few - 10 * 4 * net.num_params) <= PAGE
    # both threads: two packed sets of weights, a dual tile, two accumulators, a sum; the task: λ, ḡ
    rows = 4 * net.num_params
    tile = 128 * 256 * 4 * 16 + 2**20
    assert few <= 2 * (3.3 * rows + tile) + (2 * 2.2 + 3 + 2) * rows + PAGE


def test_a_budget_bounds_what_is_kept(threads):
    threads(2)
    net = fm.siren(2, 3, 128, 5, 30.0)
    bare = held(net, 20_000, 3, 0)
    for budget in (10_000_000, 100_000_000):
        assert bare < held(net, 20_000, 3, budget) <= bare + budget + PAGE
    # six panels of 128 numbers for each of three steps and 20 000 points
    full = held(net, 20_000, 3, None)
    assert abs(full - bare - 20_000 * 3 * 6 * 128 * 4) < 0.02 * full + PAGE


def test_indices_reach_beyond_31_bits():
    """T·N·H > 2³¹: the last points of many are those of few."""
    net = fm.MLP(1, 1, 32, 2, "relu")
    N = 2**26 + 17
    x = torch.linspace(-1, 1, N)[:, None]
    p = net.init(1, generator=generator(1))
    y = fm.mlp(net, p[0], x, impl="cpu")
    assert torch.equal(y[-100:], fm.mlp(net, p[0], x[-100:], impl="cpu"))
    batch = fm.Batch(x, y[None] + 1.0)
    loss, grad = fm.loss_grad(net, p, batch, impl="cpu")
    assert abs(float(loss) - 1.0) < 1e-5
    # y − target is −1 everywhere: the last bias's gradient is −2
    assert abs(float(grad[0, -1]) + 2.0) < 1e-4


# The vector functions ---


def function(passes, name, x):
    """(φ, φ', φ'') at x by a network of one neuron whose weights are 1."""
    net = fm.MLP(1, 1, 1, 2, name)
    p = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=x.dtype)
    one = torch.ones_like(x)[None, :, None]
    y = passes.mlp(net, p, x[None, :, None])
    _, slope = passes.mlp_grad(net, p, x[None, :, None], one)
    *_, curvature = passes.mlp_dual(net, p, x[None, :, None], None, one, one)
    return [v.flatten() for v in (y, slope, curvature)]


@pytest.mark.parametrize("name", fm.spec.ACTIVATIONS)
def test_functions_are_as_good_as_torchs(passes, name):
    """The worst error on a grid is at most twice torch's in float32, plus one rounding of 1."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 2, 500) * 1.01])
    x = torch.cat([x, -x[-500:]])
    truth = function(reference, name, x.double())
    for a, b, c in zip(function(passes, name, x), function(reference, name, x), truth, strict=True):
        ours, torchs = (float(((v.double() - c).abs() / (1 + c.abs())).max()) for v in (a, b))
        assert ours <= 2 * torchs + 2**-24, (ours, torchs)


def test_sine_is_good_to_1e_7_up_to_1e4(passes):
    x = rand(200_001, low=-1e4, high=1e4).float()
    sine, cosine, _ = function(passes, "sine", x)
    assert float((sine.double() - x.double().sin()).abs().max()) < 1e-7
    assert float((cosine.double() - x.double().cos()).abs().max()) < 1e-7


def test_phases_beyond_the_reduction_are_right_and_nan_stays(passes):
    x = torch.tensor([1e5, -3e6, 1e9, 2.0, float("nan"), float("inf"), -1.0])
    sine, cosine, _ = function(passes, "sine", x)
    good = torch.tensor([0, 1, 2, 3, 6])
    assert float((sine[good].double() - x[good].double().sin()).abs().max()) < 1e-7
    assert float((cosine[good].double() - x[good].double().cos()).abs().max()) < 1e-7
    assert sine[[4, 5]].isnan().all()
    far = fm.Encoding(torch.tensor([[1.0, 40.0]]), torch.zeros(2))
    net = fm.MLP(1, 2, 2, 2, "none", encoding=far)
    eye = torch.eye(2).flatten()
    p = torch.cat([eye, torch.zeros(2), eye, torch.zeros(2)])[None]
    phase = x[good][:, None]
    y = passes.mlp(net, p, phase[None])[0]
    assert float((y.double() - (phase * far.B).double().sin()).abs().max()) < 1e-7


@pytest.mark.parametrize("name", fm.spec.ACTIVATIONS)
def test_nan_is_passed_on(passes, name):
    y, _, _ = function(passes, name, torch.tensor([1.0, float("nan"), 2.0]))
    assert y.isnan().tolist() == [False, True, False]


# The module ---


def test_info_shows_every_cell_of_the_cpu_worker_as_running():
    cells = [case for _, made in cli.cases() for case in made if case.device == "cpu"]
    assert len(cells) > 200
    assert not [case for case in cells if dispatch.objections(case, "cpu")]


def test_objections_are_reasons():
    net = fm.MLP(2, 3, 8, 65)
    with pytest.raises(ValueError, match=r"depth 65 \(64 at most\)"):
        fm.mlp(net, net.init(1), torch.rand(4, 2), impl="cpu")
    net = fm.siren(2, 3, 8, 3)
    with pytest.raises(ValueError, match="precision 'bf16' .fp32 only"):
        fm.mlp(net, net.init(1), torch.rand(4, 2), impl="cpu", precision="bf16")


def run(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_is_chosen_when_it_runs(isa):
    code = "from fastmeta import native; print(native.cpu.passes.isa)"
    assert run(code, FASTMETA_ISA=isa).strip() == isa
    assert run(code, FASTMETA_ISA="").strip() == ISAS[0]


def test_an_unknown_instruction_set_is_refused():
    """Not a slower worker in silence: whoever considers the cpu worker gets the error."""
    code = """
import torch, fastmeta as fm
net = fm.siren(2, 3, 8, 3)
fm.mlp(net, net.init(1), torch.rand(4, 2), impl="reference")
try:
    fm.mlp(net, net.init(1), torch.rand(4, 2))
except ValueError as error:
    print(error)
"""
    message = f"FASTMETA_ISA is 'mmx'; accepted here are {', '.join(ISAS)}"
    assert run(code, FASTMETA_ISA="mmx").strip() == message


def test_memory_that_is_not_there_is_named():
    """A ray's samples lie in one tile: ten thousand million of them do not."""
    net = fm.MLP(3, 4, 64, 3)
    one = fm.Rays(torch.zeros(1, 1, 3), torch.ones(1, 1, 3), 1.0, 2.0)
    batch = fm.Batch(one, torch.zeros(1, 1, 3), measure=fm.March(10**10))
    with pytest.raises(MemoryError, match=r"cpu worker: \d+ bytes of working memory"):
        fm.loss_grad(net, net.init(1), batch, impl="cpu")


def test_without_the_compiled_module_the_reference_runs_and_info_says_what_to_do():
    out = run(
        """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name == "fastmeta._cpu":
            raise ModuleNotFoundError("no module named " + name, name=name)
sys.meta_path.insert(0, Wall())
import torch, fastmeta as fm
net = fm.siren(2, 3, 8, 3)
print(fm.mlp(net, net.init(1), torch.rand(4, 2)).shape)
print(fm.available()["cpu"])
"""
    )
    assert "torch.Size([1, 4, 3])" in out
    assert "not compiled" in out and "g++" in out and "--force-reinstall" in out


def test_there_is_one_openmp_runtime():
    out = run(
        """
import torch, fastmeta as fm
net = fm.siren(2, 3, 8, 3)
fm.mlp(net, net.init(1), torch.rand(4, 2), impl="cpu")
maps = open("/proc/self/maps").read().split()
print(sorted({p for p in maps if "gomp" in p or "iomp" in p or "libomp" in p}))
"""
    )
    assert len(eval(out)) == 1, out


def test_the_hot_loops_keep_their_operands_in_registers():
    """GCC may spill the vectors of B into the loop: stack operands, at half the speed."""
    if shutil.which("objdump") is None:
        assert "cpu" not in os.environ.get("FASTMETA_TEST_IMPLS", ""), "objdump is needed"
        pytest.skip("no objdump (Debian: apt install binutils)")
    path = native._library().__file__
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", path],
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    ).stdout
    if "__asan" in listing:
        pytest.skip("a sanitizer build")
    seen = {}
    for part in listing.split("\n\n"):
        head = re.search(r"<void fastmeta::(\w+)::(kernel|dots)<float", part)
        if head is None:
            continue
        operations = re.findall(r"\t(?:vfmadd\w+|mulps|vmulps)\s+(.*)", part)
        stack = [o for o in operations if "%rsp" in o]
        assert not stack, (part.splitlines()[0], stack[:3])
        key = head[1], head[2]
        seen[key] = seen.get(key, 0) + len(operations)
    for isa in ISAS:
        assert seen.get((isa, "kernel"), 0) > 500, (isa, seen)
