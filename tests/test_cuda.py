"""The CUDA kernels without a GPU: their own source on the CPU emulator, against float64 and against
a twin that rounds where they round; every barrier taken out in turn; what ptxas says of them; what
the worker refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import emulated
import pytest
import rounded_cuda as rounded
import torch
from helpers import error, parameters, rand

import fastmeta as fm
from fastmeta import cuda_build, native, reference
from fastmeta.ops import dispatch
from fastmeta.rules import SGD, Adam, MetaSGD, Momentum

NAMED = "cuda" in os.environ.get("FASTMETA_TEST_IMPLS", "").split(",")
# The emulator needs what compiles the CPU worker: where that one is named, it must be there.
EMULATOR_NAMED = NAMED or "cpu" in os.environ.get("FASTMETA_TEST_IMPLS", "").split(",")
FAST = [(32, "fp32"), (64, "fp16"), (16, "bf16"), (32, "tf32")]
SLOW = [v for v in emulated.VARIANTS if v not in FAST]
EVERY = [*FAST, *(pytest.param(v, marks=pytest.mark.slow) for v in SLOW)]
# What the emulated device is: blocks of a cluster at most, blocks at once, multiprocessors that
# work is dealt out for. On LARGE two tiles are two shares of a task; on ALONE a block runs it.
LARGE, ALONE = (8, 2**20, 132), (8, 2**20, 0)
NAME = {"ids": lambda v: f"{v[0]}-{v[1]}" if isinstance(v, tuple) else None}


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """``build(variants, *flags)``: the emulated module's path, made once for all processes."""
    reason = emulated.why_not()
    if reason is not None:
        if EMULATOR_NAMED:
            pytest.fail(f"FASTMETA_TEST_IMPLS names cpu or cuda, and the emulator finds {reason}")
        pytest.skip(f"the emulator cannot be built: {reason}")
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    return lambda variants, *flags: emulated.build(base / "emulated", variants, *flags)


@pytest.fixture(scope="session")
def library(build, request):
    """``library(variant)``: the module that holds a variant."""
    loaded: dict = {}
    everything_runs = any(
        "variant" in getattr(item, "fixturenames", ()) and item.get_closest_marker("slow")
        for item in request.session.items
    )

    def find(variant):
        # one module a process: a second one would meet the first one's types
        group = emulated.VARIANTS if everything_runs else FAST
        if not loaded:
            loaded["it"] = emulated.load(build(group))
        loaded["it"].schedule(0, -1)
        loaded["it"].device(*LARGE)
        return loaded["it"]

    return find


@pytest.fixture
def passes(library, variant) -> native.Passes:
    return native.Passes("cuda", native.Device(library(variant), variant[1]))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN: what a kernel forgets to write, or reads before it wrote, shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def nets(width: int) -> list[fm.MLP]:
    """Depths 2 to 5, 1 to 4 coordinates, 1 to 8 outputs, every activation and output once."""
    return [
        fm.siren(2, 3, width, 4, 5.0, 9.0, output_shift=0.5),
        fm.MLP(1, 8, width, 2, "sine", w0=12.0),
        fm.MLP(3, 1, width, 3, "relu", output="tanh"),
        fm.MLP(4, 5, width, 3, "gelu", output="sigmoid"),
        fm.MLP(2, 2, width, 4, "tanh", output="softplus"),
        fm.MLP(2, 4, width, 3, "softplus", output="relu"),
        fm.MLP(3, 2, width, 3, "silu"),
        fm.MLP(2, 1, width, 3, "sigmoid"),
        fm.MLP(2, 1, width, 5, "none"),
    ]


def doubles(value):
    if isinstance(value, fm.Batch):
        return value.to(torch.float64)
    return value.double() if isinstance(value, torch.Tensor) else value


def close(name, ours, plain, rounding, truth, share=0.3):
    """fp32: at most twice the error of plain torch in float32, plus a rounding of its terms.
    Lower precisions: at most that share of what rounding changes away from the twin that rounds
    too. What is left are operands so near the middle of two numbers that float32 tips them; a
    fiftieth of the phases, each by one of 65536 steps, hence 1.2e-5."""
    for i, (a, p, r, c) in enumerate(zip(ours, plain, rounding, truth, strict=True)):
        small, away, changed = 2 * error(p, c) + 4e-7, error(a, r), error(r, c)
        allowed = small + (share * changed + 1.2e-5 if changed > small else 0)
        assert away <= allowed, (name, i, away, small, changed)


