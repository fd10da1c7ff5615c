"""The passes of ``fastmeta.reference``, rounded where the CUDA kernels round.

Float64 but for the operands of the hidden layers' products, which take the precision's format: W_l,
h_{l-1} and δ_l of layers 2 to L−1, and of the first where it reads features and no sines follow,
each times the power of two that fp16 is given. What resident kernels keep for the way back is
rounded too: in 16-bit modes the phase of a sine to 2π/65536, other slopes to fp16; along rays fp16
has a power of two for each of their tiles. Networks that these do not take run layer by layer,
where nothing kept is rounded and fp16's power of two is that of the largest δ_L.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import reference
from fastmeta.reference import Dual, tangent, value

TURN = 2 * math.pi / 65536


def to_format(mode: str, t: Tensor) -> Tensor:
    t = t.float()
    if mode == "tf32":  # to nearest, ties away from zero
        t = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    elif mode in ("fp16", "bf16"):
        t = t.to(torch.float16 if mode == "fp16" else torch.bfloat16)
    return t.double()


def power(*tensors: Tensor | None) -> float:
    """The power of two that brings the largest absolute value to [½, 1)."""
    largest = max((float(t.abs().max()) for t in tensors if t is not None), default=0.0)
    return 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0


def is_resident(net, measure: str = "none", mode: str = "fp32") -> bool:
    """Whether a block holds a whole task of it, if it has the shared memory."""
    small = net.width in (16, 32, 64) and net.depth <= 6
    few = net.in_features <= 4 and net.out_features <= 8
    encodes = net.encoding is None or net.activation != "sine" or mode == "fp32"
    return small and few and encodes and measure != "project"


class Rounded:
    """One task at a time: ``mode`` is the precision, ``scale`` and ``along`` the powers of two."""

    def __init__(self, net, mode: str, scale=1.0, along=1.0, measure="none") -> None:
        self.net, self.mode, self.resident = net, mode, is_resident(net, measure, mode)
        self.scale, self.along = (scale, along) if mode == "fp16" else (1.0, 1.0)
        self.back = self.along
        self.tiles: list[int] = []  # points of each tile that has a power of two of its own

    def operand(self, x, scale: float = 1.0, along: float | None = None):
        """x in the operands' format, value and tangent, each with its power of two."""
        if not isinstance(x, Dual):
            return to_format(self.mode, x * scale) / scale
        d, along = None, self.along if along is None else along
        if x.d is not None:
            d = to_format(self.mode, x.d * scale * along) / (scale * along)
        return Dual(to_format(self.mode, x.a * scale) / scale, d)

    def rounds(self, layer: int) -> bool:
        """Whether a layer follows the precision."""
        if layer == 0:
            return self.net.encoding is not None and self.net.activation != "sine"
        return layer < self.net.depth - 1

    def kept(self, name: str, slope, z, w0: float):
        if (
            not self.resident
            or self.mode not in ("fp16", "bf16")
            or isinstance(z, Dual)
            or slope is None
        ):
            return slope
        if name == "sine":
            return w0 * torch.cos(torch.round(w0 * z / TURN) * TURN)
        return slope.float().half().double()

    def run(self, layers, x, adjoint):
        """(y, gradients [(W̄, b̄)], x̄) with ``adjoint(y) -> ȳ``; numbers are tensors or Duals."""
        net, steps = self.net, []
        h, cosine = reference.encode(net, x)
        for layer, (weight, bias) in enumerate(layers):
            last, before = layer == net.depth - 1, h
            w, a = (self.operand(weight), self.operand(h)) if self.rounds(layer) else (weight, h)
            z = reference._affine(a, w, bias)
            name, w0 = (net.output, 1.0) if last else (net.activation, net.frequencies[layer])
            h, slope = reference.activation(name, z, w0)
            steps.append((before, weight, slope if last else self.kept(name, slope, z, w0)))
        y = h + net.output_shift
        g, gradients = adjoint(y), []
        for layer in range(net.depth - 1, -1, -1):
            a, w, slope = steps[layer]
            delta = g if slope is None else slope * g
            if layer == net.depth - 1 and not self.resident and self.mode == "fp16":
                self.scale, d = power(value(delta)), tangent(delta)
                if d is not None and d.any():
                    self.back = min(self.along, power(d) / self.scale)
            if layer == net.depth - 1 and self.tiles and self.mode == "fp16":
                self.scale = self.lift(delta)
            if self.rounds(layer):
                delta = self.operand(delta, self.scale, self.back)
                a, w = (self.operand(q, 1.0, self.back) for q in (a, w))
            gradients.append((delta.mT @ a, delta.sum(-2)))
            g = delta @ w
        return y, gradients[::-1], reference._encode_backward(net, cosine, g)

    def lift(self, delta):
        """[1,N,1]: the powers of two that bring each tile's δ_L to [½, 1)."""
        largest = value(delta).abs()
        if tangent(delta) is not None:
            largest = torch.maximum(largest, tangent(delta).abs() * self.along)
        rows = largest.amax(-1)[0]
        powers = [power(part) for part in rows.split(self.tiles)]
        each = [torch.full((n,), q).double() for n, q in zip(self.tiles, powers, strict=True)]
        return torch.cat(each)[None, :, None]


