"""From pre-activations to hidden units: activation, gated linear unit, dropout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def hidden_units(pre: Tensor, act: Callable[[Tensor], Tensor], glu: bool, dropout: float) -> Tensor:
    """(..., L) or, for gated experts, (..., 2 L) pre-activations -> (..., L) hidden units."""
    if glu:
        gated, value = pre.chunk(2, dim=-1)
        hidden = act(gated) * value
    else:
        hidden = act(pre)
    return F.dropout(hidden, dropout) if dropout > 0 else hidden
