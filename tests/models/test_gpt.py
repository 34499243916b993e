"""The language model knows its layers by the contract alone, and no token sees a later one."""

from functools import partial

import pytest
import torch

import fff
from fff.layers.contract import routing
from fff.models import GPT

DENSE = partial(fff.FeedForward, hidden_features=6)
TREE = partial(fff.FFF, leaf_width=2, depth=2)
MIXTURE = partial(fff.MoE, expert_width=2, num_experts=4, top_k=1)


def gpt(make_ff=DENSE, in_shape=(9,), **options):
    return GPT(make_ff, in_shape, 11, **{"dim": 16, "depth": 3, "heads": 2, **options})


def tokens(rows=5, length=9):
    return torch.randint(11, (rows, length))


@pytest.mark.parametrize("rows, length", [(0, 9), (1, 1), (7, 9), (2, 4)])
def test_logits_of_the_next_token_at_each_place(rows, length):
    assert gpt()(tokens(rows, length)).shape == (rows, length, 11)


def test_make_ff_is_called_by_the_convention():
    calls = []

    def make_ff(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.nn.Identity()

    gpt(make_ff)
    assert calls == 3 * [((16,), {"out_features": 16})]


@pytest.mark.parametrize("make_ff", [DENSE, TREE, MIXTURE, fff.NoFeedForward])
def test_a_later_token_changes_no_earlier_logit(make_ff):
    model, x = gpt(make_ff).eval(), tokens()
    y = model(x)
    x[:, 5] = (x[:, 5] + 1) % 11
    changed = model(x)
    torch.testing.assert_close(changed[:, :5], y[:, :5], rtol=0, atol=1e-6)
    assert not any(torch.allclose(changed[:, i], y[:, i], atol=1e-5) for i in range(5, 9))


def test_a_layer_that_would_show_later_tokens_is_refused():
    """An expert that takes its best rows of all prefers a later token to an earlier one."""
    with pytest.raises(ValueError, match="router='expert_choice'.* depends on other rows"):
        gpt(partial(fff.MoE, expert_width=2, num_experts=4, router="expert_choice"))


def test_places_matter():
    model = gpt().eval()
    y = model(torch.full((1, 9), 3))
    # The same token everywhere: attention alone would answer the same everywhere.
    assert not torch.allclose(y[:, 1:], y[:, :-1], atol=1e-5)


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_the_gradient_reaches_every_parameter(mode):
    model = gpt(partial(TREE, mode=mode, balance_weight=0.1))
    (model(tokens(9)).square().mean() + fff.aux_loss(model)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_output_layer_is_the_embedding():
    model, x = gpt(), tokens()
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = model(x)
    torch.testing.assert_close(y, seen[0] @ model.embed.weight.T)
    assert sum(p.numel() for p in model.parameters() if 11 in p.shape) == 11 * 16


def test_the_auxiliary_loss_counts_each_block_once():
    model = gpt(partial(TREE, hardening_weight=1.0))
    model(tokens(4))
    records = [record for _, record in routing(model)]
    assert [name for name, _ in routing(model)] == [f"blocks.{i}.ff" for i in range(3)]
    assert all(record.aux_loss > 0 and len(record.index) == 4 * 9 for record in records)
    torch.testing.assert_close(fff.aux_loss(model), sum(record.aux_loss for record in records))


@pytest.mark.parametrize("part", ["attention", "ff", "embed"])
def test_dropout_reaches_every_part_in_training_alone(part):
    model, x = gpt(dropout=0.5, depth=1), tokens()
    # One source at a time: everything else is made deterministic.
    model.dropout.p, model.blocks[0].dropout.p, model.blocks[0].attention.dropout = 0.0, 0.0, 0.0
    owner, name = {
        "attention": (model.blocks[0].attention, "dropout"),
        "ff": (model.blocks[0].dropout, "p"),
        "embed": (model.dropout, "p"),
    }[part]
    assert torch.equal(model(x), model(x))
    setattr(owner, name, 0.5)
    assert not torch.allclose(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("make_ff", [DENSE, partial(TREE, mode="straight_through")])
def test_it_compiles_as_one_graph(make_ff):
    model, x = gpt(make_ff, depth=1).eval(), tokens()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    "options, named", [({"in_shape": (3, 10, 12)}, r"in_shape=\(3, 10, 12\)"), ({"heads": 3}, "heads=3")]
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        gpt(**options)


def test_a_row_that_is_too_long_is_named():
    with pytest.raises(ValueError, match=r"rows of 10, .*in_shape=\(9,\)"):
        gpt()(tokens(length=10))
