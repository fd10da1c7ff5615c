"""Encodings and rays in the resident CUDA kernels, on the emulator: sampling, features, network,
compositing, loss and the way back in one launch."""

from __future__ import annotations

import emulated
import pytest
import rounded_cuda as rounded
import torch
from helpers import parameters, rand
from test_cuda import (
    EVERY,
    FAST,
    NAME,
    barriers,
    build,
    close,
    doubles,
    is_rich,
    library,
    listed,
    passes,
    poisoned,
    same,
)

import fastmeta as fm
from fastmeta import native, reference
from fastmeta.rules import SGD, Adam, MetaSGD, Momentum

__all__ = ["build", "library", "passes", "poisoned"]  # fixtures


def ladder(inputs: int, count: int, include_input: bool = False) -> fm.Encoding:
    return fm.Encoding.frequencies(inputs, count, 2.0, include_input=include_input)


def uneven(inputs: int, features: int) -> fm.Encoding:
    """An odd number of features, the coordinates among them."""
    B, phi = rand(inputs, features, seed=3, low=-2), rand(features, seed=4)
    return fm.Encoding(B, phi, include_input=True)


def nets(width: int, mode: str) -> list[fm.MLP]:
    """1 to 8 chunks of features, depths 2 to 4, with and without the coordinates."""
    made = [
        fm.MLP(3, 4, width, 3, encoding=ladder(3, 7)),
        fm.MLP(2, 3, width, 2, "gelu", output="sigmoid", encoding=ladder(2, 3, True)),
        fm.MLP(1, 8, width, 4, "tanh", encoding=fm.Encoding.gaussian(1, 27, 3.0)),
        fm.MLP(4, 1, width, 3, "softplus", output="tanh", encoding=uneven(4, 9)),
        fm.MLP(3, 5, width, 3, "none", encoding=uneven(3, 120)),
    ]
    sine = {"activation": "sine", "w0": 5.0, "w0_first": 1.0}  # on features float32 alone
    last = sine if mode == "fp32" else {"activation": "silu"}
    return [*made, fm.MLP(2, 3, width, 4, encoding=ladder(2, 4), **last)]


@pytest.fixture
def compared(passes, variant):
    """``compared(name, *args, twin=, share=)``: a pass against torch, float64 and the twin."""

    def three(name, *args, twin, share=0.3):
        wide = [doubles(a) for a in args]
        plain = listed(getattr(reference, name)(*args))
        truth = listed(getattr(reference, name)(*wide))
        close(name, listed(getattr(passes, name)(*args)), plain, listed(twin(*wide)), truth, share)

    return three


def task_pass(mode, part):
    def twin(net, p, *rest):
        v, batch = rest if len(rest) == 2 else (None, rest[0])
        return rounded.task_pass(net, mode, p, v, batch, 0)[part]

    return twin


@pytest.mark.parametrize("variant", EVERY, **NAME)
@pytest.mark.parametrize("which", range(6))
def test_single_passes_on_features(compared, variant, which):
    width, mode = variant
    net, points = nets(width, mode)[which], 70 if which < 2 else 17
    p, v = parameters(net, 1).float(), rand(1, net.num_params, seed=9, low=-1).float()
    x, w = (rand(1, points, net.in_features, seed=s, low=-1).float() for s in (1, 7))
    gy = 1e-3 * rand(1, points, net.out_features, seed=6, low=-1).float()
    run = rounded.Rounded(net, mode).run
    compared("mlp", net, p, x, twin=lambda n, p, x: run(n.layers(p), x, lambda y: y)[0], share=0.5)
    compared(
        "mlp_grad", net, p, x, gy,
        twin=lambda *a: rounded.given_pass(a[0], mode, *a[1:]), share=0.5,
    )  # fmt: skip
    compared(
        "mlp_dual", net, p, x, v, w, gy,
        twin=lambda net, p, x, v, w, gy: rounded.given_pass(net, mode, p, x, gy, v, w), share=0.5,
    )  # fmt: skip
    batch = fm.Batch(x, rand(1, points, net.out_features, seed=2).float())
    compared("loss_grad", net, p, batch, twin=task_pass(mode, slice(2)), share=0.5)
    compared("loss_hvp", net, p, v, batch, twin=task_pass(mode, slice(1, 3)), share=0.5)


# Rays ---


def rays(tasks: int, count: int, march: fm.March, **more) -> fm.Batch:
    o = rand(tasks, count, 3, seed=1, low=-0.3, high=0.3).float()
    d = rand(tasks, count, 3, seed=2, low=-1).float()
    far = torch.tensor([2.0, 3.0, 2.5])[:tasks]
    target = rand(tasks, count, 3, seed=4).float()
    return fm.Batch(fm.Rays(o, d, 0.5, far), target, measure=march, **more)


