"""Table 1 of the FFF paper (arXiv 2308.14711v2) by the paper's recipe and by ours, beside the dense layers that the
paper leaves out: those of a tree's inference size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import (
    DATASETS,
    RECIPES,
    SUPERSEDED,
    Cell,
    ahead,
    hardware,
    mean,
    missing_references,
    placed,
    recipe_of,
    reference,
    shown,
    signed,
    size,
    text,
)
from fff.report.records import config_columns
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, number, of, percent, spread

_RECIPE_NOTE = (
    "Paper's recipe: SGD, soft training with hardening loss; our first recipe: AdamW at a constant rate,"
    " straight-through training with leaf balance; our second recipe: AdamW at a rate that falls to 0, noise on the"
    " inputs, straight-through training with leaf balance and runner-up leaves; our recipe: the same at a temperature"
    " that falls. Accuracies of the hard route, in percent."
)
_MODELS = {"FeedForward": "ff", "FFF": "fff"}
_KEY = ["data", "recipe", "model", "leaf_width", "width"]
_WIDTHS, _LEAVES = (16, 32, 64, 128), (8, 4, 2, 1)
# Of each table of the paper: its columns and ours.
_REFERENCES = {
    "table1_explorative": {"memorization_accuracy": "paper_ma", "generalization_accuracy": "paper_ga"},
    "table4_means": {f"{m.upper()}_{kind}": f"paper_{m}_{kind}" for m in ("ma", "ga") for kind in ("mean", "std")},
}


class Row(NamedTuple):
    """leaf_width: 0 for the dense layer."""

    model: str
    leaf_width: int

    @property
    def words(self) -> dict[str, str]:
        return {"model": self.model.upper(), "leaf width": str(self.leaf_width) if self.leaf_width else MISSING}

    @property
    def label(self) -> str:
        return f"FFF, leaf width {self.leaf_width}" if self.leaf_width else "dense"


_DENSE = Row("ff", 0)
Cells = dict[tuple, Cell]


class Part(NamedTuple):
    """One data set: ours by (recipe, model, leaf width, training width), the paper's by the last three of these.

    recipes: those that were run, by name."""

    name: str
    runs: pd.DataFrame
    recipes: dict[str, str]
    ours: Cells
    paper: Cells

    @property
    def title(self) -> str:
        return DATASETS.get(self.name, self.name)

    @property
    def drawn(self) -> dict[str, str]:
        """The recipes that figures of accuracy show: none whose successor was run."""
        return {recipe: title for recipe, title in self.recipes.items() if SUPERSEDED.get(recipe) not in self.recipes}

    def trees(self, recipe: str) -> dict[tuple[int, int], Cell]:
        """By leaf width, wide ones first, and training width."""
        found = {key[2:]: cell for key, cell in self.ours.items() if key[:2] == (recipe, "fff")}
        return dict(sorted(found.items(), key=lambda item: (-item[0][0], item[0][1])))

    def dense(self, recipe: str, width: float) -> Cell | None:
        return self.ours.get((recipe, *_DENSE, int(width)))

    @property
    def rows(self) -> list[Row]:
        widths = {leaf_width for recipe in self.recipes for leaf_width, _ in self.trees(recipe)}
        return [_DENSE, *(Row("fff", leaf_width) for leaf_width in sorted({*_LEAVES, *widths}, reverse=True))]

    @property
    def widths(self) -> list[int]:
        """Training widths: the paper's and those of other trees, not those of dense layers as small as a leaf."""
        return sorted({*_WIDTHS, *(width for recipe in self.recipes for _, width in self.trees(recipe))})


