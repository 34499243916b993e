"""What every layer under conf/layer keeps, whichever layers there are."""

import copy
import io
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose

import fff
from experiments.config import build
from fff.layers.contract import RoutedLayer

# The layer removed has nothing to train or to route: test_none.py.
CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "conf" / "layer").glob("*.yaml") if path.stem != "none")
VARIANTS = [
    *((path.stem, {}) for path in CONFIGS),
    ("fff", {"mode": "straight_through"}),
    ("fff", {"mode": "gated", "num_trees": 2}),
    ("fff", {"mode": "straight_through", "top_k": 2, "depth": 3}),
    ("fff", {"mode": "straight_through", "depth": 9, "leaf_width": 2}),
    ("fff", {"master_width": 3, "depth": 2}),
    ("ultra_fff", {"depth": 8, "num_trees": 2}),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join([v[0], *(f"{k}={x}" for k, x in v[1].items())]))
def make(request, hydra_configs):
    """make(in_features, out_features) builds one layer as a model would."""
    name, options = request.param
    node = layer_config(name, *(f"++layer.{key}={value}" for key, value in options.items()))
    return lambda d=6, o=5: build(node)(d, out_features=o)


@cache
def layer_config(name, *overrides):
    return compose("config", [f"layer={name}", "width=32", "leaf_width=4", *overrides]).layer


@pytest.mark.parametrize("training", [True, False])
def test_any_leading_shape_contiguous_or_not(make, training):
    layer = make().eval()
    x = torch.randn(12, 6)
    flat = layer(x)
    assert flat.shape == (12, 5) and isinstance(layer, RoutedLayer)
    torch.testing.assert_close(layer(x.view(3, 2, 2, 6)), flat.view(3, 2, 2, 5))
    torch.testing.assert_close(layer(x.T.contiguous().T), flat)
    torch.testing.assert_close(layer(x.repeat(1, 2)[:, ::1][:, :6]), flat)
    layer.train(training)
    assert layer(x[0]).shape == (5,)
    for empty in (x[:0], x.view(12, 1, 6)[:, :0]):
        y = layer(empty)
        assert y.shape == (*empty.shape[:-1], 5)
        y.sum().backward()
        assert layer.record.load.sum() == 0
        assert fff.aux_loss(layer).isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_forward_and_backward(make, dtype):
    layer = make().to(dtype)
    for training in (True, False):
        x = torch.randn(9, 6, dtype=dtype, requires_grad=True)
        y = layer.train(training)(x)
        (y.float().square().sum() + fff.aux_loss(layer).float()).backward()
        assert y.dtype == x.grad.dtype == dtype
        assert y.isfinite().all() and x.grad.isfinite().all()


def test_same_width_by_default_and_other_widths(make):
    assert make(6, None)(torch.randn(3, 6)).shape == (3, 6)
    assert make(3, 17)(torch.randn(4, 3)).shape == (4, 17)


def test_record(make):
    layer = make()
    assert layer.record is None
    for training in (True, False):
        layer.train(training)(torch.randn(2, 7, 6))
        record = layer.record
        assert record.load.shape == (record.num_experts,) and record.load.dtype == torch.int64
        assert record.load.sum() == (record.index >= 0).sum() and record.index.shape[0] == 14
        assert record.aux_loss.shape == () and not record.index.requires_grad
        assert isinstance(record.backend, str) and record.backend != "auto"
        if record.tree is not None:
            assert ((record.node_entropy >= 0) | record.node_entropy.isnan()).all()
    before = layer.record
    layer(torch.randn(3, 6))
    assert layer.record is not before and layer.record.index.shape[0] == 3


def test_aux_loss_and_routing_see_each_layer_once(make):
    layer = make()
    model = torch.nn.ModuleDict({"a": layer, "again": layer, "b": make()})
    assert fff.aux_loss(model) == 0 and not list(fff.routing(model))
    model["a"](torch.randn(4, 6)), model["b"](torch.randn(4, 6))
    names = [name for name, _ in fff.routing(model)]
    assert names == ["a", "b"]
    expected = model["a"].record.aux_loss + model["b"].record.aux_loss
    torch.testing.assert_close(fff.aux_loss(model), expected)


def test_auxiliary_losses_are_summed_in_full_precision():
    # A layer without losses, whose input is in half precision, comes first.
    dense, mixture = fff.FeedForward(6, 4), fff.MoE(6, 4, num_experts=3, router="mixtral", balance_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixture(dense(torch.randn(50, 6).bfloat16()))
    total = fff.aux_loss(torch.nn.Sequential(dense, mixture))
    assert dense.record.aux_loss.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert total == mixture.record.aux_loss


@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_gradients_of_a_neuron_that_many_rows_pass_add_up_in_low_precision(backend):
    layer = fff.UltraFFF(6, 4, depth=2, backend=backend).bfloat16()
    torch.nn.init.constant_(layer.b_in, 1.0)  # all rows the same way, through neurons that are on
    layer(torch.zeros(2000, 6).bfloat16()).sum().backward()
    hidden = float(layer.act(torch.ones(())).bfloat16())
    assert layer.w_out.grad[0].tolist() == pytest.approx([2000 * hidden] * 4, rel=0.01)


def test_no_grad_and_gradient_accumulation(make):
    layer = make()
    with torch.no_grad():
        layer(torch.randn(4, 6))
    assert not fff.aux_loss(layer).requires_grad
    # Each micro-batch has its own record: the gradients add up to those of the two passes taken alone.
    batches, alone = torch.randn(2, 4, 6), []
    for accumulate in (False, True):
        layer.zero_grad()
        for step, x in enumerate(batches):
            torch.manual_seed(step)
            if not accumulate:
                layer.zero_grad()
            (layer(x).square().sum() + fff.aux_loss(layer)).backward()
            if not accumulate:
                alone.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    together = [p.grad for p in layer.parameters() if p.grad is not None]
    for first, second, both in zip(*alone, together, strict=True):
        torch.testing.assert_close(first + second, both)


def test_autocast_gives_its_type_and_the_decisions_of_full_precision(make):
    layer, x = make().eval(), torch.randn(200, 6)
    expected = layer(x)
    index = layer.record.index
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16  # what a linear layer before this one would hand over
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(layer.record.index, index)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.05)


