"""Benchmarks: `python -m experiments.bench suite=training`, rows in results/bench/ and a table on the screen."""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

try:
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; benchmarks need the extra: pip install 'fff[train]'") from error

from . import provenance
from .check import ConfigError, check
from .config import build, config_path, one_line_errors

# Of a case, what its rows say of its sizes; of a row and of a ratio, the order of the columns.
_SIZES = (
    *("in_features", "out_features", "leaf_width", "hidden_features", "depth", "num_experts", "choices", "batch"),
    *("routes", "gradient"),
)
_ROW = (
    *("suite", "case", "candidate", "backend", "dtype", "threads", *_SIZES, "agrees", "max_error"),
    *("rounds", "median_s", "low_s", "high_s", "floor_s", "floor_kind", "floor_share"),
    *("least_flops", "least_bytes", "matmul_rate", "bandwidth", "flops", "peak_bytes"),
    *("cpu", "gpu", "cores", "python", "torch", "fastfeedforward", "git_commit", "seed"),
)
_RATIO = ("suite", "case", "quantity", "of", "over", "median", "low", "high", "at_least", "at_most", "met", *_ROW[-8:])


@dataclass
class Bench:
    """The root of a benchmark's configuration; conf/bench/config.yaml says what the values mean."""

    suite: Any
    seed: int
    threads: int
    rounds: int
    min_sample_s: float
    max_candidate_s: float
    device: str = field(metadata={"choices": ("cpu", "cuda")})
    out: str


def expand(cases: dict[str, dict], device: str = "cpu") -> dict[str, dict]:
    """Cases without `grid`: one with a grid becomes one per point, the axes being arguments of its builder; a target
    with `when` stays at the points that it names. A case with another `device` is left out."""
    found = {}
    for name, case in cases.items():
        if unknown := set(case) - {"build", "grid", "targets", "device"}:
            raise ConfigError(f"suite.cases.{name}: unknown key {min(unknown)!r}; known: build, grid, targets, device")
        if case.get("device", device) != device:
            continue
        axes = case.get("grid") or {}
        if missing := set(axes) - set(case["build"]):
            raise ConfigError(f"suite.cases.{name}.grid: {min(missing)!r} is no argument of the case's build")
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            targets = []
            for target in case.get("targets") or ():
                when = target.get("when") or {}
                if strange := set(when) - set(axes):
                    raise ConfigError(f"suite.cases.{name}.targets: {min(strange)!r} in `when` is no axis of its grid")
                if all(point[axis] == value for axis, value in when.items()):
                    targets.append({key: value for key, value in target.items() if key != "when"})
            label = "_".join([name, *(f"{axis}{value}" for axis, value in point.items())])
            found[label] = {"build": case["build"] | point, "targets": targets}
    return found


def run(cfg: DictConfig) -> bool:
    """Run the suite, write its rows case by case, print its tables; False if the outputs of a competitor differ."""
    # Read when torch is imported: keeps the profiler's start and stop messages off the screen.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    commit = provenance.git_commit()
    name = cfg.suite.name if cfg.device == "cpu" else f"{cfg.suite.name}_{cfg.device}"
    points = expand(OmegaConf.to_container(cfg.suite, resolve=True)["cases"], cfg.device)
    import torch

    from fff.bench.suite import agrees, markdown, run_suite, table_rows

    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this torch finds no GPU")
    measured = run_suite(
        {case: build(point["build"]) for case, point in points.items()},
        {case: point["targets"] for case, point in points.items()},
        threads=cfg.threads,
        seed=cfg.seed,
        rounds=cfg.rounds,
        min_sample_s=cfg.min_sample_s,
        max_candidate_s=cfg.max_candidate_s,
        device=cfg.device,
    )
    hardware, versions = provenance.hardware(), provenance.versions()
    source = {key: hardware[key] for key in ("cpu", "gpu", "cores")}
    source |= {key: versions[key] for key in ("python", "torch")} | {"fastfeedforward": _version("fastfeedforward")}
    source |= {"git_commit": commit, "seed": cfg.seed}
    sizes = {case: {key: point["build"].get(key) for key in _SIZES} for case, point in points.items()}
    out, cases = Path(cfg.out), {}
    out.mkdir(parents=True, exist_ok=True)
    for case, found in measured:
        cases[case] = found
        print(f"{len(cases)} of {len(points)}: {case}", file=sys.stderr)
        # Written whole after every case: what was measured stays if the next one is killed.
        rows, ratios = table_rows(name, cases, sizes)
        _write(out / f"{name}.csv", _ROW, rows, source)
        _write(out / f"{name}.ratios.csv", _RATIO, ratios, source)
    machine = hardware["gpu"] if cfg.device == "cuda" else f"{hardware['cpu']}, {cfg.threads} thread(s)"
    print(f"{machine}, torch {versions['torch']}; rows: {out / name}.csv\n")
    print(markdown(cases))
    return agrees(cases)


def _write(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]], source: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in (row | source).items()} for row in rows)
    part.replace(path)


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def job(cfg: DictConfig) -> None:
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        check(plain, Bench)
        expand(plain["suite"]["cases"], plain["device"])
        agreed = run(cfg)
    except ConfigError as error:
        # Hydra would put a line of its own before an error that leaves here.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not agreed:
        sys.exit("a competitor was refused: its outputs differ from the reference")


def main() -> None:
    schema = OmegaConf.structured(Bench)
    schema.suite = OmegaConf.create({}, flags={"struct": False})
    ConfigStore.instance().store(name="bench_schema", node=schema)
    with one_line_errors(Bench):
        hydra.main(version_base="1.3", config_path=str(Path(config_path(), "bench")), config_name="config")(job)()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
