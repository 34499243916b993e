"""What a trained tree does with rows, and a smaller tree without the leaves and decisions that change nothing for them.

T rows, P parallel trees, K leaves of each, d depth, E = P 2^d leaves, C classes.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fff.layers.fff import FFF
from fff.ops.expert_mlp.hidden import hidden_units
from fff.ops.tree_route import gathered_logits, path_to


class Inspection(NamedTuple):
    """The hard route of rows, as evaluation takes it.

    leaf: (T, P K) leaves, counted over all trees, as in `Record.index`.
    node: (T, P, K, d) nodes on the way there, counted within each tree in heap order.
    margin: (T, P, K, d) their logits, decision bias included; right where >= 0. A small one is a close decision.
    count: (E,) rows that each leaf got.
    histogram: (E, C) rows of each class in each leaf; None without labels.
    """

    leaf: Tensor
    node: Tensor
    margin: Tensor
    count: Tensor
    histogram: Tensor | None


@torch.no_grad()
def inspect(layer: FFF, x: Tensor, labels: Tensor | None = None) -> Inspection:
    """Route x, (..., D) with T rows in all, in evaluation; mode and record of the layer stay as they were.

    labels: T class numbers from 0 on, in any shape; rows that have none are to be left out of x too. C is the largest
        plus 1.

    ValueError for a layer that is no tree and labels that are no such numbers.
    """
    _check_tree(layer)
    rows = layer.rows(x)
    labels = None if labels is None else torch.as_tensor(labels, device=x.device)
    if labels is not None and labels.numel() != rows.shape[0]:
        raise ValueError(f"labels has {labels.numel()} entries for {rows.shape[0]} rows of x")
    if labels is not None and (labels.is_floating_point() or labels.numel() and labels.min() < 0):
        raise ValueError(f"labels of {labels.dtype} from {labels.min()} on must be integers >= 0")
    before = layer.training, layer.record
    try:
        layer.eval()(rows)
        record = layer.record
    finally:
        layer.train(before[0]).record = before[1]
    leaf = (record.index % 2**layer.depth).view(rows.shape[0], layer.num_trees, layer.top_k)
    node = path_to(leaf, layer.depth).node
    margin = (
        gathered_logits(rows.to(layer.node_weight.dtype), layer._nodes(), node) if layer.depth else node.to(x.dtype)
    )
    if layer.decision_bias is not None:
        tree = torch.arange(layer.num_trees, device=x.device).view(1, -1, 1, 1)
        margin = margin + layer.decision_bias.view(layer.num_trees, -1)[tree, node]
    histogram = None
    if labels is not None:
        classes = int(labels.max()) + 1 if labels.numel() else 0
        histogram = record.index.new_zeros(layer.num_leaves, classes)
        for chosen in record.index.T:
            histogram.index_put_((chosen, labels.flatten().to(chosen)), histogram.new_ones(()), accumulate=True)
    return Inspection(record.index, node, margin, record.load, histogram)


@torch.no_grad()
def prune(layer: FFF, count: Tensor) -> FFF:
    """A copy of the layer without the leaves that got no row, and without decisions between leaves that answer alike:
    less deep, if every way to the others permits it.

    count: (E,) rows per leaf, as `Inspection.count` or `Record.load` has them.

    A node with live leaves on one side only is left out, and its live side takes its place. So does one leaf for a node
    between two of the same weights, or of the same constant output (no weights in, or none out). The new depth is that
    of the longest way that remains, in any of the trees; shorter ways are filled up with nodes of weight 0, which send
    all rows right, between two copies of what they lead to. So the layout stays a full tree.

    In evaluation, rows that reach live leaves alone get the same output. Other rows now get that of a live leaf nearby.
    The soft mixture, which counts every leaf, does change.

    ValueError for mode "gated" and for several leaves of a tree: the weights of their leaves depend on all nodes; for a
    layer that is no tree.
    """
    _check_tree(layer)
    if layer.mode == "gated" or layer.beam_width > 1:
        raise ValueError(f"mode={layer.mode!r}, beam_width={layer.beam_width}: leaves are weighed by their paths")
    if tuple(count.shape) != (layer.num_leaves,):
        raise ValueError(f"count has shape {tuple(count.shape)} for {layer.num_leaves} leaves")
    live = (count > 0).view(layer.num_trees, -1).tolist()
    answers = _answers(layer).view(layer.num_trees, -1).tolist()
    trees = [_contract(0, *tree) for tree in zip(live, answers, strict=True)]
    depth = max(_height(tree) for tree in trees)
    nodes, leaves = [], []
    for tree, root in enumerate(trees):
        node, leaf = _lay_out(root, depth)
        nodes += [-1 if i < 0 else tree * (2**layer.depth - 1) + i for i in node]
        leaves += [tree * 2**layer.depth + i for i in leaf]
    device = layer.node_weight.device
    kept, filler = torch.tensor(nodes, dtype=torch.int64, device=device), torch.tensor(nodes, device=device) < 0
    small = copy.deepcopy(layer)
    small.depth = depth
    for name in ("w_in", "b_in", "w_out", "b_out"):
        _select(small, name, torch.tensor(leaves, device=device))
    for name in (*layer.router_names, "decision_bias"):
        _select(small, name, kept.clamp(min=0), filler)
        if depth == 0 and isinstance(getattr(small, name), nn.Parameter):
            getattr(small, name).requires_grad_(False)
    return small


def _check_tree(layer: nn.Module) -> None:
    if not isinstance(layer, FFF):
        raise ValueError(f"layer={type(layer).__name__} is no fff.FFF")


class _Fork(NamedTuple):
    """node: its heap index in the old tree.  left, right: a fork, or the number of a leaf."""

    node: int
    left: _Fork | int
    right: _Fork | int


def _answers(layer: FFF) -> Tensor:
    """(E,) numbers, the same for leaves that answer every row alike: of equal weights, or of equal constant output."""
    w_in, b_in, w_out, b_out = layer.experts()
    b_in = w_in.new_zeros(w_in.shape[:2]) if b_in is None else b_in
    b_out = w_out.new_zeros(len(w_out), w_out.shape[2]) if b_out is None else b_out
    hidden = hidden_units(b_in, layer.act, glu=layer.glu, dropout=0.0)
    constant = ~(w_in.flatten(1).any(1) & w_out.flatten(1).any(1))
    b_out = torch.where(constant[:, None], b_out + torch.einsum("el,elo->eo", hidden, w_out), b_out)
    weights = torch.cat([w_in.flatten(1), b_in, w_out.flatten(1)], dim=1).masked_fill(constant[:, None], 0)
    return torch.cat([weights, b_out], dim=1).unique(dim=0, return_inverse=True)[1]


def _contract(node: int, live: list[bool], answers: list[int]) -> _Fork | int | None:
    """The subtree below a node without dead leaves, and with one leaf for two side by side that answer alike; None if
    all are dead, but for the root, which keeps its first."""
    num_nodes = len(live) - 1
    if node >= num_nodes:
        return node - num_nodes if live[node - num_nodes] or node == 0 else None
    left, right = (_contract(child, live, answers) for child in (2 * node + 1, 2 * node + 2))
    if isinstance(left, int) and isinstance(right, int) and answers[left] == answers[right]:
        return left
    if left is not None and right is not None:
        return _Fork(node, left, right)
    return (right if left is None else left) if node or any(live) else 0


def _height(tree: _Fork | int) -> int:
    return 1 + max(_height(tree.left), _height(tree.right)) if isinstance(tree, _Fork) else 0


def _lay_out(tree: _Fork | int, depth: int) -> tuple[list[int], list[int]]:
    """The full tree of this depth: its old nodes in heap order, -1 for a filler, and its old leaves."""
    level, nodes = [tree], []
    for _ in range(depth):
        nodes += [part.node if isinstance(part, _Fork) else -1 for part in level]
        level = [
            side for part in level for side in ((part.left, part.right) if isinstance(part, _Fork) else (part,) * 2)
        ]
    return nodes, level


def _select(layer: FFF, name: str, index: Tensor, zero: Tensor | None = None) -> None:
    """Keep these entries of a parameter or buffer; set some to 0."""
    old = getattr(layer, name)
    if old is None:
        return
    new = old.index_select(0, index) if len(old) else old.new_zeros(len(index), *old.shape[1:])
    if zero is not None:
        new[zero] = 0
    setattr(layer, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
