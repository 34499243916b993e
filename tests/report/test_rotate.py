"""Turned pictures: heads beside each other, the published gains, and what must not be mixed."""

from pathlib import Path

import pandas as pd
import pytest

from fff.report import figures, tables
from fff.report.cells import read_runs
from fff.report.studies import rotate
from fff.report.study import StudyData
from tests.report.table_text import cells_of

RESULTS = Path(__file__).parents[2] / "results"
TREE = {"layer._target_": "fff.FFF", "layer.depth": 2, "layer.leaf_width": 8, "layer.mode": "soft", "layer.top_k": 1}
MOE = {
    "layer._target_": "fff.MoE",
    "layer.num_experts": 4,
    "layer.expert_width": 8,
    "layer.router": "switch",
    "layer.top_k": 1,
}


def dense(units):
    return {"layer._target_": "fff.FeedForward", "layer.hidden_features": units}


@pytest.fixture
def report(tmp_path):
    """report(*runs): each a layer, a test accuracy and a dispatch entropy; Markdown of its tables."""

    def make(*runs, results_dir=RESULTS, blur="[1.1, 2.2]"):
        rows = [
            {
                "run_id": f"run{i}",
                "cell": str(sorted(layer.items())),
                "data.blur": blur,
                "metrics.ga": accuracy,
                "metrics.dispatch_entropy": entropy,
                "metrics.num_leaves": 1 if "layer.hidden_features" in layer else 4,
                "metrics.training_width": layer.get("layer.hidden_features", 32),
                "metrics.leaves_used": 3,
                "metrics.parameters": 1234,
                "wall_time_s": 1,
                **layer,
            }
            for i, (layer, accuracy, entropy) in enumerate(runs)
        ]
        path = tmp_path / "runs.csv"
        pd.DataFrame([{name: str(value) for name, value in row.items()} for row in rows]).to_csv(path, index=False)
        with figures.style():
            made = rotate.report(StudyData("rotate", read_runs(path), pd.DataFrame(), results_dir))
            figures.save(made.figures["accuracy"])
        return made, "\n".join(map(tables.markdown, made.tables))

    return make


def test_heads_stand_beside_the_dense_ones_and_the_published_gain(report):
    runs = (TREE, 0.80, 1.9), (TREE, 0.82, 2.1), (MOE, 0.78, 2.3), (dense(32), 0.79, 2.3), (dense(8), 0.75, 2.3)
    made, text = report(*runs)
    tree = cells_of(text, "FFF, 4 x 8, soft", "ours")
    assert tree == ["81.00 ± 1.41", "+2.0", "+6.0", "2.000 ± 0.141", "3.0 / 4", "1,234"]
    assert cells_of(text, "switch mixture, 4 x 8", "ours")[1:3] == ["-1.0", "+3.0"]
    # A single expert has nothing to dispatch, and is what gains are measured against.
    assert cells_of(text, "dense, 8 units", "ours") == ["75.00 ± –", "–", "–", "–", "–", "1,234"]
    assert cells_of(text, "CNN, single", "paper")[:2] == ["76.78 ± 1.79", "–"]
    assert cells_of(text, "CNN, mixture", "paper")[:2] == ["79.60 ± 1.25", "+2.8"]
    assert not made.remarks


@pytest.mark.parametrize(
    ("blur", "rows", "words"),
    [
        ("[1.1, 2.2]", "", "ours are blurred, as theirs"),
        ("", "", "ours are as sharp"),
        ("[1.1, 2.2]", "all", "ours are blurred as test rows are"),
    ],
)
def test_training_rows_that_are_not_theirs_are_told(report, blur, rows, words):
    assert words in report((TREE | {"data.blurred_rows": rows}, 0.8, 2), blur=blur)[1]


def test_two_configurations_of_one_layer_are_refused(report):
    with pytest.raises(ValueError, match=r"2 configurations for one place of the table \(model=FFF, 4 x 8, soft\)"):
        report((TREE, 0.8, 2), (TREE | {"layer.hardening_weight": 1.0}, 0.8, 2))


def test_without_the_published_values_it_says_so(report, monkeypatch):
    for module in ("paper", "studies.rotate"):
        monkeypatch.setattr(f"fff.report.{module}.reference", lambda *_: pd.DataFrame())
    made, text = report((TREE, 0.8, 2.0))
    assert "paper |" not in text and len(made.remarks) == 1


def test_a_layer_with_a_base_is_another_layer(report):
    _, text = report(
        (TREE, 0.80, 1.9), ({**TREE, "layer.base": "true"}, 0.70, 1.9), ({**MOE, "layer.base": "true"}, 0.6, 2)
    )
    assert cells_of(text, "FFF, 4 x 8, soft", "ours")[0] == "80.00 ± –"
    assert cells_of(text, "FFF, 4 x 8, soft, base", "ours")[0] == "70.00 ± –"
    assert cells_of(text, "switch mixture, 4 x 8, base", "ours")[0] == "60.00 ± –"
