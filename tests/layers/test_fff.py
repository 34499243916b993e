"""The fast feedforward layer: its modes equal one another where they must, and every gradient is right."""

import pytest
import torch

from fff import FFF, FeedForward, UltraFFF, aux_loss, soft_evaluation, update_biases
from fff.ops.expert_mlp import cpu, expert_mlp
from fff.ops.tree_route import dense_logits, leaf_probability, path_to

VARIANTS = {
    "soft": {},
    "straight_through": {"mode": "straight_through"},
    "gated": {"mode": "gated"},
    "additive": {"soft_gate": "additive"},
    "no bias": {"bias": False},
    "glu": {"glu": True, "mode": "gated", "act_layer": "silu"},
    "wide nodes": {"node_width": 3, "mode": "straight_through"},
    "two leaves": {"top_k": 2, "mode": "straight_through"},
    "two gated leaves, wide beam": {"top_k": 2, "beam_width": 4, "mode": "gated"},
    "three trees": {"num_trees": 3, "mode": "straight_through"},
    "three soft trees": {"num_trees": 3},
    "master leaf": {"master_width": 2},
    "master leaf, gated": {"master_width": 2, "mode": "gated"},
    "bias balancing": {"bias_update_rate": 0.1, "mode": "straight_through"},
    "deep": {"depth": 9, "mode": "straight_through"},
    "deep wide nodes": {"depth": 8, "mode": "gated", "node_width": 2},
}
WEIGHTS = {"hardening_weight": 0.5, "balance_weight": 0.3, "node_balance_weight": 0.2}


def build(variant, **kwargs):
    return FFF(6, 2, 4, **{"depth": 3, **VARIANTS[variant], **kwargs}).double()


def rows(count, requires_grad=False):
    return torch.randn(count, 6, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "deep" not in v])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_output_and_losses(variant, training):
    layer = build(variant, **WEIGHTS).train(training)
    x = rows(4, requires_grad=True)
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if p.numel()), strict=True)

    def run(x, *values):
        y = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return (y, layer.record.aux_loss)

    # The value of p / stop_gradient(p) is constant: finite differences see the leaves' part alone. That of the nodes is
    # held against the formula in the next test.
    if layer.mode == "straight_through" and (training or layer.top_k > 1):
        parameters = [p.detach() if n.startswith("node") else p for n, p in zip(names, parameters, strict=True)]
        x = x.detach()
        assert torch.autograd.gradcheck(lambda *values: run(x, *values)[0], parameters)
    else:
        assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("variant", ["straight_through", "wide nodes", "three trees", "master leaf"])
def test_straight_through_gradient_is_that_of_p_times_the_constant_output(variant):
    """d/dnode of p / sg(p) * y equals d/dnode of log p * y, here built from the soft probabilities of all leaves."""
    layer = build(variant, mode="straight_through", master_width=0)
    x, readout = rows(7), torch.randn(7, 4, dtype=torch.float64)
    nodes = [p for n, p in layer.named_parameters() if n.startswith("node")]
    actual = torch.autograd.grad((layer(x) * readout).sum(), nodes)

    leaf = layer.record.index.view(7, layer.num_trees) - torch.arange(layer.num_trees) * 8
    probability = leaf_probability(dense_logits(x, layer._nodes(), 3))
    chosen = probability.gather(2, leaf.unsqueeze(-1)).squeeze(-1)
    outputs = []
    for t in range(layer.num_trees):
        e = layer.record.index[:, t]
        hidden = torch.relu(torch.einsum("td,tld->tl", x, layer.w_in[e]) + layer.b_in[e])
        outputs.append(((torch.einsum("tl,tlo->to", hidden, layer.w_out[e]) + layer.b_out[e]) * readout).sum(-1))
    expected = torch.autograd.grad((chosen.log() * torch.stack(outputs, 1).detach()).sum(), nodes)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "mode" in VARIANTS[v]])
