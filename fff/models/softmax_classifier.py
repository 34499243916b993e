"""The output of Chen et al. 2022 (arXiv 2208.02813): class probabilities where a classifier gives logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SoftmaxClassifier(nn.Module):
    """Class probabilities of flattened inputs, (B, ...) -> (B, num_classes), from the single layer `ff`.

    For reproducing the authors' mixtures alone: cross entropy takes the probabilities for logits and applies a second
    softmax, so that with two classes the loss cannot fall below log(1 + 1/e) = 0.3133, and the gradient of a row
    vanishes where it is wrong and sure of it. Everything else should take `Classifier`.
    """

    def __init__(self, make_ff: Callable[..., nn.Module], in_features: int, num_classes: int) -> None:
        super().__init__()
        self.ff = make_ff(in_features, out_features=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x.flatten(1)).softmax(-1)
