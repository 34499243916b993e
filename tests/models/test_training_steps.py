"""A step of a whole model is the same in micro-batches and under recomputed activations, auxiliary losses included."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fff
from fff.adapt import replace_feedforward
from fff.layers.contract import RoutedLayer
from fff.models import GPT

TREE = partial(fff.FFF, leaf_width=3, depth=3, mode="straight_through", hardening_weight=1.0)


def gpt(make_ff):
    model = GPT(make_ff, (9,), 11, dim=16, depth=2, heads=2)
    return model, list(model.blocks), torch.randint(11, (8, 9))


def encoder(make_ff):
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    replace_feedforward(model, make_ff)
    return model, list(model.layers), torch.randn(8, 9, 16)


def step(model, parts):
    """Loss and gradients of the mean over parts of the rows."""
    torch.manual_seed(1)
    model.zero_grad()
    total = 0.0
    for x in parts:
        y = model(x)
        task = (
            y.square().mean() if x.is_floating_point() else F.cross_entropy(y[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        )
        auxiliary = fff.aux_loss(model)
        assert auxiliary > 0.1
        loss = (task + auxiliary) / len(parts)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def check_equal(one, other):
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(other_gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("build", [gpt, encoder])
def test_micro_batches(build):
    """With a loss that is a mean over rows; balance is that of the rows of a micro-batch (test_distributed.py)."""
    model, _, x = build(TREE)
    check_equal(step(copy.deepcopy(model), [x]), step(model, x.chunk(4)))


@pytest.mark.parametrize("build", [gpt, encoder])
def test_activation_checkpointing(build):
    """Recomputed with the same noise, and the router's gradient by the auxiliary loss of the first pass."""
    model, blocks, x = build(partial(TREE, balance_weight=0.5, runner_up=True, drop=0.3))
    plain = step(copy.deepcopy(model), [x])
    calls = []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for layer in (module for module in model.modules() if isinstance(module, RoutedLayer)):
        layer.register_forward_pre_hook(lambda *_: calls.append(None))
    check_equal(plain, step(model, [x]))
    assert len(calls) == 2 * len(blocks), "each layer runs again"
