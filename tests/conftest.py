"""One thread, no network and one seed for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter, which must know before triton is imported; torch._dynamo imports it too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def hydra_configs():
    """Hydra's compose() reads conf/ as the commands do. One fixture for all tests, as Hydra has one global state."""
    from hydra import initialize_config_dir

    from experiments.config import config_path
    from experiments.sweep import register

    register()
    with initialize_config_dir(config_path(), version_base="1.3"):
        yield
