"""The models of timm and transformers themselves, tiny and random; without these libraries the tests are skipped."""

import copy
import shutil
from functools import partial

import pytest
import torch
from torch import nn

import fff
from fff.adapt import (
    convert_feedforward,
    distillation,
    feedforward_blocks,
    from_dense,
    replace_feedforward,
    timm_mlp,
)

pytestmark = pytest.mark.adapt

tree = partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", balance_weight=0.1)
mixture = partial(fff.MoE, expert_width=4, num_experts=4, router="mixtral", balance_weight=0.1)


def timm_vit(name="vit_tiny_patch16_224", **options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **options}), torch.randn(2, 3, 32, 32)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
# Class, configuration, and what it is given.
MODELS = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "vit": ("ViTModel", "ViTConfig", {**SIZES, "image_size": 32, "patch_size": 16}),
    "phi-3": ("Phi3Model", "Phi3Config", SIZES),
    "gpt-neox": ("GPTNeoXModel", "GPTNeoXConfig", SIZES),
    "falcon": ("FalconModel", "FalconConfig", {**SIZES, "ffn_hidden_size": 48}),
    "gpt-j": ("GPTJModel", "GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "dropout": 0.0},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**SIZES, "cls_token_id": 3, "sep_token_id": 4}),
    "t5": ("T5EncoderModel", "T5Config", {**T5_SIZES, "dropout_rate": 0.0}),
    "t5, gated": ("T5EncoderModel", "T5Config", {**T5_SIZES, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}),
}


def transformers_model(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model_class, config, options = MODELS[kind]
    common = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = getattr(transformers, model_class)(getattr(transformers, config)(**common, **options))
    return model, torch.randn(2, 3, 32, 32) if kind == "vit" else torch.randint(0, 50, (2, 7))


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def replace_by_copies(model):
    """Each block becomes the dense layer that it is, in our layout."""
    blocks = iter(feedforward_blocks(model).values())

    def make(in_features, out_features):
        block = next(blocks)
        return from_dense(block.first, block.activation, block.last).layer

    return replace_feedforward(model, make)


def check_same_output(model, x, kind, names):
    model.eval()
    expected = first_tensor(model(x))
    report = replace_by_copies(model)
    assert [(row.kind, row.name) for row in report] == [(kind, name) for name in names]
    assert all(row.parameters_before == row.parameters_after for row in report)
    assert all(row.flops_before == row.flops_after > 0 for row in report)
    torch.testing.assert_close(first_tensor(model(x)), expected, rtol=1e-4, atol=1e-5)


def check_trains_and_loads(build, loads_into):
    """Gradients reach every new layer, and the weights go into another model that was changed alike."""
    model, x = build()
    rows = replace_feedforward(model, tree)
    assert all(row.flops_after < row.flops_before for row in rows)
    (first_tensor(model.train()(x)).square().mean() + fff.aux_loss(model)).backward()
    layers = [module for module in model.modules() if isinstance(module, fff.FFF)]
    assert len(layers) == len(rows) == 2
    for layer in layers:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (layer.w_in, layer.w_out, layer.node_weight))
    other, _ = build()
    replace_feedforward(other, tree)
    other.load_state_dict(loads_into(model.state_dict()))
    assert torch.equal(first_tensor(other.eval()(x)), first_tensor(model.eval()(x)))


def through_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "Mlp"),
        ({"mlp_layer": "GluMlp"}, "Mlp"),
        ({"mlp_layer": "SwiGLU", "act_layer": nn.SiLU}, "SwiGLU"),
    ],
    ids=["Mlp", "GluMlp", "SwiGLU"],
)
def test_timm_vit(options, kind):
    if "mlp_layer" in options:
        layers = pytest.importorskip("timm.layers", reason="timm is not installed")
        layer = getattr(layers, options["mlp_layer"])
        layer = partial(layer, gate_last=False) if options["mlp_layer"] == "GluMlp" else layer
        options = {**options, "mlp_layer": layer}
    model, x = timm_vit(**options)
    check_same_output(model, x, kind, ["blocks.0.mlp", "blocks.1.mlp"])


def test_timm_block_that_a_tree_cannot_copy_shows_no_activation():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    for options in ({"scale_mlp_norm": True}, {"mlp_layer": layers.GluMlp}):
        model, _ = timm_vit(**options)
        assert [block.activation for block in feedforward_blocks(model).values()] == [None, None]


def test_timm_trains_and_loads(tmp_path):
    check_trains_and_loads(timm_vit, partial(through_file, path=tmp_path / "model.pt"))


@pytest.mark.parametrize("make_ff", [tree, partial(fff.MoE, expert_width=4, num_experts=4, top_k=2, router="mixtral")])
def test_timm_forward_and_backward(make_ff):
    """What timm's own tests ask of every model: shape, no nan, a gradient for each parameter; here also finite ones."""
    model, x = timm_vit(mlp_layer=partial(timm_mlp, make_ff=make_ff))
    assert model.eval()(x).shape == (2, 5) and not model(x).isnan().any()
    model.train()(x).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_timm_keeps_dropout_of_the_output():
    model, _ = timm_vit(proj_drop_rate=0.25)
    replace_feedforward(model, tree)
    assert isinstance(model.blocks[0].mlp[0], fff.FFF) and model.blocks[0].mlp[1].p == 0.25


def test_timm_builds_with_mlp_layer():
    model, x = timm_vit(mlp_layer=partial(timm_mlp, make_ff=tree))
    assert [type(block.mlp) for block in model.blocks] == [fff.FFF] * 2
    model(x).square().sum().backward()
    assert model.blocks[1].mlp.w_in.grad.abs().sum() > 0


