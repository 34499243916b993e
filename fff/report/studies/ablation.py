"""What each part of our second recipe for trees gains: runs that change one thing of it, beside it with the same seeds.

The base is what `experiment=ablation` runs. An axis is one question; a cell belongs to it if it is the base but for
what a line of the axis says, so that one cell may stand in several tables.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import DATASETS, Cell, hardware, mean, text
from fff.report.records import config_columns, natural
from fff.report.study import Report, StudyData, refusal
from fff.report.tables import MISSING, Table, integer, number, of, percent

Config = dict[str, str]


class Line(NamedTuple):
    """The base with `given` in place of its own values, and `varied` free.  words: what the table says of `given`."""

    given: Config
    varied: tuple[str, ...] = ()
    words: str = ""


class Axis(NamedTuple):
    """shapes: the shape of the tree is the question, so all rows stand beside the first base."""

    name: str
    question: str
    lines: tuple[Line, ...]
    shapes: bool = False


# Recipe as in conf/, with numbers as `_plain` writes them.
_BASE = {
    "layer.mode": "straight_through",
    "layer.runner_up": "true",
    "layer.balance_weight": "0.1",
    "layer.node_balance_weight": "0",
    "layer.bias_update_rate": "0",
    "layer.hardening_weight": "0",
    "layer.region_leak": "0",
    "layer.soft_gate": "sigmoid",
    "layer.temperature": "1",
    "layer.top_k": "1",
    "layer.beam_width": "1",
    "layer.num_trees": "1",
    "task.schedules.balance_weight": "",
    "task.schedules.hardening_weight": "",
    "task.schedules.temperature": "",
    "task.optimizer.lr": "0.01",
    "task.router_lr_factor": "1",
    "model.noise": "0.5",
    "data.batch_size": "256",
}
# What the recipe has otherwise on a data set.
_ON = {"mnist": {"task.optimizer.lr": "0.003"}, "fashion_mnist": {"task.optimizer.lr": "0.003"}}
_SHAPES = {"8": {"layer.leaf_width": "8", "layer.depth": "4"}, "1": {"layer.leaf_width": "1", "layer.depth": "7"}}
# What a configuration means that does not name them; of others "" is a value.
_DEFAULTS = {"layer.runner_up": "false", "layer.beam_width": "1", "task.router_lr_factor": "1"}
_SINGLE = {"layer.runner_up": "false"}
_UNBALANCED = {"layer.balance_weight": "0"}
_SOFT = {**_SINGLE, **_UNBALANCED, "layer.mode": "soft", "layer.hardening_weight": "3"}

AXES = (
    Axis(
        "mode",
        "Which leaves train, and how do they count?",
        (
            Line(_SINGLE, words="no runner-up"),
            Line(_SINGLE | {"layer.top_k": "2"}, words="two leaves, in evaluation too"),
            Line(_SINGLE | {"layer.mode": "gated"}, words="gated"),
            Line(_SOFT, words="soft, hardening 3, no balance"),
        ),
    ),
    Axis(
        "leaf",
        "Greedy or most probable leaf?",
        (Line(_SINGLE, ("layer.beam_width",), "no runner-up"),),
    ),
    Axis(
        "hardening",
        "How hard, and from when on, in soft training?",
        (Line(_SOFT, ("layer.hardening_weight",), "soft"), Line(_SOFT, ("task.schedules.hardening_weight",), "soft")),
    ),
    Axis("gate", "Sigmoids or the additive gate in soft training?", (Line(_SOFT, ("layer.soft_gate",), "soft"),)),
    Axis(
        "balance",
        "How much balance, and by what?",
        (
            Line({}, ("layer.balance_weight",)),
            Line({}, ("task.schedules.balance_weight",)),
            Line(_UNBALANCED, ("layer.node_balance_weight",), "no path balance"),
            Line(_SINGLE | _UNBALANCED, ("layer.bias_update_rate",), "no balance, no runner-up"),
        ),
    ),
    Axis(
        "leak",
        "Does region leak do what the runner-up does?",
        (Line(_SINGLE, ("layer.region_leak",), "no runner-up"),),
    ),
    Axis("noise", "How much noise on the inputs?", (Line({}, ("model.noise",)),)),
    Axis("rate", "Which learning rate?", (Line({}, ("task.optimizer.lr",)),)),
    Axis("router rate", "Which learning rate for the nodes?", (Line({}, ("task.router_lr_factor",)),)),
    Axis(
        "temperature",
        "How soft are the decisions in probabilities?",
        (Line({}, ("layer.temperature",)), Line({}, ("task.schedules.temperature",))),
    ),
    Axis("batch", "How many rows a batch, of which a leaf sees one in 2^depth?", (Line({}, ("data.batch_size",)),)),
    Axis(
        "depth",
        "How deep a tree at training width 128?",
        tuple(
            Line({"layer.leaf_width": str(128 >> d), "layer.depth": str(d)}, (), f"depth {d}, leaf width {128 >> d}")
            for d in range(1, 8)
        ),
        shapes=True,
    ),
    Axis(
        "trees",
        "One tree of wide leaves or several of narrow ones, at 8 units used?",
        tuple(
            Line(
                {"layer.num_trees": str(p), "layer.leaf_width": str(8 // p)},
                ("layer.depth",),
                f"{p} x leaf width {8 // p}",
            )
            for p in (1, 2, 4, 8)
        ),
        shapes=True,
    ),
)

_WORDS = {
    "layer.beam_width": "beam width",
    "layer.hardening_weight": "hardening",
    "layer.balance_weight": "path balance",
    "layer.node_balance_weight": "node balance",
    "layer.bias_update_rate": "bias rate",
    "layer.region_leak": "leak",
    "layer.soft_gate": "gate",
    "layer.temperature": "temperature",
    "layer.depth": "depth",
    "task.schedules.balance_weight": "path balance",
    "task.schedules.hardening_weight": "hardening",
    "task.schedules.temperature": "temperature",
    "task.optimizer.lr": "rate",
    "task.router_lr_factor": "rate of the nodes x",
    "model.noise": "noise",
    "data.batch_size": "batch",
}
_DIFFERENCE = (
    "Δ: mean difference to the base over the seeds that both have, in points of GA, ± its standard error, which tells"
    " how runs of other seeds would vary and nothing of other data. Runs that diverged count with their best weights"
    " before that."
)
_NOTE = (
    f"{_DIFFERENCE} GA, validation and MA: mean ± standard deviation over the runs, in percent, hard route. Leaves in"
    " use: leaves that at least one test row reaches; largest: share of the test rows in the fullest leaf; node entropy"
    " in nats; GA soft: the mixture of all leaves."
)


class Base(NamedTuple):
    """leaf_width: what names it.  config: as `_plain` writes it."""

    leaf_width: str
    cell: Cell
    config: Config


class Row(NamedTuple):
    """One line of a table.  key: its place there."""

    base: Base
    cell: Cell
    setting: str
    key: tuple

    @property
    def is_base(self) -> bool:
        return self.cell is self.base.cell


class Part(NamedTuple):
    """One data set.  rows: of each axis that has runs beside the base.  other: cells that belong to no axis.
    accuracy: GA by seed, of each cell."""

    name: str
    runs: pd.DataFrame
    rows: list[tuple[Axis, list[Row]]]
    other: list[Row]
    accuracy: dict[str, pd.Series]

    @property
    def title(self) -> str:
        return DATASETS.get(self.name, self.name)

    def difference(self, row: Row) -> tuple[float, float]:
        """To the base, over the seeds that both have, and its standard error; fractions, nan where there is none."""
        gains = (self.accuracy[row.cell["cell"]] - self.accuracy[row.base.cell["cell"]]).dropna()
        return gains.mean(), gains.sem()


def report(data: StudyData) -> Report:
    """ValueError for a data set without the base, or with several configurations that could be it."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    names = text(data.runs, "data.name")
    known = [*DATASETS, *sorted(set(names) - set(DATASETS))]
    parts = [_part(data, name, data.runs[names == name]) for name in known if (names == name).any()]
    tables, drawn = [_glance(data, parts)], {}
    for part in parts:
        tables += _tables(data, part)
        drawn |= {f"{part.name}_effect": _figure(part)} if part.rows else {}
    return Report(pd.DataFrame([line for part in parts for line in _records(part)]), tables, drawn)


