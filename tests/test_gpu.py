"""A GPU worker on a GPU against the float64 reference on the same GPU: every pass, precision and
width; the same bits twice; graphs, streams, poisoned memory.

    FASTMETA_TEST_IMPLS=triton python -m pytest tests/test_gpu.py

Workers are those of ("triton", "cuda") that FASTMETA_TEST_IMPLS names, else those that run here.
Without a GPU everything is skipped, unless a worker is named: then it fails (under Triton's
interpreter it is skipped, for that is no GPU). FASTMETA_TEST_GPU_LOG names a file that takes one
line a comparison: label, what, error, bound.

Bounds are relative errors ``‖ours − exact‖ / ‖exact‖`` of values, gradients and dual passes on sine
networks (w0 = 30), about four times the worst that Triton's interpreter shows, which rounds where
the kernels round: widths 32 to 128 gave 7e-4, 8e-4, 1e-3 in tf32 and fp16, 6e-3, 6e-3, 8e-3 in
bf16. For fp32 the interpreter computes exact products; three TF32 products, emulated, gave 3e-5 at
most. ReLU networks jump where a rounding crosses a kink (5e-2 in tf32): their slack is 15.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import error, generator, rand
from torch import Tensor

import fastmeta as fm
from fastmeta import reference
from fastmeta.ops import dispatch
from fastmeta.rules import SGD, Adam, MetaSGD, Momentum

GPU_WORKERS = ("triton", "cuda")
NAMED = [n for n in os.environ.get("FASTMETA_TEST_IMPLS", "").split(",") if n in GPU_WORKERS]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
THERE = torch.cuda.is_available() and not INTERPRETED
IMPLS = NAMED or ([n for n in GPU_WORKERS if dispatch.load(n)[0] is not None] if THERE else [])
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")

# value, gradient, dual
BOUNDS = {
    "fp32": (1e-4, 2e-4, 4e-4),
    "tf32": (3e-3, 5e-3, 8e-3),
    "fp16": (3e-3, 5e-3, 8e-3),
    "bf16": (1.5e-2, 2.5e-2, 4e-2),
}
# Meta-gradient on meta-trained weights, first and last layer in fp32: cosine to float64.
COSINES = {"fp32": 0.9999, "tf32": 0.999, "fp16": 0.999, "bf16": 0.99}
PASSES = ("mlp_grad", "mlp_dual", "loss_grad", "loss_hvp", "adapt", "maml")
COMPOSITING = ("composite", "composite_grad", "composite_dual")
# Which bound an output of a pass is held to, one letter each: value, gradient, dual, - (not ours).
KINDS = {
    "mlp": "v",
    "mlp_grad": "gg",
    "mlp_dual": "vdd",
    "loss": "v",
    "loss_grad": "vg",
    "loss_hvp": "gd",
    "adapt": "gv-",
    "maml": "vdd",
    "composite": "vvv",
    "composite_grad": "gg",
    "composite_dual": "dd-dd",  # aċc is 0 where a ray ends in something opaque
    "project": "v",
    "project_adjoint": "v",
}


@pytest.fixture(autouse=True)
def device() -> None:
    if not THERE and NAMED and not INTERPRETED:
        pytest.fail(f"FASTMETA_TEST_IMPLS names {', '.join(NAMED)}; there is no CUDA device")
    if not THERE:
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def poison(device: None) -> None:
    """What the allocator hands out next holds NaN: one large block, and many small ones."""
    large = torch.full((2**27,), float("nan"), device="cuda")
    small = [torch.full((2**15,), float("nan"), device="cuda") for _ in range(64)]
    tiny = [torch.full((64,), float("nan"), device="cuda") for _ in range(256)]
    del large, small, tiny


@pytest.fixture(params=IMPLS or ["triton"])
def impl(request: Any) -> str:
    reason = dispatch.load(request.param)[1]
    if reason is not None:
        pytest.fail(f"{request.param}: {reason}")
    return request.param


# Cases: a pass, its network and its data, made on any device ---


@dataclass(frozen=True)
class Case:
    """``passes.<name>(*args, **more)``, with args and more from ``make(device)``."""

    label: str
    name: str
    precision: str
    make: Callable[[str], tuple[tuple, dict]]
    slack: float = 1.0  # of every bound

    def run(self, passes: Any, device: str) -> Any:
        args, more = self.make(device)
        return getattr(passes, self.name)(*args, **more)

    def __str__(self) -> str:
        return f"{self.label}-{self.name}-{self.precision}"


def exact(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, fm.Batch):
        return value.to(torch.float64)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def single(value: Any, device: str) -> Any:
    """float32 on the device."""
    if isinstance(value, fm.Batch):
        return value.to(torch.float32).to(device)
    if isinstance(value, Tensor):
        return value.float().to(device) if value.is_floating_point() else value.to(device)
    return value


def siren(width: int) -> fm.MLP:
    """As the benchmark's, so that kernels are compiled once."""
    return fm.siren(2, 3, width, 5, 30.0)


