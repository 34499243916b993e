"""Models of transformers with replaced blocks, saved and loaded as that library does it; it is not imported here."""

from __future__ import annotations

import copy
import copyreg
import warnings
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from fff.adapt.blocks import Block, Match, feedforward_blocks, known_block
from fff.adapt.placing import WithDropout, like_block, put_layers
from fff.layers.config import from_config, to_config
from fff.layers.contract import RoutedLayer

Model = TypeVar("Model", bound=nn.Module)


def routed(model_class: type[Model], match: Match | None = None) -> type[Model]:
    """The class of a transformers model, such as `GPT2LMHeadModel`, that builds its replaced blocks too.

    `routed(GPT2LMHeadModel).from_pretrained(folder)` loads what `replace_feedforward` changed and `save_pretrained`
    saved. `config.fff` says which blocks are replaced by what; where it says nothing the model is the plain one, and
    `replace_feedforward` may change it. At each of its `save_pretrained` the layers are noted anew, with what was set
    since (a temperature, a merged base). `replace_feedforward` makes a model of the plain class one of this class.

    match: see `feedforward_blocks`, for models whose blocks are of no known kind.

    A class that this gave already is given back; with another `match`, one for the same model.

    Weights that a checkpoint lacks are initialised as the layers do it.

    ValueError for classes that choose a model class, such as `AutoModel`; at loading where `config.fff` names a block
    that the model does not have, or that `match` does not find.
    """
    if not is_pretrained_class(model_class):
        raise ValueError(
            f"model_class={model_class!r} is no model class of transformers; classes that choose one, as AutoModel, are"
            " none: name the one that they choose, such as GPT2LMHeadModel"
        )
    plain, known = getattr(model_class, "_made_of", (model_class, None))
    if match is None and plain is not model_class:
        return model_class
    return _routed(plain, known if match is None else match)


@cache
def _routed(model_class: type[Model], match: Match | None) -> type[Model]:
    def __init__(self: Model, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        if getattr(config, "fff", None):
            _rebuild(self, match)

    def save_pretrained(self: Model, *args: Any, **kwargs: Any) -> Any:
        self.config.fff = _noted_now(self)
        return model_class.save_pretrained(self, *args, **kwargs)

    def initialize_weights(self: Model) -> None:
        for module in self.modules():
            if isinstance(module, RoutedLayer) and not getattr(module, "_is_hf_initialized", True):
                _initialize_missing(module)
        model_class.initialize_weights(self)

    def __reduce__(self: Model) -> tuple:  # a class that no module holds is pickled by how it is made
        if "_made_of" in vars(type(self)):
            return _unpickled, (model_class, match), self.__getstate__()
        return copyreg.__newobj__, (type(self),), self.__getstate__()

    # The library looks up losses, and what a model can do, by the names of class and module.
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = (__init__, save_pretrained, initialize_weights, __reduce__)
    names |= {method.__name__: method for method in methods}
    return type(model_class.__name__, (model_class,), {**names, "_made_of": (model_class, match)})


def _unpickled(model_class: type[Model], match: Match | None) -> Model:
    kind = _routed(model_class, match)
    return kind.__new__(kind)


def _rebuild(model: nn.Module, match: Match | None) -> None:
    noted = model.config.fff
    keys = {name: _block_key(model, name) for name, _ in model.named_modules()}
    configs = {name: noted[key] for name, key in keys.items() if key in noted}
    if unknown := set(noted) - set(keys.values()):
        raise ValueError(f"config.fff names {sorted(unknown)}, which {type(model).__name__} does not have")

    def only_noted(name: str, module: nn.Module) -> Block | None:
        if name not in configs:
            return None
        block = known_block(module) if match is None else match(name, module)
        if block is None:
            raise ValueError(f"config.fff replaces {name}, which is no feedforward block of a known kind; pass match=")
        # Where the library builds without memory no dropout shows.
        return block._replace(dropout=configs[name].get("dropout", 0.0))

    def made(block: Block, config: dict[str, Any]) -> RoutedLayer:
        layer = like_block(from_config(config), block, model)
        # Where the library builds without memory it fills in what it finds, and asks for the rest to be initialised.
        layer._is_hf_initialized = not any(parameter.is_meta for parameter in layer.parameters())
        return layer

    blocks = feedforward_blocks(model, only_noted)
    put_layers(model, blocks, {name: made(block, configs[name]) for name, block in blocks.items()})
    _set_noted(model, noted, noted)
    for owner in _owners(model, blocks).values():
        owner.__class__ = routed(type(owner))


def is_pretrained_class(model_class: type) -> bool:
    """Whether it looks like a `PreTrainedModel` of transformers."""
    return hasattr(model_class, "base_model_prefix") and hasattr(model_class, "save_pretrained")


def note_layers(model: nn.Module, blocks: Mapping[str, Block], layers: Mapping[str, nn.Module]) -> list[str]:
    """Let each model of transformers in `model` keep the layers that were put into it, by the names of their blocks: it
    has their configurations as `config.fff`, and its class becomes the one that `routed` makes of it.

    Gives what is wrong where a layer has no configuration; that model has none then.
    """
    wrong, told = [], []
    for place, owner in _owners(model, layers).items():  # a model before those within it
        path = f"{place}." if place else ""
        inside = {name.removeprefix(path): name for name in layers if name.startswith(path)}
        try:
            noted = {
                _block_key(owner, key): {**to_config(layers[name]), "dropout": blocks[name].dropout}
                for key, name in inside.items()
            }
        except ValueError as error:
            _set_noted(owner, {}, {})
            wrong.append(f"once saved, {type(owner).__name__} cannot be loaded by `routed`: {error}")
            continue
        if not any(owner.config is config for config in told):  # else it is that of a head around it
            _set_noted(owner, noted, {**getattr(owner.config, "fff", {}), **noted})
            told.append(owner.config)
        owner.__class__ = routed(type(owner))
    return wrong


def _owners(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The models of transformers that have modules of these names in them, by their own."""
    return {
        place: module
        for place, module in model.named_modules()
        if is_pretrained_class(type(module)) and any(not place or name.startswith(f"{place}.") for name in names)
    }


def _block_key(model: nn.Module, name: str) -> str:
    """Name of a module of a transformers model, the same one in the model with and without its head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _set_noted(model: nn.Module, new: Mapping[str, Any], noted: dict[str, Any]) -> None:
    """Models built from one configuration share it, so that this one gets its own. A trunk leaves it shared, for its
    head to see, unless it tells already of the blocks that are new: then it tells of another model."""
    if model.base_model is not model or new.keys() & getattr(model.config, "fff", {}).keys():
        shared, own = model.config, copy.copy(model.config)
        for module in model.modules():
            if vars(module).get("config") is shared:
                module.config = own
    model.config.fff = noted


def _noted_now(model: nn.Module) -> dict[str, Any]:
    """`config.fff` with the layers as they are, or were where that has no configuration (a warning says so); without
    blocks in which there is none any more."""
    noted = dict(getattr(model.config, "fff", {}))
    for name, block in model.named_modules():
        if (key := _block_key(model, name)) in noted:
            layer = next((module for module in block.modules() if isinstance(module, RoutedLayer)), None)
            if layer is None:
                del noted[key]
                continue
            dropout = block[1].p if isinstance(block, WithDropout) else 0.0
            try:
                noted[key] = {**to_config(layer), "dropout": dropout}
            except ValueError as error:
                warnings.warn(f"{name} is saved with the configuration that it had before: {error}", stacklevel=3)
    return noted


@torch.no_grad()
def _initialize_missing(layer: RoutedLayer) -> None:
    """Give tensors that no checkpoint filled, buffers that are never saved among them, the values of a new layer."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    missing = [(name, tensor) for name, tensor in tensors if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        with torch.device(missing[0][1].device):
            new = from_config(to_config(layer))
        values = dict([*new.named_parameters(), *new.named_buffers()])
        for name, tensor in missing:
            tensor.copy_(values[name])
    for parameter in layer.parameters():
        if not parameter.numel():  # the nodes of a tree of depth 0; the library has made them trainable
            parameter.requires_grad_(False)
    layer._is_hf_initialized = True
