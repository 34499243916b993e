"""What has no upstream form is refused; equality itself is tested with the layer and in every benchmark."""

import pytest
import torch

from fff import FFF
from fff.bench.upstream import in_our_layout, missing_bias, upstream_copy

pytest.importorskip("fastfeedforward")


@pytest.mark.parametrize(
    "keywords", [{"num_trees": 2}, {"bias": False}, {"glu": True}, {"master_width": 4}, {"base": True}]
)
def test_layers_beyond_upstream_are_refused(keywords):
    with pytest.raises(ValueError, match="no upstream form"):
        upstream_copy(FFF(6, 3, depth=2, **keywords))


def test_copy_holds_every_parameter():
    layer = FFF(6, 3, 4, depth=2)
    copied = in_our_layout(upstream_copy(layer))
    assert set(copied) == {name for name, _ in layer.named_parameters()}
    assert all(torch.equal(copied[name], value) for name, value in layer.named_parameters())


def test_missing_bias_is_that_of_the_leaf_reached():
    layer = FFF(2, 3, 4, depth=2)
    with torch.no_grad():
        layer.node_weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        layer.node_bias.zero_()
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    assert torch.equal(missing_bias(upstream_copy(layer), x), layer.b_out)
