"""The fast feedforward layer: a binary tree of hyperplanes that sends each row to one small feedforward leaf.

T rows, D input width, P parallel trees, d depth, E = P 2^d leaves, L leaf width, N = P (2^d - 1) nodes, K leaves of
each tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fff.layers.base import ExpertLayer
from fff.layers.check import (
    check_above_zero,
    check_choice,
    check_depth,
    check_non_negative,
    check_positive,
    check_probability,
    check_width,
)
from fff.layers.contract import Record, Size, TreeTrace
from fff.layers.init import uniform_fan_in_
from fff.ops import balance
from fff.ops.activation import Activation, activation_name, resolve_activation
from fff.ops.context import exporting, without_autocast
from fff.ops.expert_mlp import BACKENDS, HARD_BACKENDS, Backend, choose_backend, cpu, expert_mlp
from fff.ops.tree_route import (
    DENSE_LEVELS,
    Nodes,
    Path,
    additive_leaf_probability,
    beam_leaves,
    dense_logits,
    greedy_leaf,
    leaf_probability,
    path_log_probability,
    path_logits,
    path_to,
    triton_descent,
    turned_decision,
)


class _Routing(NamedTuple):
    """index: (T, P K) leaves, counted over all trees.  gate: (T, P K), or (T, E) when soft; None: all 1."""

    index: Tensor
    gate: Tensor | None
    losses: dict[str, Tensor]
    trace: TreeTrace


Mode = Literal["soft", "straight_through", "gated"]
SoftGate = Literal["sigmoid", "additive"]
MAX_DEPTH = 15


class FFF(ExpertLayer):
    """Fast feedforward layer (Belcak & Wattenhofer 2023, arXiv 2308.14711), with hard and soft training.

    in_features, leaf_width, out_features: D, L and O; out_features defaults to in_features.
    depth: 0 .. 15; the tree has 2^depth leaves. Depth 0 is a dense layer of width L.
    mode: how it trains, and with which weight the chosen leaf counts.
        "soft" trains every leaf, weighted by the sigmoids on its path; evaluation runs the greedy leaf with weight 1.
        That is another function, and may be far worse unless decisions were hardened: set `hardening_weight` (the
        paper's is 3), and compare under `fff.soft_evaluation`.
        "straight_through" runs the greedy leaf alone, its weight p / stop_gradient(p): 1 in value, with the gradient of
        the path probability p. Training and evaluation compute the same, but for the second leaf of `runner_up`.
        "gated" runs the greedy leaf with weight p in training and evaluation.
        The two hard modes collapse to few leaves without a balance loss.
    top_k: leaves per tree in hard routing, found by a beam of `beam_width` (default top_k) paths. Their weights are
        p / sum(p) ("gated": p). With a beam of width 1, the default for one leaf, it is the greedy leaf; a wider beam
        finds more probable leaves, which is another decision.
    num_trees: parallel trees, whose outputs are added.
    node_width: hidden units n of the node networks <D, n, 1>; 1 is a single hyperplane.
    master_width: width of a dense leaf that sees every row; the output is then s * tree + (1 - s) * master with a
        trainable s = sigmoid(master_mix) (arXiv 2405.16836).
    base: the leaves of a tree deviate from one leaf that they have in common (`ExpertLayer`).
    soft_gate: "sigmoid", or "additive" for a softmax over leaves of signed node logits ("soft" mode only). However
        hard its decisions, an additive mixture need not tend to the greedy leaf that evaluation runs.
    temperature: divides node logits in probabilities and losses; greedy decisions do not depend on it.
    region_leak: probability with which a node's two children are swapped for a row, in training.
    runner_up: "straight_through" only: in training each row also runs the leaf that it would have reached with one
        decision turned over, drawn with probability proportional to exp(-|logit|), and both leaves weigh p / sum(p). A
        single leaf of weight 1 does not tell its nodes what the other side would have answered; two leaves do.
        Evaluation runs the greedy leaf alone. Ours; training runs twice the leaves.
    hardening_weight: times the mean entropy of the node decisions (all nodes when soft, those on the path when hard).
    balance_weight: times `leaf_balance` when soft, times `path_balance` when hard; 1 each where leaves are used evenly.
    node_balance_weight: times the per-node balance of soft decision trees, over the first 7 levels in hard modes.
    bias_update_rate: > 0 balances the hard modes by decision biases without a loss; call `fff.update_biases(model)`
        after each step. The biases are part of the state dict; in bfloat16 they lose their small steps, so keep
        parameters in float32 and train under autocast.
    act_layer, glu, bias, drop: activation (a name of `fff.ops.activation`, a function or a module class), gated hidden
        units, biases of leaves and nodes, dropout of hidden units.
    backend: of the expert computation in hard routes, see `fff.ops.expert_mlp`; the soft mixture takes "dense" unless
        it is "reference".
    soft_eval: evaluate the soft mixture instead of the hard route; `fff.soft_evaluation(model)` sets it for a while.

    hardening_weight, balance_weight, node_balance_weight, temperature, region_leak, runner_up, drop and soft_eval may
    be changed between steps. A row with a nan goes left at every node whose logit is nan. Under autocast the tree
    decides in the type of its parameters.
    """

    router_names = ("node_weight", "node_bias", "node_out_weight", "node_out_bias")

    def __init__(
        self,
        in_features: int,
        leaf_width: int,
        out_features: int | None = None,
        *,
        depth: int,
        mode: Mode = "soft",
        act_layer: Activation = "relu",
        glu: bool = False,
        bias: bool = True,
        drop: float = 0.0,
        top_k: int = 1,
        beam_width: int | None = None,
        num_trees: int = 1,
        node_width: int = 1,
        master_width: int = 0,
        base: bool = False,
        soft_gate: SoftGate = "sigmoid",
        temperature: float = 1.0,
        region_leak: float = 0.0,
        runner_up: bool = False,
        hardening_weight: float = 0.0,
        balance_weight: float = 0.0,
        node_balance_weight: float = 0.0,
        bias_update_rate: float = 0.0,
        soft_eval: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        beam_width = top_k if beam_width is None else beam_width
        check_positive(
            in_features=in_features,
            leaf_width=leaf_width,
            out_features=out_features,
            num_trees=num_trees,
            node_width=node_width,
            top_k=top_k,
            beam_width=beam_width,
        )
        check_depth(depth, MAX_DEPTH)
        check_width(master_width=master_width)
        if top_k > 2**depth:
            raise ValueError(f"top_k={top_k} exceeds the number of leaves of one tree, {2**depth}")
        if beam_width < top_k:
            raise ValueError(f"beam_width={beam_width} is smaller than top_k={top_k}")
        check_choice("mode", mode, get_args(Mode))
        check_choice("soft_gate", soft_gate, get_args(SoftGate))
        if soft_gate == "additive" and mode != "soft":
            raise ValueError(f"soft_gate='additive' normalises over all leaves and needs mode='soft', not {mode!r}")
        check_probability(drop=drop, region_leak=region_leak)
        check_non_negative(
            hardening_weight=hardening_weight,
            balance_weight=balance_weight,
            node_balance_weight=node_balance_weight,
            bias_update_rate=bias_update_rate,
        )
        if bias_update_rate and mode == "soft":
            raise ValueError(f"bias_update_rate={bias_update_rate!r} moves decisions, not the mixture of mode='soft'")
        check_above_zero(temperature=temperature)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.in_features, self.leaf_width, self.out_features, self.depth = in_features, leaf_width, out_features, depth
        self.mode, self.soft_gate, self.soft_eval, self.backend = mode, soft_gate, soft_eval, backend
        self.act, self.glu, self.drop = resolve_activation(act_layer, "act_layer"), glu, drop
        self.top_k, self.beam_width, self.num_trees = top_k, beam_width, num_trees
        self.node_width, self.master_width = node_width, master_width
        self.temperature, self.region_leak, self.runner_up = temperature, region_leak, runner_up
        self.hardening_weight, self.balance_weight = hardening_weight, balance_weight
        self.node_balance_weight, self.bias_update_rate = node_balance_weight, bias_update_rate

        leaves, nodes = num_trees * 2**depth, num_trees * (2**depth - 1)
        rows = leaf_width * (2 if glu else 1)
        self.w_in = nn.Parameter(torch.empty(leaves, rows, in_features))
        self.b_in = nn.Parameter(torch.empty(leaves, rows)) if bias else None
        self.w_out = nn.Parameter(torch.empty(leaves, leaf_width, out_features))
        self.b_out = nn.Parameter(torch.empty(leaves, out_features)) if bias else None
        wide = (node_width,) if node_width > 1 else ()
        self.node_weight = nn.Parameter(torch.empty(nodes, *wide, in_features))
        self.node_bias = nn.Parameter(torch.empty(nodes, *wide)) if bias else None
        self.node_out_weight = nn.Parameter(torch.empty(nodes, node_width)) if wide else None
        self.node_out_bias = nn.Parameter(torch.empty(nodes)) if wide and bias else None
        self._add_base(num_trees if base else 0)
        if master_width:
            rows = master_width * (2 if glu else 1)
            self.master_w_in = nn.Parameter(torch.empty(1, rows, in_features))
            self.master_b_in = nn.Parameter(torch.empty(1, rows)) if bias else None
            self.master_w_out = nn.Parameter(torch.empty(1, master_width, out_features))
            self.master_b_out = nn.Parameter(torch.empty(1, out_features)) if bias else None
            self.master_mix = nn.Parameter(torch.empty(()))
        self.register_buffer("decision_bias", torch.zeros(nodes) if bias_update_rate > 0 else None)
        if depth == 0:  # no nodes: nothing for DistributedDataParallel to wait for
            for parameter in (self.node_weight, self.node_bias, self.node_out_weight, self.node_out_bias):
                if parameter is not None:
                    parameter.requires_grad_(False)
        self._check_region_leak()
        self._check_runner_up()
        self.reset_parameters()

    def _check_region_leak(self) -> None:
        beam = self.mode != "soft" and self.beam_width > 1
        if self.region_leak and (beam or self.runner_up or self.soft_gate == "additive"):
            raise ValueError(
                f"region_leak={self.region_leak!r} swaps the children of one path or of sigmoids; it means nothing for "
                f"mode={self.mode!r}, beam_width={self.beam_width}, runner_up={self.runner_up}, "
                f"soft_gate={self.soft_gate!r}"
            )

    def _check_runner_up(self) -> None:
        if self.runner_up and (self.mode != "straight_through" or self.beam_width > 1 or self.bias_update_rate):
            raise ValueError(
                "runner_up=True sets one leaf beside the greedy one of mode='straight_through'; it means nothing for "
                f"mode={self.mode!r}, top_k={self.top_k}, beam_width={self.beam_width}, "
                f"bias_update_rate={self.bias_update_rate!r}"
            )

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan in), as `nn.Linear` and the authors' package; parallel trees share one fan-in."""
        w_in, b_in, w_out, b_out = self._begin()
        uniform_fan_in_(self.in_features, w_in, b_in, self.node_weight, self.node_bias)
        uniform_fan_in_(self.leaf_width * self.num_trees, w_out, b_out)
        uniform_fan_in_(self.node_width, self.node_out_weight, self.node_out_bias)
        if self.master_width:
            uniform_fan_in_(self.in_features, self.master_w_in, self.master_b_in)
            uniform_fan_in_(self.master_width, self.master_w_out, self.master_b_out)
            nn.init.constant_(self.master_mix, 0.5)
        if self.decision_bias is not None:
            self.decision_bias.zero_()

    @property
    def num_leaves(self) -> int:
        return self.num_trees * 2**self.depth

    @property
    def size(self) -> Size:
        """Nodes on the way count as evaluated once per row and path of the beam."""
        visited = self.num_trees * sum(min(2**level, self.beam_width) for level in range(self.depth))
        training_width = self.num_leaves * self.leaf_width + self.master_width
        inference_width = self.num_trees * self.top_k * self.leaf_width + self.master_width
        node_flops = 2 * self.in_features * self.node_width + (2 * self.node_width if self.node_width > 1 else 0)
        leaf_flops = 2 * (self.in_features * (2 if self.glu else 1) + self.out_features)
        return Size(
            training_width,
            inference_width,
            training_width + self.num_trees * (2**self.depth - 1) * self.node_width,
            inference_width + visited * self.node_width,
            visited * node_flops + inference_width * leaf_flops,
        )

    def _nodes(self) -> Nodes:
        def per_tree(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.unflatten(0, (self.num_trees, -1 if self.depth else 0))

        return Nodes(
            per_tree(self.node_weight),
            per_tree(self.node_bias),
            per_tree(self.node_out_weight),
            per_tree(self.node_out_bias),
            self.act,
        )

    def _leaves(self, x: Tensor, nodes: Nodes, top: Tensor, flip: Tensor | None) -> Tensor:
        """(T, P, K) chosen leaves, counted within each tree."""
        bias = None if self.decision_bias is None else self.decision_bias.view(self.num_trees, -1)
        if self.beam_width == 1:
            return greedy_leaf(x, nodes, self.depth, top, decision_bias=bias, flip=flip)
        return beam_leaves(
            x,
            nodes,
            self.depth,
            top,
            top_k=self.top_k,
            beam_width=self.beam_width,
            decision_bias=bias,
            temperature=self.temperature,
        )

    def _expert_index(self, leaf: Tensor) -> Tensor:
        """(T, P, K) leaves within each tree -> (T, P K) leaves of the layer."""
        if self.num_trees > 1:
            leaf = leaf + torch.arange(self.num_trees, device=leaf.device).view(1, -1, 1) * 2**self.depth
        return leaf.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        y, record = self._native(rows) or self._pytorch(rows)
        if self.master_width:
            master = self.master_w_in, self.master_b_in, self.master_w_out, self.master_b_out
            share = torch.sigmoid(self.master_mix).to(y.dtype)
            y = share * y + (1 - share) * self._compute(rows, None, None, *master, backend="auto")
        if not exporting():
            # nn.Module's own assignment takes a microsecond longer.
            object.__setattr__(self, "record", record)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _native(self, rows: Tensor) -> tuple[Tensor, Record] | None:
        """Descent and leaf in one native call, where that is all there is to do and the operator can take it."""
        hard = not (self.training or self.soft_eval or self.trace_nodes)
        one_leaf = self.beam_width == self.node_width == 1 and self.mode != "gated"
        if not (hard and one_leaf and self.backend in ("auto", "native")):
            return None
        weights = [*self._tensors("node_weight", "node_bias"), *self.experts()]
        if weights[0].dtype != weights[2].dtype:  # nodes of a wider type than the leaves
            return None
        act = activation_name(self.act)
        if exporting() or cpu.records_gradient(rows, *weights) or cpu.refusal(act, rows, None, *weights) is not None:
            return None  # the other way has gradients, or says what is wrong if "native" was asked for
        nodes = *weights[:2], self._buffers["decision_bias"]
        y, index, logit = cpu.tree_mlp(rows, *nodes, self.num_trees, self.depth, *weights[2:], act, self.glu)
        trace = TreeTrace(self.depth, index, visited=logit if self.temperature == 1 else logit / self.temperature)
        return y, Record(logit.new_zeros(()), {}, index, self.num_leaves, "native", trace)

    def _pytorch(self, rows: Tensor) -> tuple[Tensor, Record]:
        soft = self.mode == "soft" if self.training else self.soft_eval
        with without_autocast(rows):
            routing = self._route(rows.to(self.node_weight.dtype), soft)
        # A backend for chosen leaves cannot run the soft mixture; that one is "dense" then.
        wanted = "auto" if soft and self.backend in HARD_BACKENDS else self.backend
        index = None if soft else routing.index
        # Logits may have been summed in a wider type.
        experts = self.experts()
        gate = None if routing.gate is None else routing.gate.to(experts[0].dtype)
        call = rows, index, gate, *experts
        drop = self.drop if self.training else 0.0
        backend = choose_backend(wanted, *call, activation=self.act, dropout=drop)
        return self._compute(*call, backend=backend), self._record(routing, backend)

    def _compute(self, *call: Tensor | None, backend: str) -> Tensor:
        drop = self.drop if self.training else 0.0
        return expert_mlp(*call, activation=self.act, glu=self.glu, dropout=drop, backend=backend)

    def _route(self, x: Tensor, soft: bool) -> _Routing:
        """What the tree decides for the rows x, and the losses of these decisions."""
        leak = self.region_leak if self.training else 0.0
        # These may have been set since.
        if leak:
            self._check_region_leak()
        self._check_runner_up()
        flip = None
        if leak and not soft:
            flip = torch.rand(x.shape[0], self.num_trees, self.depth, device=x.device) < leak
        descend = None if soft else self._descent(x, flip)
        if descend is not None:
            return self._descended(x, descend, flip)
        nodes = self._nodes()
        raw = dense_logits(x, nodes, self.depth if soft else min(self.depth, DENSE_LEVELS))
        top = raw if self.temperature == 1 else raw / self.temperature
        # When soft, the leak swaps probabilities; the route that is counted stays that of the logits.
        leaf = self._leaves(x, nodes, raw, flip)
        index = self._expert_index(leaf)
        if soft:
            if self.soft_gate == "additive":
                probability = additive_leaf_probability(top)
            else:
                probability = leaf_probability(top, region_leak=leak)
            losses = self._soft_losses(top, leaf, probability) if self.training else {}
            return _Routing(index, probability.flatten(1), losses, TreeTrace(self.depth, index, top.detach()))
        if not self._weighs_paths():
            return _Routing(index, None, {}, TreeTrace(self.depth, index, top.detach()))
        visited = path_logits(x, nodes, path_to(leaf, self.depth).node, raw)
        if self._compares():
            turned = turned_decision(visited.detach().squeeze(2) / self.temperature)
            leaf = torch.cat([leaf, self._leaves(x, nodes, raw, turned)], dim=2)
            index = self._expert_index(leaf)
            visited = path_logits(x, nodes, path_to(leaf, self.depth).node, raw)
        return self._hard_routing(index, leaf, visited, top, flip)

    def _compares(self) -> bool:
        return self.runner_up and self.training and self.depth > 0

    def _descent(self, x: Tensor, flip: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The kernel that walks down at once, where one does all that is asked for: one leaf per tree, and nodes on its
        way alone."""
        one_leaf = self.beam_width == self.node_width == 1
        if not one_leaf or self.trace_nodes or self.node_balance_weight or exporting():
            return None
        if self.backend == "triton" or self.backend == "auto" and x.is_cuda:
            return triton_descent(x, self.node_weight)
        if self.backend not in ("auto", "native") or self._compares() or flip is not None:
            return None
        takes = self.node_weight.dtype == torch.float32
        takes = takes and cpu.refusal("identity", x, None, self.node_weight, self.node_bias) is None
        return cpu.descend if takes else None

    def _descended(self, x: Tensor, descend: Callable[..., tuple[Tensor, Tensor]], flip: Tensor | None) -> _Routing:
        call = x, self.node_weight, self.node_bias, self.decision_bias, self.num_trees, self.depth
        index, visited = descend(*call) if flip is None else descend(*call, flip)
        index = index.unsqueeze(-1)
        if self._compares():
            other, logit = descend(*call, turned_decision(visited.detach().squeeze(2) / self.temperature))
            index, visited = torch.cat([index, other.unsqueeze(-1)], dim=2), torch.cat([visited, logit], dim=2)
        leaf = index if self.num_trees == 1 else index % 2**self.depth
        return self._hard_routing(index.flatten(1), leaf, visited, flip=flip)

    def _weighs_paths(self) -> bool:
        """Hard evaluation with one leaf per tree needs no probability of the path."""
        return self.training or self.mode == "gated" or self.top_k > 1

    def _hard_routing(
        self, index: Tensor, leaf: Tensor, visited: Tensor, top: Tensor | None = None, flip: Tensor | None = None
    ) -> _Routing:
        """Weights and losses of the paths to given leaves.

        leaf: (T, P, K), counted within each tree.  visited: (T, P, K, d) logits on the way there, not yet divided by
        the temperature.  top: (T, P, M), divided by it; None where only the nodes on the way were evaluated.
        """
        if self.temperature != 1:
            visited = visited / self.temperature
        levels = 0 if top is None else min(self.depth, DENSE_LEVELS)
        deep = visited.detach()[..., levels:] if top is None or self.depth > levels else None
        trace = TreeTrace(self.depth, index, None if top is None else top.detach(), deep)
        if not self._weighs_paths():
            return _Routing(index, None, {}, trace)
        path = path_to(leaf, self.depth)
        # A leak swaps a node's probabilities, so the child that is taken weighs what the other one would have.
        decided = path.right if flip is None else path.right ^ flip.unsqueeze(2)
        log_p = path_log_probability(visited, decided)
        if self.mode != "gated":
            # p / stop_gradient(sum p): the weights add up to 1 and keep the gradient of each p; for one leaf the value
            # is exactly 1, as exp(0) is. Beside a runner-up p / sum p, whose gradient is the difference of both leaves.
            total = log_p if log_p.shape[-1] == 1 else log_p.logsumexp(-1, keepdim=True)
            log_p = log_p - (total if self._compares() else total.detach())
        losses = {}
        if self.training:
            greedy = slice(1 if self._compares() else None)
            route = Path(path.node[:, :, greedy], path.right[:, :, greedy])
            losses = self._hard_losses(top, visited[:, :, greedy], route, decided[:, :, greedy])
        return _Routing(index, log_p.exp().flatten(1), losses, trace)

    def _soft_losses(self, logits: Tensor, leaf: Tensor, probability: Tensor) -> dict[str, Tensor]:
        if self.depth == 0:
            return {}
        losses = {}
        if self.hardening_weight:
            losses["hardening"] = balance.hardening_entropy(logits)
        if self.balance_weight:
            losses["balance"] = self._mean_over_trees(lambda p: balance.leaf_balance(probability[:, p], leaf[:, p]))
        if self.node_balance_weight:
            losses["node_balance"] = self._mean_over_trees(lambda p: balance.node_balance(logits[:, p]))
        return losses

    def _hard_losses(self, top: Tensor | None, visited: Tensor, path: Path, decided: Tensor) -> dict[str, Tensor]:
        if self.depth == 0:
            return {}
        losses = {}
        if self.hardening_weight:
            losses["hardening"] = balance.hardening_entropy(visited)
        if self.balance_weight:
            child = 2 * path.node + 1 + path.right.to(torch.int64)
            right = torch.sigmoid(torch.where(path.right == decided, visited, -visited))
            losses["balance"] = self._mean_over_trees(
                lambda p: balance.path_balance(child[:, p].flatten(0, 1), right[:, p].flatten(0, 1), self.depth)
            )
        if self.node_balance_weight:
            losses["node_balance"] = self._mean_over_trees(lambda p: balance.node_balance(top[:, p]))
        return losses

    def _mean_over_trees(self, loss: Callable[[int], Tensor]) -> Tensor:
        return loss(0) if self.num_trees == 1 else torch.stack([loss(p) for p in range(self.num_trees)]).mean()

    def _record(self, routing: _Routing, backend: str) -> Record:
        trace = routing.trace
        aux = (trace.visited if trace.top is None else trace.top).new_zeros(())
        for name, loss in routing.losses.items():
            aux = aux + getattr(self, f"{name}_weight") * loss
        raw = {name: loss.detach() for name, loss in routing.losses.items()}
        return Record(aux, raw, routing.index, self.num_leaves, backend, trace)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Shift every node's decision by `bias_update_rate` towards the child that the last forward used less."""
        if self.decision_bias is None or self.record is None:
            return
        rows = self.record.demanded_load.view(self.num_trees, -1)
        steps = []
        for level in reversed(range(self.depth)):
            children = rows.unflatten(1, (2**level, 2, -1)).sum(-1)
            steps.insert(0, (children[..., 0] - children[..., 1]).sign())
        if steps:
            self.decision_bias += self.bias_update_rate * torch.cat(steps, dim=1).flatten().to(self.decision_bias.dtype)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, leaf_width={self.leaf_width}, out_features={self.out_features}, "
            f"depth={self.depth}, mode={self.mode!r}"
        )
        for name, default in (
            ("num_trees", 1),
            ("top_k", 1),
            ("node_width", 1),
            ("master_width", 0),
            ("runner_up", False),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, base=True" if self.has_base else text
