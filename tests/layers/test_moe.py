"""The MoE layer against its formula, its contract in every router, its losses and its training aids."""

import copy
import math
import pickle

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fff
from fff import MoE
from fff.ops import balance

TOP_K = {"noisy_top_k": 2, "switch": 1, "mixtral": 2, "soft": None, "sigmoid": 2, "expert_choice": 2}
ROUTERS = pytest.mark.parametrize("router", TOP_K)


def moe(router: str, **keywords) -> MoE:
    layer = MoE(6, 4, 3, **{"num_experts": 5, "top_k": TOP_K[router], "router": router} | keywords)
    # The noisy router starts at 0; routes of zero logits would be the same for all rows.
    torch.nn.init.normal_(layer.gate_weight)
    return layer


def with_all_losses(router: str, **keywords) -> MoE:
    own = {"load_weight": 0.4} if router == "noisy_top_k" else {}
    own |= {"balance_weight": 0.2} if router not in ("soft", "expert_choice") else {}
    return moe(router, importance_weight=0.1, z_weight=0.3, **own, **keywords)


@ROUTERS
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_formula(router, glu, bias):
    layer = moe(router, glu=glu, bias=bias, shared_width=2, act_layer="gelu").double().eval()
    x = torch.randn(7, 6, dtype=torch.float64)
    y = layer(x)

    def expert(name, e, row):
        w_in, w_out = getattr(layer, f"{name}w_in")[e], getattr(layer, f"{name}w_out")[e]
        pre, out_bias = w_in @ row, 0.0
        if bias:
            pre, out_bias = pre + getattr(layer, f"{name}b_in")[e], getattr(layer, f"{name}b_out")[e]
        width = w_out.shape[0]
        act = torch.nn.functional.gelu(pre[:width])
        return (act * pre[width:] if glu else act) @ w_out + out_bias

    score = x @ layer.gate_weight.T
    for t in range(7):
        logits, index = score[t], layer.record.index[t].tolist()
        best = logits.argsort(descending=True).tolist()
        if router in ("noisy_top_k", "mixtral"):
            gates = dict(zip(best[:2], logits[best[:2]].softmax(0), strict=True))
        elif router == "switch":
            gates = {best[0]: logits.softmax(0)[best[0]]}
        elif router == "soft":
            gates = dict(enumerate(logits.softmax(0)))
        elif router == "sigmoid":
            chosen = logits[best[:2]].sigmoid()
            gates = dict(zip(best[:2], chosen / chosen.sum(), strict=True))
        else:  # each expert takes ceil(2 * 7 / 5) = 3 rows
            probability = score.softmax(1)
            gates = {e: probability[t, e] for e in range(5) if t in probability[:, e].topk(3).indices}
        assert sorted(e for e in index if e >= 0) == sorted(gates)
        expected = expert("shared_", 0, x[t]) + sum(g * expert("", e, x[t]) for e, g in gates.items())
        torch.testing.assert_close(y[t], expected)


@ROUTERS
@pytest.mark.parametrize("training", [True, False])
def test_gradient(router, training):
    layer = with_all_losses(router, act_layer="silu", shared_width=2, jitter=0.1 * training, backend="reference")
    layer = layer.double().train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        torch.manual_seed(1)  # the same noise in each evaluation
        y = functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, layer.record.aux_loss

    assert gradcheck(run, (x, *parameters))


@ROUTERS
@pytest.mark.parametrize("training", [True, False])
def test_any_leading_shape(router, training):
    layer = with_all_losses(router, jitter=0.1).train(training)
    x = torch.randn(4, 2, 6)

    def run(x):
        torch.manual_seed(1)
        return layer(x)

    flat = run(x.flatten(0, 1))
    torch.testing.assert_close(run(x), flat.view(4, 2, 3))
    not_contiguous = torch.empty(6, 2, 4).permute(2, 1, 0).copy_(x)
    assert not not_contiguous.is_contiguous()
    torch.testing.assert_close(run(not_contiguous), flat.view(4, 2, 3))
    assert run(x[0, 0]).shape == (3,)
    assert layer.record.index.shape[0] == 1