def ladder(width: int) -> fm.MLP:
    """ReLU on 12 features of two coordinates."""
    encoding = fm.Encoding.frequencies(2, 3, 2.0, pi=True)
    return fm.MLP(2, 3, width, 4, "relu", encoding=encoding, output="sigmoid")


def parameters(net: fm.MLP, tasks: int, seed: int = 0) -> Tensor:
    """[T,P] float64: the network's own start, and noise that leaves a sine network's gain alone, so
    that no bias is zero."""
    shape = (tasks, net.num_params)
    noise = torch.randn(shape, generator=generator(seed + 1), dtype=torch.float64)
    return net.init(tasks, generator=generator(seed)).double() + 0.02 / net.w0 * noise


def points(net: fm.MLP, T: int, N: int, **more: Any) -> fm.Batch:
    return fm.Batch(rand(N, net.in_features, seed=1), rand(T, N, net.out_features, seed=2), **more)


def rates(K: int, T: int, P: int, value: float, dtype: Any, device: str) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=dtype, device=device).expand(K, T, P)


def passes_of(
    label: str,
    precision: str,
    net: fm.MLP,
    T: int,
    N: int,
    names: tuple[str, ...],
    slack: float = 1.0,
) -> list[Case]:
    """Every pass of a network on T tasks of N points."""

    def tensors(device: str) -> tuple:
        p, v = parameters(net, T), parameters(net, T, 7)
        x, w = rand(T, N, net.in_features, seed=3), rand(T, N, net.in_features, seed=4, low=-1)
        gy = rand(T, N, net.out_features, seed=5, low=-1)
        return tuple(single(a, device) for a in (p, v, x, w, gy, points(net, T, N)))

    def make(name: str) -> Callable[[str], tuple[tuple, dict]]:
        def args(device: str) -> tuple[tuple, dict]:
            p, v, x, w, gy, batch = tensors(device)
            lr = rates(2, T, net.num_params, 1e-4, torch.float32, device)
            return {
                "mlp": ((net, p, x), {}),
                "mlp_grad": ((net, p, x, gy), {}),
                "mlp_dual": ((net, p, x, v, w, gy), {}),
                "loss": ((net, p, batch), {}),
                "loss_grad": ((net, p, batch), {}),
                "loss_hvp": ((net, p, v, batch), {}),
                "adapt": ((net, p[:1], batch, lr, SGD()), {}),
                "maml": ((net, p[:1], batch, lr, SGD()), {"order": 2}),
            }[name]

        return args

    return [Case(label, name, precision, make(name), slack) for name in names]


