"""Rows sorted by expert, one matmul per expert that is hit; plain PyTorch, any device, with gradients.

The loop over groups sits in two custom operators, so that `torch.compile` and `torch.export` see them whole, and so
that the backward pass fills one gradient tensor per weight instead of adding up one full-size tensor per expert.
Where no gradient is recorded, each group goes through both layers at once, while its rows are in the cache.

In bfloat16 on a GPU the loop is one call of `torch.nn.functional.grouped_mm`, where that takes the sizes (`at_once`):
hundreds of small products cost the host more than the GPU, and the loop has to wait for the sizes of the groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fff.ops.expert_mlp.hidden import hidden_units
from fff.ops.expert_order import expert_order

MAX_GROUPS = 1024  # of torch's grouped product, up to torch 2.11 at least


def at_once(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product multiplies rows by (E, A, B): bfloat16, rows of whole 16 bytes, a GPU from Hopper
    on, as on others torch loops as well."""
    if not (hasattr(F, "grouped_mm") and x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and len(x)):
        return False
    aligned = all(number % 8 == 0 for number in (*weight.shape[1:], x.storage_offset(), weight.storage_offset()))
    return aligned and weight.shape[0] <= MAX_GROUPS and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _group(rows: int, offset: Tensor) -> Tensor:
    """(rows,) group of each row; E for those after the last offset."""
    row = torch.arange(rows, device=offset.device)
    return torch.searchsorted(offset[1:], row, right=True)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """`grouped_linear` where it is done at once; what the product leaves out of y is undefined."""
    y = F.grouped_mm(x, weight, offs=offset[1:].to(torch.int32))
    group = _group(x.shape[0], offset)
    if bias is not None:
        y += bias.index_select(0, group.clamp(max=weight.shape[0] - 1))
    return y.masked_fill_((group == weight.shape[0]).unsqueeze(1), 0)


def _hit(offset: Tensor) -> tuple[list[int], list[int]]:
    """Experts with rows, and how many each has; one host synchronisation, no host work per empty group."""
    count = offset.diff()
    expert = torch.nonzero(count).squeeze(1)
    experts, counts = torch.stack([expert, count[expert]]).tolist()
    return experts, counts


@torch.library.custom_op(
    "fff::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias, Tensor offset) -> Tensor"
)
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """x (M, A) sorted by group, weight (E, A, B), bias (E, B), offset (E + 1,) int64 -> (M, B).

    Rows offset[e]:offset[e + 1] belong to group e; rows after the last offset give zeros.
    """
    if at_once(x, weight):
        return _product(x, weight, bias, offset)
    y = x.new_empty(x.shape[0], weight.shape[2])
    experts, counts = _hit(offset)
    rest = x.shape[0] - sum(counts)
    *groups, _ = x.split([*counts, rest])
    *outputs, unused = y.split([*counts, rest])
    unused.zero_()
    for e, rows, out in zip(experts, groups, outputs, strict=True):
        if bias is None:
            torch.mm(rows, weight[e], out=out)
        else:
            torch.addmm(bias[e], rows, weight[e], out=out)
    return y


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _bias_gradient(grad: Tensor, group: Tensor, num_groups: int) -> Tensor:
    # A GPU would round the sum to the type of the rows each time that it adds one.
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(num_groups, grad.shape[1], dtype=wide)
    return total.index_add_(0, group, grad.to(wide)).to(grad.dtype)


