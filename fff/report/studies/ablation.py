"""What each part of a recipe gains: runs that change one thing of a base, beside the base with the same seeds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import DATASETS, hardware
from fff.report.records import config_columns, natural
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, number, of, percent, spread

_SHAPE = ["layer.num_trees", "layer.leaf_width", "layer.depth"]
_DATA = "data.name"
_NOTE = (
    "The base is the configuration that differs least from all others. GA: mean ± standard deviation over the seeds,"
    " hard route, weights of the best validation accuracy. Δ: mean difference to the base over the seeds that both"
    " have, in points, ± its standard error. Runs that diverged count with their best weights before that."
)


def report(data: StudyData) -> Report:
    """Tables of each data set: settings of the recipe at the shapes that were varied, then shapes by the base."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    cells, tables, drawn = [], [], {}
    for name in sorted(set(data.runs[_DATA]), key=[*DATASETS, *data.runs[_DATA]].index):
        runs = data.runs[data.runs[_DATA] == name]
        own = _cells(runs)
        cells.append(own)
        title = DATASETS.get(name, name)
        tables += [
            Table(f"{data.name}_{name}", f"{title}: one change of our recipe", _settings(own), _NOTE),
            Table(
                f"{data.name}_{name}_shape",
                f"{title}: trees, depth and leaf width by our recipe",
                _shapes(own),
                f"{_NOTE} Base: 16 leaves of 8 units. Width used: units of the leaves that a row passes; size used adds"
                " the nodes on its way.",
                0,
            ),
            Table(
                f"{data.name}_{name}_runs",
                f"{title}: what the runs were",
                _runs(own),
                f"MA: best training accuracy. Soft: the mixture of all leaves. {hardware(runs)}",
                2,
            ),
        ]
        drawn[f"{name}_effect"] = _figure(own, title)
    return Report(pd.concat(cells, ignore_index=True), tables, drawn)


