"""What stands between a network and its loss in the CUDA worker, on the emulator: points, rays and
pixels laid out, loss and adjoint, compositing and the projector, against float64."""

from __future__ import annotations

import re
import subprocess

import emulated
import pytest
import torch
from helpers import cancelling, generator, parameters, rand
from test_cuda import NAMED, build, library, poisoned, same  # noqa: F401

import fastmeta as fm
from fastmeta import cuda_build, native, reference
from fastmeta.batch import nearest_pixels
from fastmeta.reference import Dual, value
from fastmeta.rules import SGD, Momentum


@pytest.fixture
def place(library):  # noqa: F811
    return native.Device(library((32, "fp32")), "fp32")


def close(name, ours, plain, truth, scales=None):
    """At most twice the error of plain torch in float32, plus three roundings of each number (one
    ray's alone may have come out exact), or of the terms of size ``scales[i]`` that cancel in
    result i."""
    for i, (a, p, c) in enumerate(zip(ours, plain, truth, strict=True)):
        assert torch.isfinite(a).all(), (name, i)
        away, theirs = (float((q.double() - c).norm()) for q in (a, p))
        rounding = 4e-7 * max(float(c.norm()), (scales or {}).get(i, 0.0))
        assert away <= 2 * theirs + rounding, (name, i, away, theirs, rounding)


# Points and losses ---


def outputs(net, batch, points, dual):
    """What a network might say at T tasks' points: [planes,T,M,C]."""
    shape = (2 if dual else 1, batch.tasks, points, net.out_features)
    return rand(*shape, seed=21, low=-1, high=2).float()


def measured(place, net, batch, step, dual, back=True, slices=None):
    """(x [T,M,D], y's adjoint [planes,T,M,C], loss [T], y) of the kernels, a chunk at a time."""
    call = native._Call(place, "loss", net, batch.y)
    call.batch(call.job.data, batch)
    call.job.step = step
    kernels, T = place.library, batch.tasks
    M = kernels.network_points(call.job)
    y = outputs(net, batch, M, dual)
    xs, bars, losses = [], [], []
    for first, tasks in slices or [(0, T)]:
        room = torch.empty(kernels.measure_room(call.job, tasks, dual))
        x, loss = torch.empty(tasks, M, net.in_features), torch.empty(tasks)
        mine = y[:, first : first + tasks].clone()
        where = room.data_ptr()
        kernels.lay_points(call.job, first, tasks, x.data_ptr(), where)
        before = [mine.data_ptr(), loss.data_ptr(), where]
        kernels.measure_loss(call.job, first, tasks, dual, back, *before)
        xs, bars, losses = [*xs, x], [*bars, mine], [*losses, loss]
    return torch.cat(xs), torch.cat(bars, 1), torch.cat(losses), y


def expected(net, batch, step, y, dtype):
    """The same by the reference, with nothing of a network in between."""
    batch = batch.to(dtype)
    y = y.to(dtype)
    sample = reference.draw(batch, step)
    number = Dual(y[0], y[1]) if len(y) == 2 else y[0]
    every = slice(None)
    if isinstance(batch.measure, fm.Project):
        x, W = sample.x, batch.y.shape[-1]
        pixels = batch.measure.pixels(W)
        image = reference._linear(lambda q: q.unflatten(1, (W, W))[..., 0], number)
        sinogram = reference._linear(lambda q: reference.project(q, pixels), image)
        loss, bar = reference._seed_adjoint(batch, sample, every, every, sinogram)
        bar = reference._linear(lambda q: reference.project_adjoint(q, pixels).flatten(1), bar)
        bar = bar[..., None]
    elif isinstance(batch.measure, fm.March):
        t = sample.t
        x = sample.rays.origins[:, :, None] + t[..., None] * sample.rays.directions[:, :, None]
        x = x.flatten(1, 2)
        raw = reference._linear(lambda q: q.unflatten(1, t.shape[1:]), number)
        rgb, _, acc, marched = reference.composite_forward(raw, t, batch.measure)
        loss, grgb = reference._seed_adjoint(batch, sample, every, every, rgb)
        zero = torch.zeros_like(value(acc))
        bar, _ = reference.composite_backward(marched, t, batch.measure, grgb, zero, zero)
        bar = reference._linear(lambda q: q.flatten(1, 2), bar)
    else:
        x = sample.x
        loss, bar = reference._seed_adjoint(batch, sample, every, every, number)
    x = x.expand(batch.tasks, -1, -1)
    return x, value(bar), along(bar) if len(y) == 2 else bar, loss


