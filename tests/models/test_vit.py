"""The vision transformer knows its layers by the contract alone, and treats every image by itself."""

from functools import partial

import pytest
import torch

import fff
from fff.layers.contract import routing
from fff.models import VisionTransformer

DENSE = partial(fff.FeedForward, hidden_features=6)
TREE = partial(fff.FFF, leaf_width=2, depth=2)


def vit(make_ff=DENSE, in_shape=(3, 8, 12), **options):
    return VisionTransformer(make_ff, in_shape, 5, **{"dim": 16, "depth": 3, "heads": 2, **options})


@pytest.mark.parametrize("in_shape, patch_size, tokens", [((3, 8, 12), 4, 6), ((1, 6, 6), 2, 9), ((3, 32, 32), 4, 64)])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_logits_of_images(in_shape, patch_size, tokens, rows):
    model = vit(in_shape=in_shape, patch_size=patch_size)
    assert model(torch.randn(rows, *in_shape)).shape == (rows, 5)
    assert model.position.shape == (tokens, 16)


def test_make_ff_is_called_by_the_convention():
    calls = []

    def make_ff(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.nn.Identity()

    vit(make_ff)
    assert calls == 3 * [((16,), {"out_features": 16})]


@pytest.mark.parametrize("make_ff", [DENSE, TREE, partial(fff.MoE, expert_width=2, num_experts=4)])
def test_each_image_is_treated_by_itself(make_ff):
    model, x = vit(make_ff).eval(), torch.randn(5, 3, 8, 12)
    y = model(x)
    x[2] = torch.randn(3, 8, 12)
    changed = model(x)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(changed[others], y[others])
    assert not torch.allclose(changed[2], y[2])
    torch.testing.assert_close(model(x[2:3]), changed[2:3])


def test_the_place_of_a_patch_matters_and_every_patch_counts():
    model, x = vit().eval(), torch.randn(1, 3, 8, 12)
    assert not torch.allclose(model(x), model(x.flip(-1)), atol=1e-4)
    for top, left in [(0, 0), (0, 8), (4, 4)]:
        other = x.clone()
        other[..., top : top + 4, left : left + 4] += 1
        assert not torch.allclose(model(x), model(other), atol=1e-4)


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_the_gradient_reaches_every_parameter(mode):
    model = vit(partial(TREE, mode=mode, balance_weight=0.1))
    (model(torch.randn(9, 3, 8, 12)).square().mean() + fff.aux_loss(model)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_auxiliary_loss_counts_each_block_once():
    model = vit(partial(TREE, hardening_weight=1.0))
    model(torch.randn(4, 3, 8, 12))
    records = [record for _, record in routing(model)]
    assert [name for name, _ in routing(model)] == [f"blocks.{i}.ff" for i in range(3)]
    assert all(record.aux_loss > 0 and len(record.index) == 4 * 6 for record in records)
    torch.testing.assert_close(fff.aux_loss(model), sum(record.aux_loss for record in records))


def test_without_feedforward_layers_attention_alone_is_left():
    model, x = vit(fff.NoFeedForward).eval(), torch.randn(4, 3, 8, 12)
    tokens = model.embed(x).flatten(2).transpose(1, 2) + model.position
    for block in model.blocks:
        tokens = tokens + block.attention(block.attention_norm(tokens))
    torch.testing.assert_close(model(x), model.head(model.norm(tokens).mean(1)))


def test_attention_is_that_of_torch():
    attention = vit().blocks[0].attention
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = attention.qkv.weight, attention.qkv.bias
    theirs.out_proj = attention.out
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(attention(x), theirs(x, x, x, need_weights=False)[0])


def test_dropout_is_on_the_inputs_and_in_training_alone():
    model, x = vit(input_dropout=0.5), torch.randn(4, 3, 8, 12)
    assert not torch.allclose(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("make_ff", [DENSE, partial(TREE, mode="straight_through")])
def test_it_compiles_as_one_graph(make_ff):
    model, x = vit(make_ff, depth=2).eval(), torch.randn(4, 3, 8, 12)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"in_shape": (3, 10, 12)}, r"in_shape=\(3, 10, 12\)"),
        ({"in_shape": (64,)}, "in_shape="),
        ({"heads": 3}, "heads=3"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        vit(**options)
