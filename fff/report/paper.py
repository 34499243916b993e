"""What the layouts share that set our runs beside published tables: recipes, places, cells as text, references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fff.report.records import natural
from fff.report.study import StudyData, refusal
from fff.report.tables import MISSING, number, percent, spread

# Our names of the data sets, in the order of the tables, and those of the published tables.
DATASETS = {
    "usps": "USPS",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
}

# Recipes in the order of the tables; another one follows under its own name.
RECIPES = {"paper": "paper's recipe", "first": "our first recipe", "second": "our second recipe", "ours": "our recipe"}
# Recipes that another one replaced: in tables beside it, not in figures.
SUPERSEDED = {"first": "ours", "second": "ours"}
# What the runs were that do not name their recipe, as those from before it was recorded: of all layers, and of trees.
_UNNAMED = {
    "paper": (
        {"task.optimizer._target_": "torch.optim.SGD", "task.optimizer.lr": "0.2", "task.lr_schedule": ""},
        {"layer.mode": "soft", "layer.hardening_weight": "3.0"},
    ),
    "first": (
        {"task.optimizer._target_": "torch.optim.AdamW", "task.optimizer.lr": "0.001", "task.lr_schedule": ""},
        {"layer.mode": "straight_through", "layer.balance_weight": "0.1"},
    ),
}

Cell = dict[str, Any]


def reference(name: str, results_dir: Path) -> pd.DataFrame:
    """A table in `<results_dir>/reference`, else in that of the checkout; empty where neither is."""
    for folder in (results_dir, Path(__file__).resolve().parents[2] / "results"):
        path = folder / "reference" / f"{name}.csv"
        if path.exists():
            return pd.read_csv(path)
    return pd.DataFrame()


def missing_references(data: StudyData, names: Iterable[str]) -> list[str]:
    """A remark for each table of `reference` that is not there."""
    return [
        f"{data.name}: no reference/{name}.csv in {data.results_dir}/ (the checkout has it in results/), so the paper's"
        " cells stay empty"
        for name in names
        if reference(name, data.results_dir).empty
    ]


def text(runs: pd.DataFrame, name: str) -> pd.Series:
    """A column of the configuration, "" where there is none."""
    return runs[name] if name in runs else pd.Series("", runs.index)


def size(runs: pd.DataFrame, name: str) -> pd.Series:
    """A column of the configuration that holds sizes, as integers; 0 where there is none."""
    return pd.to_numeric(text(runs, name), errors="coerce").fillna(0).astype(int)


def each(runs: pd.DataFrame, name: str) -> str:
    """All values that the runs have, "1 or 2"."""
    return " or ".join(sorted(set(text(runs, name)), key=natural))


def layer_name(row: dict[str, str]) -> str:
    """What a reader calls the layer of a run, with its widths; "none" where it was removed."""
    layer = row["layer._target_"].rpartition(".")[2]
    base = ", base" if row.get("layer.base") == "true" else ""
    if layer == "NoFeedForward":
        return "none"
    if layer == "UltraFFF":
        return f"UltraFFF, {row['layer.num_trees']} x {2 ** int(row['layer.depth'])}"
    if layer == "FeedForward":
        return f"dense, {row['layer.hidden_features']} units"
    if layer == "MoE":
        chosen = "" if row["layer.top_k"] == "1" else f", {row['layer.top_k']} experts"
        return f"{row['layer.router']} mixture, {row['layer.num_experts']} x {row['layer.expert_width']}{chosen}{base}"
    mode, depth = row["layer.mode"].replace("_", "-"), int(row["layer.depth"])
    chosen = "" if row["layer.top_k"] == "1" else f", {row['layer.top_k']} leaves"
    chosen += ", runner-up in training" if row.get("layer.runner_up") == "true" else ""
    return f"{layer}, {2**depth} x {row['layer.leaf_width']}, {mode}{chosen}{base}"


def placed(data: StudyData, runs: pd.DataFrame, cells: Iterable[Cell], key: Sequence[str]) -> dict[tuple, Cell]:
    """Cells by their place in the table; ValueError if two have the same, because their runs must not be mixed."""
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[name] for name in key), []).append(cell)
    for place, both in found.items():
        if len(both) > 1:
            words = ", ".join(f"{name}={value}" for name, value in zip(key, place, strict=True))
            raise refusal(
                data.name,
                f"{len(both)} configurations for one place of the table ({words})",
                {f"cell {cell['cell']}": runs["run_id"][runs["cell"] == cell["cell"]] for cell in both},
            )
    return {place: cells[0] for place, cells in found.items()}


def shown(cell: Cell | None, words: Callable[[Cell], str]) -> str:
    return MISSING if cell is None else words(cell)


def mean(cell: Cell | None, name: str = "ga") -> str:
    return shown(cell, lambda c: spread(c[f"{name}_mean"], c[f"{name}_std"]))


def best(cell: Cell | None, name: str = "ga") -> str:
    return shown(cell, lambda c: percent(c[f"{name}_best"]))


def ahead(cell: Cell | None, other: Cell | None) -> float:
    """By how much the mean GA of a cell is above that of another, as a fraction; nan where one was not run."""
    return float("nan") if cell is None or other is None else cell["ga_mean"] - other["ga_mean"]


def signed(fraction: float) -> str:
    """A difference of fractions, in points."""
    points = number(100 * fraction)
    return points if points.startswith(("-", MISSING)) else f"+{points}"


def hardware(runs: pd.DataFrame) -> str:
    """What the runs were computed on, in a sentence. Older records do not name the device."""
    device = text(runs, "hardware.device").where(lambda name: name != "", "device not recorded")
    places = (text(runs, "hardware.cpu") + ", " + device).value_counts().sort_index()
    return "Hardware: " + "; ".join(f"{place} ({count} runs)" for place, count in places.items()) + "."


def recipe_of(runs: pd.DataFrame) -> pd.Series:
    """The name that a run recorded; of others what they were tells it, and "" where it does not."""
    recipe = text(runs, "recipe")
    tree = text(runs, "layer.mode") != ""
    for name, (training, layer) in _UNNAMED.items():
        same = pd.Series(True, runs.index)
        for column, value in training.items():
            same &= text(runs, column) == value
        for column, value in layer.items():
            same &= ~tree | (text(runs, column) == value)
        recipe = recipe.mask((recipe == "") & same, name)
    return recipe