def along(bar):
    """The tangent; zeros where the reference has none."""
    d = bar.d if isinstance(bar, Dual) else None
    return torch.zeros_like(value(bar)) if d is None else d


def point_batches(outputs):
    T, N = 3, 300
    x, y = rand(T, N, 2, seed=1).float(), rand(T, N, outputs, seed=2).float()
    seed, counts = torch.tensor([5, -(2**40), 7]), torch.tensor([1, 290, 300])
    beyond = torch.arange(N)[:, None] >= counts[:, None, None]
    x_padded, y_padded = (torch.where(beyond, float("nan"), q) for q in (x, y))
    return {
        "all": fm.Batch(x, y),
        "shared": fm.Batch(x[0], y, loss="l1"),
        "ragged": fm.Batch(x_padded, y_padded, counts=counts, loss=("l1", 0.6)),
        "drawn": fm.Batch(x_padded, y_padded, counts=counts, per_step=150, seed=seed),
    }


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("outputs", [1, 3, 9])
@pytest.mark.parametrize("kind", ["all", "shared", "ragged", "drawn"])
def test_points(place, kind, outputs, dual):
    net, step = fm.siren(2, outputs, 32, 3), 4
    batch = point_batches(outputs)[kind]
    x, bar, loss, y = measured(place, net, batch, step, dual)
    truth, plain = (expected(net, batch, step, y, t) for t in (torch.float64, torch.float32))
    assert torch.equal(x, plain[0])
    close(kind, (bar[0], bar[-1], loss), plain[1:], truth[1:])
    split = measured(place, net, batch, step, dual, slices=[(0, 1), (1, 2)])
    assert same(split[:3], (x, bar, loss))
    kept = measured(place, net, batch, step, dual, back=False)
    assert torch.equal(kept[1], y) and torch.equal(kept[2], loss)


def ray_batches(march):
    T, R = 3, 9
    origins = 3 * rand(T, R, 3, seed=1, low=-1).float()
    directions = rand(T, R, 3, seed=2, low=-1).float()
    y, far = rand(T, R, 3, seed=3).float(), torch.tensor([6.0, 5.0, 7.5])
    seed, counts = torch.tensor([5, -(2**40), 7]), torch.tensor([1, 9, 6])
    beyond = torch.arange(R)[:, None] >= counts[:, None, None]
    padded = [torch.where(beyond, float("nan"), q) for q in (origins, directions, y)]
    rays, some = fm.Rays(origins, directions, 2.0, far), fm.Rays(*padded[:2], 2.0, far)
    return {
        "all": fm.Batch(rays, y, measure=march),
        "jitter": fm.Batch(rays, y, measure=march, seed=seed, loss="l1"),
        "ragged": fm.Batch(some, padded[2], measure=march, seed=seed, counts=counts),
        "drawn": fm.Batch(
            some, padded[2], measure=march, seed=seed, counts=counts, per_step=7, loss=("l1", 0.6)
        ),
    }


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("samples", [2, 40])
@pytest.mark.parametrize("kind", ["all", "jitter", "ragged", "drawn"])
def test_rays(place, kind, samples, dual):
    net, step = fm.nerf_mlp(8, 3), 4
    white, density = kind in ("all", "drawn"), "softplus" if kind == "jitter" else "relu"
    for last in (1e-3, 1e10):
        batch = ray_batches(fm.March(samples, last, white, density))[kind]
        x, bar, loss, y = measured(place, net, batch, step, dual)
        truth, plain = (expected(net, batch, step, y, t) for t in (torch.float64, torch.float32))
        close(kind, (x, bar[0], bar[-1], loss), plain, truth)
        split = measured(place, net, batch, step, dual, slices=[(0, 1), (1, 2)])
        assert same(split[:3], (x, bar, loss))
        kept = measured(place, net, batch, step, dual, back=False)
        assert torch.equal(kept[1], y) and torch.equal(kept[2], loss)


