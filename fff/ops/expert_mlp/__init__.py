"""Gated sum of the chosen experts, the one compute op of trees and mixtures of experts alike.

    y[t] = sum_k gate[t, k] * ( act(x[t] @ w_in[e].T + b_in[e]) @ w_out[e] + b_out[e] ),    e = index[t, k]

T rows, D input width, O output width, E experts, L expert width, K chosen experts per row.

Backends compute the same function and the same gradients; they differ in cost:

| backend   | needs        | cost                                   | where it is best                           |
| reference | -            | loop over experts with boolean masks   | reading and testing                        |
| dense     | index=None   | every expert for every row, two matmuls| soft mixtures                              |
| grouped   | index        | one matmul per expert that is hit      | hard routes, training and large batches    |
| gather    | index        | one copy of an expert per choice       | a few rows, export to other runtimes       |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fff.ops.activation import Activation, resolve_activation
from fff.ops.expert_mlp.dense import dense
from fff.ops.expert_mlp.gather import gather
from fff.ops.expert_mlp.grouped import grouped
from fff.ops.expert_mlp.reference import reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BACKENDS = {"reference": reference, "dense": dense, "grouped": grouped, "gather": gather}

# Up to this many choices a batch copies its experts' weights faster than it sorts its rows (measured on a CPU).
GATHER_CHOICES = 4


def resolve_backend(backend: str, *, soft: bool, num_choices: int | None, exporting: bool = False) -> str:
    """The concrete backend that "auto" stands for; any other known name is returned as it is.

    soft: every expert is asked for (index=None).  num_choices: rows times chosen experts, None if not known.
    """
    if backend == "auto":
        if soft:
            return "dense"
        if exporting:
            return "gather"
        return "gather" if num_choices is not None and num_choices <= GATHER_CHOICES else "grouped"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {['auto', *BACKENDS]}")
    if soft and backend in ("grouped", "gather"):
        raise ValueError(f"backend={backend!r} needs an index; use 'dense' or 'reference' where every expert is asked for")
    if not soft and backend == "dense":
        raise ValueError("backend='dense' computes every expert and takes no index; use 'grouped' or 'gather'")
    return backend


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
) -> Float[Tensor, "T O"]:
    """Gated sum of the chosen experts of each row.

    index: chosen experts, -1 for a choice that is left out; None asks for every expert in order (K = E).
    gate: weight of each choice; None means 1.
    glu: gated experts. w_in then has H = 2 L rows, the first L pass through the activation and multiply the last L
        (Shazeer 2020, arXiv 2002.05202, equation 5); otherwise H = L.
    dropout: probability with which a hidden unit is zeroed after the activation; pass 0 outside training.
    Under autocast everything is computed in, and returned in, the autocast type.
    """
    act = resolve_activation(activation)
    num_choices = None if index is None else index.shape[0] * index.shape[1]
    if torch.compiler.is_compiling():  # a size that decides the backend would freeze the batch size into the graph
        num_choices = None
    name = resolve_backend(
        backend, soft=index is None, num_choices=num_choices, exporting=torch.compiler.is_exporting()
    )
    hidden_rows = w_out.shape[1] * (2 if glu else 1)
    if w_in.shape[1] != hidden_rows:
        raise ValueError(f"w_in has {w_in.shape[1]} rows per expert, but w_out and glu={glu} need {hidden_rows}")
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            x, gate, w_in, b_in, w_out, b_out = (
                None if t is None else t.to(dtype) for t in (x, gate, w_in, b_in, w_out, b_out)
            )
            return BACKENDS[name](x, index, gate, w_in, b_in, w_out, b_out, act, glu, dropout)
    return BACKENDS[name](x, index, gate, w_in, b_in, w_out, b_out, act, glu, dropout)