def rule_cases() -> list[Case]:
    """Rules, orders, learned rates, on a small network."""
    net, T, N, K = siren(32), 7, 100, 3
    found = []
    rules = (SGD(), MetaSGD(), Momentum(0.8), Momentum(0.8, nesterov=True), Adam())
    for rule in rules:
        step = 1e-6 if rule.name == "adam" else 1e-4  # longer ones leave the linear regime
        rule_name = rule.name + ("-nesterov" if getattr(rule, "nesterov", False) else "")
        for order in (1, 2):
            for shape in (None, (net.num_params,), (K, 1, 1)):

                def make(
                    device: str, rule=rule, order=order, shape=shape, step=step
                ) -> tuple[tuple, dict]:
                    lr = rates(K, T, net.num_params, step, torch.float32, device)
                    init = single(parameters(net, 1), device)
                    learned = None if shape is None else torch.zeros(shape, device=device)
                    batch = single(points(net, T, N), device)
                    return (net, init, batch, lr, rule), {"order": order, "learned": learned}

                learned = "fixed" if shape is None else f"learned{len(shape)}"
                label = f"{rule_name}-order{order}-{learned}"
                found.append(Case(label, "maml", "fp32", make, 10.0))

        def adapt(device: str, rule=rule, step=step) -> tuple[tuple, dict]:
            lr = 10 * step * torch.linspace(0.5, 2.0, T, device=device)[None, :, None]
            init = single(parameters(net, T), device)
            batch = single(points(net, T, N), device)
            return (net, init, batch, lr.expand(K, T, net.num_params), rule), {"keep": True}

        found.append(Case(rule_name, "adapt", "fp32", adapt, 10.0))
    return found


def rays(T: int, R: int, S: int, **more: Any) -> fm.Batch:
    o, d = rand(T, R, 3, seed=1, low=-0.3, high=0.3), rand(T, R, 3, seed=2, low=-1)
    march = fm.March(S, density="softplus")
    return fm.Batch(fm.Rays(o, d, 0.5, 2.5), rand(T, R, 3, seed=3), measure=march, **more)


def sinogram(T: int, size: int) -> fm.Batch:
    u = torch.arange(size, dtype=torch.float64) / size
    angles = rand(T, 3, seed=2, high=3.0)
    y = rand(T, 3, size, seed=1)
    return fm.Batch(torch.cartesian_prod(u, u), y, measure=fm.Project(angles))


def measured_cases() -> list[Case]:
    """Rays, projections, ragged counts, draws."""
    field = fm.MLP(3, 4, 32, 4, "tanh", encoding=fm.Encoding.frequencies(3, 4, 1.0))
    scan = fm.fourier_mlp(2, 1, 48, 4, features=16, scale=3.0)
    image = siren(32)
    counts, seed = torch.tensor([1, 100, 37, 64, 63, 65, 99]), torch.arange(7) * 2**40 + 3
    batches = {
        "rays": (field, rays(3, 17, 40)),
        "rays-drawn": (field, rays(7, 50, 33, per_step=24, seed=seed)),
        "rays-long": (field, rays(1, 5, 300)),
        "ct": (scan, sinogram(3, 31)),
        "ragged": (image, points(image, 7, 100, counts=counts)),
        "drawn": (image, points(image, 7, 100, per_step=70, seed=seed, counts=counts)),
        "l1": (image, points(image, 7, 100, loss=("l1", 0.3))),
        "query": (image, points(image, 3, 100, query=points(image, 3, 33))),
    }
    found = []
    for label, (net, batch) in batches.items():
        plan = [("fp32", "loss_grad"), ("fp32", "loss_hvp"), ("fp32", "maml")]
        if label in ("rays", "ct", "ragged"):
            plan.append(("bf16", "loss_grad"))
        for precision, name in plan:

            def make(device: str, net=net, batch=batch, name=name) -> tuple[tuple, dict]:
                b = single(batch, device)
                p, v = (single(parameters(net, b.tasks, s), device) for s in (0, 7))
                lr = rates(2, b.tasks, net.num_params, 1e-4, torch.float32, device)
                return {
                    "loss_grad": ((net, p, b, 1), {}),
                    "loss_hvp": ((net, p, v, b, 1), {}),
                    "maml": ((net, p[:1], b, lr, SGD()), {"order": 2}),
                }[name]

            found.append(Case(label, name, precision, make, 10.0))
    return found


