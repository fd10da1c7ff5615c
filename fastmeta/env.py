"""The environment variables that fastmeta reads, all of them.

FASTMETA_IMPL   worker used where a call names none ("reference", "cpu", "triton", "cuda"); as
strict as ``impl=`` FASTMETA_DEBUG  1: the command line shows the Python traceback of an error
FASTMETA_ISA    instruction set of the cpu worker ("baseline", "avx2", "avx512", "neon"), strict
too; unset: the widest that the processor runs
"""

import os


def default_impl() -> str | None:
    """FASTMETA_IMPL, or None when it is unset or empty."""
    return os.environ.get("FASTMETA_IMPL") or None


def debug() -> bool:
    """True when FASTMETA_DEBUG is set to anything but 0."""
    return os.environ.get("FASTMETA_DEBUG", "0") not in ("", "0")


def isa() -> str | None:
    """FASTMETA_ISA, or None when it is unset or empty."""
    return os.environ.get("FASTMETA_ISA") or None
