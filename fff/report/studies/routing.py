"""What the leaves of a tree and the experts of a mixture specialise in, and whether two seeds part the rows alike."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score, mutual_info_score, normalized_mutual_info_score

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import RECIPES, recipe_of
from fff.report.partitions import ari_within, chance_nmi, effective_number, entropy, gini, purity
from fff.report.routes import Arrays, unpack
from fff.report.study import Report, StudyData, refusal
from fff.report.tables import MISSING, Table, number, of, percent, spread

_KEY = ["data", "model", "recipe"]
_PARTITION = (
    "A row belongs to the leaf or expert of its hard route, with several choices to the first. All numbers are those of"
    " the test rows with the weights of the best validation accuracy, means over n runs of different seeds (of the"
    " initial weights and of the order of the batches). To a mixture the paper's recipe"
    " is its optimiser alone, SGD, and our first one AdamW; ours is its own, found as that of the trees was."
)


def report(data: StudyData) -> Report:
    """A row of the tables for each data set, model and recipe; ValueError for two configurations of one row."""
    if not data.archive:
        raise ValueError(f"{data.name} has no run that kept its routes (task.keep_routes=true)")
    routes = unpack(f"runs/{data.name}.npz", data.archive)
    named = recipe_of(data.runs)
    runs = data.runs.assign(
        data=data.runs["data.name"],
        model=[_model(run) for run in data.runs.to_dict("records")],
        recipe=named.map(RECIPES).fillna(named),
    )
    left_out = runs["run_id"][~runs["run_id"].isin(routes)]
    runs = runs[runs["run_id"].isin(routes)]
    for place, group in runs.groupby(_KEY):
        if group["cell"].nunique() > 1:
            cells = {f"cell {cell}": run_ids for cell, run_ids in group.groupby("cell")["run_id"]}
            raise refusal(
                data.name, f"{len(cells)} configurations for one row of the table ({', '.join(place)})", cells
            )
    rows = []
    for row in summarize(runs, keep=_KEY).to_dict("records"):
        of_cell = runs[runs["cell"] == row["cell"]]
        parts = [routes[run_id] for run_id in of_cell["run_id"]]
        rows.append(row | _of_runs(parts, int(row["num_leaves"])) | _of_pairs(parts))
    cells = pd.DataFrame(rows).sort_values(_KEY, key=_order, ignore_index=True)
    tables = [_specialisation(data.name, cells, runs, routes), _agreement(data.name, cells)]
    remarks = [f"{data.name}: run {run_id} has kept no routes and is left out" for run_id in left_out]
    return Report(cells, tables, _figures(cells, runs, routes), remarks)


def _model(run: dict[str, Any]) -> str:
    name = run["layer._target_"].rpartition(".")[2]
    return f"{name} {run['layer.router'].removesuffix('_top_k')} top-{run['layer.top_k']}" if name == "MoE" else name


def _order(column: pd.Series) -> pd.Series:
    """Recipes as in all tables, others behind them; the rest by name."""
    known = {words: str(place) for place, words in enumerate(RECIPES.values())}
    return column.map(lambda words: known.get(words, words)) if column.name == "recipe" else column


def _leaf(routes: Arrays) -> np.ndarray:
    """(T,) leaf of each test row."""
    return routes["index"][:, 0]


def _of_runs(runs: list[Arrays], num_leaves: int) -> dict[str, float]:
    """Mean and sample deviation over the runs."""
    found = []
    for run in runs:
        leaf, label = _leaf(run), run["label"]
        load = np.bincount(leaf, minlength=num_leaves)
        found.append(
            {
                "leaves_used": (load > 0).sum(),
                "effective_leaves": effective_number(leaf),
                "gini": gini(load),
                "purity": purity(leaf, label),
                "label_mi": mutual_info_score(leaf, label),
                "label_nmi": normalized_mutual_info_score(leaf, label),
                "label_nmi_chance": chance_nmi(leaf, label),
            }
        )
    frame = pd.DataFrame(found)
    # The mean number of leaves of a record counts every choice of a mixture, this one the first.
    return {**frame.mean(), **frame.std().add_suffix("_std")}


def _of_pairs(runs: list[Arrays]) -> dict[str, float]:
    """Mean, smallest and largest agreement of two runs."""
    found = []
    for one, other in combinations(runs, 2):
        first, second = _leaf(one), _leaf(other)
        found.append(
            {
                "seeds_ari": adjusted_rand_score(first, second),
                "seeds_ari_within": ari_within(first, second, one["label"]),
                "seeds_nmi": normalized_mutual_info_score(first, second),
                "seeds_nmi_chance": chance_nmi(first, second),
            }
        )
    frame = pd.DataFrame(found, columns=["seeds_ari", "seeds_ari_within", "seeds_nmi", "seeds_nmi_chance"])
    return {"pairs": len(frame), **frame.mean(), **frame.min().add_suffix("_min"), **frame.max().add_suffix("_max")}


def _specialisation(name: str, cells: pd.DataFrame, runs: pd.DataFrame, routes: dict[str, Arrays]) -> Table:
    frame = pd.DataFrame(
        {
            **{key: cells[key] for key in _KEY},
            "GA, %": [spread(*values) for values in zip(cells["ga_mean"], cells["ga_std"], strict=True)],
            "leaves in use": [of(*values) for values in zip(cells["leaves_used"], cells["num_leaves"], strict=True)],
            "effective leaves": cells["effective_leaves"].map(number),
            "Gini": cells["gini"].map(_two),
            "purity, %": cells["purity"].map(percent),
            "MI, nats": cells["label_mi"].map(_two),
            "NMI": cells["label_nmi"].map(_two),
            "seeds: ARI": cells["seeds_ari"].map(_two),
            "seeds: NMI": cells["seeds_nmi"].map(_two),
            "n": cells["n"].map(str),
        }
    )
    limits = []
    for data, run_ids in runs.groupby("data")["run_id"]:
        label = routes[run_ids.iloc[0]]["label"]
        commonest = percent(np.bincount(label).max() / len(label))
        limits.append(
            f"{data}: purity of a single leaf {commonest} %, entropy of the labels {_two(entropy(label))} nats"
        )
    note = (
        f"{_PARTITION} Effective leaves: exp(entropy of the rows per leaf). Gini: 0 where all leaves are used alike,"
        " near 1 where one takes all. Purity: share of the rows whose class is the commonest of their leaf. MI and NMI:"
        " mutual information of leaf and class, as such and over the mean of both entropies. Seeds: agreement of the"
        " partitions of two seeds, mean over all pairs; by chance the ARI is 0, the NMI stands in the next table."
        f" {'; '.join(limits)}."
    )
    return Table(name, "What leaves and experts specialise in", frame, note, len(_KEY))


def _agreement(name: str, cells: pd.DataFrame) -> Table:
    def ranged(measure: str) -> list[str]:
        columns = (cells[f"{measure}{end}"] for end in ("", "_min", "_max"))
        return [
            f"{_two(mean)} ({_two(low)} to {_two(high)})" if not np.isnan(mean) else MISSING
            for mean, low, high in zip(*columns, strict=True)
        ]

    deviation = zip(cells["label_nmi"], cells["label_nmi_std"], strict=True)
    frame = pd.DataFrame(
        {
            **{key: cells[key] for key in _KEY},
            "class: NMI": [f"{_two(mean)} ± {_two(std)}" for mean, std in deviation],
            "class: NMI by chance": cells["label_nmi_chance"].map(_three),
            "seeds: ARI": ranged("seeds_ari"),
            "seeds: ARI within a class": ranged("seeds_ari_within"),
            "seeds: NMI": ranged("seeds_nmi"),
            "seeds: NMI by chance": cells["seeds_nmi_chance"].map(_three),
            "pairs": cells["pairs"].map(str),
        }
    )
    note = (
        f"{_PARTITION} By chance: the expected value if the rows of one partition were shuffled and its leaves as full"
        " as they are; that of the adjusted Rand index (ARI) is 0. Seeds: mean (smallest to largest) over all pairs of"
        " runs. Within a class: among the rows of one class, mean over the rows; it tells what two seeds have in common"
        " beyond the class, and is 1 for a class that neither of them parts."
    )
    return Table(f"{name}_agreement", "Agreement with the classes, between seeds and by chance", frame, note, len(_KEY))


def _two(value: float) -> str:
    return number(value, 2)


def _three(value: float) -> str:
    return number(value, 3)


def _figures(cells: pd.DataFrame, runs: pd.DataFrame, routes: dict[str, Arrays]) -> dict[str, Figure]:
    """Of each data set, by one seed that all its cells have; none where there is no such seed."""
    drawn = {}
    for data, group in cells.groupby("data", sort=False):
        of_cell = {cell: runs[runs["cell"] == cell].set_index("seed")["run_id"] for cell in group["cell"]}
        shared = set.intersection(*(set(run_ids.index) for run_ids in of_cell.values()))
        if not shared:
            continue
        seed = min(shared)
        chosen = [routes[run_ids[seed]] for run_ids in of_cell.values()]
        titles = [f"{model}\n{recipe}" for model, recipe in zip(group["model"], group["recipe"], strict=True)]
        num_leaves = int(group["num_leaves"].max())
        first = chosen[0]

        counts = []
        for run in chosen:
            table = np.zeros((int(first["label"].max()) + 1, num_leaves), dtype=int)
            np.add.at(table, (run["label"], _leaf(run)), 1)
            counts.append(table)
        classes = figures.class_counts(list(zip(titles, counts, strict=True)))
        classes.suptitle(f"{data}, seed {seed}: test rows of each class in each leaf")

        cut = [
            figures.Regions(title, run["plane_index"], run["plane_class"])
            for title, run in zip(titles, chosen, strict=True)
        ]
        plane = figures.regions(cut, first["x"], first["y"], np.empty((0, 2)), np.empty(0), num_leaves)
        plane.suptitle(f"{data}, seed {seed}: a cut through the inputs, leaves and borders of the predicted classes")

        rows = figures.scattered(
            [(title, _leaf(run)) for title, run in zip(titles, chosen, strict=True)], first["points"], first["label"]
        )
        rows.suptitle(f"{data}, seed {seed}: test rows projected to the same plane, by class and by leaf")
        for figure in (plane, rows):
            share = [percent(part) for part in first["plane_share"]]
            figure.supxlabel(f"first principal component ({share[0]} % of the variance)", fontsize=9)
            figure.supylabel(f"second ({share[1]} %)", fontsize=9)
        drawn |= {f"{data}_classes": classes, f"{data}_plane": plane, f"{data}_rows": rows}
    return drawn