def scans(size, angles):
    x = rand(size * size, 2, seed=1).float()
    y = rand(3, angles, size, seed=2).float()
    theta = 3.2 * rand(3, angles, seed=3)
    return fm.Batch(x, y, measure=fm.Project(theta), loss="l1" if size == 33 else "mse")


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(("size", "angles"), [(1, 1), (8, 5), (33, 3)])
def test_projections(place, size, angles, dual):
    net, batch = fm.siren(2, 1, 32, 3), scans(size, angles)
    x, bar, loss, y = measured(place, net, batch, 0, dual)
    truth, plain = (expected(net, batch, 0, y, t) for t in (torch.float64, torch.float32))
    assert torch.equal(x, plain[0])
    close("project", (bar[0], bar[-1], loss), plain[1:], truth[1:])
    split = measured(place, net, batch, 0, dual, slices=[(0, 1), (1, 2)])
    assert same(split[:3], (x, bar, loss))
    kept = measured(place, net, batch, 0, dual, back=False)
    assert torch.equal(kept[1], y) and torch.equal(kept[2], loss)


def test_more_than_the_blocks_of_a_task(place):
    """A task has 1024 blocks at most, of 128 points or 4 rays; then they take several in turn."""
    N, R = 1024 * 128 + 5, 1024 * 4 + 3
    points = fm.Batch(rand(1, N, 1, seed=1).float(), rand(1, N, 1, seed=2).float())
    o, d, y = (rand(1, R, 3, seed=s, low=-1).float() for s in (1, 2, 3))
    seen = fm.Batch(fm.Rays(o, d, 2.0, 6.0), y, measure=fm.March(2), seed=torch.tensor([3]))
    for net, batch in ((fm.siren(1, 1, 32, 3), points), (fm.nerf_mlp(8, 3), seen)):
        x, bar, loss, y = measured(place, net, batch, 4, False)
        truth, plain = (expected(net, batch, 4, y, t) for t in (torch.float64, torch.float32))
        close("many", (x, bar[0], loss), *([a, b, d] for a, b, _, d in (plain, truth)))


# Compositing ---

OPAQUE, EMPTY, FAINT = 6, 7, 8  # rays; the others have densities on both sides of 0


