"""Each loss worked by hand from its paper's formula, its gradient, and its behaviour at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fff.ops import balance

# Four rows through a tree of depth 2: 0 -> 2 -> 6, 0 -> 2 -> 5, 0 -> 1 -> 3, 0 -> 2 -> 6.
CHILD = torch.tensor([[2, 6], [2, 5], [1, 3], [2, 6]])


def losses(rows: int, dtype: torch.dtype = torch.float64):
    """Every loss as (function of one differentiable tensor, that tensor), on random input."""
    torch.manual_seed(3)
    logits = torch.randn(rows, 7, dtype=dtype)
    noise = torch.randn_like(logits)
    probability = torch.rand(rows, 8, dtype=dtype)
    index = torch.randint(8, (rows, 2))
    child = CHILD.repeat(rows, 1)[:rows]
    return {
        "cv_squared": (balance.cv_squared, torch.rand(5, dtype=dtype) * min(rows, 1)),
        "importance": (balance.importance, probability),
        "load": (
            lambda z: balance.cv_squared(balance.noisy_top_k_load(z, z + noise * z.exp(), z.exp(), 2)),
            logits,
        ),
        "switch": (lambda p: balance.switch(p, index), probability),
        "leaf_balance": (lambda p: balance.leaf_balance(p, index[:, 0]), probability),
        "path_balance": (lambda p: balance.path_balance(child, p, 2), probability[:, :2]),
        "z_loss": (balance.z_loss, logits),
        "node_balance": (balance.node_balance, logits),
        "hardening": (balance.hardening_entropy, logits),
    }


NAMES = list(losses(1))


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name):
    loss, x = losses(5)[name]
    assert gradcheck(loss, (x.requires_grad_(),))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_cost_nothing(name):
    loss, x = losses(0)[name]
    value = loss(x.requires_grad_())
    assert value.shape == () and value.item() == 0
    value.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(name, dtype):
    loss, x = losses(9, dtype)[name]
    value = loss(x)
    assert value.dtype == torch.float32
    # Only the rounding of the arithmetic before the loss (noise, exp) may differ; the loss itself sees the same input.
    torch.testing.assert_close(value, loss(x.float()), rtol=0.05 if name == "load" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["importance", "z_loss", "node_balance", "hardening"])
def test_order_of_the_rows_is_of_no_concern(name):
    loss, x = losses(4)[name]
    torch.testing.assert_close(loss(x), loss(x.flip(0)))


def test_sums_do_not_overflow_in_float16():
    gate = torch.ones(70_000, 2, dtype=torch.float16)  # the largest float16 is 65504
    assert balance.importance(gate).item() == 0


def test_compiles_without_graph_breaks():
    for name, (loss, x) in losses(5, torch.float32).items():
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
        torch.testing.assert_close(compiled(x), loss(x), msg=name)


def test_cv_squared_by_hand():
    assert balance.cv_squared(torch.tensor([1.0, 3.0])).item() == 0.25  # mean 2, variance 1
    assert balance.cv_squared(torch.tensor([0.0, 5.0, 0.0, 0.0])).item() == pytest.approx(3)  # its maximum, E - 1
    assert balance.cv_squared(torch.zeros(4)).item() == 0
    assert balance.cv_squared(torch.ones(1)).item() == 0


@given(st.floats(1e-12, 1e12))
@settings(max_examples=20, deadline=None)
def test_cv_squared_knows_no_scale(scale):
    v = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(balance.cv_squared(scale * v), balance.cv_squared(v))


def test_importance_by_hand():
    gate = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # sums 1.5 and 0.5: mean 1, variance 1/4
    assert balance.importance(gate).item() == 0.25


def test_noisy_top_k_load_by_hand():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    noisy = torch.tensor([[0.5, 0.8, -2.0]])
    std = torch.tensor([[1.0, 2.0, 1.0]])
    # Expert 1 leads; without it the largest is 0.5, without another it is 0.8: Phi(0.2), Phi(-0.25), Phi(-1.8).
    expected = torch.tensor([0.579260, 0.401294, 0.035930])
    torch.testing.assert_close(balance.noisy_top_k_load(logits, noisy, std, 1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_loads_of_a_batch_sum_to_its_choices(k):
    # The usual public implementation compares logits with softmax values and gets about 493 for 64.
    logits = torch.randn(64, 16, dtype=torch.float64)
    std = torch.ones_like(logits)
    sums = torch.stack(
        [balance.noisy_top_k_load(logits, logits + torch.randn_like(logits), std, k).sum() for _ in range(400)]
    )
    error = sums.std() / len(sums) ** 0.5
    assert error < 0.01 * 64 * k
    assert abs(sums.mean() - 64 * k) < 4 * error


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_load_is_the_probability_over_fresh_noise_of_one_expert(k):
    num_experts, draws = 6, 40_000
    logits, noise = torch.randn(1, num_experts), torch.randn(1, num_experts)
    std = 0.2 + torch.rand(1, num_experts)
    load = balance.noisy_top_k_load(logits, logits + noise * std, std, k)
    for i in range(num_experts):
        noisy = (logits + noise * std).repeat(draws, 1)
        noisy[:, i] = logits[:, i] + torch.randn(draws) * std[:, i]
        frequency = (noisy.topk(k).indices == i).any(1).float().mean()
        # Four standard errors of a frequency, at most 4 * 0.5 / sqrt(draws) = 0.01.
        assert abs(load[i] - frequency) < 0.01


def test_load_of_all_experts_is_the_number_of_rows():
    logits = torch.randn(5, 3)
    assert balance.noisy_top_k_load(logits, logits, torch.ones_like(logits), 3).tolist() == [5, 5, 5]


def test_switch_by_hand():
    probability = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    assert balance.switch(probability, torch.tensor([[0], [0]])).item() == pytest.approx(2 * 0.65)
    assert balance.switch(probability, torch.tensor([0, 1])).item() == pytest.approx(1)
    # f = (2/3, 1/3): the dropped choice is none.
    dropped = torch.tensor([[0, 1], [0, -1]])
    assert balance.switch(probability, dropped).item() == pytest.approx(2 * (2 / 3 * 0.65 + 1 / 3 * 0.35))
    assert balance.switch(torch.eye(4)[[2, 2, 2]], torch.tensor([2, 2, 2])).item() == pytest.approx(4)


def test_leaf_balance_is_the_loss_of_the_authors_code():
    probability, leaf = torch.rand(6, 8).softmax(-1), torch.randint(8, (6,))
    hard = torch.nn.functional.one_hot(leaf, 8).float()
    expected = 2**3 * (probability.sum(0) * hard.sum(0)).sum() / 6**2
    torch.testing.assert_close(balance.leaf_balance(probability, leaf), expected)


def test_path_balance_by_hand():
    # Shares: children 1..6 are entered by 1, 3, 1, 0, 1, 2 of 4 rows. Sure decisions, c = 1 where the row goes right:
    # level 0 (times 2) costs 2 * (3/4 + 3/4 + 1/4 + 3/4), level 1 (times 4) costs 4 * (2/4 + 1/4 + 1/4 + 2/4).
    sure = (CHILD % 2 == 0).double()
    assert balance.path_balance(CHILD, sure, 2).item() == pytest.approx((5 + 6) / 4 - 1)
    # c = 1/4 everywhere: level 0: 4 * 2 * (3/16 + 3/16); level 1 at node 2: 3 * 4 * (2/16 + 3/16), at node 1: 4 * 3/16.
    quarter = torch.full((4, 2), 0.25, dtype=torch.float64)
    assert balance.path_balance(CHILD, quarter, 2).item() == pytest.approx((3 + 3.75 + 0.75) / 4 - 1)


def test_path_balance_is_1_on_an_even_tree_and_grows_with_collapse():
    leaf = torch.arange(8)
    child = torch.stack([(leaf >> (2 - m)) + 2 ** (m + 1) - 1 for m in range(3)], dim=1)
    assert balance.path_balance(child, torch.rand(8, 3), 3).item() == pytest.approx(1)
    one_leaf = child[[5] * 8]
    sure = (one_leaf % 2 == 0).float()
    assert balance.path_balance(one_leaf, sure, 3).item() == pytest.approx(2 + 4 + 8 - 2)


def test_path_balance_of_depth_1_is_the_switch_loss():
    right, p = torch.tensor([1, 0, 1, 1, 0]), torch.rand(5, 1)
    expected = balance.switch(torch.cat([1 - p, p], dim=1), right)
    torch.testing.assert_close(balance.path_balance((right + 1)[:, None], p, 1), expected)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert balance.z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_node_balance_by_hand():
    logits = torch.randn(6, 7, dtype=torch.float64)
    p = logits.sigmoid()
    reach = torch.ones(6, 7, dtype=torch.float64)
    expected = 0.0
    for i, depth in enumerate([0, 1, 1, 2, 2, 2, 2]):
        if i:
            parent = (i - 1) // 2
            reach[:, i] = reach[:, parent] * (p[:, parent] if i % 2 == 0 else 1 - p[:, parent])
        a = (reach[:, i] * p[:, i]).sum() / reach[:, i].sum()
        expected -= 0.5**depth * 0.5 * (a.log() + (1 - a).log())
    torch.testing.assert_close(balance.node_balance(logits), expected)
    assert balance.node_balance(torch.zeros(2, 7)).item() == pytest.approx(3 * math.log(2))


def test_hardening_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/2 and 3/4
    entropy = math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert balance.hardening_entropy(logits).item() == pytest.approx(sum(entropy) / 2)


def test_hardening_entropy_keeps_its_precision_in_the_tails():
    z = torch.tensor([12.0, -20.0])
    # p (1 - log p) for small p = exp(-|z|), to first order.
    expected = torch.exp(-z.abs()) * (1 + z.abs())
    torch.testing.assert_close(balance.hardening_entropy(z), expected.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [balance.hardening_entropy, balance.node_balance, balance.z_loss])
@pytest.mark.parametrize("size", [1e4, 1e-30, 0.0])
def test_extreme_logits_have_finite_value_and_gradient(loss, size):
    z = (torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]]) * size).requires_grad_()
    value = loss(z)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


def test_bias_step_by_hand():
    bias = torch.tensor([0.5, 0.0, -1.0])
    new = balance.bias_step(bias, torch.tensor([6, 3, 0]), rate=0.1)
    torch.testing.assert_close(new, torch.tensor([0.4, 0.0, -0.9]))
    assert bias.tolist() == [0.5, 0.0, -1.0]


@pytest.mark.parametrize("num", [1, 2, 510, 2**16 - 1])
def test_counts_of_a_gpu(num):
    """By a histogram, whose bins must fall between the integers; entries of -1 are none."""
    index = torch.cat([torch.randint(-1, num, (100_000,)), torch.tensor([-1, 0, num - 1])])
    assert torch.equal(balance._histogram(index, num).long(), torch.bincount(index[index >= 0], minlength=num))
