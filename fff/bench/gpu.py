"""On a GPU: hard evaluation, dispatch, routing and training steps, each compared with float64 on the same routes.

T rows, D input width, O output width, E experts, L expert width, K chosen experts per row, d depth.

All is built on the default device, and runs on a CPU as well, in Triton's interpreter. A peer whose name ends in
"_graph" is the replay of a CUDA graph: kernels without the launches that the host makes between them.

Tolerance in bfloat16, 2^-6 of the largest value: a result is rounded by at most 2^-8 of itself, and up to four times:
as an expert's output, with its bias, times a gate that is itself rounded, and summed over choices. Hidden units and
gradients within are rounded likewise, but those errors average out in the sums that they go into. That holds for smooth
activations: where the slope jumps, as that of relu, a unit that rounding carries over 0 has quite another gradient.
Training therefore uses gelu.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.bench.cases import BALANCE, Candidate
from fff.bench.dispatch import takes_grouped_mm
from fff.bench.floor import Work
from fff.bench.peers import shared, tree_work
from fff.layers.contract import aux_loss
from fff.layers.fff import FFF
from fff.layers.moe import MoE
from fff.ops import balance
from fff.ops.expert_mlp import expert_mlp
from fff.ops.tree_route import DENSE_LEVELS, Nodes, dense_logits, greedy_leaf, path_log_probability, path_to

GRAPH = "_graph"
OURS = "fff", "fff_compiled", "fff_grouped", "moe_top_1", "moe_top_2", "triton", "grouped", "descend", "descend_pytorch"
# Of AdamW: smaller than any weight's last bit, so that weights and routes stay what they were while steps are repeated.
LEARNING_RATE = 1e-7
TOLERANCE = {torch.bfloat16: 2.0**-6}
ROWS_AT_ONCE = 2048  # in float64, where every row gets a copy of its nodes or of its expert


class Peer(NamedTuple):
    """module: what runs.  run: the call; its results by name.

    expected: what these must be, asked for after a run; a row that went where no rounding explains it is to be nan,
        and so equals nothing. None for what computes another function by design.
    timed: the call that is timed, where it does more than `run`.
    """

    module: nn.Module
    run: Callable[[], dict[str, Tensor]]
    expected: Callable[[], dict[str, Tensor]] | None = None
    work: Work | None = None
    timed: Callable[[], object] | None = None


Make = Callable[[Tensor], Peer | None]  # from rows


def tree_inference(
    *,
    in_features: int,
    out_features: int,
    leaf_width: int,
    depth: int,
    batch: int,
    peers: Sequence[str],
    dtype: str = "bfloat16",
) -> dict[str, Candidate]:
    """Hard evaluation of whole layers: a random tree, its leaves behind flat routers, dense layers.

    peers: "fff" by the Triton kernels, "fff_grouped", "grouped_mm" (the same tree by
        `torch.nn.functional.grouped_mm`), "moe_top_1", "moe_top_2", "dense" (of the training width), "dense_leaf";
        "fff_compiled", "dense_compiled" under `torch.compile`; each also as a graph.
    """
    layer = FFF(in_features, leaf_width, out_features, depth=depth).to(getattr(torch, dtype)).eval()
    x = torch.randn(batch, in_features, dtype=layer.w_in.dtype)
    work = tree_work(layer, _greedy(layer, x), batch)

    def tree(module: Callable[[], nn.Module]) -> Make:
        return lambda rows: _tree_peer(layer, module(), rows, work)

    takes = takes_grouped_mm(layer.w_out, in_features)
    known = {
        "fff": tree(lambda: shared(layer, "triton")),
        "fff_compiled": tree(lambda: compiled(shared(layer, "triton"))),
        "fff_grouped": tree(lambda: shared(layer, "grouped")),
        "grouped_mm": tree(lambda: TreeGroupedMm(layer)) if takes else lambda rows: None,
        "moe_top_1": lambda rows: _moe_peer(layer, 1, rows),
        "moe_top_2": lambda rows: _moe_peer(layer, 2, rows),
        "dense": lambda rows: _dense_peer(layer, layer.num_leaves * leaf_width, rows),
        "dense_compiled": lambda rows: _dense_peer(layer, layer.num_leaves * leaf_width, rows, compiled),
        "dense_leaf": lambda rows: _dense_peer(layer, leaf_width, rows),
    }
    return _candidates(peers, known, x)


def dispatch(
    *,
    in_features: int,
    out_features: int,
    leaf_width: int,
    num_experts: int,
    batch: int,
    peers: Sequence[str],
    dtype: str = "bfloat16",
) -> dict[str, Candidate]:
    """One expert for each row, on given even routes.

    peers: backends of `expert_mlp`, "grouped_mm"; "triton_" and a `forced` choice; each also as a graph.
    """
    layer = FFF(in_features, leaf_width, out_features, depth=num_experts.bit_length() - 1).to(getattr(torch, dtype))
    if layer.num_leaves != num_experts:
        raise ValueError(f"num_experts={num_experts} must be a power of two")
    experts = [t.detach() for t in _experts(layer)]
    x = torch.randn(batch, in_features, dtype=layer.w_in.dtype)
    index = torch.randint(num_experts, (batch, 1))
    hit = index.unique().numel() * sum(t[0].numel() for t in experts)
    numbers = hit + batch * (in_features + out_features)
    work = Work(2 * batch * leaf_width * (in_features + out_features), numbers * x.element_size())

    def given(compute: Callable[[Tensor], Tensor]) -> Make:
        def make(rows: Tensor) -> Peer:
            return Peer(
                nn.Module(), lambda: {"y": compute(rows)}, lambda: {"y": _on_routes(rows, index, None, *experts)}, work
            )

        return make

    takes = takes_grouped_mm(layer.w_out, in_features)
    known = {
        name: given(lambda rows, name=name: expert_mlp(rows, index, None, *experts, backend=name))
        for name in ("triton", "grouped")
    }
    known["grouped_mm"] = given(lambda r: grouped_mm(r, index, None, *experts, F.relu)) if takes else lambda rows: None
    for name in {peer.removesuffix(GRAPH) for peer in peers if peer.startswith("triton_")} - set(known):
        known[name] = forced(known["triton"], name.removeprefix("triton_"))
    found = _candidates(peers, known, x)
    return {name: c._replace(backend=name.removesuffix(GRAPH), counted=False) for name, c in found.items()}


def routing(
    *, in_features: int, depth: int, batch: int, peers: Sequence[str], dtype: str = "bfloat16"
) -> dict[str, Candidate]:
    """The decisions alone: a tree's 2^d leaves against a flat gate over as many experts.

    peers: "descend" by Triton kernels, "descend_levels<n>" with so many levels by matmul, "descend_pytorch", "gate"
        (one product and an argmax); each also as a graph.
    """
    nodes = FFF(in_features, 1, 1, depth=depth).to(getattr(torch, dtype))
    weight, bias = nodes.node_weight.detach(), nodes.node_bias.detach()
    x = torch.randn(batch, in_features, dtype=weight.dtype)
    gate = torch.randn(2**depth, in_features, dtype=weight.dtype) / in_features**0.5
    hit = (_greedy(nodes, x).unique() + 2**depth)[:, None] >> torch.arange(1, depth + 1)  # heap entries, plus 1
    visited = hit.unique().numel() * (in_features + 1)
    size, indices = x.element_size(), 8 * batch

    def descent(find: Callable[[Tensor], Tensor]) -> Make:
        def make(rows: Tensor) -> Peer:
            last = {}

            def run() -> dict[str, Tensor]:
                last["leaf"] = find(rows)
                return last

            def expected() -> dict[str, Tensor]:
                wrong = misrouted(rows, weight, bias, last["leaf"][:, 0], depth)
                return {"leaf": torch.where(wrong, torch.nan, last["leaf"][:, 0].double())[:, None]}

            work = Work(2 * batch * depth * in_features, size * (x.numel() + visited) + indices)
            return Peer(nn.Module(), run, expected, work)

        return make

    def kernels(levels: int | None) -> Make:
        def find(rows: Tensor) -> Tensor:
            from fff.ops.tree_route.triton import descend

            return descend(rows, weight, bias, None, 1, depth, levels=levels)[0]

        return descent(find)

    def flat(rows: Tensor) -> Peer:
        work = Work(2 * batch * gate.numel(), size * (x.numel() + gate.numel()) + indices)
        return Peer(nn.Module(), lambda: {"expert": F.linear(rows, gate).argmax(-1)}, None, work)

    known = {
        "descend": kernels(None),
        **{f"descend_levels{levels}": kernels(levels) for levels in range(min(depth, 7) + 1)},
        "descend_pytorch": descent(partial(_greedy, nodes)),
        "gate": flat,
    }
    return {name: c._replace(counted=False) for name, c in _candidates(peers, known, x).items()}


def tree_training(
    *,
    in_features: int,
    out_features: int,
    leaf_width: int,
    depth: int,
    batch: int,
    peers: Sequence[str],
    block: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Candidate]:
    """Forward and backward, for the rows and all parameters, of layers within a network; gelu.

    peers: "fff" (straight-through, balance loss) by the Triton kernels, "fff_tiles<sizes>" (`forced`), "fff_grouped";
        "moe_top_1", "moe_top_2" by the Triton kernels, with balance loss; "grouped_mm_top_1", "grouped_mm_top_2"
        (`GroupedMmExperts`); "dense" (of the training width); "fff_compiled", "dense_compiled" under `torch.compile`;
        each also as a graph.
    block: x + layer(norm(x)), and a step of AdamW. What is compared is the layer within.
    """
    kind = getattr(torch, dtype)
    x = torch.randn(batch, in_features, dtype=kind, requires_grad=True)
    grad = torch.randn(batch, out_features, dtype=kind)
    sizes = in_features, leaf_width, out_features
    initial = FFF(*sizes, depth=depth).to(kind)

    def step(build: Callable[[], nn.Module], expected: Callable | None = None) -> Make:
        def make(rows: Tensor) -> Peer:
            module = build().to(kind)
            run = partial(_differentiate, module, rows, grad)
            judged = None if expected is None else lambda: expected(module, rows, grad)
            return Peer(module, run, judged, _training_work(module, in_features, out_features, leaf_width, batch))

        return make

    def tree(backend: str) -> Callable[[], FFF]:
        def build() -> FFF:
            options = {"mode": "straight_through", "act_layer": "gelu", "balance_weight": BALANCE, "backend": backend}
            layer = FFF(*sizes, depth=depth, **options)
            layer.load_state_dict(initial.state_dict())
            return layer

        return build

    def moe(top_k: int) -> Callable[[], MoE]:
        router = "switch" if top_k == 1 else "mixtral"
        options = {"num_experts": 2**depth, "top_k": top_k, "router": router, "balance_weight": BALANCE}
        return lambda: MoE(*sizes, act_layer="gelu", backend="triton", **options)

    tiled = {peer.removesuffix(GRAPH) for peer in peers if peer.startswith("fff_tiles")}
    known = {
        "fff": step(tree("triton"), _tree_gradients),
        "fff_compiled": step(lambda: compiled(tree("triton")()), _tree_gradients),
        "fff_grouped": step(tree("grouped"), _tree_gradients),
        "moe_top_1": step(moe(1), _moe_gradients),
        "moe_top_2": step(moe(2), _moe_gradients),
        **{name: forced(step(tree("triton"), _tree_gradients), name[4:]) for name in tiled},
        "dense": step(lambda: dense(in_features, leaf_width * 2**depth, out_features, nn.GELU)),
        "dense_compiled": step(lambda: compiled(dense(in_features, leaf_width * 2**depth, out_features, nn.GELU))),
    }
    for k in (1, 2):
        build = partial(GroupedMmExperts, *sizes, num_experts=2**depth, top_k=k)
        takes = takes_grouped_mm(initial.w_out, in_features)
        known[f"grouped_mm_top_{k}"] = step(build, _moe_gradients) if takes else lambda rows: None
    if block:
        known = {name: partial(_in_block, make) for name, make in known.items()}
    return _candidates(peers, known, x)


def forced(make: Make, choice: str) -> Make:
    """`make` with a choice of the dispatch kernels made for them, which are compiled and captured under it.

    choice: "single" (choices one by one, see `few`), "tiled" (never so) or "tiles<rows>x<columns>x<warps>x<stages>".
    """
    from fff.ops.expert_mlp import triton

    made = {"few": lambda *_: choice == "single"}
    if sizes := re.fullmatch(r"tiles(\d+)x(\d+)x(\d+)x(\d+)", choice):
        size = triton.Tiles(*map(int, sizes.groups()))
        made["tiles"] = lambda *_, **__: size
    elif choice not in ("single", "tiled"):
        raise ValueError(f"peers: {choice!r} is none of 'tiles<rows>x<columns>x<warps>x<stages>', 'single', 'tiled'")

    def build(rows: Tensor) -> Peer | None:
        peer = make(rows)

        def run() -> dict[str, Tensor]:
            with patch.multiple(triton, **made):
                return peer.run()

        return peer._replace(run=run)

    return build


class TreeGroupedMm(nn.Module):
    """The routes of a tree in PyTorch, its leaves by torch's product over rows that are sorted by leaf."""

    def __init__(self, layer: FFF) -> None:
        super().__init__()
        self.layer, self.index = layer, None

    def forward(self, x: Tensor) -> Tensor:
        self.index = _greedy(self.layer, x)
        return grouped_mm(x, self.index, None, *_experts(self.layer), F.relu)


