"""Numbers in kernels: plain and dual, the four precisions, and products on the tensor cores.

A number is a pair (a, ȧ) of blocks. Where DUAL is false the second is the first once more and is
never read, so that one text serves both passes; the compiler drops it.

Precisions, ``MODE``: "fp32" (three TF32 products, error about 2⁻²²), "tf32", "fp16", "bf16".
Operands are rounded to nearest, even, by ``operand``, and nowhere else: what a tensor core would
round by itself it finds rounded. Sums are float32. Under Triton's interpreter, blocks of float64
are taken too, and stay float64: the mathematics is checked there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

INTERP = tl.constexpr(INTERPRETED)


@triton.jit
def mul(a, b, DUAL: tl.constexpr):
    """``(a b, ȧ b + a ḃ)``."""
    v = a[0] * b[0]
    d = v
    if DUAL:
        d = a[1] * b[0] + a[0] * b[1]
    return (v, d)


@triton.jit
def add(a, b, DUAL: tl.constexpr):
    """``(a + b, ȧ + ḃ)``."""
    v = a[0] + b[0]
    d = v
    if DUAL:
        d = a[1] + b[1]
    return (v, d)


@triton.jit
def scaled(a, c, DUAL: tl.constexpr):
    """``c a`` of a plain c."""
    v = a[0] * c
    d = v
    if DUAL:
        d = a[1] * c
    return (v, d)


@triton.jit
def _nearest_bf16(a):
    """float32 rounded to nearest even at 8 bits, as float32: the interpreter's cast truncates."""
    u = a.to(tl.uint32, bitcast=True)
    u = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
    return u.to(tl.float32, bitcast=True)


@triton.jit
def _nearest_tf32(a):
    """float32 rounded to nearest even at 11 bits, as float32: a tensor core would truncate."""
    u = a.to(tl.uint32, bitcast=True)
    u = (u + 0xFFF + ((u >> 13) & 1)) & 0xFFFFE000
    return u.to(tl.float32, bitcast=True)


@triton.jit
def operand(a, MODE: tl.constexpr):
    """A float32 block as the products of this precision take it."""
    if MODE == "bf16":
        if INTERP:
            return _nearest_bf16(a)
        return a.to(tl.bfloat16)
    elif MODE == "fp16":
        return a.to(tl.float16)
    elif MODE == "tf32":
        return _nearest_tf32(a)
    else:
        return a


@triton.jit
def loaded(a, MODE: tl.constexpr):
    """A block of operands as it came from memory: the interpreter multiplies bfloat16 as integers,
    so there it becomes float32."""
    if INTERP and a.dtype == tl.bfloat16:
        return a.to(tl.float32)
    return a


@triton.jit
def once(a):
    """a, float32, computed once: the compiler would rather compute it again in every layout that
    asks for it than move it, sines and all."""
    if INTERP or a.dtype == tl.float64:
        return a
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr):
    """``acc + a b`` of operands; "bf16x3" are three products of float32 in halves, 2⁻¹⁶ off."""
    if MODE == "fp32" or (INTERP and MODE == "bf16x3"):
        return tl.dot(a, b, acc, input_precision="tf32x3", out_dtype=acc.dtype)
    elif MODE == "bf16x3":
        return tl.dot(a, b, acc, input_precision="bf16x3", out_dtype=acc.dtype)
    elif MODE == "tf32":
        return tl.dot(a, b, acc, input_precision="tf32", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, out_dtype=acc.dtype)