def report(data: StudyData) -> Report:
    """Tables and figures of each data set that has runs; rows are models and leaf widths, columns training widths.

    ValueError if the study holds two configurations for one place, because their runs must not be mixed.
    """
    runs = data.runs.assign(
        data=text(data.runs, "data.name"),
        recipe=recipe_of(data.runs),
        model=text(data.runs, "layer._target_").str.rpartition(".")[2].map(_MODELS),
        leaf_width=size(data.runs, "layer.leaf_width"),
        width=data.runs["metrics.training_width"],
    )
    known = (runs["recipe"] != "") & runs["model"].notna()
    remarks = missing_references(data, _REFERENCES)
    if not known.all():
        remarks.append(f"{data.name}: {(~known).sum()} runs of no known recipe or layer are in no table")
    runs = runs[known].astype({"width": int})
    if runs.empty:
        raise ValueError(f"{data.name} has no run of a dense layer or a tree by a known recipe")
    summary = summarize(runs, keep=_KEY)
    recipes = _recipes_of(runs, summary)
    every = [row | {"recipe": name} for row in summary.to_dict("records") for name in recipes[row["cell"]]]
    ours = placed(data, runs, every, _KEY)
    order = [name for name in (*RECIPES, *sorted(set(runs["recipe"]) - set(RECIPES)))]
    parts = []
    for name in (*DATASETS, *sorted(set(runs["data"]) - set(DATASETS))):
        own = {key[1:]: cell for key, cell in ours.items() if key[0] == name}
        if own:
            names = {recipe: RECIPES.get(recipe, recipe) for recipe in order if any(key[0] == recipe for key in own)}
            parts.append(Part(name, runs[runs["data"] == name], names, own, _paper_cells(name, data.results_dir)))

    tables, drawn = [_glance(data, parts)], {}
    for part in parts:
        tables += _tables(data, part)
        found = {"paper": _beside(part), "size": _by_size(part), "leaves": _leaves(part)}
        drawn |= {f"{part.name}_{kind}": figure for kind, figure in found.items() if figure is not None}
    if (figure := _figure5(data, parts)) is not None:
        drawn["figure5"] = figure
    return Report(_beside_paper(every, parts), tables, drawn, remarks)


def _recipes_of(runs: pd.DataFrame, summary: pd.DataFrame) -> dict[str, list[str]]:
    """The recipes that each cell belongs to, by cell: those that its runs name; a dense layer also to a recipe that has
    none of its size, if it was trained as the trees of that recipe, which may differ from another in the layer alone.
    """
    named = {cell: sorted(set(group)) for cell, group in runs.groupby("cell")["recipe"]}
    columns = [
        name
        for name in config_columns(summary.columns)
        if name.split(".")[0] in ("data", "task", "trainer") and not name.startswith("task.schedules.")
    ]
    training = dict(zip(summary["cell"], summary[columns].itertuples(index=False, name=None), strict=True))
    rows = summary[["cell", "data", "model", "width"]].itertuples(index=False, name=None)
    dense = {cell: (data, width) for cell, data, model, width in rows if model == "ff"}
    own = {(recipe, *place) for cell, place in dense.items() for recipe in named[cell]}
    lent = {
        cell: {
            recipe
            for tree in training
            if tree not in dense and training[tree] == training[cell]
            for recipe in named[tree]
            if (recipe, *place) not in own
        }
        for cell, place in dense.items()
    }
    return {cell: [*names, *sorted(lent.get(cell, ()))] for cell, names in named.items()}


def _paper_cells(dataset: str, results_dir: Path) -> Cells:
    """(model, leaf width, width) -> paper_ma, paper_ga of Table 1 and paper_{ma,ga}_{mean,std} of Table 4."""
    cells: Cells = {}
    for table, names in _REFERENCES.items():
        frame = reference(table, results_dir)
        for row in frame[frame["dataset"] == DATASETS.get(dataset)].to_dict("records") if len(frame) else []:
            leaf = row["leaf_width"]
            key = row["model"], 0 if pd.isna(leaf) else int(leaf), int(row["training_width"])
            cells.setdefault(key, {}).update({ours: row[theirs] for theirs, ours in names.items()})
    return cells


def _beside_paper(cells: list[Cell], parts: list[Part]) -> pd.DataFrame:
    """The cells with the paper's values, in percent, in columns of their own."""
    paper = {part.name: part.paper for part in parts}
    return pd.DataFrame([c | paper[c["data"]].get((c["model"], c["leaf_width"], c["width"]), {}) for c in cells])


