"""A layer as plain JSON, its class and the arguments of its constructor, and a new layer from that."""

from __future__ import annotations

import json
from abc import ABCMeta
from importlib import import_module
from inspect import isabstract, signature
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
    if not isinstance(layer, RoutedLayer):
        raise ValueError(f"{type(layer).__name__} is no layer of fff")
    # `fully_shard` gives a layer a class made on the fly, whose module is that of its metaclass.
    known = (kind for kind in type(layer).__mro__ if kind.__module__ != ABCMeta.__module__)
    kind = next(kind for kind in known if issubclass(kind, RoutedLayer))
    if _layer_classes().get(kind.__name__) is not kind:
        raise ValueError(f"{kind.__module__}.{kind.__name__} shares its name with another layer")
    arguments = {key: _plain(kind.__name__, key, value) for key, value in layer.arguments().items()}
    config = {"class": kind.__name__, "arguments": arguments}
    with torch.device("meta"):
        made = from_config(config)
        if since := _set_since(layer, made):
            arguments |= since
            made = from_config(config)
    if shapes(made) != shapes(layer):
        raise ValueError(f"{kind.__name__}: these arguments make other parameters than the layer has: {arguments}")
    return config


def from_config(config: dict[str, Any]) -> RoutedLayer:
    """A new layer of this class with these arguments; a class outside this package is known once it is imported.

    ValueError for an unknown class, and for arguments that it does not take.
    """
    name, classes = config["class"], _layer_classes()
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"class={name!r} is none of {sorted(classes)}")
    try:
        return classes[name](**config["arguments"])
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what the state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def _set_since(layer: RoutedLayer, made: RoutedLayer) -> dict[str, Any]:
    """Numbers, words and switches that the constructor takes by ** for those of its bases, where the layer has others
    now than are made without them."""
    constructors = (kind.__init__ for kind in type(made).__mro__ if issubclass(kind, RoutedLayer))
    options = {name for constructor in constructors for name in signature(constructor).parameters}
    hidden = {name: vars(made)[name] for name in options & vars(made).keys() - made.arguments().keys()}
    plain = {name: value for name, value in hidden.items() if isinstance(value, int | float | str | None)}
    now = {name: vars(layer).get(name) for name, value in sorted(plain.items())}
    return {name: _plain(type(made).__name__, name, value) for name, value in now.items() if value != plain[name]}


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
