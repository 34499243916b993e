"""Decisions on heap-ordered binary trees: soft leaf probabilities, greedy descent, beam search.

T rows, D input width, P parallel trees, d depth, N = 2^d - 1 nodes of one tree, n node width, K chosen leaves per tree.

Node i has the children 2i + 1 (left) and 2i + 2 (right); leaf j of depth d is the heap entry 2^d - 1 + j. A node sends
a row right where its logit is >= 0 and left otherwise, so a nan goes left. The greedy leaf follows these signs from the
root. It is the one decision of the package: training, inference, usage counts, plots and kernels use it. The most
probable leaf is a different thing and is found by a beam that is wide enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fff.ops.activation import Activation, resolve_activation
from fff.ops.context import HAS_TRITON, summed_precisely
from fff.ops.largest import largest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Levels whose nodes are all evaluated by one matmul before the walk gathers single nodes. 2^7 - 1 nodes cost a row as
# much as 127 hidden units; every further level would double that, while a gathered node costs one dot product.
DENSE_LEVELS = 7


class Nodes(NamedTuple):
    """Parameters of the node networks of P trees: one hyperplane each, or <D, n, 1> networks.

    weight: (P, N, D), or (P, N, n, D) for node networks.  bias: (P, N) or (P, N, n).
    out_weight, out_bias: (P, N, n) and (P, N), for node networks only.  activation: of their hidden units.
    """

    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor | None = None
    out_bias: Tensor | None = None
    activation: Activation = "relu"


class Path(NamedTuple):
    """The way from the root to given leaves.

    node: (T, P, K, d) heap index of the visited nodes.  right: (T, P, K, d) whether the path leaves each to the right.
    """

    node: Int[Tensor, "T P K d"]
    right: Bool[Tensor, "T P K d"]


def dense_logits(x: Float[Tensor, "T D"], nodes: Nodes, levels: int) -> Float[Tensor, "T P N"]:
    """Logits of all nodes of the first `levels` levels, N = 2^levels - 1, in heap order."""
    num = 2**levels - 1
    weight = nodes.weight[:, :num]
    bias = None if nodes.bias is None else nodes.bias[:, :num].flatten()
    pre = F.linear(x, weight.flatten(0, -2), bias).view(x.shape[0], *weight.shape[:-1])
    if nodes.out_weight is None:
        return pre
    logit = (resolve_activation(nodes.activation)(pre) * nodes.out_weight[:, :num]).sum(-1)
    return logit if nodes.out_bias is None else logit + nodes.out_bias[:, :num]


def _flat(node: Tensor, num_nodes: int) -> Tensor:
    """Index into the nodes of all trees, for `node` (T, P, ...) that counts within each tree."""
    tree = torch.arange(node.shape[1], device=node.device).view(1, -1, *[1] * (node.dim() - 2))
    return tree * num_nodes + node


def gathered_logits(x: Float[Tensor, "T D"], nodes: Nodes, node: Int[Tensor, "T P ..."]) -> Float[Tensor, "T P ..."]:
    """Logits of single nodes, `node` counting within each tree.

    Sums, those of the gradients too, are in float32 at least, as those of a matmul are: in bfloat16 they would often
    decide otherwise than `dense_logits`.
    """
    flat = _flat(node, nodes.weight.shape[1])
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.view(x.shape[0], *[1] * (node.dim() - 1), x.shape[1]).to(wide)

    def at(parameter: Tensor) -> Tensor:
        # F.embedding, because its backward adds up rows where that of indexing sorts and serialises.
        table = summed_precisely(parameter.flatten(0, 1))
        return F.embedding(flat, table.flatten(1)).view(*flat.shape, *table.shape[1:]).to(wide)

    if nodes.out_weight is None:
        logit = (at(nodes.weight) * x).sum(-1)
        return (logit if nodes.bias is None else logit + at(nodes.bias.unsqueeze(-1)).squeeze(-1)).to(dtype)
    pre = (at(nodes.weight) * x.unsqueeze(-2)).sum(-1)
    if nodes.bias is not None:
        pre = pre + at(nodes.bias)
    logit = (resolve_activation(nodes.activation)(pre) * at(nodes.out_weight)).sum(-1)
    return (logit if nodes.out_bias is None else logit + at(nodes.out_bias.unsqueeze(-1)).squeeze(-1)).to(dtype)


def path_logits(
    x: Float[Tensor, "T D"], nodes: Nodes, node: Int[Tensor, "T P K d"], top: Float[Tensor, "T P M"]
) -> Float[Tensor, "T P K d"]:
    """Differentiable logits of the nodes on given paths; `top` holds those of the first levels, M = 2^levels - 1."""
    levels = (top.shape[2] + 1).bit_length() - 1
    known = node[..., :levels]
    logit = top.gather(2, known.flatten(2)).view(known.shape)
    if node.shape[-1] > levels:
        logit = torch.cat([logit, gathered_logits(x, nodes, node[..., levels:])], dim=-1)
    return logit


def path_to(leaf: Int[Tensor, "T P K"], depth: int) -> Path:
    """Nodes and turns from the root to given leaves, which count from 0 within each tree."""
    shift = torch.arange(depth, 0, -1, device=leaf.device)
    heap = leaf.unsqueeze(-1) + 2**depth
    # By this name and not as `>>`, which has no form in ONNX.
    shifted, last = torch.bitwise_right_shift(heap, shift), torch.bitwise_right_shift(heap, shift - 1)
    return Path(shifted - 1, (last & 1).bool())


@torch.no_grad()
def turned_decision(logits: Float[Tensor, "T P d"]) -> Bool[Tensor, "T P d"]:
    """One decision of each path, drawn with probability proportional to exp(-|logit|); a `flip` for `greedy_leaf`."""
    # The largest of logits with Gumbel noise, which is -log of an exponential variable, is such a draw.
    score = -logits.abs() - torch.empty_like(logits).exponential_().log()
    return F.one_hot(score.argmax(-1), logits.shape[-1]).bool()


@torch.no_grad()
def greedy_leaf(
    x: Float[Tensor, "T D"],
    nodes: Nodes,
    depth: int,
    top: Float[Tensor, "T P M"],
    *,
    decision_bias: Float[Tensor, "P N"] | None = None,
    flip: Bool[Tensor, "T P d"] | None = None,
) -> Int[Tensor, "T P 1"]:
    """Greedy descent to one leaf of each tree: the sign of each logit on the way decides; one dot product per level
    below those in `top`.

    top: `dense_logits` of the first levels; deeper nodes are gathered row by row.
    decision_bias: added to the logits for the decision alone, not for any gate (loss-free balancing).
    flip: at which levels a row takes the other child (FFF paper, section 3: randomised child transposition).
    """
    num_rows, num_trees, known = top.shape
    node = torch.zeros(num_rows, num_trees, dtype=torch.int64, device=x.device)
    for level in range(depth):
        if 2**level <= known:
            logit = top.gather(2, node.unsqueeze(-1)).squeeze(-1)
        else:
            logit = gathered_logits(x, nodes, node)
        if decision_bias is not None:
            logit = logit + decision_bias.flatten()[_flat(node, decision_bias.shape[1])]
        right = logit >= 0
        if flip is not None:
            right = right ^ flip[..., level]
        node = 2 * node + 1 + right.to(torch.int64)
    return (node - (2**depth - 1)).unsqueeze(-1)


@torch.no_grad()
def beam_leaves(
    x: Float[Tensor, "T D"],
    nodes: Nodes,
    depth: int,
    top: Float[Tensor, "T P M"],
    *,
    top_k: int,
    beam_width: int,
    decision_bias: Float[Tensor, "P N"] | None = None,
    temperature: float = 1.0,
) -> Int[Tensor, "T P K"]:
    """The K = `top_k` most probable leaves that a beam of `beam_width` paths per tree finds, most probable first.

    Exact where beam_width >= 2^(d-1). A beam of width 1 takes the greedy way, as `greedy_leaf` does. A nan logit counts
    as certainly left.

    temperature: divides the logits (bias included); with several paths to compare it matters.
    """
    if not 1 <= top_k <= 2**depth:
        raise ValueError(f"top_k={top_k} must lie between 1 and the number of leaves, {2**depth}")
    if beam_width < top_k:
        raise ValueError(f"beam_width={beam_width} is smaller than top_k={top_k}")
    if beam_width == 1:
        return greedy_leaf(x, nodes, depth, top, decision_bias=decision_bias)
    num_rows, num_trees, known = top.shape
    node = torch.zeros(num_rows, num_trees, 1, dtype=torch.int64, device=x.device)
    score = torch.zeros(num_rows, num_trees, 1, dtype=torch.promote_types(top.dtype, torch.float32), device=x.device)
    for level in range(depth):
        logit = top.gather(2, node) if 2**level <= known else gathered_logits(x, nodes, node)
        if decision_bias is not None:
            logit = logit + decision_bias.flatten()[_flat(node, decision_bias.shape[1])]
        logit = logit.to(score.dtype) / temperature
        logit = torch.where(logit.isnan(), -torch.inf, logit)
        child_score = torch.cat([score + F.logsigmoid(logit), score + F.logsigmoid(-logit)], dim=2)
        child = torch.cat([2 * node + 2, 2 * node + 1], dim=2)
        kept = largest(child_score, min(beam_width, child.shape[2]))
        score, node = child_score.gather(2, kept), child.gather(2, kept)
    return node[..., :top_k] - (2**depth - 1)


def path_log_probability(logit: Float[Tensor, "T P K d"], right: Bool[Tensor, "T P K d"]) -> Float[Tensor, "T P K"]:
    """log of the product of sigmoids along given paths."""
    return F.logsigmoid(torch.where(right, logit, -logit)).sum(-1)


def leaf_probability(logits: Float[Tensor, "T P N"], *, region_leak: float = 0.0) -> Float[Tensor, "T P E"]:
    """Product of the sigmoids on the way to each leaf, E = N + 1 (FFF paper, algorithm FORWARD_T); sums to 1 over E.

    region_leak: probability with which a node's pair (c, 1 - c) is swapped for a row; pass 0 outside training.
    """
    right = torch.sigmoid(logits)
    if region_leak > 0:
        right = torch.where(torch.rand(right.shape, device=right.device) < region_leak, 1 - right, right)
    probability = right.new_ones(*right.shape[:2], 1)
    start = 0
    while start < logits.shape[2]:
        width = probability.shape[2]
        to_right = probability * right[..., start : start + width]
        probability = torch.stack([probability - to_right, to_right], dim=-1).flatten(2)
        start += width
    return probability


def additive_leaf_probability(logits: Float[Tensor, "T P N"]) -> Float[Tensor, "T P E"]:
    """Softmax over leaves of the signed node logits added along each path (Chaunin & Mikhaylovskiy, "Matrix mixture of
    experts", with the identity in the place of the log-sigmoid): gradients do not shrink with depth.

    As logits grow this tends to the leaf with the largest sum, which need not be the greedy leaf.
    """
    score = logits.new_zeros(*logits.shape[:2], 1)
    start = 0
    while start < logits.shape[2]:
        width = score.shape[2]
        step = logits[..., start : start + width]
        score = torch.stack([score - step, score + step], dim=-1).flatten(2)
        start += width
    return score.softmax(-1)


def triton_descent(x: Tensor, node_weight: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`fff.ops.tree_route.triton.descend` where it can take these, else None."""
    if not HAS_TRITON:
        return None
    from fff.ops.tree_route.triton import descend, refusal

    return descend if refusal(x, node_weight) is None else None
