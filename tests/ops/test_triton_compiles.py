"""The Triton kernels are compiled ahead of time, for GPUs of three generations that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
MODULES = "fff.ops.expert_mlp.triton", "fff.ops.tree_route.triton"


@pytest.mark.slow
def test_every_kernel_compiles_and_fits():
    """With shared memory to spare, and without a block that is refilled under an asynchronous product."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    runs = [
        subprocess.Popen(
            [sys.executable, HERE / "aot.py", module, *capabilities],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for module in MODULES
        for capabilities in (["80", "90"], ["100"])
    ]
    results = [(run.communicate()[0], run.returncode) for run in runs]
    for output, code in results:
        assert code == 0, output
