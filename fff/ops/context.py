"""What surrounds a call: autocast, export, precision, the current device, tf32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

# Asked before it is imported, which takes a third of a second and waits until a kernel is wanted.
HAS_TRITON = find_spec("triton") is not None


# Up to torch 2.12 dynamo took it for true under plain `torch.compile` as well.
_KNOWS_EXPORT = torch.__version__ >= (2, 13)


# Asked here, as dynamo breaks the graph at the question in torch 2.11.
_AUTOCAST = frozenset(
    d for d in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(d)
)


def exporting() -> bool:
    """Whether `torch.export` is tracing; before torch 2.13 not seen with `strict=True`."""
    if _KNOWS_EXPORT:
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast computes in on x's device; None where it is off."""
    device = x.device.type
    if device in _AUTOCAST and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast switched off on x's device: decisions are taken in the precision of their parameters."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def summed_precisely(table: Tensor) -> Tensor:
    """`table` for a lookup: in float32 at least where the backward pass will add up a gradient row by row.

    A sum of many rows in bfloat16 stands still as soon as each of them is below half a unit in its last place.
    """
    if not (table.requires_grad and torch.is_grad_enabled()):
        return table
    return table.to(torch.promote_types(table.dtype, torch.float32))


def on_device(x: Tensor) -> AbstractContextManager:
    """x's GPU as the current one: Triton launches there, whatever the device of its arguments."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def float32_precision() -> str:
    """How a GPU may multiply float32: "ieee", or "tf32" if torch was told so, by whichever of its ways."""
    # Where it was told by the newer way, torch refuses to answer by the older one.
    new = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if new is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if new == "tf32" else "ieee"
