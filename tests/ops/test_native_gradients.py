"""Gradients of the native CPU operators against those of the formula in float64."""

import pytest
import torch

from fff import FFF, MoE, aux_loss
from fff.ops.activation import ACTIVATIONS
from fff.ops.expert_mlp import choose_backend, cpu, expert_mlp

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native operators are not built: python -m fff.build")
# float32 sums of up to 1000 terms against float64, as a share of the largest gradient; 2e-6 is what was found.
TOLERANCE = 2e-5
NAMES = ("x", "gate", "w_in", "b_in", "w_out", "b_out")


def call_of(rows, d, experts, width, out, choices, *, glu=False, bias=True, gated=True):
    hidden = width * (2 if glu else 1)
    return {
        "x": torch.randn(rows, d),
        "gate": torch.rand(rows, choices) if gated else None,
        "w_in": torch.randn(experts, hidden, d) / d**0.5,
        "b_in": torch.randn(experts, hidden) if bias else None,
        "w_out": torch.randn(experts, width, out) / max(width, 1) ** 0.5,
        "b_out": torch.randn(experts, out) if bias else None,
    }


def gradients(call, index, grad_y, backend, *, wanted=NAMES, dtype=torch.float32, **options):
    tensors = {name: None if t is None else t.to(dtype).detach() for name, t in call.items()}
    leaves = {name: tensors[name].requires_grad_() for name in wanted if tensors[name] is not None}
    y = expert_mlp(tensors.pop("x"), index, tensors.pop("gate"), *tensors.values(), backend=backend, **options)
    found = torch.autograd.grad(y, list(leaves.values()), grad_y.to(dtype))
    return dict(zip(leaves, found, strict=True))


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == value.shape
        if value.numel():
            error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)
            assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("glu, bias, gated", [(False, True, False), (True, True, True), (False, False, True)])
@pytest.mark.parametrize(
    "rows, d, experts, width, out, choices",
    [
        (7, 97, 5, 3, 11, 1),  # odd sizes, all below a register but D
        (40, 33, 3, 33, 49, 2),  # one number more than whole registers
        (0, 4, 6, 2, 3, 2),  # no row
        (1, 4, 6, 2, 3, 2),  # one row
        (9, 5, 3, 1, 1, 3),  # one unit, one output, all experts
        (200, 16, 1, 4, 400, 1),  # one expert: its gradient is that of several groups of 64 rows
        (200, 16, 1, 4, 5, 2),  # the same, with a second pass for the rows
        (5, 2500, 2, 4, 3, 1),  # many columns
        (70, 110, 2, 130, 5, 1),  # many units
        (300, 3, 300, 2, 2, 1),  # experts without rows
        (9, 6, 4, 0, 3, 2),  # experts without units: output biases alone
    ],
)
def test_gradients_equal_those_of_the_formula(rows, d, experts, width, out, choices, glu, bias, gated):
    call = call_of(rows, d, experts, width, out, choices, glu=glu, bias=bias, gated=gated)
    index, grad_y = torch.randint(experts, (rows, choices)), torch.randn(rows, out)
    found = gradients(call, index, grad_y, "native", glu=glu)
    assert_same(found, gradients(call, index, grad_y, "reference", glu=glu, dtype=torch.float64))


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_slopes_of_the_activations(name, glu):
    call, index, grad_y = call_of(30, 8, 4, 19, 5, 1, glu=glu), torch.randint(4, (30, 1)), torch.randn(30, 5)
    call["x"] *= 3  # far into both tails
    found = gradients(call, index, grad_y, "native", activation=name, glu=glu)
    expected = gradients(call, index, grad_y, "reference", activation=name, glu=glu, dtype=torch.float64)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_far_tails_stay_finite(name):
    call = call_of(6, 3, 1, 1, 5, 1)
    call["w_in"] = torch.ones_like(call["w_in"])
    call["x"] = torch.tensor([-1e20, -100.0, -1.0, 1.0, 100.0, 1e20])[:, None].expand(6, 3).clone()
    index, grad_y = torch.zeros(6, 1, dtype=torch.int64), torch.randn(6, 5)
    found = gradients(call, index, grad_y, "native", activation=name)
    assert_same(found, gradients(call, index, grad_y, "reference", activation=name, dtype=torch.float64))


def test_an_index_of_32_bits_has_gradients_too():
    call, index, grad_y = call_of(20, 4, 3, 2, 5, 1), torch.randint(3, (20, 1)), torch.randn(20, 5)
    assert_same(gradients(call, index.int(), grad_y, "native"), gradients(call, index, grad_y, "native"))


