"""Records are merged by run id, never counted when unreadable, and written the same way whatever their order."""

import csv
import json

import pytest

from fff.report.records import HISTORY, HISTORY_BYTES, collect, columns, csv_text, merge, merge_history, read_csv


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_row_holds_configuration_metrics_and_origin(write_run, runs_dir):
    write_run(depth=2, seed=3, ga=1 / 3, leaf_load=[4, 0, 1, 0], digest="0123456789abcdef")
    (row,) = collect(runs_dir / "study").rows
    assert row["layer.mode"] == "soft"
    assert row["layer.depth"] == "2"
    assert row["task.optimizer.lr"] == "0.2"
    assert row["metrics.ga"] == "0.333333"
    assert row["metrics.diverged"] == "false"
    assert json.loads(row["metrics.leaf_load"]) == [4, 0, 1, 0]
    assert (row["seed"], row["git_commit"], row["versions.torch"]) == ("3", "abc", "2")
    assert row["data_digest"] == "0123456789abcdef"
    assert "/a/place" not in row.values()


def test_cell_is_the_configuration_without_seeds(write_run, runs_dir):
    for seed in (0, 1):
        write_run(depth=2, seed=seed)
    write_run(depth=2, mode="straight_through")
    cells = [row["cell"] for row in collect(runs_dir / "study").rows]
    assert len(set(cells)) == 2
    assert sorted(cells.count(cell) for cell in set(cells)) == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"finished"', '"running"'),
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"metrics"', '"numbers"'),
    ],
)
def test_damaged_record_is_named_and_not_counted(write_run, runs_dir, damage):
    whole, broken = write_run(seed=0), write_run(seed=1)
    broken.write_text(damage(broken.read_text()))
    found = collect(runs_dir / "study")
    assert [row["seed"] for row in found.rows] == ["0"]
    assert len(found.histories) == 1
    (problem,) = found.problems
    assert str(broken) in problem and str(whole) not in problem


def test_failed_and_unfinished_runs_are_told_apart(write_run, runs_dir):
    for seed, name in ((0, "error.txt"), (1, "lock")):
        path = write_run(seed=seed)
        path.rename(path.with_name(name))
    problems = collect(runs_dir / "study").problems
    assert sum(": failed, not counted" in line for line in problems) == 1
    assert sum(": not finished, not counted" in line for line in problems) == 1


def test_new_row_replaces_the_old_one_and_others_stay(write_run, update, results_dir):
    write_run(seed=0, ga=0.5)
    gone = write_run(seed=1, ga=0.6)
    update("study")
    gone.unlink()
    write_run(seed=0, ga=0.7)
    update("study")
    rows = read(results_dir / "runs" / "study.csv")
    assert {row["seed"]: row["metrics.ga"] for row in rows} == {"0": "0.7", "1": "0.6"}


def test_csv_does_not_depend_on_the_order_of_runs(write_run, runs_dir):
    for seed in (10, 9, 2):
        write_run(seed=seed)
        write_run(depth=3, seed=seed)
    rows = collect(runs_dir / "study").rows
    once = merge([], rows)
    twice = merge(once[::-1], rows[::-1])
    assert csv_text(once, columns(once)) == csv_text(twice, columns(twice))
    assert [row["seed"] for row in once] == ["2", "9", "10"] * 2


def test_csv_survives_reading_and_writing(write_run, update, results_dir):
    write_run(depth=2, ga=float("nan"), leaf_load=[1, 2, 3, 4])
    update("study")
    path = results_dir / "runs" / "study.csv"
    rows = read_csv(path)
    assert rows[0]["metrics.ga"] == ""
    assert csv_text(merge(rows, []), columns(rows)) == path.read_text()


def test_csv_cut_short_is_an_error(write_run, update, results_dir):
    write_run()
    update("study")
    path = results_dir / "runs" / "study.csv"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="study.csv"):
        read_csv(path)


def history(epochs, value):
    return {"epoch": list(range(1, epochs + 1)), "node_entropy": [value] * epochs, "train_loss": [None] * epochs}


def test_history_is_the_mean_over_runs_still_training():
    rows = merge_history([], [("c", history(1, 0.2)), ("c", history(2, 0.4))])
    assert [(row["epoch"], row["runs"], row["node_entropy"]) for row in rows] == [("1", "2", "0.3"), ("2", "1", "0.4")]
    assert rows[0]["train_loss"] == ""


def test_history_has_the_entropy_of_each_layer_where_runs_have_it(write_run, update, results_dir):
    deep = {"epoch": [1, 2], **{f"node_entropy_{i}": [0.1 * i, None] for i in range(1, 11)}}
    write_run(depth=1)
    write_run(depth=1, width=4, history=deep), write_run(depth=1, width=4, seed=1, history=deep)
    update("study")
    path = results_dir / "runs" / "study.history.csv"
    header = path.read_text().splitlines()[0].split(",")
    assert header == ["cell", "epoch", "runs", *HISTORY, *(f"node_entropy_{i}" for i in range(1, 11))]
    rows = read_csv(path)
    assert sorted((row["runs"], row["epoch"], row["node_entropy_2"]) for row in rows) == [
        *(("1", "1", ""), ("1", "2", ""), ("2", "1", "0.2"), ("2", "2", "")),
    ]
    written = path.read_bytes()
    update("study")
    assert path.read_bytes() == written


def test_history_has_the_validation_loss_where_a_language_model_has_it(write_run, update, results_dir):
    write_run(history={"epoch": [1, 2], "train_loss": [2.0, 1.0], "val_loss": [2.5, 1.5], "node_entropy_1": [0.1, 0.2]})
    update("study")
    path = results_dir / "runs" / "study.history.csv"
    assert path.read_text().splitlines()[0].split(",")[-2:] == ["val_loss", "node_entropy_1"]
    assert [row["val_loss"] for row in read_csv(path)] == ["2.5", "1.5"]


def test_stored_history_stays_where_it_has_more_runs():
    stored = merge_history([], [("c", history(1, 0.2)), ("c", history(1, 0.4))])
    assert merge_history(stored, [("c", history(1, 9.0))]) == stored
    replaced = merge_history(stored, [("c", history(1, 1.0)), ("c", history(1, 2.0))])
    assert [row["node_entropy"] for row in replaced] == ["1.5"]


def test_long_history_is_thinned_and_keeps_first_and_last_epoch():
    cells = [(f"cell{i:06}", history(500 + i, 0.123456)) for i in range(60)]
    rows = merge_history([], cells)
    assert len(csv_text(rows, rows[0])) <= HISTORY_BYTES
    for i, (name, _) in enumerate(cells):
        epochs = [int(row["epoch"]) for row in rows if row["cell"] == name]
        assert epochs[:10] == list(range(1, 11))
        assert epochs[-1] == 500 + i
    assert merge_history(rows, []) == rows
