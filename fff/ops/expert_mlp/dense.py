"""Every expert for every row as one wide matmul pair; the gate scales hidden units, so no (T, E, O) tensor exists.

For chosen experts the gate of the others is 0: more arithmetic than a hard route needs, but no work per expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    if index is not None:
        gate = x.new_ones(index.shape) if gate is None else gate
        # One column more takes up the choices that are left out (-1).
        column = torch.where(index < 0, num_experts, index)
        gate = gate.new_zeros(x.shape[0], num_experts + 1).scatter_add(1, column, gate)[:, :num_experts]
    pre = torch.nn.functional.linear(x, w_in.flatten(0, 1), None if b_in is None else b_in.flatten())
    hidden = hidden_units(pre.unflatten(1, (num_experts, hidden_rows)), act, glu, dropout)
    if gate is not None:
        hidden = hidden * gate.unsqueeze(-1)
    w = w_out.flatten(0, 1)
    if b_out is None:
        return hidden.flatten(1) @ w
    bias = b_out.sum(0).expand(x.shape[0], -1) if gate is None else gate @ b_out
    return torch.addmm(bias, hidden.flatten(1), w)
