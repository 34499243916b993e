"""From one row per run to one row per cell: best, mean and standard deviation over the seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pandas as pd

from fff.report.records import config_columns, natural

# What is read first when arms are told apart; the rest follows by name.
_ORDER = (
    *("data.name", "data._target_", "data.data.name", "data.fraction", "data.setting"),
    *("layer._target_", "layer.mode", "layer.router", "layer.hidden_features", "layer.expert_width"),
    *("layer.num_experts", "layer.leaf_width", "layer.depth", "layer.num_trees", "layer.top_k"),
)
_ACCURACIES = ("ma", "ga", "ma_soft", "ga_soft", "val_accuracy")
_MEANS = ("ma_epochs", "ga_epochs", "leaves_used", "largest_leaf_share", "node_entropy", "nodes_below_0.10", "epochs")
_SIZES = (
    "num_leaves",
    "parameters",
    "training_width",
    "inference_width",
    "training_size",
    "inference_size",
    "flops_per_row",
)


def read_runs(file: Path | TextIO) -> pd.DataFrame:
    """The tidy CSV of a study, in its order: configuration as text ("" for what a run has not), metrics as numbers.

    capped: the limit of epochs ended the run, rather than a standstill or a loss that is not finite. Where patience is
    as long as the limit and no loss ends the run, its length was settled beforehand, and that is no cap.
    """
    runs = pd.read_csv(file, dtype=str, keep_default_na=False)
    for name in runs.columns:
        if name in ("seed", "wall_time_s") or (name.startswith("metrics.") and name != "metrics.leaf_load"):
            if name != "metrics.diverged":
                runs[name] = pd.to_numeric(runs[name], errors="coerce")
    for name in (*_ACCURACIES, *_MEANS, *_SIZES):
        if f"metrics.{name}" not in runs:
            runs[f"metrics.{name}"] = float("nan")
    diverged = runs["metrics.diverged"] if "metrics.diverged" in runs else pd.Series("", index=runs.index)
    runs["metrics.diverged"] = diverged.str.lower() == "true"
    limit = runs["trainer.max_epochs"] if "trainer.max_epochs" in runs else pd.Series("", index=runs.index)
    limit = pd.to_numeric(limit, errors="coerce")
    patience, stop_loss = (
        runs[name] if name in runs else pd.Series("", index=runs.index) for name in ("task.patience", "task.stop_loss")
    )
    settled = (pd.to_numeric(patience, errors="coerce") == limit) & (stop_loss == "")
    runs["capped"] = (runs["metrics.epochs"] >= limit) & ~settled & ~runs["metrics.diverged"]
    loads = runs["metrics.leaf_load"] if "metrics.leaf_load" in runs else pd.Series("", index=runs.index)
    runs["metrics.leaf_load"] = [json.loads(load) if load else [] for load in loads]
    return runs


def summarize(runs: pd.DataFrame, keep: Sequence[str] = ()) -> pd.DataFrame:
    """One row per cell, in order of first appearance, with its configuration and the columns `keep`, of which the first
    run of a cell speaks for the others.

    n counts every run, diverged ones too, and each enters with the metrics it has; the standard deviation is that
    of a sample (divisor n - 1), nan for one run. best_*_run is the run that gave the best value.
    """
    rows = []
    for _, group in runs.groupby("cell", sort=False):
        row = group.iloc[0][["cell", *keep, *config_columns(runs.columns)]].to_dict()
        row |= {"n": len(group), "diverged": int(group["metrics.diverged"].sum()), "capped": int(group["capped"].sum())}
        for name in _ACCURACIES:
            values = group[f"metrics.{name}"].dropna()
            row |= {f"{name}_mean": values.mean(), f"{name}_std": values.std(), f"{name}_best": values.max()}
            if name in ("ma", "ga"):
                row[f"best_{name}_run"] = group.loc[values.idxmax(), "run_id"] if len(values) else ""
        row |= {name: group[f"metrics.{name}"].mean() for name in _MEANS}
        row |= {name: group[f"metrics.{name}"].max() for name in _SIZES}
        row["wall_time_s"] = group["wall_time_s"].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def distinguishing(cells: pd.DataFrame) -> list[str]:
    """A small set of columns that tells all cells apart, in reading order: the recipe, where the cells have that
    column, before those of the configuration, of which it sets several.

    A column that splits no group left by those before it is not taken: an optimiser that changes with the mode says
    nothing new beside the mode.
    """
    names = config_columns(cells.columns)
    recipe = [name for name in ("recipe",) if name in cells]
    ordered = recipe + [name for name in _ORDER if name in names] + [name for name in names if name not in _ORDER]
    taken: list[str] = []
    groups = 1
    for name in ordered:
        count = cells.groupby([*taken, name], dropna=False).ngroups
        if count > groups:
            taken, groups = [*taken, name], count
        if groups == len(cells):
            break
    return taken


def label(cells: pd.DataFrame) -> pd.DataFrame:
    """`cells` sorted, dense layers first, with the columns data, layer, settings, family and depth (nan: no tree).

    settings is what tells the cells of one layer and data set apart, "mode=soft, depth=4"; family is the layer with
    those of its settings that are no numbers, "FFF (soft)".
    """
    cells = cells.reset_index(drop=True)
    data = _first(cells, ("data.name", "data.data.name", "data._target_"))
    layer = _first(cells, ("layer._target_",))
    settings, families, keys = pd.Series("", cells.index), pd.Series("", cells.index), pd.Series([()] * len(cells))
    for _, index in cells.groupby([data, layer], sort=False).groups.items():
        # Within one layer an order of its own: a column that varies only between layers is no setting.
        names = distinguishing(cells.loc[index])
        short = _short(names)
        for i in index:
            shown = [(name, cells.at[i, name]) for name in names if cells.at[i, name] != ""]
            settings[i] = ", ".join(f"{short[name]}={_last(value)}" for name, value in shown)
            # A column is a size where all its values are numbers.
            families[i] = ", ".join(
                _last(value) for name, value in shown if not all(natural(v)[0] < 2 for v in cells.loc[index, name])
            )
            keys[i] = tuple(natural(cells.at[i, name]) for name in names)
    families = layer + families.map(lambda text: f" ({text})" if text else "")
    depth = pd.to_numeric(cells["layer.depth"], errors="coerce") if "layer.depth" in cells else float("nan")
    cells = cells.assign(data=data, layer=layer, settings=settings, family=families, depth=depth)
    routed = cells["num_leaves"] > 1
    order = sorted(cells.index, key=lambda i: (cells.at[i, "data"], routed[i], cells.at[i, "layer"], keys[i]))
    return cells.loc[order].reset_index(drop=True)


def _first(cells: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """The first of these columns that has a value, row by row; the last part of a dotted class name."""
    value = pd.Series("", cells.index)
    for name in names:
        if name in cells:
            value = value.where(value != "", cells[name].fillna(""))
    return value.map(_last)


def _last(value: str) -> str:
    """Class name of a dotted path; other values as they are."""
    head, _, tail = value.rpartition(".")
    return tail if head and all(part.isidentifier() for part in value.split(".")) else value


def _short(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name where no other ends so; `task.optimizer._target_` is the optimizer."""
    plain = {name: name.removesuffix("._target_") for name in names}
    last = {name: text.rpartition(".")[2] for name, text in plain.items()}
    return {name: last[name] if list(last.values()).count(last[name]) == 1 else plain[name] for name in names}
