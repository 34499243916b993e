"""Routes by hand, and pruned trees that answer as before."""

import pytest
import torch

import fff
from fff import FFF
from fff.adapt import inspect, prune


def plane(depth=2, **options):
    """The root asks for the sign of the first input, its children for that of the second; deeper nodes likewise."""
    layer = FFF(2, 3, 4, depth=depth, mode="straight_through", **options)
    with torch.no_grad():
        layer.node_bias.zero_()
        for node in range(len(layer.node_weight)):
            level = (node % (2**depth - 1) + 1).bit_length() - 1
            layer.node_weight[node] = torch.eye(2)[level % 2] * (1 + node % (2**depth - 1))
    return layer


CORNERS = torch.tensor([[-1.0, -2.0], [-1.0, 2.0], [1.0, -2.0], [1.0, 2.0]])


def test_path_by_hand():
    layer = plane().train()
    layer(torch.zeros(9, 2))
    record = layer.record
    found = inspect(layer, CORNERS[[0, 1, 2, 3, 3]], torch.tensor([0, 1, 0, 2, 1]))
    assert found.leaf.flatten().tolist() == [0, 1, 2, 3, 3]
    assert found.node[:, 0, 0].tolist() == [[0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]
    assert found.margin[:, 0, 0].tolist() == [[-1, -4], [-1, 4], [1, -6], [1, 6], [1, 6]]
    assert found.count.tolist() == [1, 1, 1, 2]
    assert found.histogram.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert layer.training and layer.record is record
    assert inspect(layer, CORNERS).histogram is None


@pytest.mark.parametrize(
    "options",
    [{}, {"num_trees": 2}, {"num_trees": 2, "top_k": 2}, {"node_width": 3}, {"bias_update_rate": 0.1, "num_trees": 2}],
    ids=str,
)
def test_margins_are_the_decisions(options):
    layer = FFF(6, 3, depth=3, mode="straight_through", **options)
    if layer.decision_bias is not None:
        layer.decision_bias.normal_()
    found = inspect(layer, torch.randn(5, 4, 6), torch.arange(20).view(5, 4) % 3)
    shape = (20, layer.num_trees, layer.top_k, 3)
    assert found.node.shape == found.margin.shape == shape
    below = torch.cat([found.node[..., 1:], found.leaf.view(shape[:3]).unsqueeze(-1) % 8 + 7], dim=-1)
    went_right = below == 2 * found.node + 2
    if layer.top_k == 1:
        assert torch.equal(went_right, found.margin >= 0)
    assert torch.equal(found.histogram.sum(1), found.count) and found.count.sum() == found.leaf.numel()


def test_no_rows_and_no_nodes():
    found = inspect(FFF(6, 3, depth=2), torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    assert found.count.tolist() == [0] * 4 and found.histogram.shape == (4, 0)
    assert inspect(FFF(6, 3, depth=0), torch.randn(5, 6)).margin.shape == (5, 1, 1, 0)


@pytest.mark.parametrize(
    ("corners", "depth"), [([0], 0), ([0, 1], 1), ([0, 3], 1), ([0, 1, 2], 2), ([1, 2, 3], 2), ([0, 1, 2, 3], 2)]
)
def test_pruned_depth_by_hand(corners, depth):
    layer, x = plane().eval(), CORNERS[corners]
    small = prune(layer, inspect(layer, x).count)
    assert small.depth == depth and small.w_in.shape[0] == 2**depth and small.node_weight.shape[0] == 2**depth - 1
    assert torch.equal(small(x), layer(x))
    assert small.size.flops_per_row == layer.size.flops_per_row - 4 * (2 - depth)
    assert layer.depth == 2 and layer.w_in.shape[0] == 4


def test_fillers_send_all_rows_right_between_two_copies():
    small = prune(plane(), torch.tensor([3, 2, 5, 0]))
    assert small.depth == 2 and torch.equal(small.w_in[2], small.w_in[3])
    assert small.node_weight[2].tolist() == [0, 0] and small.node_bias[2] == 0
    assert inspect(small, CORNERS).leaf.flatten().tolist() == [0, 1, 3, 3]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_trees": 2}, {"node_width": 3}, {"base": True, "num_trees": 2}, {"master_width": 2}, {"bias": False},
     {"glu": True}, {"mode": "soft"}, {"bias_update_rate": 0.1}],
    ids=str,
)  # fmt: skip
def test_rows_of_live_leaves_get_the_same_output(options):
    """Few rows far from each other, so that many leaves of a deep tree are dead."""
    layer = FFF(6, 3, 5, **{"depth": 6, "mode": "straight_through", **options}).eval()
    if layer.has_base:
        for deviation in layer.deviations():
            torch.nn.init.normal_(deviation)
    if layer.decision_bias is not None:
        layer.decision_bias.normal_(std=0.1)
    x = torch.randn(5, 6)
    small = prune(layer, inspect(layer, x).count)
    assert small.depth < layer.depth
    torch.testing.assert_close(small(x), layer(x))
    other = FFF(6, 3, 5, **{"depth": small.depth, "mode": "straight_through", **options}).eval()
    other.load_state_dict(small.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    small.train()(torch.randn(50, 6)).sum().backward()
    assert small.w_in.grad.shape == small.w_in.shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("glu", [False, True])
def test_leaves_that_answer_alike_become_one(glu, bias):
    layer = FFF(6, 3, 5, depth=3, mode="straight_through", act_layer="gelu", glu=glu, bias=bias).eval()
    with torch.no_grad():
        for weights in (layer.w_in, layer.b_in, layer.w_out, layer.b_out):
            if weights is not None:
                weights[1] = weights[2] = weights[3] = weights[0]
                weights[7] = weights[6]
        layer.w_in[4] = 0  # constants: one by its weights in, one by those out
        layer.w_out[5] = 0
        if bias:
            layer.b_in[4] = 0
            layer.b_out[4] = layer.b_out[5].normal_()
    x = torch.randn(300, 6)
    everywhere = torch.ones(8)
    small = prune(layer, everywhere)
    assert small.depth == 2 and small.w_in.equal(layer.w_in[[0, 0, 4, 6]])
    torch.testing.assert_close(small(x), layer(x))
    with torch.no_grad():  # no more
        if bias:
            layer.b_in[4] = 1  # as constant, and another one
        else:
            layer.w_out[5, 0, 0] = 1
        layer.w_in[1, 0, 0] += 1
    other = prune(layer, everywhere)
    assert other.depth == 3
    torch.testing.assert_close(other(x), layer(x))


def test_a_tree_that_no_row_reached_keeps_a_leaf():
    assert prune(plane(), torch.zeros(4)).depth == 0
    assert prune(FFF(6, 3, depth=0), torch.zeros(1)).num_leaves == 1


def test_a_layer_that_fails_stays_as_it_was():
    layer = FFF(6, 3, depth=2).train()
    layer(torch.randn(3, 6))
    before = layer.record
    with pytest.raises((RuntimeError, TypeError)):
        inspect(layer, torch.randn(3, 6, dtype=torch.float64))
    assert layer.training and layer.record is before


def test_what_cannot_be_pruned_or_inspected_is_refused():
    with pytest.raises(ValueError, match="gated"):
        prune(FFF(6, 3, depth=2, mode="gated"), torch.ones(4))
    with pytest.raises(ValueError, match="beam_width=2"):
        prune(FFF(6, 3, depth=2, mode="straight_through", top_k=2), torch.ones(4))
    with pytest.raises(ValueError, match="count has shape"):
        prune(FFF(6, 3, depth=2), torch.ones(8))
    with pytest.raises(ValueError, match="labels has 2 entries for 3 rows"):
        inspect(FFF(6, 3, depth=2), torch.randn(3, 6), torch.zeros(2))
    for labels in ([0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match="must be integers >= 0"):
            inspect(FFF(6, 3, depth=2), torch.randn(3, 6), labels)
    with pytest.raises(ValueError, match="MoE"):
        prune(fff.MoE(6, 3, num_experts=2), torch.ones(2))
    with pytest.raises(ValueError, match="MoE"):
        inspect(fff.MoE(6, 3, num_experts=2), torch.randn(3, 6))
