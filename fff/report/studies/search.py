"""The search for our recipe: which settings serve each architecture and size best, by validation rows alone."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import text
from fff.report.records import config_columns
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, of, percent, spread

# Of each class its name in the tables, the column of its size, and what the tables call that.
_ARCHITECTURES = {
    "fff.FeedForward": ("dense", "layer.hidden_features", "width"),
    "fff.MoE": ("mixture", "layer.expert_width", "expert width"),
    "fff.FFF": ("tree", "layer.leaf_width", "leaf width"),
    "fff.NoFeedForward": ("none", None, ""),
}
# What a class takes for an argument that the configuration leaves out: by place, class and argument.
_DEFAULTS = {
    ("layer", "fff.FFF", "runner_up"): "false",
    ("layer", "fff.FFF", "base"): "false",
    ("model", "fff.models.Classifier", "noise"): "0.0",
    ("task.optimizer", "torch.optim.AdamW", "weight_decay"): "0.01",
}
# Settings in the order of the tables; others follow under their own names.
_NAMES = {
    "layer.router": "router",
    "layer.num_experts": "experts",
    "layer.depth": "depth",
    "layer.runner_up": "runner-up",
    "layer.base": "base",
    "layer.balance_weight": "balance",
    "task.optimizer.lr": "learning rate",
    "task.optimizer.weight_decay": "weight decay",
    "task.deviation_decay": "decay of deviations",
    "model.noise": "noise",
    "task.label_smoothing": "label smoothing",
    "layer.drop": "dropout",
    "task.schedules.temperature": "temperature",
}
_WORDS = {"": MISSING, "true": "yes", "false": "no"}
_MODEL = ["architecture", "size", "model"]


def report(data: StudyData) -> Report:
    """ValueError for runs that looked at test rows, or whose validation rows are not those of their seed."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    if unknown := set(text(data.runs, "layer._target_")) - set(_ARCHITECTURES):
        raise ValueError(
            f"{data.name} holds runs of {', '.join(sorted(unknown))}; it ranks {', '.join(_ARCHITECTURES)}"
        )
    own_rows = text(data.runs, "data.split_seed") == data.runs["seed"].astype(str)
    wrong = data.runs["run_id"][data.runs["metrics.ga"].notna() | ~own_rows]
    if len(wrong):
        raise ValueError(
            f"{data.name} compares by validation rows alone, other ones for each seed (task.test=false,"
            f" data.split_seed=${{seed}}); these runs do not: {', '.join(wrong)}"
        )
    runs, repeated = _settings(data)
    by_cell = runs.groupby("cell")
    cells = summarize(runs, keep=_MODEL)
    cells["leaves_used_train"] = cells["cell"].map(by_cell["leaves_used_train"].mean())
    cells["run_ids"] = cells["cell"].map(by_cell["run_id"].agg(" ".join))
    order = {"architecture": True, "size": False, "val_accuracy_mean": False}
    cells = cells.sort_values(list(order), ascending=list(order.values()), kind="stable", ignore_index=True)

    seeds = runs["seed"].nunique()
    note = (
        f"{seeds} seed{'s' * (seeds > 1)}, each with validation rows of its own; test rows were never looked at."
        " Accuracies of the hard"
        " route in percent, best over the epochs: mean ± standard deviation of n runs on the validation rows, mean on"
        " the training rows (MA). Leaves (experts) in use: those that at least one training row reaches after the last"
        " epoch, mean. What a router brings along, as its loss weights, is no column."
    )
    models = dict(iter(cells.groupby("model", sort=False)))
    varied = {model: _varied(group) for model, group in models.items()}
    every = list({name: None for names in varied.values() for name in names})
    headline = _frame(pd.concat([group.head(1) for group in models.values()]), every)
    headline.insert(0, "model", list(models))
    headline["settings tried"] = [str(len(group)) for group in models.values()]
    title = "Search: the best setting of each model by validation accuracy"
    caution = "The best of many settings looks better on the rows that chose it than on others."
    tables = [Table(data.name, title, headline, f"{note} {caution}", 1 + len(every))]
    for model, group in models.items():
        name = f"{data.name}_{group['architecture'].iloc[0]}_{group['size'].iloc[0]}"
        tables.append(Table(name, f"Search: {model}", _frame(group, varied[model]), note, len(varied[model])))

    remarks = [f"{data.name}: {repeated} runs repeat setting and seed of others and are not counted"] * (repeated > 0)
    if fewer := (cells["n"] < seeds).sum():
        remarks.append(f"{data.name}: {fewer} of {len(cells)} settings have fewer runs than the {seeds} seeds")
    return Report(cells, tables, {"settings": _figure(models)}, remarks)


