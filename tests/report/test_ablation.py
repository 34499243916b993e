"""The ablation: which cell is the base, what is changed, and by how much over the same seeds."""

import pytest

from fff.report.studies import ablation
from fff.report.study import load, publish
from tests.report.table_text import cells_of

BASE = {"runner_up": True, "num_trees": 1}


@pytest.fixture
def study(write_run, update, results_dir):
    def runs(values, width=8, depth=4, schedules=None, **layer):
        for seed, ga in enumerate(values):
            config = {"schedules": schedules, "more": {**BASE, **layer}}
            write_run("ablation", mode="straight_through", width=width, depth=depth, seed=seed, ga=ga, **config)

    runs((0.90, 0.92, 0.94))
    runs((0.80, 0.84), width=1, depth=7)
    runs((0.91, 0.94, 0.97), region_leak=0.1)
    runs((0.89, 0.91), width=1, depth=7, region_leak=0.1)
    runs((0.90, 0.90, 0.91), runner_up=False)
    runs((0.90, 0.90, 0.90), schedules={"balance_weight": [[0, 0.3], [50, 0.0]]})
    runs((0.95,), width=4, num_trees=2)
    update("ablation")
    return results_dir


def test_each_change_is_set_beside_the_base_of_its_shape(study):
    effect, shapes, runs = publish(load("ablation", study)).markdown.split("\n## ")[1:]
    header = cells_of(effect, "change")
    wide = header.index("GA, 16 x 8")
    narrow = header.index("GA, 128 x 1")
    assert cells_of(effect, "base")[wide] == "92.0 ± 2.0" and cells_of(effect, "base")[wide + 1] == "–"
    # 1, 2 and 3 points more: 2 ± 1 / sqrt(3); 9 and 7 points more: 8 ± 2 / sqrt(2) / sqrt(2).
    leak = cells_of(effect, "region leak 0.1")
    assert leak[wide : wide + 2] == ["94.0 ± 3.0", "+2.0 ± 0.6"]
    assert leak[narrow + 1] == "+8.0 ± 1.0"
    # 0, 2 and 3 points less.
    assert cells_of(effect, "no runner up")[wide + 1] == "-1.7 ± 0.9"
    assert cells_of(effect, "balance weight over the epochs [[0, 0.3], [50, 0.0]]")[wide + 1] == "-2.0 ± 1.2"
    # A shape of one seed, beside the same seed of 16 x 8.
    assert cells_of(shapes, "2", "4", "4")[4] == "+5.0 ± –"
    assert cells_of(runs, "base", "16 x 8")[-1] == "3 (0)"
    assert (study / "figures" / "ablation_usps_effect.svg").exists()


def test_no_rows_are_an_error(tmp_path, results_dir):
    with pytest.raises(ValueError, match="no rows"):
        ablation.report(load("ablation", results_dir))
