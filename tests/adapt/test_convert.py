"""A dense layer as a tree: exact where it must be, and what the leaves and nodes hold where it is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fff
from fff.adapt import from_dense, relative_error

D, H, O = 6, 16, 5


def dense(bias=True, gated=False):
    first = [nn.Linear(D, H, bias=bias) for _ in range(2 if gated else 1)]
    return first, nn.Linear(H, O, bias=bias)


def output(first, activation, last, x):
    hidden = activation(first[0](x))
    return last(hidden * first[1](x) if len(first) == 2 else hidden)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", nn.GELU, F.silu])
def test_depth_0_is_the_dense_layer(activation, bias, gated):
    first, last = dense(bias, gated)
    x = torch.randn(3, 7, D)
    layer, error = from_dense(first, activation, last)
    function = {"relu": F.relu, nn.GELU: F.gelu}.get(activation, activation)
    torch.testing.assert_close(layer(x), output(first, function, last, x))
    assert isinstance(layer, fff.FFF) and error is None and (layer.b_in is None) != bias
    assert sum(p.numel() for p in layer.parameters()) == sum(
        p.numel() for part in (*first, last) for p in part.parameters()
    )
    assert from_dense(first, activation, last, calibration=x).error < 1e-6


def test_gate_packed_into_one_map():
    first, last = dense(gated=True)
    packed = nn.Linear(D, 2 * H)
    with torch.no_grad():
        packed.weight.copy_(torch.cat([part.weight for part in first]))
        packed.bias.copy_(torch.cat([part.bias for part in first]))
    x = torch.randn(7, D)
    torch.testing.assert_close(from_dense(packed, "silu", last).layer(x), output(first, F.silu, last, x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_leaves_with_all_units_are_exact(depth, gated):
    """Also off the calibration rows, and whichever leaf they reach."""
    first, last = dense(gated=gated)
    layer, error = from_dense(first, "gelu", last, depth=depth, leaf_width=H, calibration=torch.randn(100, D))
    x = 3 * torch.randn(50, D)
    torch.testing.assert_close(layer.eval()(x), output(first, F.gelu, last, x), rtol=1e-5, atol=1e-5)
    assert error < 1e-5


@pytest.mark.parametrize("method", ["inputs", "units"])
def test_logits_of_a_node_have_unit_variance_on_its_rows(method):
    first, last = dense()
    x = 5 * torch.randn(64, D) + 3
    layer = from_dense(first, "relu", last, depth=2, method=method, calibration=x).layer
    logit = x @ layer.node_weight.T + layer.node_bias
    right = logit[:, 0] >= 0
    for node, rows in enumerate((slice(None), ~right, right)):
        assert logit[rows, node].std(correction=0).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_inputs_fill_the_leaves_evenly(depth):
    first, last = dense()
    x = torch.randn(64, D)
    layer = from_dense(first, "relu", last, depth=depth, calibration=x).layer.eval()
    layer(x)
    assert layer.record.load.tolist() == [64 // 2**depth] * 2**depth
    assert layer.leaf_width == H // 2**depth


def test_nodes_cut_between_clusters():
    """Four clusters on a line: the root cuts between the middle two, its children between the others."""
    first, last = dense()
    step = torch.eye(D)[0]
    centre = torch.tensor([-10.0, -9.0, 9.0, 10.0])
    x = (centre[:, None, None] * step + 0.1 * torch.randn(4, 8, D)).flatten(0, 1)
    layer = from_dense(first, "relu", last, depth=2, calibration=x).layer.eval()
    layer(x)
    by_cluster = layer.record.index.view(4, 8)
    assert (by_cluster == by_cluster[:, :1]).all() and by_cluster[:, 0].unique().numel() == 4


def test_leaf_keeps_the_units_that_vary_and_means_of_the_others():
    """One unit per side of the first input varies there; the rest is constant on that side."""
    first, last = nn.Linear(2, 2, bias=False), nn.Linear(2, O)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    x = torch.tensor([[-4.0, 0.0], [-3.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    layer, error = from_dense([first], "relu", last, depth=1, calibration=x)
    assert layer.leaf_width == 1 and error < 1e-6  # on each side one relu is at work and the other 0


@pytest.mark.parametrize("method", ["inputs", "units"])
def test_error_is_that_of_the_layer_and_falls_with_structure(method):
    """Units in two groups, each fed by inputs of its own; a row has inputs of one group, so half of the units do."""
    first, last = nn.Linear(D, H, bias=False), nn.Linear(H, O)
    with torch.no_grad():
        first.weight[: H // 2, D // 2 :] = 0
        first.weight[H // 2 :, : D // 2] = 0
        first.weight.abs_()  # the directions of a group then are near each other
    x = 0.3 * torch.randn(400, D) + 2.0
    x[:200, : D // 2] = 0
    x[200:, D // 2 :] = 0
    layer, error = from_dense(first, "relu", last, depth=1, method=method, calibration=x)
    y = output([first], F.relu, last, x)
    expected = (layer.eval()(x) - y).norm() / (y - y.mean(0)).norm()
    assert error == pytest.approx(expected.item(), rel=1e-5)
    assert error == pytest.approx(relative_error(layer, first, "relu", last, x), rel=1e-6)
    assert error < 0.02
    assert from_dense(nn.Linear(D, H), "relu", last, depth=1, method=method, calibration=x).error > 0.02


def test_units_are_shared_out():
    first, last = dense()
    layer = from_dense(first, "relu", last, depth=2, method="units", calibration=torch.randn(200, D)).layer
    rows = {tuple(row) for row in first[0].weight.tolist()}
    assert {tuple(row) for row in layer.w_in.flatten(0, 1).tolist()} == rows and layer.w_in.shape[:2] == (4, H // 4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", ["inputs", "units"])
def test_errors_of_a_leaf_add_up_to_nothing(method, gated):
    """The constant of a leaf stands for the mean of what it left out."""
    first, last = dense(gated=gated)
    x = torch.randn(200, D)
    layer = from_dense(first, "gelu", last, depth=2, method=method, calibration=x).layer.eval()
    difference = layer(x) - output(first, F.gelu, last, x)
    assert difference.abs().mean() > 0.01
    for leaf in range(4):
        of_leaf = difference[layer.record.index[:, 0] == leaf]
        torch.testing.assert_close(of_leaf.sum(0), torch.zeros(O), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["inputs", "units"])
def test_training_begins_at_what_evaluation_computes(method):
    first, last = dense()
    x = torch.randn(100, D)
    layer = from_dense(first, "gelu", last, depth=2, method=method, calibration=x, balance_weight=0.1).layer
    y = layer.train()(x)
    torch.testing.assert_close(y, layer.eval()(x))
    y.square().sum().backward()
    assert layer.node_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["inputs", "units"])
def test_equal_rows_give_finite_parameters(method):
    """Two-means finds no second cluster; the leaf that no row reaches is made from those of its parent."""
    first, last = dense()
    layer, error = from_dense(first, "relu", last, depth=2, method=method, calibration=torch.ones(8, D))
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_low_precision_and_mode_follow_the_dense_layer():
    first, last = dense()
    layer, error = from_dense(
        first[0].to(torch.bfloat16),
        "relu",
        last.to(torch.bfloat16).eval(),
        depth=1,
        leaf_width=H,
        calibration=torch.randn(50, D, dtype=torch.bfloat16),
    )
    assert layer.w_in.dtype == torch.bfloat16 and not layer.training and error < 0.02


def test_errors_name_the_argument():
    first, last = dense()
    x = torch.randn(7, D)
    for match, arguments in {
        "calibration=None": {"depth": 1},
        "calibration=\\(7, 6\\)": {"depth": 3, "calibration": x},
        "depth=-1": {"depth": -1},
        "method='halves'": {"method": "halves"},
        "leaf_width=17": {"depth": 1, "leaf_width": 17, "calibration": x},
        "leaf_width=4": {"leaf_width": 4},
        "leaf_width=3": {"depth": 1, "method": "units", "leaf_width": 3, "calibration": x},
        "num_trees": {"num_trees": 2},
        "activation=None": {"activation": None},
    }.items():
        with pytest.raises(ValueError, match=match):
            from_dense(first, arguments.pop("activation", "relu"), last, **arguments)
    with pytest.raises(ValueError, match="equal leaves"):
        from_dense(nn.Linear(D, 15), "relu", nn.Linear(15, O), depth=1, method="units", calibration=x)
    with pytest.raises(ValueError, match="linear1 gives 9"):
        from_dense(nn.Linear(D, 9), "relu", last)
    with pytest.raises(ValueError, match="no linear map"):
        from_dense(nn.ReLU(), "relu", last)
    with pytest.raises(ValueError, match="shape \\(7, 5\\)"):
        from_dense(first, "relu", last, calibration=x[:, :5])