@ROUTERS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_empty_batch(router, training, shape):
    layer = with_all_losses(router, shared_width=2).train(training)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 3)
    assert fff.aux_loss(layer).item() == 0
    assert layer.record.load.tolist() == [0] * 5
    (y.sum() + fff.aux_loss(layer)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@ROUTERS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(router, training, dtype):
    layer = with_all_losses(router, jitter=0.1, shared_width=2).to(dtype).train(training)
    y = layer(torch.randn(5, 6, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()
    (y.sum() + fff.aux_loss(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@ROUTERS
def test_autocast(router):
    layer = with_all_losses(router, shared_width=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, 6))
    (y.sum() + fff.aux_loss(layer)).backward()
    assert layer.gate_weight.grad.isfinite().all() and layer.w_in.grad.isfinite().all()


@pytest.mark.parametrize("router", ["switch", "mixtral", "soft", "sigmoid", "expert_choice"])
def test_training_output_is_evaluation_output(router):
    layer, x = moe(router), torch.randn(9, 6)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_noise_jitter_and_dropout_act_in_training_alone():
    x = torch.randn(64, 6)
    for layer in (moe("noisy_top_k"), moe("mixtral", jitter=0.5), moe("mixtral", drop=0.5)):
        assert not torch.equal(layer(x), layer(x)), layer
        layer.eval()
        assert torch.equal(layer(x), layer(x)), layer


def test_jitter_reaches_the_router_and_not_the_experts():
    layer = moe("soft", jitter=0.9)
    torch.nn.init.zeros_(layer.gate_weight)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_jitter_is_even_around_one_in_low_precision():
    layer = MoE(6, 4, num_experts=5, router="mixtral", jitter=0.01, z_weight=1.0).bfloat16()
    torch.nn.init.constant_(layer.gate_weight, 1 / 8)
    layer(torch.ones(2000, 6).bfloat16())
    # Of log(5 exp(6 / 8)) squared; the noise of a logit has a standard deviation of 1 / 8 * 0.01 * sqrt(6 / 3).
    expected = (math.log(5) + 0.75) ** 2
    assert layer.record.losses["z"].item() == pytest.approx(expected, rel=2 * 4 * 0.0018 / 2.36 / math.sqrt(2000))


@pytest.mark.parametrize("router", [router for router in TOP_K if router != "expert_choice"])
def test_evaluation_of_a_row_does_not_depend_on_the_others(router):
    layer, x = moe(router, capacity_factor=None if router == "soft" else 0.1).eval(), torch.randn(9, 6)
    whole = layer(x)
    torch.testing.assert_close(torch.stack([layer(row) for row in x]), whole)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[order]), whole[order])


@ROUTERS
def test_names_of_the_experts_are_of_no_concern(router):
    layer, x = moe(router, shared_width=2).eval(), torch.randn(9, 6)
    renamed, order = copy.deepcopy(layer), torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for name in ("gate_weight", "w_in", "b_in", "w_out", "b_out"):
            getattr(renamed, name).copy_(getattr(layer, name)[order])
    torch.testing.assert_close(renamed(x), layer(x))
    assert torch.equal(renamed.record.load, layer.record.load[order])


@ROUTERS
def test_nan_in_a_row_stays_there(router):
    layer, x = moe(router).eval(), torch.randn(6, 6)
    expected = layer(x)
    x[2] = torch.nan
    y = layer(x)
    assert y[2].isnan().all() or router == "expert_choice"
    if router != "expert_choice":
        keep = [0, 1, 3, 4, 5]
        torch.testing.assert_close(y[keep], expected[keep])


def test_record():
    layer = with_all_losses("noisy_top_k", backend="grouped")
    assert layer.record is None
    layer(torch.randn(8, 6))
    record = layer.record
    assert record.index.shape == (8, 2) and record.num_experts == 5 and record.backend == "grouped"
    assert record.load.sum() == 16 and record.node_entropy is None
    assert set(record.losses) == {"importance", "load", "balance", "z"}
    assert not any(loss.requires_grad for loss in record.losses.values())
    weighted = 0.1 * record.losses["importance"] + 0.4 * record.losses["load"]
    weighted = weighted + 0.2 * record.losses["balance"] + 0.3 * record.losses["z"]
    torch.testing.assert_close(record.aux_loss.detach(), weighted)
    assert record.aux_loss.requires_grad

    layer.eval()(torch.randn(3, 6))
    assert layer.record.losses == {} and layer.record.aux_loss.item() == 0


def test_losses_are_those_of_the_ops():
    layer = moe("switch", balance_weight=1.0, z_weight=1.0, importance_weight=1.0, capacity_factor=0.5)
    x = torch.randn(10, 6)
    layer(x)
    logits = x @ layer.gate_weight.T
    probability, index = logits.softmax(1), logits.argmax(1)
    assert (layer.record.index < 0).any()
    # Dropped choices count in the losses.
    expected = {
        "importance": balance.importance(probability * torch.nn.functional.one_hot(index, 5)),
        "balance": balance.switch(probability, index),
        "z": balance.z_loss(logits),
    }
    torch.testing.assert_close(layer.record.losses, {name: loss.detach() for name, loss in expected.items()})


@pytest.mark.parametrize("router", ["switch", "noisy_top_k"])
def test_losses_spread_a_collapsed_router(router):
    keywords = {"balance_weight": 1.0} if router == "switch" else {"importance_weight": 1.0, "load_weight": 1.0}
    layer = moe(router, **keywords)
    x = torch.randn(256, 6)
    x[:, 0] = 1
    with torch.no_grad():
        layer.gate_weight[0, 0] = 5
    layer(x)
    assert layer.record.load.max() > 0.9 * 256
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        layer(x)
        fff.aux_loss(layer).backward()
        optimizer.step()
    assert layer.record.load.max() < 1.5 * layer.record.load.sum() / 5


def test_biases_spread_a_collapsed_router_without_a_gradient():
    layer = moe("sigmoid", top_k=1, bias_update_rate=0.01)
    x = torch.randn(200, 6)
    x[:, 0] = 1
    with torch.no_grad():
        layer.gate_weight[0, 0] = 3
    before = layer.gate_weight.detach().clone()
    layer(x)
    assert layer.record.load[0] > 150
    for _ in range(200):
        layer(x)
        fff.update_biases(layer)
    layer(x)
    assert layer.record.load.max() < 60  # even: 40
    assert torch.equal(layer.gate_weight, before)
    assert "decision_bias" in layer.state_dict()


def test_a_forward_does_not_move_the_biases():
    # Otherwise a recomputed forward would take another route than the first.
    layer = moe("sigmoid", bias_update_rate=0.1)
    layer(torch.randn(9, 6))
    assert layer.decision_bias.abs().max() == 0
    fff.update_biases(layer)
    step = 0.1 * (layer.record.load.double().mean() - layer.record.load).sign()
    torch.testing.assert_close(layer.decision_bias, step.float())
    layer.bias_update_rate = 0.0
    fff.update_biases(layer)
    torch.testing.assert_close(layer.decision_bias, step.float())


@pytest.mark.parametrize("router", ["noisy_top_k", "switch", "mixtral", "sigmoid"])
def test_capacity_limits_training_alone(router):
    layer, x = moe(router, capacity_factor=0.5), torch.randn(16, 6)
    y = layer(x)
    limit = math.ceil(0.5 * layer.top_k * 16 / 5)
    assert layer.record.load.max() <= limit
    lost = (layer.record.index < 0).all(1)
    assert (y[lost] == 0).all()
    layer.eval()(x)
    assert layer.record.load.sum() == 16 * layer.top_k
    assert layer.record.load.max() > limit


def test_expert_choice_takes_its_share():
    layer, x = moe("expert_choice", capacity_factor=1.5), torch.randn(10, 6)
    layer(x)
    assert layer.record.load.tolist() == [6] * 5  # 1.5 * 2 * 10 / 5
    # So a row has 3 of them in the mean.
    assert layer.size.inference_width == 3 * 4 and layer.size.flops_per_row == 2 * 6 * 5 + 2 * (6 + 3) * 12


def test_a_capacity_is_not_rounded_up_twice():
    layer = MoE(6, 4, num_experts=11, top_k=1, router="mixtral", capacity_factor=1.1)
    torch.nn.init.zeros_(layer.gate_weight)  # all rows to one expert
    layer(torch.randn(100, 6))
    assert layer.record.load.max() == 10  # in floating point 1.1 * 100 / 11 is more than 10


def test_top_k_may_change_between_calls():
    layer, x = moe("mixtral").eval(), torch.randn(4, 6)
    layer(x)
    layer.top_k = 4
    layer(x)
    assert layer.record.index.shape == (4, 4)
    assert layer.size.inference_width == 16


def test_zero_start_of_the_noisy_router_spreads_the_rows():
    layer = MoE(6, 4, num_experts=5)
    assert layer.gate_weight.abs().max() == layer.noise_weight.abs().max() == 0
    layer(torch.randn(500, 6))
    # Binomial(500, 2/5): mean 200, standard deviation 11.
    assert ((layer.record.load - 200).abs() < 55).all()
    assert MoE(6, 4, num_experts=5, router="mixtral").gate_weight.abs().min() > 0


def test_initial_weights_are_those_of_linear_layers():
    layer = MoE(100, 25, 10, num_experts=20, router="mixtral", shared_width=400)
    bounds = {"gate_weight": 0.1, "w_in": 0.1, "b_in": 0.1, "w_out": 0.2, "b_out": 0.2, "shared_w_in": 0.1}
    bounds |= {"shared_b_in": 0.1, "shared_w_out": 0.05}
    for name, bound in bounds.items():
        largest = getattr(layer, name).abs().max().item()
        assert 0.97 * bound < largest <= bound, name


def test_size_by_hand():
    size = MoE(20, 16, 10, num_experts=4, top_k=2, shared_width=8).size
    assert size[:4] == (72, 40, 76, 44)
    assert size.flops_per_row == 2 * 20 * 4 + 2 * (20 + 10) * 40


@pytest.mark.parametrize("router", [router for router in TOP_K if router != "expert_choice"])
@pytest.mark.parametrize("glu", [False, True])
def test_flops_are_those_that_run(router, glu):
    layer = moe(router, glu=glu, shared_width=3, bias=False, backend="reference").eval()
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 6))
    assert counter.get_total_flops() == 10 * layer.size.flops_per_row


