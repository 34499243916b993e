"""A layer as plain JSON, its class and the arguments of its constructor, and a new layer from that."""

from __future__ import annotations

import json
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import nn

from fff.layers.contract import RoutedLayer
from fff.ops.activation import activation_name, resolve_activation


def to_config(layer: nn.Module) -> dict[str, Any]:
    """{"class": "FFF", "arguments": {"in_features": 768, "depth": 7, ...}} of a layer as it is now, no weights.

    ValueError for what `from_config` could not make again: a module that is no layer of this package or subclass of
    one, arguments that JSON has no form of, such as an activation that is none of those with a name, and a layer whose
    parameters have changed since, so that its arguments make others.
    """
    kind = type(layer)
    if not isinstance(layer, RoutedLayer):
        raise ValueError(f"{kind.__name__} is no layer of fff")
    if _layer_classes().get(kind.__name__) is not kind:
        raise ValueError(f"{kind.__module__}.{kind.__name__} shares its name with another layer")
    arguments = {key: _plain(kind.__name__, key, value) for key, value in layer.arguments().items()}
    with torch.device("meta"):
        made = shapes(kind(**arguments))
    if made != shapes(layer):
        raise ValueError(f"{kind.__name__}: these arguments make other parameters than the layer has: {arguments}")
    return {"class": kind.__name__, "arguments": arguments}


def from_config(config: dict[str, Any]) -> RoutedLayer:
    """A new layer of this class with these arguments; a class outside this package is known once it is imported."""
    classes = _layer_classes()
    if config["class"] not in classes:
        raise ValueError(f"class={config['class']!r} is none of {sorted(classes)}")
    return classes[config["class"]](**config["arguments"])


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what the state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def _layer_classes() -> dict[str, type[RoutedLayer]]:
    """Every layer class by name, ours before others. Configurations come from strangers too: no module is imported, and
    nothing called, because one of them names it."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")
    kinds: list[type[RoutedLayer]] = [RoutedLayer]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kinds.sort(key=lambda kind: kind.__module__.startswith(f"{__package__}."))
    return {kind.__name__: kind for kind in kinds if not isabstract(kind)}


def _plain(layer: str, name: str, value: Any) -> Any:
    if callable(value):
        known = activation_name(resolve_activation(value))
        if known is None:
            raise ValueError(f"{layer}: {name}={value!r} is a function without a name that JSON could tell")
        return known
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{layer}: {name}={value!r} has no form in JSON: {error}") from None
