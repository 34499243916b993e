"""Table 3 of the FFF paper (arXiv 2308.14711v2): the feedforward layers of a vision transformer, by the paper's recipe
and by ours, beside what the paper leaves out: dense layers as small as what a tree evaluates, mixtures, and none."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import (
    DATASETS,
    Cell,
    ahead,
    hardware,
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

_NOTE = (
    "Accuracies of the hard route, in percent; mean ± standard deviation over the runs. Sizes are those of the"
    " feedforward layer of one block, in neurons."
)
_REFERENCE = "table3_vit"
_RECIPES = {"paper_vit_5": "paper's recipe, h = 5", "paper_vit_10": "paper's recipe, h = 10", "vit": "our recipe"}
# Recipes that differ in trees alone: the other layers of the first are those of the second.
_TRAINED_AS = {"paper_vit_10": "paper_vit_5"}
_LAYERS = {"FeedForward": "dense", "FFF": "tree", "MoE": "mixture", "NoFeedForward": "none"}
_TREES = ("tree", "tree, base")
_UNITS = ("layer.leaf_width", "layer.expert_width")
_KEY = ["data", "recipe", "layer", "units", "width"]


class Place(NamedTuple):
    """layer: "dense", one of `_TREES`, "mixture (router)" or "none".  units: of one leaf or expert, 0 for other layers.
    width: training width of one block."""

    layer: str
    units: int
    width: int

    @property
    def words(self) -> dict[str, str]:
        return {"layer": self.layer, "leaf width": str(self.units or MISSING), "width": str(self.width or MISSING)}


_NONE = Place("none", 0, 0)


class Part(NamedTuple):
    """One data set: ours by recipe and place, the paper's row by place. recipes: those that were run, by name."""

    name: str
    runs: pd.DataFrame
    recipes: dict[str, str]
    ours: dict[tuple[str, Place], Cell]
    paper: dict[Place, Cell]

    def cell(self, recipe: str, place: Place) -> Cell | None:
        found = self.ours.get((recipe, place))
        if found is None and place.layer not in _TREES:
            return self.ours.get((_TRAINED_AS.get(recipe, ""), place))
        return found

    def dense(self, recipe: str, width: float) -> Cell | None:
        return self.cell(recipe, Place("dense", 0, int(width)))

    def source(self, recipe: str, place: Place) -> str:
        """Layers that have no hardening share a recipe of the paper's."""
        shared = place.layer not in _TREES and recipe in _TRAINED_AS.values()
        return "paper's recipe" if shared else self.recipes[recipe]

    @property
    def places(self) -> list[Place]:
        """Ours and the paper's: trees after the dense layers as wide, then what is narrower, mixtures and none."""
        found = {*self.paper, *(place for _, place in self.ours)}
        trained = {place.width for place in found if place.layer in _TREES}
        order = {"dense": 0, **dict.fromkeys(_TREES, 0), "none": 3}
        return sorted(
            found,
            key=lambda p: (
                1 if p.layer == "dense" and p.width not in trained else order.get(p.layer, 2),
                -p.width,
                p.layer,
                -p.units,
            ),
        )

    @property
    def trees(self) -> list[tuple[str, Place, Cell]]:
        """Recipe, place and cell of each tree that was run, in the order of the table."""
        every = ((recipe, place) for place in self.places if place.layer in _TREES for recipe in self.recipes)
        return [(recipe, place, cell) for recipe, place in every if (cell := self.cell(recipe, place))]


def report(data: StudyData) -> Report:
    """Tables of each data set that has runs; ValueError if two configurations claim one place."""
    runs = data.runs.assign(
        data=text(data.runs, "data.name"),
        recipe=text(data.runs, "recipe"),
        layer=text(data.runs, "layer._target_").str.rpartition(".")[2].map(_LAYERS),
        units=sum(size(data.runs, name) for name in _UNITS),
        blocks=size(data.runs, "model.depth"),
    )
    known = (runs["recipe"] != "") & runs["layer"].notna() & (runs["blocks"] > 0)
    remarks = missing_references(data, [_REFERENCE])
    if not known.all():
        remarks.append(f"{data.name}: {(~known).sum()} runs of no known recipe, layer or model are in no table")
    runs = runs[known]
    if runs.empty:
        raise ValueError(f"{data.name} has no run of a transformer by a known recipe")
    runs["width"] = (runs["metrics.training_width"] / runs["blocks"]).astype(int)
    mixture = runs["layer"] == "mixture"
    based = (runs["layer"] == "tree") & (text(runs, "layer.base") == "true")
    runs["layer"] = runs["layer"].mask(based, "tree, base")
    runs["layer"] = runs["layer"].mask(mixture, "mixture (" + text(runs, "layer.router") + ")")
    runs["recipe"] = runs["recipe"].where(runs["layer"].isin(_TREES), runs["recipe"].replace(_TRAINED_AS))
    summary = summarize(runs, keep=[*_KEY, "blocks"])
    cells = placed(data, runs, summary.to_dict("records"), _KEY)
    order = (*_RECIPES, *sorted(set(runs["recipe"]) - set(_RECIPES)))
    tables, drawn = [], {}
    for name in (*DATASETS, *sorted(set(runs["data"]) - set(DATASETS))):
        ours = {(key[1], Place(*key[2:])): cell for key, cell in cells.items() if key[0] == name}
        if ours:
            recipes = {r: _RECIPES.get(r, r) for r in order if any(recipe == r for recipe, _ in ours)}
            # A record without it has the default, which is the paper's.
            comparable = name == "cifar10" and text(runs, "model.patch_size").isin(["", "4"]).all()
            paper = _paper(data) if comparable else {}
            part = Part(name, runs[runs["data"] == name], recipes, ours, paper)
            tables += _tables(data, part)
            found = {"size": _by_size(part), "figure6": _figure6(data, part), "leaves": _leaves(part)}
            drawn |= {f"{name}_{kind}": figure for kind, figure in found.items() if figure is not None}
    return Report(summary, tables, drawn, remarks)


