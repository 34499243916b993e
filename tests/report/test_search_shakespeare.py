"""The search for the language model's recipe: settings by validation loss, never by the test text."""

import pandas as pd
import pytest

from fff.report import records, tables
from fff.report.cells import read_runs
from fff.report.studies import search_shakespeare
from fff.report.study import StudyData
from tests.report.table_text import cells_of

DENSE = {"layer._target_": "fff.FeedForward", "layer.hidden_features": "64", "task.optimizer.weight_decay": "0.3"}
TREE = {
    **{"layer._target_": "fff.FFF", "layer.depth": "3", "layer.leaf_width": "64", "layer.top_k": "1"},
    **{"layer.mode": "straight_through", "layer.balance_weight": "0.01"},
}
STEPS = {"trainer.max_epochs": "6", "trainer.max_batches": "100"}


@pytest.fixture
def report(tmp_path):
    """report(*runs): each a configuration, a seed, a validation loss, and metrics by name."""

    def make(*runs):
        rows, history = [], []
        for i, (config, seed, loss, *more) in enumerate(runs):
            config = STEPS | config
            measured = {"val_loss": loss, "test_loss": "", "diverged": False}
            measured |= {"num_leaves": 32 if "layer.depth" in config else 4, **dict(*more)}
            measured = {f"metrics.{name}": str(value) for name, value in measured.items()}
            cell = records.cell(config)
            rows.append({"run_id": f"run{i}", "cell": cell, "seed": str(seed), "wall_time_s": "1"} | config | measured)
            history += [(cell, 1, 4), (cell, 3, 30), (cell, 2, 6)]
        path = tmp_path / "runs.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        history = pd.DataFrame(history, columns=["cell", "epoch", "leaves_used"])
        return search_shakespeare.report(StudyData("search_shakespeare", read_runs(path), history, tmp_path))

    return make


def lr(layer, rate, **more):
    return layer | {"task.optimizer.lr": rate} | more


def test_the_best_setting_is_that_of_the_least_mean_loss(report):
    made = report(
        # A single seed is below the mean of the better setting.
        (lr(TREE, "0.002"), 0, 1.5),
        (lr(TREE, "0.002"), 1, 1.9),
        (lr(TREE, "0.004"), 0, 1.62),
        (lr(TREE, "0.004"), 1, 1.64),
        (lr(DENSE, "0.002"), 0, 1.8),
        (lr(DENSE, "0.004"), 0, "", {"diverged": True}),
    )
    best, settings = map(tables.markdown, made.tables)
    tree, dense = "FFF, 8 x 64, straight-through", "dense, 64 units"
    assert cells_of(best, tree) == ["0.004", "–", "0.01", "1.630 ± 0.014", "30.0 / 32", "2 (0)", "2"]
    assert cells_of(best, dense) == ["0.002", "0.3", "–", "1.800 ± –", "–", "1 (0)", "2"]
    assert cells_of(settings, tree, "0.002") == ["–", "0.01", "1.700 ± 0.283", "30.0 / 32", "2 (0)"]
    # A run that diverged at once is told, and last.
    assert cells_of(settings, dense, "0.004") == ["0.3", "–", "–", "–", "1 (1)"]
    assert [rate for rate in made.tables[1].frame["learning rate"]] == ["0.004", "0.002", "0.002", "0.004"]
    assert "6 epochs of 100 steps" in best and "decay of deviations" not in best


def test_runs_that_looked_at_the_test_text_are_refused(report):
    with pytest.raises(ValueError, match=r"task\.test=false.*run1"):
        report((lr(TREE, "0.002"), 0, 1.7), (lr(TREE, "0.004"), 0, 1.6, {"test_loss": 1.8}))


def test_runs_that_differ_in_what_no_column_tells_are_refused(report):
    with pytest.raises(ValueError, match=r"(?s)2 configurations for one place.*run1.*run0"):
        report((lr(TREE, "0.002"), 0, 1.7), (lr(TREE, "0.002", **{"task.warmup_steps": "10"}), 0, 1.6))
