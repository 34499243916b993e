"""Chosen experts on a GPU: leaf dispatch as Triton kernels, forward and backward.

The method. Choices are brought into the order of their experts and cut into tiles of at most `rows` choices of one
expert (`fff.ops.expert_order.triton`). Then one program per tile does all that its rows need:

    forward   pre = x W_in^T + b_in, summed over blocks of D; h = act(pre); y = gate (h W_out + b_out), block by block
              of O. The hidden units of a tile never leave the chip, except in training, where `pre` is kept, or
              computed again with `recompute`.
    backward  dh = dy W_out^T, summed over blocks of O; dgate = h . dh + dy . b_out; dpre = gate dh act'(pre);
              dx = dpre W_in, block by block of D; dpre and gate h are kept for
    weights   dW_in = dpre^T x and dW_out = (gate h)^T dy: one program per expert and block of columns sums the rows of
              its expert in order, and the biases with them. An expert without rows gets zeros.

Rows are gathered where they are read and scattered where they are written: no sorted copy of x, y or dy exists. With
several choices a row's parts lie in a buffer (T, K, O) that is then summed. There are no atomics: results have the same
bits in every run. Nothing waits for the host, so that a call can be captured in a CUDA graph.

A few choices without gradient (`few`) skip order and tiles: one program per choice reads its expert once,
as vectors. Such a call is bound by memory, and matrix units would idle on 15 of 16 rows.

Limits: expert width at most 256; float32, float16, bfloat16; the named activations; no dropout; no second derivative.
The weight gradient of an expert is summed by one program per block of columns however many rows it has: if one expert
has most rows, that is slow. Tile sizes and `few` were measured on an H200 with experts of 32 units in bfloat16
(results/bench/crossover_cuda.csv), those of `_weights` by trials on an H100 that were not kept; for others they are
reasoned from these.

T rows, D input width, O output width, E experts, L expert width, H = L (2 L for gated units), K choices per row,
M = T K choices, W = L rounded up to a power of two of at least 16, which matrix units need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fff.ops.activation import activation_name
from fff.ops.context import float32_precision, on_device
from fff.ops.expert_mlp.cpu import records_gradient
from fff.ops.expert_order.triton import max_tiles, tiled_order

MAX_WIDTH = 256
# Of a tile, and of the units that `_weights` sums at a time. With 64, products run on Hopper's asynchronous units, and
# Triton 3.6 then refills a block that they still read, where the block is used for a sum as well: g in `_backward`, u
# and r in `_weights`; tests/ops/aot.py looks for it. Tiles of 64 rows would be at most 6 % faster where no block is
# used twice (results/bench/crossover_cuda.csv).
MAX_ROWS = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tiles(NamedTuple):
    """rows: choices per tile.  columns: of D or O that are read at a time.  warps, stages: of the compiler."""

    rows: int
    columns: int
    warps: int
    stages: int


def few(choices: int, num_experts: int) -> bool:
    """Whether choices go one by one: no more than the card runs at once, and few enough of each expert that reading its
    weights for every one of them costs less than an order."""
    return choices <= min(128, 8 * num_experts)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def tiles(choices: int, num_experts: int, width: int, itemsize: int, backward: bool = False) -> Tiles:
    """Tile sizes by the mean number of choices per expert: at most `MAX_ROWS`, fewer where accumulators of rows x width
    would not fit into registers."""
    rows = MAX_ROWS if choices >= 24 * num_experts and _padded(width) < 256 else 16
    wide = 128 if _padded(width) <= 64 and (rows == 16 or backward) else 64
    return Tiles(rows, wide * 2 // itemsize, 4, 3)


def sum_tiles(choices: int, num_experts: int, itemsize: int) -> Tiles:
    """Of `_weights`, which adds up so many choices at a time."""
    rows = next((r for r, least in ((128, 512), (64, 64), (32, 24)) if choices >= least * num_experts), 16)
    return Tiles(rows, (64 if rows == 128 else 128) * 2 // itemsize, 4, 3)


@triton.jit
def _gelu_share(z):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    return 1 / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)  # a nan stays one
    elif ACT == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        z = z * _gelu_share(z)
    elif ACT == "silu":
        z = z / (1 + tl.exp(-z))
    elif ACT == "relu2":
        z = tl.where(z < 0, 0.0, z * z)
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    if ACT == "relu":
        s = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "gelu":
        s = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        share = _gelu_share(z)
        steep = 1.5957691216057308 * (1 + 0.134145 * tl.minimum(z * z, 1e4))  # where z^2 is larger, share is 0 or 1
        s = share * (1 + z * (1 - share) * steep)
    elif ACT == "silu":
        sigmoid = 1 / (1 + tl.exp(-z))
        s = sigmoid * (1 + z * (1 - sigmoid))
    elif ACT == "relu2":
        s = tl.where(z > 0, 2 * z, 0.0)
    else:
        s = tl.full(z.shape, 1.0, z.dtype)
    return s


@triton.jit
def _tile(order, offset, tile_start, tile_group, ROWS: tl.constexpr):
    """Expert of this program's tile, places of its rows in the order, which of them are there, and their choices."""
    tile = tl.program_id(0)
    expert = tl.load(tile_group + tile)
    place = tl.load(offset + expert) + (tile - tl.load(tile_start + expert)) * ROWS + tl.arange(0, ROWS)
    there = place < tl.load(offset + expert + 1)
    choice = tl.load(order + place, mask=there, other=0)
    return expert, place, there, choice


