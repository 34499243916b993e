"""A record counts only if it is whole and of this configuration; one process at a time owns a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.store import LOCK, RESULT, SCHEMA, is_locked, lock, read_record, write_record

ROOT = Path(__file__).parents[2]
RECORD = {"schema": SCHEMA, "status": "finished", "config_hash": "abc", "metrics": {"ga": 0.5}}


def test_what_was_written_is_read(tmp_path):
    assert read_record(tmp_path, "abc") == (None, "")
    write_record(tmp_path, {**RECORD, "history": {"train_loss": [1.0, float("nan"), float("inf")]}})
    record, reason = read_record(tmp_path, "abc")
    assert record["history"] == {"train_loss": [1.0, None, None]} and reason == ""
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "unreadable"),
        (json.dumps(RECORD)[:40], "unreadable"),
        ("\xff\xfe", "unreadable"),
        ("[]", "not the record"),
        (json.dumps({**RECORD, "status": "running"}), "not the record"),
        (json.dumps({**RECORD, "config_hash": "abd"}), "another configuration"),
        (json.dumps({**RECORD, "schema": 0}), "schema 0"),
    ],
)
def test_anything_else_is_refused_with_a_reason(tmp_path, text, why):
    (tmp_path / RESULT).write_bytes(text.encode("latin-1"))
    record, reason = read_record(tmp_path, "abc")
    assert record is None and why in reason and str(tmp_path / RESULT) in reason


def test_the_report_reads_what_is_written_here():
    """It repeats these names, as it imports neither torch nor this package."""
    from experiments import config
    from fff.report import records
    from fff.tasks import protocol

    assert records.SCHEMA == SCHEMA and records._PLACES == config._PLACES
    assert ("epoch", *records.HISTORY) == protocol.HISTORY


HOLD = """
import sys
from pathlib import Path
from experiments.store import lock
with lock(Path(sys.argv[1])) as owned:
    print(owned, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """A process that owns the folder until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "True\n"
        yield process


def test_a_run_has_one_owner(tmp_path, owner):
    assert is_locked(tmp_path)
    assert (tmp_path / LOCK).read_text().startswith(f"pid {owner.pid} on ")
    owner.stdin.close()
    with lock(tmp_path, wait=True) as owned:
        assert owned
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path, owner):
    owner.kill()
    owner.wait()
    assert (tmp_path / LOCK).exists() and not is_locked(tmp_path)