def listed(out):
    return [out] if isinstance(out, torch.Tensor) else [o for o in out if o is not None]


# Single passes ---


# A tile of every network, several tiles of three.
@pytest.mark.parametrize("variant", EVERY, **NAME)
@pytest.mark.parametrize(
    ("which", "points", "device"),
    [
        *((i, 17, LARGE) for i in range(9)),
        *((i, 150, device) for i in range(3) for device in (LARGE, ALONE)),
    ],
)
def test_single_passes(passes, variant, which, points, device):
    mode, net = variant[1], nets(variant[0])[which]
    passes.place.library.device(*device)
    p, v = parameters(net, 1).float(), rand(1, net.num_params, seed=9, low=-1).float()
    x, w = (rand(1, points, net.in_features, seed=s, low=-1).float() for s in (1, 7))
    gy = 1e-3 * rand(1, points, net.out_features, seed=6, low=-1).float()

    def three(name, *args, twin):
        wide = [doubles(a) for a in args]
        plain = listed(getattr(reference, name)(*args))
        truth = listed(getattr(reference, name)(*wide))
        ours, rounding = listed(getattr(passes, name)(*args)), listed(twin(*wide))
        # of 17 points a single operand that tips is seen
        close(name, ours, plain, rounding, truth, share=0.5 if points < 100 else 0.3)

    three(
        "mlp", net, p, x,
        twin=lambda net, p, x: rounded.Rounded(net, mode).run(net.layers(p), x, lambda y: y)[0],
    )  # fmt: skip
    three("mlp_grad", net, p, x, gy, twin=lambda *a: rounded.given_pass(a[0], mode, *a[1:]))
    three(
        "mlp_dual", net, p, x, v, w, gy,
        twin=lambda net, p, x, v, w, gy: rounded.given_pass(net, mode, p, x, gy, v, w),
    )  # fmt: skip
    for loss in ("mse", "l1", ("l1", 0.4)):
        batch = fm.Batch(x, rand(1, points, net.out_features, seed=2).float(), loss=loss)
        three(
            "loss_hvp", net, p, v, batch,
            twin=lambda net, p, v, b: rounded.task_pass(net, mode, p, v, b, 0)[1:],
        )  # fmt: skip
        three(
            "loss_grad", net, p, batch,
            twin=lambda net, p, b: rounded.task_pass(net, mode, p, None, b, 0)[:2],
        )  # fmt: skip
    assert torch.equal(passes.loss(net, p, batch), passes.loss_grad(net, p, batch)[0])


@pytest.mark.parametrize("variant", FAST, **NAME)
def test_what_tasks_share(passes, variant):
    """One row of parameters, one set of points: the same bits as their copies."""
    net, T, N = nets(variant[0])[0], 3, 33
    p, x = parameters(net, T).float(), rand(T, N, 2, seed=1).float()
    gy = rand(T, N, 3, seed=2, low=-1).float()
    y = passes.mlp(net, p, x)
    assert torch.equal(y[1:2], passes.mlp(net, p[1:2], x[1:2]))
    assert torch.equal(passes.mlp(net, p[:1], x), passes.mlp(net, p[:1].expand(T, -1).clone(), x))
    ours = passes.mlp_grad(net, p, x[:1], gy)
    copies = passes.mlp_grad(net, p, x[:1].expand(T, N, 2).clone(), gy)
    assert torch.equal(ours[0], copies[0]) and error(ours[1], copies[1].sum(0, True)) < 1e-6
    batch = fm.Batch(x[0], rand(T, N, 3, seed=3).float())
    v = rand(1, net.num_params, seed=4).float()
    for a, b in zip(
        passes.loss_hvp(net, p[:1], v, batch),
        passes.loss_hvp(net, p[:1].repeat(T, 1), v.repeat(T, 1), batch),
        strict=True,
    ):
        assert torch.equal(a, b)


# Inner loops and meta-gradients ---


