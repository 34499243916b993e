"""Timing on a clock that the test turns by hand."""

import gc

import pytest

from fff.bench.timing import device_seconds, difference, ratio, spread, time_interleaved, timer, wall_seconds


class Clock:
    """Time passes only when a call spends it."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def seconds(self, call, count):
        return wall_seconds(call, count, clock=lambda: self.now)

    def spend(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


def test_every_round_measures_every_competitor_in_turn():
    clock = Clock()
    calls = {"a": clock.spend("a", 1.0), "b": clock.spend("b", 2.0), "c": clock.spend("c", 4.0)}
    samples = time_interleaved(calls, rounds=3, min_sample_s=0.1, seconds=clock.seconds)
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(clock.calls) == "aaabbbccc" + "abc" + "bca" + "cab"


def test_short_calls_are_repeated_within_a_sample():
    clock = Clock()
    samples = time_interleaved({"a": clock.spend("a", 0.25)}, rounds=2, min_sample_s=1.0, seconds=clock.seconds)
    assert samples == {"a": [0.25, 0.25]}
    assert len(clock.calls) == 1 + 2 * 1 + 2 * 4 + 2 * 4  # the first, two trials of one and of four, two rounds


def test_a_slow_trial_does_not_make_short_samples():
    """The first two calls take ten times as long as those after them."""
    clock, lasted = Clock(), []
    costs = iter([1.0, 1.0] + [0.1] * 1000)

    def call():
        clock.now += next(costs)

    def seconds(call, count):
        lasted.append(clock.seconds(call, count))
        return lasted[-1]

    time_interleaved({"a": call}, rounds=3, min_sample_s=0.5, seconds=seconds)
    assert lasted[-3:] == pytest.approx([0.5] * 3)


def test_a_slow_phase_of_the_machine_cancels_in_the_ratio():
    assert ratio([10.0, 20.0, 90.0], [5.0, 10.0, 45.0]) == (2.0, 2.0, 2.0)


def test_a_difference_is_taken_within_each_round():
    assert difference([10.0, 20.0, 90.0], [8.0, 18.0, 88.0], scale=10.0) == (20.0, 20.0, 20.0)


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_a_slow_competitor_drops_out_after_the_third_round():
    clock = Clock()
    calls = {"slow": clock.spend("slow", 4.0), "fast": clock.spend("fast", 1.0)}
    samples = time_interleaved(calls, rounds=5, min_sample_s=0.1, max_candidate_s=4.5, seconds=clock.seconds)
    assert samples == {"slow": [4.0] * 3, "fast": [1.0] * 4}
    assert ratio(samples["slow"], samples["fast"]) == (4.0, 4.0, 4.0)  # over the rounds of both


def test_what_comes_before_a_sample_is_not_in_its_time():
    clock = Clock()
    prepare = {"a": clock.spend("prepare", 10.0)}
    samples = time_interleaved(
        {"a": clock.spend("a", 1.0)}, rounds=2, min_sample_s=0.1, before=prepare, seconds=clock.seconds
    )
    assert samples == {"a": [1.0] * 2} and clock.calls.count("prepare") == 3


def test_no_rounds_is_an_error():
    with pytest.raises(ValueError, match="rounds=0"):
        time_interleaved({"a": lambda: None}, rounds=0)


def test_garbage_collection_is_off_while_timing_and_back_after_an_error():
    def fail():
        raise RuntimeError

    seen = []
    time_interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=1, min_sample_s=0)
    assert seen == [True, True, True, False]
    with pytest.raises(RuntimeError):
        time_interleaved({"a": fail})
    assert gc.isenabled()


def test_time_on_a_device_is_that_between_its_events(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing
            self.at = self.waited = None

        def record(self):
            self.at = Event.clock

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited, "read before it has happened"
            return 1e3 * (end.at - self.at)

    def call():
        Event.clock += 0.5

    monkeypatch.setattr("torch.cuda.Event", Event)
    assert device_seconds(call, 3) == 1.5
    assert timer("cuda:0") is device_seconds and timer("cpu") is wall_seconds
