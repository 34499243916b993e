"""Replaced models of transformers through that library's own saving, loading, training and generation.

Its common tests (ModelTesterMixin) are no part of its wheel: these are the checks of that kind that replaced blocks
could fail.
"""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import fff
from fff.adapt import Block, known_block, replace_feedforward, routed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
pytestmark = pytest.mark.adapt

COMMON = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
}
LAYERS = {
    "tree": partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", balance_weight=0.1, runner_up=True),
    "weighted tree": partial(fff.FFF, leaf_width=4, depth=2, mode="gated", bias_update_rate=0.1, temperature=0.5),
    "depth 0": partial(fff.FFF, leaf_width=4, depth=0, master_width=3),
    "mixture": partial(fff.MoE, expert_width=4, num_experts=4, router="sigmoid", base=True, act_layer="gelu"),
    "a buffer that is not saved": partial(fff.PatchMoE, num_experts=2, num_patches=2, init_scale=1.0),
}
TOKENS = torch.arange(14).view(2, 7) * 3 % 50


def model_class(name):
    return getattr(transformers, MODELS[name][0])


def build(name, make_ff=LAYERS["tree"], kind=None, **options):
    _, config, sizes = MODELS[name]
    config = getattr(transformers, config)(**COMMON, **sizes, **options)
    model = (kind or model_class(name))(config)
    if make_ff is not None:
        replace_feedforward(model, make_ff)
    return model.eval()


def routed_layers(model):
    return [module for module in model.modules() if isinstance(module, fff.RoutedLayer)]