def _glance(data: StudyData, parts: list[Part]) -> Table:
    """Trees against dense layers in one line for each data set and recipe."""
    lines = []
    for part in parts:
        for recipe, source in part.recipes.items():
            trees = part.trees(recipe)
            against = {
                "inference size": [ahead(c, part.dense(recipe, c["inference_size"])) for c in trees.values()],
                "training width": [ahead(c, part.dense(recipe, c["width"])) for c in trees.values()],
            }
            line = {"data": part.title, "source": source, "tree cells": str(len(trees))}
            for which, values in against.items():
                gains = [value for value in values if not math.isnan(value)]
                line[f"above dense of {which}"] = f"{sum(v > 0 for v in gains)} / {len(gains)}" if gains else MISSING
                line[f"points, {which}"] = signed(sum(gains) / len(gains)) if gains else MISSING
            published = {key: part.paper.get(("fff", *key), {}).get("paper_ga", math.nan) for key in trees}
            gains = {key: c["ga_mean"] - published[key] / 100 for key, c in trees.items() if published[key] > 0}
            line["above the paper"] = f"{sum(v > 0 for v in gains.values())} / {len(gains)}" if gains else MISSING
            line["least gain"] = signed(min(gains.values(), default=math.nan))
            line["least, leaf width 1"] = signed(
                min((v for (leaf, _), v in gains.items() if leaf == 1), default=math.nan)
            )
            used = [cell["leaves_used"] / cell["num_leaves"] for cell in trees.values()]
            line["leaves in use, %"] = percent(sum(used) / len(used)) if used else MISSING
            line["least"] = percent(min(used, default=math.nan))
            lines.append(line)
    note = (
        f"{_RECIPE_NOTE} A tree cell is a leaf width and a training width. Above: cells whose mean GA is above that of"
        " the dense layer of the same recipe with as many neurons as the tree evaluates (inference size: depth + leaf"
        " width), or has in its leaves (training width), of those where both were run; points: mean difference of the"
        " means. Above the paper: cells whose mean GA is above the best of ten runs in the paper's Table 1; least gain:"
        " of any of these cells, and of any of leaf width 1, in points. Leaves in use: share of the leaves that"
        " a test row reaches, mean over the cells, and least of any."
    )
    return Table(data.name, "Trees against dense layers, generalisation accuracy", pd.DataFrame(lines), note, 2)


def _tables(data: StudyData, part: Part) -> list[Table]:
    rows, trees = part.rows, part.rows[1:]
    name = f"{data.name}_{part.name}"
    return [
        Table(
            name,
            f"{part.title}: best of n runs, MA / GA",
            _by_source(
                part,
                lambda c: f"{percent(c['ma_best'])} / {percent(c['ga_best'])}",
                lambda c: " / ".join(number(c.get(f"paper_{m}")) for m in ("ma", "ga")),
            ),
            f"{_RECIPE_NOTE} Columns: training width. MA and GA are each the best over the runs of a cell; paper: Table"
            " 1, best of 10 (width 512: its text). Number of runs and how many diverged: table of the runs; a run that"
            " diverged counts, with its best weights before that, if there are any.",
            3,
        ),
        Table(
            f"{name}_means",
            f"{part.title}: mean ± standard deviation over the runs, MA / GA",
            _by_source(
                part,
                lambda c: f"{spread(c['ma_mean'], c['ma_std'])} / {spread(c['ga_mean'], c['ga_std'])}",
                lambda c: " / ".join(
                    f"{number(c.get(f'paper_{m}_mean'))} ± {number(c.get(f'paper_{m}_std'))}" for m in ("ma", "ga")
                ),
            ),
            f"{_RECIPE_NOTE} Columns: training width. Paper: Table 4. Its centre values are those of Table 1 (best of"
            " 10) and cannot all be means; its standard deviations are what can be compared. Runs that diverged are"
            " included.",
            3,
        ),
        Table(
            f"{name}_inference",
            f"{part.title}: each tree beside dense layers, GA",
            _beside_dense(part),
            f"{_RECIPE_NOTE} Mean ± standard deviation over the runs; Δ: mean of the tree less that of the dense layer,"
            " in points, so that + says that the tree is better. Dense layers of the same recipe: with the inference"
            " size of the tree (depth + leaf width), with the width of one leaf, with the training width of the tree.",
            4,
        ),
        Table(
            f"{name}_small",
            f"{part.title}: dense layers as small as what a tree evaluates",
            _small(part),
            f"{_RECIPE_NOTE} ETT: mean epoch that first reached the value.",
            2,
        ),
        Table(
            f"{name}_routing",
            f"{part.title}: what the routing does",
            _by_quantity(
                part,
                trees,
                {
                    "leaves in use": lambda c: of(c["leaves_used"], c["num_leaves"]),
                    "largest leaf, % of rows": lambda c: percent(c["largest_leaf_share"]),
                    "GA hard / soft": lambda c: f"{percent(c['ga_mean'])} / {percent(c['ga_soft_mean'])}",
                    "node entropy, nats": lambda c: number(c["node_entropy"], 3),
                },
            ),
            f"{_RECIPE_NOTE} Columns: training width. Means over the runs, on test rows. Leaves in use: leaves that at"
            " least one test row reaches. Soft GA: the mixture of all leaves, with the weights of the hard GA. Node"
            " entropy: mean over all nodes and rows, whether a row comes by a node or not; the paper calls rounding"
            f" harmless below {figures.HARD_ENTROPY:.2f}.",
            4,
        ),
        Table(
            f"{name}_runs",
            f"{part.title}: runs and epochs",
            _by_quantity(
                part,
                rows,
                {
                    "runs (diverged, capped)": _counts,
                    "epochs": lambda c: integer(c["epochs"]),
                    "ETT of MA / GA": lambda c: f"{integer(c['ma_epochs'])} / {integer(c['ga_epochs'])}",
                },
            ),
            "Columns: training width. ETT: mean epoch in which the value was first reached. Capped: runs that the limit"
            " of epochs ended, not a standstill of both accuracies; more epochs might have given more."
            f" {hardware(part.runs)}",
            4,
        ),
    ]


