"""The search for a recipe: settings by validation accuracy alone, left out ones at their defaults, repeats once."""

import inspect
import json
import pydoc

import pandas as pd
import pytest

from fff.report import figures, records
from fff.report.cells import read_runs
from fff.report.studies import search
from fff.report.study import StudyData

DENSE = {"layer._target_": "fff.FeedForward", "layer.hidden_features": "16", "layer.drop": "0.0"}
MIXTURE = {"layer._target_": "fff.MoE", "layer.expert_width": "8", "layer.drop": "0.0"}
NOISY = MIXTURE | {"layer.router": "noisy_top_k", "layer.load_weight": "0.1"}
MIXTRAL = MIXTURE | {"layer.router": "mixtral", "layer.load_weight": "0.0"}
TREE = {"layer._target_": "fff.FFF", "layer.leaf_width": "8", "layer.drop": "0.0"}
COMMON = {
    "model._target_": "fff.models.Classifier",
    "task.optimizer._target_": "torch.optim.AdamW",
    "task.optimizer.lr": "0.01",
    "task.test": "false",
}


@pytest.fixture
def study(tmp_path):
    """study(*runs): each a configuration, a seed, a validation accuracy, and metrics by name.

    As in records, the seed of the validation rows is part of the cell. After three epochs a run uses 10 + seed leaves.
    """

    def make(*runs):
        rows, history = [], []
        for i, (config, seed, accuracy, *metrics) in enumerate(runs):
            config = COMMON | {"data.split_seed": str(seed)} | config
            cell = records.cell(config)
            measured = {"val_accuracy": accuracy, "ma": 0.99876, "ga": "", "diverged": False}
            measured |= {"num_leaves": 1 if "layer.hidden_features" in config else 16, **dict(*metrics)}
            measured = {f"metrics.{name}": str(value) for name, value in measured.items()}
            rows.append({"run_id": f"run{i}", "cell": cell, "seed": str(seed), "wall_time_s": "1"} | config | measured)
            history += [(cell, 1, 4), (cell, 3, 10 + seed), (cell, 2, 6)]
        path = tmp_path / "runs.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        return StudyData(
            "search", read_runs(path), pd.DataFrame(history, columns=["cell", "epoch", "leaves_used"]), tmp_path
        )

    return make


@pytest.fixture
def report(study):
    def make(*runs):
        with figures.style():
            return search.report(study(*runs))

    return make


def lr(layer, rate, **more):
    return layer | {"task.optimizer.lr": rate} | more


def test_rows_by_mean_validation_accuracy_and_the_best_of_each_model_ahead(report):
    made = report(
        # A single seed is above the mean of the better setting.
        (lr(TREE, "0.01"), 0, 0.95),
        (lr(TREE, "0.01"), 1, 0.99),
        (lr(TREE, "0.003"), 0, 0.98),
        (lr(TREE, "0.003"), 1, 0.9801),
        (lr(DENSE, "0.01"), 0, 0.97),
        (lr(DENSE, "0.01"), 1, 0.97),
        (lr(DENSE, "0.003"), 0, 0.9, {"diverged": True}),
        (lr(DENSE, "0.003"), 1, 0.9),
        (lr(DENSE, "0.003", **{"layer.hidden_features": "128"}), 0, 0.5),
        (NOISY, 0, 0.96),
    )
    headline, *others = made.tables
    assert list(headline.frame["model"]) == [
        *("dense, width 128", "dense, width 16", "mixture, expert width 8", "tree, leaf width 8"),
    ]
    assert list(headline.frame["learning rate"]) == ["0.003", "0.01", "0.01", "0.003"]
    assert list(headline.frame["settings tried"]) == ["1", "2", "1", "2"]
    _, dense, _, tree = others
    assert list(tree.frame["learning rate"]) == ["0.003", "0.01"]
    # By hand: deviations of 0.0001 / sqrt 2 and 0.04 / sqrt 2.
    assert list(tree.frame["validation"]) == ["98.00 ± 0.01", "97.00 ± 2.83"]
    assert list(tree.frame["MA"]) == ["99.88"] * 2
    assert list(dense.frame["n (diverged)"]) == ["2 (0)", "2 (1)"]
    assert "leaves in use" not in dense.frame
    # Of the last epoch, mean over the seeds, whose records are cells of their own.
    assert list(tree.frame["leaves in use"]) == ["10.5 / 16"] * 2
    assert not any("GA" in name for table in made.tables for name in table.frame)
    assert list(made.cells["run_ids"])[-2:] == ["run2 run3", "run0 run1"]