def _cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Cells in the order of the tables. setting: "" for the base.  difference, error: to it, fractions."""
    cells = summarize(runs)
    names = [name for name in config_columns(cells.columns) if name not in _SHAPE and cells[name].nunique() > 1]
    settings = list(cells[names].itertuples(index=False, name=None))
    base = min(set(settings), key=lambda one: (sum(_differing(one, other) for other in settings), one))
    changes = [[(n, a) for n, a, b in zip(names, one, base, strict=True) if a != b] for one in settings]
    cells["setting"] = [", ".join(_words(*change) for change in one) for one in changes]
    shapes = cells[_SHAPE].apply(pd.to_numeric).astype(int)
    cells["trees"], cells["leaf_width"], cells["depth"] = (shapes[name] for name in _SHAPE)
    cells["shape"] = [_shape(*one) for one in shapes.itertuples(index=False, name=None)]
    accuracy = {cell: group.set_index("seed")["metrics.ga"] for cell, group in runs.groupby("cell")}
    bases = {row.shape: row.cell for row in cells.itertuples() if not row.setting}
    # A shape of its own is set beside the first of those that were varied.
    varied = [shape for shape, group in cells.groupby("shape", sort=False) if (group["setting"] != "").any()]
    first = bases.get(varied[0] if varied else cells["shape"][0])
    pairs = [(row.cell, bases.get(row.shape) if row.setting else first) for row in cells.itertuples()]
    found = [_paired(accuracy[cell], accuracy.get(other)) for cell, other in pairs]
    cells["difference"], cells["error"] = zip(*found, strict=True)
    cells["varied"] = cells["shape"].isin(varied)
    keys = [[(names.index(n), natural(value)) for n, value in one] for one in changes]
    order = sorted(cells.index, key=lambda i: (keys[i], *shapes.loc[i]))
    return cells.loc[order].reset_index(drop=True)


def _differing(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _words(name: str, value: str) -> str:
    words = name.rpartition(".")[2].replace("_", " ")
    if name.startswith("task.schedules."):
        words += " over the epochs"
    if value in ("", "false"):
        return f"no {words}"
    return words if value == "true" else f"{words} {value.replace('_', '-')}"


def _shape(trees: int, leaf_width: int, depth: int) -> str:
    return f"{f'{trees} x ' if trees > 1 else ''}{2**depth} x {leaf_width}"


def _paired(values: pd.Series, base: pd.Series | None) -> tuple[float, float]:
    """Mean difference over the seeds that both have, and its standard error; nan where there are none."""
    gains = pd.Series(dtype=float) if base is None else (values - base).dropna()
    return gains.mean(), gains.sem()


def _delta(row: pd.Series) -> str:
    if math.isnan(row["difference"]):
        return MISSING
    return f"{100 * row['difference']:+.1f} ± {number(100 * row['error'])}"


def _settings(cells: pd.DataFrame) -> pd.DataFrame:
    cells = cells[cells["varied"]]
    shapes = list(dict.fromkeys(cells["shape"]))
    lines = []
    for setting, group in cells.groupby("setting", sort=False):
        line = {"change": setting or "base"}
        for shape in shapes:
            row = next((row for _, row in group.iterrows() if row["shape"] == shape), None)
            line[f"GA, {shape}"] = MISSING if row is None else spread(row["ga_mean"], row["ga_std"])
            line[f"Δ, {shape}"] = MISSING if row is None or not setting else _delta(row)
            line[f"leaves in use, {shape}"] = MISSING if row is None else of(row["leaves_used"], row["num_leaves"])
        lines.append(line)
    return pd.DataFrame(lines)


def _shapes(cells: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "trees": str(row["trees"]),
                "depth": str(row["depth"]),
                "leaf width": str(row["leaf_width"]),
                "width trained": integer(row["training_width"]),
                "width used": integer(row["inference_width"]),
                "size used": integer(row["inference_size"]),
                "GA": spread(row["ga_mean"], row["ga_std"]),
                "Δ": _delta(row),
                "leaves in use": of(row["leaves_used"], row["num_leaves"]),
                "n": str(row["n"]),
            }
            for _, row in cells[cells["setting"] == ""].iterrows()
        ]
    )


def _runs(cells: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "change": cells["setting"].where(cells["setting"] != "", "base"),
            "shape": cells["shape"],
            "MA": [spread(*both) for both in zip(cells["ma_mean"], cells["ma_std"], strict=True)],
            "validation": [spread(*v) for v in zip(cells["val_accuracy_mean"], cells["val_accuracy_std"], strict=True)],
            "GA soft": cells["ga_soft_mean"].map(percent),
            "largest leaf, %": cells["largest_leaf_share"].map(percent),
            "node entropy, nats": [number(value, 3) for value in cells["node_entropy"]],
            "epochs": cells["epochs"].map(integer),
            "runs (diverged)": [f"{n} ({bad})" for n, bad in zip(cells["n"], cells["diverged"], strict=True)],
        }
    )


def _figure(cells: pd.DataFrame, title: str) -> Figure:
    """Difference of every setting to the base, with its standard error, at each shape."""
    cells = cells[cells["varied"] & (cells["setting"] != "")]
    places = {setting: -place for place, setting in enumerate(dict.fromkeys(cells["setting"]))}
    figure = Figure(figsize=(7.5, 1.2 + 0.21 * len(places)), layout="constrained")
    axes = figure.subplots()
    for i, (shape, group) in enumerate(cells.groupby("shape", sort=False)):
        axes.errorbar(
            100 * group["difference"],
            [places[setting] - 0.15 * i for setting in group["setting"]],
            xerr=100 * np.nan_to_num(group["error"]),
            color=figures.PALETTE[i % len(figures.PALETTE)],
            marker=figures.MARKERS[i % len(figures.MARKERS)],
            markersize=4.5,
            linestyle="",
            elinewidth=0.9,
            label=f"{shape} units",
        )
    axes.axvline(0, color=figures.DENSE, linewidth=0.8)
    axes.set_yticks(list(places.values()), list(places))
    axes.set(xlabel="GA less that of our recipe, points ± standard error", title=title)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    figures.legend_below(figure, [axes])
    return figure
