"""What the PyTorch backends cost on a CPU: the one table by which "auto" chooses among them.

T rows, D input width, O output width, E experts, L expert width, K chosen experts per row.

A call of a backend is taken to last

    call + groups * group + numbers moved * move + hidden units * hidden + weights touched * weight + operations * flop

microseconds. Only the order of the backends matters, so the table serves other machines as far as their costs have the
same proportions; `experiments.bench suite=crossover` tells how far "auto" is from the best backend on the one at hand.
"""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """What the choice of a backend depends on: T, D, E, L, O, and K (None: every expert is asked for)."""

    rows: int
    in_features: int
    num_experts: int
    expert_width: int
    out_features: int
    choices: int | None


class Counts(NamedTuple):
    """What a backend does in one call; of `Cost`, what it takes in microseconds each.

    call: 1.  group: experts that get a matmul of their own.  move: numbers in rows and outputs, once per choice.
    hidden: hidden units that are computed.  weight: numbers of expert weights that are read, copied or, in training,
    filled as a gradient.  flop: floating-point operations of the matmuls.
    """

    call: float
    group: float
    move: float
    hidden: float
    weight: float
    flop: float


Cost = Counts


def counts(backend: str, problem: Problem, gradient: bool) -> Counts:
    """gradient: forward and backward, else forward alone."""
    rows, in_features, num_experts, expert_width, out_features, choices = problem
    assert choices is not None, "the choice is among hard routes"
    chosen, widths = rows * choices, in_features + out_features
    expert = expert_width * widths
    passes = 3 if gradient else 1
    every = num_experts * expert if gradient else 0  # the gradient of all weights is a dense tensor
    if backend == "dense":
        computed = rows * num_experts
        return Counts(
            *(1, 0, chosen * widths, computed * expert_width),
            *(num_experts * expert + every, 2 * passes * computed * expert),
        )
    if backend == "gather":
        return Counts(
            1, 0, chosen * widths, chosen * expert_width, chosen * expert + every, 2 * passes * chosen * expert
        )
    hit = num_experts * (1 - (1 - 1 / num_experts) ** chosen)  # expected, of even routes
    return Counts(1, hit, chosen * widths, chosen * expert_width, hit * expert + every, 2 * passes * chosen * expert)


# Made by
#   python -m experiments.bench suite=crossover rounds=5 min_sample_s=0.01 max_candidate_s=0.5
#   python -m fff.bench.crossover results/bench/crossover.csv
COSTS: dict[bool, dict[str, Cost]] = {
    False: {
        "dense": Cost(105, 0, 0.000561, 0.00342, 0.000157, 1.15e-05),
        "grouped": Cost(101, 20.2, 0.000467, 0.00261, 0.000195, 9.21e-06),
        "gather": Cost(60, 0, 0.00124, 0.0179, 0.00123, 0),
    },
    True: {
        "dense": Cost(317, 0, 0.00182, 0.00978, 0.00026, 1.12e-05),
        "grouped": Cost(699, 28.7, 0.00202, 0.00418, 0.000235, 1.22e-05),
        "gather": Cost(259, 0, 0.00475, 0.122, 0.000156, 0.000464),
    },
}


def cheapest(problem: Problem, gradient: bool) -> str:
    """The backend of the least cost, for a hard route."""

    def microseconds(backend: str) -> float:
        return sum(c * n for c, n in zip(COSTS[gradient][backend], counts(backend, problem, gradient), strict=True))

    return min(COSTS[gradient], key=microseconds)