def batches(net) -> dict[str, fm.Batch]:
    """Everything a batch may hold: a query of other points, ragged counts, draws, other losses."""
    T, N, D, C = 2, 70, net.in_features, net.out_features
    x, y = rand(T, N, D, seed=1).float(), rand(T, N, C, seed=2).float()
    seed, counts = torch.tensor([5, -(2**40)]), torch.tensor([19, 66])
    other = fm.Batch(rand(T, 9, D, seed=3).float(), rand(T, 9, C, seed=4).float(), loss="l1")
    padded = torch.where(torch.arange(N)[:, None] < counts[:, None, None], y, float("nan"))
    return {
        "all": fm.Batch(x, y),
        "query": fm.Batch(x[0], y, query=other),
        "ragged": fm.Batch(x, padded, counts=counts, loss=("l1", 0.6)),
        "drawn": fm.Batch(x, padded, counts=counts, per_step=23, seed=seed),
    }


# Adam's way back divides by |g| + ε: with ε = 1e-3 a single entry of |g| = 9e-4, a sum of terms of
# 0.3 and so 2e-8 from the truth, turned 6e-6 of a whole meta-gradient.
RULES = [SGD(), MetaSGD(), Momentum(0.8), Momentum(0.9, True, 0.01), Adam(eps=0.3)]