def rays(samples, density):
    """raw, t and directions of nine rays; with a last interval of 1e10 the last one's adjoints
    reach 1e20."""
    shape = (9, samples)
    raw, vraw = (
        torch.randn(*shape, 4, generator=generator(s), dtype=torch.float64) for s in (1, 3)
    )
    raw[..., 3] *= 3.0 if density == "relu" else 6.0
    raw[OPAQUE, :, 3], raw[OPAQUE, samples // 2, 3] = -200.0, 1e9
    raw[EMPTY, :, 3] = -200.0
    raw[FAINT, :, 3] = -200.0
    raw[FAINT, -1, 3] = 1e-10 if density == "relu" else -23.0
    t = 2 + 4 * torch.sort(rand(*shape, seed=2), -1)[0]
    vt = torch.randn(shape, generator=generator(4), dtype=torch.float64)
    bars = (rand(9, 3, seed=5, low=-1), rand(9, seed=6, low=-1), rand(9, seed=7, low=-1))
    return [q.float() for q in (raw, t, vraw, vt)], [q.float() for q in bars]


def shown(worker, march, raw, t, vraw, vt, *bars):
    return (
        *worker.composite(raw, t, march),
        *worker.composite_grad(raw, t, march, *bars),
        *worker.composite_dual(raw, t, march, vraw, vt, *bars),
    )


@pytest.mark.parametrize("last", [1e-3, 1e10])
@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("density", ["relu", "softplus"])
@pytest.mark.parametrize("samples", [1, 2, 31, 64, 100, 128])
def test_composite(place, samples, density, white, last):
    march = fm.March(max(samples, 2), last, white, density)
    inputs, bars = rays(samples, density)
    wide = [q.double() for q in (*inputs, *bars)]
    ours = shown(native.Passes("cuda", place), march, *inputs, *bars)
    plain, truth = shown(reference, march, *inputs, *bars), shown(reference, march, *wide)
    for group in (slice(0, OPAQUE), *(slice(r, r + 1) for r in (OPAQUE, EMPTY, FAINT))):
        part = [[q[group] for q in all_] for all_ in (ours, plain, truth)]
        raw, t, vraw, vt, *g = (q[group] for q in wide)
        close((group, last), *part, cancelling(raw, t, march, vraw, vt, g))
    if last > 1 and density == "relu":
        assert float(ours[8][FAINT, -1, 3].abs()) > 1e17


# The projector ---


@pytest.mark.parametrize(("size", "angles"), [(1, 2), (7, 4), (40, 3)])
def test_project(place, size, angles):
    """Against float64, and <P image, s> = <image, P* s>; pixels that no line meets are 0."""
    passes = native.Passes("cuda", place)
    pixels = nearest_pixels(3.2 * rand(2, angles, seed=1), size)
    image = rand(2, size, size, seed=2, low=-1).float()
    sino = rand(2, angles, size, seed=3, low=-1).float()
    ours = passes.project(image, pixels), passes.project_adjoint(sino, pixels)
    plain, truth = (
        (reference.project(a, pixels), reference.project_adjoint(b, pixels))
        for a, b in ((image, sino), (image.double(), sino.double()))
    )
    close("project", ours, plain, truth)
    inner = (ours[0].double() * sino).sum(), (ours[1].double() * image).sum()
    assert abs(float(inner[0] - inner[1])) < 1e-6 * size
    assert ours[1][truth[1] == 0].eq(0).all()
    once = native._inverse(pixels)
    assert native._inverse(pixels) is once  # sorted once for these pixels


# Whole losses: rays and projections of small networks, layer by layer ---

NETS = {
    "all": fm.nerf_mlp(8, 3),
    "jitter": fm.MLP(3, 4, 20, 3, "sine", w0=5.0),
    "ragged": fm.nerf_mlp(20, 4, frequencies=3, max_exponent=2.0),
    "drawn": fm.nerf_mlp(8, 4, frequencies=4, max_exponent=3.0),
    "project": fm.siren(2, 1, 20, 3, 6.0),
    "features": fm.fourier_mlp(2, 1, 8, 3, features=5, scale=2.0),
}


def whole(kind):
    """(net, batch with a query of its own)."""
    if kind in ("project", "features"):
        batch, other = scans(9, 4), scans(9, 4)
        query = fm.Batch(other.x, other.y.flip(0), measure=other.measure, loss="l1")
    else:
        far, density = (1e10, "softplus") if kind == "jitter" else (1e-3, "relu")
        march = fm.March(12, far, kind != "ragged", density)
        batch = ray_batches(march)[kind]
        query = None if kind == "all" else ray_batches(march)["jitter"]
    given = {q: getattr(batch, q) for q in ("measure", "loss", "per_step", "seed", "counts")}
    return NETS[kind], fm.Batch(batch.x, batch.y, query=query, **given)


@pytest.mark.parametrize("kind", NETS)
def test_losses_and_inner_loops(place, kind):
    net, batch = whole(kind)
    wide, T, K = batch.to(torch.float64), batch.tasks, 2
    p = parameters(net, 1).float()
    v = rand(T, net.num_params, seed=9, low=-1).float()
    rates = rand(K, 1, 1, seed=8, low=1e-3, high=1e-2).float()

    def run(worker, dtype, data):
        a, b, r = p.to(dtype), v.to(dtype), rates.to(dtype)
        lr = r.expand(K, T, net.num_params)
        out = [*worker.loss_grad(net, a, data, 3), *worker.loss_hvp(net, a, b, data, 3)]
        out.append(worker.loss(net, a, data, 3))
        for rule in (SGD(), Momentum(0.8)):
            theta, losses = worker.adapt(net, a, data, lr, rule)[:2]
            out += [theta - a, losses]
            for order in (1, 2):
                out += worker.maml(net, a, data, lr, rule, order=order, learned=r)
        return out

    ours = run(native.Passes("cuda", place), torch.float32, batch)
    plain = run(reference, torch.float32, batch)
    close(kind, ours, plain, run(reference, torch.float64, wide))


@pytest.mark.parametrize("kind", ["ragged", "drawn", "project"])
def test_the_budget_changes_no_bit(place, kind):
    """All tasks at once, task by task; parts of a task's rays and pixels."""
    passes, (net, batch) = native.Passes("cuda", place), whole(kind)
    T, P = batch.tasks, net.num_params
    p, v = parameters(net, 1).float(), rand(T, P, seed=9, low=-1).float()
    lr = torch.full((1, 1, 1), 1e-2).expand(2, T, P)

    def all_of(memory):
        out = [*passes.loss_hvp(net, p, v, batch, 3, memory)]
        out += passes.maml(net, p, batch, lr, SGD(), order=2, max_memory=memory)[:2]
        return out

    right = all_of(None)
    for memory in (0, 10**5):
        assert same(all_of(memory), right)


# Schedules, memory and the compiler ---


def everything(place):
    """Calls that reach every kernel of measure.cu, rays of three times 32 samples among them."""
    passes = native.Passes("cuda", place)
    inputs, bars = rays(70, "relu")
    out = [*shown(passes, fm.March(70, 1e10, False), *inputs, *bars)]
    pixels = nearest_pixels(3.2 * rand(2, 3, seed=1), 35)
    out.append(passes.project(rand(2, 35, 35, seed=2).float(), pixels))
    out.append(passes.project_adjoint(rand(2, 3, 35, seed=3).float(), pixels))
    for dual in (False, True):
        for kind in ("ragged", "drawn"):
            out += measured(place, fm.siren(2, 3, 32, 3), point_batches(3)[kind], 4, dual)[:3]
            batch = ray_batches(fm.March(40))[kind]
            out += measured(place, fm.nerf_mlp(8, 3), batch, 4, dual)[:3]
        out += measured(place, fm.siren(2, 1, 32, 3), scans(33, 3), 0, dual)[:3]
    return out


def test_the_schedule_changes_no_bit(place):
    right = everything(place)
    assert all(torch.isfinite(q).all() for q in right)
    for seed in (1, 2, 3):
        place.library.schedule(seed, -1)
        assert same(everything(place), right)
    place.library.schedule(0, -1)


def test_there_is_no_barrier_to_miss():
    """No block shares memory: what crosses threads is an exchange of a warp, or another launch."""
    for name in ("measure.cu", "ray.h"):
        text = (emulated.CSRC / "cuda" / name).read_text()
        assert "FM_MEET" not in text and "shared_memory()" not in text


@pytest.mark.slow
def test_clean_under_sanitizers(build):  # noqa: F811
    """AddressSanitizer and UBSan, in a process of their own."""
    code = """
import test_cuda_measure
for t in test_cuda_measure.everything(native.Device(library, "fp32")):
    assert t.isfinite().all()
"""
    emulated.run_sanitized(build, (32, "fp32"), code)


# Registers at most, plain and dual: eight blocks of 128 threads on a multiprocessor, six where a
# warp walks a ray, four where it does on dual numbers.
REGISTERS = {"rays_loss": (80, 128), "composite": (80, 128)}


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_registers_and_spills(tmp_path, arch):
    compiler = cuda_build.nvcc()
    if compiler is None:
        assert not NAMED, "FASTMETA_TEST_IMPLS names cuda, and there is no nvcc"
        pytest.skip("no nvcc")
    command = [compiler, *cuda_build._NVCC, *cuda_build.gencode((arch,)), "-Xptxas", "-v", "-c"]
    command += [str(emulated.CSRC / "cuda/measure.cu"), "-o", str(tmp_path / "measure.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"function '(\S*)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg",
        done.stderr,
        re.DOTALL,
    )
    assert len(found) == 14, done.stderr
    for name, stores, loads, registers in found:
        print(f"sm_{arch} {name}: {registers}")
        most = next((v for k, v in REGISTERS.items() if k in name), (64, 64))["Lb1E" in name]
        assert (stores, loads) == ("0", "0") and int(registers) <= most, (name, registers)
