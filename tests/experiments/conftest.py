"""Compose configurations and plan sweeps in the test process."""

from typing import NamedTuple

import pytest
from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext

from experiments.sweep import Job, RunSweeper


@pytest.fixture
def make_config(hydra_configs, tmp_path):
    """make_config("layer=fff", "seed=1"): the configuration of a run below the test's folder."""
    return lambda *overrides: compose("config", [f"runs_dir={tmp_path}", *overrides])


class Plan(NamedTuple):
    combinations: int
    jobs: list[Job]
    finished: set


@pytest.fixture
def plan(hydra_configs, tmp_path):
    """plan("experiment=demo"): what `python -m experiments.train -m experiment=demo` would run, and has run."""

    def plan(*arguments):
        place = f"runs_dir={tmp_path}"
        single = [argument for argument in arguments if "," not in argument]
        config = compose("config", [*single, place], return_hydra_config=True)
        sweeper = RunSweeper(config.hydra.sweeper.params)
        sweeper.config = config
        sweeper.hydra_context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        return Plan(*sweeper.plan([*arguments, place]))

    return plan
