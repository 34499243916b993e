"""Figure 2 of the FFF paper (arXiv 2308.14711v2): trees of 4 and of 64 leaves beside dense layers of their inference
size, by the paper's recipe and by ours. The paper's figure is a picture and gives no values."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import DATASETS, Cell, ahead, hardware, mean, placed, signed, size, text
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, of

_RECIPES = {"paper_no_hardening": "paper's recipe", "cifar": "our recipe"}
_NOTE = (
    "Accuracies of the hard route, in percent, mean ± standard deviation over n runs; GA on the test rows with the"
    " weights of the best validation accuracy. Inference size: neurons that are evaluated for one row, nodes included."
)


class Line(NamedTuple):
    """One line of the figure: trees of one depth, or dense layers (depth -1)."""

    data: str
    recipe: str
    depth: int

    @property
    def label(self) -> str:
        return "dense" if self.depth < 0 else f"FFF, {2**self.depth} leaves"


def report(data: StudyData) -> Report:
    """ValueError if the study holds two configurations for one place, because their runs must not be mixed."""
    tree = text(data.runs, "layer.leaf_width") != ""
    runs = data.runs.assign(
        data=text(data.runs, "data.name"),
        recipe=text(data.runs, "recipe"),
        depth=size(data.runs, "layer.depth").where(tree, -1),
        inference_size=data.runs["metrics.inference_size"].astype(int),
        leaf_width=size(data.runs, "layer.leaf_width"),
    )
    key = ["data", "recipe", "depth", "leaf_width", "inference_size"]
    summary = summarize(runs, keep=key[:4])
    lines: dict[Line, dict[int, Cell]] = {}
    for (name, recipe, depth, _, neurons), cell in placed(data, runs, summary.to_dict("records"), key).items():
        lines.setdefault(Line(name, recipe, depth), {})[int(neurons)] = cell
    names = [*DATASETS, *sorted(set(runs["data"]) - set(DATASETS))]
    lines = {line: dict(sorted(lines[line].items())) for line in sorted(lines, key=lambda line: _place(line, names))}
    table = Table(
        data.name,
        "Figure 2: trees beside dense layers of the same inference size",
        pd.DataFrame(
            [_row(line, neurons, cell, lines) for line, own in lines.items() for neurons, cell in own.items()]
        ),
        f"{_NOTE} Δ: mean less that of the dense layer, in points. Runs: of them diverged, and ended by the limit of"
        f" epochs. {hardware(runs)}",
        3,
    )
    drawn = {
        str(name): _figure(str(name), {line: own for line, own in lines.items() if line.data == name})
        for name in dict.fromkeys(line.data for line in lines)
    }
    return Report(summary, [table], drawn)


def _place(line: Line, names: list[str]) -> tuple:
    known = [*_RECIPES].index(line.recipe) if line.recipe in _RECIPES else len(_RECIPES)
    return names.index(line.data), known, line.recipe, line.depth


def _row(line: Line, neurons: int, cell: Cell, lines: dict[Line, dict[int, Cell]]) -> dict[str, str]:
    dense = lines.get(line._replace(depth=-1), {}).get(neurons)
    return {
        "data": DATASETS.get(line.data, line.data),
        "source": _RECIPES.get(line.recipe, line.recipe),
        "layer": line.label,
        "inference size": str(neurons),
        "width trained": integer(cell["training_width"]),
        "MA": mean(cell, "ma"),
        "GA": mean(cell),
        "Δ dense": MISSING if line.depth < 0 else signed(ahead(cell, dense)),
        "leaves in use": of(cell["leaves_used"], cell["num_leaves"]),
        "epochs": integer(cell["epochs"]),
        "runs (diverged, capped)": f"{cell['n']} ({cell['diverged']}, {cell['capped']})",
    }


def _figure(name: str, lines: dict[Line, dict[int, Cell]]) -> Figure:
    recipes = list(dict.fromkeys(line.recipe for line in lines))
    figure = Figure(figsize=(max(6.4, 5.0 * len(recipes)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(recipes), sharey=True, squeeze=False)[0]
    palette = figures.colors((line.label, line.depth < 0) for line in lines)
    markers = {label: figures.MARKERS[i % len(figures.MARKERS)] for i, label in enumerate(palette)}
    for j, (panel, recipe) in enumerate(zip(panels, recipes, strict=True)):
        series, sizes = [], set()
        for line, cells in lines.items():
            if line.recipe == recipe:
                means, deviations = ([100 * c[f"ga_{kind}"] for c in cells.values()] for kind in ("mean", "std"))
                look = palette[line.label], markers[line.label]
                series.append(figures.Series(line.label, [*cells], means, deviations, None, *look))
                sizes |= set(cells)
        label = "GA in %" if j == 0 else ""
        figures.accuracy_panel(panel, series, "inference size (neurons)", label, sizes=sizes)
        panel.set_title(_RECIPES.get(recipe, recipe))
    figure.suptitle(DATASETS.get(name, name))
    figures.legend_below(figure, panels, columns=3)
    return figure
