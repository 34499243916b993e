"""Tree decisions against the paper's recursion, and against trees small enough to walk by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fff.ops.tree_route import (
    Nodes,
    additive_leaf_probability,
    beam_leaves,
    dense_logits,
    gathered_logits,
    greedy_leaf,
    leaf_probability,
    path_log_probability,
    path_logits,
    path_to,
    reference,
    turned_decision,
)


def make_nodes(trees, depth, d, width=1, dtype=torch.float64):
    num = 2**depth - 1
    wide = (width,) if width > 1 else ()
    return Nodes(
        torch.randn(trees, num, *wide, d, dtype=dtype),
        torch.randn(trees, num, *wide, dtype=dtype),
        torch.randn(trees, num, width, dtype=dtype) if wide else None,
        torch.randn(trees, num, dtype=dtype) if wide else None,
    )


def leaf_of(logits, depth, **kwargs):
    """Greedy leaf of one tree whose logits are given for all nodes."""
    return greedy_leaf(logits, Nodes(logits, None), depth, logits.unsqueeze(1), **kwargs)


def test_greedy_descent_by_hand():
    # Node 0 asks first; its children are 1 (left) and 2 (right). Leaves 0 1 | 2 3.
    logits = torch.tensor(
        [
            [-1.0, -1.0, 9.0],  # left, left
            [-1.0, 1.0, -9.0],  # left, right
            [1.0, 9.0, -1.0],  # right, left
            [0.0, -9.0, 0.0],  # a tie goes right, twice
        ]
    )
    leaf = leaf_of(logits, 2)
    assert leaf.flatten().tolist() == [0, 1, 2, 3]
    path = path_to(leaf, 2)
    assert path.node.squeeze().tolist() == [[0, 1], [0, 1], [0, 2], [0, 2]]
    assert path.right.squeeze().tolist() == [[False, False], [False, True], [True, False], [True, True]]


def test_greedy_leaf_is_not_the_most_probable_leaf():
    # Right by a hair, then a coin flip; left would have led to a sure leaf.
    logits = torch.tensor([[0.1, 9.0, 0.0]])
    assert leaf_of(logits, 2).item() == 3
    assert leaf_probability(logits.unsqueeze(1)).argmax().item() == 1
    beam = beam_leaves(logits, Nodes(logits, None), 2, logits.unsqueeze(1), top_k=1, beam_width=2)
    assert beam.item() == 1


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_against_the_recursion(depth):
    logits = torch.randn(11, 2**depth - 1, dtype=torch.float64)
    probability = leaf_probability(logits.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(probability, reference.leaf_probability(logits, depth))
    assert torch.equal(leaf_of(logits, depth).flatten(), reference.greedy_leaf(logits, depth))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 3), st.integers(0, 5), st.floats(0.1, 50))
def test_mass_sums_to_one_and_paths_agree_with_the_mixture(depth, trees, rows, scale):
    logits = scale * torch.randn(rows, trees, 2**depth - 1, dtype=torch.float64)
    for probability in (
        leaf_probability(logits),
        additive_leaf_probability(logits),
        leaf_probability(logits, region_leak=0.3),
    ):
        assert (probability >= 0).all()
        torch.testing.assert_close(probability.sum(-1), torch.ones(rows, trees, dtype=torch.float64))
    every = path_to(torch.arange(2**depth).expand(rows, trees, -1), depth)
    along = logits.gather(2, every.node.flatten(2)).view(every.node.shape)
    torch.testing.assert_close(path_log_probability(along, every.right).exp(), leaf_probability(logits))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("trees", [1, 2])
def test_gathered_nodes_equal_dense_nodes(width, trees):
    nodes, x = make_nodes(trees, 4, 6, width), torch.randn(5, 6, dtype=torch.float64)
    dense = dense_logits(x, nodes, 4)
    node = torch.randint(15, (5, trees, 7))
    torch.testing.assert_close(gathered_logits(x, nodes, node), dense.gather(2, node))


def test_gradients_of_a_node_add_up_in_low_precision():
    # All rows at one node; row by row in bfloat16 a sum of ones ends at 256.
    weight, bias = torch.randn(1, 15, 6).bfloat16().requires_grad_(), torch.zeros(1, 15).bfloat16().requires_grad_()
    x, node = torch.ones(2000, 6).bfloat16(), torch.full((2000, 1, 1), 3)
    gathered_logits(x, Nodes(weight, bias), node).sum().backward()
    assert weight.grad[0, 3].tolist() == [2000.0] * 6 and bias.grad[0, 3] == 2000


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("levels", [0, 1, 3, 5])
def test_route_does_not_depend_on_how_many_levels_are_dense(levels, width):
    nodes, x = make_nodes(2, 5, 6, width), torch.randn(40, 6, dtype=torch.float64)
    whole = dense_logits(x, nodes, 5)
    top = dense_logits(x, nodes, levels)
    leaf = greedy_leaf(x, nodes, 5, top)
    assert torch.equal(leaf, greedy_leaf(x, nodes, 5, whole))
    node = path_to(leaf, 5).node
    torch.testing.assert_close(path_logits(x, nodes, node, top), path_logits(x, nodes, node, whole))
    beam = beam_leaves(x, nodes, 5, top, top_k=3, beam_width=4)
    assert torch.equal(beam, beam_leaves(x, nodes, 5, whole, top_k=3, beam_width=4))


def test_deep_greedy_routing_never_evaluates_all_nodes():
    nodes, x = make_nodes(1, 9, 4), torch.randn(6, 4, dtype=torch.float64)
    expected = greedy_leaf(x, nodes, 9, dense_logits(x, nodes, 9))
    # Nodes off the path below the dense levels are poisoned: touching them would show.
    node = path_to(greedy_leaf(x, nodes, 9, dense_logits(x, nodes, 7)), 9).node
    poisoned = nodes._replace(weight=nodes.weight.clone())
    off_path = torch.ones(2**9 - 1, dtype=torch.bool)
    off_path[:127] = False
    off_path[node.flatten()] = False
    poisoned.weight[:, off_path] = torch.nan
    top = dense_logits(x, poisoned, 7)
    again = greedy_leaf(x, poisoned, 9, top)
    assert torch.equal(again, expected)
    assert path_logits(x, poisoned, path_to(again, 9).node, top).isfinite().all()


def test_wide_beam_finds_the_most_probable_leaves():
    nodes, x = make_nodes(2, 4, 6), torch.randn(50, 6, dtype=torch.float64)
    logits = dense_logits(x, nodes, 4)
    beam = beam_leaves(x, nodes, 4, logits, top_k=5, beam_width=16)
    assert torch.equal(beam, leaf_probability(logits).topk(5, dim=-1).indices)
    narrow = beam_leaves(x, nodes, 4, logits, top_k=1, beam_width=1)
    assert torch.equal(narrow, greedy_leaf(x, nodes, 4, logits))


def test_decision_bias_decides_but_does_not_gate():
    logits = torch.tensor([[-1.0, 0.0, 0.0]])
    assert leaf_of(logits, 2).item() == 1
    biased = leaf_of(logits, 2, decision_bias=torch.tensor([[2.0, 0.0, -0.5]]))
    assert biased.item() == 2
    path = path_to(biased, 2)
    along = logits.unsqueeze(1).gather(2, path.node.flatten(2)).view(path.node.shape)
    expected = torch.sigmoid(torch.tensor(-1.0)) * torch.sigmoid(torch.tensor(0.0))
    torch.testing.assert_close(path_log_probability(along, path.right).exp().squeeze(), expected)
    wide = beam_leaves(
        logits, Nodes(logits, None), 2, logits.unsqueeze(1), top_k=1, beam_width=2,
        decision_bias=torch.tensor([[2.0, 0.0, -0.5]]),
    )  # fmt: skip
    assert wide.item() == 2


def test_a_turned_decision_is_most_often_an_uncertain_one():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    rows = 20_000
    turned = turned_decision(logits.expand(rows, 1, 4))
    assert (turned.sum(-1) == 1).all()
    expected = torch.softmax(-logits.abs(), 0)
    # Five standard deviations of a share.
    bound = 5 * (expected * (1 - expected) / rows).sqrt()
    assert ((turned.double().mean((0, 1)) - expected).abs() < bound).all()


def test_region_leak_takes_the_other_child():
    logits = torch.full((4000, 1), 3.0)
    flip = torch.arange(4000).view(-1, 1, 1) % 2 == 0
    assert torch.equal(leaf_of(logits, 1, flip=flip) == 0, flip)
    mixed = leaf_probability(logits.unsqueeze(1), region_leak=0.25)[:, 0, 0] > 0.5
    assert abs(mixed.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    swapped = leaf_probability(logits.unsqueeze(1), region_leak=1.0)[0, 0]
    torch.testing.assert_close(swapped, leaf_probability(logits.unsqueeze(1))[0, 0].flip(0))


def test_nan_goes_left():
    logits = torch.full((2, 7), torch.nan)
    assert (leaf_of(logits, 3) == 0).all()
    beam = beam_leaves(logits, Nodes(logits, None), 3, logits.unsqueeze(1), top_k=2, beam_width=2)
    assert (beam[..., 0] == 0).all()


@pytest.mark.parametrize("probability", [leaf_probability, additive_leaf_probability])
def test_gradcheck_of_soft_probabilities(probability):
    logits = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: probability(z), logits)


@pytest.mark.parametrize("width", [1, 2])
def test_gradcheck_of_path_probability(width):
    nodes, x = make_nodes(2, 4, 3, width), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p.requires_grad_() for p in nodes[:4] if p is not None]
    path = path_to(greedy_leaf(x, nodes, 4, dense_logits(x, nodes, 2)), 4)

    def probability(x, *parameters):
        given = Nodes(*parameters)
        logit = path_logits(x, given, path.node, dense_logits(x, given, 2))
        return path_log_probability(logit, path.right)

    assert torch.autograd.gradcheck(probability, (x, *parameters))


def test_bad_beam_is_named():
    logits = torch.randn(2, 3)
    with pytest.raises(ValueError, match="top_k=5"):
        beam_leaves(logits, Nodes(logits, None), 2, logits.unsqueeze(1), top_k=5, beam_width=8)
    with pytest.raises(ValueError, match="beam_width=1 is smaller than top_k=2"):
        beam_leaves(logits, Nodes(logits, None), 2, logits.unsqueeze(1), top_k=2, beam_width=1)


def test_beam_compares_paths_at_its_temperature():
    nodes, x = make_nodes(1, 5, 6), torch.randn(200, 6, dtype=torch.float64)
    logits = 4 * dense_logits(x, nodes, 5)
    for temperature in (1.0, 10.0):
        beam = beam_leaves(logits[:, 0], nodes, 5, logits, top_k=2, beam_width=32, temperature=temperature)
        assert torch.equal(beam, leaf_probability(logits / temperature).topk(2, dim=-1).indices)
