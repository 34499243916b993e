"""The formula of the gated expert sum, one expert after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fff.ops.expert_mlp.hidden import hidden_units


def reference(
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
    num_experts = w_in.shape[0]
    if index is None:
        index = torch.arange(num_experts, device=x.device).expand(x.shape[0], num_experts)
    if gate is None:
        gate = x.new_ones(index.shape)
    y = x.new_zeros(x.shape[0], w_out.shape[2])
    for e in range(num_experts):
        row, choice = torch.nonzero(index == e, as_tuple=True)
        pre = x[row] @ w_in[e].T
        if b_in is not None:
            pre = pre + b_in[e]
        out = hidden_units(pre, act, glu, dropout) @ w_out[e]
        if b_out is not None:
            out = out + b_out[e]
        y.index_add_(0, row, gate[row, choice, None] * out)
    return y
