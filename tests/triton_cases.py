"""What the Triton worker launches, written down for the ahead-of-time tests: {label: launches}.

A label is ``"<network> H<width> <precision> <pass>"``; what the plan gives to ``resident`` kernels
is theirs, the rest is streamed. Passes:

    plain     forward, loss, backward, sums, step of gradient descent
    hvp       the same on dual numbers, for the Hessian-vector product
    both      hvp, and the gradient beside it
    points    forward alone
    loss      forward and loss
    x         plain from ȳ, with x̄
    double    dual in x too, with the tangent of x̄

``sm80``, ``sm90`` and ``sm100`` are all of them with the tiles of that architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import fastmeta as fm
from fastmeta.triton import launch, plan
from fastmeta.triton.held import Held
from fastmeta.triton.passes import Passes, Product, Seen
from fastmeta.triton.plan import Constants
from fastmeta.triton.stream import Stream
from fastmeta.triton.sums import Operands, Weights, shade

WIDTHS = (16, 32, 64, 128, 256, 512)
MODES = ("fp32", "tf32", "fp16", "bf16")
PASSES = ("plain", "hvp", "both", "points", "loss", "x", "double")
TASKS, POINTS = 3, 1000

NETS = {
    "siren": lambda width: fm.siren(2, 3, width, 5, 200.0),
    "deep": lambda width: fm.siren(2, 3, width, 8, 30.0),
    "nerf": lambda width: fm.nerf_mlp(width=width, depth=6),
    "fourier": lambda width: fm.fourier_mlp(2, 1, width, 5, features=256),
}


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def walked(net: fm.MLP, mode: str, what: str) -> None:
    """One pass from start to end."""
    c = Constants(net, mode)
    P, D, C = net.num_params, net.in_features, net.out_features
    theta, x, y = _numbers(TASKS, P), _numbers(TASKS, POINTS, D), _numbers(TASKS, POINTS, C)
    dual, xs = what in ("hvp", "both", "double"), what in ("x", "double")
    family: Any = Stream if xs or plan.resident_tile(c, dual) is None else Held
    s = family(
        c,
        TASKS,
        POINTS,
        y,
        dual=dual,
        keep=what not in ("points", "loss"),
        grad=what in ("plain", "both", "x"),
        **({"tangent_x": what == "double", "want_x": True} if xs else {}),
    )
    operands = shade(c, theta, Operands.empty(c, TASKS, theta))
    v = along = None
    if dual:
        v = _numbers(TASKS, P)
        along = shade(c, v, Operands.empty(c, TASKS, v), _numbers(TASKS))
    weights = Weights(theta, operands, v, along)
    if what == "points":
        s.forward(weights, x)
        return
    if xs:
        w = (_numbers(TASKS, POINTS, D),) if what == "double" else ()
        s.forward(weights, x, *w)
        s.backward(y)
    else:
        counts = _numbers(TASKS, dtype=torch.int32)
        s.descend(weights, x, y, ("mse", None), counts, back=what != "loss")
        if what == "loss":
            return
    s.gradient(theta, tangent=dual)
    if what == "plain":
        s.advance(fm.rules.SGD(), theta, theta, _numbers(1), (), (), theta, operands)


def measured(batch: fm.Batch, net: fm.MLP, mode: str, dual: bool) -> None:
    """The loss of a batch with draws and a measurement, and back; only what is not streamed."""
    c = Constants(net, mode)
    theta = _numbers(batch.tasks, net.num_params)
    if dual:
        Product(c, batch, True).run(0, theta, theta, theta, None)
    else:
        Seen(c, batch).run(0, Weights(theta, Operands.empty(c, batch.tasks, theta)))


def stepped(rule: Any, mode: str) -> None:
    """An inner loop of two steps of a rule."""
    net = NETS["siren"](64)
    batch = fm.Batch(_numbers(TASKS, POINTS, 2), _numbers(TASKS, POINTS, 3))
    lr = torch.zeros(1).expand(2, TASKS, net.num_params)
    theta = _numbers(TASKS, net.num_params)
    Passes(mode).maml(net, theta[:1], batch, lr, rule, order=1, learned=torch.zeros(1))


def _batches() -> Iterator[tuple[str, fm.Batch, fm.MLP]]:
    seed = torch.arange(TASKS)
    R, field, march = 40, NETS["nerf"](64), fm.March(128)
    where = partial(_numbers, TASKS, R, 3)
    rays = fm.Rays(where(), where(), 2.0, 6.0)
    yield "rays", fm.Batch(rays, where(), measure=march, per_step=24, seed=seed), field
    far = fm.March(64, 1e10, False, "softplus")
    yield "all rays", fm.Batch(rays, where(), measure=far, loss="l1"), field
    image = fm.MLP(2, 1, 64, 5, "relu", encoding=fm.Encoding.gaussian(2, 64, 10.0))
    grid, angles, sino = _numbers(32 * 32, 2), _numbers(TASKS, 20), _numbers(TASKS, 20, 32)
    yield "projector", fm.Batch(grid, sino, measure=fm.Project(angles)), image
    x, y = _numbers(TASKS, POINTS, 3), _numbers(TASKS, POINTS, 1)
    distance = fm.siren(3, 1, 64, 5, 30.0)
    counts = torch.full((TASKS,), 900, dtype=torch.int64)
    drawn = fm.Batch(x, y, loss=("l1", 0.1), per_step=500, seed=seed, counts=counts)
    yield "drawn points", drawn, distance
    yield "ragged points", fm.Batch(x, y, loss="l1", counts=counts), distance


def _wanted(name: str, width: int, mode: str, what: str) -> bool:
    """Every pass of sirens of three widths in the precisions most used; elsewhere what differs."""
    common, usual = mode in ("fp32", "bf16"), what in ("plain", "hvp")
    if name == "siren":
        return usual and (common or width in (64, 256)) or common and width in (16, 64, 256)
    if name == "nerf":
        return common and width in (64, 256) and (usual or what == "double" and width == 256)
    return common and usual and width == {"deep": 64, "fourier": 256}[name]


def _walked_cases() -> dict[str, list]:
    cases = {}
    for name, make in NETS.items():
        for width in WIDTHS:
            for mode in MODES:
                for what in PASSES:
                    if _wanted(name, width, mode, what):
                        with launch.recording() as found:
                            walked(make(width), mode, what)
                        cases[f"{name} H{width} {mode} {what}"] = found
    return cases


def _other_cases() -> dict[str, list]:
    """Rules, draws, rays and projections: without the kernels that stand above."""
    cases = {}
    for rule in (fm.rules.Momentum(0.9), fm.rules.Momentum(0.9, nesterov=True), fm.rules.Adam()):
        with launch.recording() as found:
            stepped(rule, "bf16")
        kind = "nesterov" if getattr(rule, "nesterov", False) else rule.name
        cases[f"rule {kind}"] = [one for one in found if one.kernel.__name__ == "advance"]
    for name, batch, net in _batches():
        for dual in (False, True):
            with launch.recording() as found:
                measured(batch, net, "bf16", dual)
            rest = [one for one in found if one.kernel.__name__ not in STREAMED]
            lossy = [one for one in found if one.kernel.__name__ in ("back", "resident")]
            keep = rest + (lossy if batch.loss != "mse" and batch.measure is None else [])
            if keep:
                cases[f"{name} {'dual' if dual else 'plain'}"] = keep
    return cases


STREAMED = ("resident", "ahead", "back", "weigh", "gather", "advance", "shade")


def _at(arch: int) -> dict[str, list]:
    with plan.architecture_of(arch):
        return _walked_cases() | _other_cases()


def sm80() -> dict[str, list]:
    return _at(80)


def sm90() -> dict[str, list]:
    return _at(90)


def sm100() -> dict[str, list]:
    return _at(100)
