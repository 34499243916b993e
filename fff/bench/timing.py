"""Time of callables that compete in one run on one machine."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of samples taken in the same round, in which a slow phase of the machine cancels.

    Of rounds that both have: a slow competitor has fewer.
    """
    return spread([n / d for n, d in zip(numerator, denominator, strict=False)])


def difference(minuend: Sequence[float], subtrahend: Sequence[float], scale: float = 1.0) -> Spread:
    """Spread of `scale` times the differences of samples taken in the same round."""
    return spread([scale * (m - s) for m, s in zip(minuend, subtrahend, strict=False)])


def wall_seconds(call: Callable[[], object], count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of `count` calls."""
    start = clock()
    for _ in range(count):
        call()
    return clock() - start


def device_seconds(call: Callable[[], object], count: int) -> float:
    """Seconds of `count` calls between two events of the current CUDA stream: what the host does while the device has
    work is not in them, what the device waits for is."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timer(device: str) -> Callable[[Callable[[], object], int], float]:
    """How seconds are taken on a device."""
    return device_seconds if torch.device(device).type == "cuda" else wall_seconds


def _nothing() -> None:
    pass


def _repeats(
    call: Callable[[], object], least: float, seconds: Callable[[Callable[[], object], int], float]
) -> tuple[int, float]:
    """How many calls last at least `least` seconds, and how long they last. The less of two trials counts, as one may
    be slow by chance."""
    count = 1
    while True:
        taken = max(min(seconds(call, count), seconds(call, count)), 1e-9)
        if taken >= least:
            return count, taken
        count = max(count + 1, math.ceil(count * min(least / taken, 100)))


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    min_sample_s: float = 0.05,
    max_candidate_s: float = math.inf,
    before: Mapping[str, Callable[[], object]] | None = None,
    seconds: Callable[[Callable[[], object], int], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds per call of each competitor, one sample per round.

    Every round measures every competitor once, starting with another one each time, so that none always runs behind the
    same neighbour's caches. A sample lasts at least `min_sample_s`: short calls are repeated within it. A competitor
    whose samples would last longer than `max_candidate_s` drops out after so many rounds, but not before the third.

    before: called ahead of every sample of a competitor, outside the time that is taken.
    seconds: of so many calls: `wall_seconds`, or `device_seconds` for what runs on a GPU.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be >= 1")
    before = before or {}
    repeats, turns = {}, {}
    for name, call in calls.items():
        before.get(name, _nothing)()
        call()  # allocations and lazy initialisation
        repeats[name], sample = _repeats(call, min_sample_s, seconds)
        turns[name] = int(min(rounds, max(3, max_candidate_s / sample)))
    order = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds if order else 0):
            shift = turn % len(order)
            for name in order[shift:] + order[:shift]:
                if turn >= turns[name]:
                    continue
                before.get(name, _nothing)()
                samples[name].append(seconds(calls[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return samples
