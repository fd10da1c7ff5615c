"""The CUDA worker layer by layer, on the emulator: networks of any width, depth and encoding, any
number of coordinates and outputs, points, rays and projections, against float64 and the twin that
rounds where the kernels round; chunks of tasks, ranges of points; every barrier; what ptxas says of
them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import rounded_cuda as rounded
import torch
from helpers import error, parameters, rand
from test_cuda import (  # noqa: F401
    FAST,
    NAMED,
    batches,
    build,
    close,
    doubles,
    library,
    listed,
    poisoned,
    same,
)

import fastmeta as fm
from fastmeta import cuda_build, native, reference
from fastmeta.rules import SGD, Adam, MetaSGD, Momentum

LOW = ("tf32", "fp16", "bf16")


@pytest.fixture
def passes(library, mode) -> native.Passes:  # noqa: F811
    return native.Passes("cuda", native.Device(library(FAST[0]), mode))


def fourier(width: int, features: int = 5, **more) -> fm.MLP:
    return fm.fourier_mlp(2, 3, width, 3, features=features, scale=3.0, **more)


LADDER = fm.Encoding.frequencies(2, 3, 2.0, pi=True, include_input=True)
# Widths on both sides of a tile and far from any multiple; coordinates and outputs of one and
# two narrow tiles; features of one tile and two; every activation, every output.
NETS = {
    "siren-48": fm.siren(2, 3, 48, 4, 5.0, 9.0, output_shift=0.5),
    "tanh-5": fm.MLP(1, 12, 5, 2, "tanh", output="sigmoid"),
    "gelu-100": fm.MLP(6, 1, 100, 3, "gelu"),
    "fourier-40": fourier(40),
    "sine-on-features": fm.MLP(2, 3, 20, 3, "sine", w0=3.0, encoding=LADDER, output="tanh"),
    "silu-deep": fm.MLP(2, 2, 17, 7, "silu"),
    "coordinates": fm.MLP(9, 9, 33, 3, "softplus", output="softplus"),
    "relu-160": fm.MLP(3, 8, 160, 2, "relu", output="relu"),
    "features": fourier(66, features=70),
    "sigmoid": fm.MLP(2, 1, 70, 3, "sigmoid", encoding=LADDER),
    "none": fm.MLP(2, 1, 65, 3, "none"),
}
LOW_NETS = ("siren-48", "gelu-100", "sine-on-features", "features")
CASES = [("fp32", name) for name in NETS] + [
    (mode, name)
    if name in LOW_NETS[:2] or mode == "fp16"
    else pytest.param(mode, name, marks=pytest.mark.slow)
    for mode in LOW
    for name in LOW_NETS
]


def inputs(net, T, N):
    p, v = parameters(net, T).float(), rand(T, net.num_params, seed=9, low=-1).float()
    x, w = (rand(T, N, net.in_features, seed=s, low=-1).float() for s in (1, 7))
    return p, v, x, w, 1e-3 * rand(T, N, net.out_features, seed=6, low=-1).float()


def check(passes, name, *args, twin, share=0.4):
    """One pass against float64, plain torch and the twin."""
    wide = [doubles(a) for a in args]
    plain = listed(getattr(reference, name)(*args))
    truth = listed(getattr(reference, name)(*wide))
    ours = listed(getattr(passes, name)(*args))
    rounding = truth if twin is None else listed(twin(*wide))
    close(name, ours, plain, rounding, truth, share=share)


@pytest.mark.parametrize(("mode", "which"), CASES)
@pytest.mark.parametrize("points", [17, 70])
def test_single_passes(passes, mode, which, points):
    net = NETS[which]
    p, v, x, w, gy = inputs(net, 1, points)
    check(
        passes, "mlp", net, p, x,
        twin=lambda net, p, x: rounded.Rounded(net, mode).run(net.layers(p), x, lambda y: y)[0],
    )  # fmt: skip
    check(passes, "mlp_grad", net, p, x, gy, twin=lambda *a: rounded.given_pass(a[0], mode, *a[1:]))
    for along in (w, None):
        check(
            passes, "mlp_dual", net, p, x, v, along, gy,
            twin=lambda net, p, x, v, w, gy: rounded.given_pass(net, mode, p, x, gy, v, w),
        )  # fmt: skip
    batch = fm.Batch(x, rand(1, points, net.out_features, seed=2).float(), loss="mse")
    check(
        passes, "loss_hvp", net, p, v, batch,
        twin=lambda net, p, v, b: rounded.task_pass(net, mode, p, v, b, 0)[1:],
    )  # fmt: skip
    loss, grad = passes.loss_grad(net, p, batch)
    twin = rounded.task_pass(net, mode, p.double(), None, doubles(batch), 0)[1]
    plain, truth = (
        reference.loss_grad(net, *two)[1] for two in ((p, batch), map(doubles, (p, batch)))
    )
    close("loss_grad", [grad], [plain], [twin], [truth], share=0.4)
    # one number, in which roundings may cancel: so by the outputs it comes from, which mlp compared
    want = (passes.mlp(net, p, x).double() - batch.y.double()).square().mean()
    assert error(loss, want[None]) < 5e-7
    assert torch.equal(passes.loss(net, p, batch), loss)


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
@pytest.mark.parametrize("which", ["siren-48", "sine-on-features"])
def test_what_tasks_share(passes, mode, which):
    """One row of parameters, one set of points: the same bits as their copies."""
    net, T, N = NETS[which], 3, 33
    p, v, x, w, gy = inputs(net, T, N)
    y = passes.mlp(net, p, x)
    assert torch.equal(y[1:2], passes.mlp(net, p[1:2], x[1:2]))
    assert torch.equal(passes.mlp(net, p[:1], x), passes.mlp(net, p[:1].repeat(T, 1), x))
    ours = passes.mlp_dual(net, p, x[:1], v, w[:1], gy)
    copies = passes.mlp_dual(net, p, x[:1].repeat(T, 1, 1), v, w[:1].repeat(T, 1, 1), gy)
    assert same(ours[:2], copies[:2]) and torch.equal(ours[2], copies[2].sum(0, True))
    batch = fm.Batch(x[0], rand(T, N, 3, seed=3).float())
    ours = passes.loss_hvp(net, p[:1], v[:1], batch)
    copies = passes.loss_hvp(net, p[:1].repeat(T, 1), v[:1].repeat(T, 1), batch)
    assert same(ours, copies)


# Inner loops and meta-gradients ---

# Adam's way back divides by |g| + ε: with a small ε one entry of g near 0 decides the error
RULES = [SGD(), MetaSGD(), Momentum(0.8), Momentum(0.9, True, 0.01), Adam(eps=0.3)]
LOOPED = ("fourier-40", "tanh-5", "siren-48")


def looped(worker, net, batch, rule, rates, dtype):
    K, T, P = 3, batch.tasks, net.num_params
    a = parameters(net, 1).float().to(dtype)
    r = rates.to(dtype)
    theta, losses, thetas = worker.adapt(net, a, batch, r.expand(K, T, P), rule, keep=True)[:3]
    out = [losses, *((thetas[1:] - a).unbind(0))]
    assert torch.equal(theta, thetas[-1])
    for order in (1, 2):
        out += worker.maml(net, a, batch, r.expand(K, T, P), rule, order=order, learned=r)
    return out


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.name}{getattr(r, 'nesterov', '')}")
@pytest.mark.parametrize("kind", ["all", "query", "ragged", "drawn"])
@pytest.mark.parametrize("mode", ["fp32", *(pytest.param(m, marks=pytest.mark.slow) for m in LOW)])
def test_inner_loops_and_meta_gradients(passes, mode, rule, kind, monkeypatch):
    net = NETS[LOOPED[(RULES.index(rule) + len(kind)) % 3]]
    batch = batches(net)[kind]
    T, P, K = batch.tasks, net.num_params, 3
    shape = {"all": (P,), "query": (K, 1, 1), "ragged": (T, 1), "drawn": (K, T, P)}[kind]
    rates = rand(*shape, seed=8, low=1e-3, high=1e-2).float()
    ours = looped(passes, net, batch, rule, rates, torch.float32)
    plain = looped(reference, net, batch, rule, rates, torch.float32)
    wide = batch.to(torch.float64)
    truth = looped(reference, net, wide, rule, rates, torch.float64)
    rounded.patched(monkeypatch, mode)
    twin = looped(reference, net, wide, rule, rates, torch.float64)
    close(kind, ours, plain, twin, truth, share=0.4)
    lr, p = rates.expand(K, T, P), parameters(net, 1).float()
    assert torch.equal(passes.adapt(net, p, batch, lr, rule)[0] - p, ours[K])
    loss, grad, rate = passes.maml(net, p, batch, lr, rule, order=2)
    assert torch.equal(grad, ours[-2]) and torch.equal(loss, ours[-3]) and rate is None


@pytest.mark.parametrize("mode", ["fp32"])
def test_no_steps(passes, mode):
    net = NETS["tanh-5"]
    p, batch = parameters(net, 1).float(), batches(net)["all"]
    lr = torch.zeros(0, 2, net.num_params)
    theta, losses, _ = passes.adapt(net, p, batch, lr, SGD())
    assert torch.equal(theta, p.expand(2, -1)) and losses.shape == (0, 2)
    loss, grad, _ = passes.maml(net, p, batch, lr, SGD(), order=2)
    want, g = passes.loss_grad(net, p, batch)
    assert torch.equal(loss, want) and error(grad, g.mean(0)) < 1e-6


# Rays and projections ---


def rays(T, R, S, **more):
    o = rand(T, R, 3, seed=1, low=-0.3, high=0.3).float()
    d = rand(T, R, 3, seed=2, low=-1).float()
    march = fm.March(S, density="softplus")
    return fm.Batch(fm.Rays(o, d, 0.5, 2.5), rand(T, R, 3, seed=3).float(), measure=march, **more)


def sinogram(T, size):
    u = torch.arange(size, dtype=torch.float64) / size
    angles = rand(T, 3, seed=2, high=3.0).float()
    y = rand(T, 3, size, seed=1).float()
    return fm.Batch(torch.cartesian_prod(u, u).float(), y, measure=fm.Project(angles))


FIELD = fm.MLP(3, 4, 36, 4, "tanh", encoding=fm.Encoding.frequencies(3, 4, 1.0))
MEASURED = {
    "rays": (FIELD, rays(2, 9, 13)),
    "bare": (fm.MLP(3, 4, 40, 3, "tanh"), rays(2, 5, 16)),
    "drawn": (FIELD, rays(2, 20, 7, per_step=6, seed=torch.tensor([3, -4]))),
    "ct": (fm.MLP(2, 1, 48, 3, encoding=LADDER), sinogram(2, 11)),
}


@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("which", MEASURED)
def test_rays_and_projections(passes, mode, which, monkeypatch):
    net, batch = MEASURED[which]
    T, P = batch.tasks, net.num_params
    p, v = parameters(net, T).float(), rand(T, P, seed=9, low=-1).float()
    check(
        passes, "loss_hvp", net, p, v, batch,
        twin=lambda net, p, v, b: rounded.task_pass(net, mode, p, v, b, 0)[1:],
    )  # fmt: skip
    rates = torch.full((1, 1, 1), 1e-2)
    ours = looped(passes, net, batch, SGD(), rates, torch.float32)
    plain = looped(reference, net, batch, SGD(), rates, torch.float32)
    wide = batch.to(torch.float64)
    truth = looped(reference, net, wide, SGD(), rates, torch.float64)
    rounded.patched(monkeypatch, mode)
    close(which, ours, plain, looped(reference, net, wide, SGD(), rates, torch.float64), truth)


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_adjoints_that_no_16_bits_hold(passes, mode):
    """A last interval of 1e10 behind next to nothing: the adjoint of a density of 1e-10 is 1e10,
    its tangent 1e20."""
    net, batch = FIELD, rays(1, 6, 7)
    march = fm.March(7, 1e10, density="relu")
    batch = fm.Batch(batch.x, batch.y, measure=march)
    p, v = parameters(net, 1).float(), rand(1, net.num_params, seed=9, low=-1).float()
    weight, bias = net.layers(p)[-1]
    weight[:, 3], bias[:, 3] = 0.0, 1e-10
    check(
        passes, "loss_hvp", net, p, v, batch,
        twin=lambda net, p, v, b: rounded.task_pass(net, mode, p, v, b, 0)[1:],
    )  # fmt: skip
    grad, hv = passes.loss_hvp(net, p, v, batch)
    assert float(grad.abs().max()) > 1e8 and float(hv.abs().max()) > 1e18


# Chunks of tasks, ranges of points ---


@pytest.mark.parametrize(
    ("mode", "which"),
    [("fp32", "siren-48"), ("fp32", "sine-on-features"), ("fp16", "sine-on-features")],
)
def test_the_budget_changes_no_bit(passes, mode, which):
    """Two tasks of three parts: all at once, task by task, range by range."""
    net, T, N = NETS[which], 2, 300
    p, v, x, w, gy = inputs(net, T, N)
    batch = fm.Batch(x, rand(T, N, 3, seed=2).float(), counts=torch.tensor([300, 7]))
    lr = torch.full((1, 1, 1), 1e-2).expand(1, T, net.num_params)

    def all_of(memory):
        with pytest.MonkeyPatch.context() as patch:
            if memory is not None:  # of mlp, which has no argument for it
                patch.setattr(native, "DEFAULT_MEMORY", memory)
            out = [passes.mlp(net, p, x), *passes.mlp_grad(net, p, x, gy)]
            out += passes.mlp_dual(net, p, x, v, w, gy)
            out += passes.loss_hvp(net, p, v, batch, max_memory=memory)
            out += listed(passes.maml(net, p[:1], batch, lr, SGD(), order=2, max_memory=memory))
        return out

    whole = all_of(None)
    per_point = 4 * 2 * 2 * net.width * (net.depth - 1)
    for memory in (0, 300 * per_point, 500 * per_point) if mode == "fp32" else (0,):
        assert same(all_of(memory), whole), memory


@pytest.mark.parametrize("mode", ["fp32"])
def test_the_room_keeps_to_the_budget(passes, mode):
    """Beyond what an inner loop must hold, no more than the budget, or the least there is."""
    net, T, N = NETS["siren-48"], 5, 2000
    P = net.num_params
    batch = fm.Batch(rand(N, 2).float(), rand(T, N, 3, seed=2).float())
    sizes = {}
    for memory in (0, 10**6, 3 * 10**6, 10**7, 10**8):
        call = passes._task("maml", net, torch.zeros(1, P), batch, 0, memory)
        call.loop(torch.zeros(2, T, P), SGD(), memory)
        call.job.order = 2
        sizes[memory] = call.job.room(passes.place.mode)
    held = 4 * T * P * (3 + 1 + 1 + 1) + 4 * T * 4 * 64  # θ_0..2, λ, direction, gradient; sums
    least = sizes[0] - held
    for memory, size in sizes.items():
        assert size - held <= max(memory, least) + 64, (memory, size)
    assert least < 3e6 < sizes[10**7] - held
    assert sizes[0] < sizes[3 * 10**6] < sizes[10**7] < sizes[10**8]


# Schedules and barriers ---


def everything(passes):
    """Calls that pass every barrier, sums longer than a piece, and all kinds of tiles."""
    out = []
    for net, N in ((NETS["gelu-100"], 140), (NETS["sigmoid"], 70)):
        p, v, x, w, gy = inputs(net, 1, N)
        batch = fm.Batch(x, rand(1, N, 1, seed=5).float())
        lr = torch.full((1, 1, 1), 1e-2).expand(1, 1, net.num_params)
        out += [passes.mlp(net, p, x), *passes.mlp_grad(net, p, x, gy)]
        out += [*passes.mlp_dual(net, p, x, v, w, gy), *passes.loss_hvp(net, p, v, batch)]
        out += listed(
            passes.maml(net, p, batch, lr, Momentum(), order=2, learned=torch.zeros(1, 1, 1))
        )
    return out


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_the_schedule_changes_no_bit(passes, mode):
    right = everything(passes)
    for seed in (1, 2) if mode == "fp32" else (1,):
        passes.place.library.schedule(seed, -1)
        assert same(everything(passes), right)


def barriers() -> list[str]:
    text = (emulated.CSRC / "cuda" / "layered.h").read_text()
    return [line for line in text.splitlines() if "FM_MEET()" in line]


FIRST = 100  # FM_PLACES of layered.cu


@pytest.mark.parametrize("mode", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_barrier_is_needed(passes, mode):
    library, right = passes.place.library, everything(passes)  # noqa: F811
    assert len(barriers()) == 4
    for place, line in enumerate(barriers(), FIRST):
        caught = False
        for seed in (0, 1, 2):
            library.schedule(seed, place)
            try:
                caught = caught or not same(everything(passes), right)
            except RuntimeError:  # the block was divided
                caught = True
            if caught:
                break
        assert caught, f"nothing noticed that this barrier was gone: {line}"
    library.schedule(0, FIRST + len(barriers()))  # there are no others
    assert same(everything(passes), right)


@pytest.mark.slow
def test_clean_under_sanitizers(build):  # noqa: F811
    """AddressSanitizer and UBSan, in a process of their own."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-fno-omit-frame-pointer", "-Wno-maybe-uninitialized", "-D_GLIBCXX_ASSERTIONS"]
    path = build([(32, "fp32")], *flags)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import emulated, test_cuda_layered
