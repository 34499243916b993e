"""The ablation: which run is the base, which question a change belongs to, and what it gains over the same seeds."""

import json

import pytest

from fff.report import records
from fff.report.studies import ablation
from fff.report.study import load, publish
from fff.report.tables import MISSING
from tests.report.table_text import cells_of

BASE = {
    "data.name": "usps",
    "data.batch_size": 256,
    "layer._target_": "fff.FFF",
    "layer.leaf_width": 8,
    "layer.depth": 4,
    "layer.num_trees": 1,
    "layer.mode": "straight_through",
    "layer.runner_up": True,
    "layer.balance_weight": 0.1,
    "layer.node_balance_weight": 0.0,
    "layer.bias_update_rate": 0.0,
    "layer.hardening_weight": 0.0,
    "layer.region_leak": 0.0,
    "layer.soft_gate": "sigmoid",
    "layer.temperature": 1.0,
    "layer.top_k": 1,
    "model.noise": 0.5,
    "task.optimizer.lr": 0.01,
}
NARROW = {"layer.leaf_width": 1, "layer.depth": 7}
# No other configuration has the key.
SINGLE = {"layer.runner_up": None}
SOFT = {**SINGLE, "layer.mode": "soft", "layer.hardening_weight": 3.0, "layer.balance_weight": 0.0}


def text(value) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


@pytest.fixture
def add(results_dir):
    """Add a run for each GA; validation accuracies are 0.05 above, those of `val` if given."""
    rows = []

    def add(gas, changes=None, val=None):
        config = {name: text(value) for name, value in (BASE | (changes or {})).items()}
        for seed, ga in enumerate(gas):
            measured = {"ga": ga, "ma": 0.99, "val_accuracy": val or ga + 0.05, "leaves_used": 14, "num_leaves": 16}
            # Differs in every run, as it does in reality.
            measured |= {"nodes_below_0.10": len(rows) / 1000, "inference_size": 12, "training_width": 128}
            row = {"study": "ablation", "run_id": f"run-{len(rows)}", "cell": records.cell(config), "seed": str(seed)}
            rows.append(row | config | {f"metrics.{name}": str(value) for name, value in measured.items()})
            rows[-1]["wall_time_s"] = "1"
        path = results_dir / "runs" / "ablation.csv"
        records.write(path, records.csv_text(rows, records.columns(rows)))

    return add


@pytest.fixture
def sections(results_dir):
    """The published tables by the title's first words: "What each part", "USPS, balance", ..."""

    def read():
        tables = publish(load("ablation", results_dir)).markdown.split("\n## ")[1:]
        return {table.partition("\n")[0].partition(":")[0]: table for table in tables}

    return read


@pytest.fixture
def bases(add):
    add((0.90, 0.92, 0.94))
    add((0.80, 0.84, 0.82), NARROW)


def test_a_change_stands_beside_the_base_of_its_leaf_width(bases, add, sections):
    add((0.91, 0.94, 0.97), {"model.noise": 1.0})
    add((0.89, 0.91), NARROW | {"model.noise": 0.0})
    noise = sections()["USPS, noise"]
    assert cells_of(noise, "8", "noise 0.5 (base)")[:2] == ["92.0 ± 2.0", MISSING]
    # 1, 2 and 3 points more: 2 ± 1 / sqrt(3).
    assert cells_of(noise, "8", "noise 1")[:3] == ["94.0 ± 3.0", "+2.0 ± 0.6", "99.0 ± 3.0"]
    # 9 and 7 points more than the same two of three seeds: 8 ± (2 / sqrt(2)) / sqrt(2).
    narrow = cells_of(noise, "1", "noise 0")
    assert narrow[1] == "+8.0 ± 1.0" and narrow[-2:] == ["2", "0"]


def test_a_mean_over_fewer_seeds_is_not_ranked(bases, add, sections):
    add((0.99,), {"model.noise": 1.0})
    add((0.90, 0.91, 0.92), {"model.noise": 0.0})
    best, _, worst, _ = cells_of(sections()["What each part of our second recipe gains"], "USPS", "noise", "8")
    assert (best, worst) == ("noise 0.5 (base)", "noise 0")


def test_rows_are_in_natural_order(bases, add, sections):
    for rate in (0.03, 0.001, 0.1):
        add((0.9,), {"task.optimizer.lr": rate})
    lines = [line.split("|")[2].strip() for line in sections()["USPS, rate"].splitlines() if line.startswith("| 8")]
    assert lines == ["rate 0.001", "rate 0.01 (base)", "rate 0.03", "rate 0.1"]


def test_schedules_are_in_the_order_of_their_numbers(bases, add, sections):
    for end in (10.0, 3.0):
        add((0.9,), {"task.schedules.balance_weight": [[0, end], [50, 0.0]]})
    lines = [line.split("|")[2].strip() for line in sections()["USPS, balance"].splitlines() if line.startswith("| 8")]
    assert lines == ["path balance 0.1 (base)", *(f"path balance {w} at epoch 0, 0 at epoch 50" for w in (3, 10))]


