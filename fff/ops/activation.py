"""Activations by name, so that configs stay plain text and kernels know what they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "relu2", "identity"] | Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    """The approximation that GPT-2 was trained with (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu2": _relu2,
    "identity": _identity,
}


# Modules that compute the same, as far as their defaults go.
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}
_NAMES = {function: name for name, function in ACTIVATIONS.items()}


def activation_name(act: Callable[[Tensor], Tensor]) -> str | None:
    """The name that a resolved activation has; None if it has none."""
    if isinstance(act, nn.Module):
        if type(act) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
        return _MODULES.get(type(act))
    return _NAMES.get(act)


def resolve_activation(activation: Activation, argument: str = "activation") -> Callable[[Tensor], Tensor]:
    """The function behind a name, a callable, or an `nn.Module` class (timm's `act_layer=nn.GELU`); `argument` is how
    errors call it."""
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"{argument}={activation!r} is none of {sorted(ACTIVATIONS)}")
        return ACTIVATIONS[activation]
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation()
    if not callable(activation):
        raise ValueError(f"{argument}={activation!r} is neither a name nor a callable")
    return activation
