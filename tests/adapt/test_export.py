"""Layers and models with layers of ours in ONNX, as onnxruntime runs them; skipped without these libraries."""

from functools import partial

import pytest
import torch
from torch import nn

import fff
from fff.adapt import replace_feedforward
from fff.models import GPT

tree = partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", balance_weight=0.1)
mixture = partial(fff.MoE, expert_width=4, num_experts=4, router="mixtral")

BATCH = ({0: torch.export.Dim("batch")},)
LAYERS = {
    "FFF": tree,
    "FFF, below the dense levels": partial(fff.FFF, leaf_width=4, depth=8, act_layer="gelu", glu=True, num_trees=2),
    "FFF, several leaves": partial(fff.FFF, leaf_width=4, depth=3, mode="gated", top_k=2, node_width=2, master_width=3),
    "FFF, soft": partial(fff.FFF, leaf_width=4, depth=2, soft_eval=True),
    "MoE": mixture,
    "MoE, many experts of each row": partial(fff.MoE, expert_width=4, num_experts=12, top_k=9, shared_width=3),
    "UltraFFF": partial(fff.UltraFFF, depth=3, num_trees=2),
    "UltraFFF, gather": partial(fff.UltraFFF, depth=7),
}


def replaced_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2)
    replace_feedforward(model, tree)
    return model, lambda rows: torch.randn(rows, 5, 16)


def gpt():
    return GPT(mixture, (6,), 20, dim=16, depth=2, heads=2), lambda rows: torch.randint(0, 20, (rows, 6))


@torch.no_grad()
def check_onnx(model, inputs, path):
    """One file for every number of rows: written from four of them."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.onnx.export(model.eval(), (inputs(4),), path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    for rows in (1, 3, 1000):
        x = inputs(rows)
        (y,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_to_onnx(make, tmp_path):
    layer = make(6, out_features=5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)  # a router may begin at 0: all rows to the same experts
    check_onnx(layer, lambda rows: torch.randn(rows, 6), tmp_path / "layer.onnx")


@pytest.mark.export
@pytest.mark.parametrize("build", [replaced_encoder, gpt])
def test_models_to_onnx(build, tmp_path):
    check_onnx(*build(), tmp_path / "model.onnx")


@pytest.mark.parametrize("build", [replaced_encoder, gpt])
@torch.no_grad()
def test_models_export_with_a_dynamic_batch(build):
    model, inputs = build()
    program = torch.export.export(model.eval(), (inputs(4),), dynamic_shapes=BATCH).module()
    for rows in (1, 3, 50):
        x = inputs(rows)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
