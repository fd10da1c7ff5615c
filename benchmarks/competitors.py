"""What a user would write instead of fastmeta: loops of modules, vmap(grad), stacked baddbmm,
torch.compile, JAX.

A competitor is a factory ``(problem, kind, steps) -> callable without arguments``; the kinds, and
what comes back:

    forward    what is seen, [T,N,C], [T,R,3] or [T,A,W]
    gradient   of each task's loss in its own weights: [T,...] for each weight and bias
    adapt      θ_K of each task after K SGD steps from one start: the same shapes
    maml       the exact gradient of mean_t L_t(θ_K) in the start: [...] for each weight and bias

Weights are lists of tensors [W_1, b_1, W_2, ...], made before the clock starts: slicing them out of
flat rows would cost the competitors a padded copy per layer on the way back. Nor is their result
flattened on the clock. Encoding, rendering and projection are inside of it, CT's pixel indices not.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from workloads import LR, Problem

import fastmeta as fm

Weights = list[Any]


@dataclass(frozen=True)
class Library:
    """What torch and JAX call differently; ``affine(h, W, b)`` also says how tasks are stacked."""

    xp: Any
    array: Callable  # of a tensor
    sigmoid: Callable
    relu: Callable
    take: Callable  # (array, index, axis)
    affine: Callable
    grad: Callable | None = None
    vmap: Callable | None = None


def _stacked_affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[N,in] or [T,N,in], [T,out,in], [T,out] -> [T,N,out]."""
    return torch.baddbmm(bias[:, None], h.expand(len(weight), -1, -1), weight.mT)


_TORCH = (torch, lambda tensor: tensor, torch.sigmoid, torch.relu, torch.take_along_dim)
STACKED = Library(*_TORCH, _stacked_affine)
SINGLE = Library(*_TORCH, nn.functional.linear, torch.func.grad, torch.func.vmap)


@functools.cache
def jax_library(device: str) -> Library:
    import jax

    jax.config.update("jax_platforms", device)
    return Library(
        jax.numpy,
        lambda tensor: jax.numpy.asarray(tensor.cpu().numpy()),
        jax.nn.sigmoid,
        jax.nn.relu,
        functools.partial(jax.numpy.take_along_axis, mode="promise_in_bounds"),
        lambda h, weight, bias: h @ weight.T + bias,
        jax.grad,
        jax.vmap,
    )


# The mathematics, once for both libraries and for any leading axes ---


def network(lib: Library, net: fm.MLP, weights: Weights, h: Any) -> Any:
    """Encoded features [...,N,E] -> [...,N,C], of sine or ReLU layers."""
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    for w0, (weight, bias) in zip(net.frequencies, pairs[:-1], strict=True):
        z = lib.affine(h, weight, bias)
        h = lib.xp.sin(w0 * z) if net.activation == "sine" else lib.relu(z)
    return output(lib, net, lib.affine(h, *pairs[-1]))


def output(lib: Library, net: fm.MLP, z: Any) -> Any:
    return (lib.sigmoid(z) if net.output == "sigmoid" else z) + net.output_shift


def composite(lib: Library, raw: Any, t: Any, march: fm.March) -> Any:
    """``α = 1 − exp(−ρ(raw_3) δ)``, ``T_i = Π_{j<i} min(1, 1 − α_j + 1e-10)``, ``Σ T α c + 1 − Σ T
    α``: raw [...,S,4], t [...,S] -> rgb [...,3]."""
    xp = lib.xp
    last = xp.full_like(t[..., :1], march.last_interval)
    tau = lib.relu(raw[..., 3]) * xp.concatenate([t[..., 1:] - t[..., :-1], last], -1)
    passed = xp.clip(xp.exp(-tau) + 1e-10, None, 1.0)
    ones = xp.ones_like(passed[..., :1])
    w = xp.cumprod(xp.concatenate([ones, passed[..., :-1]], -1), -1) * -xp.expm1(-tau)  # [...,S]
    return (w[..., None] * lib.sigmoid(raw[..., :3])).sum(-2) + (1 - w.sum(-1))[..., None]


def project(lib: Library, image: Any, index: Any, angles: int) -> Any:
    """``sino[a,c] = (1/W) Σ_r image[index[a,r,c]]``, W² for nothing: [...,W·W], [...,A·W·W] ->
    [...,A,W]."""
    W = round(image.shape[-1] ** 0.5)
    padded = lib.xp.concatenate([image, lib.xp.zeros_like(image[..., :1])], -1)
    lines = lib.take(padded, index, -1).reshape(*image.shape[:-1], angles, W, W)
    return lines.sum(-2) / W


