"""Imports run downwards only, and the layers cost no more than torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "hydra",
    "omegaconf",
    "datasets",
    "pandas",
    "sklearn",
    "triton",
)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_contracts():
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_all_layers_load_torch_alone():
    loaded = run("import sys, fff; [getattr(fff, name) for name in fff.__all__]; print(*sys.modules)").split()
    assert "torch" in loaded
    assert not set(HEAVY) & set(loaded)


def test_reports_load_no_torch():
    loaded = run("import sys, fff.report; print(*sys.modules)").split()
    assert "torch" not in loaded


def test_import_costs_torch_plus_a_fifth_of_a_second():
    """Processor time, one of three tries, so that a busy machine does not fail it."""
    code = (
        "import time, torch; start = time.process_time()\n"
        "import fff; [getattr(fff, name) for name in fff.__all__]\n"
        "print(time.process_time() - start)"
    )
    assert any(float(run(code)) < 0.2 for _ in range(3))


def test_subpackages_that_the_readme_names_are_there():
    assert run("import fff; print(fff.adapt.routed.__name__)").split() == ["routed"]


def test_unknown_name_is_an_attribute_error():
    import fff

    with pytest.raises(AttributeError, match="Router"):
        fff.Router  # noqa: B018
    assert set(fff.__all__) <= set(dir(fff))