def _gradients_at_once(
    grad: Tensor, x: Tensor, weight: Tensor, offset: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = x.new_empty(0)
    end, num_groups = offset[1:].to(torch.int32), weight.shape[0]
    grad_x = _product(grad, weight.transpose(1, 2), None, offset) if need_x else nothing
    grad_weight = nothing
    if need_weight:
        # As the parameter lies in memory; a group without rows has no product.
        grad_weight = torch.empty_like(weight).copy_(F.grouped_mm(x.T, grad, offs=end))
        grad_weight.masked_fill_((offset.diff() == 0).view(-1, 1, 1), 0)
    if need_bias:
        # Of a group more than there are, for the rows that are left out.
        return grad_x, grad_weight, _bias_gradient(grad, _group(len(grad), offset), num_groups + 1)[:num_groups]
    return grad_x, grad_weight, nothing


@torch.library.custom_op(
    "fff::grouped_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor offset, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
)
def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offset: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `grouped_linear` for x, weight and bias; an empty tensor for each that is not needed."""
    if at_once(x, weight):
        return _gradients_at_once(grad, x, weight, offset, need_x, need_weight, need_bias)
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    # zeros_like keeps the strides of a transposed weight, so that the gradient lies in memory as the parameter does.
    grad_weight = torch.zeros_like(weight) if need_weight else x.new_empty(0)
    grad_bias = x.new_zeros(weight.shape[0], weight.shape[2]) if need_bias else x.new_empty(0)
    experts, counts = _hit(offset)
    kept = sum(counts)
    grads = grad[:kept].split(counts)
    if need_x:
        for e, rows, out in zip(experts, grads, grad_x[:kept].split(counts), strict=True):
            torch.mm(rows, weight[e].T, out=out)
    if need_weight:
        for e, inputs, rows in zip(experts, x[:kept].split(counts), grads, strict=True):
            torch.mm(inputs.T, rows, out=grad_weight[e])
    if need_bias:
        group = torch.repeat_interleave(offset.diff(), output_size=kept)
        grad_bias = _bias_gradient(grad[:kept], group, weight.shape[0])
    return grad_x, grad_weight, grad_bias


@grouped_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offset: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        x.new_empty(weight.shape[0], weight.shape[2]) if need_bias else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, offset = inputs
    ctx.save_for_backward(x, weight, offset)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor):
    x, weight, offset = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    need_bias = ctx.has_bias and ctx.needs_input_grad[2]
    grad_x, grad_weight, grad_bias = grouped_linear_backward(
        grad.contiguous(), x, weight, offset, need_x, need_weight, need_bias
    )
    return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias if need_bias else None, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)


def grouped(
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
) -> Tensor:
    assert index is not None, "grouped needs chosen experts"
    rows, choices = index.shape
    order, offset = expert_order(index.flatten(), w_in.shape[0])
    row = order if choices == 1 else torch.div(order, choices, rounding_mode="floor")
    gate = None if gate is None else gate.flatten().index_select(0, order).unsqueeze(-1)
    together = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if not (together or at_once(x, w_in.transpose(1, 2)) and at_once(x, w_out)):
        return _without_gradient(x, row, gate, offset, w_in, b_in, w_out, b_out, act, glu, dropout)
    pre = grouped_linear(x.index_select(0, row), w_in.transpose(1, 2), b_in, offset)
    out = grouped_linear(hidden_units(pre, act, glu, dropout), w_out, b_out, offset)
    if gate is not None:
        out = out * gate
    if choices == 1:
        return torch.empty_like(out).index_copy(0, row, out)
    return out.new_zeros(rows, out.shape[1]).index_add(0, row, out)


def _without_gradient(
    x: Tensor,
    row: Tensor,
    gate: Tensor | None,
    offset: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    act: Callable[[Tensor], Tensor],
    glu: bool,
    dropout: float,
) -> Tensor:
    y = x.new_zeros(x.shape[0], w_out.shape[2])
    experts, counts = _hit(offset)
    kept = sum(counts)
    gates = [None] * len(counts) if gate is None else gate[:kept].split(counts)
    for e, rows, weight in zip(experts, row[:kept].split(counts), gates, strict=True):
        pre = F.linear(x.index_select(0, rows), w_in[e], None if b_in is None else b_in[e])
        hidden = hidden_units(pre, act, glu, dropout)
        out = hidden @ w_out[e] if b_out is None else torch.addmm(b_out[e], hidden, w_out[e])
        y.index_add_(0, rows, out if weight is None else out * weight)
    return y
