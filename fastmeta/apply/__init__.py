"""Learned starts at work: fit new signals, compare starts, render what was fitted."""

from .fit import Fit, fit, summary
from .show import Render, render
from .start import Learned, builtin, open_start
from .table import Eval, evaluate_run

__all__ = [
    "Eval",
    "Fit",
    "Learned",
    "Render",
    "builtin",
    "evaluate_run",
    "fit",
    "open_start",
    "render",
    "summary",
]