def _counts(cell: Cell) -> str:
    return f"{cell['n']} ({cell['diverged']}, {cell['capped']})"


def _by_source(part: Part, our_text: Callable[[Cell], str], paper_text: Callable[[Cell], str]) -> pd.DataFrame:
    """Lines for each row: the paper's values, then those of each recipe."""
    lines = []
    for row in part.rows:
        lines.append(
            row.words
            | {"source": "paper"}
            | {str(width): shown(part.paper.get((*row, width)), paper_text) for width in part.widths}
        )
        lines += [
            row.words
            | {"source": source}
            | {str(width): shown(part.ours.get((recipe, *row, width)), our_text) for width in part.widths}
            for recipe, source in part.recipes.items()
        ]
    return pd.DataFrame(lines)


def _by_quantity(part: Part, rows: Iterable[Row], quantities: dict[str, Callable[[Cell], str]]) -> pd.DataFrame:
    """A line for each quantity, row and recipe."""
    return pd.DataFrame(
        [
            {"quantity": quantity}
            | row.words
            | {"source": source}
            | {str(width): shown(part.ours.get((recipe, *row, width)), words) for width in part.widths}
            for quantity, words in quantities.items()
            for row in rows
            for recipe, source in part.recipes.items()
        ]
    )


def _beside_dense(part: Part) -> pd.DataFrame:
    lines = []
    for recipe, source in part.recipes.items():
        for (leaf_width, width), tree in part.trees(recipe).items():
            line = {"source": source, "leaf width": str(leaf_width), "width": str(width)}
            line |= {"inference size": integer(tree["inference_size"]), "tree": mean(tree)}
            sizes = {"inference size": tree["inference_size"], "leaf width": leaf_width, "training width": width}
            for which, neurons in sizes.items():
                dense = part.dense(recipe, neurons)
                line |= {f"dense, {which}": mean(dense), f"Δ {which}": signed(ahead(tree, dense))}
            lines.append(line)
    columns = ["source", "leaf width", "width", "inference size", "tree"]
    return pd.DataFrame(lines, columns=None if lines else columns)


def _small(part: Part) -> pd.DataFrame:
    """The dense layers that are no column of the other tables."""
    sizes = sorted(
        {int(c["inference_size"]) for recipe in part.recipes for c in part.trees(recipe).values()}
        | {leaf_width for recipe in part.recipes for leaf_width, _ in part.trees(recipe)}
        | {key[-1] for key in part.ours if key[1:3] == _DENSE} - set(part.widths)
    )
    return pd.DataFrame(
        [
            {
                "width": str(neurons),
                "source": source,
                "MA best": shown(cell, lambda c: percent(c["ma_best"])),
                "MA mean": mean(cell, "ma"),
                "GA best": shown(cell, lambda c: percent(c["ga_best"])),
                "GA mean": mean(cell),
                "ETT of MA / GA": shown(cell, lambda c: f"{integer(c['ma_epochs'])} / {integer(c['ga_epochs'])}"),
                "epochs": shown(cell, lambda c: integer(c["epochs"])),
                "runs (diverged, capped)": shown(cell, _counts),
            }
            for neurons in sizes
            for recipe, source in part.recipes.items()
            for cell in [part.dense(recipe, neurons)]
        ],
        columns=None if sizes else ["width", "source"],
    )


