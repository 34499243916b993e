"""A module run on a few rows, to see what its names do not tell. Nothing of it changes, nor the random numbers drawn
after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

_ROWS = 4
# Dropout is looked at by itself; batch norms would learn.
_OTHERS = (nn.Dropout, nn.modules.batchnorm._NormBase)


class _Pass(NamedTuple):
    """One forward: the rows that each first map took, what the last one gave, what the module returned; (T, width)."""

    taken: list[Tensor]
    given: Tensor
    returned: Tensor


def probe_rows(width: int, weight: Tensor, scales: tuple[float, ...] = (1.0,)) -> Tensor:
    """Rows that are always the same, (1, T, width), of the device and floating-point type of a weight; as many of each
    scale."""
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    rows = torch.arange(_ROWS * width, dtype=torch.float64).add(1).sin().view(_ROWS, width)
    return torch.cat([scale * rows for scale in scales])[None].to(weight.device, dtype)


def on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


@torch.no_grad()
def output_dropout(module: nn.Module, width: int, first: tuple[nn.Module, ...], last: nn.Module) -> float | None:
    """The probability by which a module drops what its map `last` gives, before it returns that.

    None where it does more around its maps: where `first` do not all take what the module takes (a norm before them),
    or where it returns, `nn.Dropout` apart, something else than `last` gives (a residual, a factor, a dropped path), or
    does not take rows.
    """
    x = probe_rows(width, first[0].weight)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]  # a spectral norm learns them
    try:
        with evaluated(module):
            plain = _run(module, x, first, last)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            with evaluated(module, but=lambda part: part is module or isinstance(part, nn.Dropout)):
                dropped = _run(module, x, first, last)
            with evaluated(module, but=lambda part: part is not module and not isinstance(part, _OTHERS)):
                trained = _run(module, x, first, last)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError):
        return None
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    rows = x.flatten(0, 1)
    if not all(torch.equal(taken, rows) for taken in plain.taken) or not torch.equal(plain.returned, plain.given):
        return None
    if not torch.equal(trained.returned, trained.given):
        return None
    if torch.equal(dropped.returned, dropped.given):
        return 0.0
    # What dropout keeps it divides by 1 - p.
    factor = (dropped.returned.double() / dropped.given)[dropped.returned != 0]
    if not len(factor) or factor.min() < 1 or factor.max() - factor.min() > 0.02 * factor.max():
        return None
    return round(1 - 1 / factor.mean().item(), 3)


def _run(module: nn.Module, x: Tensor, first: tuple[nn.Module, ...], last: nn.Module) -> _Pass:
    taken, given = [], []
    hooks = [part.register_forward_pre_hook(lambda _, inputs: taken.append(_flat(inputs[0]))) for part in first]
    hooks.append(last.register_forward_hook(lambda _, __, output: given.append(_flat(output))))
    try:
        returned = _flat(module.forward(x))
    finally:
        for hook in hooks:
            hook.remove()
    (only,) = given
    return _Pass(taken, only, returned)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@contextmanager
def evaluated(module: nn.Module, but: Callable[[nn.Module], bool] = lambda part: False) -> Iterator[None]:
    """Inside this context a module is in evaluation, so that no norm learns, but for the parts named."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    for part in before:
        part.training = but(part)
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training
