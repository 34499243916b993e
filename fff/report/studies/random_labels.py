"""Random labels learnt by heart, as in Zhang et al. 2017 (arXiv 1611.03530): by parameters, and by what runs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import DATASETS, Cell, best, hardware, mean, missing_references, placed, reference, text
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, number, of

_REFERENCE = "zhang2017_table1"
_NOTE = (
    "MA: share of the training rows whose random label the hard route gives back, in percent, best over the epochs;"
    " mean ± standard deviation over the seeds."
)
_KEY = ["data", "rows", "fraction", "family", "width", "leaf_width"]
_AXES = {"parameters": "parameters", "inference_size": "inference size (neurons)"}


def report(data: StudyData) -> Report:
    """ValueError if the study holds two configurations for one place of a table: their runs must not be mixed."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    runs = data.runs.assign(
        data=text(data.runs, "data.data.name"),
        rows=text(data.runs, "data.num_rows"),
        fraction=text(data.runs, "data.fraction"),
        family=[_family(row) for row in data.runs.to_dict("records")],
        width=data.runs["metrics.training_width"].astype(int),
        leaf_width=text(data.runs, "layer.leaf_width") + text(data.runs, "layer.expert_width"),
    )
    cells = summarize(runs, keep=_KEY)
    cells["leaves_trained"] = cells["cell"].map(_last_leaves(data.history))
    order = {name: i for i, name in enumerate(DATASETS)}
    place = cells["data"].map(lambda name: order.get(name, len(order)))
    cells = cells.assign(place=place, routed=cells["num_leaves"] > 1)
    cells = cells.sort_values(["place", "data", "routed", "family", "width"], kind="stable", ignore_index=True)
    cells = cells.drop(columns=["place", "routed"])
    placed(data, runs, cells.to_dict("records"), _KEY)
    tables = [
        Table(
            data.name,
            "Random labels: what is learnt by heart",
            pd.DataFrame([_line(cell) for cell in cells.to_dict("records")]),
            f"{_NOTE} Width: hidden units that are trained. Rows: kept of the training split, of which nine tenths are"
            " trained on. Inference size: neurons that one row passes, the router's included. Leaves in use: leaves"
            " (experts) that at least one training row reaches after the last epoch, mean over the runs. Balance and"
            f" hardening losses of mixtures and trees are on. {hardware(runs)}",
            4,
        )
    ]
    if theirs := _theirs(reference(_REFERENCE, data.results_dir)):
        tables.append(
            Table(
                f"{data.name}_published",
                "Random labels: Zhang et al. 2017, CIFAR-10",
                pd.DataFrame(theirs),
                "Their table 1, percent: all 50 000 training rows, cropped to 28 x 28 pixels, no regularisation.",
            )
        )
    drawn = {name: _figure(cells, name, label) for name, label in _AXES.items()}
    return Report(cells, tables, drawn, missing_references(data, [_REFERENCE]))


def _family(row: dict[str, str]) -> str:
    """The layer without its widths."""
    layer = row["layer._target_"].rpartition(".")[2]
    if layer == "FeedForward":
        return "dense"
    if layer == "MoE":
        return f"{row['layer.router']} mixture, top {row['layer.top_k']}"
    runner_up = ", runner-up in training" if row.get("layer.runner_up") == "true" else ""
    return f"{layer}, {row['layer.mode'].replace('_', '-')}{runner_up}"


def _last_leaves(history: pd.DataFrame) -> dict[str, float]:
    """Leaves in use after the last epoch, by cell."""
    last = history.sort_values("epoch").groupby("cell").tail(1)
    return dict(zip(last["cell"], last["leaves_used"], strict=True))


def _line(cell: Cell) -> dict[str, str]:
    return {
        "data": DATASETS.get(cell["data"], cell["data"]),
        "layer": cell["family"],
        "width": str(cell["width"]),
        "leaf width": cell["leaf_width"] or MISSING,
        "rows": cell["rows"] or "all",
        "parameters": integer(cell["parameters"]),
        "inference size": integer(cell["inference_size"]),
        "MA": mean(cell, "ma"),
        "MA best": best(cell, "ma"),
        "MA soft": mean(cell, "ma_soft"),
        "ETT (MA)": integer(cell["ma_epochs"]),
        "leaves in use": of(cell["leaves_trained"], cell["num_leaves"]),
        "epochs": integer(cell["epochs"]),
        "runs (diverged)": f"{cell['n']} ({cell['diverged']})",
    }


def _theirs(published: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "model": row["model"],
            "parameters": integer(row["params"]),
            "MA": number(row["train_acc"], 2),
            "test accuracy": number(row["test_acc"], 2),
        }
        for row in (published[published["labels"] == "random"].to_dict("records") if len(published) else [])
    ]


def _figure(cells: pd.DataFrame, size: str, label: str) -> Figure:
    """MA against a size, a panel for each data set and a line for each family."""
    names = list(dict.fromkeys(cells["data"]))
    palette = figures.colors((family, family == "dense") for family in cells["family"])
    figure = Figure(figsize=(max(6.4, 4.4 * len(names)), 4.0), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for j, (panel, name) in enumerate(zip(panels, names, strict=True)):
        series = []
        for i, (family, color) in enumerate(palette.items()):
            points = cells[(cells["data"] == name) & (cells["family"] == family)].sort_values(size, kind="stable")
            values, deviations = (100 * points[f"ma_{kind}"] for kind in ("mean", "std"))
            # Cells of one size stand above each other, not joined.
            line = "-" if points[size].is_unique else ""
            marker = figures.MARKERS[i % len(figures.MARKERS)]
            series.append(figures.Series(family, list(points[size]), values, deviations, None, color, marker, line))
        here = cells[cells["data"] == name]
        figures.accuracy_panel(panel, series, label, "MA in %" if j == 0 else "", sizes=here[size])
        panel.set_title(DATASETS.get(name, name))
    figures.legend_below(figure, panels, columns=3)
    return figure