def test_hard_training_output_equals_evaluation_output(variant):
    layer, x = build(variant), rows(33)
    training = layer(x)
    torch.testing.assert_close(training, layer.eval()(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("variant", ["soft", "three soft trees", "master leaf", "no bias"])
def test_soft_output_tends_to_the_hard_one_as_logits_grow(variant):
    layer, x = build(variant), rows(33)
    gaps = []
    for _ in range(3):
        with torch.no_grad():
            for name in ("node_weight", "node_bias"):
                if getattr(layer, name) is not None:
                    getattr(layer, name).mul_(100)
            gaps.append((layer.train()(x) - layer.eval()(x)).abs().max().item())
    assert gaps[0] > 1e-9 and gaps[-1] < 1e-9


def test_an_additive_mixture_need_not_harden_to_the_greedy_leaf():
    layer, x = build("additive", depth=4), rows(200)
    with torch.no_grad():
        layer.node_weight.mul_(1e4), layer.node_bias.mul_(1e4)
    differs = ((layer.train()(x) - layer.eval()(x)).abs() > 1e-6).any(1).double().mean().item()
    assert 0.05 < differs < 0.95


def test_temperature_softens_probabilities_and_losses_but_no_decision():
    layers = [build("soft", temperature=t, **WEIGHTS) for t in (1.0, 0.01)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = rows(40)
    warm, cold = (layer(x) for layer in layers)
    assert torch.equal(layers[0].record.index, layers[1].record.index)
    torch.testing.assert_close(cold, layers[0].eval()(x), rtol=0.2, atol=0.2)
    assert not torch.allclose(warm, cold, atol=1e-3)
    assert layers[1].record.losses["hardening"] < 0.2
    assert layers[1].record.node_entropy.mean() < 0.2


@pytest.mark.parametrize("mode", ["soft", "straight_through", "gated"])
def test_depth_0_is_a_dense_layer(mode):
    tree, dense = FFF(6, 5, 4, depth=0, mode=mode).double(), FeedForward(6, 5, 4).double()
    missing = dense.load_state_dict({k: v for k, v in tree.state_dict().items() if not k.startswith("node")})
    assert not missing.missing_keys
    x = rows(9)
    for training in (True, False):
        torch.testing.assert_close(tree.train(training)(x), dense(x))


def test_all_zero_nodes_weigh_all_leaves_alike():
    """FFF paper, section 3: with node weights 0 a soft tree is one wide layer up to a rescaling by 2^-d."""
    layer = build("soft")
    with torch.no_grad():
        layer.node_weight.zero_(), layer.node_bias.zero_()
    wide = FeedForward(6, 16, 4).double()
    with torch.no_grad():
        wide.w_in.copy_(layer.w_in.flatten(0, 1)[None]), wide.b_in.copy_(layer.b_in.flatten()[None])
        wide.w_out.copy_(layer.w_out.flatten(0, 1)[None] / 8), wide.b_out.copy_(layer.b_out.mean(0, keepdim=True))
    x = rows(5)
    torch.testing.assert_close(layer(x), wide(x))


def test_state_dicts_load_across_modes():
    source, x = build("soft"), rows(20)
    hard = build("straight_through")
    hard.load_state_dict(source.state_dict())
    assert torch.equal(source.eval()(x), hard.eval()(x))
    with soft_evaluation(hard):
        torch.testing.assert_close(hard(x), source.train()(x))
    assert not hard.soft_eval


def test_gated_value_is_probability_times_leaf():
    gated, plain, x = build("gated"), build("straight_through"), rows(9)
    plain.load_state_dict(gated.state_dict())
    probability = leaf_probability(dense_logits(x, gated._nodes(), 3)).squeeze(1)
    expected = plain(x) * probability.gather(1, plain.record.index)
    torch.testing.assert_close(gated(x), expected)


def test_a_leaked_row_weighs_its_leaf_as_the_swapped_probabilities_do():
    layer, x = build("gated", depth=1, region_leak=1.0), rows(20)
    evaluated = layer.eval()(x)
    kept = layer.record.index
    p = torch.sigmoid(torch.nn.functional.linear(x, layer.node_weight, layer.node_bias))
    sure = torch.where(kept == 1, p, 1 - p)  # of the leaf that the row would have taken
    trained = layer.train()(x)
    assert torch.equal(layer.record.index, 1 - kept)
    other = expert_mlp(x, 1 - kept, sure, layer.w_in, layer.b_in, layer.w_out, layer.b_out)
    torch.testing.assert_close(trained, other)
    assert not torch.allclose(trained, evaluated)


def test_region_leak_acts_in_training_only():
    for mode in ("soft", "straight_through"):
        layer, x = build("soft", mode=mode, region_leak=0.5), rows(64)
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))


def test_a_tree_of_one_node_with_its_runner_up_is_the_soft_mixture():
    """Its only decision is always the one turned over; value and every gradient are those of both leaves."""
    pair, soft = (build(mode, depth=1, temperature=0.7) for mode in ("straight_through", "soft"))
    pair.runner_up = True
    soft.load_state_dict(pair.state_dict())
    x, readout = rows(9), torch.randn(9, 4, dtype=torch.float64)
    gradients = []
    for layer in (pair, soft):
        y = layer(x)
        gradients.append((y, *torch.autograd.grad((y * readout).sum(), list(layer.parameters()))))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_trees", [1, 2])
def test_the_runner_up_lies_behind_one_turned_decision(num_trees):
    layer = build("straight_through", num_trees=num_trees, runner_up=True, **WEIGHTS)
    plain = build("straight_through", num_trees=num_trees, **WEIGHTS)
    plain.load_state_dict(layer.state_dict())
    x = rows(50)
    y, evaluated = layer(x), plain(x)
    leaf = layer.record.index.view(50, num_trees, 2)
    assert torch.equal(leaf[..., 0], plain.record.index)
    within = leaf % 8
    changed = within[..., 0] ^ within[..., 1]
    # Above the turned decision both paths agree; all levels are turned at some row.
    assert set((changed.float().log2().floor()).unique().tolist()) == {0.0, 1.0, 2.0}
    logits = dense_logits(x, layer._nodes(), 3)
    decided = [within[..., 1] >> 2 & 1, within[..., 1] >> 1 & 1, within[..., 1] & 1]
    node = torch.zeros_like(within[..., 1])
    against = torch.zeros_like(node)
    for bit in decided:
        against += ((logits.gather(2, node.unsqueeze(-1)).squeeze(-1) >= 0) != bit.bool()).long()
        node = 2 * node + 1 + bit
    assert (against == 1).all()
    # Each tree's pair weighs as its probabilities do.
    p = leaf_probability(logits).gather(2, within)
    gate = (p / p.sum(-1, keepdim=True)).flatten(1)
    expected = expert_mlp(x, leaf.flatten(1), gate, layer.w_in, layer.b_in, layer.w_out, layer.b_out)
    torch.testing.assert_close(y, expected)
    readout, parameters = torch.randn(50, 4, dtype=torch.float64), list(layer.parameters())
    gradients = [torch.autograd.grad((out * readout).sum(), parameters, retain_graph=True) for out in (y, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    # The losses are those of the route that is evaluated.
    torch.testing.assert_close(layer.record.losses, plain.record.losses)
    torch.testing.assert_close(layer.eval()(x), evaluated)
    assert layer.size == plain.size


def test_at_a_low_temperature_the_least_certain_decision_is_turned():
    layer = build("straight_through", runner_up=True, temperature=1e-6)
    x = rows(50)
    layer(x)
    greedy, other = layer.record.index.unbind(1)
    path = path_to(greedy.view(-1, 1, 1), 3)
    logits = dense_logits(x, layer._nodes(), 3).gather(2, path.node.flatten(2)).view(50, 3)
    # The first level at which two leaves part: 0 at the root, where their highest bits differ.
    parted = 2 - (greedy ^ other).double().log2().floor().long()
    assert torch.equal(parted, logits.abs().argmin(1))


def test_a_runner_up_that_is_set_later_is_checked_as_well():
    layer = build("two leaves")
    layer.runner_up = True
    with pytest.raises(ValueError, match="top_k=2"):
        layer(rows(3))


def test_load_counts_the_hard_choice_in_every_mode():
    loads = []
    source, x = build("soft"), rows(50)
    for mode in ("soft", "straight_through", "gated"):
        layer = build("soft", mode=mode)
        layer.load_state_dict(source.state_dict())
        for training in (True, False):
            layer.train(training)(x)
            loads.append(layer.record.load)
    assert all(torch.equal(load, loads[0]) for load in loads)
    assert loads[0].sum() == 50


def test_node_entropy_of_the_record():
    layer, x = build("deep"), rows(40)
    layer(x)
    logits = torch.nn.functional.linear(x, layer.node_weight, layer.node_bias)
    p = torch.sigmoid(logits)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    recorded = layer.record.node_entropy.double()
    torch.testing.assert_close(recorded[:127], entropy[:, :127].mean(0), rtol=1e-5, atol=1e-5)
    heap = layer.record.index[:, 0] + 2**9
    for shift in (2, 1):  # the two levels below the dense ones
        node = (heap >> shift) - 1
        for i in node.unique():
            seen = node == i
            torch.testing.assert_close(recorded[i], entropy[seen, i].mean(), rtol=1e-5, atol=1e-5)
    unseen = torch.ones(511, dtype=torch.bool)
    unseen[:127] = False
    unseen[(heap >> 2) - 1] = unseen[(heap >> 1) - 1] = False
    assert recorded[unseen].isnan().all() and not recorded[~unseen].isnan().any()


def test_auxiliary_losses_are_weighted_and_named():
    for mode in ("soft", "straight_through"):
        layer = build("soft", mode=mode, **WEIGHTS)
        layer(rows(30))
        losses = layer.record.losses
        assert set(losses) == {"hardening", "balance", "node_balance"}
        expected = 0.5 * losses["hardening"] + 0.3 * losses["balance"] + 0.2 * losses["node_balance"]
        torch.testing.assert_close(aux_loss(layer).detach(), expected)
        layer.eval()(rows(3))
        assert aux_loss(layer) == 0


def test_bias_balancing_moves_decisions_towards_the_unused_child():
    layer = FFF(1, 1, 1, depth=2, mode="straight_through", bias_update_rate=0.5)
    with torch.no_grad():
        layer.node_weight.zero_(), layer.node_bias.copy_(torch.tensor([0.3, -0.4, 0.7]))
    x = torch.zeros(10, 1)
    layer(x)
    assert layer.record.load.tolist() == [0, 0, 0, 10]
    update_biases(layer)
    # Node 0 and node 2 sent all rows right, so their biases fall; node 1 saw none and stays.
    assert layer.decision_bias.tolist() == [-0.5, 0.0, -0.5]
    layer(x)
    assert layer.record.load.tolist() == [10, 0, 0, 0]
    update_biases(layer)
    assert layer.decision_bias.tolist() == [0.0, 0.5, -0.5]


def test_the_balance_loss_of_a_hard_tree_spreads_rows():
    """A few steps of the balance loss alone must even out a tree that starts one-sided."""
    layer, x = FFF(6, 2, 4, depth=3, mode="straight_through", balance_weight=1.0), torch.randn(256, 6)
    with torch.no_grad():
        layer.node_bias.fill_(2.0)
    layer(x)
    assert layer.record.load.max() > 0.75 * 256
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(60):
        layer(x)
        optimizer.zero_grad()
        aux_loss(layer).backward()
        optimizer.step()
    assert layer.record.load.max() < 0.25 * 256


@pytest.mark.parametrize("width", [1, 2])
def test_size_counts_the_parameters_that_it_says(width):
    """Table 3 of the FFF paper: leaf 4, depth 5 trains 159 neurons and infers with 9."""
    size = FFF(128, 4, 128, depth=5, node_width=width).size
    assert (size.training_width, size.inference_width) == (128, 4)
    assert (size.training_size, size.inference_size) == (128 + 31 * width, 4 + 5 * width)
    assert FFF(128, 4, 128, depth=5).size.flops_per_row == 2 * (5 * 128 + 4 * 256)
    assert FFF(8, 4, 3, depth=3, num_trees=2, top_k=2, master_width=5).size[:4] == (69, 21, 83, 31)
    assert UltraFFF(8, 3, depth=3, num_trees=2).size == (30, 8, 30, 8, 2 * 8 * 11)


def test_ultra_fff_is_the_walk_of_the_paper():
    """y += act(lambda_i) w_out[i]; i = 2i + 1 + [lambda_i >= 0], summed over trees, one row after the other."""
    for depth, trees, backend in ((0, 1, "auto"), (3, 2, "dense"), (3, 2, "gather"), (7, 1, "auto"), (9, 2, "auto")):
        layer, x = UltraFFF(6, 4, depth=depth, num_trees=trees, backend=backend).double(), rows(5)
        per_tree = 2 ** (depth + 1) - 1
        expected = torch.zeros(5, 4, dtype=torch.float64)
        for t in range(5):
            for tree in range(trees):
                i = 0
                for _ in range(depth + 1):
                    neuron = tree * per_tree + i
                    logit = x[t] @ layer.w_in[neuron] + layer.b_in[neuron]
                    expected[t] += torch.nn.functional.gelu(logit) * layer.w_out[neuron]
                    i = 2 * i + 1 + int(logit >= 0)
        torch.testing.assert_close(layer(x), expected)
        assert layer.record.load.shape == (trees * 2**depth,) and layer.record.load.sum() == 5 * trees


@pytest.mark.parametrize("depth, backend", [(3, "dense"), (3, "gather"), (8, "gather")])
def test_ultra_fff_gradcheck(depth, backend):
    layer = UltraFFF(6, 4, depth=depth, num_trees=2, backend=backend).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = rows(3, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    if depth == 8:  # too many parameters for finite differences one by one
        assert torch.autograd.gradcheck(lambda x: run(x, *parameters), (x,))
    else:
        assert torch.autograd.gradcheck(run, (x, *parameters))


def test_feedforward_gradcheck():
    layer = FeedForward(6, 3, 4, act_layer="gelu", glu=True).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (rows(3, requires_grad=True), *parameters))


@pytest.mark.parametrize("backend", ["grouped", "native"])
def test_parallel_trees_are_balanced_as_each_would_be_alone(backend):
    """By the kernels leaves are counted over all trees, and their balance within each."""
    if backend == "native" and not cpu.available():
        pytest.skip("the native operators are not built")
    options = {"depth": 3, "mode": "straight_through", "balance_weight": 0.5, "backend": backend}
    forest, x = FFF(6, 4, 3, num_trees=3, **options), torch.randn(40, 6)
    forest(x)
    alone = []
    for p in range(3):
        tree = FFF(6, 4, 3, **options)
        tree.node_weight.data, tree.node_bias.data = forest.node_weight[7 * p :][:7], forest.node_bias[7 * p :][:7]
        tree(x)
        alone.append(tree.record.losses["balance"])
    assert len(set(alone)) == 3
    torch.testing.assert_close(forest.record.losses["balance"], torch.stack(alone).mean())
    (gradient,) = torch.autograd.grad(forest.record.aux_loss, [forest.node_weight])
    assert gradient.any(1).unflatten(0, (3, 7))[:, 0].all()  # of every root
