"""Where tokens go: the experts that each class of tokens is sent to, layer by layer, and whether neighbours stay
together, as Jiang et al. 2024 (Mixtral, arXiv 2401.04088, section 5) asked.

S layers that choose among their experts, C classes of tokens, E experts of the largest layer.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fff.layers.contract import routing
from fff.tasks.protocol import evaluate

CLASSES = (
    *("upper vowel", "upper consonant", "lower vowel", "lower consonant"),
    *("space", "newline", "digit", "punctuation"),
)


def token_class(token: str) -> int:
    """Index in `CLASSES`, by the first character that is no space: tokenizers keep the space before a word in its
    token. What is nothing else counts as punctuation."""
    character = token.lstrip(" ")[:1] or " "
    if character in string.ascii_letters:
        return 2 * character.islower() + (character.lower() not in "aeiou")
    return {" ": 4, "\n": 5}.get(character, 6 if character.isdigit() else 7)


def measure_text_routes(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], vocabulary: Sequence[str]
) -> dict[str, np.ndarray] | None:
    """Arrays by name, of the hard route's choices (of several trees: of the first tree's); None where no layer chooses
    among its experts. A choice that a capacity dropped counts nowhere.

    vocabulary: each token as text.
    count: (S, C, E) tokens of each class whose first choice a layer's expert is, 0 where it has fewer.
    repeated: (S,) share of the pairs of neighbours in a window that have the same first choice.
    shared: (S,) share of the pairs that have one of their first two choices in common; nan where a layer makes one.
    shared_chance: (S,) that share, were the two choices of each token drawn together, but whatever the neighbour's are.
    layer: (S,) number of the layer among all routed ones, from 1.  classes: (C,) names.
    """
    class_of = torch.tensor([token_class(token) for token in vocabulary])
    found: dict[int, _LayerRoutes] = {}
    for x, y in batches:
        evaluate(model, [(x, y)])
        for number, (_, record) in enumerate(routing(model), start=1):
            trees = 1 if record.tree is None else record.num_experts // 2**record.tree.depth
            experts, choices = record.num_experts // trees, record.index.shape[1] // trees
            if choices < experts:
                index = record.index[:, : min(choices, 2)].cpu().unflatten(0, x.shape)
                found.setdefault(number, _LayerRoutes(experts)).add(index, class_of[x])
    if not found:
        return None
    widest = max(layer.count.shape[1] for layer in found.values())
    tables = [nn.functional.pad(layer.count, (0, widest - layer.count.shape[1])) for layer in found.values()]
    return {
        "count": torch.stack(tables).numpy().astype(np.int32),
        "repeated": np.array([layer.repeated for layer in found.values()]),
        "shared": np.array([layer.shared for layer in found.values()]),
        "shared_chance": np.array([layer.shared_chance for layer in found.values()]),
        "layer": np.array(list(found), dtype=np.int16),
        "classes": np.array(CLASSES),
    }


class _LayerRoutes:
    """Counts of one layer, over batches of index (B, P, 1 or 2), -1: dropped, and classes (B, P)."""

    def __init__(self, experts: int) -> None:
        self.count = torch.zeros(len(CLASSES), experts, dtype=torch.int64)
        self._same_first = torch.zeros(2, dtype=torch.int64)  # pairs: of one first choice, and all
        self._share_one = torch.zeros(2, dtype=torch.int64)
        self._sets: Counter[int] = Counter()  # tokens by their first two choices

    def add(self, index: Tensor, classes: Tensor) -> None:
        experts, first = self.count.shape[1], index[..., 0]
        cell = (classes * experts + first)[first >= 0]
        self.count += cell.bincount(minlength=self.count.numel()).view_as(self.count)
        self._same_first += _pairs(index[..., :1])
        if index.shape[2] == 2:
            self._share_one += _pairs(index)
            low, high = index[(index >= 0).all(-1)].sort(-1).values.unbind(-1)
            sets, count = (low * experts + high).unique(return_counts=True)
            self._sets.update(dict(zip(sets.tolist(), count.tolist(), strict=True)))

    @property
    def repeated(self) -> float:
        return float(self._same_first[0] / self._same_first[1])

    @property
    def shared(self) -> float:
        return float(self._share_one[0] / self._share_one[1])

    @property
    def shared_chance(self) -> float:
        """Two sets of two have as many experts in common as the sum over the experts that are in both; where that is
        two, they are the same set and counted once too often."""
        experts, total = self.count.shape[1], self._sets.total()
        load: Counter[int] = Counter()
        for members, count in self._sets.items():
            load.update({expert: count for expert in divmod(members, experts)})
        common, same = (sum(count**2 for count in counts.values()) for counts in (load, self._sets))
        return (common - same) / total**2 if total else math.nan


def _pairs(index: Tensor) -> Tensor:
    """Pairs of neighbours along P of (B, P, K) choices that have one in common, and all pairs that have all theirs."""
    before, after = index[:, :-1], index[:, 1:]
    known = ((before >= 0) & (after >= 0)).all(-1)
    common = (before.unsqueeze(-1) == after.unsqueeze(-2)).any(-1).any(-1)
    return torch.stack([(known & common).sum(), known.sum()])
