"""Gated sum of the chosen experts, the one compute op of trees and mixtures of experts alike.

    y[t] = sum_k gate[t, k] * ( act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e] + b_out[e] ),    e = index[t, k]

T rows, D input width, O output width, E experts, L expert width, K chosen experts per row.

Backends compute the same function and the same gradients; they differ in cost:

| backend   | cost                                            | where it is best                                  |
| reference | loop over experts with boolean masks            | reading and testing                               |
| dense     | every expert for every row, two matmuls         | soft mixtures; small layers                       |
| grouped   | sort, then one matmul per expert that is hit    | hard routes, training and large batches           |
| gather    | one copy of an expert per choice                | a few rows, export to other runtimes              |
| native    | as grouped, each expert read once, one C++ call | hard routes on a CPU, training and evaluation     |
| triton    | as grouped, one program for each tile of rows   | hard routes on a GPU, training and evaluation     |

"native" needs `python -m fff.build`, a named activation, no dropout, and float32 (without gradients also bfloat16).
"triton" needs a CUDA device, a named activation, no dropout, experts of at most 256 units, and one of float32, float16
and bfloat16; products of float32 are those of tf32 where torch may use it, as by `torch.set_float32_matmul_precision`.
"grouped", "native" and "triton" have no second derivative, and neither `torch.func` transforms nor `torch.jit.trace`
take them; ask for "gather" there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fff.ops.activation import Activation, activation_name, resolve_activation
from fff.ops.context import HAS_TRITON, autocast_dtype, exporting, without_autocast
from fff.ops.expert_mlp import cpu
from fff.ops.expert_mlp.costs import Problem, cheapest
from fff.ops.expert_mlp.dense import dense
from fff.ops.expert_mlp.gather import gather
from fff.ops.expert_mlp.grouped import grouped
from fff.ops.expert_mlp.reference import reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _triton(*call: Any, **options: bool) -> Tensor:
    from fff.ops.expert_mlp.triton import dispatch

    return dispatch(*call, **options)


Backend = Literal["auto", "reference", "dense", "grouped", "gather", "native", "triton"]
BACKENDS = {
    "reference": reference,
    "dense": dense,
    "grouped": grouped,
    "gather": gather,
    "native": cpu.native,
    "triton": _triton,
}
# These compute chosen experts only and have nothing to say where every expert is asked for.
HARD_BACKENDS = ("grouped", "gather", "native", "triton")


def resolve_backend(
    backend: str,
    problem: Problem,
    *,
    native: bool = False,
    triton: bool = False,
    cuda: bool = False,
    gradient: bool = False,
    exporting: bool = False,
    compiling: bool = False,
) -> str:
    """The concrete backend that "auto" stands for; any other known name is returned as it is.

    native, triton: whether these can take the call.  cuda: whether it is on a GPU, of which `costs` knows nothing.
    gradient: whether there will be a backward pass.
    exporting, compiling: the number of rows must not decide, it would be frozen into the graph.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is none of {['auto', *BACKENDS]}")
    if problem.choices is None:
        if backend in HARD_BACKENDS:
            raise ValueError(f"backend={backend!r} needs an index; 'dense' and 'reference' compute every expert")
        return "dense" if backend == "auto" else backend
    if backend != "auto":
        return backend
    if exporting:
        return "gather"
    if native:
        return "native"
    if cuda:
        return "triton" if triton else "grouped"
    if compiling:
        return "grouped"
    return cheapest(problem, gradient)