def _part(data: StudyData, name: str, runs: pd.DataFrame) -> Part:
    frame = summarize(runs)
    cells, configs = frame.to_dict("records"), _plain(frame).to_dict("records")
    bases = [_base(data, name, runs, leaf, list(zip(cells, configs, strict=True))) for leaf in _SHAPES]
    accuracy = {cell: group.set_index("seed")["metrics.ga"] for cell, group in runs.groupby("cell")}
    rows: list[tuple[Axis, list[Row]]] = []
    for axis in AXES:
        found = [
            row
            for base in (bases[:1] if axis.shapes else bases)
            for cell, config in zip(cells, configs, strict=True)
            if (row := _row(axis, base, cell, config))
        ]
        if not all(row.is_base for row in found):
            rows.append((axis, sorted(found, key=lambda row: (list(_SHAPES).index(row.base.leaf_width), row.key))))
    told = {id(row.cell) for _, group in rows for row in group} | {id(base.cell) for base in bases}
    other = []
    for cell, config in zip(cells, configs, strict=True):
        if id(cell) not in told:
            base = next((b for b in bases if b.leaf_width == config["layer.leaf_width"]), bases[0])
            other.append(Row(base, cell, _changes(config, base.config), ()))
    return Part(name, runs, rows, other, accuracy)


