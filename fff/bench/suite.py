"""Runs the cases of a suite: compare, count, time; and writes what was found as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fff.bench.cases import Candidate
from fff.bench.count import count_flops, peak_bytes
from fff.bench.timing import difference, ratio, spread, time_interleaved

# Largest difference over largest expected value, per tensor. float32 sums over 1000 terms in another order differ by
# about 1e-6 of it; a forgotten bias or another leaf differs by more than 1e-2.
TOLERANCE = 1e-4


def max_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference in any tensor, as a share of its largest expected value; inf for a nan or a missing tensor."""
    if set(found) != set(expected):
        return float("inf")
    worst = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return float("inf")
        error = ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


def run_case(
    candidates: Mapping[str, Candidate], targets: Iterable[Mapping] = (), *, rounds: int, min_sample_s: float = 0.05
) -> dict:
    """Rows (one per candidate) and ratios (one per target) of a case.

    A candidate whose outputs differ from the expected ones gets its error and nothing else: neither a time nor a ratio.
    targets: {quantity, of, over: names of candidates, at_most | at_least: number}; quantity is "time" or "memory" for
        the ratio, "extra_ms" for the difference of the times of a step in milliseconds.
    """
    rows = {name: {"max_error": None, "agrees": None} for name in candidates}
    for name, candidate in candidates.items():
        if candidate.outputs is not None:
            error = max_error(candidate.outputs(), candidate.expected())
            rows[name] = {"max_error": error, "agrees": error <= TOLERANCE}
    sound = {name: candidate for name, candidate in candidates.items() if rows[name]["agrees"] is not False}
    samples = time_interleaved({name: c.run for name, c in sound.items()}, rounds=rounds, min_sample_s=min_sample_s)
    samples = {name: [value / sound[name].steps for value in values] for name, values in samples.items()}
    for name, candidate in sound.items():
        record = getattr(candidate.module, "record", None)
        median, low, high = spread(samples[name])
        rows[name] |= {
            "backend": None if record is None else record.backend,
            "median_s": median,
            "quartiles_s": [low, high],
            "peak_bytes": peak_bytes(candidate.run),
            "flops": count_flops(candidate.run) // candidate.steps,
        }
    return {"rows": rows, "ratios": [_judge(target, rows, samples) for target in targets]}


def _judge(target: Mapping, rows: dict, samples: dict) -> dict:
    of, over, quantity = target["of"], target["over"], target["quantity"]
    found = {**target, "median": None, "quartiles": None, "met": None}
    if of not in samples or over not in samples:  # not installed, or its outputs differ
        return found
    if quantity == "time":
        found["median"], *found["quartiles"] = ratio(samples[of], samples[over])
    elif quantity == "extra_ms":
        found["median"], *found["quartiles"] = difference(samples[of], samples[over], scale=1e3)
    elif quantity == "memory":
        found["median"] = rows[of]["peak_bytes"] / rows[over]["peak_bytes"]
    else:
        raise ValueError(f"quantity={quantity!r} is none of 'time', 'memory', 'extra_ms'")
    found["met"] = (
        found["median"] <= target["at_most"] if "at_most" in target else found["median"] >= target["at_least"]
    )
    return found


def run_suite(
    build: Mapping[str, Callable[[], Mapping[str, Candidate]]],
    targets: Mapping[str, Iterable[Mapping]],
    *,
    threads: int,
    seed: int,
    rounds: int,
    min_sample_s: float = 0.05,
) -> dict[str, dict]:
    """Every case by name; each is built when its turn comes, from the same seed, and freed after it."""
    torch.set_num_threads(threads)
    found = {}
    for name, make in build.items():
        torch.manual_seed(seed)
        found[name] = run_case(make(), targets.get(name, ()), rounds=rounds, min_sample_s=min_sample_s)
    return found


def agrees(cases: Mapping[str, dict]) -> bool:
    """Whether no candidate of any case was refused."""
    return all(row["agrees"] is not False for case in cases.values() for row in case["rows"].values())


def markdown(cases: Mapping[str, dict]) -> str:
    """The cases as two tables: candidates (time and operations of a step), then ratios and differences against their
    targets."""
    lines = [
        "| case | candidate | backend | time, ms | quartiles | peak, MiB | GFLOP | max error |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, case in cases.items():
        for candidate, row in case["rows"].items():
            error = "not compared" if row["agrees"] is None else f"{row['max_error']:.1e}"
            if row["agrees"] is False:
                lines.append(f"| {name} | {candidate} | | outputs differ: not timed | | | | {error} |")
                continue
            low, high = row["quartiles_s"]
            cells = [
                row["backend"] or "",
                f"{1e3 * row['median_s']:.3g}",
                f"{1e3 * low:.3g} - {1e3 * high:.3g}",
                f"{row['peak_bytes'] / 2**20:.3g}",
                f"{row['flops'] / 1e9:.3g}",
            ]
            lines.append(f"| {name} | {candidate} | {' | '.join(cells)} | {error} |")
    lines += ["", "| case | compared | median | quartiles | target | met |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for name, case in cases.items():
        for entry in case["ratios"]:
            bound = f"<= {entry['at_most']:g}" if "at_most" in entry else f">= {entry['at_least']:g}"
            sign = "-" if entry["quantity"] == "extra_ms" else "/"
            label = f"{name} | {entry['quantity']}: {entry['of']} {sign} {entry['over']}"
            if entry["median"] is None:
                lines.append(f"| {label} | not measured | | {bound} | |")
                continue
            quartiles = " - ".join(f"{value:.3g}" for value in entry["quartiles"] or ())
            met = "yes" if entry["met"] else "**no**"
            lines.append(f"| {label} | {entry['median']:.3g} | {quartiles} | {bound} | {met} |")
    return "\n".join(lines)