def _paper(data: StudyData) -> dict[Place, Cell]:
    return {
        Place("dense" if row["model"] == "ff" else "tree", _whole(row["leaf_width"]), int(row["training_width"])): row
        for row in reference(_REFERENCE, data.results_dir).to_dict("records")
    }


def _whole(value: float) -> int:
    return 0 if pd.isna(value) else int(value)


def _size(cell: Cell, name: str) -> float:
    """Of one block: a cell of ours has the sum over all of them, a row of the paper is of one."""
    return cell[name] / cell.get("blocks", 1)


def _tables(data: StudyData, part: Part) -> list[Table]:
    title, label = DATASETS.get(part.name, part.name), f"{data.name}_{part.name}"
    beside, every = [], []
    for place in part.places:
        cells = {recipe: part.cell(recipe, place) for recipe in part.recipes}
        theirs = part.paper.get(place)
        sized = next((cell for cell in (*cells.values(), theirs) if cell is not None), None)
        line = place.words
        for which in ("training_size", "inference_width", "inference_size"):
            line[which.replace("_", " ")] = shown(sized, lambda c, which=which: integer(_size(c, which)))
        line["paper"] = shown(theirs, lambda c: number(c["generalization_accuracy"]))
        beside.append(line | {source: mean(cells[recipe]) for recipe, source in part.recipes.items()})
        for recipe in part.recipes:
            if (cell := part.ours.get((recipe, place))) is not None:
                every.append(place.words | {"source": part.source(recipe, place)} | _run(cell))
    return [
        Table(
            label,
            f"{title}: a vision transformer by its feedforward layers, GA",
            pd.DataFrame(beside),
            f"{_NOTE} Paper: Table 3, patches of 4 pixels; h: hardening weight. Leaf width of a mixture: that of an"
            " expert. Base: leaves deviate from one that they share. None: attention alone.",
        ),
        Table(
            f"{label}_dense",
            f"{title}: trees beside dense layers and none, GA",
            _beside_dense(part),
            f"{_NOTE} Δ: mean of the tree less that of the other, in points. Dense layers of the same recipe: as wide"
            " as all leaves, as large as what a tree evaluates (depth + leaf width), as wide as one leaf.",
            4,
        ),
        Table(
            f"{label}_routing",
            f"{title}: what the routing does",
            _routing(part),
            f"{_NOTE} On test rows, means over the runs. Leaves in use: leaves that at least one token reaches, over"
            " all blocks; largest: of any block. Node entropy: mean over nodes and tokens of all blocks; the paper"
            f" calls rounding harmless below {figures.HARD_ENTROPY:.2f}.",
            4,
        ),
        Table(
            f"{label}_runs",
            f"{title}: runs and epochs",
            pd.DataFrame(every),
            f"{_NOTE} ETT: mean epoch that first reached the value. Capped: ended by the limit of epochs, not by a"
            f" standstill of both accuracies, and not settled beforehand. {hardware(part.runs)}",
            4,
        ),
    ]


def _run(cell: Cell) -> dict[str, str]:
    return {
        "MA": mean(cell, "ma"),
        "GA": mean(cell),
        "GA best": percent(cell["ga_best"]),
        "ETT of MA / GA": f"{integer(cell['ma_epochs'])} / {integer(cell['ga_epochs'])}",
        "epochs": integer(cell["epochs"]),
        "runs (diverged, capped)": f"{cell['n']} ({cell['diverged']}, {cell['capped']})",
        "minutes a run": number(cell["wall_time_s"] / 60),
    }


