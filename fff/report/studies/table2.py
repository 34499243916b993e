"""Table 2 of the FFF paper (arXiv 2308.14711v2), CIFAR-10: dense layers, mixtures and trees by the paper's recipe and
by ours, beside what the paper leaves out: dense layers of the inference width, other routers, other trees."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import (
    Cell,
    ahead,
    hardware,
    mean,
    missing_references,
    placed,
    reference,
    shown,
    signed,
    text,
)
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, number, of, percent

_REFERENCE = "table2_moe_comparison"
_RECIPES = {
    "cifar_paper": "paper's recipe",
    "cifar": "our recipe",
    "cifar_memorise": "ours for memorising",
}
_MODELS = {"ff": "dense", "moe": "MoE", "fff": "FFF"}
# Of the suite of timings.
_CANDIDATES = {
    "dense": "dense",
    "dense_leaf": "dense, 32 units",
    "moe_top_2": "MoE, 2 x 16",
    "fff_hard": "FFF, leaves of 32",
}
_NOTE = (
    "Accuracies of the hard route, in percent, mean ± standard deviation over n runs: MA on the training rows, best"
    " over the epochs, GA on the test rows with the weights of the best validation accuracy."
)


class Row(NamedTuple):
    """model: of `_MODELS`, or "ultra".  layer: what tells it from others of its training width, in words."""

    model: str
    layer: str


_DENSE = Row("ff", "dense")
# By recipe, layer and training width.
Cells = dict[tuple[str, Row, int], Cell]


def report(data: StudyData) -> Report:
    """ValueError if the study holds two configurations for one place, because their runs must not be mixed."""
    rows = [_row(run) for run in data.runs.to_dict("records")]
    runs = data.runs.assign(model=[row.model for row in rows], layer=[row.layer for row in rows])
    runs["recipe"] = text(runs, "recipe")
    runs["width"] = runs["metrics.training_width"].astype(int)
    key = ["recipe", "model", "layer", "width"]
    runs["layer"] += _longer(runs)
    summary = summarize(runs, keep=key)
    found = placed(data, runs, summary.to_dict("records"), key)
    cells = {(recipe, Row(model, layer), width): cell for (recipe, model, layer, width), cell in found.items()}
    paper = _paper(data)
    tables = [_beside_paper(data, cells, paper), _beside_dense(data, cells), _all(data, runs, cells), *_latency(data)]
    return Report(
        summary,
        tables,
        {"width": _by_width(cells, paper), "size": _by_size(cells)},
        missing_references(data, [_REFERENCE]),
    )


def _row(run: dict[str, str]) -> Row:
    name = run["layer._target_"].rpartition(".")[2]

    def has(option: str) -> bool:
        return run.get(f"layer.{option}", "") not in ("", "0", "false", "0.0")

    base = ", base" if has("base") else ""
    if name == "FeedForward":
        return _DENSE
    if name == "MoE":
        shared = f" + shared {run['layer.shared_width']}" if has("shared_width") else ""
        router = "bias-balanced" if has("bias_update_rate") else run["layer.router"].replace("_", " ")
        return Row("moe", f"MoE {run['layer.top_k']} x {run['layer.expert_width']}{shared}, {router}{base}")
    if name == "UltraFFF":
        return Row("ultra", f"UltraFFF, {run['layer.num_trees']} trees")
    num_trees = run.get("layer.num_trees") or "1"
    trees = "" if num_trees == "1" else f"{num_trees} x "
    master = f" + master {run['layer.master_width']}" if has("master_width") else ""
    mode = run["layer.mode"].replace("_", "-") + (", runner-up" if has("runner_up") else "")
    falls = ", temperature falls" if run.get("task.schedules.temperature") else ""
    return Row("fff", f"FFF {trees}{run['layer.leaf_width']}{master}, {mode}{base}{falls}")


def _longer(runs: pd.DataFrame) -> pd.Series:
    """ ", 200 epochs" of runs that are longer than others of their recipe."""
    epochs = runs["trainer.max_epochs"].astype(int)
    shortest = epochs.groupby(runs["recipe"]).transform("min")
    return (", " + epochs.astype(str) + " epochs").where(epochs > shortest, "")


def _paper(data: StudyData) -> dict[tuple[str, int], Cell]:
    """By model and training width, in percent."""
    frame = reference(_REFERENCE, data.results_dir)
    return {(row["model"], int(row["width"])): row for row in frame.to_dict("records")}


def _headline(cells: Cells) -> dict[tuple[str, str], Row]:
    """The layer that stands for each model, by recipe and model: the one that was run at most widths, of these the one
    with the best validation accuracy over them. Test rows choose nothing."""
    widths: dict[tuple[str, Row], list[float]] = {}
    for (recipe, row, _), cell in cells.items():
        widths.setdefault((recipe, row), []).append(cell["val_accuracy_mean"])
    chosen: dict[tuple[str, str], Row] = {}
    for recipe, row in sorted(widths, key=lambda key: (len(widths[key]), sum(widths[key]), key)):
        chosen[recipe, row.model] = row
    return chosen


def _table_widths(cells: Cells, paper: dict[tuple[str, int], Cell]) -> list[int]:
    """Training widths of the paper, or of trees and mixtures where it is not at hand."""
    return sorted({width for _, width in paper} or {width for _, row, width in cells if row != _DENSE})


def _beside_paper(data: StudyData, cells: Cells, paper: dict[tuple[str, int], Cell]) -> Table:
    headline, lines = _headline(cells), []
    # The paper's recipe has its columns even before it was run.
    recipes = {r: words for r, words in _RECIPES.items() if r != "cifar_memorise" or any(r == key[0] for key in cells)}
    for width in _table_widths(cells, paper):
        for model, words in _MODELS.items():
            theirs = paper.get((model, width))
            line = {"width": str(width), "model": words}
            for metric in ("MA", "GA"):
                line[f"paper: {metric}"] = shown(theirs, lambda c: number(c[metric]))  # noqa: B023
            for recipe, source in recipes.items():
                cell = cells.get((recipe, headline.get((recipe, model)), width))
                line |= {f"{source}: MA": mean(cell, "ma"), f"{source}: GA": mean(cell)}
            lines.append(line)
    layers = "; ".join(
        f"{_RECIPES[recipe]}: "
        + ", ".join(headline[recipe, model].layer for model in _MODELS if (recipe, model) in headline)
        for recipe in recipes
        if any(key[0] == recipe for key in headline)
    )
    return Table(
        data.name,
        "Table 2: CIFAR-10, dense layers, mixtures and trees",
        pd.DataFrame(lines),
        f"{_NOTE} Width: hidden units that are trained; mixtures and trees evaluate 32. {layers}. Where"
        " several layers were tried, the one with the best validation accuracy is shown; all of them, with epochs and"
        " runs, are below. –: not run.",
        2,
    )


def _beside_dense(data: StudyData, cells: Cells) -> Table:
    """Every routed layer against dense layers trained by the same recipe."""
    dense = {(recipe, width): cell for (recipe, row, width), cell in cells.items() if row == _DENSE}
    lines = []
    for (recipe, row, width), cell in _ordered(cells):
        if row != _DENSE:
            line = {"source": _RECIPES.get(recipe, recipe), "layer": row.layer, "width": str(width), "GA": mean(cell)}
            for which in ("inference_width", "inference_size", "training_width"):
                other = dense.get((recipe, int(cell[which])))
                line[f"Δ dense, {which.replace('_', ' ')}"] = (
                    f"{signed(ahead(cell, other))} ({integer(cell[which])})" if other else MISSING
                )
            lines.append(line)
    return Table(
        f"{data.name}_dense",
        "Trees and mixtures less dense layers by the same recipe, GA",
        pd.DataFrame(lines, columns=None if lines else ["source", "layer"]),
        f"{_NOTE} Δ: mean less that of a dense layer of as many hidden units (in brackets) as the layer evaluates, as"
        " many as it evaluates with its router, and as many as it trains, in points.",
        2,
    )


def _all(data: StudyData, runs: pd.DataFrame, cells: Cells) -> Table:
    lines = [
        {
            "source": _RECIPES.get(recipe, recipe),
            "layer": row.layer,
            "width": str(width),
            "MA": mean(cell, "ma"),
            "GA": mean(cell),
            "GA best": percent(cell["ga_best"]),
            "validation": mean(cell, "val_accuracy"),
            "GA soft": percent(cell["ga_soft_mean"]),
            "ETT of MA / GA": f"{integer(cell['ma_epochs'])} / {integer(cell['ga_epochs'])}",
            "epochs": integer(cell["epochs"]),
            "leaves in use": of(cell["leaves_used"], cell["num_leaves"]),
            "parameters": integer(cell["parameters"]),
            "width used": integer(cell["inference_width"]),
            "size used": integer(cell["inference_size"]),
            "FLOPs / row": integer(cell["flops_per_row"]),
            "runs (diverged, capped)": f"{cell['n']} ({cell['diverged']}, {cell['capped']})",
        }
        for (recipe, row, width), cell in _ordered(cells)
    ]
    return Table(
        f"{data.name}_all",
        "All layers",
        pd.DataFrame(lines),
        f"{_NOTE} ETT: mean epoch that reached the value. Capped: ended by the limit of epochs, not by a standstill,"
        " and not settled beforehand. Leaves in use: leaves or experts that at least one test row reaches. Width and"
        " size used: hidden units, and those with the neurons of the router, that are evaluated for one row. Parameters"
        f" are those that are trained; a base adds none to what is evaluated. {hardware(runs)}",
        2,
    )


def _latency(data: StudyData) -> list[Table]:
    """Measured by `experiments.bench suite=table2`; nothing where that was not run."""
    path = data.results_dir / "bench" / "table2.csv"
    if not path.exists():
        return []
    rows = pd.read_csv(path)
    # The paper's package leaves the bias out, and is a peer of the suite, no row of the table.
    rows = rows[rows["candidate"].isin(_CANDIDATES)]
    rows["width"] = rows["leaf_width"] * 2 ** rows["depth"]
    lines = []
    for width, own in rows.groupby("width"):
        for candidate, words in _CANDIDATES.items():
            found = own[own["candidate"] == candidate].set_index("batch")["median_s"]
            cells = {f"batch {batch}": number(1e6 * seconds / batch, 2) for batch, seconds in found.items()}
            lines.append({"width": str(width), "layer": words} | cells)
    machine = ", ".join(sorted(set(rows["cpu"])))
    note = f"Microseconds per row, hard evaluation, float32, one thread of {machine}: median of repeated calls."
    return [Table(f"{data.name}_latency", "Time of one row", pd.DataFrame(lines).fillna(MISSING), note, 2)]


def _ordered(cells: Cells) -> list[tuple[tuple[str, Row, int], Cell]]:
    recipes, models = [*_RECIPES], [*_MODELS, "ultra"]

    def place(item: tuple[tuple[str, Row, int], Cell]) -> tuple:
        (recipe, row, width), _ = item
        known = recipes.index(recipe) if recipe in recipes else len(recipes)
        return known, recipe, models.index(row.model), row.layer, width

    return sorted(cells.items(), key=place)


def _by_width(cells: Cells, paper: dict[tuple[str, int], Cell]) -> Figure:
    """Training width against GA and MA, a column for each recipe; the paper's values dashed."""
    headline, widths = _headline(cells), _table_widths(cells, paper)
    recipes = [recipe for recipe in _RECIPES if any(key[0] == recipe for key in headline)]
    figure = Figure(figsize=(max(6.4, 4.2 * len(recipes)), 6.2), layout="constrained")
    panels = figure.subplots(2, max(1, len(recipes)), sharex=True, sharey="row", squeeze=False)
    look = {"ff": figures.DENSE, "moe": figures.PALETTE[0], "fff": figures.PALETTE[1]}
    for i, metric in enumerate(("ma", "ga")):
        for j, recipe in enumerate(recipes):
            series = []
            for model, words in _MODELS.items():
                own = {w: c for w in widths if (c := cells.get((recipe, headline.get((recipe, model)), w)))}
                theirs = {w: c for w in widths if (c := paper.get((model, w)))}
                series += [
                    _series(words, own, metric, look[model], figures.MARKERS[[*_MODELS].index(model)]),
                    figures.Series("", [*theirs], [c[metric.upper()] for c in theirs.values()], None, None, look[model],
                                   marker="", linestyle="--"),
                ]  # fmt: skip
            small = cells.get((recipe, _DENSE, 32))
            if small:
                panels[i, j].axhline(
                    100 * small[f"{metric}_mean"],
                    color=figures.DENSE,
                    linestyle=":",
                    linewidth=1.0,
                    label="dense, 32 units",
                )
            labels = "training width" if i else "", f"{metric.upper()} in %" if j == 0 else ""
            figures.accuracy_panel(panels[i, j], series, *labels, sizes=widths)
            panels[0, j].set_title(_RECIPES[recipe])
    figure.suptitle("CIFAR-10")
    figures.legend_below(figure, panels.flat, columns=4, dashed="paper")
    return figure


def _by_size(cells: Cells) -> Figure:
    """Inference size against GA of all layers by our recipe; one line for each layer."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    panel = figure.subplots()
    found: dict[Row, dict[int, Cell]] = {}
    for (recipe, row, _), cell in _ordered(cells):
        if recipe == "cifar":
            found.setdefault(row, {})[int(cell["inference_size"])] = cell
    palette = figures.colors((row.layer, row == _DENSE) for row in found)
    series = [
        _series(
            row.layer, dict(sorted(own.items())), "ga", palette[row.layer], figures.MARKERS[i % len(figures.MARKERS)]
        )
        for i, (row, own) in enumerate(found.items())
    ]
    figures.accuracy_panel(
        panel, series, "inference size (neurons)", "GA in %", sizes={size for own in found.values() for size in own}
    )
    figure.suptitle("CIFAR-10, our recipe")
    figures.legend_below(figure, [panel], columns=2)
    return figure


def _series(label: str, cells: dict[int, Cell], metric: str, color: str, marker: str) -> figures.Series:
    means, deviations = ([100 * cell[f"{metric}_{kind}"] for cell in cells.values()] for kind in ("mean", "std"))
    return figures.Series(label, [*cells], means, deviations, None, color, marker)