def load(kind, folder, **options):
    """A loaded model of which the library says that nothing was missing, left over or of another shape."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def check_same_state(model, other):
    for (name, tensor), (other_name, loaded) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name and torch.equal(tensor, loaded) and tensor.requires_grad == loaded.requires_grad, name
    for (name, tensor), (_, loaded) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(tensor, loaded), name


@pytest.mark.parametrize("name", MODELS)
def test_saved_by_the_library_and_loaded(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = load(routed(model_class(name)), tmp_path)
    assert isinstance(loaded, model_class(name)) and len(routed_layers(loaded)) == 2 and not loaded.training
    check_same_state(model, loaded)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.loss_type == model.loss_type and loaded.can_generate() == model.can_generate()
    loaded.save_pretrained(tmp_path / "again")
    check_same_state(model, load(routed(model_class(name)), tmp_path / "again"))
    # The trunk alone, and a trunk that was changed before it got its head, know their blocks too.
    trunk = routed(type(model.base_model)).from_pretrained(tmp_path)
    assert torch.equal(trunk(TOKENS)[0], model.base_model(TOKENS)[0])
    other = build(name, None)
    replace_feedforward(other.base_model, LAYERS["tree"])
    assert other.config.fff == model.config.fff


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer(layer, tmp_path):
    model = build("gpt2", LAYERS[layer])
    with torch.no_grad():
        for module in routed_layers(model):
            for tensor in (*module.parameters(), *([] if "not saved" in layer else module.buffers())):
                tensor.add_(torch.rand_like(tensor))
    model.save_pretrained(tmp_path)
    loaded = load(routed(transformers.GPT2LMHeadModel), tmp_path)
    check_same_state(model, loaded)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_type_that_is_asked_for(tmp_path):
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    loaded = load(routed(transformers.GPT2LMHeadModel), tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    check_same_state(model.to(torch.bfloat16), loaded)
    loaded.save_pretrained(tmp_path / "half")
    kept = load(routed(transformers.GPT2LMHeadModel), tmp_path / "half", dtype="auto")
    check_same_state(model, kept)


@pytest.mark.parametrize("layer", LAYERS)
def test_missing_weights_are_those_of_a_new_layer_and_the_others_stay(layer, tmp_path):
    """The library builds without memory: what a checkpoint lacks would be whatever lay there."""
    model = build("gpt2", LAYERS[layer])
    with torch.no_grad():
        for module in routed_layers(model):
            for tensor in module.state_dict().values():
                tensor.fill_(7.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = safetensors.load_file(path)
    lost = {name for name in state if ".mlp." in name and name.rsplit(".")[-1] not in ("w_out", "b_in")}
    assert lost
    safetensors.save_file({name: state[name] for name in state.keys() - lost}, path, metadata={"format": "pt"})
    # torch.empty would give zeros often enough.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        loaded, info = routed(transformers.GPT2LMHeadModel).from_pretrained(tmp_path, output_loading_info=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert info["missing_keys"] == lost
    for module in routed_layers(loaded):
        new = LAYERS[layer](32)
        values = dict([*new.named_parameters(), *new.named_buffers()])
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in ("w_out", "b_in"):
                assert (tensor == 7).all(), name
            elif values[name].unique().numel() < 3:  # not random: zeros, ones, the mix of a master leaf
                assert torch.equal(tensor, values[name]), name
            else:
                assert tensor.abs().max() < 1 and tensor.unique().numel() > 2, name
        assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in new.parameters()]


def test_dropout_of_the_output_is_saved(tmp_path):
    model = build("gpt2", resid_pdrop=0.25)
    model.save_pretrained(tmp_path)
    for loaded in (load(routed(transformers.GPT2LMHeadModel), tmp_path), copy.deepcopy(model)):
        assert [block.mlp[1].p for block in loaded.transformer.h] == [0.25, 0.25]
    loaded.transformer.h[0].mlp[1].p = 0.5
    again = load(routed(transformers.GPT2LMHeadModel), tmp_path)
    again.transformer.h[0].mlp[1].p = 0.5
    again.save_pretrained(tmp_path / "again")
    assert [block.mlp[1].p for block in load(type(again), tmp_path / "again").transformer.h] == [0.5, 0.25]


@pytest.mark.parametrize("trunk", [False, True])
def test_models_of_one_configuration_have_their_own_layers(trunk, tmp_path):
    kind = transformers.GPT2Model if trunk else transformers.GPT2LMHeadModel
    config = transformers.GPT2Config(**COMMON, **MODELS["gpt2"][2])
    models = [kind(config).eval() for _ in range(3)]
    for model, depth in zip(models, (1, 2), strict=False):  # the third stays dense
        replace_feedforward(model, partial(fff.FFF, leaf_width=4, depth=depth))
    for i, model in enumerate(models[: 2 if trunk else 3]):
        model.save_pretrained(tmp_path / str(i))
        loaded = load(routed(kind), tmp_path / str(i))
        assert [layer.depth for layer in routed_layers(loaded)] == [[1, 1], [2, 2], []][i]
        assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    assert all(
        module.config is model.config for model in models for module in model.modules() if "config" in vars(module)
    )


def change_temperature(model):
    for layer in routed_layers(model):
        layer.temperature = 0.1


def merge_bases(model):
    for layer in routed_layers(model):
        layer.merge_base()


def leave_dead_leaves_out(model):
    for block in model.transformer.h:
        with torch.no_grad():
            block.mlp.node_bias[0] += 99.0  # all rows go right
        model(TOKENS)
        block.mlp = fff.prune(block.mlp, block.mlp.record.load)
        assert block.mlp.depth < 2


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("change", "make_ff"),
    [
        (change_temperature, LAYERS["weighted tree"]),
        (merge_bases, partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", base=True)),
        (leave_dead_leaves_out, partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through")),
    ],
)
def test_what_was_changed_since_is_saved(change, make_ff, plain, tmp_path):
    kind = routed(transformers.GPT2LMHeadModel)
    build("gpt2", None, resid_pdrop=0.0).save_pretrained(tmp_path)
    model = load(transformers.GPT2LMHeadModel if plain else kind, tmp_path)
    assert not routed_layers(model)
    replace_feedforward(model, make_ff)
    assert type(model) is kind
    change(model)
    model.save_pretrained(tmp_path / "routed")
    loaded = load(kind, tmp_path / "routed")
    check_same_state(model, loaded)
    assert [str(layer) for layer in routed_layers(loaded)] == [str(layer) for layer in routed_layers(model)]
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_model_within_another_knows_its_blocks(tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(**COMMON, **SIZES))
    classifier = nn.ModuleDict({"bert": bert, "head": nn.TransformerEncoderLayer(32, 2, 8)}).eval()
    assert len(replace_feedforward(classifier, LAYERS["tree"])) == 3
    bert.save_pretrained(tmp_path)
    loaded = load(routed(transformers.BertModel), tmp_path)
    assert torch.equal(loaded(TOKENS)[0], bert(TOKENS)[0])


def test_the_parts_of_a_model_know_their_blocks(tmp_path):
    config = transformers.BertConfig(**COMMON, **SIZES)
    pair = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    )
    replace_feedforward(pair.eval(), LAYERS["tree"])
    pair.encoder.save_pretrained(tmp_path / "encoder")
    loaded = load(routed(transformers.BertModel), tmp_path / "encoder")
    assert torch.equal(loaded(TOKENS)[0], pair.encoder(TOKENS)[0])
    pair.save_pretrained(tmp_path / "pair")
    check_same_state(pair, load(routed(transformers.EncoderDecoderModel), tmp_path / "pair"))

    model = build("gpt2", partial(LAYERS["tree"], base=True))
    model.save_pretrained(tmp_path / "whole")
    for whole in (model, load(type(model), tmp_path / "whole")):
        merge_bases(whole)
        whole.base_model.save_pretrained(tmp_path / "trunk")
        trunk = load(routed(transformers.GPT2Model), tmp_path / "trunk")
        assert torch.equal(trunk(TOKENS)[0], whole.base_model(TOKENS)[0])


def test_a_layer_that_no_configuration_tells_any_more_keeps_the_last(tmp_path):
    model = build("gpt2", LAYERS["weighted tree"])
    for layer in routed_layers(model):
        layer.temperature = torch.tensor(0.25)
    with pytest.warns(UserWarning) as warned:
        model.save_pretrained(tmp_path)
    for i, warning in enumerate(warned):
        assert str(warning.message).startswith(
            f"transformer.h.{i}.mlp is saved with the configuration that it had before"
        )
    assert [layer.temperature for layer in routed_layers(load(type(model), tmp_path))] == [0.5, 0.5]


class Mine(routed(transformers.GPT2LMHeadModel)):
    """A user's own class."""


