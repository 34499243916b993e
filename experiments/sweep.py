"""Hydra's grid sweep, made for many short runs: plan first, launch only what is missing, tell what is left."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from .check import ConfigError
from .config import config_hash, explain, identity, recipe_note, run_dir
from .dataset import check_data, other_rows, stored_places
from .run import summary
from .store import ERROR, RESULT, is_locked, lock, read_record


class Job(NamedTuple):
    overrides: tuple[str, ...]
    run_dir: Path
    config_hash: str


class RunSweeper(Sweeper):
    """Grid sweep over the same `params` and overrides as Hydra's basic sweeper.

    Every combination is composed and checked before the first run starts. Combinations with the same run directory
    are one run, finished runs are not launched, and a failed run does not stop the others. Ends the program with exit
    code 1 and a list if any run failed.
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}
        self._given: set[str] = set()
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._is_group: dict[str, bool] = {}
        self._notes: dict[str, None] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        combinations, jobs, finished = self.plan(arguments)
        todo = [job for job in jobs if job.run_dir not in finished]
        same = f" ({combinations} combinations)" if combinations != len(jobs) else ""
        place = ", ".join(dict.fromkeys(str(job.run_dir.parent) for job in jobs))
        print(f"{place}: {len(jobs)} runs{same}, {len(finished)} finished, {len(todo)} to do", flush=True)
        for note in self._notes:
            print(note, file=sys.stderr, flush=True)
        with Progress(todo) as progress:
            self.launch(todo, progress)
        if progress.failed:
            print(f"{len(progress.failed)} of {len(todo)} runs failed:", file=sys.stderr)
            for job, error in progress.failed.items():
                print(f"  {job.run_dir / ERROR}: {error}", file=sys.stderr)
            sys.exit(1)

    def plan(self, arguments: list[str]) -> tuple[int, list[Job], set[Path]]:
        """Number of combinations, the distinct runs among them in order, and the directories of the finished ones."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        choices: dict[str, list[Override]] = {}
        # Arguments come last: what the command line says of a parameter replaces what the experiment says.
        given = parser.parse_overrides(arguments)
        self._given = {_name(override) for override in given}
        for override in [*parser.parse_overrides([f"{key}={v}" for key, v in self.params.items()]), *given]:
            key = override.get_key_element()
            if not override.is_sweep_override():
                choices[_name(override)] = [override]
            elif override.is_discrete_sweep():
                values = override.sweep_string_iterator()
                choices[_name(override)] = parser.parse_overrides([f"{key}={value}" for value in values])
            else:
                raise ConfigError(f"{override.input_line}: a grid needs a list or a range of values")
        combinations = list(itertools.product(*choices.values()))

        jobs: dict[Path, Job] = {}
        finished = set()
        checked, other = [], []
        for combination in combinations:
            overrides = tuple(override.input_line for override in combination)
            try:
                cfg = self._compose(combination)
                plain = identity(cfg)
                job = Job(overrides, run_dir(cfg, plain), config_hash(plain))
                if job.run_dir in jobs:
                    continue
                jobs[job.run_dir] = job
                data = OmegaConf.to_container(cfg.data, resolve=True)
                record = None if cfg.force else read_record(job.run_dir, job.config_hash)[0]
                if record is not None:
                    finished.add(job.run_dir)
                    other += [job.run_dir / RESULT] if other_rows(data, record) else []
                elif (places := stored_places(data)) not in checked:
                    checked.append(places)
                    check_data(data)
            except Exception as error:
                raise ConfigError(f"{explain(error)} (in the combination {' '.join(overrides)})") from error
        if other:
            print(
                f"{len(other)} finished runs were computed on other rows than the data hold now, {other[0]} among them;"
                " force=true runs them again",
                file=sys.stderr,
            )
        return len(combinations), list(jobs.values()), finished

    def _compose(self, combination: Sequence[Override]) -> DictConfig:
        """The configuration of one job. Hydra composes it once for each choice of groups (60 ms); values are then set
        in a copy, in the order that Hydra sets them."""
        values = [o for o in combination if self._is_value(o)]
        rest = tuple(o.input_line for o in combination if not self._is_value(o))
        if rest not in self._composed:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(rest))
            self._check_grid(cfg)
            if note := recipe_note(cfg.hydra.runtime.choices, self.hydra_context.config_loader):
                self._notes[note] = None
            with open_dict(cfg):
                del cfg["hydra"]
            self._composed[rest] = cfg
        cfg = copy.deepcopy(self._composed[rest])
        for override in values:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        return cfg

    def _check_grid(self, cfg: DictConfig) -> None:
        """A sweep has one grid and one launcher: a choice that is swept must not bring others along."""
        brought = cfg.hydra.sweeper.get("params") or {}
        for key in [*brought, *self.params]:
            if key.lstrip("+") not in self._given and brought.get(key) != self.params.get(key):
                raise ConfigError(
                    f"{key}: this choice brings a grid of its own, {brought.get(key, 'without it')} where the sweep has"
                    f" {self.params.get(key, 'none')}; run it by itself, or say {key}=..."
                )
        if cfg.hydra.launcher._target_ != self.config.hydra.launcher._target_:
            raise ConfigError("launcher: a sweep has one; name it once, without other values beside it")

    def _is_value(self, override: Override) -> bool:
        if override.type != OverrideType.CHANGE or override.package is not None:
            return False
        if override.key_or_group not in self._is_group:
            loader = self.hydra_context.config_loader
            self._is_group[override.key_or_group] = bool(loader.get_group_options(override.key_or_group))
        return not self._is_group[override.key_or_group]

    def launch(self, jobs: list[Job], progress: Progress) -> None:
        launched = 0
        while jobs:
            for returned in self.launcher.launch([job.overrides for job in jobs], initial_job_idx=launched):
                _ = returned.return_value  # raises what happened outside of a run
            launched += len(jobs)
            # What is left is being run by another process: wait, and take over what that one does not finish.
            jobs = progress.poll()
            busy = [job for job in jobs if is_locked(job.run_dir)]
            if jobs and not busy and (jobs := progress.poll()):
                raise RuntimeError(f"{jobs[0].run_dir}: the run left neither a result nor an error")
            for job in busy:
                print(f"waiting for {job.run_dir}, which another process runs", flush=True)
                with lock(job.run_dir, wait=True):
                    pass


def _name(override: Override) -> str:
    """The key without the signs by which it was given: `+key=1` and `key=2` speak of one parameter."""
    return override.get_key_element().lstrip("+")


class Progress:
    """Prints a line for each run that ends, whichever process ran it, from the files that it leaves behind."""

    def __init__(self, jobs: list[Job]) -> None:
        self.failed: dict[Job, str] = {}
        self._pending = {job: (_stamp(job.run_dir / RESULT), _stamp(job.run_dir / ERROR)) for job in jobs}
        self._total = len(jobs)
        self._start = time.monotonic()
        self._polling = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.poll()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.poll()

    def poll(self) -> list[Job]:
        """Tell of the runs that ended since the last call; the jobs that did not end yet."""
        with self._polling:
            for job, (result, error) in list(self._pending.items()):
                if _stamp(job.run_dir / RESULT) not in (None, result):
                    record, reason = read_record(job.run_dir, job.config_hash)
                    self._tell(job, summary(record) if record is not None else reason)
                elif _stamp(job.run_dir / ERROR) not in (None, error):
                    self.failed[job] = (job.run_dir / ERROR).read_text(encoding="utf-8").strip().rpartition("\n")[2]
                    self._tell(job, f"FAILED  {self.failed[job]}")
            return list(self._pending)

    def _tell(self, job: Job, text: str) -> None:
        del self._pending[job]
        left = len(self._pending)
        done = self._total - left
        remaining = (time.monotonic() - self._start) / done * left
        eta = f", about {_duration(remaining)}" if left else ""
        print(f"[{done}/{self._total}] {job.run_dir.name}  {text}  ({left} left{eta})", flush=True)


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class RunSweeperConf:
    # Hydra takes sweepers of the namespace hydra_plugins only, and looks the class up by this name. A package of that
    # name would be loaded by every Hydra program of the environment.
    _target_: str = "hydra_plugins.fff.RunSweeper"
    params: dict[str, str] | None = None


def register() -> None:
    """Offer the sweeper as `hydra/sweeper: runs`."""
    Plugins.instance().class_name_to_class[RunSweeperConf._target_] = RunSweeper
    ConfigStore.instance().store(group="hydra/sweeper", name="runs", node=RunSweeperConf)
