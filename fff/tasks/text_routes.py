"""Where characters go: the experts that each class of characters is sent to, layer by layer, and whether neighbours
stay together, as Jiang et al. 2024 (Mixtral, arXiv 2401.04088, section 5) asked of tokens.

S layers with two experts or more, C classes of characters, E experts of the largest layer.
"""

from __future__ import annotations

import string
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


def character_class(character: str) -> int:
    """Index in `CLASSES`; what is nothing else counts as punctuation."""
    if character in string.ascii_letters:
        return 2 * character.islower() + (character.lower() not in "aeiou")
    return {" ": 4, "\n": 5}.get(character, 6 if character.isdigit() else 7)


def measure_text_routes(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], characters: Sequence[str]
) -> dict[str, np.ndarray] | None:
    """Arrays by name, of the hard route's first choices (of several trees: in the first); None where no layer has two
    experts. A choice that a capacity dropped counts nowhere.

    count: (S, C, E) characters of each class that a layer sends to each expert, 0 where it has fewer.
    repeated: (S,) share of the pairs of neighbours in a window that go to one expert.
    layer: (S,) number of the layer among all routed ones, from 1.  classes: (C,) names.
    """
    class_of = torch.tensor([character_class(character) for character in characters])
    count: dict[int, Tensor] = {}
    pairs: dict[int, Tensor] = {}  # that go to one expert, and all
    for x, y in batches:
        evaluate(model, [(x, y)])
        classes = class_of[x]
        for number, (_, record) in enumerate(routing(model), start=1):
            experts = record.num_experts
            if experts < 2:
                continue
            first = record.index[:, 0].cpu().view(classes.shape)
            kept = first >= 0
            cell = (classes * experts + first)[kept].bincount(minlength=len(CLASSES) * experts)
            both = kept[:, 1:] & kept[:, :-1]
            same = both & (first[:, 1:] == first[:, :-1])
            count[number] = count.get(number, 0) + cell.view(len(CLASSES), experts)
            pairs[number] = pairs.get(number, 0) + torch.stack([same.sum(), both.sum()])
    if not count:
        return None
    experts = max(table.shape[1] for table in count.values())
    tables = [nn.functional.pad(table, (0, experts - table.shape[1])) for table in count.values()]
    return {
        "count": torch.stack(tables).numpy().astype(np.int32),
        "repeated": np.array([float(same / every) for same, every in pairs.values()]),
        "layer": np.array(list(count), dtype=np.int16),
        "classes": np.array(CLASSES),
    }