def predict(lib: Library, problem: Problem, inputs: tuple, apply: Callable) -> Any:
    """What is seen; ``apply`` is the network on encoded features, ``inputs`` as in
    ``task_inputs``."""
    workload, x = problem.workload, inputs[0]
    if workload.samples > 1:
        rays, march = problem.batch.x, problem.batch.measure
        part = lib.xp.arange(march.samples) / (march.samples - 1)
        t = rays.near + (rays.far - rays.near) * part  # [S]
        x = inputs[0][..., None, :] + t[:, None] * inputs[1][..., None, :]  # [...,R,S,3]
        raw = apply(encode(lib, problem, x.reshape(*x.shape[:-3], -1, 3)))
        raw = raw.reshape(*x.shape[:-1], 4)
        return composite(lib, raw, lib.xp.broadcast_to(t, raw.shape[:-1]), march)
    y = apply(encode(lib, problem, x))
    return project(lib, y[..., 0], inputs[1], workload.angles) if workload.angles else y


def encode(lib: Library, problem: Problem, x: Any) -> Any:
    """``sin(x B + φ)``, or x where there is no encoding: [...,N,D] -> [...,N,E]."""
    if not problem.basis:
        return x
    B, phi = (lib.array(b) for b in problem.basis)
    return lib.xp.sin(x @ B + phi)


def squared_error(seen: Any, y: Any) -> Any:
    """[...]: each task's loss."""
    return ((seen - y) ** 2).mean((-2, -1))


def sgd(weights: Weights, gradients: Any) -> Weights:
    return [w - LR * g for w, g in zip(weights, gradients, strict=True)]


# A problem as lists of tensors ---


def unflatten(net: fm.MLP, rows: Tensor) -> Weights:
    """[...,P] -> [W_1 [...,out,in], b_1 [...,out], W_2, ...], each of its own memory."""
    return [q.clone(memory_format=torch.contiguous_format) for p in net.layers(rows) for q in p]


def task_inputs(problem: Problem) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """(x [N,D]), (origins, directions [T,R,3]) or (x, pixel indices [T,A·W·W]), and where each has
    its task axis."""
    batch = problem.batch
    if isinstance(batch.x, fm.Rays):
        return (batch.x.origins, batch.x.directions), (0, 0)
    if isinstance(batch.measure, fm.Project):
        return (batch.x, gather_index(batch.measure, problem.workload.side)), (None, 0)
    return (batch.x,), (None,)


def gather_index(measure: fm.Project, side: int) -> Tensor:
    """[T,A·W·W], the pixel behind the image's end standing for outside."""
    pixels = measure.pixels(side).long()
    return torch.where(pixels < 0, side * side, pixels).flatten(1)


# Competitors ---


def fastmeta(problem: Problem, kind: str, steps: int = 2, **how: Any) -> Callable:
    """Ours (how: impl, precision), and with float64 tensors and ``impl="reference"`` what all are
    held to."""
    net, batch = problem.workload.net, problem.batch
    if kind == "forward":
        return lambda: _seen(problem, **how)
    if kind == "gradient":
        return lambda: fm.loss_grad(net, problem.params, batch, **how)[1]
    if kind == "adapt":
        return lambda: fm.adapt(net, problem.init, batch, steps, LR, **how).params
    maml = fm.MAML(net, steps, LR, init=problem.init, **how)

    def run() -> Tensor:
        maml.init.grad = None
        maml(batch).backward()
        return maml.init.grad

    return run


def _seen(problem: Problem, **how: Any) -> Tensor:
    net, batch = problem.workload.net, problem.batch
    if isinstance(batch.measure, fm.March):
        return fm.render(net, problem.params, batch.x, batch.measure, **how)[0]
    y = fm.mlp(net, problem.params, batch.x, **how)
    if not isinstance(batch.measure, fm.Project):
        return y
    image = y.unflatten(1, (problem.workload.side, -1))[..., 0]
    return fm.project(image, batch.measure.angles, **how)


class Module(nn.Module):
    """The network on encoded features as users write it."""

    def __init__(self, net: fm.MLP) -> None:
        super().__init__()
        self.net = net
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in net.sizes)

    def forward(self, h: Tensor) -> Tensor:
        for w0, layer in zip(self.net.frequencies, self.layers[:-1], strict=True):
            z = layer(h)
            h = torch.sin(w0 * z) if self.net.activation == "sine" else torch.relu(z)
        return output(SINGLE, self.net, self.layers[-1](h))


