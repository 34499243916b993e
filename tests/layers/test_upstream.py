"""Parity with the authors' PyPI package `fastfeedforward` 0.2.1, whose weights load into our layer."""

import pytest
import torch

from fff import FFF, UltraFFF

upstream = pytest.importorskip("fastfeedforward")


def twins(depth, leaf_width=3):
    theirs = upstream.FFF(20, leaf_width, 5, depth)
    ours = FFF(20, leaf_width, 5, depth=depth, hardening_weight=1.0)
    with torch.no_grad():
        ours.node_weight.copy_(theirs.node_weights)
        ours.node_bias.copy_(theirs.node_biases.squeeze(1))
        ours.w_in.copy_(theirs.w1s.transpose(1, 2))
        ours.b_in.copy_(theirs.b1s)
        ours.w_out.copy_(theirs.w2s)
        ours.b_out.copy_(theirs.b2s)
    return theirs, ours


@pytest.mark.parametrize("depth", [1, 2, 4, 6])
def test_training_forward_gradients_and_hardening_loss(depth):
    theirs, ours = twins(depth)
    x = torch.randn(33, 20)
    expected, entropies = theirs(x, return_entropies=True)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)
    # They return the mean over rows for each node; the mean over nodes of that is our reduction "mean".
    torch.testing.assert_close(ours.record.losses["hardening"], entropies.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.record.node_entropy, entropies, rtol=1e-5, atol=1e-6)
    (expected.square().sum() + entropies.mean()).backward()
    (ours(x).square().sum() + ours.record.aux_loss).backward()
    torch.testing.assert_close(ours.node_weight.grad, theirs.node_weights.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.w_in.grad.transpose(1, 2), theirs.w1s.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.b_out.grad, theirs.b2s.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 4, 6])
def test_evaluation_forward_up_to_the_output_bias_that_they_leave_out(depth):
    theirs, ours = twins(depth)
    theirs.eval(), ours.eval()
    x = torch.randn(65, 20)
    y = ours(x)
    leaf = ours.record.index.squeeze(1)
    torch.testing.assert_close(y, theirs(x) + theirs.b2s[leaf], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(y, theirs(x), atol=1e-3)


def test_ultra_fff_trains_through_activations_only():
    """As in the UltraFastBERT code: the choice of the path carries no gradient, so a row trains d + 1 neurons."""
    layer = UltraFFF(6, 6, depth=4)
    layer(torch.randn(1, 6)).sum().backward()
    assert (layer.w_in.grad.abs().sum(1) > 0).sum() == 5
    assert (layer.w_out.grad.abs().sum(1) > 0).sum() == 5
