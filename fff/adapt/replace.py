"""Feedforward blocks of a model replaced by layers of ours, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from fff.adapt.blocks import Block, Match, feedforward_blocks, linear_widths, once_each
from fff.adapt.placing import like_block, put_layers, with_dropout
from fff.adapt.pretrained import note_layers
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
        `feedforward_blocks(model, match)`, once for blocks that share all their weights. The layer is moved to the
        device and floating-point type of the block.
    match: see `feedforward_blocks`. To replace some blocks only: `lambda name, module: known_block(module) if
        name.startswith("blocks.1") else None`.

    What surrounds a block stays: residual, norm, dropout of the output (by its probability, as a new module).
    Activation, gate, dropout of hidden units and a norm between the maps leave with it: the new layer has those of
    `make_ff`, so pass `act_layer="gelu"` for BERT and ViTs, "gelu_tanh" for GPT-2, `act_layer="silu", glu=True,
    bias=False` for Llama to keep them; the report tells both.

    A block that occurs several times in the model, and blocks of the same weights, become one layer, of which each row
    of the report tells all. A layer that runs several times in a pass counts its last run in record and auxiliary loss.
    Padding is routed and counted as any other token, but within `fff.adapt.skip_padding`.

    The fused evaluation of torch's `nn.TransformerEncoderLayer`, which would read the old weights, is switched off for
    it and for the `nn.TransformerEncoder` around it, whose padded positions are then computed, not 0. Pass the whole
    encoder, not a layer of it.

    A library that builds models from configurations does not know of the change: to load a checkpoint of the new model,
    build the old one, replace its blocks, then `load_state_dict`. A model of transformers becomes one of its class as
    `fff.adapt.routed` makes it, whose `save_pretrained` keeps the configurations of its layers as `config.fff`; where
    they have none (`fff.layers.config.to_config`) a warning says so. So do those within `model`, but not one of which
    `model` is a part.

    ValueError where no block is found, or where the model itself is one that could only be replaced as a whole; for
    what `make_ff` gives, where that is no module, has other widths than the block, or mixes rows (a mixture whose
    experts choose) beside causal attention (a module whose `is_causal` is True; a mask from outside is not seen).
    """
    blocks = feedforward_blocks(model, match)
    # All are made before the model changes.
    layers = once_each(blocks, lambda name, block: _made(make_ff, name, block, model))
    return replace_blocks(model, blocks, layers)


def replace_blocks(model: nn.Module, blocks: Mapping[str, Block], layers: Mapping[str, nn.Module]) -> list[Replacement]:
    """`replace_feedforward` with blocks that are found and layers that are made, by names of the blocks."""
    if "" in blocks and not blocks[""].place:
        raise ValueError(f"model={type(model).__name__} is itself a feedforward block and cannot be replaced in place")
    report = []
    for name, block in blocks.items():
        old = block.maps if block.place else (model.get_submodule(name),)
        row = Replacement(
            name,
            block.kind,
            _num_parameters(*old),
            _num_parameters(layers[name]),
            _flops(*block.maps),
            _flops(layers[name]),
            _activation(block.activation, gated=_is_gated(block)),
            _activation(getattr(layers[name], "act", None), gated=getattr(layers[name], "glu", False)),
        )
        report.append(row)
    put_layers(model, blocks, layers)
    for error in note_layers(model, blocks, layers):
        warnings.warn(error, stacklevel=3)
    return report


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
    return with_dropout(layer, drop[1] if isinstance(drop, tuple) else drop)


def _made(make_ff: Callable[..., nn.Module], name: str, block: Block, model: nn.Module) -> nn.Module:
    layer = make_ff(block.in_features, out_features=block.out_features)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"make_ff gave {layer!r} for {name}, which is no module")
    widths = getattr(layer, "in_features", block.in_features), getattr(layer, "out_features", block.out_features)
    if widths != (block.in_features, block.out_features):
        given = " -> ".join(map(str, widths))
        raise ValueError(f"make_ff gave a layer {given} for {name}: {block.in_features} -> {block.out_features}")
    if isinstance(layer, RoutedLayer) and layer.mixes_rows and (causal := _causal_attention(model, name)):
        raise ValueError(
            f"make_ff gave a {type(layer).__name__} for {name} whose experts choose among all rows: {causal} is causal,"
            " and tokens would see later ones"
        )
    return like_block(layer, block, model)


def _causal_attention(model: nn.Module, name: str) -> str | None:
    """The attention beside a block, if it says that it is causal: of the smallest part of the model that has both."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:end]))
        attentions = [part for part in around.modules() if hasattr(part, "is_causal")]
        if attentions:
            return next((type(part).__name__ for part in attentions if part.is_causal is True), None)
    return None


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
