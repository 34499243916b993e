"""The layout of the routing study, on routes worked by hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.tables import main
from fff.report import figures
from fff.report.study import load, publish

ROOT = Path(__file__).resolve().parents[2]
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.001}
LABEL = np.array([0, 0, 1, 1], dtype=np.int8)
PARTED, OTHER_NUMBERS, TOGETHER = [0, 0, 1, 1], [3, 3, 2, 2], [1, 1, 1, 1]
GRID = np.repeat([[0, 0, 3]], 3, axis=0).astype(np.int8)


def routes(leaf):
    return {
        # The second choice must not count.
        "index": np.array([[first, 2] for first in leaf], dtype=np.int8),
        "label": LABEL,
        "points": np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=np.float32),
        "x": np.arange(3, dtype=np.float32),
        "y": np.arange(3, dtype=np.float32),
        "plane_index": GRID,
        "plane_class": GRID % 2,
        "plane_share": np.array([0.25, 0.125]),
    }


@pytest.fixture
def study(write_run, runs_dir, results_dir):
    """Two seeds by the paper's recipe that know the class, two by ours that know nothing."""
    for seed, leaf in enumerate((PARTED, OTHER_NUMBERS)):
        write_run("routing", depth=2, seed=seed, routes=routes(leaf))
        write_run("routing", depth=2, mode="straight_through", optimizer=ADAMW, seed=seed, routes=routes(TOGETHER))
    return ["routing", "--runs-dir", str(runs_dir), "--results-dir", str(results_dir)]


