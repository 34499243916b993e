"""Benchmarks: `python -m experiments.bench suite=training`, a record in results/bench/ and a table on the screen."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
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

SCHEMA = 1


@dataclass
class Bench:
    """The root of a benchmark's configuration; conf/bench/config.yaml says what the values mean."""

    suite: Any
    seed: int
    threads: int
    rounds: int
    min_sample_s: float
    out: str


def run(cfg: DictConfig) -> bool:
    """Run the suite, write its record, print its tables; False if a competitor was refused for its outputs."""
    # Read when torch is imported: keeps the profiler's start and stop messages off the screen.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    commit = provenance.git_commit()
    from fff.bench.suite import agrees, markdown, run_suite

    suite = OmegaConf.to_container(cfg.suite, resolve=True)
    cases = run_suite(
        {name: build(case["build"]) for name, case in suite["cases"].items()},
        {name: case.get("targets", ()) for name, case in suite["cases"].items()},
        threads=cfg.threads,
        seed=cfg.seed,
        rounds=cfg.rounds,
        min_sample_s=cfg.min_sample_s,
    )
    record = {
        "schema": SCHEMA,
        "suite": suite["name"],
        "config": {key: cfg[key] for key in ("seed", "threads", "rounds", "min_sample_s")} | {"cases": suite["cases"]},
        "hardware": provenance.hardware(),
        "versions": provenance.versions() | {"fastfeedforward": _version("fastfeedforward")},
        "git_commit": commit,
        "cases": cases,
    }
    path = Path(cfg.out) / f"{suite['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    machine = record["hardware"]
    print(f"{machine['cpu']}, {cfg.threads} thread(s), torch {record['versions']['torch']}; record: {path}\n")
    print(markdown(cases))
    return agrees(cases)


def job(cfg: DictConfig) -> None:
    try:
        check(OmegaConf.to_container(cfg, resolve=True), Bench)
    except ConfigError as error:
        # Hydra would put a line of its own before an error that leaves here.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not run(cfg):
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
