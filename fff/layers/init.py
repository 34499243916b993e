"""Initialisation shared by the layers."""

from __future__ import annotations

import math

from torch import Tensor, nn


def uniform_fan_in_(fan_in: int, *parameters: Tensor | None) -> None:
    """Uniform in +-1/sqrt(fan_in), the law of `nn.Linear` and of the authors' package; None is passed over."""
    bound = 1 / math.sqrt(fan_in)
    for parameter in parameters:
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)
