"""The typed root of the configuration, the resolvers of its files, and what makes two runs the same run."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from .check import ConfigError, check, is_number, no_such, parameters_of, suggest

# Lightning's, one name for each: with two, one computation would be two runs.
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


@dataclass
class Trainer:
    """Settings of Lightning's Trainer that a run may vary."""

    max_epochs: int = field(default=100, metadata={"least": 1})
    accelerator: str = field(default="auto", metadata={"choices": ("auto", "cpu", "gpu", "cuda", "mps", "tpu")})
    devices: int = 1
    precision: str = field(default="32-true", metadata={"choices": PRECISIONS})
    # Largest norm of a gradient, null for any.
    gradient_clip_val: float | None = field(default=None, metadata={"above": 0})
    accumulate_grad_batches: int = field(default=1, metadata={"least": 1})
    # Batches per training epoch, null for all.
    max_batches: int | None = field(default=None, metadata={"least": 1})
    # Epochs between two resumable checkpoints; null: none.
    checkpoint_every: int | None = field(default=None, metadata={"least": 1})
    # null: shown in a single run, not in a sweep.
    progress_bar: bool | None = None


@dataclass
class Config:
    """Everything a run depends on. Open nodes take any key that their `_target_` takes (`check`)."""

    study: str = "scratch"
    # Name of the recipe; its file sets it.
    recipe: str | None = None
    seed: int = field(default=0, metadata={"least": 0})
    width: int = 128
    leaf_width: int = 8
    threads: int = field(default=1, metadata={"least": 1})
    force: bool = False
    runs_dir: str = "runs"
    layer: Any = None
    model: Any = None
    task: Any = None
    data: Any = None
    logger: Any = None
    launcher: Any = None
    trainer: Trainer = field(default_factory=Trainer)


_ALL = re.DOTALL | re.MULTILINE

# What may differ between two executions of one run: helpers that other keys interpolate, where and how it is executed.
VOLATILE = (
    "hydra",
    "study",
    "recipe",
    "width",
    "leaf_width",
    "threads",
    "force",
    "runs_dir",
    "logger",
    "launcher",
    "trainer.checkpoint_every",
    "trainer.progress_bar",
)
# Arguments of data sets, also of those inside others, that say where files lie on this machine.
_PLACES = ("root", "cache_dir")


def tree_depth(width: int, leaf_width: int) -> int:
    """Depth of the full tree whose 2^depth leaves of `leaf_width` units have `width` units together."""
    leaves, rest = divmod(width, leaf_width) if leaf_width > 0 else (0, 0)
    if rest or leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"width={width} must be leaf_width={leaf_width} times a power of two")
    return leaves.bit_length() - 1


def num_experts(width: int, expert_width: int) -> int:
    """How many experts of `expert_width` units have `width` units together."""
    experts, rest = divmod(width, expert_width) if expert_width > 0 else (0, 0)
    if rest or experts < 1:
        raise ValueError(f"width={width} must be a multiple of expert_width={expert_width}")
    return experts


def add(*numbers: int) -> int:
    return sum(numbers)


def half(number: int) -> int:
    return number // 2