def _plain(cells: pd.DataFrame) -> pd.DataFrame:
    """The configurations, with defaults for what they leave out and one way of writing a number."""
    names = sorted({*config_columns(cells.columns), *_BASE, *_SHAPES["8"]})
    return pd.DataFrame(
        {name: text(cells, name).fillna("").replace("", _DEFAULTS.get(name, "")).map(_number) for name in names}
    )


def _number(value: str) -> str:
    kind, size, _ = natural(value)
    return f"{size:g}" if kind == 1 else value


def _base(data: StudyData, name: str, runs: pd.DataFrame, leaf: str, cells: list[tuple[Cell, Config]]) -> Base:
    wanted = _BASE | _ON.get(name, {}) | _SHAPES[leaf]
    found = [(cell, config) for cell, config in cells if all(config[key] == wanted[key] for key in wanted)]
    if not found:
        raise ValueError(
            f"{data.name} has no run of our second recipe on {name} with leaf width {leaf}, beside which all others are"
            f" set: python -m experiments.train experiment={data.name} data={name}"
        )
    if len(found) > 1:
        ids = {f"cell {cell['cell']}": runs["run_id"][runs["cell"] == cell["cell"]] for cell, _ in found}
        raise refusal(
            data.name, f"{len(found)} configurations of our second recipe on {name} with leaf width {leaf}", ids
        )
    return Base(leaf, *found[0])


def _row(axis: Axis, base: Base, cell: Cell, config: Config) -> Row | None:
    """None for a cell that does not belong to the axis; the base always does, ahead of all where no line holds it."""
    for place, (given, varied, words) in enumerate(axis.lines):
        line = base.config | given
        if all(config[name] == value for name, value in line.items() if name not in varied):
            # A schedule that is not there is nothing to tell of.
            phrases = [_phrase(name, config[name]) for name in varied if config[name] != ""]
            setting = ", ".join([words, *phrases] if words else phrases)
            return Row(base, cell, setting, (place, [_order(config[name]) for name in varied]))
    return Row(base, cell, "", (-1, [])) if cell is base.cell else None


def _order(value: str) -> tuple:
    """As `natural`, and schedules by their numbers; nothing is ahead of all."""
    return (2, json.loads(value)) if value.startswith("[") else natural(value)


def _phrase(name: str, value: str) -> str:
    if name.startswith("task.schedules."):
        value = ", ".join(f"{weight:g} at epoch {epoch:g}" for epoch, weight in json.loads(value))
    return f"{_WORDS[name]} {value}"


def _changes(config: Config, base: Config) -> str:
    return ", ".join(f"{name}={value or 'null'}" for name, value in config.items() if value != base[name])


def _marked(row: Row) -> str:
    if not row.is_base:
        return row.setting
    return f"{row.setting} (base)" if row.setting else "base"


def _delta(part: Part, row: Row) -> str:
    gain, error = part.difference(row)
    return MISSING if row.is_base or math.isnan(gain) else f"{100 * gain:+.1f} ± {number(100 * error)}"


def _tables(data: StudyData, part: Part) -> list[Table]:
    tables = [
        Table(
            f"{data.name}_{part.name}_{axis.name.replace(' ', '_')}",
            f"{part.title}, {axis.name}: {axis.question}",
            pd.DataFrame([_line(part, row, axis.shapes) for row in rows]),
            _NOTE,
            1 if axis.shapes else 2,
        )
        for axis, rows in part.rows
    ]
    if part.other:
        frame = pd.DataFrame([_line(part, row, False) for row in part.other])
        note = f"Setting: all that differs from the base. {_NOTE}"
        tables.append(
            Table(
                f"{data.name}_{part.name}_other",
                f"{part.title}, other: runs that answer none of these questions",
                frame,
                note,
                2,
            )
        )
    return tables