def choose_backend(
    backend: str,
    x: Tensor,
    index: Tensor | None,
    gate: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: Activation = "relu",
    dropout: float = 0.0,
) -> str:
    """`resolve_backend` for a call of `expert_mlp`; ValueError where the kernels asked for cannot take it."""
    export = exporting()
    tensors = x, gate, w_in, b_in, w_out, b_out
    native = triton = gradient = False
    if index is not None and backend == "auto":
        gradient = cpu.records_gradient(*tensors)
    if index is not None and (backend in ("native", "triton") or backend == "auto" and not export):
        name = activation_name(resolve_activation(activation))
        if backend == "triton" or backend == "auto" and x.is_cuda:
            reason = _triton_refusal(name, tensors, dropout)
            triton = reason is None
        else:
            reason = cpu.refusal(name, *tensors, dropout=dropout)
            native = reason is None
        if reason is not None and backend != "auto":
            raise ValueError(f"backend={backend!r} cannot take this call: {reason}")
    problem = Problem(*x.shape, *w_out.shape, None if index is None else index.shape[1])
    return resolve_backend(
        backend,
        problem,
        native=native,
        triton=triton,
        cuda=x.is_cuda,
        gradient=gradient,
        exporting=export,
        compiling=torch.compiler.is_compiling(),
    )


def _triton_refusal(activation: str | None, tensors: tuple[Tensor | None, ...], dropout: float) -> str | None:
    if not HAS_TRITON:
        return "it needs triton, which torch brings along where it is built for CUDA"
    from fff.ops.expert_mlp.triton import refusal

    x, *_, w_out, _ = tensors
    dtype = autocast_dtype(x)
    dtypes = {t.dtype for t in tensors if t is not None} if dtype is None else {dtype}
    return refusal(activation, x.device, dtypes, w_out.shape[1], dropout)


def expert_mlp(
    x: Float[Tensor, "T D"],
    index: Int[Tensor, "T K"] | None,
    gate: Float[Tensor, "T K"] | None,
    w_in: Float[Tensor, "E H D"],
    b_in: Float[Tensor, "E H"] | None,
    w_out: Float[Tensor, "E L O"],
    b_out: Float[Tensor, "E O"] | None,
    *,
    activation: Activation = "relu",
    glu: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
    recompute: bool = False,
) -> Float[Tensor, "T O"]:
    """Gated sum of the chosen experts of each row.

    index: chosen experts, below E, -1 for a choice that is left out; None asks for every expert in order (K = E).
    gate: weight of each choice; None means 1.
    glu: gated experts. w_in then has H = 2 L rows, the first L pass through the activation and multiply the last L
        (Shazeer 2020, arXiv 2002.05202, equation 5); otherwise H = L.
    dropout: probability with which a hidden unit is zeroed after the activation; pass 0 outside training.
    recompute: "triton" then keeps no pre-activations for the backward pass and computes them again.
    Under autocast everything is computed in, and returned in, the autocast type; "native" computes in that of the
    weights, and sums in float32.
    """
    act = resolve_activation(activation)
    hidden_rows = w_out.shape[1] * (2 if glu else 1)
    if w_in.shape[1] != hidden_rows:
        raise ValueError(f"w_in has {w_in.shape[1]} rows per expert, but w_out and glu={glu} need {hidden_rows}")
    if x.dim() != 2 or x.shape[1] != w_in.shape[2]:
        raise ValueError(f"x has shape {tuple(x.shape)}, but w_in {tuple(w_in.shape)} needs (T, {w_in.shape[2]})")
    if index is not None and (index.dim() != 2 or index.shape[0] != x.shape[0]):
        raise ValueError(f"index has shape {tuple(index.shape)}, but x {tuple(x.shape)} needs ({x.shape[0]}, K)")
    if gate is not None and gate.shape != (x.shape[0], w_in.shape[0] if index is None else index.shape[1]):
        raise ValueError(f"gate has shape {tuple(gate.shape)}, which does not weigh the choices of {x.shape[0]} rows")
    name = choose_backend(backend, x, index, gate, w_in, b_in, w_out, b_out, activation=activation, dropout=dropout)
    if name == "native":
        return cpu.native(x, index, gate, w_in, b_in, w_out, b_out, act, glu, dropout)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, w_in, b_in, w_out, b_out = (None if t is None else t.to(dtype) for t in (x, w_in, b_in, w_out, b_out))
    gate = None if gate is None else gate.to(x.dtype)
    with without_autocast(x):
        if name == "triton":
            return _triton(x, index, gate, w_in, b_in, w_out, b_out, act, glu, dropout, recompute=recompute)
        return BACKENDS[name](x, index, gate, w_in, b_in, w_out, b_out, act, glu, dropout)