def loop(problem: Problem, kind: str, steps: int) -> Callable:
    """One module, one task after the other, each with its own weights put into the module."""
    net, (inputs, axes) = problem.workload.net, task_inputs(problem)
    module = Module(net)
    names = [name for name, _ in module.named_parameters()]

    def seen(t: int, weights: Weights) -> Tensor:
        mine = tuple(v if axis is None else v[t] for v, axis in zip(inputs, axes, strict=True))
        state = dict(zip(names, weights, strict=True))
        return predict(
            SINGLE, problem, mine, lambda h: torch.func.functional_call(module, state, (h,))
        )

    init = unflatten(net, problem.init)
    runs = [
        Autograd(functools.partial(seen, t), y, unflatten(net, row), init).run(kind, steps)
        for t, (y, row) in enumerate(zip(problem.batch.y, problem.params, strict=True))
    ]
    if kind == "forward":
        return lambda: torch.stack([run() for run in runs])
    if kind == "maml":  # one graph at a time, as loss.backward() per task would
        return lambda: [sum(parts) / len(runs) for parts in zip(*(r() for r in runs), strict=True)]
    return lambda: [torch.stack(parts) for parts in zip(*(run() for run in runs), strict=True)]


def bmm(problem: Problem, kind: str, steps: int) -> Callable:
    """All tasks stacked, one baddbmm a layer."""
    return _stacked(problem).run(kind, steps)


def compiled(problem: Problem, kind: str, steps: int) -> Callable | None:
    """torch.compile of the same; not for maml, since inductor has no double backward."""
    if kind == "maml":
        return None
    torch.compiler.reset()  # or the ninth shape would run uncompiled
    return _stacked(problem).compiled().run(kind, steps)


def _stacked(problem: Problem) -> Autograd:
    net, (inputs, _) = problem.workload.net, task_inputs(problem)

    def seen(weights: Weights) -> Tensor:
        return predict(STACKED, problem, inputs, lambda h: network(STACKED, net, weights, h))

    weights, init = unflatten(net, problem.params), unflatten(net, problem.init)
    return Autograd(seen, problem.batch.y, weights, init, (problem.workload.tasks,))


def _eager(function: Callable) -> Callable:
    return function


@dataclass(frozen=True)
class Autograd:
    """The four kinds by torch.autograd; ``stack`` is (T,) where weights have a task axis, else
    ()."""

    seen: Callable[[Weights], Tensor]
    y: Tensor
    weights: Weights
    init: Weights
    stack: tuple[int, ...] = ()
    wrap: Callable[[Callable], Callable] = _eager

    def compiled(self) -> Autograd:
        return replace(self, wrap=functools.partial(torch.compile, dynamic=False))

    def run(self, kind: str, steps: int) -> Callable:
        """The callable of a kind."""
        seen = torch.no_grad()(self.wrap(self.seen))
        loss = self.wrap(lambda weights: squared_error(self.seen(weights), self.y).sum())
        leaves = [w.detach().requires_grad_() for w in self.weights]
        return {
            "forward": lambda: seen(self.weights),
            "gradient": lambda: torch.autograd.grad(loss(leaves), leaves),
            "adapt": lambda: self._adapt(loss, steps),
            "maml": lambda: self._maml(loss, steps),
        }[kind]

    def _start(self, init: Weights) -> Weights:
        return [w.expand(*self.stack, *w.shape) for w in init]

    def _adapt(self, loss: Callable, steps: int) -> Weights:
        theta = self._start(self.init)
        for _ in range(steps):
            leaves = [w.detach().requires_grad_() for w in theta]
            theta = sgd(theta, torch.autograd.grad(loss(leaves), leaves))
        return theta

    def _maml(self, loss: Callable, steps: int) -> tuple[Tensor, ...]:
        init = [w.detach().requires_grad_() for w in self.init]
        theta = self._start(init)
        for _ in range(steps):
            theta = sgd(theta, torch.autograd.grad(loss(theta), theta, create_graph=True))
        return torch.autograd.grad(loss(theta) / math.prod(self.stack), init)


def vmap(problem: Problem, kind: str, steps: int) -> Callable:
    """torch.func.vmap over tasks of torch.func.grad."""
    return functools.partial(*_functional(SINGLE, problem, kind, steps))