SEED = torch.tensor([5, -(2**40)])
MARCHES = [
    (fm.March(5, 1e-3, True, "softplus"), {"seed": SEED, "counts": torch.tensor([4, 9])}),
    (fm.March(33, 1e10, False), {"seed": SEED, "per_step": 3, "counts": torch.tensor([4, 9])}),
    (fm.March(33, 1e-3, True), {"loss": ("l1", 0.6)}),
    (fm.March(100, 1e-3, False, "softplus"), {"seed": SEED, "per_step": 3}),
    (fm.March(100, 1e10, True), {"loss": "l1", "counts": torch.tensor([1, 3])}),
]


def radiance(width: int, which: int) -> fm.MLP:
    """On features, on bare coordinates, and with an output activation."""
    if which % 3 == 1:
        return fm.MLP(3, 4, width, 3, "softplus", coords="world")
    if which % 3 == 2:
        return fm.MLP(3, 4, width, 2, "tanh", encoding=ladder(3, 3, True), output="tanh")
    return fm.nerf_mlp(width, 4, 7, 2.0)


@pytest.mark.parametrize("variant", EVERY, **NAME)
@pytest.mark.parametrize("which", range(5))
def test_losses_of_rays(passes, compared, variant, which):
    march, more = MARCHES[which]
    batch, net = rays(2, 9, march, **more), radiance(variant[0], which)
    p, v = parameters(net, 1).float(), rand(1, net.num_params, seed=9, low=-1).float()
    compared("loss_grad", net, p, batch, twin=task_pass(variant[1], slice(2)), share=0.5)
    compared("loss_hvp", net, p, v, batch, twin=task_pass(variant[1], slice(1, 3)), share=0.5)
    assert torch.equal(passes.loss(net, p, batch), passes.loss_grad(net, p, batch)[0])


# Inner loops and meta-gradients ---

RULES = [SGD(), MetaSGD(), Momentum(0.9, True, 0.01), Adam(eps=0.3)]
LOOPS = [("drawn", rule) for rule in RULES]
LOOPS += [(k, rule) for k in ("query", "points", "features") for rule in (SGD(), RULES[-1])]


def tasks(net) -> dict[str, fm.Batch]:
    """Rays drawn and jittered, rays and a query of others, features of points."""
    query = rays(2, 4, fm.March(7, 1e-3, True))
    march = fm.March(40, 1e-3, True, "softplus")
    x, y = rand(2, 70, 3, seed=1, low=-1).float(), rand(2, 70, 4, seed=2).float()
    return {
        "drawn": rays(2, 9, march, seed=SEED, per_step=3, counts=torch.tensor([4, 9])),
        "query": rays(2, 3, march, query=query),
        "points": rays(2, 3, march, query=fm.Batch(x, y)),
        "features": fm.Batch(x, y, query=query),
    }


@pytest.mark.parametrize("variant", EVERY, **NAME)
@pytest.mark.parametrize(("kind", "rule"), LOOPS, ids=lambda q: getattr(q, "name", q))
def test_inner_loops_and_meta_gradients(passes, variant, rule, kind, monkeypatch):
    mode, K = variant[1], 2
    net = fm.MLP(3, 4, variant[0], 3, "softplus", encoding=ladder(3, 4, True))
    batch = tasks(net)[kind]
    wide, T, P = batch.to(torch.float64), batch.tasks, net.num_params
    p = parameters(net, 1).float()
    rates = rand(K, 1, 1, seed=8, low=1e-2, high=1e-1).float()
    lr = rates.expand(K, T, P)

    def run(worker, dtype, data):
        a, r = p.to(dtype), lr.to(dtype)
        theta, losses, thetas = worker.adapt(net, a, data, r, rule, keep=True)[:3]
        assert torch.equal(theta, thetas[-1])
        out = [losses, *((thetas[1:] - a).unbind(0))]
        for order in (1, 2):
            out += worker.maml(net, a, data, r, rule, order=order, learned=rates.to(dtype))
        return out

    ours, plain = run(passes, torch.float32, batch), run(reference, torch.float32, batch)
    truth = run(reference, torch.float64, wide)
    rounded.patched(monkeypatch, mode)
    twin = run(reference, torch.float64, wide)
    close(kind, ours, plain, twin, truth, share=0.4)


# Schedules and barriers ---


