"""The least time that a call could take on this machine: its counted work over the measured speed of the hardware."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

_LARGEST = 2**29  # bytes; larger working sets do not fit in any cache either
_RATE_SIZES = ((1024, 1024, 1024), (2048, 768, 2048))


class Work(NamedTuple):
    """What a call cannot avoid.

    flops: floating-point operations, a multiply-add counts as two.
    bytes: every input, every weight that is hit and every output, touched once each.
    """

    flops: int
    bytes: int


class Floor(NamedTuple):
    """seconds: the larger of flops / matmul rate and bytes / bandwidth.  kind: "compute" or "memory", which one it is.

    matmul_rate: FLOP/s.  bandwidth: bytes/s at the working set of the call.
    """

    seconds: float
    kind: str
    matmul_rate: float
    bandwidth: float


def floor(work: Work, dtype: torch.dtype) -> Floor:
    """For the threads that torch uses now."""
    threads = torch.get_num_threads()
    rate = matmul_rate(dtype, threads)
    bandwidth = read_bandwidth(min(_LARGEST, max(2**16, 1 << (work.bytes - 1).bit_length())), threads)
    compute, memory = work.flops / rate, work.bytes / bandwidth
    return Floor(max(compute, memory), "compute" if compute >= memory else "memory", rate, bandwidth)


@cache
def matmul_rate(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the best of a few large matrix products."""
    rates = []
    for m, k, n in _RATE_SIZES:
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        rates.append(2 * m * k * n / _best(lambda a=a, b=b: torch.mm(a, b)))
    return max(rates)


@cache
def read_bandwidth(size: int, threads: int) -> float:
    """Bytes/s at which the same `size` bytes are read again and again: from a cache if they fit into one."""
    data = torch.ones(size // 4)
    half = data.view(2, -1)
    return size / min(_best(data.sum), _best(lambda: torch.dot(half[0], half[1])))


def _best(call: Callable[[], object], seconds: float = 0.2) -> float:
    """The shortest of the calls that fit into `seconds`, at least three."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
