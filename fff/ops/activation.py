"""Activations by name, so that configs stay plain text and kernels know what they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "silu", "relu2", "identity"] | Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu2": _relu2,
    "identity": _identity,
}


def resolve_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function behind a name, a callable, or an `nn.Module` class (timm's `act_layer=nn.GELU`)."""
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is none of {sorted(ACTIVATIONS)}")
        return ACTIVATIONS[activation]
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation()
    if not callable(activation):
        raise ValueError(f"activation={activation!r} is neither a name nor a callable")
    return activation
