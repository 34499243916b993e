"""A layer told as JSON, and made again from that."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fff
from fff.layers.config import from_config, to_config

LAYERS = [
    lambda: fff.FFF(6, 4, 5, depth=2),
    lambda: fff.FFF(6, 4, depth=3, mode="gated", num_trees=2, master_width=3, node_width=2, bias_update_rate=0.1),
    lambda: fff.FFF(6, 4, depth=2, base=True, act_layer=nn.GELU, glu=True, bias=False),
    lambda: fff.FFF(6, 4, depth=0),
    lambda: fff.MoE(6, 4, num_experts=4, router="sigmoid", shared_width=3, base=True, act_layer=F.silu),
    lambda: fff.MoE(6, 4, num_experts=4, top_k=None, router="soft"),
    lambda: fff.UltraFFF(6, depth=3, num_trees=2),
    lambda: fff.FeedForward(6, 8, act_layer="relu2", glu=True),
    lambda: fff.PatchMoE(6, num_experts=2, num_patches=3),
]


@pytest.mark.parametrize("build", LAYERS)
def test_layer_from_its_config_computes_the_same(build):
    layer = build().eval()
    again = from_config(json.loads(json.dumps(to_config(layer)))).eval()
    assert type(again) is type(layer) and to_config(again) == to_config(layer)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(9, 6)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


def test_what_was_set_since_is_told():
    layer = fff.FFF(6, 4, depth=3, mode="gated", temperature=0.75)
    layer.temperature = 0.1
    assert to_config(copy.deepcopy(layer))["arguments"]["temperature"] == 0.1
    pruned = fff.prune(fff.FFF(6, 4, depth=3), torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]))
    assert to_config(pruned)["arguments"]["depth"] == 1


@pytest.mark.parametrize("act", ["relu", nn.ReLU])
def test_activation_is_that_of_now(act):
    layer = fff.FFF(6, 4, depth=1, act_layer=act)
    layer.act = nn.GELU()
    assert to_config(layer)["arguments"]["act_layer"] == "gelu"


def test_merged_base_is_gone():
    layer = fff.FFF(6, 4, depth=2, base=True)
    layer.merge_base()
    from_config(to_config(layer)).load_state_dict(layer.state_dict())


class Narrow(fff.FFF):
    """A user's layer, which says nothing about its arguments."""

    def __init__(self, in_features, **options):
        super().__init__(in_features, 2, depth=2, **options)


def test_subclass_needs_no_code():
    config = to_config(Narrow(6, mode="gated"))
    assert config == {"class": "Narrow", "arguments": {"in_features": 6, "mode": "gated"}}
    assert from_config(config).mode == "gated"


def test_option_of_a_base_that_was_set_since():
    layer = Narrow(6, mode="gated").eval()
    layer.temperature = 0.1
    again = from_config(to_config(layer)).eval()
    again.load_state_dict(layer.state_dict())
    x = torch.randn(9, 6)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


class Sizes(fff.FFF):
    def __init__(self, *sizes, depth):
        super().__init__(*sizes, depth=depth)


class Fixed(fff.FFF):
    def __init__(self, in_features, /):
        super().__init__(in_features, 2, depth=2)


def test_class_that_is_made_on_the_fly_is_its_base():
    """As `fully_shard` and parametrisations of torch do."""
    layer = fff.FFF(6, 4, depth=1)
    layer.__class__ = type("FSDPFFF", (type("FSDPModule", (), {}), fff.FFF), {})
    assert to_config(layer)["class"] == "FFF"


def test_layers_that_no_config_tells():
    class FFF(fff.FFF):
        pass

    changed = fff.FFF(6, 4, depth=1)
    changed.w_out = nn.Parameter(torch.zeros(2, 4, 9))
    cases = [
        (fff.FeedForward(6, 4, act_layer=lambda x: x), "act_layer=<function"),
        (fff.FeedForward(6, 4, act_layer=nn.PReLU()), "act_layer=PReLU"),
        (fff.MoE(6, 4, num_experts=2, capacity_factor=float("inf")), "capacity_factor=inf"),
        (nn.Linear(6, 4), "Linear is no layer"),
        (nn.utils.parametrizations.weight_norm(fff.FeedForward(6, 4), "w_in"), "FeedForward: these arguments"),
        (changed, "FFF: these arguments"),
        (FFF(6, 4, depth=1), "another layer"),
        (Sizes(6, 4, depth=1), "Sizes: .*sizes"),
        (Fixed(6), "Fixed: .*in_features"),
    ]
    for layer, named in cases:
        with pytest.raises(ValueError, match=named) as error:
            to_config(layer)
        assert "\n" not in str(error.value)
    to_config(fff.FFF(6, 4, depth=1))  # which a class of its name did not hide


def test_unknown_classes_are_not_looked_for():
    for name in ("os.system", "RoutedLayer", "Linear"):
        with pytest.raises(ValueError, match=rf"class='{name}' is none of .*'FFF'"):
            from_config({"class": name, "arguments": {}})


def test_arguments_that_a_class_does_not_take():
    with pytest.raises(ValueError, match="FFF: .*unexpected keyword argument 'dept'"):
        from_config({"class": "FFF", "arguments": {"in_features": 6, "leaf_width": 4, "dept": 1}})


def test_telling_a_layer_draws_no_random_numbers():
    layer = fff.MoE(6, 4, num_experts=2)
    before = torch.get_rng_state()
    to_config(layer)
    assert torch.equal(torch.get_rng_state(), before)
