"""Blocks of models that are built as their libraries build them; the libraries' own ones are in test_libraries.py."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fff
from fff.adapt import Block, feedforward_blocks, from_dense, known_block, replace_feedforward, timm_mlp

D, H = 8, 20


class NanoMlp(nn.Module):
    """nanoGPT's, whose activation may be a function inside forward."""

    def __init__(self, p=0.0):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj, self.dropout = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D), nn.Dropout(p)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Conv1D(nn.Module):
    """The linear map of transformers' GPT-2, whose weight is transposed."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


class LlamaMlp(nn.Module):
    def __init__(self, names=("gate_proj", "up_proj", "down_proj")):
        super().__init__()
        self.names, self.act_fn = names, nn.SiLU()
        for name, widths in zip(names, ((D, H), (D, H), (H, D)), strict=True):
            setattr(self, name, nn.Linear(*widths, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Residual(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


def copies(model, match=None):
    """A make_ff that gives, block after block, a dense layer of ours with the weights that the block has."""
    blocks = iter(feedforward_blocks(model, match).values())

    def make(in_features, out_features):
        block = next(blocks)
        return fff.adapt.from_dense(block.first, block.activation, block.last).layer

    return make


def check_same_output(model, x, kinds):
    model.eval()
    expected = model(x)
    report = replace_feedforward(model, copies(model))
    assert [row.kind for row in report] == kinds
    torch.testing.assert_close(model(x), expected)
    model.train()
    model(x).square().sum().backward()
    layers = [module for module in model.modules() if isinstance(module, fff.FFF)]
    assert len(layers) == len(kinds)
    assert all(layer.w_in.grad.abs().sum() > 0 and layer.w_out.grad.abs().sum() > 0 for layer in layers)
    return report


def test_transposed_weights():
    mlp = NanoMlp()
    mlp.c_fc, mlp.c_proj = Conv1D(D, H), Conv1D(H, D)
    (row,) = check_same_output(nn.Sequential(Residual(mlp)), torch.randn(2, 5, D), ["GPT-2"])
    assert row.flops_before == 2 * 2 * D * H


def test_nanogpt():
    report = check_same_output(
        nn.Sequential(Residual(NanoMlp()), Residual(NanoMlp())), torch.randn(2, 5, D), ["GPT-2"] * 2
    )
    assert [row.name for row in report] == ["0.mlp", "1.mlp"]


def test_llama():
    report = check_same_output(Residual(LlamaMlp()), torch.randn(3, D), ["Llama"])
    assert report[0].parameters_before == report[0].parameters_after == 3 * D * H
    assert report[0].flops_before == report[0].flops_after == 6 * D * H
    check_same_output(Residual(LlamaMlp(("w1", "w3", "w2"))), torch.randn(3, D), ["Llama, w1 w2 w3"])


def test_report_counts_what_went_and_what_came():
    model = Residual(NanoMlp())
    (row,) = replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=2))
    tree = 3 * D + 3 + 4 * (2 * 3 * D + 3 + D)  # three nodes, four leaves, with their biases
    assert row == ("mlp", "GPT-2", 2 * D * H + H + D, tree, 4 * D * H, 2 * 2 * D + 4 * 3 * D, "gelu", "relu")


@pytest.mark.parametrize(
    ("mlp", "make_ff", "before", "after"),
    [
        (LlamaMlp, partial(fff.FFF, leaf_width=3, depth=1, act_layer="silu", glu=True), "gated silu", "gated silu"),
        (LlamaMlp, partial(fff.MoE, expert_width=3, num_experts=2, act_layer=nn.GELU), "gated silu", "gelu"),
        (NanoMlp, lambda width, out_features: nn.Linear(width, out_features), "gelu", None),
        (NanoMlp, partial(fff.FFF, leaf_width=3, depth=1, act_layer=torch.sin), "gelu", "sin"),
    ],
)
def test_the_report_tells_what_becomes_of_activation_and_gate(mlp, make_ff, before, after):
    (row,) = replace_feedforward(Residual(mlp()), make_ff)
    assert (row.activation_before, row.activation_after) == (before, after)


def test_other_modules_count_their_linear_maps():
    (row,) = replace_feedforward(
        Residual(NanoMlp()), lambda width, out_features: nn.Sequential(nn.Linear(width, 3), nn.Linear(3, out_features))
    )
    assert (row.parameters_after, row.flops_after) == (2 * 3 * D + 3 + D, 4 * 3 * D)


def test_dropout_of_the_output_stays():
    model = Residual(NanoMlp(p=0.5)).train()
    replace_feedforward(model, partial(fff.FeedForward, hidden_features=4))
    x = torch.ones(200, D)
    assert 0.4 < (model(x) == x).float().mean() < 0.6  # dropped outputs leave the residual alone


def test_a_model_is_changed_whole_or_not_at_all():
    model = nn.Sequential(Residual(NanoMlp()), nn.TransformerEncoderLayer(D + 1, 3, H))
    with pytest.raises(ValueError, match="in_features=9"):
        replace_feedforward(model, partial(fff.PatchMoE, num_experts=2, channels=2, num_patches=4))
    assert isinstance(model[0].mlp, NanoMlp) and isinstance(model[1].linear1, nn.Linear)


def test_layer_has_the_type_and_mode_of_the_block():
    model = Residual(NanoMlp(p=0.5)).to(torch.bfloat16).eval()
    replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))
    assert model.mlp[0].w_in.dtype == torch.bfloat16 and not any(part.training for part in model.modules())


def test_shared_block_becomes_one_layer():
    shared = NanoMlp()
    model = nn.Sequential(Residual(shared), nn.Sequential(shared, shared))
    assert len(replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))) == 1
    assert isinstance(model[0].mlp, fff.FFF) and model[0].mlp is model[1][0] is model[1][1]


def test_blocks_of_the_same_weights_become_one_layer():
    model = tied()
    report = replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))
    assert [row.name for row in report] == ["0.mlp", "1.mlp", "2.mlp", "3.mlp"]
    assert model[0].mlp is model[1].mlp and len({model[i].mlp for i in range(4)}) == 3


def tied():
    """The second block is the first; the third has one of its maps, the fourth its weights, and a bias of its own."""
    model = nn.Sequential(*(Residual(NanoMlp()) for _ in range(4)))
    model[1].mlp.c_fc, model[1].mlp.c_proj = model[0].mlp.c_fc, model[0].mlp.c_proj
    model[2].mlp.c_fc = model[0].mlp.c_fc
    model[3].mlp.c_fc.weight, model[3].mlp.c_proj.weight = model[0].mlp.c_fc.weight, model[0].mlp.c_proj.weight
    return model


def test_blocks_of_the_same_weights_are_converted_as_one():
    model, x = tied(), torch.randn(50, D)
    expected = model(x)
    seen, pair = [], copy.deepcopy(model[:2])
    for i in range(2):
        pair[i].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block = known_block(pair[0].mlp)
    torch.manual_seed(0)
    of_both = fff.adapt.convert_feedforward(pair, lambda: pair(x), depth=2)["1.mlp"]
    torch.manual_seed(0)
    alone = from_dense(block.first, block.activation, block.last, depth=2, calibration=torch.cat(seen))
    assert len(seen) == 2 and of_both.error == pytest.approx(alone.error)
    found = fff.adapt.convert_feedforward(model, lambda: model(x), depth=0)
    assert [model[i].mlp is found[f"{i}.mlp"].layer for i in range(4)] == [True] * 4
    assert model[0].mlp is model[1].mlp
    torch.testing.assert_close(model(x), expected)


def test_type_is_that_of_what_reaches_the_block():
    model = Residual(NanoMlp()).half()
    model.mlp.c_proj.float()

    def forward(x):
        return model.mlp.c_proj(F.gelu(model.mlp.c_fc(x)).float())

    model.mlp.forward = forward
    (row,) = replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))
    assert model.mlp.w_in.dtype == torch.float16 and row.kind == "GPT-2"


def test_a_quantised_block_has_the_type_of_the_model():
    def match(name, module):
        return Block("int8", (module.c_fc,), module.c_proj) if isinstance(module, NanoMlp) else None

    model = nn.Sequential(nn.Linear(D, D, dtype=torch.bfloat16), Residual(NanoMlp()))
    for part in (model[1].mlp.c_fc, model[1].mlp.c_proj):
        part.weight = nn.Parameter(part.weight.detach().to(torch.int8), requires_grad=False)
    replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1), match)
    assert model(torch.randn(3, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make_ff", "named"),
    [
        (lambda width, out_features: None, "make_ff gave None for mlp, which is no module"),
        (
            lambda width, out_features: fff.FFF(width, 3, width + 1, depth=1),
            "make_ff gave a layer 8 -> 9 for mlp: 8 -> 8",
        ),
        (lambda width, out_features: nn.Linear(4, width), "make_ff gave a layer 4 -> 8 for mlp: 8 -> 8"),
    ],
)
def test_make_ff_that_gives_something_else(make_ff, named):
    with pytest.raises(ValueError, match=named):
        replace_feedforward(Residual(NanoMlp()), make_ff)


def test_state_dict_goes_into_another_replaced_model():
    def build():
        model = Residual(NanoMlp())
        replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=2))
        return model.eval()

    one, other, x = build(), build(), torch.randn(4, D)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(x), one(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu])
def test_torch_encoder(norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        D, 2, H, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    check_same_output(model, torch.randn(2, 5, D), ["TransformerEncoderLayer"] * 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_evaluation_of_torch_runs_the_new_layer():
    """Without gradients and with padding, torch would take the kernel that reads the two old weight matrices."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, D), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        replace_feedforward(model, copies(model))
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected[~padding])
        assert model.layers[1].linear1.record.index.shape[0] == 10
        model.layers[0].linear1.b_out.add_(1.0)
        model.layers[0].linear1.b_out[0, 0] += 9.0
        assert not torch.allclose(model(x, src_key_padding_mask=padding)[~padding], expected[~padding], atol=0.1)