@pytest.mark.parametrize("choices", [1, 2])
def test_left_out_and_repeated_choices(choices):
    call, grad_y = call_of(150, 8, 3, 4, 5, choices), torch.randn(150, 5)
    index = torch.randint(-1, 3, (150, choices))  # rows without any expert, and rows with one expert twice
    index[0] = -1
    found = gradients(call, index, grad_y, "native")
    assert_same(found, gradients(call, index, grad_y, "reference", dtype=torch.float64))
    assert not found["x"][0].any() and not found["gate"][0].any()


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    """What is not asked for is not computed, and what is left does not depend on it."""
    call, index, grad_y = call_of(50, 9, 4, 5, 7, 2), torch.randint(4, (50, 2)), torch.randn(50, 7)
    together = gradients(call, index, grad_y, "native")
    alone = gradients(call, index, grad_y, "native", wanted=[wanted])
    assert list(alone) == [wanted] and torch.equal(alone[wanted], together[wanted])


def test_strided_tensors():
    call, index, grad_y = call_of(22, 6, 4, 3, 5, 2), torch.randint(4, (2, 22)).T, torch.randn(5, 22).T
    expected = gradients(call, index, grad_y, "reference", dtype=torch.float64)
    strided = {name: t.mT.contiguous().mT for name, t in call.items()}
    assert_same(gradients(strided, index, grad_y, "native"), expected)


@pytest.mark.parametrize("choices", [1, 2])
def test_gradients_have_the_same_bits_with_any_number_of_threads(choices):
    call, grad_y = call_of(2000, 97, 9, 33, 50, choices), torch.randn(2000, 50)
    index = torch.rand(2000, 9).argsort(1)[:, :choices]
    once = gradients(call, index, grad_y, "native")
    torch.set_num_threads(2)
    try:
        again = gradients(call, index, grad_y, "native")
    finally:
        torch.set_num_threads(1)
    for name, value in once.items():
        assert torch.equal(again[name], value), name