def _line(part: Part, row: Row, shapes: bool) -> dict[str, str]:
    cell = row.cell
    line = {} if shapes else {"leaf width": row.base.leaf_width}
    line |= {"setting": _marked(row)}
    if shapes:
        line |= {"width trained": integer(cell["training_width"]), "size used": integer(cell["inference_size"])}
    return line | {
        "GA": mean(cell),
        "Δ": _delta(part, row),
        "validation": mean(cell, "val_accuracy"),
        "MA": mean(cell, "ma"),
        "leaves in use": of(cell["leaves_used"], cell["num_leaves"]),
        "largest %": percent(cell["largest_leaf_share"]),
        "node entropy": number(cell["node_entropy"], 3),
        "GA soft": percent(cell["ga_soft_mean"]),
        "n": str(cell["n"]),
        "diverged": str(cell["diverged"]),
    }


def _glance(data: StudyData, parts: list[Part]) -> Table:
    """Best and worst setting of each axis by validation accuracy, so that no test row chooses."""
    lines = []
    for part in parts:
        for axis, rows in part.rows:
            for leaf in dict.fromkeys(row.base.leaf_width for row in rows):
                # Means over other seeds are not to be ranked beside that of the base.
                full = [
                    row for row in rows if row.cell["n"] == row.base.cell["n"] and row.cell["val_accuracy_mean"] >= 0
                ]
                own = [row for row in full if row.base.leaf_width == leaf]
                ranked = sorted(own, key=lambda row: row.cell["val_accuracy_mean"], reverse=True)
                if len(ranked) > 1:
                    line = {"data": part.title, "axis": axis.name, "leaf width": "any" if axis.shapes else leaf}
                    for which, row in (("best", ranked[0]), ("worst", ranked[-1])):
                        line |= {which: _marked(row), f"Δ {which}": _delta(part, row)}
                    lines.append(line)
    note = (
        "One change of our second recipe at a time. Best and worst: by mean validation accuracy, the base among them;"
        f" {_DIFFERENCE} {hardware(data.runs)}"
    )
    columns = ["data", "axis", "leaf width", "best", "Δ best", "worst", "Δ worst"]
    return Table(data.name, "What each part of our second recipe gains", pd.DataFrame(lines, columns=columns), note, 3)


def _records(part: Part) -> list[dict[str, Any]]:
    """The cells with the axes that they belong to and the difference to their base."""
    found: dict[str, dict[str, Any]] = {}
    for axis, rows in [*part.rows, (None, part.other)]:
        for row in rows:
            gain, error = part.difference(row)
            line = row.cell | {"base_cell": row.base.cell["cell"], "difference": gain, "error": error, "axes": ""}
            line = found.setdefault(row.cell["cell"], line)
            name = axis.name if axis else "other"
            line["axes"] = f"{line['axes']}, {name}" if line["axes"] else name
    return list(found.values())


def _figure(part: Part) -> Figure:
    """Difference of every setting to the base, with its standard error, at each leaf width."""
    points: dict[tuple[str, str], dict[str, Row]] = {}
    for axis, rows in part.rows:
        for row in rows:
            if not row.is_base:
                points.setdefault((axis.name, row.setting), {})[row.base.leaf_width] = row
    figure = Figure(figsize=(8.5, 1.2 + 0.21 * len(points)), layout="constrained")
    axes = figure.subplots()
    for i, leaf in enumerate(_SHAPES):
        own = [(place, by_leaf[leaf]) for place, by_leaf in enumerate(points.values()) if leaf in by_leaf]
        gains = 100 * np.array([part.difference(row) for _, row in own]).reshape(-1, 2)
        axes.errorbar(
            gains[:, 0],
            [place + 0.2 * i for place, _ in own],
            xerr=np.nan_to_num(gains[:, 1]),
            color=figures.PALETTE[i],
            marker=figures.MARKERS[i],
            markersize=4.5,
            linestyle="",
            elinewidth=0.9,
            label=f"leaf width {leaf}",
        )
    axes.axvline(0, color=figures.DENSE, linewidth=0.8)
    axes.set_yticks(range(len(points)), [setting for _, setting in points])
    axes.set_ylim(len(points), -1)
    axes.set(xlabel="GA less that of our second recipe, points ± standard error", title=part.title)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    figures.legend_below(figure, [axes])
    figure.get_layout_engine().set(w_pad=0.3)  # long names are wider in a bitmap than in the layout
    return figure
