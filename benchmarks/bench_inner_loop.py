"""The inner loop: K SGD steps of every task from one start, against what a user would write
instead."""

from __future__ import annotations

import pytest
from workloads import ALL, SMALL


@pytest.mark.parametrize("workload", ALL, ids=str)
def test_two_steps(contest, workload):
    contest(workload, "adapt", 2)


@pytest.mark.parametrize("workload", SMALL, ids=str)
def test_five_steps(contest, workload):
    contest(workload, "adapt", 5)
