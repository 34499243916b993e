"""Costs are found again in times that were made from them, and a wrong choice costs what it costs."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fff.bench.crossover import BACKENDS, fit, regret
from fff.ops.expert_mlp import costs
from fff.ops.expert_mlp.costs import Cost, Problem, counts

ROOT = Path(__file__).resolve().parents[2]

COSTS = {
    gradient: {
        "dense": Cost(100, 0, 5e-4, 3e-3, 2e-4, 1e-5),
        "grouped": Cost(300, 20, 4e-4, 2e-3, 1e-4, 2e-5),
        "gather": Cost(50, 0, 1e-3, 1e-2, 1e-3, 1e-6),
    }
    for gradient in (False, True)
}


@pytest.fixture
def rows():
    sizes = product((1, 16, 1024), (8, 64), (2, 32, 256), (3, 32), (5, 200), (1, 2), (False, True))
    made = []
    for case, (batch, inputs, experts, width, outputs, choices, gradient) in enumerate(sizes):
        problem = Problem(batch, inputs, experts, width, outputs, choices)
        for backend in BACKENDS:
            median = 1e-6 * np.dot(COSTS[gradient][backend], counts(backend, problem, gradient))
            made.append(
                {
                    **{"case": f"case{case}", "candidate": backend, "gradient": gradient, "median_s": median},
                    **{"batch": batch, "in_features": inputs, "num_experts": experts, "leaf_width": width},
                    **{"out_features": outputs, "choices": choices},
                }
            )
    return pd.DataFrame(made)


def test_the_costs_of_the_library_are_those_of_the_committed_times():
    rows = pd.read_csv(ROOT / "results" / "bench" / "crossover.csv")
    found = fit(rows[rows["median_s"].notna()])
    for gradient, table in costs.COSTS.items():
        for backend, cost in table.items():
            np.testing.assert_allclose(found[gradient][backend], cost, rtol=0.01)


def test_costs_are_those_that_the_times_were_made_from(rows):
    found = fit(rows)
    ratio = regret(rows, found)
    assert ratio.max() < 1.02 and len(ratio) == rows["case"].nunique()
    for gradient, table in COSTS.items():
        assert found[gradient]["grouped"].group == pytest.approx(table["grouped"].group, rel=0.05)
        assert found[gradient]["dense"].flop == pytest.approx(table["dense"].flop, rel=0.2)


def test_a_wrong_choice_costs_its_time_over_the_best(rows):
    always_dense = {g: {b: Cost(0 if b == "dense" else 1e12, *[0] * 5) for b in BACKENDS} for g in (False, True)}
    ratio = regret(rows, always_dense)
    time = rows.pivot(index="case", columns="candidate", values="median_s")
    pd.testing.assert_series_equal(
        ratio.sort_index(), (time["dense"] / time.min(axis=1)).sort_index(), check_names=False
    )
