"""The layer removed: zeros of the right shape and type, and nothing that learns."""

import pytest
import torch
from hydra import compose

import fff
from experiments.config import build


@pytest.fixture
def layer(hydra_configs):
    return build(compose("config", ["layer=none"]).layer)(6, out_features=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (0, 6), (2, 3, 6)])
def test_zeros_of_the_shape_and_type_of_a_layer(layer, shape, dtype):
    y = layer(torch.randn(shape).to(dtype))
    assert y.shape == (*shape[:-1], 5) and y.dtype == dtype and not y.any()
    assert fff.NoFeedForward(6)(torch.randn(2, 6)).shape == (2, 6)


def test_it_has_nothing_to_train_or_to_route(layer):
    layer(torch.randn(3, 6))
    assert not list(layer.parameters()) and not list(fff.routing(layer))


def test_bad_width_is_named():
    with pytest.raises(ValueError, match="in_features=0"):
        fff.NoFeedForward(0)
