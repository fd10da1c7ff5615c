"""The Triton worker: many networks at once on an NVIDIA GPU, in four precisions.

Under Triton's interpreter (TRITON_INTERPRET=1 in the environment before fastmeta is imported) it
runs on the CPU, slowly, float64 too: that is how its mathematics is tested.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton

from .. import spec
from .activation import ACTIVATIONS
from .launch import INTERPRETED
from .passes import Passes, described

__all__ = ["Passes", "at", "described", "objections", "unavailable"]

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
OLDEST = (3, 4)

if ACTIVATIONS != spec.ACTIVATIONS:
    raise ImportError(f"fastmeta.triton lists ACTIVATIONS as {ACTIVATIONS}, not {spec.ACTIVATIONS}")


def unavailable() -> str | None:
    """Why it cannot run on this machine, or None."""
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version < OLDEST:
        needed = ".".join(map(str, OLDEST))
        return f"triton is {triton.__version__}, accepted is {needed} or newer"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (torch.cuda.is_available() is False)"
    if torch.version.hip is not None:
        return "torch is built for ROCm; accepted is CUDA"
    return None


def objections(case: Any) -> list[str]:
    """Why it cannot run a case of the dispatcher; empty: it can."""
    reasons = []
    device = "cpu" if INTERPRETED else "cuda"
    if case.device != device:
        reasons.append(f"device {case.device} ({device} only)")
    real = (torch.float32, torch.float64) if INTERPRETED else (torch.float32,)
    if case.dtype not in real:
        reasons.append(f"dtype {case.dtype} (float32 only)")
    if case.dtype == torch.float64 and case.precision not in (None, "fp32"):
        reasons.append(f"precision {case.precision!r} of float64 tensors (none only)")
    if not INTERPRETED and device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            reasons.append(f"compute capability {major}.{minor} (8.0 or newer)")
    if case.net is not None:
        if case.net.width > 512:
            reasons.append(f"width {case.net.width} (512 at most)")
        if case.net.out_features > 64:
            reasons.append(f"{case.net.out_features} outputs (64 at most)")
    return reasons


@lru_cache(maxsize=8)
def at(precision: str | None) -> Passes:
    """The passes in a precision; none is fp32, whose error is that of float32."""
    return Passes(precision or "fp32")
