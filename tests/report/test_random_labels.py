"""Random labels: one line for each cell, the published values, and what must not be mixed."""

from pathlib import Path

import pandas as pd
import pytest

from fff.report import figures, tables
from fff.report.cells import read_runs
from fff.report.studies import random_labels
from fff.report.study import StudyData
from tests.report.table_text import cells_of

RESULTS = Path(__file__).parents[2] / "results"
DENSE = {"layer._target_": "fff.FeedForward", "layer.hidden_features": 16, "width": 16, "used": 16, "leaves": 1}
TREE = {"layer._target_": "fff.FFF", "layer.leaf_width": 8, "layer.mode": "straight_through", "width": 16, "used": 9}
MOE = {"layer._target_": "fff.MoE", "layer.expert_width": 8, "layer.router": "mixtral", "layer.top_k": 2, "used": 18}


@pytest.fixture
def report(tmp_path):
    """report(*runs): each a layer, a set and a training accuracy; Markdown of its tables."""

    def make(*runs):
        rows = [
            {
                "run_id": f"run{i}",
                "cell": f"{sorted(layer.items())}{name}",
                "data.data.name": name,
                "data.num_rows": 11111,
                "data.fraction": 1.0,
                "metrics.ma": accuracy,
                "metrics.num_leaves": layer.get("leaves", 2),
                "metrics.training_width": layer.get("width", 16),
                "metrics.inference_size": layer["used"],
                "metrics.parameters": 12345,
                "wall_time_s": 1,
            }
            | {key: value for key, value in layer.items() if key.startswith("layer.")}
            for i, (layer, name, accuracy) in enumerate(runs)
        ]
        path = tmp_path / "runs.csv"
        frame = pd.DataFrame([{name: str(value) for name, value in row.items()} for row in rows])
        frame.to_csv(path, index=False)
        history = pd.DataFrame(
            [
                {"cell": cell, "epoch": epoch, "leaves_used": 3 - epoch}
                for cell in set(frame["cell"])
                for epoch in (2, 1)
            ]
        )
        with figures.style():
            made = random_labels.report(StudyData("random_labels", read_runs(path), history, RESULTS))
            for figure in made.figures.values():
                figures.save(figure)
        return made, "\n".join(map(tables.markdown, made.tables))

    return make


def test_one_line_for_each_cell(report):
    runner_up = TREE | {"layer.runner_up": "true"}
    wide = TREE | {"width": 32, "leaves": 4, "used": 10, "layer.depth": 2}
    runs = [(TREE, "mnist", 0.5), (TREE, "mnist", 0.7), (wide, "mnist", 0.8), (runner_up, "mnist", 0.9)]
    made, text = report(*runs, (MOE, "cifar10", 0.4), (DENSE, "cifar10", 0.3))
    assert set(made.figures) == {"parameters", "inference_size"}
    tree = cells_of(text, "MNIST", "FFF, straight-through", "16", "8")
    assert tree[:6] == ["11111", "12,345", "9", "60.0 ± 14.1", "70.0", "–"]
    # After the last epoch, of which the history is not the last line.
    assert tree[7] == "1.0 / 2" and tree[-1] == "2 (0)"
    assert cells_of(text, "MNIST", "FFF, straight-through", "32", "8")[3] == "80.0 ± –"
    assert cells_of(text, "MNIST", "FFF, straight-through, runner-up in training", "16", "8")[3] == "90.0 ± –"
    assert cells_of(text, "CIFAR-10", "mixtral mixture, top 2", "16", "8")[3] == "40.0 ± –"
    assert cells_of(text, "CIFAR-10", "dense", "16", "–")[7] == "–"
    assert cells_of(text, "MLP 1x512") == ["1,209,866", "99.34", "10.61"]
    assert len(made.tables[1].frame) == 5, "rows of true labels are not shown"


def test_two_configurations_for_one_place_are_refused(report):
    with pytest.raises(ValueError, match="2 configurations for one place of the table .*family=FFF, straight-through"):
        report((TREE, "mnist", 0.5), (TREE | {"layer.drop": 0.5}, "mnist", 0.5))