def times(*numbers: float) -> float:
    return math.prod(numbers)


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration without its volatile keys, after a check of every key; plain containers."""
    plain = {key: _plain(cfg[key], resolve=key not in VOLATILE) for key in cfg if key != "hydra"}
    check(plain, root=Config)
    for key in ("layer", "model", "task", "data"):
        if not (plain[key] or {}).get("_target_"):
            raise ConfigError(f"{key} has no _target_; choose one with {key}=..., --help lists them")
    if plain["trainer"]["devices"] != 1:
        raise ConfigError(
            f"trainer.devices={plain['trainer']['devices']}: a run trains on one device, as its data is not sharded,"
            " and in a sweep every further process would start the sweep again"
        )
    if plain["study"] in ("", ".", "..") or "/" in plain["study"]:
        raise ConfigError(f"study={plain['study']!r} must be the name of one folder")
    _check_schedules(plain["task"].get("schedules") or {}, plain["layer"]["_target_"])
    for key in VOLATILE:
        *parents, name = key.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(name, None)
    plain["data"] = _without_places(plain["data"])
    return plain


def _check_schedules(schedules: Any, layer: str) -> None:
    if not isinstance(schedules, dict):
        raise ConfigError(f"task.schedules={schedules!r} must be {{attribute: [[epoch, value], ...]}}")
    known = parameters_of(layer)
    for attribute, points in schedules.items():
        path = f"task.schedules.{attribute}"
        pairs = isinstance(points, list) and points and all(isinstance(p, list) and len(p) == 2 for p in points)
        if not pairs or not all(isinstance(number, int | float) for point in points for number in point):
            raise ConfigError(f"{path}={points!r} must be [[epoch, value], ...]")
        if known is None or known.open:
            continue
        if attribute not in known.annotations:
            raise ConfigError(no_such(path, layer, attribute, known.annotations))
        if not is_number(known, attribute):
            raise ConfigError(f"{path}: {attribute} of {layer} is none that may change from epoch to epoch")


def _plain(node: Any, resolve: bool) -> Any:
    # Volatile nodes stay unresolved: a logger may be named after `${run_id:}`.
    return OmegaConf.to_container(node, resolve=resolve) if OmegaConf.is_config(node) else node


def _without_places(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_places(value) for key, value in node.items() if key not in _PLACES}


def config_hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def run_id(identity: dict[str, Any]) -> str:
    """Name of a run's directory: layer, data, seed and the head of the configuration's hash."""
    layer = identity["layer"]["_target_"].rpartition(".")[2].lower()
    data = identity["data"].get("name") or identity["data"]["_target_"].rpartition(".")[2].lower()
    return f"{layer}-{data}-s{identity['seed']}-{config_hash(identity)[:10]}"


def run_dir(cfg: DictConfig, identity: dict[str, Any]) -> Path:
    return Path(cfg.runs_dir) / cfg.study / run_id(identity)


def build(node: Any, **keywords: Any) -> Any:
    """What `node` describes (`_target_`); the only caller of Hydra's instantiate. A ValueError or OSError of the target
    is raised as it is, and what else goes wrong is a ValueError of one line."""
    from hydra.utils import instantiate

    # Hydra 1.4 warns about targets that no list allows.
    if "_execution_whitelist_" in inspect.signature(instantiate).parameters:
        keywords["_execution_whitelist_"] = ["fff.*", "experiments.*", "lightning.*", "torch.*"]
    try:
        return instantiate(node, **keywords)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        key = re.search(r"full_key: (\S+)", str(error))
        where = f"{key[1]}: " if key else ""
        extra = "; pip install 'fff[log]'" if isinstance(cause, ImportError) and "tensorboard" in str(cause) else ""
        raise ValueError(f"{where}{explain(error)}{extra}") from error


def explain(error: BaseException, schemas: Sequence[type] = (Config, Trainer)) -> str:
    """One line that names the key, the target and the nearest valid name, from whatever Hydra or OmegaConf raised."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in chain:
        # Out of a resolver OmegaConf passes on the text of an error, not the error.
        if raised := re.search(r"ConfigError raised while resolving interpolation: (.+)", str(link)):
            return raised.group(1)
        if isinstance(link, ConfigError):
            return str(link)
        if isinstance(link, MissingConfigException) and link.options is not None:
            group, _, option = (link.missing_cfg_file or "").rpartition("/")
            extra = {"joblib": "sweep", "submitit_slurm": "slurm"}.get(option)
            if group == "hydra/launcher" and extra:
                return f"launcher={option} is not installed: pip install 'fff[{extra}]'"
            return f"{group}={option}: no such option; {suggest(option, link.options)}"
    text = "\n".join(str(link) for link in chain)
    # Without that line all that the file says is meant to be below `recipe`, which is a name.
    if bare := re.search(r"In '((recipe|budget|experiment)/[^']+)': \w+ raised[^']*'[^']*'.*full_key: \2$", text, _ALL):
        return f"{bare.group(1)}.yaml must begin with the line `# @package _global_`"
    if unknown := re.search(r"Key '(\w+)' (?:not in '(\w+)'|is not in struct)\s+full_key: (\S+)", text):
        name, owner, path = unknown.groups()
        schema = next((schema for schema in schemas if schema.__name__ == owner), None)
        parent = path.rpartition(".")[0] or "the configuration"
        return no_such(path, parent, name, [f.name for f in fields(schema)] if schema else [])
    text = re.sub(r"\w+ raised while (resolving interpolation|composing config):\s", "", str(chain[-1]))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    # OmegaConf appends its own book-keeping (full_key, object_type, reference_type), Hydra its search path.
    lines = [line for line in lines if not re.match(r"(full_key|object_type|reference_type|provider=)", line)]
    return f"{key}: {' '.join(lines)}" if key else " ".join(lines) or repr(error)


