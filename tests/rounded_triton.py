"""The network's passes with the roundings of the Triton kernels, in plain float64.

``z_l = W_l h_{l-1} + b_l`` and back, plain and dual, as in ``fastmeta.reference``; operands of
hidden products are rounded to a precision, to nearest even, where the kernels round:

* activations, weights, deltas and their tangents as operands of hidden products; the first layer on
  bare coordinates, the last layer, biases and their gradients are not rounded; a first layer on
  features is, unless sines follow;
* ``streamed`` kernels keep between the passes: of a sine's pre-activation the phase as a signed
  16-bit fraction of a turn, of relu and none h as an operand, of the others z; tangents and deltas
  as operands. ``resident`` kernels keep numbers as they are.

A phase is computed in float32, as the kernels do: w0 z of 200 radians is known to 8e-6 only, and a
kept phase falls on steps of 9.6e-5. All else is float64; what the kernels add to that is the
rounding of float32 sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import reference
from fastmeta.spec import MLP, encoding_tensors

Pair = tuple[Tensor, Tensor]


def rounded(a: Tensor, mode: str) -> Tensor:
    """float64 to an operand and back: by way of float32."""
    a = a.float()
    if mode == "bf16":
        a = a.to(torch.bfloat16)
    elif mode == "fp16":
        a = a.to(torch.float16)
    elif mode == "tf32":  # 10 bits of fraction: 13 of float32's 23 go
        u = a.view(torch.int32).long() & 0xFFFFFFFF
        u = (u + 0xFFF + ((u >> 13) & 1)) & 0xFFFFE000
        a = torch.where(u >= 2**31, u - 2**32, u).to(torch.int32).view(torch.float32)
    return a.double()


def phase(p: Tensor) -> Tensor:
    """p mod 2π in float32: 2π in two terms, the first of 8 bits."""
    turns = torch.floor(p * 0.15915494309189535 + 0.5)
    return (p - turns * 6.28125) - turns * 0.0019353071795864769


def power(largest: Tensor) -> Tensor:
    """[T]: powers of two that bring these to [½,1); 1 for 0."""
    exponent = torch.floor(torch.log2(torch.where(largest > 0, largest, 0.5))) + 1
    return torch.where(largest > 0, torch.exp2(-exponent), 1.0)


class Result(NamedTuple):
    """y, p̄, x̄ and their tangents; the loss [T] where one was given."""

    y: Tensor
    dy: Tensor
    grad: Tensor
    dgrad: Tensor
    gx: Tensor
    dgx: Tensor
    loss: Tensor | None


@dataclass(frozen=True)
class Rounding:
    """A network in a precision, by streamed or resident kernels."""

    net: MLP
    mode: str
    streamed: bool
    sums: torch.dtype = torch.float64  # of products; float32 shows what its roundings tip over

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.to(self.sums) @ b.to(self.sums)).double()

    @property
    def first(self) -> str:
        return "fp32" if self.net.activation == "sine" else self.mode

    def operand(self, a: Tensor) -> Tensor:
        return rounded(a, self.mode)

    def stored(self, a: Tensor) -> Tensor:
        """Of deltas and tangents."""
        return rounded(a, self.mode) if self.streamed else a

    def activate(self, z: Tensor, dz: Tensor, w0: float) -> tuple[Pair, Pair]:
        """``(h, ḣ)`` and ``(φ', φ'' ż)`` of what is kept of z and ż."""
        name = self.net.activation
        dz = self.stored(dz)
        if name == "sine":
            p = w0 * z.float()
            if self.mode != "fp32":
                p = phase(p)
                if self.streamed:
                    steps = torch.floor(p * float(65536 * 0.15915494309189535) + 0.5)
                    p = steps.to(torch.int32).to(torch.int16).double() * (2 * math.pi / 65536)
            s, c = torch.sin(p.double()), torch.cos(p.double())
            return (s, w0 * c * dz), (w0 * c, -w0 * w0 * s * dz)
        if name in ("relu", "none"):
            kept = z.clamp(min=0) if name == "relu" else z
            z = self.stored(kept)
        h, slope = reference.activation(name, reference.Dual(z, dz))
        if slope is None:
            return (h.a, h.d), (torch.ones_like(z), torch.zeros_like(z))
        return (h.a, h.d), (slope.a, slope.d)

    def features(self, x: Tensor, w: Tensor) -> tuple[Pair, Tensor, Tensor]:
        """An encoding's numbers; its cosine; and q̇."""
        net = self.net
        B, phi = encoding_tensors(net.encoding, x.device, torch.float32)
        q = phi + torch.zeros(x.shape[:-1] + phi.shape)
        for d in range(net.in_features):
            q = q + x[..., d : d + 1].float() * B[d]
        dq = w @ B.double()
        s, c = torch.sin(q.double()), torch.cos(q.double())
        df = c * dq
        if net.encoding.include_input:
            s, df = torch.cat([x, s], -1), torch.cat([w, df], -1)
            c, dq = torch.cat([torch.ones_like(x), c], -1), torch.cat([w, dq], -1)
        return (s, df), c, dq

    def run(
        self,
        params: Tensor,  # [T,P]
        x: Tensor,  # [T,N,D]
        given: Tensor,  # [T,N,C]: ȳ, or the targets of a mean squared error
        v: Tensor | None = None,
        w: Tensor | None = None,
        *,
        loss: bool = False,
    ) -> Result:
        """Forward and back. Where a loss is given its tangent is 2ẏ/M; else ȳ̇ = 0."""
        net = self.net
        params, x, given = params.double(), x.double(), given.double()
        v = torch.zeros_like(params) if v is None else v.double()
        w = torch.zeros_like(x) if w is None else w.double()
        M = given[0].numel()
        one = torch.ones(len(params), dtype=torch.float64)
        big = vs = one
        if self.mode == "fp16":
            vs = power(torch.maximum(v.abs().amax(1), w.abs().amax((1, 2))))
            big = power(given.abs().amax((1, 2)))
            if loss:
                big = torch.exp2(torch.round(torch.log2(one * M)))
        v, w = v * vs[:, None], w * vs[:, None, None]
        weights, tangents = net.layers(params), net.layers(v)
        first, op, last = self.first, self.operand, net.depth - 1

        # forward
        inputs: list[Pair] = []
        slopes: list[Pair] = []
        h: Pair = (x, w)
        if net.encoding is not None:
            h, cosine, dq = self.features(x, w)
        for i, ((W, b), (dW, db)) in enumerate(zip(weights, tangents, strict=True)):
            if i == 0 and net.encoding is not None:
                a, da = rounded(h[0], first), rounded(h[1], first)
                W, dW = rounded(W, first), rounded(dW, first)
            elif 0 < i < last:
                a, da, W, dW = op(h[0]), op(h[1]), op(W), op(dW)
            else:
                a, da = h
            inputs.append((a, da))
            z = self.dot(a, W.mT)
            if i == 0 and net.encoding is None:  # product by product, in float32
                z = torch.zeros(z.shape)
                for d in range(net.in_features):
                    z = z + (x[..., d : d + 1].float() * W[:, None, :, d].float())
                z = (z + b[:, None].float()).double()
            else:
                z = z + b[:, None]
            dz = self.dot(a, dW.mT) + self.dot(da, W.mT) + db[:, None]
            if i < last:
                h, slope = self.activate(z, dz, net.frequencies[i])
                slopes.append(slope)
        out, rise = reference.activation(net.output, reference.Dual(z, dz))
        y, dy = out.a + net.output_shift, out.d
        up = (torch.ones_like(z), torch.zeros_like(z)) if rise is None else (rise.a, rise.d)

        # backward
        gy, dgy, value = given, torch.zeros_like(given), None
        if loss:
            gy, dgy = 2 * (y - given) / M, 2 * dy / M
            value = ((y - given) ** 2).sum((1, 2)) / M
        big, vs = big[:, None, None], vs[:, None, None]
        de: Pair = (up[0] * gy * big, up[1] * gy * big + up[0] * dgy * big)
        grads: list[Tensor] = []
        dgrads: list[Tensor] = []
        gh, dgh = gy, dgy
        for i in range(last, -1, -1):
            if i < last:
                de = (slopes[i][0] * gh, slopes[i][1] * gh + slopes[i][0] * dgh)
            bias = (de[0].sum(1), de[1].sum(1))
            W, dW = weights[i][0], tangents[i][0]
            if 0 < i < last:
                W, dW, de = op(W), op(dW), (op(de[0]), op(de[1]))
            elif i == 0:
                thin = de
                de = (self.stored(de[0]), self.stored(de[1]))  # as x̄ and features see it
                if net.encoding is not None:
                    de = (rounded(de[0], first), rounded(de[1], first))
                    W, dW = rounded(W, first), rounded(dW, first)
            a, da = inputs[i]
            g = thin if i == 0 and net.encoding is None else de
            grads[:0] = [(g[0].mT @ a).flatten(1), bias[0]]
            dgrads[:0] = [(g[1].mT @ a + g[0].mT @ da).flatten(1), bias[1]]
            gh, dgh = self.dot(de[0], W), self.dot(de[1], W) + self.dot(de[0], dW)
        if net.encoding is not None:
            B = encoding_tensors(net.encoding, x.device, torch.float64)[0]
            if net.encoding.include_input:
                B = torch.cat([torch.eye(net.in_features, dtype=B.dtype), B], 1)
            sine = self.features(x, w)[0][0].clone()
            if net.encoding.include_input:
                sine[..., : net.in_features] = 0
            gh, dgh = cosine * gh @ B.mT, (cosine * dgh - sine * dq * gh) @ B.mT
        grad, dgrad = torch.cat(grads, 1), torch.cat(dgrads, 1)
        return Result(
            y,
            dy / vs,
            grad / big[:, 0],
            dgrad / big[:, 0] / vs[:, 0],
            gh / big,
            dgh / big / vs,
            value,
        )