def test_a_run_belongs_to_every_question_that_it_answers(bases, add, sections, results_dir):
    add((0.85,), SINGLE)
    add((0.86,), SINGLE | {"layer.beam_width": 16})
    add((0.87,), SINGLE | {"layer.region_leak": 0.05})
    add((0.88,), SOFT)
    add((0.89,), SOFT | {"layer.hardening_weight": 10.0})
    add((0.84,), SOFT | {"task.schedules.hardening_weight": [[0, 0.0], [50, 3.0]]})
    add((0.83,), SOFT | {"layer.soft_gate": "additive"})
    add((0.82,), SINGLE | {"layer.balance_weight": 0.0, "layer.bias_update_rate": 0.01})
    add((0.81,), {"layer.balance_weight": 0.3})
    found = sections()
    # What is no single change of one question's line is another question's.
    expected = {
        "mode": {"no runner-up": "85.0", "soft, hardening 3, no balance": "88.0"},
        "leaf": {"no runner-up, beam width 1": "85.0", "no runner-up, beam width 16": "86.0"},
        "leak": {"no runner-up, leak 0": "85.0", "no runner-up, leak 0.05": "87.0"},
        "hardening": {
            "soft, hardening 3": "88.0",
            "soft, hardening 10": "89.0",
            "soft, hardening 0 at epoch 0, 3 at epoch 50": "84.0",
        },
        "gate": {"soft, gate sigmoid": "88.0", "soft, gate additive": "83.0"},
        "balance": {"path balance 0.3": "81.0", "no balance, no runner-up, bias rate 0.01": "82.0"},
    }
    for axis, rows in expected.items():
        settings = [line.split("|")[2].strip() for line in found[f"USPS, {axis}"].splitlines() if line[:3] == "| 8"]
        assert sorted(s for s in settings if "base" not in s) == sorted(rows)
        for setting, ga in rows.items():
            assert cells_of(found[f"USPS, {axis}"], "8", setting)[0] == f"{ga} ± {MISSING}"
    assert "USPS, noise" not in found and "USPS, other" not in found
    assert (results_dir / "figures" / "ablation_usps_effect.svg").exists()
    cells = (results_dir / "tables" / "ablation.csv").read_text()
    assert '"mode, leaf, leak"' in cells


def test_shapes_stand_beside_the_base_of_leaf_width_8(bases, add, sections):
    add((0.91, 0.93, 0.95), {"layer.leaf_width": 4, "layer.depth": 5})
    add((0.92, 0.94, 0.96), {"layer.leaf_width": 4, "layer.num_trees": 2})
    found = sections()
    assert cells_of(found["USPS, depth"], "depth 5, leaf width 4")[3] == "+1.0 ± 0.0"
    assert cells_of(found["USPS, depth"], "depth 7, leaf width 1")[3] == "-10.0 ± 1.2"
    assert cells_of(found["USPS, trees"], "2 x leaf width 4, depth 4")[3] == "+2.0 ± 0.0"
    assert "depth 5" not in found["USPS, trees"] and "2 x" not in found["USPS, depth"]


def test_what_answers_no_question_is_shown_with_all_that_differs(bases, add, sections):
    add((0.95,), {"model.noise": 1.0, "task.optimizer.lr": 0.03, "trainer.max_epochs": 2})
    setting = "model.noise=1, task.optimizer.lr=0.03, trainer.max_epochs=2"
    assert cells_of(sections()["USPS, other"], "8", setting)[1] == f"+5.0 ± {MISSING}"


def test_best_and_worst_are_chosen_by_validation_rows(bases, add, sections):
    add((0.99, 0.99, 0.99), {"model.noise": 0.0}, val=0.90)
    add((0.91, 0.93, 0.95), {"model.noise": 1.0}, val=0.98)
    line = cells_of(sections()["What each part of our second recipe gains"], "USPS", "noise", "8")
    assert line == ["noise 1", "+1.0 ± 0.0", "noise 0", "+7.0 ± 1.2"]


def test_without_the_base_it_says_what_to_run(add, sections):
    add((0.9,))
    add((0.9,), {"model.noise": 1.0})
    with pytest.raises(
        ValueError, match=r"no run of our second recipe on usps with leaf width 1.*experiment=ablation data=usps"
    ):
        sections()


def test_two_configurations_of_the_base_are_not_mixed(bases, add, sections):
    add((0.9,), {"trainer.max_epochs": 2})
    with pytest.raises(ValueError, match="2 configurations of our second recipe on usps with leaf width 8"):
        sections()


def test_no_rows_are_an_error(results_dir):
    with pytest.raises(ValueError, match="no rows"):
        ablation.report(load("ablation", results_dir))
