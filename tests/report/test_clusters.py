"""The study of the cluster data: names, the published values beside ours, and what must not be mixed."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fff.report import figures
from fff.report.cells import read_runs
from fff.report.studies import clusters
from fff.report.study import StudyData

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "chen2022_synthetic.csv"
PATCH = {"layer._target_": "fff.PatchMoE", "layer.channels": 8, "layer.num_experts": 8}
TREE = {
    "layer._target_": "fff.FFF",
    "layer.depth": 2,
    "layer.leaf_width": 4,
    "layer.mode": "straight_through",
    "layer.top_k": 2,
}


@pytest.fixture
def study(tmp_path):
    """study(*runs): each a layer, a setting, a seed, a test accuracy and a dispatch entropy."""
    (tmp_path / "reference").mkdir()
    shutil.copy(REFERENCE, tmp_path / "reference")

    def make(*runs):
        rows = [
            {
                "run_id": f"run{i}",
                "cell": f"{sorted(layer.items())}{setting}",
                "data.setting": setting,
                "metrics.ga": accuracy,
                "metrics.dispatch_entropy": entropy,
                "metrics.num_leaves": 1 if "layer.hidden_features" in layer else 8,
                "metrics.leaves_used": 3,
                "wall_time_s": 1,
                **layer,
            }
            for i, (layer, setting, accuracy, entropy) in enumerate(runs)
        ]
        path = tmp_path / "runs.csv"
        pd.DataFrame([{name: str(value) for name, value in row.items()} for row in rows]).to_csv(path, index=False)
        return StudyData("clusters", read_runs(path), pd.DataFrame(), tmp_path)

    return make


def line(table, model, source):
    frame = table.frame
    (row,) = frame[(frame["model"] == model) & (frame["source"] == source)].to_dict("records")
    return [row[setting] for setting in clusters.SETTINGS]


def test_ours_stand_beside_the_published_values_of_the_same_model(study):
    cubic = PATCH | {"layer.act_layer": "cube"}
    single = PATCH | {"layer.num_experts": 1, "layer.channels": 64, "layer.act_layer": "identity"}
    dense = {"layer._target_": "fff.FeedForward", "layer.hidden_features": 32}
    mixtures, others = [(cubic, 1, 0.99, 0.1), (cubic, 1, 0.97, 0.3)], [(single, 2, 0.7, 1.38), (dense, 3, 0.98, 1.38)]
    runs = *mixtures, *others, (TREE, 4, 0.99, 0)
    with figures.style():
        accuracy, entropy, quantities = clusters.report(study(*runs)).tables
    assert line(accuracy, "mixture, cubic, 8 x 16", "ours") == ["98.00 ± 1.41", "–", "–", "–"]
    assert line(accuracy, "mixture, cubic, 8 x 16", "paper")[0] == "99.46 ± 0.55"
    assert line(accuracy, "single, linear, 128 units", "ours")[1] == "70.00"
    assert line(accuracy, "single, linear, 128 units", "authors' notebook")[1] == "69.56"
    assert line(accuracy, "dense, 32 units", "ours")[2] == "98.00"
    assert line(accuracy, "FFF, 4 x 4, straight-through, 2 leaves", "ours")[3] == "99.00"
    assert line(entropy, "mixture, cubic, 8 x 16", "ours")[0] == "0.200 ± 0.141"
    assert line(entropy, "mixture, cubic, 8 x 16", "paper")[0] == "0.098 ± 0.087"
    # A single expert has nothing to dispatch.
    assert "dense, 32 units" not in set(entropy.frame["model"])
    worst = quantities.frame[quantities.frame["quantity"] == "worst seed, %"].set_index("model")
    assert worst.loc["mixture, cubic, 8 x 16", "1"] == "97.00"


def test_ceiling_is_the_probability_of_the_right_sign(study):
    with figures.style():
        accuracy = clusters.report(study((TREE, 1, 0.9, 0))).tables[0]
    # By hand for sigma = 2: the integral of Phi(a t) is t Phi(a t) + phi(a t) / a, between t = 0.5 and 2, over 1.5.
    assert line(accuracy, "cluster known", "best possible") == ["100.00", "99.71", "100.00", "99.71"]


def test_two_configurations_for_one_place_are_refused(study):
    wider = TREE | {"layer.hardening_weight": 1.0}
    with pytest.raises(ValueError, match=r"2 configurations for one place of the table \(FFF, 4 x 4.*, 1\)"):
        clusters.report(study((TREE, 1, 0.9, 0), (wider, 1, 0.9, 0)))