def test_torch_decoder():
    model = nn.TransformerDecoderLayer(D, 2, H, dropout=0.0, batch_first=True).eval()
    x, memory = torch.randn(2, 5, D), torch.randn(2, 3, D)
    expected = model(x, memory)
    replace_feedforward(model, copies(model))
    torch.testing.assert_close(model(x, memory), expected)


def test_a_forward_that_does_more_is_left_alone():
    class Opt(nn.Module):
        """The maps lie beside the attention, and one forward does all."""

        def __init__(self):
            super().__init__()
            self.attention, self.fc1, self.fc2 = nn.Linear(D, D), nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x):
            return self.fc2(self.fc1(self.attention(x)))

    class Maxout(nn.Module):
        """Three pieces for each hidden unit."""

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(D, 3 * H), nn.Linear(H, D)

        def forward(self, x):
            return self.fc2(self.fc1(x).unflatten(-1, (3, H)).amax(-2))

    class Bloom(NanoMlp):
        def forward(self, x, residual):
            return super().forward(x) + residual

    class Gated(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x * super()._ff_block(x)

    for module in (Opt(), Maxout(), Bloom(), Gated(D, 2, H)):
        assert known_block(module) is None


def test_unknown_model_lists_what_looks_like_a_block():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.query, self.key = (nn.Linear(*w) for w in ((D, H), (H, D), (D, D), (D, D)))

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    model = nn.Sequential(nn.Linear(D, D), Residual(Strange()))
    with pytest.raises(ValueError, match=r"1\.mlp \(Strange: up, down, 8 -> 20 -> 8\)\. ") as error:
        replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))
    assert "query" not in str(error.value)

    def match(name, module):
        return Block("strange", (module.up,), module.down, torch.tanh) if isinstance(module, Strange) else None

    x = torch.randn(3, D)
    expected = model(x)
    (row,) = replace_feedforward(model, copies(model, match), match)
    assert row.name == "1.mlp" and row.kind == "strange"
    torch.testing.assert_close(model(x), expected)


