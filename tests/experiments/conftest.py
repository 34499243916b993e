"""Compose configurations in the test process."""

import pytest
from hydra import compose, initialize_config_dir

from experiments.config import config_path
from experiments.sweep import register


@pytest.fixture(scope="session")
def _hydra():
    register()
    with initialize_config_dir(config_path(), version_base="1.3"):
        yield


@pytest.fixture
def make_config(_hydra, tmp_path):
    """make_config("layer=fff", "seed=1"): the configuration of a run below the test's folder."""
    return lambda *overrides: compose("config", [f"runs_dir={tmp_path}", *overrides])