def columns(markdown, table, recipe):
    """The line of a recipe in one of the tables, by column."""
    lines = [line for line in markdown.split("\n## ")[1 + table].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (line,) = [line for line in cells if recipe in line]
    return dict(zip(cells[0], line, strict=True))


def test_tables_worked_by_hand(study, capsys):
    assert main(study) == 0
    text = capsys.readouterr().out
    known = columns(text, 0, "paper's recipe")
    assert (known["data"], known["model"], known["n"]) == ("usps", "FFF", "2")
    assert known["leaves in use"] == "2.0 / 4" and known["effective leaves"] == "2.0"
    assert known["Gini"] == "0.50"  # of (2, 2, 0, 0): mean difference 1, twice the mean 2
    assert known["purity, %"] == "100.0" and known["MI, nats"] == "0.69" and known["NMI"] == "1.00"
    assert known["seeds: ARI"] == known["seeds: NMI"] == "1.00", "the numbers of the leaves do not matter"
    nothing = columns(text, 0, "our first recipe")
    assert nothing["effective leaves"] == "1.0" and nothing["Gini"] == "0.75"
    assert nothing["purity, %"] == "50.0" and nothing["MI, nats"] == nothing["NMI"] == "0.00"
    assert "usps: purity of a single leaf 50.0 %, entropy of the labels 0.69 nats" in text
    known, nothing = (columns(text, 1, recipe) for recipe in ("paper's recipe", "our first recipe"))
    assert known["class: NMI"] == "1.00 ± 0.00" and known["class: NMI by chance"] == "0.333"
    assert known["seeds: ARI"] == "1.00 (1.00 to 1.00)" and known["seeds: NMI by chance"] == "0.333"
    assert known["seeds: ARI within a class"] == "1.00 (1.00 to 1.00)"  # neither parts a class
    # Two partitions of one part agree, by chance as well.
    assert nothing["seeds: NMI"] == "1.00 (1.00 to 1.00)" and nothing["seeds: NMI by chance"] == "1.000"
    assert nothing["pairs"] == "1"


def test_mixtures_are_named_by_router_and_choices():
    from fff.report.studies.routing import _model

    run = {"layer._target_": "fff.MoE", "layer.router": "noisy_top_k", "layer.top_k": "2"}
    assert _model(run) == "MoE noisy top-2"
    assert _model(run | {"layer.router": "switch", "layer.top_k": "1"}) == "MoE switch top-1"
    assert _model({"layer._target_": "fff.FFF"}) == "FFF"


def test_one_run_has_no_pair(write_run, update, results_dir):
    write_run("routing", depth=2, routes=routes(PARTED))
    update("routing")
    text = publish(load("routing", results_dir)).markdown
    line = columns(text, 1, "paper's recipe")
    assert (line["seeds: ARI"], line["seeds: NMI"], line["seeds: NMI by chance"], line["pairs"]) == ("–", "–", "–", "0")


def test_run_without_routes_is_told_and_left_out(write_run, study, capsys):
    path = write_run("routing", depth=2, seed=2, diverged=True, ga=None)
    assert main(study) == 0
    printed = capsys.readouterr()
    assert f"{path.parent.name} has kept no routes" in printed.err
    assert columns(printed.out, 0, "paper's recipe")["n"] == "2"


def test_study_without_any_routes_says_how_to_get_them(write_run, runs_dir, results_dir, capsys):
    write_run("routing", depth=2)
    assert main(["routing", "--runs-dir", str(runs_dir), "--results-dir", str(results_dir)]) == 1
    assert "routing has no run that kept its routes (task.keep_routes=true)" in capsys.readouterr().err


def test_two_configurations_of_one_row_are_refused(write_run, study, results_dir, capsys):
    other = write_run("routing", depth=3, routes=routes(PARTED))
    assert main(study) == 1
    said = capsys.readouterr().err
    assert "2 configurations for one row of the table (usps, FFF, paper's recipe)" in said
    assert other.parent.name in said and not (results_dir / "tables").exists()


def test_same_records_give_the_same_bytes(study, runs_dir, results_dir):
    """From the committed files alone, in another process."""
    assert main(study) == 0
    first = {path: path.read_bytes() for path in results_dir.rglob("*") if path.is_file()}
    assert {path.name for path in first} >= {
        "routing.npz",
        *(f"routing_usps_{name}.{kind}" for name in ("classes", "plane", "rows") for kind in ("svg", "png")),
    }
    shutil.rmtree(runs_dir)
    command = [sys.executable, "-m", "experiments.tables", *study]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    assert {path: path.read_bytes() for path in results_dir.rglob("*") if path.is_file()} == first


def test_counts_of_classes_are_drawn_and_empty_leaves_stay_blank():
    with figures.style():
        figure = figures.class_counts([("tree", np.array([[3, 0], [1, 4]])), ("other", np.zeros((2, 2), int))])
    first, second = figure.axes
    assert [(text.get_position(), text.get_text()) for text in first.texts] == [
        ((0, 0), "3"),
        ((0, 1), "1"),
        ((1, 1), "4"),
    ]
    np.testing.assert_allclose(first.images[0].get_array(), [[1, 0], [0.2, 0.8]])
    assert not second.texts and not second.images[0].get_array().any()


def test_points_are_coloured_by_class_and_by_leaf():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 5.0]])
    with figures.style():
        figure = figures.scattered([("tree", np.array([2, 2, 0]))], points, np.array([1, 0, 1]))
    by_class, by_leaf = (axes.collections[0].get_facecolors() for axes in figure.axes)
    assert (by_class[0] == by_class[2]).all() and (by_class[0] != by_class[1]).any()
    assert (by_leaf[0] == by_leaf[1]).all() and (by_leaf[0] != by_leaf[2]).any()
    assert [(text.get_position(), text.get_text()) for text in figure.axes[0].texts] == [((1, 0), "0"), ((1, 2.5), "1")]


def test_borders_of_every_class_are_drawn():
    """Every class but the first is outlined, in every panel of two rows."""
    label = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1]])
    with figures.style():
        empty = np.empty((0, 2)), np.empty(0)
        figure = figures.regions([figures.Regions("", 0 * label, label)] * 4, np.arange(4), np.arange(4), *empty, 1)
    lines = [contour.get_paths()[0].vertices for contour in figure.axes[0].collections[1:]]
    assert len(figure.axes) == 4 and len(lines) == 2
    assert (lines[0][:, 1] > 0.5).all(), "class 1 lies above y = 1.5"
    assert lines[1][:, 0].min() == 1.5 and lines[1][:, 1].max() == 1.5, "class 2 right of x = 1.5, below y = 1.5"
