"""Choices brought into the order of their experts: what a dispatch moves rows by, and sums gradients over.

M choices, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


def expert_order(expert: Int[Tensor, " M"], num_experts: int) -> tuple[Int[Tensor, " M"], Int[Tensor, " bounds"]]:
    """Order that sorts choices by their expert, equal ones as they come, and E + 1 bounds: where each expert begins.

    expert: below E; negative for a choice that is left out, which comes after all others.
    Choices order[offset[e]:offset[e + 1]] are those of expert e. No host synchronisation.
    """
    ordered, order = torch.sort(torch.where(expert < 0, num_experts, expert), stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_experts + 1, device=expert.device, dtype=expert.dtype))
