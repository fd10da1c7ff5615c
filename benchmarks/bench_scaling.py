"""How the time of a gradient grows with T and with N; a figure with the fitted exponents goes to
scaling.png."""

from __future__ import annotations

import competitors
import plot
import pytest
import workloads
from workloads import small

TASKS = [small("siren", width, T, 256) for width in (32, 256) for T in (1, 2, 4, 8, 16, 32, 64)]
POINTS = [small("siren", width, 1, 4**k) for width in (32, 256) for k in range(4, 9)]


@pytest.fixture(scope="module", autouse=True)
def figure():
    yield
    plot.scaling(plot.last_rows(), plot.HERE / "scaling.png")


@pytest.mark.parametrize("workload", dict.fromkeys(TASKS + POINTS), ids=str)
def test_scaling(race, workload):
    problem = workloads.problem(workload)
    entries = {
        "fastmeta": competitors.fastmeta(problem, "gradient"),
        "bmm": competitors.bmm(problem, "gradient", 0),
    }
    check = competitors.truth(problem, "gradient").check
    race(workload.name, plot.SCALING, entries, workloads.cost(workload, "gradient"), check)
