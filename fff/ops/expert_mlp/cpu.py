"""Native operators for hard routes on a CPU: `python -m fff.build` compiles cpu.cpp once, this module finds the result.

Their gradients are native too, in float32; there is no second derivative.

T rows, D input width, O output width, E experts, L expert width, K chosen experts, P trees, d depth, N = 2^d - 1 nodes.

Nothing here needs a compiler: without a compiled library `available()` is False and "auto" takes a PyTorch backend.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor

from fff.ops.activation import activation_name

_DTYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).with_name("cpu.cpp")
# By what torch finds in the processor, so that one cache serves different machines.
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def compiler_flags() -> list[str]:
    """Options of the C++ compiler for this processor; `torch.utils.cpp_extension` adds the standard and the headers."""
    capability = torch.backends.cpu.get_cpu_capability()
    arch = [*_FLAGS[capability], f"-DCPU_CAPABILITY_{capability}"] if capability in _FLAGS else []
    name = capability if arch else "DEFAULT"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return ["-O3", "-ffp-contract=fast", f"-DCPU_CAPABILITY={name}", *arch, *openmp]


def library_path() -> Path:
    """Where the compiled library lies: `$XDG_CACHE_HOME/fff`, else `~/.cache/fff`, one file for each version of source,
    torch and processor."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fff")
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((torch.__version__, os.uname().machine, compiler_flags())).encode())
    return root / f"native-{key.hexdigest()[:16]}.so"


def _load() -> str:
    """Load the compiled library; why not, or ""."""
    try:
        path = library_path()
        if not path.exists():
            return "it is not built"
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError, AttributeError) as error:
        warnings.warn(f"the native operators cannot be loaded, PyTorch backends serve instead: {error}", stacklevel=2)
        return f"it cannot be loaded ({error})"
    return ""


_missing = _load()


def available() -> bool:
    """Whether the native operators are loaded."""
    return not _missing


def broken() -> bool:
    """Whether there was a library that could not be loaded."""
    return _missing.startswith("it cannot be loaded")


if not _missing:

    @torch.library.register_fake("fff::native_expert_mlp")
    def _(x, index, gate, w_in, b_in, w_out, b_out, activation, glu):
        return x.new_empty(x.shape[0], w_out.shape[2])

    @torch.library.register_fake("fff::native_tree_mlp")
    def _(x, node_weight, node_bias, decision_bias, num_trees, depth, w_in, b_in, w_out, b_out, activation, glu):
        return (
            x.new_empty(x.shape[0], w_out.shape[2]),
            x.new_empty(x.shape[0], num_trees, dtype=torch.int64),
            x.new_empty(x.shape[0], num_trees, 1, depth, dtype=torch.float32),
        )

    @torch.library.register_fake("fff::native_expert_mlp_backward")
    def _(grad_y, x, index, gate, w_in, b_in, w_out, b_out, activation, glu, need):
        inputs = x, gate, w_in, b_in, w_out, b_out
        return [
            x.new_empty(0) if t is None or not needed else x.new_empty(t.shape)
            for t, needed in zip(inputs, need, strict=True)
        ]

    @torch.library.register_fake("fff::native_descend")
    def _(x, node_weight, node_bias, decision_bias, num_trees, depth):
        rows = x.shape[0]
        return x.new_empty(rows, num_trees, dtype=torch.int64), x.new_empty(rows, num_trees, 1, depth)

    @torch.library.register_fake("fff::native_descend_backward")
    def _(grad_logit, x, node_weight, index, num_trees, depth, need_x, need_weight, need_bias):
        nodes = node_weight.shape[0]
        return (
            x.new_empty(x.shape if need_x else 0),
            x.new_empty(node_weight.shape if need_weight else 0),
            x.new_empty(nodes if need_bias else 0),
        )


