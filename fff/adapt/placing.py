"""Layers put into a model in the place of its feedforward blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fff.adapt.blocks import Block, linear_widths


class WithDropout(nn.Sequential):
    """A layer, and dropout of its output."""


def with_dropout(layer: nn.Module, dropout: float) -> nn.Module:
    return WithDropout(layer, nn.Dropout(dropout)) if dropout > 0 else layer


def like_block(layer: nn.Module, block: Block, model: nn.Module) -> nn.Module:
    """The layer on the device of the block and in the floating-point type of what reaches it: that of its first map,
    or, where that is quantised, of the last one or of the first parameter of the model that is not."""
    candidates = (block.first[0].weight, block.last.weight, *model.parameters())
    dtype = next((weight.dtype for weight in candidates if _is_computed_in(weight.dtype)), None)
    return layer.to(device=block.last.weight.device, dtype=dtype)


def _is_computed_in(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def put_layers(model: nn.Module, blocks: Mapping[str, Block], layers: Mapping[str, nn.Module]) -> None:
    """Put each layer in the place of the block of this name."""
    for name, block in blocks.items():
        _put(model, model.get_submodule(name), block, layers[name])
    _leave_fused_path(model)


def _put(model: nn.Module, module: nn.Module, block: Block, layer: nn.Module) -> None:
    layer = (layer if block.place else with_dropout(layer, block.dropout)).train(module.training)
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


def _leave_fused_path(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoderLayer` from its fused kernel, which knows the weights of two linear maps alone."""
    for module in model.modules():
        inside = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for layer in inside:
            if isinstance(layer, nn.TransformerEncoderLayer) and linear_widths(layer.linear2) is None:
                layer.activation_relu_or_gelu = 0  # "neither relu nor gelu", which the kernel does not take
                if layer is not module:
                    module.use_nested_tensor = False