def loop_cases() -> list:
    """Every rule, each kind of batch with two of them; the slow variants with all."""
    cases = []
    for variant in emulated.VARIANTS:
        own = RULES[FAST.index(variant) + 1] if variant in FAST else None
        for kind in ("all", "query", "ragged", "drawn"):
            for rule in RULES:
                quick = variant in FAST and (kind == "all" or rule in (SGD(), own))
                if quick or variant not in FAST:
                    name = f"{variant[0]}-{variant[1]}-{kind}-{rule.name}"
                    name += "-nesterov" if getattr(rule, "nesterov", False) else ""
                    marks = [] if quick else [pytest.mark.slow]
                    cases.append(pytest.param(variant, rule, kind, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("variant", "rule", "kind"), loop_cases())
@pytest.mark.parametrize("device", [LARGE, ALONE], ids=["team", "alone"])
def test_inner_loops_and_meta_gradients(passes, variant, rule, kind, device, monkeypatch):
    mode, K = variant[1], 3
    passes.place.library.device(*device)
    net = nets(variant[0])[0 if kind in ("all", "drawn") else 5]
    batch = batches(net)[kind]
    wide, T, P = batch.to(torch.float64), batch.tasks, net.num_params
    p = parameters(net, 1).float()
    shape = {"all": (P,), "query": (K, 1, 1), "ragged": (T, 1), "drawn": (K, T, P)}[kind]
    rates = rand(*shape, seed=8, low=1e-3, high=1e-2).float()
    lr = rates.expand(K, T, P)

    def run(worker, dtype, data):
        a, r = p.to(dtype), lr.to(dtype)
        theta, losses, thetas = worker.adapt(net, a, data, r, rule, keep=True)[:3]
        # steps taken, and only in float64's own places: differences of near parameters
        out = [losses, *((thetas[1:] - a).unbind(0))]
        assert torch.equal(theta, thetas[-1])
        for order in (1, 2):
            out += worker.maml(net, a, data, r, rule, order=order, learned=rates.to(dtype))
        return out

    ours, plain = run(passes, torch.float32, batch), run(reference, torch.float32, batch)
    truth = run(reference, torch.float64, wide)
    rounded.patched(monkeypatch, mode)
    close(kind, ours, plain, run(reference, torch.float64, wide), truth, share=0.4)
    assert torch.equal(passes.adapt(net, p, batch, lr, rule)[0] - p, ours[K])
    loss, grad, rate = passes.maml(net, p, batch, lr, rule, order=2)
    assert torch.equal(grad, ours[-2]) and torch.equal(loss, ours[-3]) and rate is None


@pytest.mark.parametrize("variant", [(32, "fp32")], **NAME)
def test_no_steps(passes, variant):
    net, p = nets(32)[0], parameters(nets(32)[0], 1).float()
    batch, lr = batches(net)["all"], torch.zeros(0, 2, net.num_params)
    theta, losses, _ = passes.adapt(net, p, batch, lr, SGD())
    assert torch.equal(theta, p.expand(2, -1)) and losses.shape == (0, 2)
    loss, grad, _ = passes.maml(net, p, batch, lr, SGD(), order=2)
    want, g = passes.loss_grad(net, p, batch)
    assert torch.equal(loss, want) and error(grad, g.mean(0)) < 1e-6


# Teams: the blocks that share a task ---


@pytest.mark.parametrize(
    ("variant", "rule", "kind"),
    [
        ((32, "fp32"), SGD(), "all"),
        ((32, "fp32"), Momentum(0.9, True, 0.01), "query"),
        ((32, "fp32"), Adam(eps=0.3), "ragged"),
        ((16, "bf16"), MetaSGD(), "ragged"),
        ((16, "bf16"), Adam(eps=0.3), "drawn"),
    ],
    **NAME,
)
def test_teams(passes, variant, rule, kind, monkeypatch):
    """Few tasks of many points: shares of several tiles, some of them without points, and more than
    16 of them; by clusters, blocks all there at once, fewer of them, and one: the same bits, which
    are as near to float64 as one block's sums are."""
    (width, mode), K, T, N = variant, 2, {"all": 1, "drawn": 1}.get(kind, 3), 700
    net, library = nets(width)[0], passes.place.library
    p, x, y = parameters(net, 1).float(), rand(T, N, 2, seed=1).float(), rand(T, N, 3).float()
    counts = torch.tensor([700, 1, 129])[:T]
    batch = {
        "all": fm.Batch(x, y),
        "query": fm.Batch(x[:, :70], y[:, :70], query=fm.Batch(x, y)),
        "ragged": fm.Batch(x, y, counts=counts, loss="l1"),
        "drawn": fm.Batch(x, y, per_step=300, seed=torch.arange(T) + 3),
    }[kind]
    shape = {"all": (K, 1, 1), "query": (net.num_params,), "ragged": (), "drawn": (1, 1)}[kind]
    rates = rand(*shape, seed=8, low=1e-3, high=1e-2).float()

    def run(worker, dtype, data):
        a, r = p.to(dtype), rates.expand(K, T, net.num_params).to(dtype)
        theta, losses, thetas = worker.adapt(net, a, data, r, rule, keep=True)[:3]
        assert torch.equal(theta, thetas[-1])
        out = [losses, *((thetas[1:] - a).unbind(0))]
        for order in (1, 2):
            out += worker.maml(net, a, data, r, rule, order=order, learned=rates.to(dtype))
        return out

    wide = batch.to(torch.float64)
    plain, truth = run(reference, torch.float32, batch), run(reference, torch.float64, wide)
    rounded.patched(monkeypatch, mode)
    rounding = run(reference, torch.float64, wide)
    for multiprocessors in (132, 2 * T, 0):
        library.device(8, 2**20, multiprocessors)
        right = run(passes, torch.float32, batch)
        close(kind, right, plain, rounding, truth, share=0.4)
        for device in ((1, 2**20), (1, 2 * T + 1), (1, T)):
            library.device(*device, multiprocessors)
            assert same(run(passes, torch.float32, batch), right)


def test_shares_follow_from_the_job(library):
    """The numbers at the head of team.h: rows of P + 1 sums in the working memory."""
    it, net, found = library((64, "fp16")), fm.siren(2, 3, 64, 4), []
    for tasks, points in ((1, 30000), (3, 8000), (64, 1000), (133, 1000), (1024, 1000)):
        for device in (LARGE, (1, 2**20, 132), (1, 1, 132)):
            it.device(*device)
            job = it.Job()
            job.op, (job.net, _) = (
                it.OPS.index("adapt"),
                native._network(it, net, torch.float32, torch.device("cpu")),
            )
            job.data.tasks, job.data.points = tasks, points
            each = job.room(emulated.MODES.index("fp16")) // 4 // tasks
            found.append((each - 32) / (net.num_params + 1))
    assert found[::3] == [235, 63, 4, 0, 0]  # no rows: a share alone stays in shared memory
    assert found[1::3] == found[2::3] == found[::3]


# The emulator and its schedules ---


def everything(passes, width):
    """Calls that pass every barrier, on four tiles."""
    net, N = nets(width)[0], 220
    p, x = parameters(net, 1).float(), rand(1, N, 2, seed=1).float()
    y, gy, w = (rand(1, N, c, seed=s, low=-1).float() for c, s in ((3, 5), (3, 6), (2, 7)))
    v = rand(1, net.num_params, seed=9, low=-1).float()
    batch = fm.Batch(x, y, query=fm.Batch(x[:, :70], y[:, :70]))
    lr = torch.full((1, 1, 1), 1e-2).expand(2, 1, net.num_params)
    out = [passes.mlp(net, p, x), *passes.mlp_grad(net, p, x, gy)]
    out += [*passes.mlp_dual(net, p, x, v, w, gy), *passes.loss_hvp(net, p, v, batch)]
    out += passes.adapt(net, p, batch, lr, Momentum(), keep=True)
    for order in (1, 2):
        for rule, learned in ((Adam(), torch.zeros(2, 1, 1)), (SGD(), torch.zeros(v.shape[1]))):
            out += passes.maml(net, p, batch, lr, rule, order=order, learned=learned)
    return out


def same(a, b):
    return all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


# Clusters and, of other numbers of shares, teams of one block a share; both of several tiles a
# block; no clusters; fewer blocks than shares; one block for all of them.
DEVICES = [LARGE, (8, 2**20, 1), (1, 2**20, 132), (1, 2, 132), (1, 1, 132)]


@pytest.mark.parametrize("variant", FAST, **NAME)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_schedule_changes_no_bit(passes, variant, device):
    library = passes.place.library
    library.device(8, 2**20, device[2])
    right = everything(passes, variant[0])
    library.device(*device)
    for seed in (1, 2, 3):
        library.schedule(seed, -1)
        assert same(everything(passes, variant[0]), right)


def barriers() -> list[str]:
    """The lines with a barrier, in the order in which the compiler counts them."""
    sources = [(emulated.CSRC / "cuda" / name).read_text() for name in ("tile.h", "resident.h")]
    return re.findall(r".*\bFM_MEET(?:_TEAM)?\(.*", "".join(sources))


def is_rich(line: str) -> bool:
    """Whether only features or rays pass this barrier."""
    return "// features" in line or "// rays" in line


@pytest.mark.parametrize("variant", [(32, "fp32")], **NAME)
def test_every_barrier_is_needed(passes, variant):
    library, right = passes.place.library, {}

    def noticed(place: int, seed: int, device: tuple) -> bool:
        library.device(*device)
        if device[2] not in right:
            library.schedule(0, -1)
            right[device[2]] = everything(passes, variant[0])
        library.schedule(seed, place)
        try:
            return not same(everything(passes, variant[0]), right[device[2]])
        except RuntimeError:  # a block, or a team, was divided
            return True

    runs = [(seed, device) for device in DEVICES[:4] for seed in (0, 1, 2)]
    assert len(barriers()) >= 15
    for place, line in enumerate(barriers()):
        if is_rich(line):  # test_cuda_rays.py takes them out
            continue
        assert any(noticed(place, *run) for run in runs), f"not noticed that this was gone: {line}"
    assert not any(noticed(len(barriers()), *run) for run in runs)  # there are no others


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAST, **NAME)
def test_clean_under_sanitizers(build, variant):
    """AddressSanitizer and UBSan, in a process of their own."""
    emulated.run_sanitized(
        build,
        variant,
        f"""
import test_cuda
passes = native.Passes("cuda", native.Device(library, {variant[1]!r}))
for t in test_cuda.everything(passes, {variant[0]}):
    assert t.isfinite().all()
""",
    )