def test_a_class_made_of_a_routed_one(tmp_path):
    model = build("gpt2", kind=Mine)
    assert type(model) is Mine is routed(Mine)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is Mine and torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    model.save_pretrained(tmp_path)
    check_same_state(model, load(Mine, tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_model_takes_no_layer_that_sees_later_tokens(name):
    experts_choose = partial(fff.MoE, expert_width=4, num_experts=2, router="expert_choice")
    with pytest.raises(ValueError, match="make_ff gave a MoE for .* is causal, and tokens would see later ones"):
        build(name, experts_choose)
    assert len(routed_layers(build("bert", experts_choose))) == 2
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**COMMON, **sizes))
    found = replace_feedforward(
        model, experts_choose, lambda name, module: known_block(module) if name.startswith("encoder") else None
    )
    assert len(found) == 2
    with pytest.raises(ValueError, match="for decoder.block.0.* T5Attention is causal"):
        replace_feedforward(model, experts_choose)


def test_a_configuration_is_not_changed_by_the_models_made_of_it(tmp_path):
    build("gpt2", LAYERS["weighted tree"]).save_pretrained(tmp_path)
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    before = copy.deepcopy(config.fff)
    model = routed(transformers.GPT2LMHeadModel)(config)
    change_temperature(model)
    model.save_pretrained(tmp_path / "changed")
    assert config.fff == before != model.config.fff


def test_some_blocks_one_after_the_other(tmp_path):
    model = build("gpt2", None)
    for name, layer in (("h.1.mlp", "mixture"), ("h.0.mlp", "tree")):
        replace_feedforward(model, LAYERS[layer], lambda at, module, n=name: known_block(module) if n in at else None)
    model.save_pretrained(tmp_path)
    loaded = load(routed(transformers.GPT2LMHeadModel), tmp_path)
    assert [type(layer) for layer in routed_layers(loaded)] == [fff.FFF, fff.MoE]
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_block_that_is_dense_again_is_noted_no_more(tmp_path):
    kind = routed(transformers.GPT2LMHeadModel)
    model = build("gpt2", kind=kind)
    dense = build("gpt2", None).transformer.h[0].mlp
    model.transformer.h[0].mlp = dense
    model.save_pretrained(tmp_path)
    loaded = load(kind, tmp_path)
    assert list(loaded.config.fff) == ["h.1.mlp"]
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def last_mlp(name, module):
    """A block as a user may find one: the layer around the feedforward module has it, which is no known kind."""
    return Block("mine", (module.mlp.c_fc,), module.mlp.c_proj, place="mlp") if name.endswith("h.1") else None


