"""Leaf dispatch by Triton kernels against the formula in float64.

Without a GPU the kernels run in Triton's interpreter, which shows what they compute, not whether a GPU takes them; that
is what the compilation ahead of time is for.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fff import FFF, MoE, aux_loss
from fff.ops.activation import ACTIVATIONS
from fff.ops.expert_mlp import Problem, choose_backend, expert_mlp, resolve_backend

pytest.importorskip("triton")
from fff.ops.expert_mlp import triton as kernels  # noqa: E402
from fff.ops.expert_order import expert_order  # noqa: E402
from fff.ops.expert_order import triton as order_kernels  # noqa: E402
from fff.ops.expert_order.triton import max_tiles, tiled_order  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes the bits of bfloat16 for integers.
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no bfloat16")
)
DTYPES = [torch.float32, torch.float16, BFLOAT16]
# As a share of the largest value. Sums of up to 300 terms in float32; in half precision rows, weights, hidden units and
# results are each rounded once, and with them every gradient's factors.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}
NAMES = ("x", "gate", "w_in", "b_in", "w_out", "b_out")


def call_of(rows, d, experts, width, out, choices, *, glu=False, bias=True, gated=True, dtype=torch.float32):
    hidden = width * (2 if glu else 1)
    call = {
        "x": torch.randn(rows, d),
        "gate": torch.rand(rows, choices) if gated else None,
        "w_in": torch.randn(experts, hidden, d) / d**0.5,
        "b_in": torch.randn(experts, hidden) if bias else None,
        "w_out": torch.randn(experts, width, out) / max(width, 1) ** 0.5,
        "b_out": torch.randn(experts, out) if bias else None,
    }
    return {name: None if t is None else t.to(DEVICE, dtype) for name, t in call.items()}


def value_and_gradients(call, index, grad_y, backend, *, wanted=NAMES, dtype=None, **options):
    tensors = {name: None if t is None else t.to(dtype or t.dtype).detach() for name, t in call.items()}
    leaves = {name: tensors[name].requires_grad_() for name in wanted if tensors[name] is not None}
    x, gate, *weights = tensors.values()
    y = expert_mlp(x, index, gate, *weights, backend=backend, **options)
    found = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def assert_same(found, expected, tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        if value.numel():
            error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)
            assert error < tolerance, f"{name}: {error:.1e}"


def assert_computes(call, index, **options):
    """Value with and without gradient, and every gradient."""
    grad_y = torch.randn(call["x"].shape[0], call["w_out"].shape[2]).to(DEVICE)
    dtype = call["x"].dtype
    grad_y = grad_y.to(dtype)
    found = value_and_gradients(call, index, grad_y, "triton", **options)
    assert all(t.dtype == dtype for t in found.values())
    options.pop("recompute", None)
    expected = value_and_gradients(call, index, grad_y, "reference", dtype=torch.float64, **options)
    assert_same(found, expected, TOLERANCE[dtype])
    x, gate, *weights = call.values()
    for one_by_one in (True, False):  # and by tile
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "few", lambda *_, answer=one_by_one: answer)
            y = expert_mlp(x, index, gate, *weights, backend="triton", **options)
        assert_same({"y": y}, {"y": expected["y"]}, TOLERANCE[dtype])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("glu, bias, gated", [(False, True, False), (True, True, True), (False, False, True)])
@pytest.mark.parametrize(
    "rows, d, experts, width, out, choices",
    [
        (7, 97, 5, 3, 11, 1),  # odd sizes, no multiple of 16
        (40, 33, 3, 33, 49, 2),  # more units and columns than fit one block
        (0, 4, 6, 2, 3, 2),  # no row
        (1, 4, 6, 2, 3, 2),  # one row
        (7, 4, 6, 2, 3, 0),  # no choice
        (9, 5, 3, 1, 1, 3),  # one unit, one output, all experts
        (150, 16, 1, 4, 5, 1),  # one expert with several tiles
        (30, 3, 60, 2, 2, 1),  # experts without rows, more groups than choices
        (20, 80, 2, 130, 70, 1),  # many units
    ],
)
def test_values_and_gradients(rows, d, experts, width, out, choices, glu, bias, gated, dtype):
    call = call_of(rows, d, experts, width, out, choices, glu=glu, bias=bias, gated=gated, dtype=dtype)
    index = torch.rand(rows, experts).argsort(1)[:, :choices].to(DEVICE)
    assert_computes(call, index, glu=glu)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes in Triton's interpreter, which runs one program after the other")
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("rows, experts", [(8192, 8), (8192, 256)])
@pytest.mark.parametrize("width, glu", [(8, False), (32, False), (32, True), (64, False), (128, False), (256, False)])
def test_at_the_sizes_of_a_network(width, glu, rows, experts, dtype):
    """Loops that are pipelined, and more programs than run at once: where one overwrites what another one reads,
    results are wrong, or differ from run to run."""
    call, index = call_of(rows, 512, experts, width, 512, 1, glu=glu, dtype=dtype), torch.randint(experts, (rows, 1))
    index = index.to(DEVICE)
    assert_computes(call, index, activation="gelu", glu=glu)
    grad_y = torch.randn(rows, 512).to(DEVICE, dtype)
    first, *others = (value_and_gradients(call, index, grad_y, "triton", activation="gelu", glu=glu) for _ in range(4))
    for again in others:
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_slopes_of_the_activations(name, glu):
    call = call_of(30, 8, 4, 19, 5, 1, glu=glu)
    call["x"] *= 3  # far into both tails
    assert_computes(call, torch.randint(4, (30, 1), device=DEVICE), activation=name, glu=glu)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_far_tails_stay_finite(name):
    call, index = call_of(6, 3, 2, 4, 5, 1), torch.zeros(6, 1, dtype=torch.int64, device=DEVICE)
    call["w_in"] = torch.full_like(call["w_in"], 1.0)
    call["x"] = torch.tensor([-200.0, -100.0, -1.0, 1.0, 100.0, 200.0], device=DEVICE)[:, None].expand(6, 3).clone()
    found = assert_computes(call, index, activation=name)
    assert all(t.isfinite().all() for t in found.values())


def test_an_index_beyond_the_experts_is_left_out():
    """By choice and by tile; a kernel that took it for an expert would read what lies behind the weights, here nan."""
    call, index = call_of(4, 5, 4, 2, 4, 1), torch.tensor([[0], [3], [2], [-1]], device=DEVICE)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        call[name][3] = torch.nan
        call[name] = call[name][:3]
    found = assert_computes(call, index)
    assert not found["y"][[1, 3]].any() and found["y"][[0, 2]].any(1).all()


@pytest.mark.parametrize("glu", [False, True])
def test_recomputed_units(glu):
    call, index = call_of(40, 8, 4, 5, 6, 2, glu=glu), torch.randint(4, (40, 2), device=DEVICE)
    assert_computes(call, index, glu=glu, recompute=True)


def test_recomputed_units_are_not_kept():
    call, index = call_of(40, 8, 4, 5, 6, 2), torch.randint(4, (40, 2), device=DEVICE)
    x, gate, *weights = (t.requires_grad_() for t in call.values())
    kept = {}
    for recompute in (False, True):
        shapes = kept[recompute] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: to.append(tuple(t.shape)), lambda t: t):
            expert_mlp(x, index, gate, *weights, backend="triton", recompute=recompute)
    pre = 80, 5
    assert pre in kept[False] and pre not in kept[True]


def test_float32_is_exact_unless_torch_is_told_otherwise():
    matmul = torch.backends.cuda.matmul
    assert kernels._precision(torch.float32) == "ieee"
    ways = [(torch.set_float32_matmul_precision, "high", "highest")]
    if hasattr(matmul, "fp32_precision"):
        ways.append((lambda value: setattr(matmul, "fp32_precision", value), "tf32", "ieee"))
    for tell, fast, exact in ways:
        tell(fast)
        try:
            assert kernels._precision(torch.float32) == "tf32"
            assert kernels._precision(torch.float16) == "ieee"  # means nothing there
        finally:
            tell(exact)
        assert kernels._precision(torch.float32) == "ieee"


@pytest.mark.parametrize("choices", [1, 2])
def test_left_out_and_repeated_choices(choices):
    call = call_of(70, 8, 3, 4, 5, choices)
    index = torch.randint(-1, 3, (70, choices), device=DEVICE)  # rows without any expert, rows with one expert twice
    index[0] = -1
    found = assert_computes(call, index)
    assert not found["y"][0].any() and not found["x"][0].any() and not found["gate"][0].any()


def test_few_choices_without_gradient_go_one_by_one(monkeypatch):
    taken, single = [], kernels.triton_expert_mlp_single
    monkeypatch.setattr(kernels, "triton_expert_mlp_single", lambda *call: taken.append(len(call[0])) or single(*call))
    for rows in (24, 25):  # of 3 experts
        call, index = call_of(rows, 4, 3, 2, 2, 1), torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)
        x, gate, *weights = call.values()
        expert_mlp(x, index, gate, *weights, backend="triton")
        expert_mlp(x.requires_grad_(), index, gate, *weights, backend="triton")
    assert taken == [24]
    assert kernels.few(128, 1000) and not kernels.few(129, 1000)


def test_every_choice_left_out():
    found = assert_computes(call_of(4, 5, 3, 2, 4, 2), torch.full((4, 2), -1, device=DEVICE))
    assert not any(t.any() for t in found.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_expert_that_was_not_chosen_cannot_spoil_a_row(value):
    call, index = call_of(3, 5, 3, 2, 4, 2), torch.tensor([[0, 1], [1, -1], [2, 0]], device=DEVICE)
    call["b_in"][2], call["b_out"][2] = value, value  # an overflow of its pre-activation, say
    found = value_and_gradients(call, index, torch.ones(3, 4, device=DEVICE), "triton")
    assert found["y"][:2].isfinite().all() and not found["y"][2].isfinite().all()
    assert found["x"][:2].isfinite().all() and found["w_in"][:2].isfinite().all()


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    """What is not asked for is not computed, and what is left does not depend on it."""
    call, index = call_of(50, 9, 4, 5, 7, 2), torch.randint(4, (50, 2), device=DEVICE)
    grad_y = torch.randn(50, 7, device=DEVICE)
    together = value_and_gradients(call, index, grad_y, "triton")
    alone = value_and_gradients(call, index, grad_y, "triton", wanted=[wanted])
    assert set(alone) == {"y", wanted} and torch.equal(alone[wanted], together[wanted])


def test_strided_tensors():
    call, index = call_of(22, 6, 4, 3, 5, 2), torch.randint(4, (2, 22), device=DEVICE).T
    grad_y = torch.randn(5, 22, device=DEVICE).T
    expected = value_and_gradients(call, index, grad_y, "reference", dtype=torch.float64)
    strided = {name: t.mT.contiguous().mT for name, t in call.items()}
    assert_same(value_and_gradients(strided, index, grad_y, "triton"), expected, TOLERANCE[torch.float32])
    spread = value_and_gradients(call, index, torch.ones((), device=DEVICE).expand(22, 5), "triton")  # of y.sum()
    ones = value_and_gradients(call, index, torch.ones(22, 5, device=DEVICE), "triton")
    assert all(torch.equal(spread[name], value) for name, value in ones.items())


def test_repeated_calls_have_the_same_bits():
    call, index = call_of(300, 9, 4, 5, 7, 2), torch.randint(4, (300, 2), device=DEVICE)
    grad_y = torch.randn(300, 7, device=DEVICE)
    once = value_and_gradients(call, index, grad_y, "triton")
    for _ in range(2):
        again = value_and_gradients(call, index, grad_y, "triton")
        assert all(torch.equal(again[name], value) for name, value in once.items())


@pytest.mark.parametrize("most", [order_kernels.MAX_COUNTS, 0], ids=["counting", "torch.sort"])
@pytest.mark.parametrize(
    "choices, experts, tile_rows",
    [(7, 3, 16), (700, 5, 16), (513, 1, 64), (300, 2000, 16), (1, 1, 16), (0, 3, 16)],
)
def test_tiled_order(choices, experts, tile_rows, most, monkeypatch):
    monkeypatch.setattr(order_kernels, "MAX_COUNTS", most)
    expert = torch.randint(-1, experts + 1, (choices,), device=DEVICE)  # experts is one too many: left out as well
    found = tiled_order(expert, experts, tile_rows)
    group = torch.where((expert < 0) | (expert == experts), experts, expert)
    order, offset = expert_order(group, experts + 1)
    assert torch.equal(found.order.long(), order) and torch.equal(found.offset.long(), offset)
    tiles = (offset.diff() + tile_rows - 1) // tile_rows
    assert torch.equal(found.tile_start[1:].long(), tiles.cumsum(0)) and found.tile_start[0] == 0
    groups = torch.repeat_interleave(torch.arange(experts + 1, device=DEVICE), tiles)
    assert len(groups) <= len(found.tile_group) == max_tiles(choices, experts, tile_rows)
    assert torch.equal(found.tile_group[: len(groups)].long(), groups)


@pytest.mark.parametrize("glu", [False, True])
def test_custom_operators(glu):
    call, index = call_of(5, 3, 4, 2, 6, 2, glu=glu), torch.randint(-1, 4, (5, 2), device=DEVICE)
    x, gate, *weights = (t.requires_grad_() for t in call.values())
    # Not those that compare all results: part of the tiles is undefined.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels.triton_expert_mlp, (x, index, gate, *weights, "relu", glu, True), test_utils=checks)
    with torch.no_grad():
        _, *kept = kernels.triton_expert_mlp(x, index, gate, *weights, "relu", glu, True)
    x, gate, *weights = (t.detach() for t in (x, gate, *weights))
    torch.library.opcheck(kernels.triton_expert_mlp_single, (x, index, gate, *weights, "relu", glu))
    for need in ([True] * 6, [False, True, False, False, True, False]):
        call = torch.randn(5, 6, device=DEVICE), x, index, gate, *weights, *kept, "relu", glu, need
        torch.library.opcheck(kernels.triton_expert_mlp_backward, call)


def test_compiles_without_graph_breaks():
    call, index = call_of(9, 8, 3, 2, 5, 2), torch.randint(3, (9, 2), device=DEVICE)
    grad_y = torch.randn(9, 5, device=DEVICE)

    def forward(x, gate, *weights):
        return expert_mlp(x, index, gate, *weights, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (forward, compiled):
        leaves = [t.detach().requires_grad_() for t in call.values()]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, grad_y)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_activation_checkpointing():
    call, index = call_of(9, 8, 3, 2, 5, 2), torch.randint(3, (9, 2), device=DEVICE)
    grad_y = torch.randn(9, 5, device=DEVICE)
    expected = value_and_gradients(call, index, grad_y, "triton")
    x, gate, *weights = (t.detach().requires_grad_() for t in call.values())
    y = torch.utils.checkpoint.checkpoint(
        lambda x: expert_mlp(x, index, gate, *weights, backend="triton"), x, use_reentrant=False
    )
    found = torch.autograd.grad(y, [x, gate, *weights], grad_y)
    assert all(torch.equal(a, expected[name]) for name, a in zip(NAMES, found, strict=True))


def test_there_is_no_second_derivative():
    call, index = call_of(4, 3, 2, 2, 2, 1), torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    x = call["x"].requires_grad_()
    y = expert_mlp(x, index, *(call[name] for name in NAMES[1:]), backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="triton_expert_mlp_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 4, "mode": "straight_through", "balance_weight": 0.1},
        {"depth": 3, "mode": "gated", "num_trees": 2, "glu": True, "act_layer": "silu"},
        {"depth": 3, "mode": "straight_through", "runner_up": True, "bias": False},
        {"depth": 0, "mode": "straight_through"},
        {"depth": 9, "mode": "straight_through", "temperature": 0.5, "hardening_weight": 1.0},  # deeper than a matmul
        {"depth": 4, "mode": "straight_through", "region_leak": 0.5, "balance_weight": 0.1},
        {"depth": 4, "mode": "straight_through", "bias_update_rate": 0.5},
    ],
    ids=lambda o: "_".join(f"{k}{v}" for k, v in o.items()),
)
def test_a_tree_trains_and_evaluates_as_its_reference(options, monkeypatch):
    # Drawn, in float32 here and in float64 there; instead the least certain one.
    monkeypatch.setattr(
        "fff.layers.fff.turned_decision",
        lambda logits: torch.nn.functional.one_hot(logits.abs().argmin(-1), logits.shape[-1]).bool(),
    )
    layer = FFF(33, 5, 7, **options, backend="triton").to(DEVICE)
    plain = FFF(33, 5, 7, **options, backend="reference").to(DEVICE).double()
    plain.load_state_dict(layer.state_dict())
    if layer.decision_bias is not None:  # decides only: no gradient, and other routes
        for each in (layer, plain):
            each.decision_bias.copy_(torch.linspace(-1, 1, len(layer.decision_bias)))
    x, grad_y, found = torch.randn(60, 33, device=DEVICE), torch.randn(60, 7, device=DEVICE), []
    for each, dtype in ((layer, torch.float32), (plain, torch.float64)):
        torch.manual_seed(0)  # of the leak
        rows = x.to(dtype, copy=True).requires_grad_()
        y = each(rows)
        ((y * grad_y).sum() + 10 * aux_loss(each)).backward()
        found.append(
            {"x": rows.grad, "y": y.detach()} | {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        )
    assert layer.record.backend == "triton" and torch.equal(layer.record.index, plain.record.index)
    assert layer.record.tree.top is None  # a kernel walked down
    assert torch.equal(layer.record.load, plain.record.load)
    assert_same(*found, 2e-5)
    layer.eval(), plain.eval()
    with torch.no_grad():
        assert_same({"y": layer(x)}, {"y": plain(x.double())}, 2e-6)
    assert layer.record.backend == "triton"


@pytest.mark.parametrize("router, top_k", [("switch", 1), ("mixtral", 2)])
def test_a_mixture_trains_as_its_reference(router, top_k):
    layer, plain = (
        MoE(33, 5, 7, num_experts=6, top_k=top_k, router=router, backend=b).to(DEVICE) for b in ("triton", "reference")
    )
    plain.load_state_dict(layer.state_dict())
    plain.double()
    x, grad_y, found = torch.randn(100, 33, device=DEVICE), torch.randn(100, 7, device=DEVICE), []
    for each, dtype in ((layer, torch.float32), (plain, torch.float64)):
        (each(x.to(dtype)) * grad_y).sum().backward()
        found.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert layer.record.backend == "triton"
    assert_same(*found, 2e-5)


@pytest.mark.parametrize(
    "layer, options",
    [
        (FFF, {"depth": 4, "mode": "straight_through", "balance_weight": 0.1, "hardening_weight": 0.1}),
        (FFF, {"depth": 9, "mode": "straight_through", "balance_weight": 0.1, "runner_up": True}),
        (FFF, {"depth": 4, "mode": "gated", "balance_weight": 0.1, "num_trees": 2, "region_leak": 0.1}),
        (MoE, {"num_experts": 16, "router": "switch", "top_k": 1, "balance_weight": 0.01, "capacity_factor": 1.0}),
        (MoE, {"num_experts": 16, "router": "mixtral", "top_k": 2, "balance_weight": 0.01, "z_weight": 0.01}),
        (MoE, {"num_experts": 16, "router": "noisy_top_k", "top_k": 2, "load_weight": 0.1, "importance_weight": 0.1}),
    ],
)
def test_a_training_step_asks_for_no_number(layer, options):
    """Tensors without numbers refuse whatever the host would have to wait for."""
    with FakeTensorMode(), torch.device(DEVICE):
        module = layer(32, 8, **options, backend="triton")
        x = torch.randn(64, 32, requires_grad=True)
        (module(x).sum() + aux_loss(module)).backward()
        assert module.record.backend == "triton" and module.w_in.grad.shape == module.w_in.shape
        with torch.no_grad():
            assert module.eval()(x).shape == x.shape


def test_auto_takes_it_on_a_gpu_alone():
    problem = Problem(2048, 768, 128, 32, 768, 1)
    assert resolve_backend("auto", problem, triton=True, cuda=True) == "triton"
    assert resolve_backend("auto", problem, cuda=True) == "grouped"
    call, index = call_of(4, 3, 2, 2, 2, 1), torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    x, *rest = call.values()
    assert (choose_backend("auto", x, index, *rest) == "triton") == (DEVICE == "cuda")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"dropout": 0.5}, "no dropout, which is 0.5"),
        ({"activation": torch.tanh}, "by name alone"),
        ({"dtype": torch.float64}, "not .*float64"),
        ({"width": 257}, "at most 256 units, not 257"),
    ],
)
def test_what_it_does_not_take_is_named(change, named):
    call = call_of(4, 3, 2, change.pop("width", 2), 2, 1, dtype=change.pop("dtype", torch.float32))
    index = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    x, *rest = call.values()
    with pytest.raises(ValueError, match=f"backend='triton' cannot take this call: .*{named}"):
        expert_mlp(x, index, *rest, backend="triton", **change)
