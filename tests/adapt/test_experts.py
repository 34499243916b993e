"""Experts of transformers run by ours: the values and gradients of the library's own implementations."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fff.adapt import experts_forward, register_experts
from fff.ops.expert_mlp import HARD_BACKENDS, cpu

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
moe = pytest.importorskip("transformers.integrations.moe", reason="transformers is older than 5")
pytestmark = pytest.mark.adapt

BACKENDS = [
    "reference",
    "dense",
    *(
        pytest.param(name, marks=pytest.mark.skipif(name == "native" and not cpu.available(), reason="not built"))
        for name in HARD_BACKENDS
        if name != "triton"  # whose own tests hold it to the same formula
    ),
]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_experts()
    for name in ("reference", "dense", *HARD_BACKENDS):
        register_experts(f"fff_{name}", backend=name)
    yield
    for name in ("fff", "fff_reference", "fff_dense", *(f"fff_{name}" for name in HARD_BACKENDS)):
        del moe.ALL_EXPERTS_FUNCTIONS._global_mapping[name]


def build(kind, experts):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=6)
        kind = transformers.MixtralForCausalLM
    else:
        config = transformers.Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=24, num_experts=6)
        kind = transformers.Qwen3MoeForCausalLM
    config._experts_implementation = experts
    model = kind(config)
    for parameter in model.parameters():  # the library's 0.02 would leave little of the experts in the output
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else None
    return model


def loss_and_gradients(model, tokens):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_of_eager(kind, backend):
    tokens = torch.randint(0, 50, (3, 11))
    theirs, ours = build(kind, "eager"), build(kind, f"fff_{backend}")
    assert ours.model.layers[0].mlp.experts.config._experts_implementation == f"fff_{backend}"
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens).logits, theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    expected, expected_gradients = loss_and_gradients(theirs.train(), tokens)
    loss, gradients = loss_and_gradients(ours.train(), tokens)
    torch.testing.assert_close(loss, expected)
    moved = [name for name in expected_gradients if "experts." in name or "mlp.gate." in name]
    assert len(moved) == 6 and all(expected_gradients[name].abs().max() > 1e-4 for name in moved)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_from_pretrained_saves_and_generates(kind, tmp_path):
    build(kind, "eager").save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fff")
    calls = []
    ours.model.layers[0].mlp.experts.register_forward_hook(lambda _, x, y: calls.append(x[0].shape[0]))
    tokens = torch.randint(3, 50, (2, 5))
    ask = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = theirs.generate(tokens, **ask)
    assert torch.equal(ours.generate(tokens, **ask, use_cache=True), expected)
    assert calls[1:] == [2] * 5  # with the cache, one new token of each sequence
    assert torch.equal(ours.generate(tokens, **ask, use_cache=False), expected)
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._experts_implementation != "fff"  # how a model runs is no part of it
    again.set_experts_implementation("fff")
    assert torch.equal(again(tokens).logits, ours(tokens).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the name that all of 5.x knows
def test_gradient_checkpointing():
    tokens = torch.randint(0, 50, (3, 11))
    model = build("mixtral", "fff").train()
    _, expected = loss_and_gradients(model, tokens)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, gradients = loss_and_gradients(model, tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


class Experts(nn.Module):
    """What the library's classes are before their decorator, in any of its layouts."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn = 5, nn.SiLU()
        name, width = ("gate_up_proj", 2 * 7) if config.gate else ("up_proj", 7)
        first, last = ((5, 6, width), (5, 7, 6)) if config.transposed else ((5, width, 6), (5, 6, 7))
        setattr(self, name, nn.Parameter(torch.randn(first)))
        self.down_proj = nn.Parameter(torch.randn(last))
        if config.bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(5, width)))
            self.down_proj_bias = nn.Parameter(torch.randn(5, 6))

    def forward(self, *_):
        raise AssertionError("an experts implementation runs instead")


def experts_module(experts_class=Experts, *, gate=True, bias=False, transposed=False, **options):
    options = {"is_transposed": transposed, "has_bias": bias, "has_gate": gate, **options}
    decorated = moe.use_experts_implementation(type("Experts", (experts_class,), {}), **options)
    return decorated(SimpleNamespace(gate=gate, bias=bias, transposed=transposed, _experts_implementation="fff"))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_every_layout(gate, bias, transposed):
    module = experts_module(gate=gate, bias=bias, transposed=transposed)
    x, index = torch.randn(9, 6, requires_grad=True), torch.randint(0, 5, (9, 2))
    weights = torch.rand(9, 2, requires_grad=True)
    index[4, 1], module._is_expert_parallel = 5, True  # an expert of another rank
    found = []
    for name in ("batched_mm", "fff"):
        module.config._experts_implementation = name
        y = module(x, index, weights)
        inputs = [x, weights, *module.parameters()]
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for backend in ("reference", "dense", "gather"):
        y = experts_forward(module, x, index, weights, backend=backend)
        torch.testing.assert_close(y, found[0][0], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_close_to_float32_as_theirs():
    """Rows, hidden units, outputs, weights of choices, products and sums are each rounded to 2^-9 of their size; eight
    such roundings of the largest output are more than they can add up to."""
    module = experts_module()
    x, index, weights = torch.randn(200, 6), torch.randint(0, 5, (200, 2)), torch.rand(200, 2)
    with torch.no_grad():
        for parameter in (*module.parameters(), x):
            parameter.copy_(parameter.bfloat16())
        expected = module(x, index, weights)
        module.to(torch.bfloat16)
        bound = 8 * 2**-9 * expected.abs().max()
        for name in ("batched_mm", "fff"):
            module.config._experts_implementation = name
            y = module(x.bfloat16(), index, weights)
            assert y.dtype == torch.bfloat16 and (y - expected).abs().max() < bound
        assert module(x, index, weights).dtype == torch.float32  # rows that a norm left in float32
        with torch.autocast("cpu", torch.bfloat16):
            y = module.float()(x, index, weights)
        assert y.dtype == torch.float32 and (y - expected).abs().max() < bound


def test_compiles_as_one_graph():
    module = experts_module()
    x, index, weights = torch.randn(9, 6), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, weights), module(x, index, weights))


def test_experts_of_a_version_that_knows_no_norm_behind_them():
    """From 5.7 on, the first that takes other experts implementations than its own."""
    module = experts_module()
    del module.has_post_expert_norm
    assert module(torch.randn(9, 6), torch.randint(0, 5, (9, 2)), torch.rand(9, 2)).shape == (9, 6)


class OwnGate(Experts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=1) * up


def test_what_ours_cannot_compute_is_refused():
    call = torch.randn(3, 6), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with pytest.raises(ValueError, match="formula of its own"):
        experts_module(OwnGate)(*call)
    with pytest.raises(ValueError, match="norm behind"):
        experts_module(has_post_expert_norm=True)(*call)
    config = transformers.GptOssConfig(**{**SIZES, "hidden_size": 6}, num_local_experts=5, intermediate_size=7)
    config._experts_implementation = "fff"
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    with pytest.raises(ValueError, match="GptOssExperts has a formula of its own"):
        gpt_oss.GptOssExperts(config)(*call)
