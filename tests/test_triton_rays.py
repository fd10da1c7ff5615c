"""Triton's rays, draws and projector under its interpreter: values against the reference.

The interpreter runs a kernel's lines in NumPy, float64 too; it shows nothing of a compiler's faults
or of races. It is chosen when triton is imported, so these tests need TRITON_INTERPRET=1.
"""

import math
import os

import pytest
import torch
from helpers import cancelling, error, generator, rand
from torch import Tensor

import fastmeta as fm
from fastmeta import reference, rng
from fastmeta.batch import nearest_pixels

if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip(
        "kernels run without a GPU under Triton's interpreter only: set TRITON_INTERPRET=1",
        allow_module_level=True,
    )
pytest.importorskip("triton")

import triton
import triton.language as tl

from fastmeta.triton import draw, project, render
from fastmeta.triton.launch import recording
from fastmeta.triton.loss import loss_slope

# numbers beyond a branch's range overflow in the branch that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS32 = 2.0**-23
CASES = [(1e-3, True), (1e10, False), (1e-3, False), (1e10, True)]  # last interval, white
LOSSES = [("mse", None), ("l1", None), ("l1", 0.4)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""

    def poison(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made.fill_(-(2**30))

        return filled

    for owner, name in (
        (torch.Tensor, "new_empty"),
        (torch, "empty"),
        (torch, "empty_like"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def close(got: Tensor, want: Tensor, scale: float = 0.0) -> None:
    """Float64: 1e-12 of the norm, or of ``scale`` where terms of that size cancel."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.isfinite(got).all()
    assert float((got - want).norm()) <= 1e-12 * max(float(want.norm()), scale)


def as_good(got: Tensor, plain: Tensor, truth: Tensor, scale: float = 0.0) -> None:
    """Float32: at most twice the error of the reference's own float32, plus a rounding of each
    number, or of the terms of size ``scale`` that make it."""
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    ours, theirs = (float((v.double() - truth).norm()) for v in (got, plain))
    rounding = EPS32 * max(float(truth.norm()), scale)
    assert ours <= 2 * theirs + rounding, (
        f"error {ours:.3g}, reference {theirs:.3g} + {rounding:.3g}"
    )


# Compositing ---


def rays(samples: int, density: str, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """raw, t and directions for both; densities on both sides of 0."""
    raw = torch.randn(*shape, samples, 4, generator=generator(1), dtype=torch.float64)
    raw[..., 3] *= 3.0 if density == "relu" else 6.0
    t = 2 + 4 * torch.sort(rand(*shape, samples, seed=2), -1)[0]
    vraw = torch.randn(raw.shape, generator=generator(3), dtype=torch.float64)
    vt = torch.randn(t.shape, generator=generator(4), dtype=torch.float64)
    return raw, t, vraw, vt


def bars(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rand(*shape, 3, seed=5, low=-1),
        rand(*shape, seed=6, low=-1),
        rand(*shape, seed=7, low=-1),
    )


def single(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(v.float() for v in tensors)


@pytest.mark.parametrize("density", ["relu", "softplus"])
@pytest.mark.parametrize("samples", [2, 33, 100, 128, 200, 600])
def test_composite_and_its_adjoint_plain_and_dual(samples, density):
    shape = (2, 9) if samples < 100 else (3,)
    raw, t, vraw, vt = rays(samples, density, *shape)
    g = bars(*shape)
    for last, white in CASES[: 4 if samples == 2 else 2]:
        march = fm.March(samples, last, white, density)
        got = (
            *render.composite(raw, t, march),
            *render.composite_grad(raw, t, march, *g),
            *render.composite_dual(raw, t, march, vraw, vt, *g),
        )
        want = (
            *reference.composite(raw, t, march),
            *reference.composite_grad(raw, t, march, *g),
            *reference.composite_dual(raw, t, march, vraw, vt, *g),
        )
        scales = cancelling(raw, t, march, vraw, vt, g)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            close(a, b, scales.get(i, 0.0))


@pytest.mark.parametrize("density", ["relu", "softplus"])
@pytest.mark.parametrize("samples", [5, 128, 600])
def test_composite_in_float32(samples, density):
    shape = (2, 9) if samples < 100 else (4,)
    inputs = single(*rays(samples, density, *shape))
    raw, t, vraw, vt = inputs
    g = single(*bars(*shape))
    for last, white in CASES:
        march = fm.March(samples, last, white, density)
        wide = [v.double() for v in (*inputs, *g)]
        results = []
        for worker, (a, b, va, vb, *h) in (
            (render, (*inputs, *g)),
            (reference, (*inputs, *g)),
            (reference, wide),
        ):
            results.append(
                (
                    *worker.composite(a, b, march),
                    *worker.composite_grad(a, b, march, *h),
                    *worker.composite_dual(a, b, march, va, vb, *h),
                )
            )
        scales = cancelling(*wide[:2], march, *wide[2:4], wide[4:])
        for i, (ours, plain, truth) in enumerate(zip(*results, strict=True)):
            as_good(ours, plain, truth, scales.get(i, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_dense_and_far(dtype):
    """No density: nothing shown, no gradient. Density without end, last interval 1e10: no NaN."""
    raw = torch.zeros(4, 4, 4, dtype=dtype)
    raw[0, :, 3] = torch.tensor([0.0, 0.0, 0.0, 1e-10])
    raw[1, :, 3] = -1.0
    raw[2, :, 3] = 1e9
    raw[3, :, 3] = torch.tensor([0.0, 1e9, 0.0, 1e9])
    raw[2, :, :3], raw[3, :, :3] = 200.0, -200.0
    t = torch.linspace(1, 2, 4, dtype=dtype).expand(4, 4)
    march = fm.March(4, 1e10, False)
    ones = torch.ones(4, dtype=dtype)
    g = (torch.ones(4, 3, dtype=dtype), 0 * ones, ones)
    rgb, depth, acc = render.composite(raw, t, march)
    assert rgb[1].eq(0).all() and depth[1] == 0 and acc[1] == 0
    shown = reference.composite(raw, t, march)
    for got, want in zip((rgb, depth, acc), shown, strict=True):
        assert float((got - want).abs().max()) <= 2 * torch.finfo(dtype).eps
    graw, gt = render.composite_grad(raw, t, march, *g)
    assert torch.isfinite(graw).all() and torch.isfinite(gt).all()
    assert graw[1, :, 3].eq(0).all() and graw[0, -1, 3] > 1e9
    v = torch.ones_like(raw)
    dual = render.composite_dual(raw, t, march, v, 0 * t, *g)
    assert all(torch.isfinite(d).all() for d in dual)
    assert dual[3][0, -1, 3].abs() > 1e18
    want = reference.composite_dual(raw, t, march, v, 0 * t, *g)[3]
    assert error(dual[3], want) < (1e-12 if dtype == torch.float64 else 4 * EPS32)
    shown = render.composite(raw[1:2], t[1:2], fm.March(4))
    assert shown[0].eq(1).all() and shown[1].eq(0).all() and shown[2].eq(0).all()


@pytest.mark.parametrize("tau", [1e-12, 1e-9, 1e-7, 3e-4, 0.3, 3.0, 60.0, 86.9, 87.1, 1e4])
def test_opacity_and_softplus_keep_their_relative_precision(tau):
    """α of one thin interval in float32, to three roundings; softplus of −20 times 1e10 as well."""
    march = fm.March(2, 1e-3, False)
    raw = torch.zeros(1, 2, 4)
    raw[0, 0, 3] = tau
    acc = render.composite(raw, torch.tensor([[1.0, 2.0]]), march)[2]
    assert abs(float(acc) / -math.expm1(-float(raw[0, 0, 3])) - 1) < 3 * EPS32
    march = fm.March(2, 1e10, False, "softplus")
    raw[0, :, 3] = -20.0 - 0.1 * math.log(tau)
    got, want = (
        worker.composite(r, torch.tensor([[1.0, 1.0]], dtype=r.dtype), march)[2]
        for worker, r in ((render, raw), (reference, raw.double()))
    )
    # τ is right to six roundings
    assert abs(float(got) / float(want) - 1) < 6 * EPS32 * 40


@pytest.mark.parametrize(
    ("kind", "counts", "samples", "rays_"),
    [
        (kind, counts, *size)
        for kind in LOSSES
        for counts, size in ((None, (5, 150)), ([1, 7, 9], (100, 9)))
    ]
    + [(("mse", None), [1, 7, 9], 300, 9)],
)
def test_march_loss_and_adjoint_in_one_launch(kind, counts, samples, rays_):
    T, R = 3, rays_
    raw, t, draw_, _ = rays(samples, "relu", T, R)
    y = rand(T, R, 3, seed=9)
    if counts is not None:
        counts = torch.tensor(counts)
        raw[1, 7:], t[1, 7:], y[1, 7:], draw_[1, 7:] = (math.nan,) * 4
    wide = fm.March(samples, 1e-3, True)
    for march, dual in ((wide, False), (wide, True), (fm.March(samples, 1e10, False), True)):
        v = draw_ if dual else None
        got = render.march_loss(raw, t, y, march, kind, counts=counts, draw=v)
        loss, graw, dgraw = by_reference(raw, t, y, march, kind, counts, v)
        close(got.loss, loss)
        close(got.graw, graw)
        if dual:
            close(got.dgraw, dgraw, float(graw.norm()))  # 0 for l1 where α_S = 1
            alone = render.march_loss(raw, t, y, march, kind, counts=counts, draw=v, grad=False)
            assert alone.graw is None and torch.equal(alone.dgraw, got.dgraw)
            continue
        alone = render.march_loss(raw, t, y, march, kind, counts=counts, grad=False)
        assert torch.equal(alone.loss, got.loss) and alone.graw is None
        out = render.march_room(raw)
        assert render.march_loss(raw, t, y, march, kind, counts=counts, out=out) is out
        assert torch.equal(out.graw, got.graw) and torch.equal(out.loss, got.loss)


def by_reference(raw, t, y, march, kind, counts, v):
    """(loss, r̄aw, its tangent) by the reference's own parts, as its rays' tiles put them
    together."""
    T, R = t.shape[:2]
    valid = None if counts is None else torch.arange(R) < counts[:, None]
    number = torch.full((T,), R, dtype=raw.dtype) if counts is None else counts.to(raw.dtype)
    if valid is not None:
        raw, t, y = (torch.where(valid.view(T, R, *[1] * (q.dim() - 2)), q, 0) for q in (raw, t, y))
        v = None if v is None else torch.where(valid[..., None, None], v, 0)
    x = raw if v is None else reference.Dual(raw, v)
    rgb, _, acc, tape = reference.composite_forward(x, t, march)
    ell, slope = reference.loss_forward(*kind, rgb, y)
    scale = (1 / (3 * number))[:, None, None] * (1 if valid is None else valid[..., None])
    zero = torch.zeros_like(reference.value(acc))
    graw, _ = reference.composite_backward(tape, t, march, slope * scale, zero, zero)
    tangent = reference.tangent(graw)
    return (ell * scale).sum((1, 2)), reference.value(graw), tangent


@pytest.mark.parametrize("kind", LOSSES)
def test_march_loss_in_float32(kind):
    raw, t, v, _ = single(*rays(64, "softplus", 2, 40))
    y = rand(2, 40, 3, seed=9).float()
    march = fm.March(64, 1e-3, True, "softplus")
    got = render.march_loss(raw, t, y, march, kind)
    dual = render.march_loss(raw, t, y, march, kind, draw=v)
    plain = by_reference(raw, t, y, march, kind, None, v)
    truth = by_reference(*(q.double() for q in (raw, t, y)), march, kind, None, v.double())
    ours = (got.loss, got.graw, dual.dgraw)
    for a, b, c in zip(ours, plain, truth, strict=True):
        as_good(a, b, c)


def test_a_ragged_tail_gets_an_adjoint_of_zero():
    raw, t, _, _ = rays(5, "relu", 2, 120)
    raw[0, 3:] = math.nan
    y = rand(2, 120, 3, seed=1)
    got = render.march_loss(raw, t, y, fm.March(5), counts=torch.tensor([3, 120]))
    assert got.graw[0, 3:].eq(0).all() and got.graw[0, :3].ne(0).any()


@triton.jit
def _slope(y, dy, target, ell, slope, tangent, KIND: tl.constexpr, CLAMP: tl.constexpr):
    i = tl.arange(0, 16)
    a = (tl.load(y + i), tl.load(dy + i))
    at = tl.load(target + i)
    loss, s = loss_slope(a, at, KIND, CLAMP, True)
    tl.store(ell + i, loss)
    tl.store(slope + i, s[0])
    tl.store(tangent + i, s[1])


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_their_kinks(kind):
    y, target, dy = (rand(16, seed=i, low=-1) for i in range(3))
    y[0], y[1], y[2], y[3] = target[0], 0.4, -0.4, math.nan
    ell, slope, tangent = (torch.full_like(y, 9.0) for _ in range(3))
    _slope[(1,)](y, dy, target, ell, slope, tangent, KIND=kind[0], CLAMP=kind[1])
    want, first = reference.loss_forward(*kind, reference.Dual(y, dy), target)
    torch.testing.assert_close(ell, want, rtol=0, atol=0, equal_nan=True)
    value = reference.value(first)
    rest = torch.arange(16) != 3
    assert torch.equal(slope[rest], value[rest])
    assert slope[0] == 0
    second = reference.tangent(first)
    assert torch.equal(tangent, torch.zeros_like(y) if second is None else second)


# Draws ---


@triton.jit
def _words(seed, out, step, STREAM: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    word = draw.words(tl.load(seed + tl.program_id(0)), i, step, STREAM)
    tl.store(out + tl.program_id(0) * COUNT + i, word.to(tl.int64))


@pytest.mark.parametrize("step", [0, 1, 3, 2**31 - 1, -1])
def test_philox_is_the_same_bits(step):
    seed = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    for stream in (rng.POINTS, rng.JITTER):
        out = torch.zeros(5, 64, dtype=torch.int64)
        _words[(5,)](seed, out, step, STREAM=stream, COUNT=64)
        assert torch.equal(out, rng._words(seed, 64, step, stream))


def assert_drawn(batch: fm.Batch, step: int) -> None:
    want = reference.draw(batch, step)
    given = draw.room(batch)
    for got in (draw.draw(batch, step), draw.draw(batch, step, given)):
        assert torch.equal(got.y, want.y)
        ragged = batch.counts is not None and batch.per_step is None
        assert (got.counts is not None) == ragged
        if ragged:
            assert got.counts.tolist() == batch.counts.tolist()
        if want.rays is None:
            assert torch.equal(got.x, want.x) and got.t is None
            continue
        o, d = want.rays.origins[:, :, None], want.rays.directions[:, :, None]
        if ragged:  # where padding is, only x = 0 counts
            assert torch.equal(got.t[want.valid], want.t[want.valid])
        else:
            assert torch.equal(got.t, want.t)
        assert torch.equal(got.x, (o + want.t[..., None] * d).flatten(1, 2))


SEED = torch.tensor([5, -7, 2**40])
COUNTS = torch.tensor([1, 200, 77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "channels"), [(2, 3), (3, 1), (5, 4)])
def test_points(dtype, width, channels):
    x, y = rand(3, 200, width, seed=1).to(dtype), rand(3, 200, channels, seed=2).to(dtype)
    padded, target = x.clone(), y.clone()
    for i, n in enumerate(COUNTS.tolist()):
        padded[i, n:], target[i, n:] = math.nan, math.nan
    for step in (0, 1, 5):
        assert_drawn(fm.Batch(x, y, per_step=150, seed=SEED), step)
    assert_drawn(fm.Batch(x[0], y, per_step=1, seed=SEED), 2)
    assert_drawn(fm.Batch(x[:1].expand(3, -1, -1), y, per_step=300, seed=SEED), 2)
    assert_drawn(fm.Batch(padded, target, counts=COUNTS), 0)
    assert_drawn(fm.Batch(x[0], target, counts=COUNTS.int()), 0)
    assert_drawn(fm.Batch(padded, target, counts=COUNTS, per_step=129, seed=SEED), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [2, 33, 130])
def test_rays(dtype, samples):
    o, d, y = (rand(3, 21, 3, seed=i, low=-1).to(dtype) for i in range(3))
    march = fm.March(samples)
    near = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)
    for ends in ((0.1, 6.3), (near, 2.0), (near, near + 1 / 3), (-1, torch.tensor(0.7)), (0, 1)):
        rays_ = fm.Rays(o, d, *ends)
        assert_drawn(fm.Batch(rays_, y, measure=march, seed=SEED, per_step=19), 7)
    assert_drawn(fm.Batch(rays_, y, measure=march), 0)
    assert_drawn(fm.Batch(rays_, y, measure=march, seed=SEED), 1)
    counts = torch.tensor([1, 21, 16])
    o[0, 1:], d[2, 16:], y[0, 1:] = math.nan, math.nan, math.nan
    rays_ = fm.Rays(o, d, 0.5, 2.5)
    assert_drawn(fm.Batch(rays_, y, measure=march, counts=counts), 0)
    assert_drawn(fm.Batch(rays_, y, measure=march, counts=counts, seed=SEED), 3)
    assert_drawn(fm.Batch(rays_, y, measure=march, counts=counts, seed=SEED, per_step=30), 3)


def test_what_is_seen_as_it_is_runs_no_kernel():
    x, y = rand(3, 20, 2), rand(3, 20, 3)
    with recording() as launches:
        got = draw.draw(fm.Batch(x, y), 0)
        assert got.x is x and got.y is y and got.t is None and got.counts is None
        shared = draw.draw(fm.Batch(x[0], y), 0)
        assert shared.x.shape == (1, 20, 2) and shared.x.data_ptr() == x.data_ptr()
        assert draw.room(fm.Batch(x, y)) is None
    assert not launches
    rays_ = fm.Rays(y, y, 0.0, 1.0)
    batch = fm.Batch(rays_, y, measure=fm.March(4))
    assert draw.draw(batch, 0).y is y


# The CT projector ---


@pytest.mark.parametrize("size", [1, 7, 33, 70])
def test_projector_and_its_adjoint(size):
    angles = rand(2, 5, high=math.pi)
    pixels = nearest_pixels(angles, size)
    image, sino = rand(2, size, size, seed=1), rand(2, 5, size, seed=2)
    inverse = project.inverse(pixels)
    got, back = project.project(image, pixels), project.project_adjoint(sino, pixels, inverse)
    close(got, reference.project(image, pixels))
    close(back, reference.project_adjoint(sino, pixels))
    assert torch.equal(project.project_adjoint(sino, pixels), back)
    assert abs(float((got * sino).sum() - (image * back).sum())) < 1e-12
    few = image.float(), sino.float()
    plain = reference.project(few[0], pixels), reference.project_adjoint(few[1], pixels)
    truth = [
        f(v.double(), pixels)
        for f, v in zip((reference.project, reference.project_adjoint), few, strict=True)
    ]
    as_good(project.project(few[0], pixels), plain[0], truth[0])
    as_good(project.project_adjoint(few[1], pixels, inverse), plain[1], truth[1])


def test_pixels_that_nothing_sees_get_zero():
    pixels = torch.full((1, 2, 4, 4), -1, dtype=torch.int32)
    pixels[0, 1, 2, 3] = 5
    sino = rand(1, 2, 4)
    image = project.project_adjoint(sino, pixels)
    assert image.flatten()[5] == sino[0, 1, 3] / 4
    assert image.count_nonzero() == 1
    assert project.project(torch.ones(1, 4, 4).double(), pixels).count_nonzero() == 1
