"""Each router against its paper's formula; choices against plain Python; invariants of every route."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fff.ops import top_k_route
from fff.ops.balance import noisy_top_k_load
from fff.ops.top_k_route import TopKRoute, apply_capacity

ROUTERS = {
    "noisy_top_k": lambda z: top_k_route.noisy_top_k(z, 2, 0.3 * z.flip(1), noise=torch.ones_like(z).cumsum(1) - 3),
    "mixtral": lambda z: top_k_route.mixtral(z, 3),
    "switch": top_k_route.switch,
    "soft": top_k_route.soft,
    "sigmoid_bias": lambda z: top_k_route.sigmoid_bias(z, 2, torch.linspace(0, 0.5, z.shape[1]).to(z)),
    "expert_choice": lambda z: top_k_route.expert_choice(z, 2),
}
ALL = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
TOKEN_CHOICE = pytest.mark.parametrize(
    "router", [r for name, r in ROUTERS.items() if name != "expert_choice"], ids=[n for n in ROUTERS if n[0] != "e"]
)

# Few distinct values, so that ties abound.
values = st.sampled_from([0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan])


@given(st.lists(values, min_size=12, max_size=12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_largest_first_and_of_equal_ones_the_lower_index(row, k):
    index = top_k_route.mixtral(torch.tensor([row]), k).index[0].tolist()
    rank = [math.inf if math.isnan(v) else v for v in row]
    assert index == sorted(range(12), key=lambda i: (-rank[i], i))[:k]


@pytest.mark.parametrize("k", [2, 8, 9, 300])
def test_ties_among_many_experts(k):
    logits = torch.randint(3, (20, 1000)).float()
    expected = [sorted(range(1000), key=lambda i, row=row: (-row[i], i))[:k] for row in logits.tolist()]
    assert top_k_route.mixtral(logits, k).index.tolist() == expected


@pytest.mark.parametrize("k", [0, 4, -1])
def test_impossible_k(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        top_k_route.mixtral(torch.zeros(2, 3), k)


def test_negative_capacity():
    with pytest.raises(ValueError, match="capacity=-1"):
        top_k_route.expert_choice(torch.zeros(2, 3), -1)
    with pytest.raises(ValueError, match="capacity=-1"):
        apply_capacity(top_k_route.switch(torch.zeros(2, 3)), -1)


@ALL
@given(rows=st.integers(0, 9), num_experts=st.integers(3, 12), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_invariants(router, rows, num_experts, seed):
    route = router(torch.randn(rows, num_experts, generator=torch.Generator().manual_seed(seed)))
    assert route.index.dtype == torch.int64
    assert route.index.shape == route.gate.shape
    assert route.probability.shape == route.logits.shape == (rows, num_experts)
    assert ((-1 <= route.index) & (route.index < num_experts)).all()
    assert (route.gate[route.index < 0] == 0).all() and (route.gate >= 0).all()
    torch.testing.assert_close(route.probability.sum(1), torch.ones(rows))
    torch.testing.assert_close(route.full_gate.sum(1), route.gate.sum(1))
    for row in route.index.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)


@TOKEN_CHOICE
def test_a_row_does_not_see_the_others(router):
    logits = torch.randn(7, 5)
    order = torch.randperm(7)
    whole, permuted = router(logits), router(logits[order])
    for a, b in zip(whole[:4], permuted[:4], strict=True):
        torch.testing.assert_close(a[order], b)


@TOKEN_CHOICE
def test_nan_stays_in_its_row(router):
    logits = torch.randn(4, 5)
    expected = router(logits)
    logits[2] = torch.nan
    route = router(logits)
    assert ((0 <= route.index) & (route.index < 5)).all()
    assert route.gate[2].isnan().all()
    keep = [0, 1, 3]
    assert torch.equal(route.index[keep], expected.index[keep])
    assert torch.equal(route.gate[keep], expected.gate[keep])


def test_nan_does_not_stop_expert_choice():
    index = top_k_route.expert_choice(torch.full((4, 3), torch.nan), 2).index
    assert ((index >= 0).sum(0) == 2).all()


@ALL
def test_gradient(router):
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def differentiable(z):
        route = router(z)
        return tuple(t for t in (route.gate, route.probability, route.load) if t is not None)

    assert gradcheck(differentiable, (logits,))


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(router, dtype):
    route = router(torch.randn(6, 4, dtype=dtype))
    assert route.gate.dtype == route.probability.dtype == dtype
    assert route.gate.isfinite().all()


def test_noisy_top_k_is_the_softmax_over_kept_noisy_logits():
    logits, noise_logits, noise = torch.randn(3, 9, 6, dtype=torch.float64)
    route = top_k_route.noisy_top_k(logits, 2, noise_logits, noise=noise, noise_floor=0.01)
    std = torch.nn.functional.softplus(noise_logits) + 0.01
    noisy = logits + noise * std
    kept = torch.where(noisy >= noisy.topk(2).values[:, 1:], noisy, -torch.inf)
    torch.testing.assert_close(route.full_gate, kept.softmax(1))
    torch.testing.assert_close(route.load, noisy_top_k_load(logits, noisy, std, 2))
    assert torch.equal(route.logits, logits)


def test_noise_is_drawn_afresh_and_is_standard_normal():
    logits = torch.zeros(2000, 4)
    # softplus(noise logit) + floor = 1: the noisy logits are the noise.
    noise_logits = torch.full_like(logits, math.log(math.e**0.99 - 1))
    first = top_k_route.noisy_top_k(logits, 4, noise_logits)
    second = top_k_route.noisy_top_k(logits, 4, noise_logits)
    assert not torch.equal(first.index, second.index)
    # log probabilities differ between two experts by the difference of two standard normals, variance 2.
    difference = first.probability[:, 0].log() - first.probability[:, 1].log()
    assert difference.var().item() == pytest.approx(2, rel=0.15)  # standard error 3 % of 8000 / 4 pairs
    assert difference.mean().abs() < 0.15


def test_no_noise_no_load():
    assert top_k_route.noisy_top_k(torch.randn(3, 4), 2).load is None
    assert top_k_route.noisy_top_k(torch.randn(3, 4), 2, torch.zeros(3, 4), with_load=False).load is None


def test_mixtral_by_hand():
    route = top_k_route.mixtral(torch.tensor([[0.0, math.log(3.0), -5.0, 0.0]]), 2)
    assert route.index.tolist() == [[1, 0]]
    torch.testing.assert_close(route.gate, torch.tensor([[0.75, 0.25]]))


def test_switch_by_hand():
    route = top_k_route.switch(torch.tensor([[0.0, math.log(2.0), 0.0]]))
    assert route.index.tolist() == [[1]]
    torch.testing.assert_close(route.gate, torch.tensor([[0.5]]))


def test_soft_asks_every_expert():
    route = top_k_route.soft(torch.tensor([[0.0, math.log(2.0), 0.0]]))
    assert route.index.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(route.gate, torch.tensor([[0.25, 0.5, 0.25]]))


def test_sigmoid_bias_decides_and_does_not_gate():
    logits = torch.tensor([[math.log(3.0), 0.0, math.log(1 / 3)]])  # sigmoids 3/4, 1/2, 1/4
    assert top_k_route.sigmoid_bias(logits, 2).index.tolist() == [[0, 1]]
    route = top_k_route.sigmoid_bias(logits, 2, torch.tensor([0.0, -0.3, 0.6]))  # scores 0.75, 0.2, 0.85
    assert route.index.tolist() == [[2, 0]]
    torch.testing.assert_close(route.gate, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(route.probability, torch.tensor([[0.5, 1 / 3, 1 / 6]]))


def test_sigmoid_gates_survive_underflow():
    route = top_k_route.sigmoid_bias(torch.tensor([[-200.0, -201.0, -300.0]]), 2)
    torch.testing.assert_close(route.gate, torch.tensor([[1.0, 1 / math.e]]) / (1 + 1 / math.e))


def test_expert_choice_by_hand():
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    route = top_k_route.expert_choice(logits, 2)
    # Expert 0 is most probable for rows 0 and 1, expert 1 for rows 3 and 2.
    assert route.index.tolist() == [[0, -1], [0, -1], [-1, 1], [-1, 1]]
    torch.testing.assert_close(route.full_gate, logits.softmax(1) * (route.index >= 0))


@given(rows=st.integers(0, 8), capacity=st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_expert_choice_fills_every_expert(rows, capacity):
    index = top_k_route.expert_choice(torch.randn(rows, 3), capacity).index
    assert ((index >= 0).sum(0) == min(rows, capacity)).all()


def test_expert_choice_prefers_the_earlier_row_of_equals():
    assert (top_k_route.expert_choice(torch.zeros(5, 3), 2).index >= 0)[:2].all()


def route_of(index: torch.Tensor, num_experts: int) -> TopKRoute:
    mass = torch.full((index.shape[0], num_experts), 1 / num_experts)
    return TopKRoute(index, torch.full(index.shape, 0.5), mass, mass)


def test_capacity_by_hand():
    # Queues: first choices r0 -> 0, r1 -> 0, r2 -> 1, then second choices r0 -> 1, r1 -> 1 (full), r2 -> 0 (full).
    route = apply_capacity(route_of(torch.tensor([[0, 1], [0, 1], [1, 0]]), 2), 2)
    assert route.index.tolist() == [[0, 1], [0, -1], [1, -1]]
    assert route.gate.tolist() == [[0.5, 0.5], [0.5, 0], [0.5, 0]]


@given(st.lists(st.permutations(range(-1, 4)).map(lambda p: p[:3]), min_size=0, max_size=12), st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_capacity_against_a_queue(rows, capacity):
    index = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    expected, taken = index.clone(), [0] * 4
    for choice in range(3):
        for row in range(len(rows)):
            expert = int(index[row, choice])
            if expert >= 0:
                taken[expert] += 1
                if taken[expert] > capacity:
                    expected[row, choice] = -1
    route = apply_capacity(route_of(index, 4), capacity)
    assert torch.equal(route.index, expected)
    assert torch.equal(route.gate, 0.5 * (expected >= 0))


def test_dropped_choices_give_no_gradient():
    logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    apply_capacity(top_k_route.switch(logits), 1).gate.sum().backward()
    assert (logits.grad[0] != 0).any() and (logits.grad[1:] == 0).all()
