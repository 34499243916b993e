"""Load balancing and a master leaf (arXiv 2405.16836) beside the dense layers that their authors leave out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import (
    DATASETS,
    Cell,
    ahead,
    best,
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
    "Width: of all leaves, without the master leaf, a dense layer of 8 units that sees every row. Ours: weights of the"
    " best validation accuracy over both phases, in percent."
)
_KEY = ["data", "leaf_width", "width", "master_width"]
_REFERENCES = ("efff_best_models", "efff_run_logs")
_METHODS = {"load_balance": False, "master_leaf+load_balance": True}
_MASTER_WIDTH = 8


class Place(NamedTuple):
    """leaf_width: 0 for a dense layer, whose units are its width. width: of all leaves, without the master leaf."""

    leaf_width: int
    width: int
    master_width: int

    @property
    def words(self) -> dict[str, str]:
        layer = "tree + master leaf" if self.master_width else "tree"
        return {"layer": layer, "leaf width": str(self.leaf_width), "width": str(self.width)}


class Theirs(NamedTuple):
    """What their files say of one tree, in percent.

    best: hard test accuracy of their best checkpoint or logged run.  hard, soft, leaves: of each complete run in their
    logs: hard test accuracy, accuracy of the soft mixture on the training rows, leaves that test rows reach.
    """

    best: float
    hard: pd.Series
    soft: pd.Series
    leaves: pd.Series


class Part(NamedTuple):
    name: str
    runs: pd.DataFrame
    ours: dict[Place, Cell]
    theirs: dict[Place, Theirs]

    @property
    def title(self) -> str:
        return DATASETS.get(self.name, self.name)

    @property
    def trees(self) -> list[Place]:
        """Ours and theirs; those without a master leaf first."""
        found = {place for place in {*self.ours, *self.theirs} if place.leaf_width}
        return sorted(found, key=lambda place: (place.master_width, place.width, place.leaf_width))

    def dense(self, units: int) -> Cell | None:
        return self.ours.get(Place(0, units, 0))


def report(data: StudyData) -> Report:
    """Tables of each data set that has runs; ValueError if two configurations claim one place."""
    runs = data.runs.assign(
        data=text(data.runs, "data.name"),
        leaf_width=size(data.runs, "layer.leaf_width"),
        master_width=size(data.runs, "layer.master_width"),
    )
    runs["width"] = (runs["metrics.training_width"] - runs["master_width"]).astype(int)
    summary = summarize(runs, keep=_KEY)
    cells = placed(data, runs, summary.to_dict("records"), _KEY)
    tables, drawn = [], {}
    for name in (*DATASETS, *sorted(set(runs["data"]) - set(DATASETS))):
        ours = {Place(*key[1:]): cell for key, cell in cells.items() if key[0] == name}
        if ours:
            part = Part(name, runs[runs["data"] == name], ours, _theirs(name, data))
            tables += _tables(data, part)
            found = {"accuracy": _accuracy(part), "leaves": _leaves(part)}
            drawn |= {f"{name}_{kind}": figure for kind, figure in found.items() if figure is not None}
    return Report(summary, tables, drawn, missing_references(data, _REFERENCES))


def _theirs(dataset: str, data: StudyData) -> dict[Place, Theirs]:
    models, logs = (reference(name, data.results_dir) for name in _REFERENCES)
    if models.empty or logs.empty:
        return {}
    models, logs = (frame[frame["dataset"] == DATASETS.get(dataset)] for frame in (models, logs))
    logs = logs[logs["complete"]]
    balanced = logs["alpha"] == 1
    # One checkpoint bears the name of a balanced tree and is from the log of runs without balance loss.
    unbalanced = logs[~balanced][["leaf_width", "training_width", "best_test_acc_hard"]]
    others = set(unbalanced.itertuples(index=False, name=None))
    best_of: dict[Place, float] = {}
    for row in models.to_dict("records"):
        tree = row["leaf_width"], row["training_width"]
        master = _METHODS[row["method"]]
        if master or (*tree, row["best_test_acc_hard"]) not in others:
            best_of[Place(*tree, _MASTER_WIDTH if master else 0)] = row["best_test_acc_hard"]
    columns = ["best_test_acc_hard", "train_acc_soft", "leaves_used_on_test"]
    runs = {Place(*tree, 0): own for tree, own in logs[balanced].groupby(["leaf_width", "training_width"])[columns]}
    none = logs.iloc[:0][columns]
    return {
        place: Theirs(
            pd.Series([best_of.get(place), *runs.get(place, none)["best_test_acc_hard"]], dtype=float).max(),
            *(runs.get(place, none)[name] for name in columns),
        )
        for place in {*best_of, *runs}
    }


def _logs(values: pd.Series) -> str:
    return f"{number(values.mean())} ± {number(values.std())} ({len(values)})" if len(values) else MISSING


def _tables(data: StudyData, part: Part) -> list[Table]:
    beside, against, routing = [], [], []
    for place in part.trees:
        cell, theirs = part.ours.get(place), part.theirs.get(place)
        beside.append(
            place.words
            | {
                "theirs: best, test-selected": number(theirs.best) if theirs else MISSING,
                "theirs: test, hard": _logs(theirs.hard) if theirs else MISSING,
                "ours: best": best(cell),
                "ours: test, hard": mean(cell),
                "ours: test, soft": mean(cell, "ga_soft"),
                "theirs: train, soft": _logs(theirs.soft) if theirs else MISSING,
                "ours: train, soft": mean(cell, "ma_soft"),
                "ours: train, hard": mean(cell, "ma"),
            }
        )
        line: dict[str, Any] = place.words | {"tree": mean(cell)}
        units = {
            "of one leaf": place.leaf_width,
            "of the master leaf": _MASTER_WIDTH,
            "of both": _MASTER_WIDTH + place.leaf_width,
        }
        for which, neurons in units.items():
            dense = part.dense(neurons)
            line |= {f"dense {which}": mean(dense), f"Δ {which}": signed(ahead(cell, dense))}
        against.append(line)
        routing.append(
            place.words
            | {
                "theirs: leaves in use": _logs(theirs.leaves) if theirs else MISSING,
                "leaves in use": shown(cell, lambda c: of(c["leaves_used"], c["num_leaves"])),
                "largest leaf, % of rows": shown(cell, lambda c: percent(c["largest_leaf_share"])),
                "node entropy, nats": shown(cell, lambda c: number(c["node_entropy"], 3)),
                **_run(cell),
            }
        )
    dense = [
        {"units": str(place.width), "MA": mean(cell, "ma"), "GA": mean(cell), "GA best": best(cell), **_run(cell)}
        for place, cell in sorted(part.ours.items())
        if not place.leaf_width
    ]
    name = f"{data.name}_{part.name}"
    tables = [
        Table(
            name,
            f"{part.title}: load balancing and master leaf, theirs and ours",
            pd.DataFrame(beside),
            f"{_NOTE} Theirs: best of their runs, selected on test rows, from names of checkpoints and from logs with"
            " balance weight 1; then mean ± standard deviation (number) of the complete runs in these logs, whatever"
            " their hardening weight, each at its best epoch on test rows. They train on all training rows and for more"
            " epochs, and count as training accuracy that of the soft mixture. Ours: the best and mean ± standard"
            " deviation of n runs, hard and soft.",
            3,
        ),
        Table(
            f"{name}_dense",
            f"{part.title}: trees beside dense layers, GA",
            pd.DataFrame(against),
            f"{_NOTE} Hard route; mean ± standard deviation over the runs; Δ: mean of the tree less that of the dense"
            " layer, in points. Dense layers are trained alike, with the units of one leaf, of the master leaf, and of"
            " both.",
            3,
        ),
        Table(
            f"{name}_routing",
            f"{part.title}: what the routing does",
            pd.DataFrame(routing),
            f"{_NOTE} Leaves in use: leaves that at least one test row reaches, mean over the runs. ETT: mean epoch"
            " that first reached the value. Diverged: of the runs; the recipe fixes the epochs of the others."
            f" {hardware(part.runs)}",
            3,
        ),
    ]
    if dense:
        tables.append(Table(f"{name}_units", f"{part.title}: the dense layers", pd.DataFrame(dense), _NOTE))
    return tables


def _run(cell: Cell | None) -> dict[str, str]:
    return {
        "ETT of MA / GA": shown(cell, lambda c: f"{integer(c['ma_epochs'])} / {integer(c['ga_epochs'])}"),
        "epochs": shown(cell, lambda c: integer(c["epochs"])),
        "runs (diverged)": shown(cell, lambda c: f"{c['n']} ({c['diverged']})"),
    }


def _accuracy(part: Part) -> Figure | None:
    """Leaf width against GA, a panel for each width: trees, and the dense layers that they are to be better than."""
    widths = sorted({place.width for place in part.ours if place.leaf_width})
    if not widths:
        return None
    figure = Figure(figsize=(max(6.4, 4.2 * len(widths)), 4.0), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for j, (panel, width) in enumerate(zip(panels, widths, strict=True)):
        leaves = sorted({place.leaf_width for place in part.ours if place.width == width and place.leaf_width})
        cells = {
            "tree": [part.ours.get(Place(leaf, width, 0)) for leaf in leaves],
            "tree + master leaf": [part.ours.get(Place(leaf, width, _MASTER_WIDTH)) for leaf in leaves],
            "dense, one leaf": [part.dense(leaf) for leaf in leaves],
            "dense, master leaf": [part.dense(_MASTER_WIDTH)] * len(leaves),
            "dense, both": [part.dense(_MASTER_WIDTH + leaf) for leaf in leaves],
        }
        palette = figures.colors((name, name.startswith("dense")) for name in cells)
        series = []
        for i, (name, line) in enumerate(cells.items()):
            points = [(leaf, cell) for leaf, cell in zip(leaves, line, strict=True) if cell]
            values, deviations = ([100 * cell[f"ga_{kind}"] for _, cell in points] for kind in ("mean", "std"))
            x = [leaf for leaf, _ in points]
            series.append(figures.Series(name, x, values, deviations, None, palette[name], figures.MARKERS[i]))
        for name, master in (("tree", 0), ("tree + master leaf", _MASTER_WIDTH)):
            theirs = {leaf: found.best for leaf in leaves if (found := part.theirs.get(Place(leaf, width, master)))}
            series.append(
                figures.Series("", list(theirs), list(theirs.values()), None, None, palette[name], "", linestyle="--")
            )
        label = "GA in %, mean and standard deviation" if j == 0 else ""
        figures.accuracy_panel(panel, series, "leaf width", label, sizes=leaves)
        panel.set_title(f"width {width}")
    figure.suptitle(part.title)
    figures.legend_below(figure, panels, columns=3, dashed="theirs, best on test rows")
    return figure


def _leaves(part: Part) -> Figure | None:
    trees = part.runs[part.runs["leaf_width"] > 0]
    names = trees["master_width"].map(lambda width: "tree + master leaf" if width else "tree")
    palette = {"tree": figures.PALETTE[0], "tree + master leaf": figures.PALETTE[1]}
    return figures.leaf_usage(list(zip(names, trees["metrics.leaf_load"], strict=True)), palette)