@triton.jit
def _pre(
    x,  # (T, D)
    row,  # (ROWS,)
    there,
    w_in,  # (E H, D)
    b_in,  # (E H,)
    first,  # of the L rows of w_in that are wanted
    D,
    L: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x W_in^T + b_in of a tile, (ROWS, W) in float32."""
    unit = tl.arange(0, W)
    acc = tl.zeros([ROWS, W], tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        rows = tl.load(
            x + row.to(tl.int64)[:, None] * D + column[None, :],
            mask=there[:, None] & (column < D)[None, :],
            other=0.0,
        )
        weight = tl.load(
            w_in + (first + unit)[None, :] * D + column[:, None],
            mask=(unit < L)[None, :] & (column < D)[:, None],
            other=0.0,
        )
        acc = tl.dot(rows, weight, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(b_in + first + unit, mask=unit < L, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _forward(
    x,  # (T, D)
    gate,  # (M,)
    w_in,  # (E, H, D)
    b_in,  # (E, H)
    w_out,  # (E, L, O)
    b_out,  # (E, O)
    order,  # (M,)
    offset,  # (E + 2,)
    tile_start,  # (E + 2,)
    tile_group,  # (tiles,)
    y,  # (M, O)
    pre,  # (M, H), by place
    num_experts,
    D,
    O,
    CHOICES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    GLU: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_OUT: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) < tl.load(tile_start + num_experts + 1):
        expert, place, there, choice = _tile(order, offset, tile_start, tile_group, ROWS)
        unit = tl.arange(0, W)
        if expert == num_experts:  # left out
            for start in range(0, O, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                tl.store(
                    y + choice.to(tl.int64)[:, None] * O + column[None, :],
                    tl.zeros([ROWS, COLUMNS], tl.float32).to(y.dtype.element_ty),
                    mask=there[:, None] & (column < O)[None, :],
                )
        else:
            e = expert.to(tl.int64)
            H: tl.constexpr = 2 * L if GLU else L
            row = choice // CHOICES
            kept = there[:, None] & (unit < L)[None, :]
            at = place.to(tl.int64)[:, None] * H + unit[None, :]
            z = _pre(x, row, there, w_in, b_in, e * H, D, L, W, BIAS, ROWS, COLUMNS, PRECISION)
            if KEEP:
                tl.store(pre + at, z.to(pre.dtype.element_ty), mask=kept)
            h = _act(z, ACT)
            if GLU:
                value = _pre(x, row, there, w_in, b_in, e * H + L, D, L, W, BIAS, ROWS, COLUMNS, PRECISION)
                if KEEP:
                    tl.store(pre + at + L, value.to(pre.dtype.element_ty), mask=kept)
                h *= value
            h = h.to(x.dtype.element_ty)
            if GATED:
                weigh = tl.load(gate + choice, mask=there, other=0.0).to(tl.float32)[:, None]
            for start in range(0, O, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                weight = tl.load(
                    w_out + e * L * O + unit[:, None] * O + column[None, :],
                    mask=(unit < L)[:, None] & (column < O)[None, :],
                    other=0.0,
                )
                out = tl.dot(h, weight, input_precision=PRECISION)
                if BIAS_OUT:
                    out += tl.load(b_out + e * O + column, mask=column < O, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    out *= weigh
                tl.store(
                    y + choice.to(tl.int64)[:, None] * O + column[None, :],
                    out.to(y.dtype.element_ty),
                    mask=there[:, None] & (column < O)[None, :],
                )


@triton.jit
def _single(
    x,  # (T, D)
    index,  # (M,)
    gate,  # (M,)
    w_in,  # (E, H, D)
    b_in,  # (E, H)
    w_out,  # (E, L, O)
    b_out,  # (E, O)
    y,  # (M, O)
    num_experts,
    D,
    O,
    CHOICES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    GLU: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    choice = tl.program_id(0).to(tl.int64)
    row = choice // CHOICES
    e = tl.load(index + choice).to(tl.int64)
    chosen = (e >= 0) & (e < num_experts)
    e = tl.where(chosen, e, 0)
    H: tl.constexpr = 2 * L if GLU else L
    unit = tl.arange(0, W)
    z = tl.zeros([W], tl.float32)
    value = tl.zeros([W], tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        numbers = tl.load(x + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        at = w_in + (e * H + unit[:, None]) * D + column[None, :]
        mask = (unit < L)[:, None] & (column < D)[None, :]
        z += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32) * numbers[None, :], 1)
        if GLU:
            value += tl.sum(tl.load(at + L * D, mask=mask, other=0.0).to(tl.float32) * numbers[None, :], 1)
    if BIAS:
        z += tl.load(b_in + e * H + unit, mask=unit < L, other=0.0).to(tl.float32)
    h = _act(z, ACT)
    if GLU:
        if BIAS:
            value += tl.load(b_in + e * H + L + unit, mask=unit < L, other=0.0).to(tl.float32)
        h *= value
    if GATED:
        weigh = tl.load(gate + choice).to(tl.float32)
    for start in range(0, O, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        weight = tl.load(
            w_out + (e * L + unit[:, None]) * O + column[None, :],
            mask=(unit < L)[:, None] & (column < O)[None, :],
            other=0.0,
        ).to(tl.float32)
        out = tl.sum(h[:, None] * weight, 0)
        if BIAS_OUT:
            out += tl.load(b_out + e * O + column, mask=column < O, other=0.0).to(tl.float32)
        if GATED:
            out *= weigh
        out = tl.where(chosen, out, 0.0)
        tl.store(y + choice * O + column, out.to(y.dtype.element_ty), mask=column < O)


@triton.jit
def _backward(
    grad,  # (T, O)
    x,  # (T, D)
    gate,  # (M,)
    w_in,  # (E, H, D)
    b_in,  # (E, H)
    w_out,  # (E, L, O)
    b_out,  # (E, O)
    order,  # (M,)
    offset,  # (E + 2,)
    tile_start,  # (E + 2,)
    tile_group,  # (tiles,)
    pre,  # (M, H), by place
    grad_x,  # (M, D)
    grad_gate,  # (M,)
    grad_pre,  # (M, H), by place
    gated_hidden,  # (M, L), by place
    num_experts,
    D,
    O,
    CHOICES: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    GLU: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_OUT: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if tl.program_id(0) < tl.load(tile_start + num_experts + 1):
        expert, place, there, choice = _tile(order, offset, tile_start, tile_group, ROWS)
        unit = tl.arange(0, W)
        if expert == num_experts:
            if NEED_X:
                for start in range(0, D, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    tl.store(
                        grad_x + choice.to(tl.int64)[:, None] * D + column[None, :],
                        tl.zeros([ROWS, COLUMNS], tl.float32).to(grad_x.dtype.element_ty),
                        mask=there[:, None] & (column < D)[None, :],
                    )
            if NEED_GATE:
                tl.store(grad_gate + choice, tl.zeros([ROWS], tl.float32).to(grad_gate.dtype.element_ty), mask=there)
        else:
            e = expert.to(tl.int64)
            H: tl.constexpr = 2 * L if GLU else L
            row = choice // CHOICES
            kept = there[:, None] & (unit < L)[None, :]
            at = place.to(tl.int64)[:, None] * H + unit[None, :]
            if RECOMPUTE:
                z = _pre(x, row, there, w_in, b_in, e * H, D, L, W, BIAS, ROWS, COLUMNS, PRECISION)
            else:
                z = tl.load(pre + at, mask=kept, other=0.0).to(tl.float32)
            h = _act(z, ACT)
            slope = _slope(z, ACT)
            if GLU:
                if RECOMPUTE:
                    value = _pre(x, row, there, w_in, b_in, e * H + L, D, L, W, BIAS, ROWS, COLUMNS, PRECISION)
                else:
                    value = tl.load(pre + at + L, mask=kept, other=0.0).to(tl.float32)
            grad_h = tl.zeros([ROWS, W], tl.float32)
            for_gate = tl.zeros([ROWS], tl.float32)
            for start in range(0, O, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                g = tl.load(
                    grad + row.to(tl.int64)[:, None] * O + column[None, :],
                    mask=there[:, None] & (column < O)[None, :],
                    other=0.0,
                )
                weight = tl.load(
                    w_out + e * L * O + unit[None, :] * O + column[:, None],
                    mask=(unit < L)[None, :] & (column < O)[:, None],
                    other=0.0,
                )
                grad_h = tl.dot(g, weight, grad_h, input_precision=PRECISION)
                if NEED_GATE and BIAS_OUT:
                    b = tl.load(b_out + e * O + column, mask=column < O, other=0.0).to(tl.float32)
                    for_gate += tl.sum(g.to(tl.float32) * b[None, :], 1)
            hidden = h
            if GLU:
                hidden = h * value
            if NEED_GATE:
                for_gate += tl.sum(hidden * grad_h, 1)
                tl.store(grad_gate + choice, for_gate.to(grad_gate.dtype.element_ty), mask=there)
            if GATED:
                weigh = tl.load(gate + choice, mask=there, other=0.0).to(tl.float32)[:, None]
                grad_h *= weigh
                hidden *= weigh
            if GLU:
                grad_value = (grad_h * h).to(x.dtype.element_ty)
                grad_h *= value
            grad_z = (grad_h * slope).to(x.dtype.element_ty)
            if NEED_WEIGHTS:
                tl.store(grad_pre + at, grad_z, mask=kept)
                if GLU:
                    tl.store(grad_pre + at + L, grad_value, mask=kept)
                tl.store(
                    gated_hidden + place.to(tl.int64)[:, None] * L + unit[None, :],
                    hidden.to(gated_hidden.dtype.element_ty),
                    mask=kept,
                )
            if NEED_X:
                for start in range(0, D, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    w = w_in + e * H * D + unit[:, None] * D + column[None, :]
                    mask = (unit < L)[:, None] & (column < D)[None, :]
                    out = tl.dot(grad_z, tl.load(w, mask=mask, other=0.0), input_precision=PRECISION)
                    if GLU:
                        weight = tl.load(w + L * D, mask=mask, other=0.0)
                        out = tl.dot(grad_value, weight, out, input_precision=PRECISION)
                    tl.store(
                        grad_x + choice.to(tl.int64)[:, None] * D + column[None, :],
                        out.to(grad_x.dtype.element_ty),
                        mask=there[:, None] & (column < D)[None, :],
                    )


@triton.jit
def _weights(
    units,  # (M, A), by place: grad_pre or gated_hidden
    rows,  # (T, B): x or grad
    gate,  # (M,)
    order,  # (M,)
    offset,  # (E + 2,)
    grad_weight,  # (E, A, B): units^T rows
    grad_bias,  # (E, A) the sum of units, or (E, B) that of gate * rows
    A,
    B,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    OF_UNITS: tl.constexpr,
    OF_ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    e = tl.program_id(0)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([UNITS, COLUMNS], tl.float32)
    of_units = tl.zeros([UNITS], tl.float32)
    of_rows = tl.zeros([COLUMNS], tl.float32)
    end = tl.load(offset + e + 1)
    for start in range(tl.load(offset + e), end, ROWS):
        place = start + tl.arange(0, ROWS)
        there = place < end
        choice = tl.load(order + place, mask=there, other=0)
        u = tl.load(
            units + place.to(tl.int64)[None, :] * A + unit[:, None],
            mask=there[None, :] & (unit < A)[:, None],
            other=0.0,
        )
        r = tl.load(
            rows + (choice // CHOICES).to(tl.int64)[:, None] * B + column[None, :],
            mask=there[:, None] & (column < B)[None, :],
            other=0.0,
        )
        acc = tl.dot(u, r, acc, input_precision=PRECISION)
        if OF_UNITS:
            of_units += tl.sum(u.to(tl.float32), 1)
        if OF_ROWS:
            r = r.to(tl.float32)
            if GATED:
                r *= tl.load(gate + choice, mask=there, other=0.0).to(tl.float32)[:, None]
            of_rows += tl.sum(r, 0)
    at = (e.to(tl.int64) * A + unit[:, None]) * B + column[None, :]
    tl.store(grad_weight + at, acc.to(grad_weight.dtype.element_ty), mask=(unit < A)[:, None] & (column < B)[None, :])
    if OF_UNITS:
        first = tl.program_id(2) == 0
        tl.store(
            grad_bias + e.to(tl.int64) * A + unit, of_units.to(grad_bias.dtype.element_ty), mask=(unit < A) & first
        )
    if OF_ROWS:
        first = tl.program_id(1) == 0
        tl.store(
            grad_bias + e.to(tl.int64) * B + column, of_rows.to(grad_bias.dtype.element_ty), mask=(column < B) & first
        )


# The kernels then run on a CPU, in the tests.
INTERPRETED = not isinstance(_forward, triton.JITFunction)


def _precision(dtype: torch.dtype) -> str:
    return float32_precision() if dtype == torch.float32 else "ieee"


def _constants(
    index: Tensor,
    gate: Tensor | None,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    glu: bool,
) -> dict[str, object]:
    """What every kernel of one call is compiled for."""
    return {
        "CHOICES": index.shape[1],
        "L": w_out.shape[1],
        "W": _padded(w_out.shape[1]),
        "GLU": glu,
        "ACT": activation,
        "GATED": gate is not None,
        "BIAS": b_in is not None,
        "BIAS_OUT": b_out is not None,
    }


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _summed(parts: Tensor, index: Tensor) -> Tensor:
    """(M, O) parts of each choice -> (T, O)."""
    return parts if index.shape[1] == 1 else parts.unflatten(0, index.shape).sum(1)


@torch.library.custom_op(
    "fff::triton_expert_mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor? gate, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
    "str activation, bool glu, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def triton_expert_mlp(
    x: Tensor,
    index: Tensor,
    gate: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    glu: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """y (T, O); what the backward pass needs: pre (M, H) by place if `keep`, else empty; and the `TiledOrder`."""
    x, index, gate, w_in, b_in, w_out, b_out = _contiguous(x, index, gate, w_in, b_in, w_out, b_out)
    num_experts, width, out_features = w_out.shape
    choices = index.numel()
    size = tiles(choices, num_experts, width, x.element_size())
    y = x.new_empty(choices, out_features)
    pre = x.new_empty((choices, w_in.shape[1]) if keep else 0)
    with on_device(x):
        order = tiled_order(index.flatten(), num_experts, size.rows)
        if choices:
            _forward[(order.tile_group.shape[0],)](
                x,
                gate,
                w_in,
                b_in,
                w_out,
                b_out,
                *order,
                y,
                pre,
                num_experts,
                x.shape[1],
                out_features,
                **_constants(index, gate, b_in, w_out, b_out, activation, glu),
                KEEP=keep,
                ROWS=size.rows,
                COLUMNS=size.columns,
                PRECISION=_precision(x.dtype),
                num_warps=size.warps,
                num_stages=size.stages,
            )
    return _summed(y, index), pre, *order


@triton_expert_mlp.register_fake
def _(x, index, gate, w_in, b_in, w_out, b_out, activation, glu, keep):
    choices, num_experts = index.numel(), w_in.shape[0]

    def ints(size):
        return x.new_empty(size, dtype=torch.int32)

    return (
        x.new_empty(x.shape[0], w_out.shape[2]),
        x.new_empty((choices, w_in.shape[1]) if keep else 0),
        ints(choices),
        ints(num_experts + 2),
        ints(num_experts + 2),
        ints(max_tiles(choices, num_experts, tiles(choices, num_experts, w_out.shape[1], x.element_size()).rows)),
    )


@torch.library.custom_op(
    "fff::triton_expert_mlp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor index, Tensor? gate, Tensor w_in, Tensor? b_in, Tensor w_out, "
    "Tensor? b_out, Tensor pre, Tensor order, Tensor offset, Tensor tile_start, Tensor tile_group, str activation, "
    "bool glu, bool[] need) -> Tensor[]",
)
def triton_expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    gate: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    pre: Tensor,
    order: Tensor,
    offset: Tensor,
    tile_start: Tensor,
    tile_group: Tensor,
    activation: str,
    glu: bool,
    need: list[bool],
) -> list[Tensor]:
    """Gradients of x, gate, w_in, b_in, w_out and b_out; an empty tensor for each that `need` does not ask for."""
    grad, x, gate, w_in, b_in, w_out, b_out = _contiguous(grad, x, gate, w_in, b_in, w_out, b_out)
    num_experts, width, out_features = w_out.shape
    choices = index.numel()
    size = tiles(choices, num_experts, width, x.element_size(), backward=True)
    need_x, need_gate, *need_weights = need
    need_in, need_out = any(need_weights[:2]), any(need_weights[2:])
    nothing = x.new_empty(0)
    grad_x = x.new_empty(choices, x.shape[1]) if need_x else nothing
    grad_gate = torch.empty_like(gate) if need_gate else nothing
    grad_pre = x.new_empty(choices, w_in.shape[1]) if any(need_weights) else nothing
    gated_hidden = x.new_empty(choices, width) if any(need_weights) else nothing
    precision = _precision(x.dtype)
    of_sums = sum_tiles(choices, num_experts, x.element_size())

    def sums(units: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, of_units: bool) -> tuple[Tensor, Tensor]:
        """Gradients of a weight and its bias, which sums the units of an expert or its gated rows."""
        grad_weight, grad_bias = torch.empty_like(weight), nothing if bias is None else torch.empty_like(bias)
        block = min(MAX_ROWS, _padded(width))
        _weights[num_experts, triton.cdiv(weight.shape[1], block), triton.cdiv(weight.shape[2], of_sums.columns)](
            units,
            rows,
            gate,
            order,
            offset,
            grad_weight,
            grad_bias,
            *weight.shape[1:],
            CHOICES=index.shape[1],
            GATED=gate is not None,
            OF_UNITS=of_units and bias is not None,
            OF_ROWS=not of_units and bias is not None,
            UNITS=block,
            ROWS=of_sums.rows,
            COLUMNS=of_sums.columns,
            PRECISION=precision,
            num_warps=of_sums.warps,
            num_stages=of_sums.stages,
        )
        return grad_weight, grad_bias

    with on_device(x):
        if choices:
            _backward[(tile_group.shape[0],)](
                grad,
                x,
                gate,
                w_in,
                b_in,
                w_out,
                b_out,
                order,
                offset,
                tile_start,
                tile_group,
                pre,
                grad_x,
                grad_gate,
                grad_pre,
                gated_hidden,
                num_experts,
                x.shape[1],
                out_features,
                **_constants(index, gate, b_in, w_out, b_out, activation, glu),
                RECOMPUTE=pre.numel() == 0,
                NEED_X=need_x,
                NEED_GATE=need_gate,
                NEED_WEIGHTS=any(need_weights),
                ROWS=size.rows,
                COLUMNS=size.columns,
                PRECISION=precision,
                num_warps=size.warps,
                num_stages=size.stages,
            )
        of_w_in = sums(grad_pre, x, w_in, b_in, True) if need_in else (nothing, nothing)
        of_w_out = sums(gated_hidden, grad, w_out, b_out, False) if need_out else (nothing, nothing)
    grad_x = _summed(grad_x, index) if need_x else grad_x
    found = grad_x, grad_gate, *of_w_in, *of_w_out
    # A custom operator returns no tensor twice.
    return [tensor if needed else x.new_empty(0) for tensor, needed in zip(found, need, strict=True)]


@triton_expert_mlp_backward.register_fake
def _(grad, x, index, gate, w_in, b_in, w_out, b_out, pre, order, offset, tile_start, tile_group, act, glu, need):
    inputs = x, gate, w_in, b_in, w_out, b_out
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for t, needed in zip(inputs, need, strict=True)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.glu, _ = inputs
    ctx.set_materialize_grads(False)  # of all but y
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, grad: Tensor, *_):
    tensors = ctx.saved_tensors
    x, index, gate, *weights = tensors[:7]
    need = [needed for i, needed in enumerate(ctx.needs_input_grad[:7]) if i != 1]
    found = triton_expert_mlp_backward(grad, *tensors, ctx.activation, ctx.glu, need)
    grad_x, *rest = (tensor if needed else None for tensor, needed in zip(found, need, strict=True))
    return grad_x, None, *rest, None, None, None


triton_expert_mlp.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op(
    "fff::triton_expert_mlp_single",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor? gate, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
    "str activation, bool glu) -> Tensor",
)
def triton_expert_mlp_single(
    x: Tensor,
    index: Tensor,
    gate: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    glu: bool,
) -> Tensor:
    """y (T, O) of few choices, without gradient."""
    x, index, gate, w_in, b_in, w_out, b_out = _contiguous(x, index, gate, w_in, b_in, w_out, b_out)
    y = x.new_empty(index.numel(), w_out.shape[2])
    if index.numel():
        with on_device(x):
            _single[(index.numel(),)](
                x,
                index,
                gate,
                w_in,
                b_in,
                w_out,
                b_out,
                y,
                w_out.shape[0],
                x.shape[1],
                w_out.shape[2],
                **_constants(index, gate, b_in, w_out, b_out, activation, glu),
                COLUMNS=max(32, min(256, 8192 // _padded(w_out.shape[1]))),
                num_warps=8,
            )
    return _summed(y, index)


@triton_expert_mlp_single.register_fake
def _(x, index, gate, w_in, b_in, w_out, b_out, activation, glu):
    return x.new_empty(x.shape[0], w_out.shape[2])


def refusal(
    activation: str | None, device: torch.device, dtypes: set[torch.dtype], width: int, dropout: float
) -> str | None:
    """Why the kernels cannot take a call; None if they can.

    activation: `activation_name` of it.  dtypes: of rows, gates and weights, as they are computed in.  width: L.
    """
    if not (device.type == "cuda" or INTERPRETED):
        return f"it runs on CUDA devices, not on {device}"
    if dropout:
        return f"it has no dropout, which is {dropout!r}"
    if activation is None:
        return "it knows activations by name alone"
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"it takes one of float32, float16 and bfloat16, not {sorted(map(str, dtypes))}"
    if width > MAX_WIDTH:
        return f"its experts have at most {MAX_WIDTH} units, not {width}"
    return None


def dispatch(
    x: Tensor,
    index: Tensor | None,
    gate: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    act: Callable[[Tensor], Tensor],
    glu: bool,
    dropout: float,
    *,
    recompute: bool = False,
) -> Tensor:
    """recompute: do not keep pre-activations for the backward pass, compute them again there."""
    assert index is not None and not dropout, "the kernels need chosen experts and no dropout"
    call = x, index, gate, w_in, b_in, w_out, b_out, activation_name(act), glu
    gradient = records_gradient(*call[:7])
    if gradient or not few(index.numel(), w_in.shape[0]):
        return triton_expert_mlp(*call, gradient and not recompute)[0]
    return triton_expert_mlp_single(*call)
