"""Table 2: which layer stands where, the paper's values beside it, and what trees are measured against."""

import pytest

from fff.report.paper import reference
from fff.report.study import load, publish
from tests.report.table_text import cells_of

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.001}


@pytest.fixture
def sections(update, results_dir):
    def make():
        update("table2")
        return publish(load("table2", results_dir)).markdown.split("\n## ")[1:]

    return make


def ours(write_run, **options):
    return write_run("table2", data="cifar10", recipe="cifar", optimizer=ADAMW, **options)


def test_the_papers_values_stand_beside_ours(write_run, sections, results_dir):
    ours(write_run, width=32, depth=1, mode="straight_through", ga=0.5, seed=0)
    ours(write_run, width=32, depth=1, mode="straight_through", ga=0.52, seed=1)
    write_run("table2", data="cifar10", recipe="cifar_paper", optimizer=ADAMW, width=64, ga=0.49)
    first, *_ = sections()
    # MA and GA of the paper, of its recipe run again, and of ours.
    assert cells_of(first, "64", "FFF")[:2] == ["85.8", "45.9"]
    assert cells_of(first, "64", "FFF")[2:4] == ["–", "–"]
    assert cells_of(first, "64", "FFF")[5] == "51.0 ± 1.4"
    assert cells_of(first, "64", "dense")[3] == "49.0 ± –"
    assert len(reference("table2_moe_comparison", results_dir)) == 15


def test_of_several_layers_validation_chooses_and_more_widths_come_first(write_run, sections):
    """The test accuracy of the layer that is not chosen is the better one."""
    ours(write_run, width=32, depth=1, mode="straight_through", ga=0.40, val_accuracy=0.52)
    ours(write_run, width=32, depth=1, mode="soft", ga=0.60, val_accuracy=0.51)
    first, *_ = sections()
    assert cells_of(first, "64", "FFF")[5] == "40.0 ± –"
    ours(write_run, width=32, depth=2, mode="soft", ga=0.61, val_accuracy=0.50)
    first, *_ = sections()
    assert cells_of(first, "64", "FFF")[5] == "60.0 ± –" and cells_of(first, "128", "FFF")[5] == "61.0 ± –"


def test_a_tree_is_measured_against_dense_layers_of_its_recipe(write_run, sections):
    ours(write_run, width=32, depth=2, mode="straight_through", ga=0.50)
    ours(write_run, width=32, depth=1, mode="straight_through", ga=0.49)
    ours(write_run, width=32, ga=0.48)
    ours(write_run, width=128, ga=0.53)
    write_run("table2", data="cifar10", recipe="cifar_paper", optimizer=ADAMW, width=34, ga=0.10)
    _, dense, every = sections()
    line = cells_of(dense, "our recipe", "FFF 32, straight-through", "128")
    # 34 neurons are evaluated, and no dense layer of 34 was trained by this recipe.
    assert line == ["50.0 ± –", "+2.0 (32)", "–", "-3.0 (128)"]
    # Nor one of 64, as many as the other tree trains.
    assert cells_of(dense, "our recipe", "FFF 32, straight-through", "64") == ["49.0 ± –", "+1.0 (32)", "–", "–"]
    assert cells_of(every, "our recipe", "dense", "32")[1] == "48.0 ± –"


def test_longer_runs_of_a_layer_stand_beside_the_others(write_run, sections):
    ours(write_run, width=64, ga=0.50)
    ours(write_run, width=128, ga=0.51)
    ours(write_run, width=64, ga=0.60, val_accuracy=0.9, max_epochs=200)
    write_run("table2", data="cifar10", recipe="cifar_paper", optimizer=ADAMW, width=64, ga=0.49, max_epochs=300)
    first, _, every = sections()
    assert cells_of(first, "64", "dense")[3:6:2] == ["49.0 ± –", "50.0 ± –"]
    assert cells_of(every, "our recipe", "dense, 200 epochs", "64")[1] == "60.0 ± –"


def test_a_temperature_that_falls_is_told(write_run, sections):
    ours(write_run, width=32, depth=2, ga=0.5)
    ours(write_run, width=32, depth=2, ga=0.6, schedules={"temperature": [[0, 1.0], [9, 0.1]]})
    *_, every = sections()
    assert cells_of(every, "our recipe", "FFF 32, soft", "128")[1] == "50.0 ± –"
    assert cells_of(every, "our recipe", "FFF 32, soft, temperature falls", "128")[1] == "60.0 ± –"


def test_two_configurations_of_one_layer_are_refused(write_run, sections):
    ours(write_run, width=32)
    write_run("table2", data="cifar10", recipe="cifar", optimizer={**ADAMW, "lr": 0.5}, width=32)
    with pytest.raises(ValueError, match="2 configurations for one place of the table"):
        sections()


def test_time_of_a_row_is_that_of_its_batch_shared_out(write_run, sections, results_dir):
    ours(write_run, width=32)
    path = results_dir / "bench" / "table2.csv"
    path.parent.mkdir(parents=True)
    rows = [("fff_hard", 1, 1, 2e-5), ("fff_hard", 1, 2048, 2048e-6), ("upstream", 1, 1, 9.0), ("dense", 1, 1, 3e-5)]
    lines = [f"{name},32,{depth},{batch},{seconds},a processor" for name, depth, batch, seconds in rows]
    path.write_text("\n".join(["candidate,leaf_width,depth,batch,median_s,cpu", *lines]) + "\n")
    *_, latency = sections()
    assert cells_of(latency, "64", "FFF, leaves of 32") == ["20.00", "1.00"]
    assert cells_of(latency, "64", "dense")[0] == "30.00"