def operator_cases() -> list[Case]:
    """Compositing and projection by themselves."""

    def compositing(S: int, name: str) -> Callable[[str], tuple[tuple, dict]]:
        def make(device: str) -> tuple[tuple, dict]:
            raw, t = rand(3, 11, S, 4, low=-2, high=2), rand(3, 11, S).cumsum(-1)
            bars = (rand(3, 11, 3, seed=7), rand(3, 11, seed=8), rand(3, 11, seed=9))
            along = (rand(3, 11, S, 4, seed=5), rand(3, 11, S, seed=6))
            more = {"composite": (), "composite_grad": bars, "composite_dual": (*along, *bars)}[
                name
            ]
            args = tuple(single(a, device) for a in (raw, t, *more))
            return (*args[:2], fm.March(S), *args[2:]), {}

        return make

    def projecting(back: bool) -> Callable[[str], tuple[tuple, dict]]:
        def make(device: str) -> tuple[tuple, dict]:
            pixels = fm.Project(rand(2, 3, high=3.0)).pixels(31).to(device)
            seen = rand(2, 3, 31, seed=4) if back else rand(2, 31, 31, seed=3)
            return (single(seen, device), pixels), {}

        return make

    found = []
    for S in (2, 64, 128, 300):
        for name in COMPOSITING:
            found.append(Case(f"S{S}", name, "fp32", compositing(S, name)))
    found.append(Case("W31", "project", "fp32", projecting(False)))
    found.append(Case("W31", "project_adjoint", "fp32", projecting(True)))
    return found


def network_cases() -> list[Case]:
    """Widths, precisions, numbers of tasks and points. Every kernel costs seconds of compilation,
    so not every pass of every network."""
    found, loops, some = [], ("loss_grad", "maml"), ("loss_grad", "loss_hvp")
    for precision in PRECISIONS:
        names = PASSES if precision in ("fp32", "bf16") else loops
        found += passes_of("siren32-T7", precision, siren(32), 7, 1000, names)
        found += passes_of("siren256-T3", precision, siren(256), 3, 1000, names)
    for precision in ("fp32", "bf16"):
        for width, T, N in ((16, 200, 63), (64, 7, 1000), (128, 1, 500), (512, 1, 300)):
            found += passes_of(f"siren{width}-T{T}", precision, siren(width), T, N, loops)
        for width in (32, 128):
            one = ("mlp", "loss", "loss_grad")
            found += passes_of(f"siren{width}-N1", precision, siren(width), 2, 1, one, slack=4.0)
    found += passes_of("relu64", "tf32", ladder(64), 3, 129, ("mlp_grad", *loops), slack=15.0)
    found += passes_of("relu96", "fp16", ladder(96), 3, 129, ("mlp_dual", *loops), slack=15.0)
    for width in (24, 48, 200, 320):
        found += passes_of(f"siren{width}-T1", "bf16", siren(width), 1, 65, ("loss_grad",))
    for net in (fm.siren(2, 3, 32, 2, 30.0), fm.MLP(5, 3, 32, 16, "silu")):
        found += passes_of(f"depth{net.depth}", "fp32", net, 2, 70, some)
    return found


def cases() -> list[Case]:
    """All of them; whoever warms a cache of kernels runs these too."""
    return network_cases() + rule_cases() + measured_cases() + operator_cases()


# What is said about the errors ---


def note(label: str, what: str, found: float, bound: float) -> None:
    line = f"{label},{what},{found:.3g},{bound:.3g}"
    print(line)
    if path := os.environ.get("FASTMETA_TEST_GPU_LOG"):
        with open(path, "a") as file:
            file.write(line + "\n")


def outputs(result: Any) -> list[Tensor | None]:
    return list(result) if isinstance(result, tuple) else [result]


