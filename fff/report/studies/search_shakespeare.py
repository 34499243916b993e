"""The search for the language model's recipe: which settings serve each layer best, by the validation text alone."""

from __future__ import annotations

import pandas as pd

from fff.report.cells import summarize
from fff.report.paper import Cell, each, hardware, layer_name, placed, text
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, number, of

# What is searched, in the order of the tables. Two configurations that differ in something else are refused.
_SETTINGS = {
    "task.optimizer.lr": "learning rate",
    "task.optimizer.weight_decay": "weight decay",
    "task.deviation_decay": "decay of deviations",
    "layer.balance_weight": "balance",
    "layer.importance_weight": "importance",
    "layer.load_weight": "load",
}


def report(data: StudyData) -> Report:
    """ValueError for runs that looked at the test text, or that differ in what the table does not tell."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    if tested := data.runs["run_id"][pd.to_numeric(text(data.runs, "metrics.test_loss")).notna()].tolist():
        raise ValueError(
            f"{data.name} compares by the validation text alone (task.test=false); these runs do not:"
            f" {', '.join(tested)}"
        )
    runs = data.runs.assign(layer=[layer_name(row) for row in data.runs.to_dict("records")])
    runs = runs.assign(**{name: text(runs, column) for column, name in _SETTINGS.items()})
    key = ["layer", *_SETTINGS.values()]
    cells = summarize(runs, keep=key)
    losses = runs.groupby("cell")["metrics.val_loss"]
    cells["val_loss_mean"], cells["val_loss_std"] = cells["cell"].map(losses.mean()), cells["cell"].map(losses.std())
    last = data.history.sort_values("epoch", kind="stable").drop_duplicates("cell", keep="last").set_index("cell")
    cells["leaves_used_val"] = cells["cell"].map(last["leaves_used"]).astype(float)
    cells["run_ids"] = cells["cell"].map(runs.groupby("cell")["run_id"].agg(" ".join))
    cells = cells.sort_values(["layer", "val_loss_mean"], kind="stable", ignore_index=True)

    found = list(placed(data, runs, cells.to_dict("records"), key).values())
    every = pd.DataFrame([_line(cell) for cell in found])
    every = every.drop(columns=[name for name in _SETTINGS.values() if (every[name] == MISSING).all()])
    tried = every["layer"].map(every["layer"].value_counts()).map(str)
    best = every.assign(**{"settings tried": tried}).drop_duplicates("layer")
    note = (
        "Losses of the hard route on the validation text in nats per character, the best over"
        f" {each(runs, 'trainer.max_epochs')} epochs of {each(runs, 'trainer.max_batches')} steps: mean ± standard"
        " deviation over the seeds; the test text was never looked at. Leaves in use: leaves (experts) that at least"
        f" one character of the validation text reaches after the last epoch, over all blocks. {hardware(runs)}"
    )
    caution = "The best of many settings looks better on the text that chose it than on other text."
    words = 1 + len(set(_SETTINGS.values()) & set(every.columns))
    tables = [
        Table(data.name, "Language model: the best setting of each layer", best, f"{note} {caution}", words),
        Table(f"{data.name}_settings", "Language model: every setting searched", every, note, words),
    ]
    return Report(cells, tables, {})


def _line(cell: Cell) -> dict[str, str]:
    loss, dense = cell["val_loss_mean"], cell["layer._target_"] == "fff.FeedForward"
    return {
        "layer": cell["layer"],
        **{name: cell[name] or MISSING for name in _SETTINGS.values()},
        "validation loss": MISSING if pd.isna(loss) else f"{number(loss, 3)} ± {number(cell['val_loss_std'], 3)}",
        "leaves in use": MISSING if dense else of(cell["leaves_used_val"], cell["num_leaves"]),
        "n (diverged)": f"{cell['n']} ({cell['diverged']})",
    }
