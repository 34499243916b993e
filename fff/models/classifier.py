"""One feedforward layer as a whole classifier: the model of the FFF paper's explorative experiments (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Logits of flattened inputs, (B, ...) -> (B, num_classes), from the single layer `ff`.

    make_ff: called as `make_ff(in_features, out_features=num_classes)`, for example
        `functools.partial(fff.FFF, leaf_width=8, depth=4)`.
    in_features: product of the input's shape without the batch axis.
    noise: standard deviation of normal noise on the inputs, in training; inputs have 1 if they are standardised.
    """

    def __init__(
        self, make_ff: Callable[..., nn.Module], in_features: int, num_classes: int, noise: float = 0.0
    ) -> None:
        super().__init__()
        if not noise >= 0:
            raise ValueError(f"noise={noise!r} must be >= 0")
        self.noise = noise
        self.ff = make_ff(in_features, out_features=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.ff(x + self.noise * torch.randn_like(x) if self.training and self.noise else x)
