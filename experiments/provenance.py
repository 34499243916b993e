"""Where a number came from: machine, versions and commit, for the record of a run or of a timing."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "datasets", "hydra-core")
_CODE = ("fff", "conf", "experiments", "pyproject.toml")


def hardware() -> dict[str, Any]:
    """Processor, its cores, the threads that torch uses now, and the accelerator that it sees (null: none)."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache
def versions() -> dict[str, str]:
    import fff

    found = {"python": platform.python_version(), "fff": fff.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with "-dirty" if code or configurations there differ from it;
    None in a wheel. Asked for before the work begins: what the process imports counts, not what came later.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        # A new layer is untracked before it is committed; a new table in results/ changes no run.
        changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