def _beside_dense(part: Part) -> pd.DataFrame:
    lines = []
    for recipe, place, tree in part.trees:
        others = {
            "dense, training width": part.dense(recipe, place.width),
            "dense, inference size": part.dense(recipe, _size(tree, "inference_size")),
            "dense, one leaf": part.dense(recipe, place.units),
            "none": part.cell(recipe, _NONE),
        }
        line = place.words | {"source": part.recipes[recipe], "GA": mean(tree)}
        for which, other in others.items():
            line |= {which: mean(other), f"Δ {which}": signed(ahead(tree, other))}
        lines.append(line)
    return pd.DataFrame(lines, columns=None if lines else [*_NONE.words, "source"])


def _routing(part: Part) -> pd.DataFrame:
    lines = [
        place.words
        | {
            "source": part.source(recipe, place),
            "leaves in use": of(cell["leaves_used"], cell["num_leaves"]),
            "largest leaf, % of tokens": percent(cell["largest_leaf_share"]),
            "GA hard / soft": f"{percent(cell['ga_mean'])} / {percent(cell['ga_soft_mean'])}",
            "node entropy, nats": number(cell["node_entropy"], 3),
            "training": _training(cell),
        }
        for place in part.places
        if place.units
        for recipe in part.recipes
        if (cell := part.ours.get((recipe, place))) is not None
    ]
    return pd.DataFrame(lines, columns=None if lines else [*_NONE.words, "source"])


def _training(cell: Cell) -> str:
    mode = str(cell.get("layer.mode") or MISSING).replace("_", "-")
    return f"{mode}, runner-up" if cell.get("layer.runner_up") == "true" else mode


def _by_size(part: Part) -> Figure:
    """Inference size against GA: the layers of each recipe, the paper's trees dashed, no layer as a line."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    panel = figure.subplots()
    lines: dict[str, list[Cell]] = {}
    # Trees before mixtures, so that they keep their colours when mixtures are run.
    order = list(part.recipes)
    keys = sorted(part.ours, key=lambda key: (key[1].layer not in _TREES, key[1].layer, order.index(key[0])))
    for recipe, place in keys:
        if place != _NONE:
            name = f"{place.layer}, {part.source(recipe, place)}"
            lines.setdefault(name, []).append(part.ours[recipe, place])
    palette = figures.colors((name, name.startswith("dense")) for name in lines)
    series, sizes = [], set()
    for i, (name, cells) in enumerate(lines.items()):
        cells = sorted(cells, key=lambda cell: (cell["inference_size"], cell["inference_width"]))
        x = [_size(cell, "inference_size") for cell in cells]
        sizes |= set(x)
        means, deviations = ([100 * cell[f"ga_{kind}"] for cell in cells] for kind in ("mean", "std"))
        marker = figures.MARKERS[i % len(figures.MARKERS)]
        series.append(figures.Series(name, x, means, deviations, None, palette[name], marker))
    theirs = sorted((row["inference_size"], row["generalization_accuracy"]) for row in part.paper.values())
    x, values = ([pair[i] for pair in theirs] for i in (0, 1))
    series.append(figures.Series("", x, values, None, None, "#666666", "", linestyle="--"))
    figures.accuracy_panel(panel, series, "inference size of a block (neurons)", "GA in %", sizes=sizes | set(x))
    for recipe in part.recipes:
        if (cell := part.ours.get((recipe, _NONE))) is not None:
            label = f"no feedforward layer, {part.source(recipe, _NONE)}"
            panel.axhline(100 * cell["ga_mean"], color="#999999", linestyle=":", linewidth=1.2, label=label)
    panel.set_title(DATASETS.get(part.name, part.name))
    figures.legend_below(figure, [panel], columns=2, dashed="paper" if theirs else "")
    return figure


def _figure6(data: StudyData, part: Part) -> Figure | None:
    """Figure 6 of the paper: how the nodes of each block harden."""
    histories, cells = [], []
    for recipe, place, cell in part.trees:
        own = data.history[data.history["cell"] == cell["cell"]]
        for layer in range(1, cell["blocks"] + 1):
            if (column := f"node_entropy_{layer}") in own:
                name = f"{cell['cell']}, layer {layer}"
                histories.append(own.assign(cell=name, node_entropy=own[column]))
                family = f"{place.layer}, {part.recipes[recipe]},\nleaf width {place.units}"
                cells.append({"cell": name, "family": family, "layer": layer})
    return figures.entropy(pd.concat(histories), pd.DataFrame(cells), shade="layer") if cells else None


def _leaves(part: Part) -> Figure | None:
    """Each block of each run by itself."""
    trees = part.runs[part.runs["layer"].isin(_TREES)]
    palette = {
        source: figures.PALETTE[i % len(figures.PALETTE)]
        for i, (recipe, source) in enumerate(part.recipes.items())
        if (trees["recipe"] == recipe).any()
    }
    loads = []
    for recipe, load, blocks in trees[["recipe", "metrics.leaf_load", "blocks"]].itertuples(index=False, name=None):
        leaves = len(load) // blocks
        loads += [(part.recipes[recipe], load[i * leaves : (i + 1) * leaves]) for i in range(blocks)]
    return figures.leaf_usage(loads, palette)
