"""Normalised gradient descent: lengths of the steps by hand."""

import pytest
import torch
from torch import nn

import fff
from fff.tasks import NormalizedGD


def test_each_expert_moves_by_the_same_length_and_the_router_by_its_gradient():
    module = nn.Module()
    for name, shape in {"gate_weight": (3, 2), "w_in": (3, 2, 2), "b_in": (3, 2)}.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    module.gate_weight.grad = torch.full((3, 2), 5.0)
    # Expert 0: norms 2 and 3; expert 1: the same direction, a thousandth as long; expert 2 has no row.
    module.w_in.grad = torch.tensor([1.0, 1e-3, 0.0]).view(3, 1, 1).expand(3, 2, 2).clone()
    module.b_in.grad = torch.tensor([[3.0, 0.0], [3e-3, 0.0], [0.0, 0.0]])
    NormalizedGD(module.named_parameters(), lr=0.5, router_lr=0.1).step()
    torch.testing.assert_close(module.gate_weight.data, torch.full((3, 2), -0.5))
    torch.testing.assert_close(module.w_in.data[:, 0, 0], torch.tensor([-0.1, -0.1, 0.0]))
    torch.testing.assert_close(module.b_in.data[:, 0], torch.tensor([-0.3, -0.3, 0.0]))


def test_a_single_network_has_no_router():
    layer = fff.PatchMoE(4, 2, num_experts=1)
    optimizer = NormalizedGD(layer.named_parameters(), lr=0.5, router_lr=0.1)
    before = layer.w_in.detach().clone(), layer.b_in.detach().clone()
    layer(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    moved = sum((new - old).norm() for new, old in zip((layer.w_in, layer.b_in), before, strict=True))
    assert moved.item() == pytest.approx(0.5, rel=1e-4)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="makes its groups itself"):
        NormalizedGD([{"params": list(fff.PatchMoE(4).named_parameters())}], lr=0.1, router_lr=0.1)


def test_bad_rates_are_named():
    with pytest.raises(ValueError, match="router_lr=0"):
        NormalizedGD(fff.PatchMoE(4).named_parameters(), lr=0.1, router_lr=0)