def test_meta_device(make):
    layer = make().to("meta")
    assert layer(torch.empty(7, 6, device="meta")).shape == (7, 5)


def test_activation_checkpointing_gives_the_same_gradients(make):
    x = torch.randn(16, 6)
    layer = make()
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        layer.zero_grad()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        (y.square().sum() + fff.aux_loss(layer)).backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_copies_and_pickles_after_a_forward_pass(make):
    layer = make()
    layer(torch.randn(4, 6)).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.record is None and layer.record is not None
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(4, 6)
    torch.testing.assert_close(loaded.eval()(x), layer.eval()(x))
    torch.testing.assert_close(twin.eval()(x), layer(x))


def test_compiled_layer_is_pickled_without_what_was_compiled():
    layer = fff.FFF(6, 4, depth=1)
    layer.compile(backend="eager")
    torch.save(layer, io.BytesIO())


def test_reset_parameters_and_reproducible_construction(make):
    torch.manual_seed(5)
    first = make()
    torch.manual_seed(5)
    second = make()
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(6)
    first.reset_parameters()
    drawn = "base_w_in" if getattr(first, "has_base", False) else "w_in"
    assert not torch.equal(getattr(first, drawn), getattr(second, drawn))


def test_sizes(make):
    size = make().size
    assert 0 < size.inference_width <= size.training_width <= size.training_size
    assert size.inference_width <= size.inference_size <= size.training_size and size.flops_per_row > 0


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(make, training):
    layer = make().train(training)
    x = torch.randn(9, 6)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    y = compiled(x)
    index = layer.record.index
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer(x))
    assert torch.equal(index, layer.record.index)
    x = torch.randn(5, 6)  # another batch size: whatever the graph took from the first one would show
    torch.manual_seed(2)
    y = compiled(x)
    assert layer.record.index.shape[0] == 5
    (y.sum() + fff.aux_loss(layer)).backward()
    torch.manual_seed(2)
    torch.testing.assert_close(y, layer(x))


def test_exports_with_a_dynamic_batch(make):
    layer = make().eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(4, 6),), dynamic_shapes=({0: torch.export.Dim("rows")},))
        for rows in (1, 3, 50):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch does not tell it from a compilation")
def test_an_exported_program_has_no_operator_of_ours(make):
    """It is loaded where this library, or its compiled part, is not."""
    layer = make().eval()
    for strict in (True, False):
        with torch.no_grad():
            program = torch.export.export(layer, (torch.randn(4, 6),), strict=strict)
        assert not [node for node in program.graph.nodes if str(node.target).startswith("fff")]


def test_nan_rows_harm_themselves_alone(make):
    layer = make().eval()
    x = torch.randn(5, 6)
    clean = layer(x)
    x[2] = torch.nan
    y = layer(x)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], clean[others])


def test_bad_input_is_named(make):
    layer = make()
    with pytest.raises(ValueError, match=r"\(3, 7\).*in_features=6"):
        layer(torch.randn(3, 7))
    with pytest.raises(ValueError, match="torch.int64"):
        layer(torch.ones(3, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="in_features=0"):
        make(0)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"depth": -1}, "depth=-1"),
        ({"depth": 16}, "depth=16"),
        ({"depth": True}, "depth=True"),
        ({"master_width": 2.5}, "master_width=2.5"),
        ({"region_leak": 0.1, "top_k": 2, "mode": "gated"}, "region_leak=0.1"),
        ({"runner_up": True}, "mode='soft'"),
        ({"runner_up": True, "mode": "straight_through", "top_k": 2}, "beam_width=2"),
        ({"runner_up": True, "mode": "straight_through", "bias_update_rate": 0.1}, "bias_update_rate=0.1"),
        ({"runner_up": True, "mode": "straight_through", "region_leak": 0.1}, "region_leak=0.1"),
        ({"region_leak": 0.1, "soft_gate": "additive"}, "region_leak=0.1"),
        ({"bias_update_rate": 0.1}, "bias_update_rate=0.1"),
        ({"leaf_width": 0}, "leaf_width=0"),
        ({"top_k": 9}, "top_k=9"),
        ({"top_k": 2, "beam_width": 1}, "beam_width=1"),
        ({"mode": "hard"}, "mode='hard'"),
        ({"drop": 1.5}, "drop=1.5"),
        ({"region_leak": -0.1}, "region_leak=-0.1"),
        ({"balance_weight": -1.0}, "balance_weight=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"balance_weight": "0.1"}, "balance_weight='0.1'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"act_layer": "rellu"}, "act_layer='rellu'"),
        ({"soft_gate": "additive", "mode": "gated"}, "soft_gate='additive'"),
    ],
)
def test_fff_names_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        fff.FFF(6, **{"leaf_width": 4, "depth": 3, **arguments})


@pytest.mark.parametrize("build", [lambda: fff.FeedForward(6, 0), lambda: fff.UltraFFF(6, depth=16)])
def test_other_layers_name_bad_arguments(build):
    with pytest.raises(ValueError, match="hidden_features=0|depth=16"):
        build()
