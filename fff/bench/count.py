"""Floating-point operations and peak memory of a call, counted rather than timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products that a call makes, forward and backward; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most memory of the device, in bytes, that a call holds at once of what it has allocated itself.

    Counted at torch's allocator, hence exact and independent of load. What a BLAS allocates for itself is not seen,
    nor, on a CPU, the release of memory that is older than the call.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == MEMORY_EVENT_NAME and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak
