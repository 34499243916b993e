"""A small language model by its feedforward layers: bits per character, cost, and where characters go."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import Cell, each, hardware, layer_name, placed
from fff.report.routes import Arrays, unpack
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, integer, number, of, percent

_MEASURES = (
    *("test_loss", "bits_per_character", "perplexity", "test_loss_soft", "val_loss", "val_epochs"),
    *("test_accuracy", "tokens_per_second", "active_parameters"),
)
# Layers in the order of the table.
_KINDS = ("FeedForward", "NoFeedForward", "MoE", "FFF", "UltraFFF")


def report(data: StudyData) -> Report:
    """ValueError if the study holds two configurations of one layer: their runs must not be mixed."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    runs = data.runs.assign(
        model=[layer_name(row) for row in data.runs.to_dict("records")],
        kind=[row.rpartition(".")[2] for row in data.runs["layer._target_"]],
    )
    cells = summarize(runs, keep=["model", "kind"])
    for name in _MEASURES:
        values = runs.groupby("cell")[f"metrics.{name}"]
        cells[f"{name}_mean"], cells[f"{name}_std"] = cells["cell"].map(values.mean()), cells["cell"].map(values.std())
    order = cells["kind"].map(lambda kind: _KINDS.index(kind) if kind in _KINDS else len(_KINDS))
    cells = cells.assign(order=order, narrow=-cells["training_width"])
    cells = cells.sort_values(["order", "narrow", "model"], kind="stable", ignore_index=True)
    cells = cells.drop(columns=["order", "narrow"])
    found = {model: cell for (model,), cell in placed(data, runs, cells.to_dict("records"), ["model"]).items()}
    routes = unpack(f"runs/{data.name}.npz", data.archive) if data.archive else {}
    kept = {model: of_runs for model, cell in found.items() if (of_runs := _routes(runs, cell, routes))}
    note = (
        f"Of the hard route on the last tenth of the text, in windows of {each(runs, 'data.context')} characters one"
        " behind the other, with the weights of the best validation loss; mean ± standard deviation over the seeds."
    )
    tables = [
        Table(
            data.name,
            "Characters of Shakespeare: a language model by its feedforward layers",
            pd.DataFrame([_line(model, cell) for model, cell in found.items()]),
            f"{note} Loss in nats per character. Active: parameters outside of the feedforward layers, and weights of"
            " theirs that one token meets (biases left out). Tokens/s: in training (CPU threads:"
            f" {each(runs, 'hardware.threads')}), median of the epochs; rough, as runs may share a machine. Leaves in"
            f" use: leaves (experts) that at least one test character reaches, over all blocks. {hardware(runs)}",
        ),
        Table(
            f"{data.name}_runs",
            "Characters of Shakespeare: soft mixture, routes, sizes",
            pd.DataFrame([_detail(model, cell) for model, cell in found.items()]),
            f"{note} Loss soft: of the soft mixture by the same weights. Largest: share of the test characters in the"
            " fullest leaf of any block. Width: hidden units over all blocks.",
        ),
    ]
    drawn = {"curves": _curves(data.history, found)}
    if kept:
        tables.append(_routing(data.name, kept))
        drawn["routing"] = _classes(kept)
    missing = [model for model, cell in found.items() if _is_routed(cell) and model not in kept]
    remarks = [f"{data.name}: no run of {model} has kept its routes (task.keep_routes=true)" for model in missing]
    return Report(cells, tables, drawn, remarks)


def _is_routed(cell: Cell) -> bool:
    return cell["kind"] not in ("FeedForward", "NoFeedForward")


def _spread(cell: Cell, name: str, decimals: int = 3) -> str:
    mean, std = cell[f"{name}_mean"], cell[f"{name}_std"]
    return MISSING if np.isnan(mean) else f"{number(mean, decimals)} ± {number(std, decimals)}"


def _line(model: str, cell: Cell) -> dict[str, str]:
    return {
        "feedforward layer": model,
        "test loss": _spread(cell, "test_loss"),
        "bits per character": _spread(cell, "bits_per_character"),
        "perplexity": number(cell["perplexity_mean"], 2),
        "parameters": integer(cell["parameters"]),
        "active": integer(cell["active_parameters_mean"]),
        "tokens/s": integer(cell["tokens_per_second_mean"]),
        "leaves in use": of(cell["leaves_used"], cell["num_leaves"]) if _is_routed(cell) else MISSING,
        "runs": str(cell["n"]),
    }


def _detail(model: str, cell: Cell) -> dict[str, str]:
    return {
        "feedforward layer": model,
        "validation loss": _spread(cell, "val_loss"),
        "best epoch": integer(cell["val_epochs_mean"]),
        "epochs": integer(cell["epochs"]),
        "loss soft": number(cell["test_loss_soft_mean"], 3),
        "next character, %": percent(cell["test_accuracy_mean"]),
        "largest, %": percent(cell["largest_leaf_share"]) if _is_routed(cell) else MISSING,
        "node entropy, nats": number(cell["node_entropy"], 3),
        "width trained / used": f"{integer(cell['training_width'])} / {integer(cell['inference_width'])}",
        "diverged": str(cell["diverged"]),
    }


def _routes(runs: pd.DataFrame, cell: Cell, routes: dict[str, Arrays]) -> list[Arrays]:
    """Of the runs of the cell that kept theirs, by seed."""
    own = runs[runs["cell"] == cell["cell"]].sort_values("seed")
    return [routes[run_id] for run_id in own["run_id"] if run_id in routes]


def _routing(study: str, kept: dict[str, list[Arrays]]) -> Table:
    lines = []
    for model, arrays in kept.items():
        for place, layer in enumerate(arrays[0]["layer"]):
            chance = [_chance(run["count"][place]) for run in arrays]
            repeated, shared, shared_chance = (
                percent(float(np.mean([run[name][place] for run in arrays])))
                for name in ("repeated", "shared", "shared_chance")
            )
            told = [_told(run["count"][place]) for run in arrays]
            lines.append(
                {
                    "feedforward layer": model,
                    "block": str(layer),
                    "first choice again, %": repeated,
                    "by chance": percent(float(np.mean(chance))),
                    "first or second, %": shared,
                    "those by chance": shared_chance,
                    "class told, %": percent(float(np.mean(told))),
                }
            )
    return Table(
        f"{study}_routing",
        "Characters of Shakespeare: do neighbours and classes go together?",
        pd.DataFrame(lines),
        "On the test text, of several trees in the first; means over the runs. First choice again: share of the pairs"
        " of consecutive characters whose first choice is one leaf (expert); by chance: were they drawn independently"
        " by the loads. First or second: share of the pairs that have one of their first two choices in common; those"
        " by chance: were the two of a character drawn regardless of its neighbour. Class told: share of the entropy of"
        " the class of a character (upper or lower vowel or consonant, space, newline, digit, punctuation) that its"
        " first choice tells, 0 by chance.",
        2,
    )


def _chance(count: np.ndarray) -> float:
    share = count.sum(0) / max(count.sum(), 1)
    return float(np.square(share).sum())


def _told(count: np.ndarray) -> float:
    """Mutual information of class (C,) and leaf (E,) over the entropy of the class; nan where all are of one class."""
    joint = count / max(count.sum(), 1)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    known = joint > 0
    information = (joint[known] * np.log(joint[known] / apart[known])).sum()
    classes = joint.sum(1)
    entropy = -(classes[classes > 0] * np.log(classes[classes > 0])).sum()
    return float(information / entropy) if entropy > 0 else float("nan")


def _curves(history: pd.DataFrame, found: dict[str, Cell]) -> Figure:
    """Training and validation loss per epoch, means over the runs."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    palette = figures.colors((model, not _is_routed(cell)) for model, cell in found.items())
    for panel, name, title in zip(panels, ("train_loss", "val_loss"), ("training", "validation"), strict=True):
        for i, (model, cell) in enumerate(found.items()):
            own = history[history["cell"] == cell["cell"]]
            if name in own and len(own):
                # Seven colours, and more layers than that.
                style = "-" if i < len(figures.PALETTE) else "--"
                panel.plot(own["epoch"], own[name], color=palette[model], linestyle=style, linewidth=1.2, label=model)
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("loss, nats per character")
    figures.legend_below(figure, panels, columns=3)
    return figure


def _classes(kept: dict[str, list[Arrays]]) -> Figure:
    """By how much a leaf of each block has more of a class than of all characters, in the first seed of each model."""
    excess = {model: [_excess(count) for count in arrays[0]["count"]] for model, arrays in kept.items()}
    columns = max(len(blocks) for blocks in excess.values())
    figure = Figure(figsize=(2.6 * columns + 1.6, 1.9 * len(kept)), layout="constrained")
    panels = figure.subplots(len(kept), columns, squeeze=False)
    limit = max(float(np.abs(points).max()) for blocks in excess.values() for points in blocks) or 1.0
    for row, (model, blocks) in zip(panels, excess.items(), strict=True):
        arrays = kept[model][0]
        for panel, points in zip(row, blocks, strict=False):
            image = panel.imshow(points, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_yticks(range(len(points)), list(arrays["classes"]) if panel is row[0] else [])
            panel.tick_params(labelsize=6, length=2)
        row[0].set_title(model, fontsize=7, loc="left")
        for panel in row[len(blocks) :]:
            panel.set_axis_off()
    for panel, layer in zip(panels[-1], arrays["layer"], strict=False):
        panel.set_xlabel(f"block {layer}, leaf or expert", fontsize=7)
    figure.colorbar(image, ax=panels, label="above its load, points", aspect=60)
    return figure


def _excess(count: np.ndarray) -> np.ndarray:
    """In points, (C, E); 0 for a class that is not in the text."""
    of_class, every = count.sum(1, keepdims=True), count.sum(0) / count.sum()
    return np.where(of_class > 0, 100 * (count / np.maximum(of_class, 1) - every), 0.0)
