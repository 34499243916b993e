"""From the rows of suite=crossover to the table of costs: `python -m fff.bench.crossover results/bench/crossover.csv`.

Prints `COSTS` of fff/ops/expert_mlp/costs.py, and what a choice by it costs against the best backend of each case.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from fff.ops.expert_mlp.costs import Cost, Problem, counts

BACKENDS = ("dense", "grouped", "gather")
_SIZES = ["batch", "in_features", "num_experts", "leaf_width", "out_features", "choices"]


def fit(rows: pd.DataFrame) -> dict[bool, dict[str, Cost]]:
    """Costs per unit in microseconds, by gradient and backend: non-negative least squares of relative errors.

    rows: of the suite; one per case and candidate.
    """
    found: dict[bool, dict[str, Cost]] = {}
    for gradient in (False, True):
        part = rows[rows["gradient"] == gradient]
        found[gradient] = {}
        for backend in BACKENDS:
            timed = part[part["candidate"] == backend]
            work = np.array([counts(backend, problem, gradient) for problem in _problems(timed)], dtype=float)
            time = 1e6 * timed["median_s"].to_numpy()
            scale = work.max(0).clip(min=1)
            solution, _ = nnls(work / scale / time[:, None], np.ones(len(time)))
            found[gradient][backend] = Cost(*(float(f"{value:.3g}") for value in solution / scale))
    return found


def regret(rows: pd.DataFrame, costs: dict[bool, dict[str, Cost]]) -> pd.Series:
    """Time of the backend with the least cost over that of the fastest, by case."""
    timed = rows[rows["candidate"].isin(BACKENDS)]
    ratio = {}
    for case, group in timed.groupby("case", sort=False):
        time = group.set_index("candidate")["median_s"]
        problem, gradient = _problems(group)[0], bool(group["gradient"].iloc[0])
        cost = {b: np.dot(costs[gradient][b], counts(b, problem, gradient)) for b in time.index}
        ratio[case] = time[min(cost, key=cost.get)] / time.min()
    return pd.Series(ratio)


def _problems(rows: pd.DataFrame) -> list[Problem]:
    return [Problem(*map(int, row)) for row in rows[_SIZES].itertuples(index=False)]


def main(path: str) -> None:
    rows = pd.read_csv(path)
    rows = rows[rows["median_s"].notna()]
    costs = fit(rows)
    print("COSTS: dict[bool, dict[str, Cost]] = {")
    for gradient, table in costs.items():
        print(f"    {gradient}: {{")
        for backend, cost in table.items():
            print(f'        "{backend}": Cost({", ".join(f"{value:g}" for value in cost)}),')
        print("    },")
    print("}")
    ratio = regret(rows, costs)
    for kind in ("inference", "training"):
        part = ratio[ratio.index.str.startswith(kind)]
        print(f"# {kind}: {len(part)} cases, {(part <= 1.3).sum()} within 1.3 of the best, worst {part.max():.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
