"""Padded rows kept out of routed layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fff.layers.contract import RoutedLayer


@contextmanager
def skip_padding(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside this context the routed layers of `model` see real tokens alone: padding is neither routed nor counted, in
    no loss, and gets 0, which a residual around the layer leaves as it was.

    model: of an encoder-decoder its encoder or its decoder, as either has a mask of its own.
    mask: (B, P), nonzero or true at real tokens, as `attention_mask` of transformers; (P, B) where the model has tokens
        in that order. Layers whose input has another number of dimensions than (B, P, D) are left as they are.

    A compiled model runs uncompiled here. How many tokens are real is known on the device alone, so that on a GPU each
    layer waits for it. Where activations are computed again (gradient checkpointing), have the backward pass in the
    context.

    ValueError for an encoder-decoder and, when a layer runs, for (B, P) of its input that differ from the mask's.
    """
    of_two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if of_two and any(name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()):
        raise ValueError(f"model={type(model).__name__} has two masks: pass its encoder and its decoder one by one")
    real, shortened = mask.bool(), set()

    def take_out(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[tuple, dict] | None:
        shortened.discard(layer)  # where its last call has failed
        x = inputs[0] if inputs else named["x"]
        if x.dim() != real.dim() + 1:
            return None
        if x.shape[:-1] != real.shape:
            raise ValueError(f"mask has shape {tuple(real.shape)}, and the input of a layer {tuple(x.shape)}")
        shortened.add(layer)
        return (x[real.to(x.device)],), {}

    def put_back(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if layer not in shortened:
            return y
        shortened.remove(layer)
        return y.new_zeros(*real.shape, y.shape[-1]).masked_scatter(real.to(y.device).unsqueeze(-1), y)

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, RoutedLayer):
                hooks.callback(layer.register_forward_pre_hook(take_out, with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(put_back).remove)
        # A program that was compiled before does not look for hooks.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        yield