def test_only_what_varies_in_a_table_is_a_column(report):
    _, dense, mixture = report(
        (DENSE, 0, 0.9),
        (DENSE | {"layer.drop": "0.2"}, 0, 0.8),
        (NOISY, 0, 0.9),
        (MIXTRAL, 0, 0.8),
        (MIXTRAL | {"task.optimizer.lr": "0.1", "data.batch_size": "64"}, 0, 0.7),
    ).tables
    measured = ["validation", "MA", "n (diverged)"]
    assert list(dense.frame) == ["dropout", *measured]
    # Loss weights follow from the router; a setting without a plain name has its own.
    assert list(mixture.frame) == [
        "router",
        "learning rate",
        "data.batch_size",
        *measured[:2],
        "leaves in use",
        "n (diverged)",
    ]
    assert list(mixture.frame["router"]) == ["noisy_top_k", "mixtral", "mixtral"]


def test_what_a_configuration_leaves_out_is_at_its_default(report):
    _, dense, tree = report(
        (TREE, 0, 0.9),
        (TREE | {"layer.runner_up": "true", "model.noise": "0.5", "task.optimizer.weight_decay": "0.3"}, 0, 0.8),
        (DENSE, 0, 0.9),
        (DENSE | {"task.optimizer._target_": "torch.optim.SGD"}, 0, 0.8),
    ).tables
    assert tree.frame[["runner-up", "weight decay", "noise"]].values.tolist() == [
        ["no", "0.01", "0.0"],
        ["yes", "0.3", "0.5"],
    ]
    # Not the default of another class.
    assert list(dense.frame["weight decay"]) == ["0.01", "–"]


@pytest.mark.parametrize(("argument", "default"), search._DEFAULTS.items())
def test_defaults_are_those_of_the_signatures(argument, default):
    _, class_name, name = argument
    assert json.dumps(inspect.signature(pydoc.locate(class_name)).parameters[name].default) == default


def test_a_run_that_names_a_default_repeats_the_one_that_leaves_it_out(report):
    named = TREE | {"layer.runner_up": "false"}
    made = report((TREE, 0, 0.9), (TREE, 1, 0.8), (named, 0, 0.9), (named, 1, 0.8), (named, 2, 0.7))
    (line,) = made.tables[1].frame.to_dict("records")
    assert (line["validation"], line["n (diverged)"]) == ("80.00 ± 10.00", "3 (0)")
    assert made.remarks == ["search: 2 runs repeat setting and seed of others and are not counted"]


def test_settings_with_fewer_seeds_are_told(report):
    made = report((TREE, 0, 0.9), (TREE, 1, 0.9), (DENSE, 0, 0.9))
    assert made.remarks == ["search: 1 of 2 settings have fewer runs than the 2 seeds"]


@pytest.mark.parametrize("wrong", [(TREE, 1, 0.9, {"ga": 0.9}), (TREE | {"data.split_seed": "0"}, 1, 0.9)])
def test_runs_that_saw_test_rows_or_share_validation_rows_are_refused(report, wrong):
    with pytest.raises(ValueError, match=r"by validation rows alone, other ones for each seed .*: run1$"):
        report((TREE, 0, 0.9), wrong)


def test_no_layer_at_all_is_a_model_of_its_own(report):
    none = {"layer._target_": "fff.NoFeedForward"}
    made = report((DENSE, 0, 0.9), (lr(none, "0.001"), 0, 0.7), (lr(none, "0.002"), 0, 0.8))
    assert list(made.tables[0].frame["model"]) == ["dense, width 16", "none"]
    (line,) = made.tables[0].frame.iloc[1:].to_dict("records")
    assert (line["learning rate"], line["validation"], line["settings tried"]) == ("0.002", "80.00 ± –", "2")
