"""Upstream weights in our layers and back: the same function, up to what the docstrings say."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fff import FFF, MoE, UltraFFF
from fff.adapt import from_fastfeedforward, from_ultrafastbert, to_fastfeedforward, to_ultrafastbert


@pytest.fixture
def upstream():
    return pytest.importorskip("fastfeedforward")


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_fastfeedforward_there_and_back(upstream, depth):
    theirs = upstream.FFF(6, 3, 5, depth, usage_mode="soft")
    layer = from_fastfeedforward(theirs.state_dict())
    x = torch.randn(33, 6)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-6)
    back = upstream.FFF(6, 3, 5, depth)
    back.load_state_dict(to_fastfeedforward(layer))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in back.state_dict().items())


def test_fastfeedforward_evaluates_without_the_output_bias(upstream):
    theirs = upstream.FFF(6, 3, 5, 3).eval()
    layer = from_fastfeedforward(theirs.state_dict()).eval()
    x = torch.randn(33, 6)
    expected = theirs(x)
    assert not torch.allclose(layer(x), expected, atol=1e-3)
    layer.b_out.data.zero_()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_fastfeedforward_in_a_whole_model_with_its_activation(upstream):
    model = nn.Sequential(nn.Linear(6, 6), upstream.FFF(6, 3, 5, 2, activation=nn.GELU())).to(torch.float64)
    layer = from_fastfeedforward(model.state_dict(), prefix="1.", act_layer="gelu", mode="straight_through")
    assert layer.w_in.dtype == torch.float64 and layer.mode == "straight_through"
    x = torch.randn(33, 6)
    model.float(), layer.float().eval()
    model[1].train_hardened = True
    torch.testing.assert_close(layer(x), model[1](x, use_hard_decisions=True), rtol=1e-5, atol=1e-6)


def test_copies_share_no_memory():
    layer = FFF(6, 3, 5, depth=2)
    state = to_fastfeedforward(layer)
    other = from_fastfeedforward(state)
    state["w2s"].zero_()
    assert torch.equal(layer.w_out, other.w_out) and layer.w_out.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [{"num_trees": 2}, {"bias": False}, {"glu": True}, {"master_width": 4}, {"base": True}, {"node_width": 2},
     {"mode": "gated"}, {"mode": "gated", "bias_update_rate": 0.1}, {"soft_gate": "additive"},
     {"mode": "straight_through", "beam_width": 4}],
)  # fmt: skip
def test_layers_beyond_upstream_are_refused(options):
    with pytest.raises(ValueError, match="upstream"):
        to_fastfeedforward(FFF(6, 3, depth=2, **options))


def test_a_layer_that_is_no_tree_is_refused():
    with pytest.raises(ValueError, match="layer is a MoE"):
        to_fastfeedforward(MoE(6, 3, num_experts=4))


class Ultra(nn.Module):
    """UltraFastBERT's formula, one row and one tree at a time."""

    def __init__(self, width, depth, num_trees):
        super().__init__()
        self.depth, self.num_trees, neurons = depth, num_trees, num_trees * (2 ** (depth + 1) - 1)
        self.linear_in, self.linear_out = nn.Linear(width, neurons), nn.Linear(neurons, width, bias=False)

    def forward(self, x):
        logits = self.linear_in(x)
        on_path = torch.zeros_like(logits)
        for row in range(len(x)):
            for tree in range(self.num_trees):
                node, root = 0, tree * (2 ** (self.depth + 1) - 1)
                for _ in range(self.depth):
                    on_path[row, root + node] = 1
                    node = 2 * node + 1 + int(logits[row, root + node] > 0)
                on_path[row, root + node] = 1
        return self.linear_out(F.gelu(logits) * on_path)


@pytest.mark.parametrize(("depth", "num_trees"), [(0, 3), (2, 1), (3, 2)])
def test_ultrafastbert_there_and_back(depth, num_trees):
    theirs = nn.ModuleDict({"ffn": Ultra(6, depth, num_trees)})
    layer = from_ultrafastbert(theirs.state_dict(), depth=depth, prefix="ffn.")
    assert layer.num_trees == num_trees
    x = torch.randn(17, 6)
    torch.testing.assert_close(layer(x), theirs["ffn"](x), rtol=1e-5, atol=1e-6)
    back = Ultra(6, depth, num_trees)
    back.load_state_dict(to_ultrafastbert(layer))
    assert all(torch.equal(value, theirs["ffn"].state_dict()[name]) for name, value in back.state_dict().items())


def test_ultrafastbert_without_biases_gets_zeros():
    layer = UltraFFF(6, depth=2, bias=False)
    x = torch.randn(17, 6)
    torch.testing.assert_close(from_ultrafastbert(to_ultrafastbert(layer), depth=2)(x), layer(x))


def test_errors_name_what_does_not_fit():
    state = to_fastfeedforward(FFF(6, 3, depth=2))
    with pytest.raises(ValueError, match="depth=3 does not fit 4 leaves"):
        from_fastfeedforward({**state, "depth": torch.tensor(3)})
    with pytest.raises(ValueError, match=r"lacks \['w2s'\] and has unknown names \['head'\]"):
        from_fastfeedforward({**{k: v for k, v in state.items() if k != "w2s"}, "head": torch.ones(1)})
    with pytest.raises(ValueError, match="prefix='ffn.' lacks"):
        from_fastfeedforward(state, prefix="ffn.")
    with pytest.raises(ValueError, match="no upstream form"):
        from_fastfeedforward(state, num_trees=2)
    with pytest.raises(ValueError, match="depth=1: 7 neurons are no trees of 3"):
        from_ultrafastbert(to_ultrafastbert(UltraFFF(6, depth=2)), depth=1)
