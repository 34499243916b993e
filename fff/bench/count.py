"""Floating-point operations and peak memory of a call, counted rather than timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fff.ops.context import HAS_TRITON
from fff.ops.expert_mlp import cpu, grouped  # noqa: F401 - whose operators these are


def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products that a call makes, forward and backward, those of our operators and of
    PyTorch's own grouped product included; a multiply-add counts as two. Of a descent by Triton the decisions on the
    way are counted, though a matmul may make more."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call()
    return counter.get_total_flops()


def _formulas() -> dict[Any, Callable[..., int]]:
    """Operations of what torch's counter does not know, by operator."""
    known = {
        torch.ops.fff.grouped_linear: _grouped_linear,
        torch.ops.fff.grouped_linear_backward: _grouped_linear_backward,
    }
    if hasattr(torch.ops.aten, "_grouped_mm"):
        known[torch.ops.aten._grouped_mm] = _grouped_mm
    if cpu.available():
        known |= {
            torch.ops.fff.native_expert_mlp: _expert_mlp,
            torch.ops.fff.native_expert_mlp_backward: _expert_mlp_backward,
            torch.ops.fff.native_tree_mlp: _tree_mlp,
            torch.ops.fff.native_descend: _descend,
            torch.ops.fff.native_descend_backward: _descend_backward,
        }
    if HAS_TRITON:
        import fff.ops.expert_mlp.triton  # whose operators these are
        import fff.ops.tree_route.triton  # noqa: F401

        known |= {
            torch.ops.fff.triton_expert_mlp: _expert_mlp,
            torch.ops.fff.triton_expert_mlp_single: _expert_mlp,
            torch.ops.fff.triton_expert_mlp_backward: _triton_expert_mlp_backward,
            torch.ops.fff.triton_descend: _triton_descend,
            torch.ops.fff.triton_descend_backward: _triton_descend_backward,
        }
    return {operator: _of_tensors(formula) for operator, formula in known.items()}


def _of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """The counter hands over the arguments of a call as they are, rather than their shapes, and its result too."""

    def count(*arguments: Any, out_val: Any = None, **keywords: Any) -> int:
        return formula(*arguments, **keywords)

    count._get_raw = True
    return count


def _row(weight: Tensor) -> int:
    """Of one row through one matrix of (E, A, B)."""
    return 2 * weight.shape[1] * weight.shape[2]


def _grouped_mm(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Rows by group, (M, A), through (E, A, B) or, for a gradient, (A, B); or one batch of matrices by another."""
    batches = x.shape[0] if x.dim() == 3 and weight.dim() == 2 else 1  # each meets a part of the columns
    return 2 * x.numel() // batches * weight.shape[-1]


def _grouped_linear(x: Tensor, weight: Tensor, bias: Any, offset: Tensor) -> int:
    return int(offset[-1]) * _row(weight)


def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offset: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> int:
    return (need_x + need_weight) * int(offset[-1]) * _row(weight)


def _expert_mlp(x: Tensor, index: Tensor, gate: Any, w_in: Tensor, b_in: Any, w_out: Tensor, *_: Any) -> int:
    return int((index >= 0).sum()) * (_row(w_in) + _row(w_out))


def _expert_mlp_backward(
    grad: Tensor, x: Tensor, index: Tensor, gate: Any, w_in: Tensor, b_in: Any, w_out: Tensor, *rest: Any
) -> int:
    *_, (need_x, _, need_w_in, _, need_w_out, _) = rest
    # Pre-activations are computed again, and the gradient of hidden units in any case.
    through_w_in, through_w_out = 1 + need_x + need_w_in, 1 + need_w_out
    return int((index >= 0).sum()) * (through_w_in * _row(w_in) + through_w_out * _row(w_out))


def _triton_expert_mlp_backward(
    grad: Tensor, x: Tensor, index: Tensor, gate: Any, w_in: Tensor, b_in: Any, w_out: Tensor, b_out: Any, pre: Tensor,
    *rest: Any,
) -> int:  # fmt: skip
    *_, (need_x, _, need_w_in, _, need_w_out, _) = rest
    through_w_in, through_w_out = (pre.numel() == 0) + need_x + need_w_in, 1 + need_w_out
    return int((index >= 0).sum()) * (through_w_in * _row(w_in) + through_w_out * _row(w_out))


def _descend(x: Tensor, nodes: Tensor, bias: Any, decision_bias: Any, num_trees: int, depth: int) -> int:
    return 2 * x.shape[0] * num_trees * depth * x.shape[1]


def _descend_backward(
    grad: Tensor, x: Tensor, nodes: Tensor, index: Tensor, num_trees: int, depth: int, need_x: bool, need_weight: bool,
    need_bias: bool,
) -> int:  # fmt: skip
    return (need_x + need_weight) * _descend(x, nodes, None, None, num_trees, depth)


def _triton_descend(
    x: Tensor, nodes: Tensor, bias: Any, decision_bias: Any, flip: Any, num_trees: int, depth: int, levels: Any
) -> int:
    return _descend(x, nodes, bias, decision_bias, num_trees, depth)


def _triton_descend_backward(
    grad: Tensor, x: Tensor, nodes: Tensor, index: Tensor, num_trees: int, depth: int, levels: Any, *need: bool
) -> int:
    return _descend_backward(grad, x, nodes, index, num_trees, depth, *need)


def _tree_mlp(
    x: Tensor, nodes: Tensor, bias: Any, decision_bias: Any, num_trees: int, depth: int, w_in: Tensor, b_in: Any,
    w_out: Tensor, *_: Any,
) -> int:  # fmt: skip
    leaves = x.shape[0] * num_trees * (_row(w_in) + _row(w_out))
    return _descend(x, nodes, bias, decision_bias, num_trees, depth) + leaves


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most memory of the device, in bytes, that a call holds at once of what it has allocated itself.

    Counted at torch's allocator, hence exact and independent of load. What a BLAS allocates for itself is not seen,
    nor, on a CPU, the release of memory that is older than the call.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == MEMORY_EVENT_NAME and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak
