"""Feedforward blocks of a model replaced by layers of ours, in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fff.adapt.blocks import Block, Match, feedforward_blocks, linear_widths
from fff.layers.config import to_config
from fff.layers.contract import RoutedLayer
from fff.ops.activation import activation_name


class Replacement(NamedTuple):
    """One replaced block.

    name: of the module that has, or was, the block.
    kind: see `Block`.
    parameters_before, parameters_after: of what was taken out and of what was put in, biases included.
    flops_before, flops_after: operations per token of its linear maps and routed layers in evaluation (a multiply-add
        counts as two), biases and activations left out; other kinds of modules count as 0.
    activation_before, activation_after: by name ("gated silu" of a gated block); None where it cannot be told.
    """

    name: str
    kind: str
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    activation_before: str | None
    activation_after: str | None


def replace_feedforward(
    model: nn.Module, make_ff: Callable[..., nn.Module], match: Match | None = None
) -> list[Replacement]:
    """Put a layer of `make_ff` in the place of every feedforward block of `model`; one row of a report for each.

    make_ff: called as `make_ff(in_features, out_features=...)` for one block after another, in the order of
        `feedforward_blocks(model, match)`. The layer is moved to the device and floating-point type of the block.
    match: see `feedforward_blocks`. To replace some blocks only: `lambda name, module: known_block(module) if
        name.startswith("blocks.1") else None`.

    What surrounds a block stays: residual, norm, dropout of the output (by its probability, as a new module).
    Activation, gate, dropout of hidden units and a norm between the maps leave with it: the new layer has those of
    `make_ff`, so pass `act_layer="gelu"` for BERT and ViTs, "gelu_tanh" for GPT-2, `act_layer="silu", glu=True,
    bias=False` for Llama to keep them; the report tells both. A block that occurs several times in
    the model (shared weights) becomes one layer.

    The fused evaluation of torch's `nn.TransformerEncoderLayer`, which would read the old weights, is switched off for
    it and for the `nn.TransformerEncoder` around it, whose padded positions are then computed, not 0. Pass the whole
    encoder, not a layer of it.

    A library that builds models from configurations does not know of the change: to load a checkpoint of the new model,
    build the old one, replace its blocks, then `load_state_dict`. A model of transformers gets the configurations of
    its new layers as `model.config.fff`, which it saves and `fff.adapt.routed` reads; where they have none
    (`fff.layers.config.to_config`) a warning says so.

    ValueError where no block is found, or where the model itself is one that could only be replaced as a whole.
    """
    report, layers = [], {}
    blocks = feedforward_blocks(model, match)
    if "" in blocks and not blocks[""].place:
        raise ValueError(f"model={type(model).__name__} is itself a feedforward block and cannot be replaced in place")
    for name, block in blocks.items():  # all are made before the model changes
        module = model.get_submodule(name)
        layers[name] = _made(make_ff, block)
        old = (*block.first, block.last) if block.place else (module,)
        row = Replacement(
            name,
            block.kind,
            _num_parameters(*old),
            _num_parameters(layers[name]),
            _flops(*block.first, block.last),
            _flops(layers[name]),
            _activation(block.activation, gated=_is_gated(block)),
            _activation(getattr(layers[name], "act", None), gated=getattr(layers[name], "glu", False)),
        )
        report.append(row)
    for name, block in blocks.items():
        _put(model, model.get_submodule(name), block, layers[name])
    if is_pretrained_class(type(model)):
        try:
            note_layers(model, blocks, layers)
        except ValueError as error:
            _set_noted(model, {}, {})
            warnings.warn(f"once saved, {type(model).__name__} cannot be loaded by `routed`: {error}", stacklevel=2)
    _leave_fused_path(model)
    return report


def block_key(model: nn.Module, name: str) -> str:
    """Name of a module of a transformers model, the same one in the model with and without its head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def note_layers(model: nn.Module, blocks: Mapping[str, Block], layers: Mapping[str, nn.Module]) -> None:
    """Add the configurations of these layers, by the names of their blocks, to `model.config.fff`; ValueError where one
    has none."""
    noted = {
        block_key(model, name): {**to_config(layer), "dropout": blocks[name].dropout} for name, layer in layers.items()
    }
    _set_noted(model, noted, {**getattr(model.config, "fff", {}), **noted})


def _set_noted(model: nn.Module, new: Mapping[str, Any], noted: dict[str, Any]) -> None:
    """Models built from one configuration share it, so that this one gets its own. A trunk leaves it shared, for its
    head to see, unless it tells already of the blocks that are new: then it tells of another model."""
    if model.base_model is not model or new.keys() & getattr(model.config, "fff", {}).keys():
        shared, own = model.config, copy.copy(model.config)
        for module in model.modules():
            if vars(module).get("config") is shared:
                module.config = own
    model.config.fff = noted


def is_pretrained_class(model_class: type) -> bool:
    """Whether it looks like a `PreTrainedModel` of transformers."""
    return hasattr(model_class, "base_model_prefix") and hasattr(model_class, "save_pretrained")


def timm_mlp(
    in_features: int,
    hidden_features: int | None = None,
    out_features: int | None = None,
    *,
    make_ff: Callable[..., nn.Module],
    drop: float | tuple[float, float] = 0.0,
    use_conv: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **rest: object,
) -> nn.Module:
    """For timm: `mlp_layer=partial(timm_mlp, make_ff=partial(fff.FFF, leaf_width=32, depth=3))`.

    make_ff: called as `make_ff(in_features, out_features=...)`, as in `replace_feedforward`; width, activation, biases
        and dropout of hidden units are for it to say, so that `hidden_features`, `act_layer`, `bias` and `norm_layer`
        (in `rest`) have no effect.
    drop: of the output (a pair: of hidden units and of the output).

    Models of timm that rescale `mlp.fc2` when they are built (BEiT, EVA) do not take it: use `replace_feedforward`.
    """
    if use_conv:
        raise ValueError("use_conv=True asks for channels first; these layers take them last")
    layer = make_ff(in_features, out_features=out_features or in_features).to(device=device, dtype=dtype)
    return _with_dropout(layer, drop[1] if isinstance(drop, tuple) else drop)


def _made(make_ff: Callable[..., nn.Module], block: Block) -> nn.Module:
    layer = make_ff(block.in_features, out_features=block.out_features)
    weight = block.last.weight
    return layer.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)


def _put(model: nn.Module, module: nn.Module, block: Block, layer: nn.Module) -> None:
    layer = (layer if block.place else _with_dropout(layer, block.dropout)).train(module.training)
    if block.place:
        _set(module, block.place, layer)
        for path in block.idle:
            _set(module, path, nn.Identity())
        return
    for path, other in list(model.named_modules(remove_duplicate=False)):
        if other is module:
            _set(model, path, layer)


def _set(module: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


class WithDropout(nn.Sequential):
    """A layer, and dropout of its output."""


def _with_dropout(layer: nn.Module, dropout: float) -> nn.Module:
    return WithDropout(layer, nn.Dropout(dropout)) if dropout > 0 else layer


def _leave_fused_path(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoderLayer` from its fused kernel, which knows the weights of two linear maps alone."""
    for module in model.modules():
        inside = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for layer in inside:
            if isinstance(layer, nn.TransformerEncoderLayer) and linear_widths(layer.linear2) is None:
                layer.activation_relu_or_gelu = 0  # "neither relu nor gelu", which the kernel does not take
                if layer is not module:
                    module.use_nested_tensor = False


def _activation(act: Callable | None, gated: bool) -> str | None:
    if act is None:
        return None
    name = activation_name(act) or getattr(act, "__name__", type(act).__name__)
    return f"gated {name}" if gated else name


def _is_gated(block: Block) -> bool:
    return len(block.first) > 1 or linear_widths(block.first[0]).out_features != linear_widths(block.last).in_features


def _num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for parameter in {p for module in modules for p in module.parameters()})


def _flops(*modules: nn.Module) -> int:
    total = 0
    for module in (part for whole in modules for part in whole.modules()):
        if isinstance(module, RoutedLayer):
            total += module.size.flops_per_row
        elif (widths := linear_widths(module)) is not None:
            total += 2 * widths.in_features * widths.out_features
    return total
