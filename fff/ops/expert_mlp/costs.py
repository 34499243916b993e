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
        "dense": Cost(106, 0, 0.000466, 0.00347, 0.000135, 1.15e-05),
        "grouped": Cost(99.9, 19.7, 0.000454, 0.00267, 0.000209, 9.82e-06),
        "gather": Cost(59.9, 0, 0.00117, 0.0179, 0.00123, 0),
    },
    True: {
        "dense": Cost(313, 0, 0.00158, 0.00919, 0.000252, 1.14e-05),
        "grouped": Cost(689, 27.6, 0.0019, 0.00402, 0.000203, 1.44e-05),
        "gather": Cost(256, 0, 0.00345, 0.114, 0.000137, 0.000504),
    },
}


def cheapest(problem: Problem, gradient: bool) -> str:
    """The backend of the least cost, for a hard route."""

    def microseconds(backend: str) -> float:
        return sum(c * n for c, n in zip(COSTS[gradient][backend], counts(backend, problem, gradient), strict=True))

    return min(COSTS[gradient], key=microseconds)