def test_a_packed_gate_is_a_candidate_and_keys_with_values_are_none():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(D, 2 * H), "down": nn.Linear(H, D)})})
    model["attention"] = nn.ModuleDict({"kv": nn.Linear(D, 2 * D), "o": nn.Linear(D, D)})
    with pytest.raises(ValueError, match=r"mlp \(ModuleDict: up, down, 8 -> 40 -> 8\)\. ") as error:
        replace_feedforward(model, partial(fff.FFF, leaf_width=3, depth=1))
    assert "attention" not in str(error.value)


def test_match_may_take_some_blocks_by_name():
    model = nn.ModuleDict({"first": Residual(NanoMlp()), "second": Residual(NanoMlp())})
    report = replace_feedforward(
        model,
        partial(fff.FFF, leaf_width=3, depth=1),
        lambda name, module: known_block(module) if name.startswith("second") else None,
    )
    assert [row.name for row in report] == ["second.mlp"]
    assert isinstance(model["first"].mlp, NanoMlp)


def test_a_block_alone_has_no_place():
    with pytest.raises(ValueError, match="NanoMlp is itself"):
        replace_feedforward(NanoMlp(), partial(fff.FFF, leaf_width=3, depth=1))


def test_timm_mlp_takes_what_timm_passes():
    make = partial(timm_mlp, make_ff=partial(fff.FFF, leaf_width=3, depth=1))
    layer = make(
        in_features=D, hidden_features=H, act_layer=nn.GELU, norm_layer=None, bias=True, drop=0.0, dtype=torch.float64
    )
    assert isinstance(layer, fff.FFF) and layer.out_features == D and layer.w_in.dtype == torch.float64
    assert make(D, out_features=5, drop=(0.0, 0.25))[1].p == 0.25
    with pytest.raises(ValueError, match="use_conv"):
        make(D, use_conv=True)
