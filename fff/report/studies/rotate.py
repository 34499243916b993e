"""CIFAR-10-Rotate of Chen et al. 2022 (arXiv 2208.02813): heads of one small network, beside their whole networks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import (
    Cell,
    ahead,
    hardware,
    layer_name,
    mean,
    missing_references,
    placed,
    reference,
    shown,
    signed,
    size,
    text,
)
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, number, of, percent

_REFERENCE = "chen2022_real"
_DATASET = "CIFAR-10-Rotate"
_NOTE = (
    "Accuracies in percent, mean ± standard deviation over the seeds, hard route, weights of the best validation"
    " accuracy. Dispatch entropy: of the class of the picture among the rows of a leaf (expert), mean over the test"
    " rows, in nats: 0 where each knows one class, ln 10 = 2.303 where none specialises. Where two are chosen, both"
    " choices count."
)


def report(data: StudyData) -> Report:
    """ValueError if the study holds two configurations of one layer: their runs must not be mixed."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    runs = data.runs.assign(model=[layer_name(row) for row in data.runs.to_dict("records")])
    runs["leaf_width"] = size(runs, "layer.leaf_width") + size(runs, "layer.expert_width")
    cells = summarize(runs, keep=["model", "leaf_width"])
    entropy = runs.groupby("cell")["metrics.dispatch_entropy"]
    cells["entropy_mean"], cells["entropy_std"] = cells["cell"].map(entropy.mean()), cells["cell"].map(entropy.std())
    cells = cells.sort_values(["num_leaves", "training_width", "model"], kind="stable", ignore_index=True)
    found = {model: cell for (model,), cell in placed(data, runs, cells.to_dict("records"), ["model"]).items()}
    dense = {cell["training_width"]: cell for cell in found.values() if not cell["num_leaves"] > 1}
    published = reference(_REFERENCE, data.results_dir)
    if text(runs, "data.blurred_rows").eq("all").all():
        rows = "blurred as test rows are, where theirs alone are blurred"
    elif runs["data.blur"].ne("").all():
        rows = "blurred, as theirs"
    else:
        rows = "as sharp as test rows, where theirs are blurred"
    tables = [
        Table(
            data.name,
            "CIFAR-10-Rotate: is the picture turned by 30 degrees?",
            pd.DataFrame([*_theirs(published), *(_line(model, cell, dense) for model, cell in found.items())]),
            f"{_NOTE} Ours: heads of one convolutional network; Δ: mean less that of a dense head as wide as the layer"
            " trains, and of one as wide as one leaf (expert), in points. Theirs: single networks, and"
            " mixtures of such networks with their Δ; pictures turned by the nearest pixel, each once upright and once"
            " turned, and no validation rows, so only Δ compares, and only as far as training rows do: ours are"
            f" {rows}.",
            2,
        ),
        Table(
            f"{data.name}_runs",
            "CIFAR-10-Rotate: training rows, routes, sizes",
            pd.DataFrame([_detail(model, cell) for model, cell in found.items()]),
            f"{_NOTE} MA: on the training rows, best over the epochs; GA soft: of the soft mixture. Leaves in"
            " use: leaves (experts) that at least one test row reaches, mean over the runs; largest: share of the test"
            f" rows in the fullest. Size: neurons of the head, in its router and leaves. {hardware(runs)}",
        ),
    ]
    return Report(cells, tables, {"accuracy": _figure(runs, found)}, missing_references(data, [_REFERENCE]))


def _theirs(published: pd.DataFrame) -> list[dict[str, str]]:
    """A single network and a mixture of each kind."""
    lines = []
    for row in published[published["dataset"] == _DATASET].to_dict("records") if len(published) else []:
        for kind, words in (("single", "single"), ("moe", "mixture")):
            gain = row["moe_acc"] - row["single_acc"] if kind == "moe" else float("nan")
            lines.append(
                {
                    "model": f"{row['model']}, {words}",
                    "source": "paper",
                    "accuracy": f"{number(row[f'{kind}_acc'], 2)} ± {number(row[f'{kind}_std'], 2)}",
                    "Δ training width": signed(gain / 100),
                }
                | dict.fromkeys(("Δ leaf width", "dispatch entropy", "leaves in use", "parameters"), MISSING)
            )
    return lines


def _line(model: str, cell: Cell, dense: dict[int, Cell]) -> dict[str, str]:
    routed = cell["num_leaves"] > 1

    def gain(width: int) -> str:
        return signed(ahead(cell, dense.get(width))) if routed else MISSING

    return {
        "model": model,
        "source": "ours",
        "accuracy": shown(cell, lambda c: f"{percent(c['ga_mean'], 2)} ± {percent(c['ga_std'], 2)}"),
        "Δ training width": gain(cell["training_width"]),
        "Δ leaf width": gain(cell["leaf_width"]),
        "dispatch entropy": f"{number(cell['entropy_mean'], 3)} ± {number(cell['entropy_std'], 3)}"
        if routed
        else MISSING,
        "leaves in use": of(cell["leaves_used"], cell["num_leaves"]),
        "parameters": integer(cell["parameters"]),
    }


def _detail(model: str, cell: Cell) -> dict[str, str]:
    routed = cell["num_leaves"] > 1
    return {
        "model": model,
        "GA best": percent(cell["ga_best"]),
        "GA soft": mean(cell, "ga_soft"),
        "MA": mean(cell, "ma"),
        "ETT of MA / GA": f"{integer(cell['ma_epochs'])} / {integer(cell['ga_epochs'])}",
        "epochs": integer(cell["epochs"]),
        "leaves in use": of(cell["leaves_used"], cell["num_leaves"]),
        "largest, % of rows": percent(cell["largest_leaf_share"]) if routed else MISSING,
        "node entropy, nats": number(cell["node_entropy"], 3),
        "size trained / used": f"{integer(cell['training_size'])} / {integer(cell['inference_size'])}",
        "runs (diverged)": f"{cell['n']} ({cell['diverged']})",
    }


def _figure(runs: pd.DataFrame, found: dict[str, Cell]) -> Figure:
    """Accuracy against dispatch entropy of each routed layer; dense layers as lines. Pale dots are seeds."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    palette = figures.colors((model, not cell["num_leaves"] > 1) for model, cell in found.items())
    for i, (model, cell) in enumerate(found.items()):
        color, ga = palette[model], 100 * cell["ga_mean"]
        if not cell["num_leaves"] > 1:
            panel.axhline(ga, color=color, linestyle="--", linewidth=1.0, label=model)
            continue
        own = runs[runs["cell"] == cell["cell"]]
        panel.plot(
            own["metrics.dispatch_entropy"],
            100 * own["metrics.ga"],
            color=color,
            marker="o",
            markersize=3,
            ls="",
            alpha=0.4,
        )
        marker = figures.MARKERS[i % len(figures.MARKERS)]
        panel.plot([cell["entropy_mean"]], [ga], color=color, marker=marker, markersize=6, ls="", label=model)
    panel.axvline(np.log(10), color="#bbbbbb", linestyle=":", linewidth=0.9)
    panel.set(xlabel="dispatch entropy, nats (dotted: none specialises)", ylabel="GA in %")
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    figures.legend_below(figure, [panel], columns=2)
    return figure
