"""Shapes stand in the signatures of the ops; here the other tests of the ops run once more with them checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jaxtyping")
HERE = Path(__file__).parent


def run(*arguments):
    root = HERE.parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(root), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "shape_checks", "-p", "no:cacheprovider", *map(str, arguments)],
        capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip


def test_signatures_hold_in_all_tests_of_the_ops():
    # The hook must stay out of the way of Triton kernels, and their tests are slow.
    files = [f for f in sorted(HERE.glob("test_*.py")) if f.name != Path(__file__).name and "triton" not in f.name]
    done = run(*files, "-k", "not gradcheck and not custom_operators and not compile and not bad")
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_wrong_shape_is_caught(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text(
        "import torch\n"
        "from fff.ops.tree_route import leaf_probability\n"
        "def test_two_dimensions():\n"
        "    leaf_probability(torch.randn(3, 7))\n"
    )
    done = run(wrong)
    assert done.returncode == 1 and "jaxtyping" in done.stdout