def refusals(impl: str, case: Case, args: tuple) -> list[str]:
    """What the worker objects to in a case."""
    net = args[0] if isinstance(args[0], fm.MLP) else None
    measure = next((a.measure_name for a in args if isinstance(a, fm.Batch)), "none")
    ops = {"mlp_grad": "mlp", "mlp_dual": "mlp", "loss": "loss_grad"}
    ops |= {"project_adjoint": "project", **dict.fromkeys(COMPOSITING, "composite")}
    op = ops.get(case.name, case.name)
    order = 2 if case.name in ("mlp_dual", "loss_hvp", "maml") else 1
    given = (op, torch.float32, "cuda", case.precision, net, measure, None, order)
    return dispatch.load(impl)[0].objections(dispatch.Case(*given))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_passes_are_near_float64_and_the_same_twice(case, impl):
    args, more = case.make("cuda")
    if reasons := refusals(impl, case, args):
        pytest.skip("; ".join(reasons))
    passes = dispatch.load(impl)[0].at(case.precision)
    ours = outputs(getattr(passes, case.name)(*args, **more))
    again = outputs(getattr(passes, case.name)(*args, **more))
    args = tuple(exact(a) for a in args)
    more = {name: exact(a) for name, a in more.items()}
    wanted = outputs(getattr(reference, case.name)(*args, **more))
    for i, kind in enumerate(KINDS[case.name]):
        if kind == "-" or ours[i] is None:
            continue
        a, b, c = ours[i], again[i], wanted[i]
        assert torch.equal(a, b), f"output {i}: another call gave other bits"
        assert a.shape == c.shape and a.dtype == torch.float32 and a.is_cuda
        bound = case.slack * BOUNDS[case.precision]["vgd".index(kind)]
        if case.name == "adapt" and i == 0:  # what the steps have added, not the start
            start = args[1]
            a, c = a.double() - start, c - start
            steps = args[3].shape[0]  # each rounds θ once
            bound += steps * 2**-24 * float(start.norm() / c.norm()) * len(a) ** 0.5
        found = error(a, c)
        note(f"{impl}:{case}", str(i), found, bound)
        assert found <= bound, f"output {i}: relative error {found:.2g}, bound {bound:g}"


# Draws ---


def test_draws_are_the_cpus_bit_for_bit(impl):
    """Targets that name their own place show which points a step drew."""
    if impl != "triton":
        pytest.skip("its draws are seen in the losses alone")
    from fastmeta.triton import draw

    T, N, n = 7, 1000, 333
    seed, counts = torch.arange(T) * 2**41 - 5, torch.arange(T) * 100 + 1
    y = torch.arange(T * N * 3, dtype=torch.float32).view(T, N, 3)
    batch = fm.Batch(rand(N, 2).float(), y, per_step=n, seed=seed, counts=counts)
    for step in (0, 1, 77):
        want, have = reference.draw(batch, step), draw.draw(batch.to("cuda"), step)
        assert torch.equal(have.x.cpu(), want.x) and torch.equal(have.y.cpu(), want.y)
    o, d = rand(T, N, 3, seed=1).float(), rand(T, N, 3, seed=2).float()
    more = {"measure": fm.March(70), "per_step": n, "seed": seed}
    batch = fm.Batch(fm.Rays(o, d, 0.5, 2.5), y, **more)
    want, have = reference.draw(batch, 3), draw.draw(batch.to("cuda"), 3)
    assert torch.equal(have.y.cpu(), want.y)
    # a product and a sum may be one operation there: one rounding of t less
    assert float((have.t.cpu() - want.t).abs().max()) <= 2.5 * 2**-23


# Meta-trained weights: what damages them does not show at a random start ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_meta_gradient_of_a_trained_start(precision, impl):
    path = Path(fm.__file__).parent / "starts" / "text64.safetensors"
    net, init = fm.load_init(path)
    u = torch.arange(64) / 64
    x = torch.cartesian_prod(u, u)
    # strings cannot be drawn everywhere: bars of two colours, edges and flat ground as theirs
    wide = torch.rand(3, 8, 1, generator=generator(1)).lt(0.5).repeat_interleave(8, 1)  # [3,64,1]
    high = torch.rand(3, 1, 8, generator=generator(2)).lt(0.4).repeat_interleave(8, 2)
    ink, ground = torch.rand(2, 3, 1, 1, 3, generator=generator(3)).unbind(0)
    y = torch.where((wide & high)[..., None], ink, ground).flatten(1, 2)  # [3,4096,3]
    batch = fm.Batch(x, y).to("cuda")
    lr = rates(2, 3, net.num_params, 1e-2, torch.float32, "cuda")
    args = (net, init[None].cuda(), batch, lr, SGD())
    loss, grad, _ = dispatch.load(impl)[0].at(precision).maml(*args, order=2)
    exact_loss, exact_grad, _ = reference.maml(*(exact(a) for a in args), order=2)
    cosine = float(torch.cosine_similarity(grad.double(), exact_grad, 0))
    note(f"{impl}:text64-{precision}", "1-cosine", 1 - cosine, 1 - COSINES[precision])
    assert cosine >= COSINES[precision]
    assert error(loss, exact_loss) <= 4 * BOUNDS[precision][0]


