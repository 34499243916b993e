"""The one place where Triton kernels are launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float | None, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; constants: its constexpr arguments, num_warps and num_stages."""
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **constants)