class GroupedMmExperts(nn.Module):
    """A mixture of experts as language models have it: no biases, scores in the rows' type, their softmax in float32,
    rows sorted by expert, two grouped products, outputs weighted and added back.

    The gates of two choices add up to 1. index, gate: (T, K), of the last call.
    """

    def __init__(self, in_features: int, expert_width: int, out_features: int, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.index, self.gate = top_k, None, None
        self.gate_weight = nn.Parameter(torch.randn(num_experts, in_features) / in_features**0.5)
        self.w_in = nn.Parameter(torch.randn(num_experts, expert_width, in_features) / in_features**0.5)
        self.w_out = nn.Parameter(torch.randn(num_experts, expert_width, out_features) / expert_width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        probability = F.linear(x, self.gate_weight).softmax(-1, dtype=torch.float32)
        gate, self.index = probability.topk(self.top_k)
        if self.top_k > 1:
            gate = gate / gate.sum(-1, keepdim=True)
        self.gate = gate.to(x.dtype)
        return grouped_mm(x, self.index, self.gate, self.w_in, None, self.w_out, None, F.gelu)


class Block(nn.Module):
    """The feedforward half of a transformer block."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


def grouped_mm(
    x: Tensor,
    index: Tensor,
    gate: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """`expert_mlp` of chosen experts by `torch.nn.functional.grouped_mm`, which knows no biases; without waiting for
    the host."""
    expert, order = index.flatten().sort()
    end = torch.searchsorted(expert, torch.arange(w_in.shape[0], device=x.device), right=True, out_int32=True)
    row = order // index.shape[1]
    hidden = F.grouped_mm(x[row], w_in.mT, offs=end)
    hidden = act(hidden if b_in is None else hidden + b_in[expert])
    out = F.grouped_mm(hidden, w_out, offs=end)
    out = out if b_out is None else out + b_out[expert]
    if gate is None:
        return torch.empty_like(out).index_copy(0, row, out)
    return out.new_zeros(len(x), out.shape[1]).index_add(0, row, out * gate.flatten()[order, None])


def dense(in_features: int, hidden_features: int, out_features: int, act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(in_features, hidden_features), act(), nn.Linear(hidden_features, out_features))


def compiled(module: nn.Module) -> nn.Module:
    """The module under `torch.compile`, as one graph."""
    module.compile(fullgraph=True, dynamic=False)
    return module


def captured(run: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """A replay of `run` as a CUDA graph, whose results lie where the capture put them; RuntimeError if `run` waits for
    the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and libraries opened before they can be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # On the same stream: nodes of the autograd graph that a record keeps from the calls above belong to it.
    with torch.cuda.graph(graph, stream=stream):
        results = run()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


def _candidates(peers: Sequence[str], known: Mapping[str, Make], x: Tensor) -> dict[str, Candidate]:
    """Each peer, built and tried once. One that fails, for want of memory say, is named on the screen and left out; one
    of ours becomes a candidate whose outputs differ, so that the suite goes on and fails in the end."""
    candidates = {}
    for name in peers:
        base = name.removesuffix(GRAPH)
        if base not in known:
            raise ValueError(f"peers: {name!r} is none of {sorted(known)}, with or without {GRAPH!r}")
        if base != name and x.device.type != "cuda":
            continue
        try:
            candidate = _candidate(known[base], x, base != name)
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            print(f"{name} failed: {type(error).__name__}: {message}", file=sys.stderr)
            candidate = _failed(x) if base in OURS else None
        if candidate is not None:
            candidates[name] = candidate
    return candidates


def _candidate(make: Make, x: Tensor, graph: bool) -> Candidate | None:
    # A graph is captured on other rows than it is compared on: what it has kept of them would show.
    rows = torch.randn_like(x).requires_grad_(x.requires_grad) if graph else x
    peer = make(rows)
    if peer is None:
        return None
    run = peer.run if x.requires_grad else torch.no_grad()(peer.run)
    if graph:
        run = captured(run)
        with torch.no_grad():
            rows.copy_(x)
    timed = peer.timed or run
    timed()

    def outputs() -> dict[str, Tensor]:
        if graph:
            for result in run().values():
                result.fill_(torch.nan if result.is_floating_point() else -1)
        return dict(run())

    judged = (None, None) if peer.expected is None else (outputs, peer.expected)
    tolerance = TOLERANCE.get(x.dtype)
    return Candidate(peer.module, timed, *judged, work=peer.work, dtype=x.dtype, counted=not graph, tolerance=tolerance)


def _failed(x: Tensor) -> Candidate:
    return Candidate(
        nn.Module(), lambda: None, lambda: {"ran": torch.zeros(1)}, lambda: {"ran": torch.ones(1)}, dtype=x.dtype
    )


def _experts(layer: FFF | MoE) -> tuple[Tensor, ...]:
    return layer.w_in, layer.b_in, layer.w_out, layer.b_out


@torch.no_grad()
def _greedy(layer: FFF, x: Tensor) -> Tensor:
    """(T, 1) leaves, in PyTorch."""
    nodes = Nodes(layer.node_weight.unsqueeze(0), layer.node_bias.unsqueeze(0))
    top = dense_logits(x, nodes, min(layer.depth, DENSE_LEVELS))
    return greedy_leaf(x, nodes, layer.depth, top).flatten(1)


def _tree_peer(layer: FFF, module: nn.Module, rows: Tensor, work: Work) -> Peer:
    def expected() -> dict[str, Tensor]:
        index = module.index if isinstance(module, TreeGroupedMm) else module.record.index
        y = _on_routes(rows, index, None, *_experts(layer))
        y[misrouted(rows, layer.node_weight, layer.node_bias, index[:, 0], layer.depth)] = torch.nan
        return {"y": y}

    return Peer(module.eval(), lambda: {"y": module(rows)}, expected, work)


def _moe_peer(layer: FFF, top_k: int, rows: Tensor) -> Peer:
    router = "switch" if top_k == 1 else "mixtral"
    sizes = layer.in_features, layer.leaf_width, layer.out_features
    with torch.device("meta"):
        module = MoE(*sizes, num_experts=layer.num_leaves, top_k=top_k, router=router, backend="triton")
    for name, tensor in zip(("w_in", "b_in", "w_out", "b_out"), _experts(layer), strict=True):
        setattr(module, name, tensor)
    gate = torch.randn(layer.num_leaves, layer.in_features, dtype=rows.dtype) / layer.in_features**0.5
    module.gate_weight = nn.Parameter(gate)

    @torch.no_grad()
    def expected() -> dict[str, Tensor]:
        wide = rows.double(), module.gate_weight.double()
        gate, _ = _moe_gate(module, F.linear(*wide), _score_slack(*wide))
        return {"y": _on_routes(rows, module.record.index, gate, *_experts(module))}

    return Peer(module.eval(), lambda: {"y": module(rows)}, expected)


def _dense_peer(
    layer: FFF, hidden: int, rows: Tensor, finish: Callable[[nn.Module], nn.Module] = lambda module: module
) -> Peer:
    module = finish(dense(layer.in_features, hidden, layer.out_features, nn.ReLU).to(rows.dtype))
    widths = layer.in_features + layer.out_features
    numbers = sum(p.numel() for p in module.parameters()) + len(rows) * widths
    work = Work(2 * len(rows) * hidden * widths, numbers * rows.element_size())
    return Peer(module, lambda: {"y": module(rows)}, None, work)


def _in_block(make: Make, rows: Tensor) -> Peer | None:
    peer = make(rows)
    if peer is None:
        return None
    module = Block(peer.module, rows.shape[1]).to(rows.dtype)
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, fused=True)
    grad = torch.randn_like(rows)

    def step() -> None:
        found = _differentiate(module, rows, grad)
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peer._replace(timed=step, work=None)


def _differentiate(module: nn.Module, rows: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of rows and parameters where `grad` is that of y, and the weighted losses have theirs."""
    inputs = {"x": rows, **dict(module.named_parameters())}
    y = module(rows)
    loss = aux_loss(module)
    outputs = [(y, grad), (loss, None)] if loss.requires_grad else [(y, grad)]
    torch.autograd.backward(*zip(*outputs, strict=True))
    found = {"y": y.detach(), **{name: tensor.grad for name, tensor in inputs.items()}}
    for tensor in inputs.values():
        tensor.grad = None
    return found


def _training_work(module: nn.Module, in_features: int, out_features: int, leaf_width: int, batch: int) -> Work | None:
    """Forward, then backward with twice as many operations. Forward reads rows and parameters and writes outputs;
    backward reads rows, parameters and the gradient of outputs, and writes those of rows and parameters. All experts
    count as hit. None for what is not a tree or dense."""
    if isinstance(module, FFF):
        flops = module.size.flops_per_row
    elif isinstance(module, nn.Sequential):
        flops = 2 * module[0].out_features * (in_features + out_features)
    else:
        return None
    parameters = sum(p.numel() for p in module.parameters())
    size = next(module.parameters()).element_size()
    return Work(3 * flops * batch, size * (batch * (3 * in_features + 2 * out_features) + 3 * parameters))


@torch.no_grad()
def misrouted(x: Tensor, node_weight: Tensor, node_bias: Tensor, leaf: Tensor, depth: int) -> Tensor:
    """(T,) whether a leaf is not the one that greedy descent reaches in float64, and rounding is no excuse.

    node_weight (N, D), node_bias (N,), leaf (T,). Excused is a decision on a logit s = sum_i p_i + b of at most
    D 2^-24 (sum_i |p_i| + |b|), which sums in float32 may err by in any order, plus 4 u |p|_2, u the unit roundoff of
    x's type, for a product that rounds partial sums to it, as cuBLAS may.
    """
    width, unit = x.shape[1], torch.finfo(x.dtype).eps / 2
    found = []
    for rows, leaves in zip(x.split(ROWS_AT_ONCE), leaf.split(ROWS_AT_ONCE), strict=True):
        outside = (leaves < 0) | (leaves >= 2**depth)
        path = path_to(leaves.clamp(0, 2**depth - 1).view(-1, 1, 1), depth)
        node, right = path.node[:, 0, 0], path.right[:, 0, 0]
        product = rows.double().unsqueeze(1) * node_weight[node].double()
        bias = node_bias[node].double()
        logit = product.sum(-1) + bias
        slack = width * 2.0**-24 * (product.abs().sum(-1) + bias.abs()) + 4 * unit * product.norm(dim=-1)
        found.append(outside | (((logit >= 0) != right) & (logit.abs() > slack)).any(-1))
    return torch.cat(found)


@torch.no_grad()
def _on_routes(x: Tensor, index: Tensor, gate: Tensor | None, *experts: Tensor) -> Tensor:
    """(T, O) chosen experts in float64, relu, each row with its own copy of them; nan where an index is none."""
    w_in, b_in, w_out, b_out = experts
    found = []
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows, y = x[part].double(), 0
        for k in range(index.shape[1]):
            outside = (index[part, k] < 0) | (index[part, k] >= len(w_in))
            e = index[part, k].clamp(0, len(w_in) - 1)
            hidden = F.relu(torch.bmm(w_in[e].double(), rows.unsqueeze(2)).squeeze(2) + b_in[e])
            out = torch.bmm(hidden.unsqueeze(1), w_out[e].double()).squeeze(1) + b_out[e]
            out[outside] = torch.nan
            y = y + (out if gate is None else gate[part, k, None] * out)
        found.append(y)
    return torch.cat(found)


def _doubled(module: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Rows ("x") and parameters in float64, to be differentiated by."""
    tensors = {"x": rows, **dict(module.named_parameters())}
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def _reference(wide: dict[str, Tensor], index: Tensor, gate: Tensor, grad: Tensor, loss: Tensor | float) -> dict:
    """y and all gradients, experts by the loop that reads like the formula."""
    experts = [wide.get(name) for name in ("w_in", "b_in", "w_out", "b_out")]
    y = expert_mlp(wide["x"], index, gate, *experts, activation="gelu", backend="reference")
    total = (y * grad).sum() + BALANCE * loss
    inputs = {name: tensor for name, tensor in wide.items() if tensor.requires_grad}
    grads = torch.autograd.grad(total, list(inputs.values()))
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def _tree_gradients(layer: FFF, rows: Tensor, grad: Tensor) -> dict[str, Tensor]:
    wide, index, depth = _doubled(layer, rows), layer.record.index, layer.depth
    path = path_to(index.unsqueeze(1), depth)
    node, right = path.node[:, 0, 0], path.right[:, 0, 0]
    logit = (wide["x"].unsqueeze(1) * wide["node_weight"][node]).sum(-1) + wide["node_bias"][node]
    log_p = path_log_probability(logit, right).unsqueeze(1)
    loss = balance.path_balance(2 * node + 1 + right.long(), logit.sigmoid(), depth)
    found = _reference(wide, index, (log_p - log_p.detach()).exp(), grad, loss)
    found["y"][misrouted(rows.detach(), layer.node_weight, layer.node_bias, index[:, 0], depth)] = torch.nan
    return found


def _moe_gate(module: MoE | GroupedMmExperts, score: Tensor, slack: Tensor | float) -> tuple[Tensor, Tensor]:
    """Gates (T, K) of the experts that the module chose, and the probabilities (T, E) of all; gates are nan where
    another expert has a score that is larger, and the `slack` of both is no excuse."""
    index = module.index if isinstance(module, GroupedMmExperts) else module.record.index
    known, chosen = score.detach(), torch.zeros_like(score, dtype=torch.bool).scatter(1, index, True)
    best = (known - slack).masked_fill(chosen, -torch.inf).amax(1, keepdim=True)
    least = (known + slack).masked_fill(~chosen, torch.inf).amin(1, keepdim=True)
    probability = score.softmax(-1)
    gate = probability.gather(1, index) if module.top_k == 1 else score.gather(1, index).softmax(-1)
    return gate.masked_fill(best > least, torch.nan), probability


def _score_slack(x: Tensor, gate_weight: Tensor) -> Tensor:
    """What sums in float32 may err by, in any order: D 2^-24 sum_i |p_i|."""
    return x.shape[1] * 2.0**-24 * (x.abs() @ gate_weight.abs().T)


def _moe_gradients(module: MoE | GroupedMmExperts, rows: Tensor, grad: Tensor) -> dict[str, Tensor]:
    wide = _doubled(module, rows)
    score = wide["x"] @ wide["gate_weight"].T
    if isinstance(module, GroupedMmExperts):  # its scores are rounded: the values are its own, the derivatives exact
        own = F.linear(rows, module.gate_weight).detach()
        gate, _ = _moe_gate(module, own + (score - score.detach()), 0.0)
        return _reference(wide, module.index, gate, grad, 0.0)
    gate, probability = _moe_gate(module, score, _score_slack(wide["x"].detach(), wide["gate_weight"].detach()))
    return _reference(wide, module.record.index, gate, grad, balance.switch(probability, module.record.index))