# Layouts ---


@pytest.mark.parametrize("width", [32, 256])
def test_inputs_need_not_be_dense_or_aligned(width, impl):
    net, T, N = siren(width), 3, 100
    p = torch.empty(T, net.num_params + 1, device="cuda")[:, 1:].copy_(parameters(net, T))
    x, y = rand(T, N, 2).float().cuda(), rand(T, N, 3, seed=1).float().cuda()
    passes = dispatch.load(impl)[0].at("fp32")
    want = passes.loss_grad(net, p.clone(), fm.Batch(x, y))[1]
    for batch in (
        fm.Batch(x.mT.contiguous().mT, y),
        fm.Batch(x, y.mT.contiguous().mT),
        fm.Batch(x.repeat(1, 1, 2)[..., :2], y.repeat(1, 1, 2)[..., :3]),
    ):
        assert error(passes.loss_grad(net, p, batch)[1], want) < 1e-5
    shared = y[:1].expand(T, -1, -1)
    want = passes.loss_grad(net, p, fm.Batch(x, shared.contiguous()))[1]
    assert error(passes.loss_grad(net, p, fm.Batch(x, shared))[1], want) < 1e-5


# Graphs, streams, memory ---


def image_batch(seed: int, T: int = 3, N: int = 1000) -> fm.Batch:
    return fm.Batch(rand(N, 2, seed=seed).float(), rand(T, N, 3, seed=seed + 1).float()).to("cuda")


def meta(impl: str, net: fm.MLP, init: Tensor, batch: fm.Batch, precision: str) -> Tensor:
    module = fm.MAML(net, 2, 1e-3, init=init, impl=impl, precision=precision)
    module(batch).backward()
    return module.init.grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [32, 256])
def test_a_replay_takes_other_data(width, precision, impl):
    """The second and third call of a shape replay a graph: over new data, parameters and rates."""
    net = siren(width)
    bound = 4 * BOUNDS[precision][1]  # three steps add up
    for seed, lr in ((1, 1e-3), (5, 2e-3), (9, 5e-4)):
        batch, p = image_batch(seed), parameters(net, 3, seed).float().cuda()
        ours = fm.adapt(net, p, batch, 3, lr, impl=impl, precision=precision)
        want = fm.adapt(net, p.double(), exact(batch), 3, lr, impl="reference")
        assert error(ours.params.double() - p, want.params - p) <= bound
        assert error(ours.losses, want.losses) <= bound
        g = meta(impl, net, p[0], batch, precision)
        want = meta("reference", net, p[0].double(), exact(batch), None)
        assert error(g, want) <= 2 * bound
    kept = ours.params.clone()
    fm.adapt(net, p.flip(-1), image_batch(11), 3, lr, impl=impl, precision=precision)
    assert torch.equal(kept, ours.params), "a later replay wrote into an earlier result"


@pytest.mark.parametrize("width", [32, 256])
def test_other_streams_give_the_same_bits(width, impl):
    net, batch = siren(width), image_batch(1)
    p = parameters(net, 3).float().cuda()

    def everything() -> list[Tensor]:
        loss, grad = fm.loss_grad(net, p, batch, impl=impl, precision="bf16")
        fit = fm.adapt(net, p, batch, 2, 1e-3, impl=impl, precision="bf16")
        return [loss, grad, *fm.loss_hvp(net, p, grad, batch, impl=impl)[:2], fit.params]

    want = everything()
    torch.cuda.synchronize()
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            have = everything()
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True))


