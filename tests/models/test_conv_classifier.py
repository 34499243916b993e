"""The convolutional trunk: shapes, and the convention by which the head is asked for."""

from functools import partial

import pytest
import torch

import fff
from fff.models import ConvClassifier


@pytest.mark.parametrize("in_shape, features", [((3, 32, 32), 1024), ((1, 28, 28), 1024), ((1, 9, 16), 2 * 2 * 64)])
def test_the_head_gets_the_flattened_maps(in_shape, features):
    calls = []

    def make_ff(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.nn.Identity()

    model = ConvClassifier(make_ff, in_shape, num_classes=3)
    assert calls == [((features,), {"out_features": 3})]
    assert model(torch.randn(2, *in_shape)).shape == (2, features)


def test_the_trunk_is_the_plain_one():
    """Against the same weights in a loop over blocks, in the other memory format."""
    model = ConvClassifier(partial(fff.FeedForward, hidden_features=5), (3, 8, 8), num_classes=2, channels=(4, 6))
    x = torch.randn(7, 3, 8, 8)
    maps = x
    for name in ("0", "2"):
        block = model.trunk.get_submodule(name)
        maps = torch.nn.functional.conv2d(maps, block.weight.contiguous(), block.bias, stride=2, padding=1).relu()
    torch.testing.assert_close(model(x), model.ff(maps.reshape(7, 24)))
    assert model(x[:0]).shape == (0, 2)


@pytest.mark.parametrize("in_shape", [(64,), (3, 4, 32)])
def test_what_is_no_picture_is_refused(in_shape):
    with pytest.raises(ValueError, match=r"in_shape=\(.*\) must be \(C, H, W\) with H and W at least 8"):
        ConvClassifier(partial(fff.FeedForward, hidden_features=5), in_shape, num_classes=2)
