"""One way to start a kernel, which can also write down what would start.

Whoever wants to know what a pass launches without a GPU (the tests compile every launch ahead of
time and hold its registers to a budget) runs it under ``recording``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Triton decides when a kernel is defined whether its interpreter runs it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments (tensors and integers) and its constants, by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    consts: dict[str, Any]
    warps: int
    stages: int


_records: list[list[Launch]] = []


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are written down in the list and not started."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    consts: dict[str, Any],
    *,
    warps: int = 4,
    stages: int = 1,
) -> None:
    """Starts a kernel on the current stream; every axis of the grid is at least 1."""
    if _records:
        _records[-1].append(Launch(kernel, grid, args, consts, warps, stages))
        return
    kernel[grid](**args, **consts, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
