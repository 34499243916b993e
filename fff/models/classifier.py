"""One feedforward layer as a whole classifier: the model of the FFF paper's explorative experiments (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Classifier(nn.Module):
    """Logits of flattened inputs, (B, ...) -> (B, num_classes), from the single layer `ff`.

    make_ff: called as `make_ff(in_features, out_features=num_classes)`, for example
        `functools.partial(fff.FFF, leaf_width=8, depth=4)`.
    in_features: product of the input's shape without the batch axis.
    """

    def __init__(self, make_ff: Callable[..., nn.Module], in_features: int, num_classes: int) -> None:
        super().__init__()
        self.ff = make_ff(in_features, out_features=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x.flatten(1))
