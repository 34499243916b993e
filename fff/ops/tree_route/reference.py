"""Tree routing as the FFF paper writes it (arXiv 2308.14711, algorithm 1), one row and one node at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def leaf_probability(logits: Tensor, depth: int) -> Tensor:
    """logits (T, N) -> (T, 2^depth): FORWARD_T sends c of the weight to the right child and 1 - c to the left."""

    def below(node: int, level: int, weight: Tensor) -> list[Tensor]:
        if level == depth:
            return [weight]
        c = torch.sigmoid(logits[:, node])
        return below(2 * node + 1, level + 1, weight * (1 - c)) + below(2 * node + 2, level + 1, weight * c)

    return torch.stack(below(0, 0, logits.new_ones(logits.shape[0])), dim=1)


def greedy_leaf(logits: Tensor, depth: int) -> Tensor:
    """logits (T, N) -> (T,): FORWARD_I goes right where c >= 1/2."""
    leaf = []
    for row in logits:
        node = 0
        for _ in range(depth):
            node = 2 * node + (2 if row[node] >= 0 else 1)
        leaf.append(node - (2**depth - 1))
    return torch.tensor(leaf, dtype=torch.int64)