def jit_vmap(problem: Problem, kind: str, steps: int) -> Callable:
    """jit(vmap(grad)), arrays on JAX's side before the clock starts."""
    import jax

    lib = jax_library(problem.params.device.type)
    function, *arguments = _functional(lib, problem, kind, steps)
    on_device = jax.tree.map(lib.array, arguments)
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*on_device))


def _functional(lib: Library, problem: Problem, kind: str, steps: int) -> tuple:
    """(function, weights, inputs, y): the four kinds by grad and vmap of either library."""
    net, (inputs, axes) = problem.workload.net, task_inputs(problem)

    def seen(weights: Weights, inputs: tuple) -> Any:
        return predict(lib, problem, inputs, lambda h: network(lib, net, weights, h))

    def loss(weights: Weights, inputs: tuple, y: Any) -> Any:
        return squared_error(seen(weights, inputs), y)

    def adapt(weights: Weights, inputs: tuple, y: Any) -> Weights:
        for _ in range(steps):
            weights = sgd(weights, lib.grad(loss)(weights, inputs, y))
        return weights

    def outer(init: Weights, inputs: tuple, y: Any) -> Any:
        def after(i: tuple, t: Any) -> Any:
            return loss(adapt(init, i, t), i, t)

        return lib.vmap(after, (axes, 0))(inputs, y).mean()

    function = {
        "forward": lib.vmap(lambda weights, inputs, _: seen(weights, inputs), (0, axes, 0)),
        "gradient": lib.vmap(lib.grad(loss), (0, axes, 0)),
        "adapt": lib.vmap(adapt, (None, axes, 0)),
        "maml": lib.grad(outer),
    }[kind]
    rows = problem.params if kind in ("forward", "gradient") else problem.init
    return function, unflatten(net, rows), inputs, problem.batch.y


FACTORIES = {"loop": loop, "vmap": vmap, "bmm": bmm, "compiled": compiled, "jax": jit_vmap}


@functools.cache
def left_out() -> dict[str, str]:
    """Competitors that cannot run here, with the reason."""
    reasons = {}
    if importlib.util.find_spec("jax") is None:
        reasons["jax"] = "not installed"
    elif torch.get_num_threads() != len(os.sched_getaffinity(0)):
        reasons["jax"] = f"takes every core, torch only {torch.get_num_threads()}"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        reasons["compiled"] = "no C++ compiler"
    return reasons


def entries(problem: Problem, kind: str, steps: int = 2) -> dict[str, Callable]:
    """Ours first, then every competitor that has the kind and can run here."""
    made = {who: f(problem, kind, steps) for who, f in FACTORIES.items() if who not in left_out()}
    others = {who: function for who, function in made.items() if function is not None}
    return {"fastmeta": fastmeta(problem, kind, steps), **others}


# Are the numbers the same? ---


class Truth:
    """What the float64 reference says, and who is near enough to it.

    A float32 result may lie eight times as far from it as the float32 reference does: products are
    summed in another order. The least bound is 1e-3: a neuron that float32 puts on the other side
    of a ReLU's kink stays below it, a wrong formula does not. Where all results start from the same
    weights, distances are relative to what was added to them.
    """

    def __init__(self, exact: Callable, plain: Callable, start: Tensor | None = None) -> None:
        self.exact = exact().cpu().numpy()
        before = 0 if start is None else start.double().cpu().numpy()
        self.scale = np.linalg.norm(self.exact - before)
        self.bound = max(8 * self.error(plain()), 1e-3)

    def error(self, result: Any) -> float:
        """|result − exact| / scale; a list of tensors stands for rows of parameters."""
        parts = result if isinstance(result, (list, tuple)) else [result]
        parts = [part.cpu() if isinstance(part, Tensor) else part for part in parts]
        lead = self.exact.shape[:-1]
        rows = [np.asarray(part, dtype=np.float64).reshape(*lead, -1) for part in parts]
        return float(np.linalg.norm(np.concatenate(rows, -1) - self.exact) / self.scale)

    def check(self, who: str, result: Any) -> None:
        error = self.error(result)
        assert error < self.bound, f"{who}: relative error {error:.1e}, accepted {self.bound:.1e}"


def truth(problem: Problem, kind: str, steps: int = 2) -> Truth:
    exact = fastmeta(problem.double(), kind, steps, impl="reference")
    plain = fastmeta(problem, kind, steps, impl="reference")
    return Truth(exact, plain, problem.init if kind == "adapt" else None)
