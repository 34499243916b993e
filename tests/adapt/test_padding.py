"""Padding out of routed layers: real tokens get what they get without it, and nothing else is counted."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fff
from fff.adapt import replace_feedforward, skip_padding

LAYERS = {
    "tree": partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", balance_weight=0.1),
    "soft tree": partial(fff.FFF, leaf_width=4, depth=2, mode="soft", hardening_weight=0.1),
    "mixture": partial(fff.MoE, expert_width=4, num_experts=4, top_k=2, router="mixtral", balance_weight=0.1),
}
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])


class Model(nn.Module):
    """A residual layer on tokens, and one on what is pooled."""

    def __init__(self, make_ff):
        super().__init__()
        self.tokens, self.pooled = make_ff(8), make_ff(8)

    def forward(self, x):
        x = x + self.tokens(x)
        return x, self.pooled(x.mean(1))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_real_tokens_alone_are_seen(layer, training, shared):
    model, x = Model(LAYERS[layer]).train(training), torch.randn(3, 5, 8, requires_grad=True)
    if shared:
        model.pooled = model.tokens
    real = MASK.bool()
    with skip_padding(model, MASK):
        y, pooled = model(x)
    found, loss = model.tokens.record, fff.aux_loss(model)
    (gradient,) = torch.autograd.grad(y.square().sum() + pooled.square().sum() + loss, x)

    whole = x.masked_scatter(real.unsqueeze(-1), x[real] + model.tokens(x[real]))
    other = whole.square().sum() + model.pooled(whole.mean(1)).square().sum()
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(fff.aux_loss(model), loss)
    torch.testing.assert_close(torch.autograd.grad(other + fff.aux_loss(model), x)[0], gradient)
    assert len(found.index) == (3 if shared else 10) and torch.equal(found.load, model.tokens.record.load)
    model.pooled = nn.Identity()
    model(x)
    assert len(model.tokens.record.index) == 15  # the context has ended


def test_other_shapes_are_refused():
    model = Model(LAYERS["tree"])
    with skip_padding(model, MASK), pytest.raises(ValueError, match=r"mask has shape \(3, 5\), .* \(3, 4, 8\)"):
        model(torch.randn(3, 4, 8))
    assert not model.tokens._forward_pre_hooks and not model.tokens._forward_hooks


def test_a_call_that_fails_leaves_nothing():
    model, other = Model(LAYERS["tree"]), torch.randn(3, 8)
    with skip_padding(model, MASK):
        with pytest.raises((RuntimeError, TypeError)):
            model(torch.randn(3, 5, 8, dtype=torch.float64))
        assert torch.equal(model.tokens(x=other), model.tokens(other))


def test_a_model_compiled_before():
    model, x = nn.Sequential(LAYERS["tree"](8)).eval(), torch.randn(3, 5, 8)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with skip_padding(model, MASK):
        y = compiled(x)
    assert len(model[0].record.index) == 10 and not y[~MASK.bool()].any()
    assert compiled(x)[~MASK.bool()].any()


def test_an_encoder_decoder_has_two_masks():
    parts = nn.ModuleDict({"encoder": LAYERS["tree"](8), "decoder": LAYERS["tree"](8)})
    model, config = nn.ModuleDict({"model": parts}), SimpleNamespace(is_encoder_decoder=True)
    model.config = parts["encoder"].config = config
    with skip_padding(parts["encoder"], MASK):
        pass
    with pytest.raises(ValueError, match="its encoder and its decoder one by one"), skip_padding(model, MASK):
        pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_model_answers_as_without_padding():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    replace_feedforward(model, LAYERS["tree"])
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with skip_padding(model, mask):
        y = model(x, src_key_padding_mask=~mask)
        assert [record.load.sum().item() for _, record in fff.routing(model)] == [8, 8]
    torch.testing.assert_close(y[1, :3], model(x[1:, :3])[0])
