"""What the writers of records and their reader must agree on, though neither imports the other."""

import json
from pathlib import Path

import pytest

from experiments import config, store
from fff.report import records


def test_schema_and_places_are_the_same():
    assert store.SCHEMA == records.SCHEMA
    assert set(config._PLACES) == set(records._PLACES)


def test_every_column_of_a_history_is_read():
    protocol = pytest.importorskip("fff.tasks.protocol")
    assert protocol.HISTORY == ("epoch", *records.HISTORY)


def test_every_column_is_explained():
    schema = (Path(__file__).resolve().parents[2] / "results" / "README.md").read_text()
    metrics = [f"metrics.{name}" for name in records._METRICS if not name.endswith(("_width", "_size"))]
    for name in (*records._FIRST, *records._RUN, *metrics, *records.HISTORY):
        assert f"`{name}`" in schema, name


def test_a_record_as_it_is_written_is_read(write_run):
    path = write_run(depth=1)
    record = json.loads(path.read_text())
    record["metrics"]["ga"] = float("nan")
    store.write_record(path.parent, record)
    (row,) = records.collect(path.parents[1]).rows
    assert (row["run_id"], row["metrics.ma"], row["metrics.ga"]) == (record["run_id"], "0.9", "")


@pytest.mark.parametrize(
    "replace",
    [lambda path: store.write_record(path.parent, {"new": 1}), lambda path: records.write(path, "new")],
    ids=["record", "report"],
)
def test_a_process_that_dies_before_the_last_step_of_writing_has_changed_nothing(write_run, monkeypatch, replace):
    def die(*_):
        raise KeyboardInterrupt

    path = write_run(depth=1)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        replace(path)
    assert path.read_bytes() == before