def test_two_streams_at_once_give_the_same_bits(impl):
    net = siren(64)
    p = parameters(net, 3).float().cuda()
    batches = [image_batch(1), image_batch(5)]
    want = [fm.loss_grad(net, p, b, impl=impl)[1] for b in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    have: list[list[Tensor]] = [[], []]
    for _ in range(10):
        for i, (stream, batch) in enumerate(zip(streams, batches, strict=True)):
            with torch.cuda.stream(stream):
                have[i].append(fm.loss_grad(net, p, batch, impl=impl)[1])
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for gs, w in zip(have, want, strict=True) for g in gs)


@pytest.mark.parametrize("name", ["loss_grad", "adapt", "maml"])
@pytest.mark.parametrize("width", [32, 256])
def test_a_users_own_graph(width, name, impl):
    """Captured by the caller, replayed over other data in the same tensors."""
    net, batch = siren(width), image_batch(1)
    p = parameters(net, 3).float().cuda()
    lr = rates(2, 3, net.num_params, 1e-3, torch.float32, "cuda")
    passes = dispatch.load(impl)[0].at("bf16")

    def call() -> Tensor:
        if name == "loss_grad":
            return passes.loss_grad(net, p, batch)[1]
        if name == "adapt":
            return passes.adapt(net, p, batch, lr, SGD())[0]
        return passes.maml(net, p[:1], batch, lr, SGD(), order=2)[1]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = call()
    for seed in (5, 9):
        other = image_batch(seed)
        batch.x.copy_(other.x)
        batch.y.copy_(other.y)
        p.copy_(parameters(net, 3, seed).float())
        graph.replay()
        have = seen.clone()
        assert torch.equal(have, call())


@pytest.mark.parametrize("width", [32, 256])
def test_chunks_of_tasks_give_the_same_numbers(width, impl):
    net, batch = siren(width), image_batch(1, T=7)
    p = parameters(net, 7).float().cuda()
    lr = rates(2, 7, net.num_params, 1e-3, torch.float32, "cuda")
    passes = dispatch.load(impl)[0].at("fp32")
    for name, more in (("adapt", {}), ("maml", {"order": 2})):
        start = p if name == "adapt" else p[:1]
        run = getattr(passes, name)
        whole = run(net, start, batch, lr, SGD(), **more)
        parts = run(net, start, batch, lr, SGD(), max_memory=0, **more)
        assert all(error(b, a) < 1e-4 for a, b in zip(whole[:2], parts[:2], strict=True))


@pytest.fixture
def allocated() -> Iterator[Callable[[], int]]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before


def test_memory_of_a_meta_gradient(impl, allocated):
    """One task of 16 384 points at width 256: far below what autograd would keep, 19.2
    activations of 4 bytes a step (kernels at 16 bits keep 2 bytes, tangents beside them)."""
    net, batch = siren(256), image_batch(1, T=1, N=16384)
    passes = dispatch.load(impl)[0].at("bf16")
    lr = rates(2, 1, net.num_params, 1e-3, torch.float32, "cuda")
    passes.maml(net, parameters(net, 1).float().cuda(), batch, lr, SGD(), order=2)
    autograd = (8.2 + 2 * 19.2) * 16384 * 256 * 4
    note(f"{impl}:memory", "of autograd's", allocated() / autograd, 0.5)
    assert allocated() <= 0.5 * autograd


def test_large_indices(impl):
    """T·N·WP beyond 2³¹: the last task's gradient is its own."""
    net, T, N = fm.siren(2, 3, 64, 3, 30.0), 1100, 32768
    p = parameters(net, 1).float().cuda()
    x = rand(N, 2, seed=1).float().cuda()
    y = rand(1, N, 3, seed=2).float().cuda().repeat(T, 1, 1)
    passes = dispatch.load(impl)[0].at("bf16")
    _, many = passes.loss_grad(net, p, fm.Batch(x, y), 0, 2**40)  # one chunk
    _, one = passes.loss_grad(net, p, fm.Batch(x, y[:1]))
    assert error(many[-1], one[0]) < 1e-5
