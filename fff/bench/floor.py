"""The least time that a call could take on this machine: its counted work over the measured speed of the hardware."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from fff.bench.timing import timer

_LARGEST = 2**29  # bytes; larger working sets do not fit in any cache either
_RATE_SIZES = {"cpu": ((1024, 1024, 1024), (2048, 768, 2048)), "gpu": ((4096, 4096, 4096), (8192, 8192, 8192))}


class Work(NamedTuple):
    """What a call cannot avoid.

    flops: floating-point operations, a multiply-add counts as two.
    bytes: every input, every weight that is hit and every output, touched once each.
    """

    flops: int
    bytes: int


class Floor(NamedTuple):
    """seconds: the larger of flops / matmul rate and bytes / bandwidth.  kind: "compute" or "memory", which one it is.

    matmul_rate: FLOP/s.  bandwidth: bytes/s, on a CPU at the working set of the call.
    """

    seconds: float
    kind: str
    matmul_rate: float
    bandwidth: float


def floor(work: Work, dtype: torch.dtype, device: str = "cpu") -> Floor:
    """For the threads that torch uses now."""
    threads = torch.get_num_threads()
    rate = matmul_rate(dtype, threads, device)
    if device == "cpu":
        # Of whole pairs of numbers. Not the next power of two, which may lie outside of a cache that holds the call.
        bandwidth = read_bandwidth(min(_LARGEST, max(2**16, work.bytes)) // 8 * 8, threads)
    else:
        bandwidth = copy_bandwidth(device)
    compute, memory = work.flops / rate, work.bytes / bandwidth
    return Floor(max(compute, memory), "compute" if compute >= memory else "memory", rate, bandwidth)


@cache
def matmul_rate(dtype: torch.dtype, threads: int, device: str) -> float:
    """FLOP/s of the best of a few large matrix products."""
    rates = []
    for m, k, n in _RATE_SIZES["cpu" if device == "cpu" else "gpu"]:
        a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
        rates.append(2 * m * k * n / _best(lambda a=a, b=b: torch.mm(a, b), device))
    return max(rates)


@cache
def read_bandwidth(size: int, threads: int) -> float:
    """Bytes/s at which a CPU reads the same `size` bytes again and again: from a cache if they fit into one."""
    data = torch.ones(size // 4)
    half = data.view(2, -1)
    return size / min(_best(data.sum, "cpu"), _best(lambda: torch.dot(half[0], half[1]), "cpu"))


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes/s of a large copy, read and written; a GPU moves small ones in the time of a launch, which says nothing of
    its memory."""
    data = torch.ones(_LARGEST // 4, device=device)
    other = torch.empty_like(data)
    return 2 * _LARGEST / _best(lambda: other.copy_(data), device)


def _best(call: Callable[[], object], device: str, seconds: float = 0.2) -> float:
    """The shortest of the calls that fit into `seconds`, at least three."""
    call()
    taken = timer(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(taken(call, 1))
    return min(times)
