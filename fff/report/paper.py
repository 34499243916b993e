"""Our runs beside the tables of the FFF paper (arXiv 2308.14711v2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import label, summarize
from fff.report.study import Report, StudyData, generic_figures, refusal
from fff.report.tables import MISSING, Table, integer, number, of, percent, spread

RECIPES = {"paper": "paper's recipe", "ours": "our recipe"}
_RECIPE_NOTE = (
    "Paper's recipe: SGD, soft training with hardening loss; our recipe: AdamW, straight-through training with leaf"
    " balance. Columns: training width. Accuracies of the hard route, in percent."
)
_KEY = ["recipe", "model", "leaf_width", "width"]
_MODELS = {"FeedForward": "ff", "FFF": "fff"}
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


Cells = dict[tuple, dict[str, Any]]


def reference(name: str, results_dir: Path) -> pd.DataFrame:
    """A table in `<results_dir>/reference`, else in that of the checkout; empty where neither is."""
    for folder in (results_dir, Path(__file__).resolve().parents[2] / "results"):
        path = folder / "reference" / f"{name}.csv"
        if path.exists():
            return pd.read_csv(path)
    return pd.DataFrame()


def table1(data: StudyData, dataset: str) -> Report:
    """Rows are models and leaf widths, columns training widths; each cell by the paper and by both recipes.

    ValueError if the study holds two configurations for one cell, because their runs must not be mixed.
    """
    runs = data.runs.assign(
        recipe=recipe_of(data.runs),
        model=_text(data.runs, "layer._target_").str.rpartition(".")[2].map(_MODELS),
        leaf_width=pd.to_numeric(_text(data.runs, "layer.leaf_width"), errors="coerce").fillna(0).astype(int),
        width=data.runs["metrics.training_width"],
    ).dropna(subset=["recipe", "model", "width"])
    if runs.empty:
        raise ValueError(f"{data.name} has no run of a dense layer or a tree with SGD or Adam")
    runs["width"] = runs["width"].astype(int)
    summary = summarize(runs, keep=_KEY)
    mixed = summary[summary.duplicated(_KEY, keep=False)]
    if len(mixed):
        first = mixed.iloc[0]
        both = mixed["cell"][(mixed[_KEY] == first[_KEY]).all(axis=1)]
        place = ", ".join(f"{key}={first[key]}" for key in _KEY)
        raise refusal(
            data.name,
            f"{len(both)} configurations for one place of the table ({place})",
            {f"cell {cell}": runs["run_id"][runs["cell"] == cell] for cell in both},
        )
    summary = _beside_paper(summary, dataset, data.results_dir)
    ours: Cells = {tuple(row[key] for key in _KEY): row for row in summary.to_dict("records")}
    paper = _paper_cells(dataset, data.results_dir)
    widths = sorted({16, 32, 64, 128} | set(summary["width"]))
    trees = [Row("fff", leaf) for leaf in sorted({1, 2, 4, 8} | set(summary["leaf_width"]) - {0}, reverse=True)]
    rows = [Row("ff", 0), *trees]

    tables = [
        Table(
            data.name,
            f"{dataset}: best of n runs, MA / GA",
            _by_source(
                ours,
                paper,
                rows,
                widths,
                lambda c: f"{percent(c['ma_best'])} / {percent(c['ga_best'])}",
                lambda c: f"{number(c['paper_ma'])} / {number(c['paper_ga'])}",
            ),
            f"{_RECIPE_NOTE} MA and GA are each the best over the runs of a cell; paper: Table 1, best of 10. Number of"
            " runs and how many diverged: last table; a run that diverged counts, with its best weights before that, if"
            " there are any.",
            3,
        ),
        Table(
            f"{data.name}_means",
            f"{dataset}: mean ± standard deviation over the runs, MA / GA",
            _by_source(
                ours,
                paper,
                rows,
                widths,
                lambda c: f"{spread(c['ma_mean'], c['ma_std'])} / {spread(c['ga_mean'], c['ga_std'])}",
                lambda c: " / ".join(
                    f"{number(c[f'paper_{m}_mean'])} ± {number(c[f'paper_{m}_std'])}" for m in ("ma", "ga")
                ),
            ),
            f"{_RECIPE_NOTE} Paper: Table 4. Its centre values are those of Table 1 (best of 10) and cannot all be"
            " means; its standard deviations are what can be compared. Runs that diverged are included.",
            3,
        ),
        Table(
            f"{data.name}_routing",
            f"{dataset}: what the routing does",
            _by_quantity(
                ours,
                trees,
                widths,
                {
                    "leaves in use": lambda c: of(c["leaves_used"], c["num_leaves"]),
                    "largest leaf, % of rows": lambda c: percent(c["largest_leaf_share"]),
                    "GA hard / soft": lambda c: f"{percent(c['ga_mean'])} / {percent(c['ga_soft_mean'])}",
                    "node entropy, nats": lambda c: number(c["node_entropy"], 3),
                },
            ),
            f"{_RECIPE_NOTE} Means over the runs, on test rows. Leaves in use: leaves that at least one test row"
            " reaches. Soft GA: the mixture of all leaves, with the weights of the hard GA. Node entropy: mean over all"
            " nodes and rows, whether a row comes by a node or not.",
            4,
        ),
        Table(
            f"{data.name}_runs",
            f"{dataset}: runs and epochs",
            _by_quantity(
                ours,
                rows,
                widths,
                {
                    "runs (diverged, capped)": lambda c: f"{c['n']} ({c['diverged']}, {c['capped']})",
                    "ETT of MA / GA": lambda c: f"{integer(c['ma_epochs'])} / {integer(c['ga_epochs'])}",
                },
            ),
            "ETT: mean epoch in which the value was first reached. Capped: runs that the limit of epochs ended, not a"
            " standstill of both accuracies; more epochs might have given more.",
            4,
        ),
    ]
    cells = label(summary)
    cells["family"] = cells["layer"] + ", " + cells["recipe"].map(RECIPES)
    drawn = generic_figures(data._replace(runs=runs), cells)
    remarks = [
        f"{data.name}: no reference/{name}.csv in {data.results_dir}/ (the checkout has it in results/), so the paper's"
        " cells stay empty"
        for name in _REFERENCES
        if reference(name, data.results_dir).empty
    ]
    return Report(summary, tables, {"paper": _beside(ours, paper, rows, widths), **drawn}, remarks)


def _text(runs: pd.DataFrame, name: str) -> pd.Series:
    return runs[name] if name in runs else pd.Series("", runs.index)


def recipe_of(runs: pd.DataFrame) -> pd.Series:
    """What the optimiser tells: "paper" for SGD, "ours" for a variant of Adam, None for others."""
    optimizer = _text(runs, "task.optimizer._target_").str.lower()
    recipe = pd.Series(None, runs.index, dtype=object)
    recipe[optimizer.str.contains("adam")] = "ours"
    recipe[optimizer.str.contains("sgd")] = "paper"
    return recipe


def _paper_cells(dataset: str, results_dir: Path) -> Cells:
    """(model, leaf width, width) -> paper_ma, paper_ga of Table 1 and paper_{ma,ga}_{mean,std} of Table 4."""
    cells: Cells = {}
    for table, names in _REFERENCES.items():
        frame = reference(table, results_dir)
        for row in frame[frame["dataset"] == dataset].to_dict("records") if len(frame) else []:
            leaf = row["leaf_width"]
            key = row["model"], 0 if pd.isna(leaf) else int(leaf), int(row["training_width"])
            cells.setdefault(key, {}).update({ours: row[theirs] for theirs, ours in names.items()})
    return cells


def _beside_paper(summary: pd.DataFrame, dataset: str, results_dir: Path) -> pd.DataFrame:
    """`summary` with the paper's values, in percent, in columns of their own."""
    paper = _paper_cells(dataset, results_dir)
    values = [paper.get(key, {}) for key in summary[_KEY[1:]].itertuples(index=False, name=None)]
    return pd.concat([summary, pd.DataFrame(values, index=summary.index)], axis=1)


