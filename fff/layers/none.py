"""The control of every residual model: its feedforward layer removed."""

from __future__ import annotations

from torch import Tensor, nn

from fff.layers.check import check_positive


class NoFeedForward(nn.Module):
    """Zeros, (..., in_features) -> (..., out_features) in x's dtype, so that a residual block adds nothing.

    No routed layer: it has no parameters, no size and no record.
    """

    def __init__(self, in_features: int, out_features: int | None = None) -> None:
        super().__init__()
        self.out_features = in_features if out_features is None else out_features
        check_positive(in_features=in_features, out_features=self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)
