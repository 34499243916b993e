"""The dense blocks of a trained model become trees, which then learn to answer as the blocks did.

    error = sum over rows |tree(x) - dense(x)|^2 / sum over rows |dense(x) - mean dense(x)|^2

is the square of `Conversion.error`, here of the rows of one batch, with x what reaches the tree in its own model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fff.adapt.blocks import Block, Match, feedforward_blocks, linear_widths, once_each
from fff.adapt.convert import Conversion, from_dense
from fff.adapt.placing import like_block
from fff.adapt.probe import evaluated, probe_rows
from fff.adapt.replace import replace_blocks
from fff.layers.contract import RoutedLayer
from fff.ops.activation import resolve_activation
from fff.ops.expert_mlp.hidden import hidden_units


def convert_feedforward(
    model: nn.Module, run: Callable[[], Any], match: Match | None = None, **options: Any
) -> dict[str, Conversion]:
    """Put a tree in the place of every feedforward block of `model`, by `from_dense`; what it gives, by block name.
    Blocks that share their weights become one tree, by what reaches any of them.

    run: runs the model on a sample, as `lambda: model(x)` does; what reaches a block then is its calibration, padding
        included, so give it none. It is called once, in evaluation and without gradients, before anything is replaced.
    match: see `feedforward_blocks`.
    options: `depth`, `method`, `leaf_width` and further ones of `from_dense`.

    A tree stays in evaluation or training as its block was.

    ValueError, before anything is replaced, for a block whose activation is not known or that computes something else
    than last(activation(first(x))), such as a scaled gate; else as of `from_dense` and `replace_feedforward`.
    """
    blocks = feedforward_blocks(model, match)
    for name, block in blocks.items():
        _check_formula(name, model.get_submodule(name), block)
    seen: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.is_nested:  # rows of `nn.TransformerEncoder` without their padding
            x = torch.cat(x.unbind())
        seen[name].append(x.reshape(-1, x.shape[-1]))

    hooks = [block.first[0].register_forward_pre_hook(partial(keep, name)) for name, block in blocks.items()]
    was_training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            run()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    if silent := [name for name, inputs in seen.items() if not inputs]:
        raise ValueError(f"run={run!r} has not reached the blocks {silent}")

    def converted(name: str, block: Block) -> Conversion:
        # What reaches a shared map, from wherever, has been seen under each of its names.
        return from_dense(block.first, block.activation, block.last, calibration=torch.cat(seen[name]), **options)

    conversions = once_each(blocks, converted)
    layers = {name: like_block(found.layer, blocks[name], model) for name, found in conversions.items()}
    replace_blocks(model, blocks, layers)
    return conversions


@contextmanager
def distillation(student: nn.Module, teacher: nn.Module, match: Match | None = None) -> Iterator[Callable[[], Tensor]]:
    """Inside this context each forward of `student` with gradients compares its layers with the blocks of `teacher`.

    Gives a function to call once after each forward: the error above, (), mean over the layers that ran since. Add it
    to the loss of the task and to `fff.aux_loss(student)`. It needs no labels. Without a task's loss train the layers'
    parameters alone, as auxiliary losses reach what lies before a layer.

    Each layer runs a second time, on its input without gradient, so that its error trains itself and nothing before it;
    the records stay those of the forward. A layer that ran several times counts its last call.

    teacher: the model as it was before `convert_feedforward` or `replace_feedforward` changed a copy of it. Its blocks
        are computed without gradients or dropout; the rest of it does not run.
    match: the one by which blocks were replaced. Blocks in whose place the student has no routed layer are left out.

    ValueError where no block of the teacher has a routed layer in its place, for a block as of `convert_feedforward`,
    or, by the function, where none has run.
    """
    pairs = {}
    for name, block in feedforward_blocks(teacher, match).items():
        place = student.get_submodule(".".join(part for part in (name, block.place) if part))
        layer = next((module for module in place.modules() if isinstance(module, RoutedLayer)), None)
        if layer is not None:
            _check_formula(name, teacher.get_submodule(name), block)
            pairs[layer] = block._replace(activation=resolve_activation(block.activation))
    if not pairs:
        raise ValueError(f"student={type(student).__name__} has no routed layer in the place of a block of teacher")
    errors: dict[nn.Module, Tensor] = {}

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            x, record = inputs[0].detach(), layer.record
            errors[layer] = _error(layer.forward(x), _answer(pairs[layer], x))
            layer.record = record

    def loss() -> Tensor:
        if not errors:
            raise ValueError("no layer has run with gradients since the last call, so that nothing can be compared")
        mean = torch.stack(list(errors.values())).mean()
        errors.clear()
        return mean

    hooks = [layer.register_forward_hook(compare) for layer in pairs]
    try:
        yield loss
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _check_formula(name: str, module: nn.Module, block: Block) -> None:
    """Of a block that is the whole of its module."""
    where = f"block {name!r} ({type(module).__name__})"
    if block.activation is None:
        raise ValueError(
            f"{where}: no activation under a usual name; pass match= that gives Block(..., activation=...)"
        )
    if block.place:
        return
    # What clamps does so at large values.
    x = probe_rows(block.in_features, block.first[0].weight, (1.0, 10.0, 100.0)).flatten(0, 1)
    with evaluated(module):
        found = module.forward(x[None])[0].double()
    expected = _answer(block._replace(activation=resolve_activation(block.activation)), x).double()
    # No number where both are 0, or too large for their type.
    deviation = ((found - expected).norm(dim=1) / expected.norm(dim=1)).nan_to_num(0.0).max().item()
    if deviation > torch.finfo(x.dtype).eps ** 0.5:
        raise ValueError(
            f"{where} computes something else than {block.kind} does, last(activation(first(x))): it deviates by"
            f" {deviation:.1e}, so that its weights cannot be taken over"
        )


@torch.no_grad()
def _answer(block: Block, x: Tensor) -> Tensor:
    """Of the dense block, without dropout."""
    pre = torch.cat([linear(x) for linear in block.first], -1)
    gated = pre.shape[-1] == 2 * linear_widths(block.last).in_features
    hidden = hidden_units(pre, block.activation, glu=gated, dropout=0.0)
    weight = block.last.weight  # T5 keeps it in float32
    return block.last(hidden.to(weight.dtype) if weight.is_floating_point() else hidden)


def _error(y: Tensor, expected: Tensor) -> Tensor:
    y, expected = (values.float().reshape(-1, values.shape[-1]) for values in (y, expected))
    spread = (expected - expected.mean(0)).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (y - expected).square().sum() / spread