OPTIONS = [
    {"depth": 4},
    {"depth": 9},  # deeper than the levels that PyTorch evaluates by one matmul
    {"depth": 3, "num_trees": 3},
    {"depth": 0},
    {"depth": 4, "mode": "gated"},
    {"depth": 4, "bias": False},
    {"depth": 4, "glu": True, "act_layer": "silu"},
    {"depth": 5, "temperature": 0.5, "hardening_weight": 1.0},
    {"depth": 4, "bias_update_rate": 0.5},
    {"depth": 4, "region_leak": 0.5},  # the walk in PyTorch, the leaves natively
    {"depth": 4, "node_balance_weight": 1.0},
    {"depth": 3, "top_k": 2},
    {"depth": 3, "node_width": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "_".join(f"{k}{v}" for k, v in o.items()))
def test_a_layer_trains_as_its_reference(options):
    options = {"mode": "straight_through", "balance_weight": 0.1, **options}
    layer, plain = FFF(33, 5, 7, **options), FFF(33, 5, 7, **options, backend="reference").double()
    plain.load_state_dict(layer.state_dict())
    if layer.decision_bias is not None:  # decides only: no gradient, and other routes
        for each in (layer, plain):
            each.decision_bias.copy_(torch.linspace(-1, 1, len(layer.decision_bias)))
    x, grad_y, found = torch.randn(100, 33), torch.randn(100, 7), []
    for each, dtype in ((layer, torch.float32), (plain, torch.float64)):
        torch.manual_seed(0)  # of the leak
        rows = x.to(dtype, copy=True).requires_grad_()
        y = each(rows)
        ((y * grad_y).sum() + 10 * aux_loss(each)).backward()
        found.append(
            {"x": rows.grad, "y": y.detach()} | {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        )
    assert layer.record.backend == "native" and torch.equal(layer.record.index, plain.record.index)
    torch.testing.assert_close(layer.record.aux_loss.double(), plain.record.aux_loss)
    assert_same(*found)


def test_a_mixture_trains_as_its_reference():
    layer, plain = (MoE(33, 5, 7, num_experts=6, top_k=2, router="mixtral", backend=b) for b in ("auto", "reference"))
    plain.load_state_dict(layer.state_dict())
    plain.double()
    x, grad_y, found = torch.randn(100, 33), torch.randn(100, 7), []
    for each, dtype in ((layer, torch.float32), (plain, torch.float64)):
        (each(x.to(dtype)) * grad_y).sum().backward()
        found.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert layer.record.backend == "native"
    assert_same(*found)


def test_evaluation_keeps_the_gradient():
    """Of the rows, as for a saliency map, and of the weights: the fused call records none and must not be taken."""
    layer = FFF(6, 3, 4, depth=2).eval()
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0 and layer.w_in.grad.abs().sum() > 0
    layer.requires_grad_(False)
    x.grad = None
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_there_is_no_second_derivative():
    call, index = call_of(4, 3, 2, 2, 2, 1), torch.zeros(4, 1, dtype=torch.int64)
    x = call["x"].requires_grad_()
    y = expert_mlp(x, index, *(call[name] for name in NAMES[1:]), backend="native")
    # The incoming gradient of the second one requires none, and the first derivative would pass for a constant.
    for loss in (y.square().sum(), y.sum()):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; ask for backend='gather'"):
            grad.square().sum().backward()


@pytest.mark.parametrize("layer", [FFF(4, 3, 2, depth=2, mode="straight_through"), MoE(4, 3, 2, num_experts=4)])
def test_a_penalty_of_gradients_is_refused_rather_than_wrong(layer):
    x = torch.randn(9, 4, requires_grad=True)
    for train in (True, False):
        y = layer.train(train)(x).sum()
        assert layer.record.backend == "native"
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        penalty = grad.norm(dim=1).sub(1).square().mean()
        parameters = [layer.w_in, layer.w_out]
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y + penalty, parameters, retain_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            penalty.backward(inputs=parameters, retain_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            penalty.backward()


def test_a_hessian_is_refused_rather_than_zero():
    layer = FFF(4, 3, 2, depth=2, act_layer="gelu").eval()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda x: layer(x).sum(), torch.randn(2, 4))
    assert layer.record.backend == "native"


def test_bfloat16_has_no_native_gradient():
    call, index = call_of(4, 3, 2, 2, 2, 1), torch.zeros(4, 1, dtype=torch.int64)
    tensors = [call[name].bfloat16().requires_grad_() for name in NAMES]
    with pytest.raises(ValueError, match="backend='native'.*float32 alone, not in torch.bfloat16"):
        choose_backend("native", tensors[0], index, *tensors[1:])
    assert choose_backend("auto", tensors[0], index, *tensors[1:]) != "native"


def test_autocast_trains_in_the_type_of_the_weights():
    layer = FFF(16, 4, 5, depth=2, mode="straight_through", balance_weight=0.1)
    x, found = torch.randn(30, 16), {}
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        (y.float().square().sum() + aux_loss(layer)).backward()
        found[enabled] = layer.w_in.grad.clone()
        assert layer.record.backend == "native"
    assert y.dtype == torch.bfloat16 and found[True].dtype == torch.float32
    # The result, and with it the gradient that comes back, is rounded to 2^-9.
    torch.testing.assert_close(found[True], found[False], rtol=0.05, atol=0.05 * found[False].abs().max().item())


def test_a_training_step_compiles():
    layer = FFF(16, 4, 5, depth=3, mode="straight_through", balance_weight=0.1)
    x, found = torch.randn(30, 16), []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        (run(x).square().sum() + aux_loss(layer)).backward()
        assert layer.record.backend == "native"
        found.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*found)


def test_operators_pass_the_checks_of_torch():
    call, index, grad_y = call_of(5, 4, 3, 2, 3, 2), torch.randint(3, (5, 2)), torch.randn(5, 3)
    tensors = call["x"], index, call["gate"], *(call[name] for name in NAMES[2:])
    checks = ("test_schema", "test_faketensor")
    need = [True, False, True, True, False, True]
    ops = torch.ops.fff
    torch.library.opcheck(
        ops.native_expert_mlp_backward.default, (grad_y, *tensors, "relu", False, need), test_utils=checks
    )
    nodes, bias = torch.randn(2 * 3, 4), torch.randn(2 * 3)
    torch.library.opcheck(ops.native_descend.default, (call["x"], nodes, bias, None, 2, 2), test_utils=checks)
    leaf, logit = ops.native_descend.default(call["x"], nodes, bias, None, 2, 2)
    back = torch.randn_like(logit), call["x"], nodes, leaf, 2, 2, True, False, True
    torch.library.opcheck(ops.native_descend_backward.default, back, test_utils=checks)


@pytest.mark.parametrize("change", ["grad_y", "need", "index"])
def test_wrong_shapes_are_named(change):
    call = call_of(5, 4, 3, 2, 3, 1)
    arguments = {
        **{"grad_y": torch.randn(5, 3), "x": call["x"], "index": torch.zeros(5, 1, dtype=torch.int64)},
        **{name: call[name] for name in NAMES[1:]},
        **{"activation": "relu", "glu": False, "need": [True] * 6},
    }
    arguments[change] = {"grad_y": torch.randn(5, 2), "need": [True], "index": torch.zeros(4, 1, dtype=torch.int64)}[
        change
    ]
    with pytest.raises(ValueError, match=change):
        torch.ops.fff.native_expert_mlp_backward.default(*arguments.values())
