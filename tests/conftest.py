"""Fixtures shared by the tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmeta import native


@pytest.fixture(autouse=True)
def same_random_numbers():
    """What draws without a seed of its own draws the same in every run, and in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def poisoned_working_memory():
    """The compiled worker's scratch holds NaN before each call."""
    if native.cpu.unavailable() is None:
        native._library().poison(True)


@pytest.fixture(scope="session")
def data_path() -> Callable[[str], Path]:
    """``data_path(name)``: a file or folder of the real data, in FASTMETA_DATA or beside the
    repository.

    Where it is absent the test is skipped with the reason; absent and listed in FASTMETA_TEST_DATA
    (names separated by commas; a folder's name stands for all in it), the test fails.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("FASTMETA_DATA") or beside)
    listed = {name.strip() for name in os.environ.get("FASTMETA_TEST_DATA", "").split(",")}

    def find(name: str) -> Path:
        path = root / name
        if path.exists():
            return path
        if name in listed or name.split("/")[0] in listed:
            pytest.fail(f"{path} is absent, and FASTMETA_TEST_DATA lists it")
        pytest.skip(f"real data {name!r} is absent (looked in {root}; set FASTMETA_DATA)")

    return find
