"""Every expert for every row as one wide matmul pair; the gate scales hidden units, so no (T, E, O) tensor exists.

For chosen experts the gate of the others is 0: more arithmetic than a hard route needs, but no work per expert. An
expert that overflows spoils its own rows alone, but the weights of all experts must be finite, as 0 * inf is not 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fff.ops.context import summed_precisely
from fff.ops.expert_mlp.hidden import hidden_units


def dense(
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
    num_experts, hidden_rows, _ = w_in.shape
    pre = F.linear(x, w_in.flatten(0, 1), None if b_in is None else b_in.flatten())
    pre = pre.unflatten(1, (num_experts, hidden_rows))
    bias = None
    if index is not None:
        gate = x.new_ones(index.shape) if gate is None else gate
        left_out = index < 0
        if b_out is not None:
            chosen_bias = summed_precisely(b_out)[index.clamp(min=0)] * gate.unsqueeze(-1)
            bias = chosen_bias.masked_fill(left_out.unsqueeze(-1), 0.0).sum(1).to(x.dtype)
        # One column more takes up the choices that are left out (-1).
        column = torch.where(left_out, num_experts, index)
        wide = x.new_zeros(x.shape[0], num_experts + 1)
        chosen = wide.bool().scatter(1, column, True)[:, :num_experts]
        gate = wide.to(gate.dtype).scatter_add(1, column, gate)[:, :num_experts]
        # A gate of 0 would not stop an infinite hidden unit of an expert that was not chosen.
        pre = pre.masked_fill(~chosen.unsqueeze(-1), 0.0)
    elif b_out is not None:
        bias = b_out.sum(0).expand(x.shape[0], -1) if gate is None else gate @ b_out
    hidden = hidden_units(pre, act, glu, dropout)
    if gate is not None:
        hidden = hidden * gate.unsqueeze(-1)
    w = w_out.flatten(0, 1)
    return hidden.flatten(1) @ w if bias is None else torch.addmm(bias, hidden.flatten(1), w)
