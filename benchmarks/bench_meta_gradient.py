"""Exact second-order MAML gradients over K = 2 inner steps, against autograd through the unrolled
loop."""

from __future__ import annotations

import pytest
from workloads import META


@pytest.mark.parametrize("workload", META, ids=str)
def test_maml(contest, workload):
    contest(workload, "maml", 2)
