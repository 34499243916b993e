"""Every backend of the gated expert sum against the loop that reads like the formula."""

import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fff.ops.activation import ACTIVATIONS
from fff.ops.expert_mlp import Problem, expert_mlp, resolve_backend
from fff.ops.expert_mlp.grouped import grouped_linear

HARD = ["grouped", "gather", "dense"]
grouped_module = sys.modules["fff.ops.expert_mlp.grouped"]  # whose name in the package is a function's


def parameters(d, experts, width, out, *, glu=False, bias=True, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    rows = width * (2 if glu else 1)
    return [
        random(experts, rows, d),
        random(experts, rows) if bias else None,
        random(experts, width, out),
        random(experts, out) if bias else None,
    ]


def value_and_grads(x, index, gate, weights, **kwargs):
    y = expert_mlp(x, index, gate, *weights, **kwargs)
    inputs = [t for t in [x, gate, *weights] if t is not None]
    # A non-linear readout, so that the gradient of y differs from row to row.
    return [y, *torch.autograd.grad(y.sin().sum(), inputs)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", HARD)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("glu, bias", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize(
    "rows, d, experts, width, out, choices",
    [
        (7, 97, 5, 3, 11, 1),  # odd sizes
        (7, 5, 3, 1, 2, 3),  # leaf of one unit, every expert chosen
        (1, 4, 6, 2, 3, 2),  # one row, most experts empty
        (0, 4, 6, 2, 3, 2),  # no row
        (33, 4, 1, 2, 3, 1),  # a single expert
    ],
)
def test_hard_backends_equal_reference(backend, gated, glu, bias, rows, d, experts, width, out, choices):
    x = torch.randn(rows, d, dtype=torch.float64, requires_grad=True)
    # Distinct experts per row, as every router chooses them.
    index = torch.rand(rows, experts).argsort(1)[:, :choices]
    gate = torch.rand(rows, choices, dtype=torch.float64, requires_grad=True) if gated else None
    weights = parameters(d, experts, width, out, glu=glu, bias=bias)
    expected = value_and_grads(x, index, gate, weights, glu=glu, backend="reference")
    assert_same(value_and_grads(x, index, gate, weights, glu=glu, backend=backend), expected)
    with torch.no_grad():  # has a path of its own in some backends
        assert_same([expert_mlp(x, index, gate, *weights, glu=glu, backend=backend)], expected[:1])


@pytest.mark.parametrize("backend", HARD)
@pytest.mark.parametrize(
    "index",
    [
        [[2], [2], [2], [2]],  # all rows to one expert, the others empty
        [[-1], [-1], [-1], [-1]],  # every choice dropped
        [[0, -1], [-1, 1], [-1, -1], [1, 0]],  # some dropped, in either place
    ],
    ids=["one expert", "all dropped", "some dropped"],
)
def test_empty_experts_and_dropped_choices(backend, index):
    index = torch.tensor(index)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    weights = parameters(5, 3, 2, 4)
    expected = value_and_grads(x, index, gate, weights, backend="reference")
    actual = value_and_grads(x, index, gate, weights, backend=backend)
    assert_same(actual, expected)
    with torch.no_grad():
        assert_same([expert_mlp(x, index, gate, *weights, backend=backend)], expected[:1])
    none_left = (index < 0).all(1)
    assert torch.equal(actual[0][none_left], torch.zeros_like(actual[0][none_left]))


@pytest.mark.parametrize("glu, bias", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("gated", [True, False])
def test_dense_equals_reference(glu, bias, gated):
    x = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(7, 5, dtype=torch.float64, requires_grad=True) if gated else None
    weights = parameters(13, 5, 3, 4, glu=glu, bias=bias)
    expected = value_and_grads(x, None, gate, weights, glu=glu, backend="reference")
    assert_same(value_and_grads(x, None, gate, weights, glu=glu, backend="dense"), expected)


@pytest.mark.parametrize("backend", HARD)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_expert_that_was_not_chosen_cannot_spoil_a_row(backend, value):
    index = torch.tensor([[0, 1], [1, -1], [2, 0]])
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(3, 2, dtype=torch.float64)
    weights = parameters(5, 3, 2, 4)
    with torch.no_grad():
        weights[1][2], weights[3][2] = value, value  # an overflow of its pre-activation, say
    y = expert_mlp(x, index, gate, *weights, backend=backend)
    (grad,) = torch.autograd.grad(y[:2].sum(), x)
    assert y[:2].isfinite().all() and not y[2].isfinite().all()
    assert grad[:2].isfinite().all()


def test_reference_is_the_formula_for_one_row_by_hand():
    x = torch.tensor([[1.0, 2.0]])
    w_in = torch.tensor([[[1.0, 1.0]], [[-1.0, 0.0]]])  # expert 0: relu(3 + 1) = 4, expert 1: relu(-1 + 1) = 0
    b_in = torch.ones(2, 1)
    w_out = torch.tensor([[[2.0]], [[5.0]]])
    b_out = torch.tensor([[0.5], [7.0]])
    y = expert_mlp(x, torch.tensor([[0, 1]]), torch.tensor([[0.5, 2.0]]), w_in, b_in, w_out, b_out, backend="reference")
    assert y.item() == 0.5 * (4 * 2 + 0.5) + 2 * 7


@pytest.mark.parametrize("backend", ["reference", "dense", *HARD])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu2", "identity"])
def test_gradcheck(backend, activation):
    soft = backend in ("dense", "reference")
    index = None if soft else torch.tensor([[0, 2], [2, -1], [1, 0]])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(3, 3 if soft else 2, dtype=torch.float64, requires_grad=True)
    weights = parameters(4, 3, 2, 3)
    assert torch.autograd.gradcheck(
        lambda x, gate, *w: expert_mlp(x, index, gate, *w, activation=activation, backend=backend), (x, gate, *weights)
    )


@pytest.mark.parametrize("backend", ["grouped", "gather", "dense"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-23)]
)
def test_low_precision_is_kept_and_near(backend, dtype, tolerance):
    experts, choices = 4, 2
    x, gate = torch.randn(9, 16), torch.rand(9, experts if backend == "dense" else choices)
    index = None if backend == "dense" else torch.rand(9, experts).argsort(1)[:, :choices]
    weights = [w.detach().float() for w in parameters(16, experts, 8, 5)]
    exact = expert_mlp(x.double(), index, gate.double(), *(w.double() for w in weights), backend="reference")
    y = expert_mlp(x.to(dtype), index, gate.to(dtype), *(w.to(dtype) for w in weights), backend=backend)
    assert y.dtype == dtype
    # Inputs, hidden units and outputs are each rounded once, and about 16 + 8 terms add up.
    assert (y.double() - exact).abs().max() < 24 * tolerance * exact.abs().max()


@pytest.mark.parametrize("backend", ["reference", *HARD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_rows_add_up_in_low_precision(backend, dtype):
    # Row by row in bfloat16 a sum of ones ends at 256.
    x, index, gate = torch.rand(2000, 4), torch.randint(2, (2000, 1)), torch.rand(2000, 1)
    weights = [w.detach().float().abs().requires_grad_() for w in parameters(4, 2, 3, 2)]

    def gradients(dtype, backend):
        given = [t.detach().to(dtype).requires_grad_() for t in (x, gate, *weights)]
        y = expert_mlp(given[0], index, given[1], *given[2:], backend=backend)
        return torch.autograd.grad(y.float().sum() / 8, given)

    for actual, expected in zip(gradients(dtype, backend), gradients(torch.float32, "reference"), strict=True):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_the_gate_may_be_of_another_type_than_the_rows():
    x, index, gate = torch.randn(6, 4).bfloat16(), torch.randint(3, (6, 2)), torch.rand(6, 2)
    weights = [w.detach().bfloat16() for w in parameters(4, 3, 2, 3)]
    for backend in ["reference", *HARD]:
        y = expert_mlp(x, index, gate, *weights, backend=backend)
        assert torch.equal(y, expert_mlp(x, index, gate.bfloat16(), *weights, backend=backend))


def test_every_activation_and_any_callable():
    x, index = torch.randn(6, 4), torch.randint(3, (6, 1))
    weights = [w.detach().float() for w in parameters(4, 3, 2, 3)]
    for activation in [*ACTIVATIONS, torch.tanh, nn.GELU, nn.GELU("tanh"), nn.SiLU()]:
        expected = expert_mlp(x, index, None, *weights, activation=activation, backend="reference")
        actual = expert_mlp(x, index, None, *weights, activation=activation, backend="grouped")
        torch.testing.assert_close(actual, expected)
    relu2 = expert_mlp(x, index, None, *weights, activation="relu2")
    torch.testing.assert_close(relu2, expert_mlp(x, index, None, *weights, activation=lambda v: v.clamp(min=0) ** 2))


def test_grouped_gradient_lies_in_memory_as_the_parameter():
    w_in, b_in, w_out, b_out = parameters(8, 3, 4, 5)
    expert_mlp(torch.randn(6, 8).double(), torch.randint(3, (6, 1)), None, w_in, b_in, w_out, b_out).sum().backward()
    assert w_in.grad.is_contiguous() and w_out.grad.is_contiguous()


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("choices", [1, 2])
def test_groups_at_once_as_on_a_gpu(choices, glu, gradient, monkeypatch):
    """With rows that have no expert, and an expert that has no rows, whose part of the results nobody else writes."""
    monkeypatch.setattr(grouped_module, "at_once", lambda x, weight: True)
    product, called = F.grouped_mm, []

    def spoiling(x, weight, *, offs):
        called.append(x.shape)
        y = product(x, weight, offs=offs)
        if y.dim() == 2:
            y[offs[-1] :] = torch.nan
        else:
            y[offs == offs.roll(1)] = torch.nan  # the first group is never empty here
        return y

    monkeypatch.setattr(F, "grouped_mm", spoiling)
    index = torch.randint(4, (37, choices))
    index[index == 2] = -1
    index[0], index[5] = 0, -1
    x, grad = torch.randn(37, 16), torch.randn(37, 8)
    weights = [w.detach().float() for w in parameters(16, 4, 8, 8, glu=glu)]
    gate = torch.rand(37, choices)

    def results(backend):
        given = [t.detach().requires_grad_(gradient) for t in (x, gate, *weights)]
        y = expert_mlp(given[0], index, *given[1:], backend=backend, glu=glu)
        return [y, *(torch.autograd.grad(y, given, grad) if gradient else ())]

    found = results("grouped")
    assert len(called) == (6 if gradient else 2)
    for actual, expected in zip(found, results("reference"), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
def test_what_torch_multiplies_at_once(monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])

    def taken(rows=5, experts=4, width=16, out=8, dtype=torch.bfloat16, offset=0):
        x = MagicMock(spec=torch.Tensor, is_cuda=True, dtype=dtype, storage_offset=lambda: 0, __len__=lambda _: rows)
        weight = torch.empty(experts * width * out + offset, dtype=dtype, device="meta")[offset:]
        return grouped_module.at_once(x, weight.view(experts, width, out))

    assert taken()
    assert not taken(rows=0) and not taken(experts=1025) and not taken(width=12) and not taken(out=12)
    assert not taken(dtype=torch.float32) and not taken(offset=1)
    assert not grouped_module.at_once(torch.empty(5, 16).bfloat16(), torch.empty(4, 16, 8).bfloat16())  # on a CPU
    capability[0] = (8, 0)
    assert not taken()


def test_grouped_linear_passes_the_checks_of_custom_operators():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(grouped_linear, (x, weight, bias, torch.tensor([0, 2, 2, 4, 4])))


def test_dropout_scales_what_it_keeps():
    x, weights = torch.randn(2000, 4), [w.detach().float() for w in parameters(4, 2, 8, 3)]
    index = torch.zeros(2000, 1, dtype=torch.int64)
    dropped = expert_mlp(x, index, None, *weights, dropout=0.5)
    kept = expert_mlp(x, index, None, *weights)
    assert not torch.equal(dropped, kept)
    torch.testing.assert_close(dropped.mean(0), kept.mean(0), atol=0.3, rtol=0.1)


def test_autocast_computes_in_its_type():
    weights = [w.detach().float() for w in parameters(4, 3, 2, 3)]
    for index in (None, torch.randint(3, (6, 1))):
        with torch.autocast("cpu", torch.bfloat16):
            assert expert_mlp(torch.randn(6, 4), index, None, *weights).dtype == torch.bfloat16


def test_auto_backend():
    soft = Problem(2048, 768, 128, 32, 768, None)
    assert resolve_backend("auto", soft) == "dense"
    hard = soft._replace(choices=1)
    for gradient in (False, True):
        assert resolve_backend("auto", hard, gradient=gradient) == "grouped"
        # Single rows copy less than they sort; a few small experts are one small matmul.
        assert resolve_backend("auto", hard._replace(rows=1), gradient=gradient) == "gather"
        assert resolve_backend("auto", Problem(256, 64, 2, 2, 10, 2), gradient=gradient) == "dense"
    assert resolve_backend("auto", hard, exporting=True) == "gather"
    assert resolve_backend("auto", Problem(256, 256, 128, 1, 10, 1), compiling=True) == "grouped"


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"activation": "rellu"}, "activation='rellu'"),
        ({"glu": True}, "w_in has 2 rows"),
        ({"x": torch.randn(5, 3)}, r"x has shape \(5, 3\)"),
        ({"gate": torch.randn(5, 2)}, r"gate has shape \(5, 2\)"),
        ({"x": torch.randn(1, 5, 4)}, r"x has shape \(1, 5, 4\)"),
        ({"x": torch.randn(4)}, r"x has shape \(4,\)"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, r"index has shape \(5,\)"),
        ({"index": torch.zeros(3, 1, dtype=torch.int64)}, r"index has shape \(3, 1\)"),
    ],
)
def test_bad_arguments_are_named(kwargs, named):
    weights = parameters(4, 3, 2, 3)
    call = {"x": torch.randn(5, 4), "index": torch.zeros(5, 1, dtype=torch.int64), "gate": None, **kwargs}
    with pytest.raises(ValueError, match=named):
        x, index, gate = call.pop("x").double(), call.pop("index"), call.pop("gate")
        expert_mlp(x, index, gate, *weights, **call)


def test_a_backend_for_chosen_experts_needs_an_index():
    with pytest.raises(ValueError, match="backend='grouped' needs an index"):
        expert_mlp(torch.randn(5, 4).double(), None, None, *parameters(4, 3, 2, 3), backend="grouped")