@contextmanager
def one_line_errors(*schemas: type) -> Iterator[None]:
    """Around a Hydra command: a mistake ends the program with code 2 and one line, unless HYDRA_FULL_ERROR=1.

    schemas: dataclasses of the configuration, whose keys are offered for a mistyped one.
    """
    told_in_full = os.environ.get("HYDRA_FULL_ERROR")
    # Makes Hydra raise its errors instead of printing them over many lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except Exception as error:
        if told_in_full == "1":
            raise
        print(f"error: {explain(error, schemas)}", file=sys.stderr)
        sys.exit(2)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = told_in_full or "0"


def config_path() -> str:
    """Where the YAML files lie: beside this package, in a checkout and in a wheel alike."""
    return str(Path(__file__).resolve().parents[1] / "conf")


def option_groups() -> str:
    """For --help: a line for each group of options that a run has. Hydra's own list names the benchmarks' too."""
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in sorted(loader.list_groups("")) if group not in ("hydra", "bench")]
    return "\n".join(f"{group}: {', '.join(sorted(loader.get_group_options(group)))}" for group in groups)


def recipe_note(choices: Mapping[str, str | None], loader: ConfigLoader) -> str:
    """One line where a recipe has settings for some layers of a kind and none for the one that was chosen, else "".

    choices: option by group.
    """
    recipe, layer = choices.get("recipe"), choices.get("layer")
    if not recipe or not layer:
        return ""
    layers = loader.get_group_options("layer")
    options = loader.get_group_options("recipe/layer")
    served = [name for name in layers if f"{recipe}_{name}" in options]
    kin = [name for name in served if name.partition("_")[0] == layer.partition("_")[0]]
    if layer in served or not kin:
        return ""
    return (
        f"note: recipe={recipe} has settings of its own for layer={','.join(kin)} but none for layer={layer}, which"
        " trains with those for all layers"
    )


def register() -> None:
    """Make schema and resolvers known to Hydra and OmegaConf."""
    # Hydra copies the store, all of it, for every composition (25 of 60 ms), though it is a singleton that copies what
    # it hands out.
    ConfigStore.__deepcopy__ = lambda self, memo: self
    schema = OmegaConf.structured(Config)
    for key in ("layer", "model", "task", "data", "logger"):
        # Not closed to new keys: `check` knows what each target takes, and says it better.
        schema[key] = OmegaConf.create({}, flags={"struct": False})
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("tree_depth", tree_depth, replace=True)
    OmegaConf.register_new_resolver("num_experts", num_experts, replace=True)
    OmegaConf.register_new_resolver("add", add, replace=True)
    OmegaConf.register_new_resolver("half", half, replace=True)
    OmegaConf.register_new_resolver("times", times, replace=True)
    OmegaConf.register_new_resolver("option_groups", option_groups, replace=True)
    OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(identity(_root_)), replace=True)


register()