def _look(part: Part) -> dict[Row, dict[str, str]]:
    """Colour and marker of each row."""
    return {
        row: {
            "color": figures.DENSE if row == _DENSE else figures.PALETTE[(i - 1) % len(figures.PALETTE)],
            "marker": figures.MARKERS[i % len(figures.MARKERS)],
        }
        for i, row in enumerate(part.rows)
    }


def _percents(cells: Iterable[Cell], metric: str) -> list[list[float]]:
    """Mean, deviation and best of each cell, in percent."""
    return [[100 * cell[f"{metric}_{kind}"] for cell in cells] for kind in ("mean", "std", "best")]


def _beside(part: Part) -> Figure:
    """Training width against accuracy: a column of panels for each recipe, the paper's values dashed."""
    look = _look(part)
    figure = Figure(figsize=(max(6.4, 4.0 * len(part.drawn)), 6.2), layout="constrained")
    panels = figure.subplots(2, len(part.drawn), sharex=True, sharey="row", squeeze=False)
    for i, (metric, name) in enumerate((("ma", "MA"), ("ga", "GA"))):
        for j, (recipe, title) in enumerate(part.drawn.items()):
            series = []
            for row in part.rows:
                mine = {w: cell for w in part.widths if (cell := part.ours.get((recipe, *row, w)))}
                theirs = {w: cell for w in part.widths if (cell := part.paper.get((*row, w)))}
                series += [
                    figures.Series(row.label, list(mine), *_percents(mine.values(), metric), **look[row]),
                    figures.Series(
                        "", list(theirs), [c[f"paper_{metric}"] for c in theirs.values()], None, None,
                        look[row]["color"], marker="", linestyle="--",
                    ),
                ]  # fmt: skip
            labels = "training width" if i else "", f"{name} in %" if j == 0 else ""
            figures.accuracy_panel(panels[i, j], series, *labels, sizes=part.widths)
            panels[0, j].set_title(title)
    figure.suptitle(part.title)
    figures.legend_below(figure, panels.flat, columns=3, best=True, dashed="paper, best of 10")
    return figure


def _by_size(part: Part) -> Figure:
    """Inference size against GA: a panel for each recipe, trees of each leaf width, dense layers no smaller."""
    look = _look(part)
    figure = Figure(figsize=(max(6.4, 5.4 * len(part.drawn)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(part.drawn), sharey=True, squeeze=False)[0]
    # Dense layers smaller than any tree would leave the trees a tenth of the height.
    sizes_of_trees = (cell["inference_size"] for recipe in part.drawn for cell in part.trees(recipe).values())
    least = min(sizes_of_trees, default=0)
    for j, (panel, (recipe, title)) in enumerate(zip(panels, part.drawn.items(), strict=True)):
        series, sizes = [], set()
        for row in part.rows:
            cells = [cell for key, cell in part.ours.items() if key[:3] == (recipe, *row)]
            cells = [cell for cell in cells if cell["inference_size"] >= least]
            cells = sorted(cells, key=lambda cell: cell["inference_size"])
            x = [cell["inference_size"] for cell in cells]
            sizes |= set(x)
            means, deviations, _ = _percents(cells, "ga")
            series.append(figures.Series(row.label, x, means, deviations, None, **look[row]))
        label = "GA in %, mean and standard deviation" if j == 0 else ""
        figures.accuracy_panel(panel, series, "inference size (neurons)", label, sizes=sizes)
        panel.set_title(title)
    figure.suptitle(part.title)
    figures.legend_below(figure, panels, columns=3)
    return figure


def _leaves(part: Part) -> Figure | None:
    trees = part.runs[part.runs["model"] == "fff"]
    palette = {source: figures.PALETTE[i % len(figures.PALETTE)] for i, source in enumerate(part.recipes.values())}
    names = trees["recipe"].map(part.recipes)
    return figures.leaf_usage(list(zip(names, trees["metrics.leaf_load"], strict=True)), palette)


def _figure5(data: StudyData, parts: list[Part]) -> Figure | None:
    """Figure 5 of the paper: how the nodes harden, by its recipe."""
    cells = [
        {
            "cell": cell["cell"],
            "family": f"{part.title}, leaf width {leaf_width}",
            "depth": math.log2(cell["num_leaves"]),
        }
        for part in parts
        for (leaf_width, _), cell in part.trees("paper").items()
    ]
    return figures.entropy(data.history, pd.DataFrame(cells)) if cells else None