def _by_source(
    ours: Cells,
    paper: Cells,
    rows: Iterable[Row],
    widths: Iterable[int],
    our_text: Callable[[dict], str],
    paper_text: Callable[[dict], str],
) -> pd.DataFrame:
    """Three lines for each row: the paper's values, then those of each recipe."""
    lines = []
    for row in rows:
        sources: dict[str, Callable[[int], str]] = {
            "paper": lambda width, row=row: _or_missing(paper.get((*row, width)), paper_text),
            **{
                text: lambda width, row=row, recipe=recipe: _or_missing(ours.get((recipe, *row, width)), our_text)
                for recipe, text in RECIPES.items()
            },
        }
        lines += [
            row.words | {"source": source} | {str(width): text(width) for width in widths}
            for source, text in sources.items()
        ]
    return pd.DataFrame(lines)


def _by_quantity(
    ours: Cells, rows: Iterable[Row], widths: Iterable[int], quantities: dict[str, Callable[[dict], str]]
) -> pd.DataFrame:
    """Two lines for each quantity and row, one for each recipe."""
    return pd.DataFrame(
        [
            {"quantity": quantity}
            | row.words
            | {"source": source}
            | {str(width): _or_missing(ours.get((recipe, *row, width)), text) for width in widths}
            for quantity, text in quantities.items()
            for row in rows
            for recipe, source in RECIPES.items()
        ]
    )


def _or_missing(cell: dict | None, text: Callable[[dict], str]) -> str:
    return MISSING if cell is None else text(cell)


def _beside(ours: Cells, paper: Cells, rows: list[Row], widths: list[int]) -> Figure:
    """Training width against accuracy: a column of panels for each recipe, the paper's values dashed."""
    trees = [row for row in rows if row.model == "fff"]
    palette = {row: figures.PALETTE[i % len(figures.PALETTE)] for i, row in enumerate(trees)} | {rows[0]: figures.DENSE}
    figure = Figure(figsize=(8.0, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for i, (metric, name) in enumerate((("ma", "MA"), ("ga", "GA"))):
        for j, (recipe, title) in enumerate(RECIPES.items()):
            series = []
            for k, row in enumerate(rows):
                text = f"FFF, leaf width {row.leaf_width}" if row in trees else "dense"
                mine = [(width, cell) for width in widths if (cell := ours.get((recipe, *row, width)))]
                theirs = [(width, cell) for width in widths if (cell := paper.get((*row, width)))]
                look = {"color": palette[row], "marker": figures.MARKERS[k % len(figures.MARKERS)]}
                mean, std, best = (
                    [100 * cell[f"{metric}_{kind}"] for _, cell in mine] for kind in ("mean", "std", "best")
                )
                series += [
                    figures.Series(text, [width for width, _ in mine], mean, std, best, **look),
                    figures.Series(
                        "", [w for w, _ in theirs], [c[f"paper_{metric}"] for _, c in theirs], None, None,
                        look["color"], marker="", linestyle="--",
                    ),
                ]  # fmt: skip
            labels = "training width" if i else "", f"{name} in %" if j == 0 else ""
            figures.accuracy_panel(panels[i, j], series, *labels, sizes=widths)
            panels[0, j].set_title(title)
    figures.legend_below(figure, panels.flat, columns=4, best=True, dashed="paper, best of 10")
    return figure
