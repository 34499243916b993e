"""Hard evaluation of one tree by all who can: the competitors of the grids over depth and batch.

T rows, D input width, O output width, E = 2^d leaves, L leaf width, d depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.bench.cases import Candidate, hit_parameters
from fff.bench.dispatch import grouped_mm, takes_grouped_mm
from fff.bench.floor import Work
from fff.bench.upstream import missing_bias, upstream_copy
from fff.layers.fff import FFF
from fff.layers.moe import MoE
from fff.ops.expert_mlp import cpu


class GatherBmm(nn.Module):
    """What one writes first in PyTorch: copy each row's nodes and leaf, and multiply batches of matrices."""

    def __init__(self, layer: FFF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        tree, leaf = self.layer, descend(self.layer, x)
        hidden = F.relu(torch.bmm(tree.w_in[leaf], x.unsqueeze(2)).squeeze(2) + tree.b_in[leaf])
        return torch.bmm(hidden.unsqueeze(1), tree.w_out[leaf]).squeeze(1) + tree.b_out[leaf]


class GroupedMm(nn.Module):
    """The same walk, then torch's own product over rows that are sorted by leaf."""

    def __init__(self, layer: FFF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        tree = self.layer
        return grouped_mm(x, descend(tree, x), tree.w_in, tree.b_in, tree.w_out, tree.b_out)


def descend(tree: FFF, x: Tensor) -> Tensor:
    """(T,) leaf of each row, one gathered node per level."""
    node = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    for _ in range(tree.depth):
        logit = (x * tree.node_weight[node]).sum(-1) + tree.node_bias[node]
        node = 2 * node + 1 + (logit >= 0).to(torch.int64)
    return node - (2**tree.depth - 1)


class _Point(NamedTuple):
    """A tree, rows, and what its output must be."""

    layer: FFF
    x: Tensor
    expected: Tensor
    work: Work
    counted: bool

    def candidate(self, module: nn.Module, **fields) -> Candidate:
        return Candidate(module, self.call(module), dtype=self.x.dtype, counted=self.counted, **fields)

    def same_function(self, module: nn.Module, correction: Callable[[], Tensor] | None = None, **fields) -> Candidate:
        """A competitor that computes what the tree computes, up to a `correction` that is known."""
        call = self.call(module)
        outputs = (lambda: {"y": call() + correction()}) if correction else (lambda: {"y": call()})
        return self.candidate(module, outputs=outputs, expected=lambda: {"y": self.expected}, work=self.work, **fields)

    def call(self, module: nn.Module) -> Callable[[], Tensor]:
        module.eval()

        def run() -> Tensor:
            with torch.no_grad():
                return module(self.x)

        return run


def tree_inference(
    *,
    in_features: int,
    out_features: int,
    leaf_width: int,
    depth: int,
    batch: int,
    peers: Sequence[str],
    dtype: str = "float32",
    counted: bool = False,
) -> dict[str, Candidate]:
    """Hard evaluation of a random tree on normal rows, all peers with the same weights.

    peers: names in `PEERS`; one that is not installed is left out.
    counted: whether memory is counted too.
    """
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"peers: {name!r} is none of {sorted(PEERS)}")
    layer = FFF(in_features, leaf_width, out_features, depth=depth).to(getattr(torch, dtype)).eval()
    x = torch.randn(batch, in_features, dtype=layer.w_in.dtype)
    with torch.no_grad():
        reference = shared(layer, "reference")
        expected = reference(x)
    point = _Point(layer, x, expected, tree_work(layer, reference.record.index, batch), counted)
    candidates = {name: PEERS[name](point) for name in peers}
    return {name: candidate for name, candidate in candidates.items() if candidate is not None}


def shared(layer: FFF, backend: str) -> FFF:
    """The same weights, not copied, with another backend."""
    with torch.device("meta"):
        other = FFF(layer.in_features, layer.leaf_width, layer.out_features, depth=layer.depth, backend=backend)
    for name, parameter in layer.named_parameters():
        setattr(other, name, parameter)
    return other.eval()


def tree_work(layer: FFF, index: Tensor, batch: int) -> Work:
    """One pass over the leaves and nodes that these rows hit, the rows and the outputs."""
    numbers = hit_parameters(layer, index) + batch * (layer.in_features + layer.out_features)
    return Work(batch * layer.size.flops_per_row, numbers * layer.w_in.element_size())


def _ours(backend: str, threads: int | None = None) -> Callable[[_Point], Candidate | None]:
    def make(point: _Point) -> Candidate | None:
        if backend == "native" and not cpu.available():
            return None
        return point.same_function(shared(point.layer, backend), threads=threads)

    return make


def _operator(point: _Point) -> Candidate | None:
    """The native operator alone, without the layer around it: no module, no choice of a backend, no record."""
    if not cpu.available():
        return None
    tree = point.layer
    nodes = tree.node_weight.detach(), tree.node_bias.detach(), None, 1, tree.depth
    leaves = [t.detach() for t in (tree.w_in, tree.b_in, tree.w_out, tree.b_out)]

    def run() -> Tensor:
        return cpu.tree_mlp(point.x, *nodes, *leaves, "relu", False)[0]

    return point.same_function(tree)._replace(run=run, outputs=lambda: {"y": run()})


def _dense(width: Callable[[FFF], int], compiled: bool = False) -> Callable[[_Point], Candidate]:
    def make(point: _Point) -> Candidate:
        tree, hidden = point.layer, width(point.layer)
        module = nn.Sequential(nn.Linear(tree.in_features, hidden), nn.ReLU(), nn.Linear(hidden, tree.out_features)).to(
            point.x.dtype
        )
        rows = len(point.x)
        numbers = sum(p.numel() for p in module.parameters()) + rows * (tree.in_features + tree.out_features)
        work = Work(2 * rows * hidden * (tree.in_features + tree.out_features), numbers * point.x.element_size())
        if compiled:
            torch.compiler.reset()  # else the shapes of the last case make those of this one dynamic
            module = torch.compile(module)
        return point.candidate(module, work=work)

    return make


def _upstream(point: _Point) -> Candidate | None:
    if not find_spec("fastfeedforward") or point.layer.depth == 0:  # where its evaluation fails
        return None
    other = upstream_copy(point.layer)
    return point.same_function(other, lambda: missing_bias(other, point.x))


def _grouped_mm(point: _Point) -> Candidate | None:
    tree = point.layer
    return point.same_function(GroupedMm(tree)) if takes_grouped_mm(tree.w_out, tree.in_features) else None


def _moe_flat(point: _Point) -> Candidate:
    tree = point.layer
    with torch.device("meta"):
        module = MoE(
            tree.in_features, tree.leaf_width, tree.out_features, num_experts=tree.num_leaves, top_k=1, router="switch"
        )
    for name in ("w_in", "b_in", "w_out", "b_out"):
        setattr(module, name, getattr(tree, name))
    gate = torch.randn(tree.num_leaves, tree.in_features, dtype=point.x.dtype) / tree.in_features**0.5
    module.gate_weight = nn.Parameter(gate)
    rows = len(point.x)
    with torch.no_grad():
        module.eval()(point.x)
    hit = module.record.index.unique().numel()
    leaf = tree.leaf_width * (tree.in_features + tree.out_features + 1) + tree.out_features
    numbers = hit * leaf + gate.numel() + rows * (tree.in_features + tree.out_features)
    return point.candidate(module, work=Work(rows * module.size.flops_per_row, numbers * point.x.element_size()))


PEERS: dict[str, Callable[[_Point], Candidate | None]] = {
    "fff_native": _ours("native"),
    "fff_native_2_threads": _ours("native", threads=2),
    "native_op": _operator,
    "fff_grouped": _ours("grouped"),
    "gather_bmm": lambda point: point.same_function(GatherBmm(point.layer)),
    "grouped_mm": _grouped_mm,
    "upstream": _upstream,
    "moe_flat": _moe_flat,
    "dense": _dense(lambda tree: tree.num_leaves * tree.leaf_width),
    "dense_compiled": _dense(lambda tree: tree.num_leaves * tree.leaf_width, compiled=True),
    "dense_leaf": _dense(lambda tree: tree.leaf_width),
}