def _settings(data: StudyData) -> tuple[pd.DataFrame, int]:
    """Runs with the columns of `_MODEL` and leaves_used_train, their cells made anew; how many were left out because
    they are others over again: those that name a default beside those that leave it out."""
    last = data.history.sort_values("epoch", kind="stable").drop_duplicates("cell", keep="last")
    known = [_ARCHITECTURES[layer] for layer in data.runs["layer._target_"]]
    rows = zip(data.runs.to_dict("records"), known, strict=True)
    sizes = [int(row[column]) if column else 0 for row, (_, column, _) in rows]
    runs = data.runs.assign(
        architecture=[name for name, _, _ in known],
        size=sizes,
        model=[
            f"{name}, {words} {size}" if words else name for (name, _, words), size in zip(known, sizes, strict=True)
        ],
        leaves_used_train=data.runs["cell"].map(last.set_index("cell")["leaves_used"]).astype(float),
    )
    for (place, class_name, argument), default in _DEFAULTS.items():
        value = text(runs, f"{place}.{argument}")
        runs[f"{place}.{argument}"] = value.mask(
            (text(runs, f"{place}._target_") == class_name) & (value == ""), default
        )
    # By its records each run is a cell of its own, as the seed of the validation rows counts as a setting.
    runs = runs.drop(columns="data.split_seed")
    runs["cell"] = runs.groupby(config_columns(runs.columns))["cell"].transform("first")
    repeated = runs.duplicated(["cell", "seed"])
    return runs[~repeated], int(repeated.sum())


def _varied(cells: pd.DataFrame) -> list[str]:
    """The settings in which these cells differ, without those of the layer that follow from its router."""
    routers = cells.groupby(text(cells, "layer.router"))
    names = [name for name in config_columns(cells.columns) if cells[name].nunique() > 1]
    return [
        name
        for name in names
        if name == "layer.router" or not name.startswith("layer.") or (routers[name].nunique() > 1).any()
    ]


def _word(value: str) -> str:
    # A product such as 7 * 0.025 has digits that say nothing.
    return _WORDS.get(value, re.sub(r"\d+\.\d{9,}", lambda number: f"{float(number[0]):g}", value))


def _frame(cells: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    ordered = [name for name in _NAMES if name in settings] + [name for name in settings if name not in _NAMES]
    columns = {_NAMES.get(name, name): cells[name].map(_word) for name in ordered}
    accuracy = zip(cells["val_accuracy_mean"], cells["val_accuracy_std"], strict=True)
    columns["validation"] = [spread(*values, decimals=2) for values in accuracy]
    columns["MA"] = [percent(value, decimals=2) for value in cells["ma_mean"]]
    # Several dense layers have several "leaves", and none of them is a choice.
    if (cells["architecture"] != "dense").any() and (cells["num_leaves"] > 1).any():
        columns["leaves in use"] = [of(*v) for v in zip(cells["leaves_used_train"], cells["num_leaves"], strict=True)]
    columns["n (diverged)"] = [f"{n} ({diverged})" for n, diverged in zip(cells["n"], cells["diverged"], strict=True)]
    return pd.DataFrame(columns).reset_index(drop=True)


def _figure(models: dict[str, pd.DataFrame]) -> Figure:
    """Mean validation accuracy of every setting, a row for each model, in which the best is topmost."""
    figure = Figure(figsize=(7.0, 1.0 + 0.5 * len(models)), layout="constrained")
    axes = figure.subplots()
    palette = figures.colors(
        (cells["architecture"].iloc[0], cells["architecture"].iloc[0] == "dense") for cells in models.values()
    )
    for i, cells in enumerate(models.values()):
        places = i + np.linspace(-0.3, 0.3, len(cells))
        axes.plot(100 * cells["val_accuracy_mean"], places, ".", color=palette[cells["architecture"].iloc[0]])
    axes.set(xlabel="validation accuracy in %, mean over the seeds")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    figure.get_layout_engine().set(w_pad=0.15)  # long names are wider in a bitmap than in the layout
    return figure
