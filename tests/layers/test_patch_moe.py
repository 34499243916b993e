"""The mixture of Chen et al. 2022 against convolutions written out row by row."""

import pytest
import torch
from torch.nn import functional as F

import fff


def network(layer, expert, x):
    """(P * D / P,) -> (O,): PyTorch's convolution, cubed, summed over patches and groups of channels."""
    weight, bias = layer.w_in[expert][:, None], layer.b_in[expert]
    z = F.conv1d(x[None, None], weight, bias, stride=weight.shape[2])[0]
    z = z**3 if layer.act_layer == "cube" else z
    return z.sum(1).unflatten(0, (layer.out_features, layer.channels)).sum(1)


@pytest.fixture(params=["cube", "identity"])
def layer(request):
    layer = fff.PatchMoE(
        12, 2, num_experts=3, channels=5, num_patches=4, init_scale=1.0, act_layer=request.param
    ).double()
    torch.nn.init.normal_(layer.gate_weight)
    return layer


def test_the_chosen_expert_times_its_score(layer):
    x = torch.randn(7, 12, dtype=torch.float64)
    y = layer.eval()(x)
    for row, out in zip(x, y, strict=True):
        score = layer.gate_weight @ row.view(4, 3).sum(0)
        torch.testing.assert_close(out, score.max() * network(layer, score.argmax(), row))
    scores = x.view(7, 4, 3).sum(1) @ layer.gate_weight.T
    assert torch.equal(layer.record.index[:, 0], scores.argmax(1))


def test_noise_decides_in_training_and_counts_in_the_gate(layer):
    x = torch.randn(500, 12, dtype=torch.float64)
    torch.nn.init.zeros_(layer.gate_weight)
    layer.eval()(x)
    assert layer.record.load.tolist() == [500, 0, 0]
    torch.manual_seed(4)
    y = layer.train()(x)
    torch.manual_seed(4)
    noise = torch.rand(500, 3, dtype=torch.float64)
    assert torch.equal(layer.record.index[:, 0], noise.argmax(1)) and layer.record.load.min() > 100
    torch.testing.assert_close(y[0], noise[0].max() * network(layer, noise[0].argmax(), x[0]))


def test_order_of_the_patches_does_not_matter(layer):
    x = torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x.view(9, 4, 3).flip(1).flatten(1)), layer(x))


def test_the_router_learns_from_the_task(layer):
    layer.train()(torch.randn(20, 12, dtype=torch.float64))[:, 0].sum().backward()
    assert layer.gate_weight.grad.abs().sum() > 0
    assert layer.router_parameters() == [layer.gate_weight]


def test_one_expert_is_a_network_without_router(layer):
    single = fff.PatchMoE(12, 2, num_experts=1, channels=5, num_patches=4, act_layer=layer.act_layer).double()
    assert single.gate_weight is None and single.router_parameters() == []
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(single(x)[1], network(single, 0, x[1]))
    assert single.size == (10, 10, 10, 10, 2 * 10 * 12)


def test_initial_weights_are_scaled():
    bound = 1e-3 / 3**0.5
    layer = fff.PatchMoE(12, 2, num_patches=4)
    assert bound / 2 < layer.w_in.abs().max() <= bound and 0 < layer.b_in.abs().max() <= bound
    assert not layer.gate_weight.any()


@pytest.mark.parametrize(
    ("options", "named"), [({"num_patches": 5}, "in_features=12.*num_patches=5"), ({"act_layer": "relu"}, "'relu'")]
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        fff.PatchMoE(12, 2, **options)
