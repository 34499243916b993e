"""Greedy descent of trees on a GPU: Triton kernels, forward and backward.

T rows, D input width, P trees, d depth, N = 2^d - 1 nodes of one tree, M = 2^levels - 1 of them in its first levels.

A row needs d of the N logits of a tree, each of them only after the one before. Two kernels share the levels:

- `_top` evaluates all M nodes of the first `levels` levels for a tile of rows, by tensor cores: M dot products where
  `levels` would do, but no wait between them and each weight read once for the whole tile. Their logits stay in
  registers, where each row then picks its way: a masked sum over the M columns is the logit of the current node.
- `_walk` goes on from there (or from the root) one node after the other: a warp for each row, which stays in its
  registers, multiplied with the weights of its node and summed in float32. Every level waits for memory once; nodes
  that many rows visit are in a cache.

`top_levels` chooses between them. Between kernels and levels a row's position is its place in the level, counted over
all trees: tree p has places p 2^l .. (p + 1) 2^l - 1 of level l, the children of place j are 2j and 2j + 1, and the
place in level d is the leaf. Sums are in float32, and so is the logit that decides, which other backends round to x's
type. Float32 operands are rounded to TensorFloat32 in `_top` if `torch.set_float32_matmul_precision` allows it, but
never in `_walk`.

Backward, for a gradient g (T, P, d) of the logits, with neither atomics nor host synchronisation. Shapes and route fix
the order of every sum, so repeated calls have the same bits:

- `_row_gradient`: dx[t] sums g times node weights along the paths, which are known from the leaf.
- `_spread` + matmul: for the first levels, where a node has many rows, g is written out as a matrix (T, P (M + 1)) with
  zeros off the path, in x's type, and d weight is that matrix, transposed, times x. The column too many keeps rows
  aligned, as cuBLAS likes them.
- `_node_gradient`: for deeper nodes. Sorted by leaf, the choices of a node are consecutive, as are its leaves; one
  program per node and block of columns sums them up, and writes zeros for a node that no row visits.

Limits
- Depth at most 15; float16, bfloat16 and float32; no second derivative, no `vmap`.
- The rows of a deep node are summed by one program per block of columns. Where most rows share a few leaves, as in a
  collapsed tree, these programs run long after all others are done. Backward sorts the choices by leaf for it, once.
- A row with a nan spoils the weight gradient of every node in the first levels, as it does in `F.linear`, not just of
  those on its way.
- With TensorFloat32 the two kernels round differently, so that a logit near 0 may decide otherwise in a batch of fewer
  rows than `MANY_ROWS`.
- `top_levels` was measured on an H200 for 768 inputs in bfloat16 (results/bench/crossover_cuda.csv), block sizes by
  trials on an H100 that were not kept. They are the same for all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fff.ops.context import float32_precision, on_device, without_autocast
from fff.ops.expert_order.triton import tiled_order

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DEPTH = 15
MAX_LEVELS = 7  # the logits of 127 nodes for BLOCK_ROWS rows are 64 registers of each thread
BLOCK_ROWS = 64  # rows of a tile of `_top`
MANY_ROWS = 8192  # in all trees, from where on it is taken: at 4096 it does not pay, at 32768 it does
SPREAD_LEVELS = 8  # whose weight gradients are one matmul, (T, 2^8) by (T, D)


@triton.jit
def _node(place, tree, level, depth):
    """Index into the nodes of all trees, (P N), of a place in a level."""
    return place + tree * ((1 << depth) - 1 - (1 << level)) + (1 << level) - 1


@triton.jit
def _turn(logit, node, choice, level, depth, decision_bias, flip, live):
    """1 where a choice goes to the right child, else 0; a nan goes left."""
    if decision_bias is not None:
        logit += tl.load(decision_bias + node, mask=live, other=0).to(tl.float32)
    right = (logit >= 0).to(tl.int32)
    if flip is not None:
        right ^= tl.load(flip + choice * depth + level, mask=live, other=0).to(tl.int32)
    return right


@triton.jit(do_not_specialize=["num_rows"])
def _top(
    x,  # (T, D), rows x_stride apart
    node_weight,  # (P N, D)
    node_bias,  # (P N,) or None
    decision_bias,  # (P N,) or None
    flip,  # (T, P, d) or None
    index,  # out (T, P): place in level LEVELS
    logit,  # out (T, P, d): the first LEVELS columns
    num_rows,
    num_trees,
    in_features,
    x_stride,
    depth,
    LEVELS: tl.constexpr,
    NODES: tl.constexpr,  # M, padded to a power of two
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tree = tl.program_id(1).to(tl.int64)
    live = row < num_rows
    column = tl.arange(0, NODES)
    known = column < (1 << LEVELS) - 1
    node = tree * ((1 << depth) - 1) + column
    logits = tl.zeros((ROWS, NODES), tl.float32)
    for start in range(0, in_features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < in_features
        rows = tl.load(x + row[:, None] * x_stride + d, mask=live[:, None] & inside, other=0)
        weights = tl.load(node_weight + node[:, None] * in_features + d, mask=known[:, None] & inside, other=0)
        logits = tl.dot(rows, weights.T, logits, input_precision=PRECISION)
    if node_bias is not None:
        logits += tl.load(node_bias + node, mask=known, other=0).to(tl.float32)
    choice = row * num_trees + tree
    place = tl.zeros((ROWS,), tl.int64) + tree
    for level in tl.static_range(LEVELS):
        visited = _node(place, tree, level, depth)
        value = tl.sum(tl.where(node == visited[:, None], logits, 0.0), 1)
        tl.store(logit + choice * depth + level, value, mask=live)
        place = 2 * place + _turn(value, visited, choice, level, depth, decision_bias, flip, live)
    tl.store(index + choice, place, mask=live)


@triton.jit(do_not_specialize=["num_choices"])
def _walk(
    x,  # (T, D), rows x_stride apart
    node_weight,  # (P N, D)
    node_bias,  # (P N,) or None
    decision_bias,  # (P N,) or None
    flip,  # (T, P, d) or None
    index,  # (T, P): in, unless LEVELS is 0, place in level LEVELS; out, leaf
    logit,  # out (T, P, d): the columns from LEVELS on
    num_choices,  # T P
    num_trees,
    in_features,
    x_stride,
    depth,
    LEVELS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_D columns hold a row, which then stays in registers
):
    choice = tl.program_id(0).to(tl.int64) * CHOICES + tl.arange(0, CHOICES)
    live = choice < num_choices
    tree = choice % num_trees
    place = tree
    if LEVELS > 0:
        place = tl.load(index + choice, mask=live, other=0)
    x += (choice // num_trees)[:, None] * x_stride
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < in_features)
    if WHOLE:
        rows = tl.load(x + d, mask=mask, other=0)
    for level in range(LEVELS, depth):
        node = _node(place, tree, level, depth)
        weight = node_weight + node[:, None] * in_features + d
        if WHOLE:
            products = rows.to(tl.float32) * tl.load(weight, mask=mask, other=0).to(tl.float32)
        else:
            products = tl.zeros((CHOICES, BLOCK_D), tl.float32)
            for start in range(0, in_features, BLOCK_D):
                mask = live[:, None] & (start + d < in_features)
                rows = tl.load(x + start + d, mask=mask, other=0).to(tl.float32)
                products += rows * tl.load(weight + start, mask=mask, other=0).to(tl.float32)
        value = tl.sum(products, 1)
        if node_bias is not None:
            value += tl.load(node_bias + node, mask=live, other=0).to(tl.float32)
        tl.store(logit + choice * depth + level, value, mask=live)
        place = 2 * place + _turn(value, node, choice, level, depth, decision_bias, flip, live)
    tl.store(index + choice, place, mask=live)


# The kernels then run on a CPU, in the tests. Asked here, as dynamo cannot tell.
INTERPRETED = not isinstance(_walk, triton.JITFunction)


@triton.jit(do_not_specialize=["num_rows"])
def _row_gradient(
    grad_logit,  # (T, P, d)
    index,  # (T, P)
    node_weight,  # (P N, D)
    grad_x,  # out (T, D)
    num_rows,
    num_trees,
    in_features,
    depth,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = row < num_rows
    mask = live[:, None] & (d < in_features)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for tree in range(num_trees):
        choice = row * num_trees + tree
        leaf = tl.load(index + choice, mask=live, other=0)
        for level in range(depth):
            node = _node(leaf >> (depth - level), tree, level, depth)
            slope = tl.load(grad_logit + choice * depth + level, mask=live, other=0)
            weights = tl.load(node_weight + node[:, None] * in_features + d, mask=mask, other=0)
            total += slope[:, None] * weights.to(tl.float32)
    tl.store(grad_x + row[:, None] * in_features + d, total.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _spread(
    grad_logit,  # (T, P, d)
    index,  # (T, P)
    spread,  # out (T, P, M + 1): the gradient of each node's logit; 0 off the path and in the last column
    total,  # out (blocks, P, M + 1): sums over the rows of each program
    num_rows,
    num_trees,
    depth,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    choice = row * num_trees + tl.program_id(1)
    column = tl.arange(0, 2**LEVELS)
    level = tl.zeros((2**LEVELS,), tl.int32)  # of the node of each column
    for deeper in tl.static_range(1, LEVELS):
        level += (column >= (1 << deeper) - 1).to(tl.int32)
    leaf = tl.load(index + choice, mask=live, other=0).to(tl.int32)
    heap = (1 << depth) + (leaf & ((1 << depth) - 1))  # heap entry plus 1, whose ancestors are its leading bits
    visited = (heap[:, None] >> (depth - level)) == column + 1
    slope = grad_logit + choice[:, None] * depth + level
    value = tl.load(slope, mask=live[:, None] & visited, other=0)
    out = spread + choice[:, None] * 2**LEVELS + column
    tl.store(out, value.to(spread.dtype.element_ty), mask=live[:, None])
    program = tl.program_id(0).to(tl.int64) * num_trees + tl.program_id(1)
    tl.store(total + program * 2**LEVELS + column, tl.sum(value, 0))


@triton.jit
def _node_gradient(
    x,  # (T, D), rows x_stride apart
    grad_logit,  # (T, P, d)
    order,  # (T P,): choices sorted by leaf
    offset,  # (P 2^d + 2,): where each leaf begins in it
    grad_weight,  # out (P N, D) or None: the nodes below the first LEVELS levels
    grad_bias,  # out (P N,) or None: the same
    num_trees,
    in_features,
    x_stride,
    depth,
    LEVELS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    deep = (1 << depth) - (1 << LEVELS)  # nodes of a tree below its first levels
    tree = (tl.program_id(0) // deep).to(tl.int64)
    heap = tl.program_id(0) % deep + (1 << LEVELS)  # heap entry plus 1, whose leading bit tells the level
    level = LEVELS
    for deeper in range(LEVELS + 1, depth):
        level += (heap >= (1 << deeper)).to(tl.int32)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < in_features
    below = depth - level
    leaf = (tree << depth) + (heap << below) - (1 << depth)
    begin = tl.load(offset + leaf)
    end = tl.load(offset + leaf + (1 << below))
    weights = tl.zeros((CHOICES, BLOCK_D), tl.float32)
    biases = tl.zeros((CHOICES,), tl.float32)
    for start in range(begin, end, CHOICES):
        place = start + tl.arange(0, CHOICES)
        live = place < end
        choice = tl.load(order + place, mask=live, other=0).to(tl.int64)
        slope = tl.load(grad_logit + choice * depth + level, mask=live, other=0)
        biases += slope
        if grad_weight is not None:
            rows = x + (choice // num_trees)[:, None] * x_stride + d
            weights += slope[:, None] * tl.load(rows, mask=live[:, None] & inside, other=0).to(tl.float32)
    node = tree * ((1 << depth) - 1) + heap - 1
    if grad_weight is not None:
        total = tl.sum(weights, 0)
        tl.store(grad_weight + node * in_features + d, total.to(grad_weight.dtype.element_ty), mask=inside)
    if grad_bias is not None:
        if tl.program_id(1) == 0:
            tl.store(grad_bias + node, tl.sum(biases).to(grad_bias.dtype.element_ty))


def top_levels(rows: int, depth: int) -> int:
    """How many levels go by matmul: none for a few thousand rows, which walk in one wave; all of a shallow tree's for
    more of them, and of a deeper one's the first 6, as the seventh has as many nodes as all before it.

    rows: times trees.  As measured for 768 inputs in bfloat16 and depths 7, 8 and 11.
    """
    if rows < MANY_ROWS:
        return 0
    return depth if depth <= MAX_LEVELS else 6


def refusal(x: Tensor, node_weight: Tensor) -> str | None:
    """Why the kernels cannot take a call; None if they can."""
    dtype = node_weight.dtype
    if dtype not in DTYPES or x.dtype != dtype:
        return f"they take rows and weights of one type, float16, bfloat16 or float32, not {x.dtype} and {dtype}"
    if INTERPRETED:
        # The interpreter computes with the bits of bfloat16 as if they were integers, without a word.
        return "Triton's interpreter has no bfloat16" if dtype == torch.bfloat16 else None
    return None if x.is_cuda else f"they run on CUDA, not on {x.device}"


def _rows(x: Tensor) -> Tensor:
    """x with numbers of a row side by side; rows may lie anywhere, in views and expanded tensors too."""
    return x if x.stride(1) == 1 else x.contiguous()


def _given(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padded_nodes(levels: int) -> int:
    return max(16, 2**levels)  # `tl.dot` takes no fewer columns


def _block(in_features: int, largest: int) -> int:
    return min(triton.next_power_of_2(in_features), largest)


@torch.library.custom_op("fff::triton_descend", mutates_args=())
def _descend(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    decision_bias: Tensor | None,
    flip: Tensor | None,
    num_trees: int,
    depth: int,
    levels: int | None,
) -> tuple[Tensor, Tensor]:
    rows, in_features = x.shape
    index = x.new_empty(rows, num_trees, dtype=torch.int64)
    logit = x.new_empty(rows, num_trees, 1, depth, dtype=torch.float32)
    if depth == 0:
        index.copy_(torch.arange(num_trees, device=x.device))
    if depth == 0 or rows == 0:
        return logit, index
    levels = top_levels(rows * num_trees, depth) if levels is None else levels
    x = _rows(x)
    pointers = x, *map(_given, (node_weight, node_bias, decision_bias, flip)), index, logit
    sizes = num_trees, in_features, x.stride(0), depth
    with on_device(x):
        if levels:
            _top[triton.cdiv(rows, BLOCK_ROWS), num_trees](
                *pointers,
                rows,
                *sizes,
                LEVELS=levels,
                NODES=_padded_nodes(levels),
                ROWS=BLOCK_ROWS,
                BLOCK_D=128 // x.dtype.itemsize,
                PRECISION=float32_precision() if x.dtype == torch.float32 else "tf32",
                num_warps=4,
                num_stages=3,
            )
        if levels < depth:
            # A warp for each row: neither does one wait for another, nor does a sum over columns leave its warp.
            block = _block(in_features, 1024)
            _walk[(index.numel(),)](
                *pointers,
                index.numel(),
                *sizes,
                LEVELS=levels,
                CHOICES=1,
                BLOCK_D=block,
                WHOLE=block >= in_features,
                num_warps=1,
            )
    return logit, index


@_descend.register_fake
def _(x, node_weight, node_bias, decision_bias, flip, num_trees, depth, levels):
    logit = x.new_empty(x.shape[0], num_trees, 1, depth, dtype=torch.float32)
    return logit, x.new_empty(x.shape[0], num_trees, dtype=torch.int64)


@torch.library.custom_op("fff::triton_descend_backward", mutates_args=())
def _descend_backward(
    grad_logit: Tensor,
    x: Tensor,
    node_weight: Tensor,
    index: Tensor,
    num_trees: int,
    depth: int,
    levels: int | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, in_features = x.shape
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight = x.new_empty(node_weight.shape if need_weight else 0)
    grad_bias = x.new_empty(node_weight.shape[0] if need_bias else 0)
    if depth == 0 or rows == 0:
        return grad_x.zero_(), grad_weight.zero_(), grad_bias.zero_()
    levels = min(depth, SPREAD_LEVELS) if levels is None else levels
    x, grad_logit, index = _rows(x), grad_logit.contiguous(), index.contiguous()
    with on_device(x), without_autocast(x):
        if need_x:
            choices, block = 16, _block(in_features, 128)
            _row_gradient[triton.cdiv(rows, choices), triton.cdiv(in_features, block)](
                grad_logit,
                index,
                node_weight.contiguous(),
                grad_x,
                rows,
                num_trees,
                in_features,
                depth,
                ROWS=choices,
                BLOCK_D=block,
                num_warps=4,
            )
        if levels and (need_weight or need_bias):
            block, known = 32, 2**levels - 1
            blocks = triton.cdiv(rows, block)
            spread = x.new_empty(rows, num_trees, known + 1)
            total = x.new_empty(blocks, num_trees, known + 1, dtype=torch.float32)
            _spread[blocks, num_trees](
                grad_logit,
                index,
                spread,
                total,
                rows,
                num_trees,
                depth,
                LEVELS=levels,
                ROWS=block,
                num_warps=4,
            )
            if need_weight:
                found = (spread.flatten(1).T @ x).view(num_trees, known + 1, in_features)
                grad_weight.view(num_trees, -1, in_features)[:, :known] = found[:, :known]
            if need_bias:
                grad_bias.view(num_trees, -1)[:, :known] = total.sum(0)[:, :known]
        if levels < depth and (need_weight or need_bias):
            order, offset, *_ = tiled_order(index.flatten(), num_trees * 2**depth, 16)
            choices, block = 16, _block(in_features, 128)
            blocks = triton.cdiv(in_features, block) if need_weight else 1
            _node_gradient[num_trees * (2**depth - 2**levels), blocks](
                x,
                grad_logit,
                order,
                offset,
                grad_weight if need_weight else None,
                grad_bias if need_bias else None,
                num_trees,
                in_features,
                x.stride(0),
                depth,
                LEVELS=levels,
                CHOICES=choices,
                BLOCK_D=block,
                num_warps=4,
            )
    return grad_x, grad_weight, grad_bias


@_descend_backward.register_fake
def _(grad_logit, x, node_weight, index, num_trees, depth, levels, need_x, need_weight, need_bias):
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(node_weight.shape if need_weight else 0),
        x.new_empty(node_weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, node_weight, _, _, _, *ctx.call = inputs
    ctx.save_for_backward(x, node_weight, output[1])


def _backward(ctx, grad_logit, _):
    need = ctx.needs_input_grad[:3]
    found = _descend_backward(grad_logit, *ctx.saved_tensors, *ctx.call, *need)
    return *(gradient if needed else None for gradient, needed in zip(found, need, strict=True)), *[None] * 5


_descend.register_autograd(_backward, setup_context=_setup_context)


def descend(
    x: Float[Tensor, "T D"],
    node_weight: Float[Tensor, "N D"],
    node_bias: Float[Tensor, " N"] | None,
    decision_bias: Float[Tensor, " N"] | None,
    num_trees: int,
    depth: int,
    flip: Bool[Tensor, "T P d"] | None = None,
    *,
    levels: int | None = None,
) -> tuple[Int[Tensor, "T P"], Float[Tensor, "T P 1 d"]]:
    """Greedy descent (`fff.ops.tree_route.greedy_leaf`): leaf of each row in each tree, counted over all trees, and the
    logits on the way, in float32, without the decision bias, differentiable by x, node_weight and node_bias.

    node_weight, node_bias, decision_bias: heap order, tree by tree; N here counts the nodes of all trees.
    flip: at which levels a row takes the other child.
    levels: how many are decided by matmul, and have their weight gradients by one, at most 7; by default `top_levels`,
        and the first `SPREAD_LEVELS` in the backward pass.
    """
    reason = refusal(x, node_weight)
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot take this call: {reason}")
    if not 0 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth={depth} must lie between 0 and {MAX_DEPTH}")
    if levels is not None and not 0 <= levels <= min(depth, MAX_LEVELS):
        raise ValueError(f"levels={levels} must lie between 0 and {min(depth, MAX_LEVELS)}")
    logit, index = _descend(x, node_weight, node_bias, decision_bias, flip, num_trees, depth, levels)
    return index, logit