def tile_points(net, mode: str, dual: bool) -> int:
    """Points of a tile in the kernels that take features and rays."""
    if net.width < 64:
        return 32 if net.width == 32 and dual else 64
    return 32 if mode in ("fp16", "bf16") or not dual else 16


def tiles_of_rays(rays: int, samples: int, points: int) -> list[int]:
    """How many samples each tile has: whole rays, or parts of one."""
    together = points // samples
    if together:
        return [samples * min(together, rays - r) for r in range(0, rays, together)]
    return [min(points, samples - s) for _ in range(rays) for s in range(0, samples, points)]


def task_worker(net, mode, batch, x, numbers, along=None):
    """A ``Rounded`` for a task's loss: points x, M numbers in its mean, dual if along is given."""
    # the power of two nearest to M; the kernel's own comparison, at 2^(k + 1/2)
    scale = 2.0 ** max(0, math.ceil(math.log2(numbers) - 0.5))
    made = Rounded(net, mode, scale, along or 1.0, batch.measure_name)
    if made.resident and batch.measure_name == "march":
        samples, points = batch.measure.samples, tile_points(net, mode, along is not None)
        made.scale, made.tiles = 1.0, tiles_of_rays(x.shape[1] // samples, samples, points)
    return made


def observed(net, batch, sample, t: int):
    """(x [1,M,D], M, adjoint, loss) of a task: ``adjoint(y)`` is ȳ, and appends to ``loss``."""
    count = int(sample.valid[t].sum()) if sample.valid is not None else sample.y.shape[1]
    target, numbers = sample.y[t : t + 1, :count], float(sample.numbers[t])
    loss: list[Tensor] = []

    def seed(y):
        ell, slope = reference.loss_forward(*batch.loss_parts, y, target)
        loss.append(ell.sum() / numbers)
        return slope * (1 / numbers)

    if sample.rays is not None:
        times = sample.t[t : t + 1, :count]  # [1,R,S]
        o, d = (q[t : t + 1, :count, None] for q in (sample.rays.origins, sample.rays.directions))
        x = (o + times[..., None] * d).flatten(1, 2)

        def adjoint(y):
            raw = reference._linear(lambda q: q.unflatten(1, times.shape[1:]), y)
            rgb, _, acc, tape = reference.composite_forward(raw, times, batch.measure)
            zero = torch.zeros_like(value(acc))
            bar, _ = reference.composite_backward(tape, times, batch.measure, seed(rgb), zero, zero)
            return reference._linear(lambda q: q.flatten(1, 2), bar)

        return x, numbers, adjoint, loss
    x = sample.x[t : t + 1] if sample.x.shape[0] > 1 else sample.x
    if batch.measure is None:
        return x[:, :count], numbers, seed, loss
    size = sample.y.shape[-1]
    pixels = batch.measure.pixels(size)[t : t + 1]

    def adjoint(y):
        sinogram = reference._linear(lambda q: reference.project(q.view(1, size, size), pixels), y)
        return reference._linear(
            lambda q: reference.project_adjoint(q, pixels).view(1, -1, 1), seed(sinogram)
        )

    return x, numbers, adjoint, loss


def task_pass(net, mode, params, v, batch, step):
    """(loss [T], ∇L [T,P], H v [T,P] or None) of the draws of a step."""
    sample = reference.draw(batch, step)
    losses, rows, products = [], [], []
    for t in range(batch.tasks):
        p = params[t : t + 1] if params.shape[0] > 1 else params
        x, numbers, adjoint, loss = observed(net, batch, sample, t)
        one = task_worker(net, mode, batch, x, numbers)
        _, gradients, _ = one.run(reference.dual_layers(net, p, None), x, adjoint)
        rows.append(reference._flat(gradients)[0])
        losses.append(loss[0])
        if v is not None:
            d = v[t : t + 1] if v.shape[0] > 1 else v
            two = task_worker(net, mode, batch, x, numbers, power(d))
            _, gradients, _ = two.run(reference.dual_layers(net, p, d), x, adjoint)
            products.append(reference._flat(gradients)[1])
    return torch.stack(losses), torch.cat(rows), torch.cat(products) if products else None


def given_pass(net, mode, params, x, gy, v=None, w=None):
    """(p̄, x̄), or along v and w (ẏ, p̄̇, x̄̇), of one task: [1,P], [1,N,D], [1,N,C]."""
    worker = Rounded(net, mode, power(gy), power(v, w) if v is not None else 1.0)
    xs = Dual(x, w) if w is not None else x
    y, gradients, gx = worker.run(reference.dual_layers(net, params, v), xs, lambda y: gy)
    rows, tangents = reference._flat(gradients)
    if v is None:
        return rows, gx
    return tangent(y), tangents, tangent(gx)


class patched:
    """``reference.adapt`` and ``reference.maml`` with every pass rounded."""

    def __init__(self, monkeypatch, mode: str) -> None:
        def loss_grad(net, params, batch, step=0, max_memory=None):
            return task_pass(net, mode, params, None, batch, step)[:2]

        def loss_hvp(net, params, v, batch, step=0, max_memory=None):
            return task_pass(net, mode, params, v, batch, step)[1:]

        monkeypatch.setattr(reference, "loss_grad", loss_grad)
        monkeypatch.setattr(reference, "loss_hvp", loss_hvp)


__all__ = ["Rounded", "given_pass", "patched", "power", "task_pass", "to_format", "value"]
