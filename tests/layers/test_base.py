"""Experts that deviate from a base: what they compute, how they begin, and what merging keeps."""

from functools import partial

import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import fff

LAYERS = {
    "tree": partial(fff.FFF, 6, 4, 5, depth=3, mode="straight_through", balance_weight=0.1),
    "trees": partial(fff.FFF, 6, 4, 5, depth=2, num_trees=3, mode="straight_through"),
    "soft": partial(fff.FFF, 6, 4, 5, depth=3, mode="soft"),
    "glu": partial(fff.FFF, 6, 4, 5, depth=2, mode="gated", glu=True),
    "no bias": partial(fff.FFF, 6, 4, 5, depth=2, mode="gated", bias=False),
    "mixture": partial(fff.MoE, 6, 4, 5, num_experts=4, router="mixtral"),
}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


@pytest.fixture
def layer(make):
    torch.manual_seed(0)
    return make(base=True).double()


def stir(layer):
    with torch.no_grad():
        for deviation in layer.deviations():
            deviation.normal_(0, 0.3)


def plain(layer, make):
    """A layer without base whose experts are those of `layer`, the sum written out."""
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    groups = layer.base_w_in.shape[0]
    for key in [key for key in state if key.startswith("base_")]:
        base, own = state.pop(key), state[key.removeprefix("base_")]
        for expert in range(len(own)):
            own[expert] += base[expert // (len(own) // groups)]
    other = make().double()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_is_its_base_plus_its_deviation(layer, make, training):
    stir(layer)
    x = torch.randn(40, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.train(training)(x), plain(layer, make).train(training)(x))


def test_experts_begin_equal(layer):
    assert layer.deviations() and all(not deviation.any() for deviation in layer.deviations())
    assert all(base.any() for name, base in layer.named_parameters() if name.startswith("base_"))


def test_parallel_trees_have_a_base_each():
    layer = LAYERS["trees"](base=True)
    assert layer.base_w_in.shape == (3, 4, 6)
    assert not torch.equal(layer.base_w_in[0], layer.base_w_in[1])


def test_gradient_of_a_base_is_the_sum_over_its_experts(layer):
    stir(layer)
    layer(torch.randn(40, 6, dtype=torch.float64)).square().sum().backward()
    for name in ("w_in", "b_in", "w_out", "b_out"):
        own = getattr(layer, name)
        if own is not None:
            base = getattr(layer, f"base_{name}")
            torch.testing.assert_close(base.grad, own.grad.unflatten(0, (len(base), -1)).sum(1))


def test_merging_keeps_the_function_and_drops_the_base(layer):
    stir(layer)
    x = torch.randn(40, 6, dtype=torch.float64)
    before = layer.eval()(x)
    count = sum(p.numel() for p in layer.parameters())
    bases = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("base_"))
    layer.merge_base()
    assert torch.equal(layer(x), before)
    assert sum(p.numel() for p in layer.parameters()) == count - bases
    assert not layer.has_base and not layer.deviations() and not any("base" in key for key in layer.state_dict())


@pytest.mark.parametrize("pruned", [False, True])
def test_a_base_that_is_no_parameter_of_the_layer_itself_counts(layer, pruned):
    # Pruned, parametrised, and replicated ones (DataParallel) are not among its own parameters.
    stir(layer)
    x = torch.randn(9, 6, dtype=torch.float64)
    expected = layer(x)
    if pruned:
        prune.identity(layer, "base_w_in")
    else:
        register_parametrization(layer, "base_w_in", torch.nn.Identity())
    assert "base_w_in" not in layer._parameters
    torch.testing.assert_close(layer(x), expected)


def test_without_a_base_nothing_is_different():
    """Same initial weights from the same seed, and the same names."""
    torch.manual_seed(0)
    without = LAYERS["tree"]()
    torch.manual_seed(0)
    by_hand = torch.empty(8, 4, 6).uniform_(-(6**-0.5), 6**-0.5)
    assert torch.equal(without.w_in, by_hand) and not any("base" in key for key in without.state_dict())


def test_a_native_evaluation_sees_the_base():
    """In float32 the native operator may take the whole layer; it must be given the sums."""
    torch.manual_seed(0)
    layer = LAYERS["tree"](base=True).eval()
    stir(layer)
    x = torch.randn(40, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer.double(), LAYERS["tree"]).eval()(x.double()).float())