def refusal(
    activation: str | None, x: Tensor, gate: Tensor | None, *weights: Tensor | None, dropout: float = 0.0
) -> str | None:
    """Why the native operators cannot take a call; None if they can.

    activation: `activation_name` of it.  weights: of one type and device; the first one speaks for all.
    """
    if _missing:
        return f"{_missing}; run: python -m fff.build"
    if dropout:
        return f"it has no dropout, which is {dropout!r}"
    if activation is None:
        return "it knows activations by name alone"
    if not (x.is_cpu and weights[0].dtype in _DTYPES):
        return f"it takes float32 and bfloat16 on the CPU, not {weights[0].dtype} on {x.device}"
    if weights[0].dtype != torch.float32 and records_gradient(x, gate, *weights):
        return f"it has gradients in float32 alone, not in {weights[0].dtype}; use torch.no_grad()"
    return None


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a function of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _given(gradients: Iterable[Tensor], needed: Iterable[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


class _Undifferentiable(torch.autograd.Function):
    """A gradient, in whose own history stands all that it was computed from."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.clone()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("the native operators have no second derivative; ask for backend='gather'")


def _once_differentiable(backward: Callable) -> Callable:
    """As torch's decorator of that name, which lets a gradient pass for a constant where no incoming one requires a
    gradient, as in that of `y.sum()`: a second derivative would then lack what goes through it, and nothing say so.
    """

    @wraps(backward)
    def checked(ctx, *gradients):
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        sources = *gradients, *ctx.saved_tensors
        return tuple(None if t is None else _Undifferentiable.apply(t, *sources) for t in found)

    return checked


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, gate, w_in, b_in, w_out, b_out, activation, glu):
        ctx.save_for_backward(x, index, gate, w_in, b_in, w_out, b_out)
        ctx.call = activation, glu
        return torch.ops.fff.native_expert_mlp.default(x, index, gate, w_in, b_in, w_out, b_out, activation, glu)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad_y):
        x, index, gate, *weights = ctx.saved_tensors
        need = [needed for i, needed in enumerate(ctx.needs_input_grad[:7]) if i != 1]
        dtype = weights[0].dtype  # that of rows, gates and result is another one under autocast
        found = torch.ops.fff.native_expert_mlp_backward.default(
            grad_y.to(dtype), x.to(dtype), index, None if gate is None else gate.to(dtype), *weights, *ctx.call, need
        )
        grad_x, grad_gate, *grad_weights = _given(found, need)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        grad_gate = None if grad_gate is None else grad_gate.to(gate.dtype)
        return grad_x, None, grad_gate, *grad_weights, None, None


class _Descend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, node_weight, node_bias, decision_bias, num_trees, depth):
        index, logit = torch.ops.fff.native_descend.default(x, node_weight, node_bias, decision_bias, num_trees, depth)
        ctx.save_for_backward(x, node_weight, index)
        ctx.call = num_trees, depth
        ctx.mark_non_differentiable(index)
        return index, logit

    @staticmethod
    @_once_differentiable
    def backward(ctx, _, grad_logit):
        need = ctx.needs_input_grad[:3]
        found = torch.ops.fff.native_descend_backward.default(grad_logit, *ctx.saved_tensors, *ctx.call, *need)
        return *_given(found, need), None, None, None


def native(
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
    assert index is not None and not dropout, "native needs chosen experts and no dropout"
    call = x, index, gate, w_in, b_in, w_out, b_out, activation_name(act), glu
    if records_gradient(x, gate, w_in, b_in, w_out, b_out):
        return _ExpertMLP.apply(*call)
    return torch.ops.fff.native_expert_mlp.default(*call)


def descend(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    decision_bias: Tensor | None,
    num_trees: int,
    depth: int,
) -> tuple[Tensor, Tensor]:
    """The descent of `tree_mlp` alone, in float32: leaf of each row in each tree (T, P), counted over all trees, and
    the logits on the way, (T, P, 1, d), differentiable."""
    call = x, node_weight, node_bias, decision_bias, num_trees, depth
    if records_gradient(x, node_weight, node_bias):
        return _Descend.apply(*call)
    return torch.ops.fff.native_descend.default(*call)


def tree_mlp(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    decision_bias: Tensor | None,
    num_trees: int,
    depth: int,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    glu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy descent (`fff.ops.tree_route.greedy_leaf`) and the leaf it ends in, each with weight 1, in one call.

    node_weight (P N, D), node_bias and decision_bias (P N,): heap order, tree by tree. The experts are the leaves, tree
    by tree, E = P 2^d.
    Returns y (T, O), the leaf of each row in each tree (T, P), counted over all trees, and the logits on the way to it,
    (T, P, 1, d) float32, without the decision bias.
    """
    return torch.ops.fff.native_tree_mlp.default(
        x, node_weight, node_bias, decision_bias, num_trees, depth, w_in, b_in, w_out, b_out, activation, glu
    )
