"""One copy of the chosen expert's weights per choice and two batched matmuls: for a few rows, and for export."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fff.ops.context import summed_precisely
from fff.ops.expert_mlp.hidden import hidden_units


def gather(
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
    assert index is not None, "gather needs chosen experts"
    rows, choices = index.shape
    left_out = index.flatten() < 0
    e = index.flatten().clamp(min=0)

    def at(table: Tensor) -> Tensor:
        return summed_precisely(table)[e].to(x.dtype)

    pre = torch.bmm(at(w_in), x.repeat_interleave(choices, 0).unsqueeze(-1)).squeeze(-1)
    if b_in is not None:
        pre = pre + at(b_in)
    out = torch.bmm(hidden_units(pre, act, glu, dropout).unsqueeze(1), at(w_out)).squeeze(1)
    if b_out is not None:
        out = out + at(b_out)
    if gate is not None:
        out = out * gate.reshape(-1, 1)
    out = out.masked_fill(left_out.unsqueeze(-1), 0.0)
    return out.view(rows, choices, w_out.shape[2]).sum(1)