def everything(passes, width):
    """Calls that pass every barrier: features of points and their adjoint, several rays a tile,
    several tiles a ray."""
    net, shallow = fm.nerf_mlp(width, 3, 8, 2.0), fm.nerf_mlp(width, 2, 8, 2.0)
    p, x = parameters(net, 1).float(), rand(1, 70, 3, seed=1).float()
    v = rand(1, net.num_params, seed=9, low=-1).float()
    gy, w = rand(1, 70, 4, seed=6, low=-1).float(), rand(1, 70, 3, seed=7, low=-1).float()
    out = [passes.mlp(net, p, x), *passes.mlp_grad(net, p, x, gy)]
    out += passes.mlp_dual(net, p, x, v, w, gy)
    q = parameters(shallow, 1).float()
    out += passes.mlp_grad(shallow, q, x, gy)
    long, short = fm.March(140, 1e-3, True, "softplus"), fm.March(9, 1e-3, False, "softplus")
    batch = rays(1, 3, long, seed=SEED[:1], query=rays(1, 20, short))
    out += [*passes.loss_hvp(net, p, v, batch), *passes.loss_grad(net, p, batch.query)]
    lr = torch.full((1, 1, 1), 1e-2).expand(2, 1, net.num_params)
    for rule in (SGD(), Momentum()):
        out += passes.adapt(net, p, batch, lr, rule, keep=True)
    return out + [*passes.maml(net, p, batch, lr, SGD(), order=2)[:2]]


@pytest.mark.parametrize("variant", FAST, **NAME)
def test_the_schedule_changes_no_bit(passes, variant):
    right = everything(passes, variant[0])
    for seed in (1, 2):
        passes.place.library.schedule(seed, -1)
        assert same(everything(passes, variant[0]), right)


@pytest.mark.parametrize("variant", [(32, "fp32")], **NAME)
def test_every_barrier_of_features_and_rays_is_needed(passes, variant):
    """Those that bare points do not pass; test_cuda.py takes out the others."""
    library, right = passes.place.library, everything(passes, variant[0])
    own = [place for place, line in enumerate(barriers()) if is_rich(line)]
    assert len(own) == 6
    for place in own:
        caught = False
        for seed in (0, 1, 2):
            library.schedule(seed, place)
            try:
                caught = caught or not same(everything(passes, variant[0]), right)
            except RuntimeError:  # the block was divided
                caught = True
        assert caught, f"nothing noticed that this barrier was gone: {barriers()[place]}"


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAST, **NAME)
def test_clean_under_sanitizers(build, variant):
    """AddressSanitizer and UBSan, in a process of their own."""
    emulated.run_sanitized(
        build,
        variant,
        f"""
import test_cuda_rays
passes = native.Passes("cuda", native.Device(library, {variant[1]!r}))
for t in test_cuda_rays.everything(passes, {variant[0]}):
    assert t.isfinite().all()
""",
    )


# What the resident program takes ---


def is_resident(passes, net, batch, op="loss_grad") -> bool:
    call = native._Call(passes.place, op, net, batch.y)
    call.batch(call.job.data, batch)
    return call.job.resident(passes.place.mode)


@pytest.mark.parametrize("variant", FAST, **NAME)
def test_what_the_resident_kernels_take(passes, variant):
    width, mode = variant
    net = fm.nerf_mlp(width, 4, 10)
    for samples, taken in ((2, True), (512, True), (513, False)):
        assert is_resident(passes, net, rays(1, 3, fm.March(samples))) == taken
    assert is_resident(passes, net, rays(1, 3, fm.March(128)), "loss_hvp")
    assert not is_resident(passes, fm.nerf_mlp(width, 6, 170), rays(1, 3, fm.March(5)))
    assert not is_resident(passes, fm.nerf_mlp(width, 7, 10), rays(1, 3, fm.March(5)))
    sines = fm.MLP(3, 4, width, 3, "sine", w0=5.0, encoding=ladder(3, 4))
    assert is_resident(passes, sines, rays(1, 3, fm.March(5))) == (mode == "fp32")


# KiB of shared memory of a block, plain and dual: nerf_mlp of depth 4, 10 frequencies, 128 samples.
SHARED = {
    (32, "fp32"): (112, 134), (64, "fp16"): (116, 202),
    (16, "bf16"): (59, 102), (32, "tf32"): (112, 134),
}  # fmt: skip


@pytest.mark.parametrize("variant", FAST, **NAME)
def test_shared_memory(library, variant):
    width, mode = variant
    at = emulated.MODES.index(mode)
    for dual in (False, True):
        needs = library(variant).shared_bytes(width, at, 4, dual, 60, 128) / 1024
        budget = SHARED[variant][dual]
        assert budget - 2 < needs <= budget, (dual, needs)
