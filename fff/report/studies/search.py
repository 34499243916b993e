"""Settings of a recipe ranked by validation accuracy; no run of this study looked at test rows."""

from __future__ import annotations

import pandas as pd

from fff.report.cells import distinguishing, summarize
from fff.report.paper import hardware, size, text
from fff.report.records import config_columns
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, number

_SIZES = {"FeedForward": "layer.hidden_features", "FFF": "layer.leaf_width", "MoE": "layer.expert_width"}
_WORDS = {
    "FeedForward": "dense layers of {} units",
    "FFF": "trees of leaf width {}",
    "MoE": "mixtures of expert width {}",
}
# What the configuration of a run means where it does not name these.
_DEFAULTS = {"layer.runner_up": "false", "model.noise": "0.0", "task.optimizer.weight_decay": "0.01"}


def report(data: StudyData) -> Report:
    """A table for each layer and size, best setting first; ValueError for a layer that is none of the three."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    cells = _cells(data)
    cells["layer"] = cells["layer._target_"].str.rpartition(".")[2]
    if unknown := set(cells["layer"]) - set(_SIZES):
        raise ValueError(f"{data.name} holds runs of {', '.join(sorted(unknown))}; it ranks {', '.join(_SIZES)}")
    cells["size"] = 0
    for layer, column in _SIZES.items():
        own = cells["layer"] == layer
        cells.loc[own, "size"] = size(cells[own], column)
    cells = cells.sort_values(["layer", "size", "val_accuracy_mean", "cell"], ascending=[True, False, False, True])
    tables, best = [], []
    for (layer, width), group in cells.groupby(["layer", "size"], sort=False):
        words = _WORDS[layer].format(width)
        frame = _ranked(group)
        tables.append(Table(f"{data.name}_{layer.lower()}_{width}", words[0].upper() + words[1:], frame, _NOTE, 0))
        settings = ", ".join(
            f"{name} {frame[name][0]}" for name in frame.columns[: frame.columns.get_loc("validation")]
        )
        best.append(
            {"layer": words, "settings tried": str(len(frame)), "best": settings, "validation": frame["validation"][0]}
        )
    glance = Table(data.name, "Best settings by validation", pd.DataFrame(best), f"{_NOTE} {hardware(data.runs)}", 3)
    return Report(cells.reset_index(drop=True), [glance, *tables], {})


def _cells(data: StudyData) -> pd.DataFrame:
    """A row for each setting, over the seeds, each of which splits off validation rows of its own. A run that two
    stages of the search share, for which one names a default and the other does not, counts once."""
    last = data.history.sort_values("epoch").groupby("cell")["leaves_used"].last()
    runs = data.runs.assign(leaves_trained=data.runs["cell"].map(last), **{"data.split_seed": "that of the run"})
    for name, value in _DEFAULTS.items():
        runs[name] = text(runs, name).replace("", value)
    runs["cell"] = runs.groupby(config_columns(runs.columns)).ngroup().astype(str)
    runs = runs.drop_duplicates(["cell", "seed"])
    cells = summarize(runs)
    return cells.assign(leaves_trained=cells["cell"].map(runs.groupby("cell")["leaves_trained"].mean()))


_NOTE = (
    "Validation: best accuracy over the epochs on the validation rows, which every seed draws anew, mean ± standard"
    " deviation over the runs, in percent. MA: best training accuracy. Leaves in use: leaves or experts that a training"
    " row reaches after the last epoch. No test row was looked at."
)


def _ranked(cells: pd.DataFrame) -> pd.DataFrame:
    varied = [name for name in distinguishing(cells) if cells[name].nunique() > 1]
    frame = pd.DataFrame(
        {
            **{name.rpartition(".")[2].replace("_", " "): cells[name].replace("", MISSING) for name in varied},
            "validation": [
                _spread(*both) for both in zip(cells["val_accuracy_mean"], cells["val_accuracy_std"], strict=True)
            ],
            "MA": [_spread(*both) for both in zip(cells["ma_mean"], cells["ma_std"], strict=True)],
            "leaves in use": [_used(*both) for both in zip(cells["leaves_trained"], cells["num_leaves"], strict=True)],
            "n": cells["n"].map(str),
        }
    )
    return frame.reset_index(drop=True)


def _used(leaves: float, num: float) -> str:
    return f"{number(leaves)} / {num:.0f}" if num > 1 else MISSING


def _spread(mean: float, deviation: float) -> str:
    """Fractions in percent; two decimals, as what is ranked differs by less than a tenth."""
    return f"{number(100 * mean, 2)} ± {number(100 * deviation, 2)}"
