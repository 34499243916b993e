"""Runs the cases of a suite: compare, count, time; and writes what was found as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from fff.bench.cases import Candidate
from fff.bench.count import count_flops, peak_bytes
from fff.bench.floor import floor
from fff.bench.timing import difference, ratio, spread, time_interleaved, timer

# Largest difference over largest expected value, per tensor. float32 sums over 1000 terms in another order differ by
# about 1e-6 of it; a forgotten bias or another leaf differs by more than 1e-2. bfloat16 rounds hidden units and results
# to 2^-9 each, and 5e-3 is what was found; another leaf differed by 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


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
    candidates: Mapping[str, Candidate],
    targets: Iterable[Mapping] = (),
    *,
    rounds: int,
    min_sample_s: float = 0.05,
    max_candidate_s: float = math.inf,
    device: str = "cpu",
) -> dict:
    """Rows (one per candidate) and ratios (one per target) of a case.

    A candidate whose outputs differ from the expected ones gets its error and nothing else: neither a time nor a ratio.
    targets: {quantity, of, over: names of candidates, at_most | at_least: number}; quantity is "time" or "memory" for
        the ratio, "extra_ms" for the difference of the times of a step in milliseconds. Without a bound the ratio is
        recorded and not judged. `over` may be a list: the one of them with the smallest median is meant; or "floor",
        the least time of the same candidate.
    """
    threads = torch.get_num_threads()
    rows = {name: {"max_error": None, "agrees": None} for name in candidates}
    for name, candidate in candidates.items():
        if candidate.outputs is not None:
            error = max_error(candidate.outputs(), candidate.expected())
            tolerance = TOLERANCE[candidate.dtype] if candidate.tolerance is None else candidate.tolerance
            rows[name] = {"max_error": error, "agrees": error <= tolerance}
    sound = {name: candidate for name, candidate in candidates.items() if rows[name]["agrees"] is not False}
    samples = time_interleaved(
        {name: c.run for name, c in sound.items()},
        rounds=rounds,
        min_sample_s=min_sample_s,
        max_candidate_s=max_candidate_s,
        seconds=timer(device),
        before={name: partial(_use_threads, c.threads or threads, c.run) for name, c in sound.items()},
    )
    samples = {name: [value / sound[name].steps for value in values] for name, values in samples.items()}
    for name, candidate in sound.items():
        record = getattr(candidate.module, "record", None)
        median, low, high = spread(samples[name])
        torch.set_num_threads(candidate.threads or threads)
        least = None if candidate.work is None else floor(candidate.work, candidate.dtype, device)
        rows[name] |= {
            "backend": candidate.backend or (None if record is None else record.backend),
            "threads": candidate.threads or threads,
            "dtype": str(candidate.dtype).removeprefix("torch."),
            "rounds": len(samples[name]),
            "median_s": median,
            "low_s": low,
            "high_s": high,
            "peak_bytes": peak_bytes(candidate.run, device) if candidate.counted else None,
            "flops": count_flops(candidate.run) // candidate.steps if candidate.counted else None,
        }
        if least is not None:
            rows[name] |= {
                "least_flops": candidate.work.flops,
                "least_bytes": candidate.work.bytes,
                "floor_s": least.seconds,
                "floor_kind": least.kind,
                "floor_share": least.seconds / median,
                "matmul_rate": least.matmul_rate,
                "bandwidth": least.bandwidth,
            }
    torch.set_num_threads(threads)
    return {"rows": rows, "ratios": [_judge(target, rows, samples) for target in targets]}


def _use_threads(threads: int, run: Callable[[], object]) -> None:
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        run()  # threads start and stop in it


def _judge(target: Mapping, rows: dict, samples: dict) -> dict:
    of, over, quantity = target["of"], target["over"], target["quantity"]
    if not isinstance(over, str):
        timed = [name for name in over if name in samples]
        over = min(timed, key=lambda name: rows[name]["median_s"]) if timed else over[0]
    if over == "floor" and of in samples:
        samples = samples | {over: [rows[of]["floor_s"]] * len(samples[of])}
    found = {**target, "over": over, "median": None, "quartiles": None, "met": None}
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
    if "at_most" in target:
        found["met"] = found["median"] <= target["at_most"]
    elif "at_least" in target:
        found["met"] = found["median"] >= target["at_least"]
    return found


def run_suite(
    build: Mapping[str, Callable[[], Mapping[str, Candidate]]],
    targets: Mapping[str, Iterable[Mapping]],
    *,
    threads: int,
    seed: int,
    rounds: int,
    min_sample_s: float = 0.05,
    max_candidate_s: float = math.inf,
    device: str = "cpu",
) -> Iterator[tuple[str, dict]]:
    """Every case, its name and what was found; each is built on `device` when its turn comes, from the same seed, then
    freed."""
    torch.set_num_threads(threads)
    timing = {"rounds": rounds, "min_sample_s": min_sample_s, "max_candidate_s": max_candidate_s, "device": device}
    for name, make in build.items():
        torch.manual_seed(seed)
        with torch.device(device):
            candidates = make()
        yield name, run_case(candidates, targets.get(name, ()), **timing)


def agrees(cases: Mapping[str, dict]) -> bool:
    """Whether no candidate of any case was refused."""
    return all(row["agrees"] is not False for case in cases.values() for row in case["rows"].values())


def markdown(cases: Mapping[str, dict]) -> str:
    """The cases as two tables: candidates (time and operations of a step), then ratios and differences against their
    targets."""
    lines = [
        "| case | candidate | backend | time, ms | quartiles | floor | peak, MiB | GFLOP | max error |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, case in cases.items():
        for candidate, row in case["rows"].items():
            error = "not compared" if row["agrees"] is None else f"{row['max_error']:.1e}"
            if row["agrees"] is False:
                lines.append(f"| {name} | {candidate} | | outputs differ: not timed | | | | | {error} |")
                continue
            cells = [
                row["backend"] or "",
                f"{1e3 * row['median_s']:.3g}",
                f"{1e3 * row['low_s']:.3g} - {1e3 * row['high_s']:.3g}",
                f"{row['floor_kind']} {100 * row['floor_share']:.0f} %" if "floor_s" in row else "",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.3g}",
                "" if row["flops"] is None else f"{row['flops'] / 1e9:.3g}",
            ]
            lines.append(f"| {name} | {candidate} | {' | '.join(cells)} | {error} |")
    lines += ["", "| case | compared | median | quartiles | target | met |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for name, case in cases.items():
        for entry in case["ratios"]:
            at_most, at_least = entry.get("at_most"), entry.get("at_least")
            bound = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}" if at_least is not None else ""
            sign = "-" if entry["quantity"] == "extra_ms" else "/"
            label = f"{name} | {entry['quantity']}: {entry['of']} {sign} {entry['over']}"
            if entry["median"] is None:
                lines.append(f"| {label} | not measured | | {bound} | |")
                continue
            quartiles = " - ".join(f"{value:.3g}" for value in entry["quartiles"] or ())
            met = {True: "yes", False: "**no**", None: ""}[entry["met"]]
            lines.append(f"| {label} | {entry['median']:.3g} | {quartiles} | {bound} | {met} |")
    return "\n".join(lines)


def table_rows(suite: str, cases: Mapping[str, dict], sizes: Mapping[str, Mapping]) -> tuple[list[dict], list[dict]]:
    """A record as flat rows: one per candidate, with the sizes of its case, and one per ratio."""
    rows, ratios = [], []
    for case, found in cases.items():
        place = {"suite": suite, "case": case}
        rows += [place | {"candidate": name} | dict(sizes[case]) | row for name, row in found["rows"].items()]
        for entry in found["ratios"]:
            low, high = entry["quartiles"] or (None, None)
            entry = {key: value for key, value in entry.items() if key != "quartiles"}
            ratios.append(place | entry | {"low": low, "high": high})
    return rows, ratios