def test_formats_of_the_emulator(tmp_path):
    """Conversions bit by bit against torch: all halves, and floats around every rounding."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source = """
#define FM_EMULATE
#include "cuda/device.h"
using namespace fastmeta;
int main() {
  float x;
  while (std::fread(&x, 4, 1, stdin) == 1) {
    const uint32_t out[3] = {pack_half(x, 0), pack_bfloat(x, 0), to_tf32(x)};
    std::fwrite(out, 4, 3, stdout);
  }
}
"""
    (tmp_path / "formats.cpp").write_text("#include <string>\n" + source)
    flags = ["-std=c++17", "-O1", f"-I{emulated.CSRC}", "formats.cpp", "-o", "formats"]
    subprocess.run(["g++", *flags], check=True, cwd=tmp_path, timeout=120)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    halves = halves[halves.isfinite()]
    near = torch.cat([halves * (1 + k * 2.0**-13) for k in range(-4, 5)])
    x = torch.cat([near, near * 1e-3, near * 1e20, rand(999, low=-1).float()])
    x = x[x.isfinite()]
    done = subprocess.run(
        [tmp_path / "formats"], input=x.numpy().tobytes(), capture_output=True, check=True
    )
    out = torch.frombuffer(bytearray(done.stdout), dtype=torch.int32).view(-1, 3)
    assert torch.equal(out[:, 0].to(torch.int16), x.half().view(torch.int16))
    assert torch.equal(out[:, 1].to(torch.int16), x.bfloat16().view(torch.int16))
    assert torch.equal(out[:, 2].view(torch.float32).double(), rounded.to_format("tf32", x))


# The compiler ---

# Registers at most, plain and dual, on any architecture: as many as let 4 and 3 blocks of 128
# threads run side by side, at width 64 (256 threads) 2 and 1; fp32 and tf32 of it one.
# Nothing may spill, but for four registers of the plain inner loops of points in 16 bit.
REGISTERS = {16: (128, 168), 32: (128, 168), 64: (128, 200)}
WIDE = {"fp32": (200, 200), "tf32": (200, 200)}
# Of the kernels that encode and march: 3 and 2 blocks of 128 threads, at width 64 one of 256.
RICH_REGISTERS = {16: (168, 240), 32: (168, 240), 64: (200, 255)}
# (width, mode) -> KiB of shared memory of a block at depth 4, plain and dual
SHARED = {
    (16, "fp32"): (43, 76), (16, "fp16"): (30, 61),
    (32, "fp32"): (74, 85), (32, "fp16"): (47, 65),
    (64, "fp32"): (122, 160), (64, "fp16"): (113, 157),
}  # fmt: skip


@pytest.mark.parametrize("variant", [(32, "fp16")], **NAME)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_registers_and_spills(tmp_path, variant, arch):
    check_registers(tmp_path, variant, arch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", emulated.VARIANTS, **NAME)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_registers_and_spills_of_all(tmp_path, variant, arch):
    check_registers(tmp_path, variant, arch)


def check_registers(tmp_path, variant, arch):
    compiler = cuda_build.nvcc()
    if compiler is None:
        assert not NAMED, "FASTMETA_TEST_IMPLS names cuda, and there is no nvcc"
        pytest.skip("no nvcc")
    width, mode = variant
    command = [compiler, *cuda_build._NVCC, *cuda_build.gencode((arch,)), "-Xptxas", "-v"]
    command += [f"-DFM_WIDTH={width}", f"-DFM_MODE={emulated.MODES.index(mode)}"]
    command += [f"-DFM_MODE_NAME={mode}", "-c", str(emulated.CSRC / "cuda/variant.cu")]
    command += ["-o", str(tmp_path / "variant.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"function '(\S*)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg",
        done.stderr,
        re.DOTALL,
    )
    kernels = {}
    for name, *numbers in found:
        which = re.search(r"resident.*Lb([01])ELb([01])EEELb([01])E", name)
        if which:
            kernels[tuple(int(b) for b in which.groups())] = map(int, numbers)
    assert len(kernels) == 8, done.stderr
    for (dual, rich, loops), (stores, loads, registers) in kernels.items():
        which = f"dual {dual} rich {rich} loops {loops}"
        print(f"{width} {mode} sm_{arch} {which}: {registers}, {stores}")
        most = WIDE[mode] if width == 64 and mode in WIDE else REGISTERS[width]
        if rich:
            most = RICH_REGISTERS[width]
        spilled = 16 if mode not in WIDE and (dual, rich, loops) == (0, 0, 1) else 0
        assert max(stores, loads) <= spilled, (which, stores, loads)
        assert registers <= most[dual], (which, registers)


@pytest.mark.slow
def test_the_module_builds_and_imports_without_a_gpu(tmp_path, monkeypatch):
    if cuda_build.nvcc() is None:
        pytest.skip("no nvcc")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_build, "_ahead_of_time", lambda: None)
    library = cuda_build.load((9, 0))
    assert (library.WIDTHS, library.MODES) == (cuda_build.WIDTHS, cuda_build.MODES)
    net = fm.siren(2, 3, 64, 4)
    passes = native.Passes("cuda", native.Device(library, "fp16"))
    with pytest.raises(RuntimeError, match="fastmeta cuda: device: cuda"):
        passes.mlp(net, net.init(1), torch.rand(1, 5, 2))


@pytest.mark.parametrize("variant", FAST, **NAME)
def test_shared_memory(library, variant):
    width, mode = variant
    twin = {"tf32": "fp32", "bf16": "fp16"}.get(mode, mode)
    for dual, budget in enumerate(SHARED[width, twin]):
        needs = library(variant).shared_bytes(width, emulated.MODES.index(mode), 4, bool(dual))
        assert budget - 2 < needs / 1024 <= budget, (dual, needs / 1024)


# The worker: what it is asked and refuses ---


def case(**changes):
    net = changes.pop("net", fm.siren(2, 3, 64, 4))
    given = {"op": "adapt", "dtype": torch.float32, "device": "cuda", "net": net, "rule": "sgd"}
    return dispatch.Case(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"net": fm.siren(2, 3, 64, 65)}, "depth 65 (64 at most)"),
        ({"device": "cpu"}, "device cpu (cuda only)"),
        ({"dtype": torch.float64}, "dtype torch.float64 (float32 only)"),
        ({"op": "eikonal", "net": None}, "eikonal (mlp, loss_grad"),
    ],
)
def test_objections(changes, sentence):
    assert any(sentence in reason for reason in native.cuda.objections(case(**changes)))


@pytest.mark.parametrize("net", [fm.siren(2, 3, 64, 4), fm.fourier_mlp(6, 12, 100, 9)])
def test_cases_it_takes(net):
    assert native.cuda.objections(case(net=net)) == []
    for measure in ("none", "march", "project"):
        assert native.cuda.objections(case(net=net, measure=measure)) == []
    for op, measure in (("composite", "march"), ("project", "project")):
        assert native.cuda.objections(case(op=op, net=None, measure=measure)) == []


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert native.cuda.unavailable() == "no CUDA device (torch.cuda.is_available() is False)"
    net, x = fm.siren(2, 3, 64, 4), torch.rand(5, 2)
    with pytest.raises(ValueError, match="no CUDA device"):
        fm.mlp(net, net.init(1), x, impl="cuda")


def test_old_devices_and_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert native.cuda.unavailable() == "compute capability 7.5 (8.0 or newer)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda_build, "_ahead_of_time", lambda: None)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    assert "no nvcc is found (CUDA toolkit 12 or newer; set CUDA_HOME)" in native.cuda.unavailable()
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "ninja", lambda: None)
    reason = native.cuda.unavailable()
    assert reason == "not compiled, which needs the package 'ninja': pip install ninja"


@pytest.mark.parametrize(
    ("driver", "toolkit", "sentence"),
    [
        ((12, 8), (13, 0), "nvcc is of CUDA 13.0, the driver runs CUDA 12.8; a newer driver, or a"),
        ((12, 2), (11, 8), "nvcc is of CUDA 11.8 (12 or newer)"),
        ((12, 2), (12, 9), None),
        ((13, 1), (12, 4), None),
        (None, (13, 0), None),
        ((12, 2), None, None),
    ],
)
def test_drivers_that_are_too_old_are_named(monkeypatch, driver, toolkit, sentence):
    """Within a major version of CUDA any driver runs what any toolkit makes."""
    monkeypatch.setattr(cuda_build, "_ahead_of_time", lambda: None)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "ninja", lambda: "ninja")
    monkeypatch.setattr(cuda_build, "driver", lambda: driver)
    monkeypatch.setattr(cuda_build, "toolkit", lambda compiler: toolkit)
    reason = cuda_build.missing()
    assert reason is None if sentence is None else sentence in reason


def test_the_toolkit_says_its_version(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.20'\n")
    compiler.chmod(0o755)
    assert cuda_build.toolkit(str(compiler)) == (12, 6)
    assert cuda_build.toolkit(str(tmp_path / "absent")) is None


# What it compiles depends on its source and on the header.
FAKE = """#!/bin/sh
echo "$@" >> {log}
for last; do :; done
case "$*" in *FM_WIDTH=16*) {fail} ;; esac
case "$*" in *-MD*) echo "$last: {header}" > "$last.d" ;; esac
echo made > "$last"
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A compiler that writes down what it is asked, and fails at width 16 if told to."""
    if cuda_build.ninja() is None:
        assert not EMULATOR_NAMED, "FASTMETA_TEST_IMPLS names cpu or cuda, and there is no ninja"
        pytest.skip("no ninja")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_build, "_ahead_of_time", lambda: None)
    monkeypatch.setattr(cuda_build, "_import", lambda path: path)
    monkeypatch.setattr(cuda_build, "driver", lambda: None)

    def write(fail: str = "true"):
        path = tmp_path / "nvcc"
        (tmp_path / "header.h").touch()
        text = FAKE.format(log=tmp_path / "log", fail=fail, header=tmp_path / "header.h")
        path.write_text(text)
        path.chmod(0o755)
        monkeypatch.setattr(cuda_build, "nvcc", lambda: str(path))
        return tmp_path / "log"

    return write


def test_a_build_is_made_once_and_kept_by_what_it_depends_on(fake_nvcc):
    log = fake_nvcc()
    made = cuda_build.load((9, 0))
    assert made.read_text() == "made\n" and made == cuda_build.load((9, 0))
    lines = log.read_text().splitlines()
    modes, common = len(emulated.MODES), len(cuda_build.COMMON)
    assert len(lines) == len(emulated.VARIANTS) + modes + common + 2  # and the binding, the link
    assert all("-gencode=arch=compute_90,code=sm_90" in one for one in lines if ".cu " in one)
    assert "-cudart static" in lines[-1] and "-shared" in lines[-1]
    assert cuda_build.load((8, 0)).parent != made.parent
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_only_what_changed_is_compiled_again(fake_nvcc, tmp_path):
    """In a folder that stays, as pip's does: headers by the compiler's own list, and commands."""
    log, target = fake_nvcc(), tmp_path / "built by pip" / "_cuda.so"

    def compiled(archs=("90",)) -> int:
        log.write_text("")
        cuda_build.build(emulated.CSRC, archs, target, tmp_path / "some objects")
        return len(log.read_text().splitlines())

    everything = len(emulated.VARIANTS) + len(emulated.MODES) + len(cuda_build.COMMON) + 2
    assert (compiled(), compiled()) == (everything, 0) and target.is_file()
    later = (tmp_path / "header.h").stat().st_mtime + 10
    os.utime(tmp_path / "header.h", (later, later))
    assert compiled() == everything
    os.utime(tmp_path / "header.h", (later - 20, later - 20))
    assert (compiled(), compiled(("80",))) == (0, everything - 1)  # the binding has no architecture


def test_a_failed_build_leaves_nothing_and_says_what_the_compiler_said(fake_nvcc):
    fake_nvcc("echo no such intrinsic >&2; exit 3")
    with pytest.raises(RuntimeError, match="(?s)compiling failed.*\n.*no such intrinsic"):
        cuda_build.load((9, 0))
    fake_nvcc()
    made = cuda_build.load((9, 0))
    assert made.is_file() and not list(made.parent.parent.glob("building-*"))


def test_both_sides_list_the_same_variants():
    text = (emulated.CSRC / "cuda" / "launch.h").read_text()
    for macro, names in (("FM_WIDTHS", cuda_build.WIDTHS), ("FM_MODES", cuda_build.MODES)):
        body = re.search(rf"#define {macro}\(X\)(.*)", text)[1]
        assert re.findall(r"X\((\w+)\)", body) == [str(n) for n in names]
    assert native.cuda.precisions == cuda_build.MODES
    abi = (emulated.CSRC / "abi.h").read_text()
    assert f"constexpr int kMaxDepth = {native.cuda.max_depth};" in abi