BLOCKS = {
    "bert": ("BERT", "encoder.layer.{}"),
    "gpt2": ("GPT-2", "transformer.h.{}.mlp"),
    "llama": ("Llama", "model.layers.{}.mlp"),
    "vit": ("Mlp", "layers.{}.mlp"),
    "phi-3": ("Llama, packed", "layers.{}.mlp"),
    "gpt-neox": ("GPT-NeoX", "layers.{}.mlp"),
    "falcon": ("GPT-NeoX", "h.{}.mlp"),
    "gpt-j": ("GPT-J", "h.{}.mlp"),
    "distilbert": ("DistilBERT", "transformer.layer.{}.ffn"),
    "modernbert": ("ModernBERT", "layers.{}.mlp"),
    "t5": ("T5", "encoder.block.{}.layer.1.DenseReluDense"),
    "t5, gated": ("T5, gated", "encoder.block.{}.layer.1.DenseReluDense"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformers(name):
    kind, place = BLOCKS[name]
    check_same_output(*transformers_model(name), kind, [place.format(0), place.format(1)])


@pytest.mark.parametrize("name", BLOCKS)
def test_transformers_train_and_load(name, tmp_path):
    check_trains_and_loads(partial(transformers_model, name), partial(through_file, path=tmp_path / "model.pt"))


@pytest.mark.parametrize(
    "build, make_ff, backend",
    [
        pytest.param(timm_vit, tree, "inductor", marks=pytest.mark.slow),
        (timm_vit, mixture, "aot_eager"),
        (partial(transformers_model, "gpt2"), tree, "aot_eager"),
    ],
    ids=["timm-FFF-inductor", "timm-MoE", "gpt2-FFF"],
)
def test_compiles_whole(build, make_ff, backend):
    """Without a graph break; evaluation and the gradients of one training step are those of the plain model."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler")
    model, x = build()
    replace_feedforward(model, make_ff)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(first_tensor(compiled(x)), first_tensor(model(x)), rtol=1e-5, atol=1e-6)

    def gradients(run):
        model.train().zero_grad()
        (first_tensor(run(x)).square().mean() + fff.aux_loss(model)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.testing.assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_with_cache(name):
    """The same tokens with and without the cache of keys and values, and as before where the layers are copies."""
    model, tokens = transformers_model(name)
    model.eval()
    with torch.no_grad():
        for block in feedforward_blocks(model).values():
            block.last.weight.normal_()  # else the tokens would be the same without the blocks
    ask = partial(model.generate, tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    expected = ask(use_cache=True)
    replace_by_copies(model)
    assert torch.equal(ask(use_cache=True), expected)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, fff.FFF):
                module.w_out.zero_()
    assert not torch.equal(ask(use_cache=True), expected)
    model, tokens = transformers_model(name)
    replace_feedforward(model.eval(), tree)
    ask = partial(model.generate, tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    assert torch.equal(ask(use_cache=True), ask(use_cache=False))
    layer = next(module for module in model.modules() if isinstance(module, fff.FFF))
    ask(use_cache=True)
    assert layer.record.index.shape[0] == 2  # one new token of each sequence


def test_gpt2_keeps_its_approximate_gelu():
    """By name, so that kernels know it and a configuration can tell it."""
    model, tokens = transformers_model("gpt2")
    expected = model.eval()(tokens).logits
    replace_by_copies(model)
    assert [config["arguments"]["act_layer"] for config in model.config.fff.values()] == ["gelu_tanh"] * 2
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_bert_converts_layer_by_layer():
    """Inputs of every block are caught by hooks, then each becomes a tree with leaves of all units: exact."""
    model, tokens = transformers_model("bert")
    model.eval()
    blocks = feedforward_blocks(model)
    assert all(block.activation is nn.functional.gelu for block in blocks.values())  # which native kernels know
    seen = {}
    hooks = [
        block.first[0].register_forward_hook(lambda _, x, __, name=name: seen.update({name: x[0]}))
        for name, block in blocks.items()
    ]
    expected = first_tensor(model(tokens))
    for hook in hooks:
        hook.remove()
    made = iter(
        from_dense(block.first, block.activation, block.last, depth=2, leaf_width=48, calibration=seen[name]).layer
        for name, block in blocks.items()
    )
    replace_feedforward(model, lambda in_features, out_features: next(made))
    torch.testing.assert_close(first_tensor(model(tokens)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm", *BLOCKS])
def test_conversion_and_distillation(name):
    """Leaves with all units answer as the blocks, whichever leaf it is, so that there is no distance."""
    teacher, x = timm_vit() if name == "timm" else transformers_model(name)
    model, (first, *_) = copy.deepcopy(teacher), feedforward_blocks(teacher).values()
    found = convert_feedforward(model, lambda: model(x), depth=1, leaf_width=first.last.weight.numel() // 32)
    assert len(found) == 2
    with distillation(model.train(), teacher) as distance:
        model(x)
        assert distance().item() < 1e-6


def test_t5_in_half_precision():
    """The library keeps its last maps in float32, and what reaches a block is in float16."""
    model, tokens = transformers_model("t5")
    model = model.half().eval()
    for block in feedforward_blocks(model).values():
        block.last.float()
    expected = first_tensor(model(tokens)).float()
    conversions = convert_feedforward(model, lambda: model(tokens), depth=1, leaf_width=48)
    assert len(conversions) == 2 and all(found.layer.w_in.dtype == torch.float16 for found in conversions.values())
    torch.testing.assert_close(first_tensor(model(tokens)).float(), expected, rtol=1e-2, atol=1e-2)