def test_blocks_that_a_function_finds(tmp_path):
    model = build("gpt2", None)
    replace_feedforward(model, LAYERS["tree"], last_mlp)
    model.save_pretrained(tmp_path)
    loaded = load(routed(transformers.GPT2LMHeadModel, last_mlp), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert routed(type(loaded)) is type(loaded)  # of a loaded model one may know no more
    with pytest.raises(ValueError, match="replaces transformer.h.1, which is no feedforward block of a known kind"):
        routed(transformers.GPT2LMHeadModel).from_pretrained(tmp_path)


def test_the_library_finds_what_a_model_of_its_own_can():
    """By the source of the module that has the class."""
    config = transformers.MixtralConfig(**COMMON, **SIZES, num_key_value_heads=1, num_local_experts=4)
    model = routed(transformers.MixtralForCausalLM)(config)
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert model.model.layers[0].mlp.experts.config._experts_implementation == name


def test_copies_and_pickles():
    model = build("gpt2", kind=routed(transformers.GPT2LMHeadModel))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(TOKENS).logits, model(TOKENS).logits)


def test_errors_name_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="AutoModel"):
        routed(transformers.AutoModelForCausalLM)
    build("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, named in (
        ({"h.9.mlp": config["fff"]["h.0.mlp"]}, r"config.fff names \['h.9.mlp'\], which GPT2LMHeadModel does not have"),
        ({"h.0.mlp": {"class": "Linear", "arguments": {}}}, "class='Linear' is none of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "fff": {**config["fff"], **changes}}))
        with pytest.raises(ValueError, match=named):
            routed(transformers.GPT2LMHeadModel).from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="cannot be loaded by `routed`: FeedForward: act_layer="):
        model = build("gpt2", partial(fff.FeedForward, hidden_features=8, act_layer=nn.PReLU()))
    assert not model.config.fff


def generated(model, tokens=TOKENS, **options):
    ask = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(tokens, **{**ask, **options})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_loaded_model_generates_with_cache(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = load(routed(model_class(name)), tmp_path)
    expected = generated(model, use_cache=False)
    assert torch.equal(generated(loaded, use_cache=True), expected)
    assert routed_layers(loaded)[0].record.index.shape[0] == 2  # one new token of each sequence
    assert torch.equal(generated(loaded, use_cache=False), expected)


def test_a_batch_is_its_rows_and_a_tuple_is_the_output():
    model = build("gpt2")
    together = model(TOKENS, output_hidden_states=True)
    alone = [model(row[None], output_hidden_states=True) for row in TOKENS]
    for i, states in enumerate(together.hidden_states):
        each = torch.cat([output.hidden_states[i] for output in alone])
        torch.testing.assert_close(states, each, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(TOKENS, return_dict=False)[0], together.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(TOKENS)).logits, together.logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the name that all of 5.x knows
def test_gradient_checkpointing_gives_the_same_gradients():
    model = build("gpt2", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of the runner-up
        model.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        (loss + fff.aux_loss(model)).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert model.is_gradient_checkpointing
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, n=name: n + text)


def test_trains_and_continues_what_it_learned(tmp_path):
    """Sequences that count from any start, modulo 17: each token tells the next."""
    kind = routed(transformers.GPT2LMHeadModel)
    model = build("gpt2", kind=kind, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        tokens = (torch.randint(0, 17, (16, 1)) + torch.arange(12)) % 17 + 3
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        (loss + fff.aux_loss(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5 and losses[-1] < 0.35  # log 50 = 3.9 for knowing nothing; a tenth of the start is far below
    model.save_pretrained(tmp_path)
    count = torch.tensor([[5, 6, 7], [17, 18, 19]])
    assert generated(load(kind, tmp_path), count)[:, 3:].tolist() == [[8, 9, 10, 11, 12, 13], [3, 4, 5, 6, 7, 8]]