from fastmeta import native
library = emulated.load({str(path)!r})
for mode in emulated.MODES:
    passes = native.Passes("cuda", native.Device(library, mode))
    for t in test_cuda_layered.everything(passes):
        assert t.isfinite().all()
print("clean")
"""
    find = ["g++", "-print-file-name=libasan.so"], ["g++", "-print-file-name=libubsan.so"]
    preload = " ".join(subprocess.check_output(f, text=True).strip() for f in find)
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]


# Wide ones ---


@pytest.mark.slow
@pytest.mark.parametrize("mode", emulated.MODES)
def test_the_papers_width(passes, mode):
    net = fm.siren(2, 3, 256, 5, 30.0, output_shift=0.5)
    p, v, x, w, gy = inputs(net, 1, 130)
    v *= 1e-3
    check(
        passes, "mlp_dual", net, p, x, v, w, gy,
        twin=lambda net, p, x, v, w, gy: rounded.given_pass(net, mode, p, x, gy, v, w),
    )  # fmt: skip
    batch = fm.Batch(x, rand(1, 130, 3, seed=2).float())
    check(
        passes, "loss_hvp", net, p, v, batch,
        twin=lambda net, p, v, b: rounded.task_pass(net, mode, p, v, b, 0)[1:],
    )  # fmt: skip


# The compiler ---

REGISTERS = (128, 168)  # plain, dual: 4 and 3 blocks of 128 threads; nothing spills


def report(tmp_path, source, arch, *flags):
    """(kernel, spilled bytes, registers) as ptxas says."""
    compiler = cuda_build.nvcc()
    if compiler is None:
        assert not NAMED, "FASTMETA_TEST_IMPLS names cuda, and there is no nvcc"
        pytest.skip("no nvcc")
    command = [compiler, *cuda_build._NVCC, *cuda_build.gencode((arch,)), "-Xptxas", "-v", *flags]
    command += ["-c", str(emulated.CSRC / "cuda" / source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"function '(\S*)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg",
        done.stderr,
        re.DOTALL,
    )
    return [(name, int(a) + int(b), int(c)) for name, a, b, c in found]


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize(
    "mode", ["fp16", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fp32", "tf32", "bf16"))]
)
def test_registers_and_spills(tmp_path, mode, arch):
    flags = [f"-DFM_MODE={emulated.MODES.index(mode)}", f"-DFM_MODE_NAME={mode}"]
    found = report(tmp_path, "layered.cu", arch, *flags)
    assert len(found) == (12 if mode == "fp32" else 6)
    for name, spilled, registers in found:
        print(mode, arch, name, registers)
        dual = re.search(r"4ModeE\dELb(\d)E", name)[1] == "1"
        assert spilled == 0 and registers <= REGISTERS[dual], (name, spilled, registers)


@pytest.mark.parametrize(
    "arch", ["90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("80", "100"))]
)
def test_registers_of_the_small_kernels(tmp_path, arch):
    for name, spilled, registers in report(tmp_path, "layered_loop.cu", arch):
        assert spilled == 0 and registers <= 64, (name, spilled, registers)
