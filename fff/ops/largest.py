"""The k largest entries, of equal ones the first: what `torch.topk` does not promise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fff.ops.context import exporting

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def largest(score: Float[Tensor, "... E"], k: int) -> Int[Tensor, "... k"]:
    """Indices of the k largest entries along the last axis, largest first, of equal ones the lower index first; nan
    counts as the largest value."""
    num = score.shape[-1]
    if not 1 <= k <= num:
        raise ValueError(f"k={k}, expected 1 <= k <= number of experts ({num})")
    limit = torch.finfo(score.dtype)
    score = score.detach().nan_to_num(limit.max, limit.max, limit.min)
    if (k > 8 or num <= 2 * k) and not exporting():  # a stable sort has no form in ONNX
        return score.argsort(dim=-1, descending=True, stable=True)[..., :k]
    # Few passes of argmax (first of equal maxima) among many cost a fraction of a stable sort.
    chosen = []
    for _ in range(k):
        chosen.append(score.argmax(dim=-1, keepdim=True))
        score = score.scatter(-1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=-1)