@pytest.mark.parametrize(
    ("router", "training"),
    [
        ("noisy_top_k", True),
        ("switch", True),
        ("soft", True),
        ("expert_choice", True),
        ("noisy_top_k", False),
        ("sigmoid", False),
        ("expert_choice", False),
    ],
)
def test_compiles_without_graph_breaks(router, training):
    layer = with_all_losses(router, shared_width=2, capacity_factor=None if router == "soft" else 1.0).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for rows in (6, 9):
        x = torch.randn(rows, 6)
        torch.manual_seed(1)
        y = compiled(x)
        compiled_record = layer.record
        torch.manual_seed(1)
        torch.testing.assert_close(y, layer(x))
        assert torch.equal(compiled_record.index, layer.record.index)
        torch.testing.assert_close(compiled_record.aux_loss, layer.record.aux_loss)
        (y.sum() + compiled_record.aux_loss).backward()


@ROUTERS
def test_exports_with_a_dynamic_batch(router):
    layer = moe(router, shared_width=2).eval()
    program = torch.export.export(
        layer, (torch.randn(4, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for rows in (1, 2, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(program(x), layer(x))


@ROUTERS
def test_checkpointing_gives_the_same_gradients(router):
    def gradients(recompute):
        torch.manual_seed(2)
        layer = with_all_losses(router, jitter=0.1, drop=0.2, shared_width=2)
        x = torch.randn(8, 6, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y.square().sum() + fff.aux_loss(layer)).backward()
        return {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}

    plain = gradients(False)
    assert plain["gate_weight"].abs().max() > 0
    torch.testing.assert_close(gradients(True), plain)


@ROUTERS
def test_copies_after_a_forward(router):
    layer, x = with_all_losses(router, bias_update_rate=0.1 if router == "sigmoid" else 0.0), torch.randn(5, 6)
    layer(x)
    fff.update_biases(layer)
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.record is None
        torch.testing.assert_close(other(x), layer(x))
    fresh = moe(router).eval()
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"in_features": 0}, "in_features=0"),
        ({"expert_width": 0}, "expert_width=0"),
        ({"out_features": -1}, "out_features=-1"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 6}, "top_k=6 exceeds num_experts=5"),
        ({"top_k": None}, "top_k=None"),
        ({"router": "hash"}, "router='hash'"),
        ({"router": "switch", "top_k": 2}, "top_k=2"),
        ({"router": "soft", "top_k": 2}, "top_k=2"),
        ({"router": "soft", "top_k": 5, "capacity_factor": 1.0}, "capacity_factor=1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": math.nan}, "capacity_factor=nan"),
        ({"importance_weight": -0.1}, "importance_weight=-0.1"),
        ({"load_weight": 0.1, "router": "mixtral"}, "load_weight=0.1"),
        ({"bias_update_rate": 0.1}, "bias_update_rate=0.1"),
        ({"balance_weight": 0.1, "router": "soft", "top_k": 5}, "balance_weight=0.1, but router='soft'"),
        ({"balance_weight": 0.1, "router": "expert_choice"}, "balance_weight=0.1, but router='expert_choice'"),
        ({"jitter": 1.5}, "jitter=1.5"),
        ({"drop": -0.1}, "drop=-0.1"),
        ({"shared_width": -1}, "shared_width=-1"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"backend": "grouped", "router": "soft", "top_k": 5}, "backend='grouped'"),
        ({"act_layer": "tanhh"}, "act_layer='tanhh'"),
        ({"z_weight": "0.1"}, "z_weight='0.1' must be a number"),
        ({"jitter": None}, "jitter=None must lie"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        MoE(**{"in_features": 6, "expert_width": 4, "num_experts": 5} | keywords)


def test_bad_input():
    layer = moe("mixtral")
    layer.load_weight = 0.1
    with pytest.raises(ValueError, match="load_weight=0.1 needs the noise"):
        layer(torch.randn(2, 6))
    layer.load_weight, layer.bias_update_rate = 0.0, 0.1
    with pytest.raises(ValueError, match="bias_update_rate=0.1 needs router='sigmoid'"):
        layer(torch.randn(2, 6))
    layer.bias_update_rate, layer.top_k = 0.0, 6
    with pytest.raises(ValueError, match="top_k=6 exceeds num_experts=5"):
        layer(torch.randn(2, 6))
    layer.top_k = 2
    with pytest.raises(ValueError, match="in_features=6"):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match="int64"):
        layer(torch.ones(2, 6, dtype=torch.int64))


def test_backends_agree():
    x = torch.randn(11, 6, dtype=torch.float64)
    results = []
    for backend in ("reference", "grouped", "gather"):
        torch.manual_seed(4)
        layer = moe("mixtral", backend=backend, capacity_factor=0.7).double()
        y = layer(x)
        y.square().sum().backward()
        assert layer.record.backend == backend
        results.append([y.detach(), *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_bias_balancing_follows_what_rows_chose_not_what_a_capacity_let_through():
    layer = MoE(2, 2, num_experts=2, top_k=1, router="sigmoid", capacity_factor=0.5, bias_update_rate=0.1)
    with torch.no_grad():
        layer.gate_weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    layer(torch.tensor([[1.0, 0.0]] * 6 + [[-1.0, 0.0]] * 2))
    assert layer.record.load.tolist() == [2, 2] and layer.record.demanded_load.tolist() == [6, 2]
    layer.update_bias()
    torch.testing.assert_close(layer.decision_bias, torch.tensor([-0.1, 0.1]))
