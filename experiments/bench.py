"""Benchmarks: `python -m experiments.bench suite=training`, a record in results/bench/ and a table on the screen."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import hydra
    from omegaconf import DictConfig, OmegaConf
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; benchmarks need the extra: pip install 'fff[train]'") from error

from .config import build

SCHEMA = 1
# conf/ lies beside this package in a checkout and in a wheel alike.
CONFIGS = Path(__file__).resolve().parents[1] / "conf" / "bench"


def run(cfg: DictConfig) -> bool:
    """Run the suite, write its record, print its tables; False if a competitor was refused for its outputs."""
    # Read when torch is imported: keeps the profiler's start and stop messages off the screen.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from fff.bench.suite import agrees, markdown, run_suite

    from . import provenance

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
        "git_commit": provenance.git_commit(),
        "cases": cases,
    }
    path = Path(cfg.out) / f"{suite['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    machine = record["hardware"]
    print(f"{machine['cpu']}, {cfg.threads} thread(s), torch {record['versions']['torch']}; record: {path}\n")
    print(markdown(cases))
    return agrees(cases)


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    if not run(cfg):
        sys.exit("a competitor was refused: its outputs differ from the reference")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
