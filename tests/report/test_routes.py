"""Routes go from the run directories into one file of the study, and stay with the rows of the runs."""

import numpy as np
import pytest

from fff.report.records import collect
from fff.report.routes import pack, unpack

LABEL = np.arange(1000, dtype=np.int8) % 10


def routes(leaf=0):
    return {"index": np.full((1000, 1), leaf, dtype=np.int8), "label": LABEL}


def stored(results_dir):
    path = results_dir / "runs" / "study.npz"
    return unpack(path, path.read_bytes())


def test_what_is_packed_is_unpacked_to_the_same_bytes_in_any_order():
    several = {"b": routes(1), "a": {"index": np.array([[1, -1]], dtype=np.int16), "x": np.array([0.5])}}
    content = pack(several)
    assert pack(dict(reversed(several.items()))) == content == pack(unpack("", content))
    back = unpack("", content)
    for run_id, arrays in several.items():
        assert back[run_id].keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(back[run_id][name], array)
            assert back[run_id][name].dtype == array.dtype


def test_what_runs_share_is_stored_once():
    noise = {"points": np.random.default_rng(0).random(10_000)}
    one = len(pack({"0": noise}))
    assert len(pack({str(seed): noise for seed in range(10)})) < 1.1 * one
    # The same bytes of another shape or type are another array.
    alike = {"a": np.zeros(2, np.int16), "b": np.zeros((2, 1), np.int16), "c": np.zeros(4, np.int8)}
    assert {name: array.shape for name, array in unpack("", pack({"0": alike}))["0"].items()} == {
        "a": (2,),
        "b": (2, 1),
        "c": (4,),
    }


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[: len(c) // 2], lambda c: b"x" * 100])
def test_damaged_file_is_named(damage):
    with pytest.raises(ValueError, match="study.npz"):
        unpack("study.npz", damage(pack({"0": routes()})))


def test_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, meta="{", leaf=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz holds no routes"):
        unpack(path, path.read_bytes())


def test_routes_follow_the_rows_of_the_runs(write_run, update, results_dir):
    """A new run replaces its routes, those without a run directory stay, those without a row go."""
    first = write_run(depth=1, seed=0, routes=routes(0))
    gone, row_deleted = (write_run(depth=1, seed=seed, routes=routes(1)) for seed in (1, 2))
    update("study")
    assert set(stored(results_dir)) == {path.parent.name for path in (first, gone, row_deleted)}
    for path in (gone, row_deleted):
        path.unlink()
    table = results_dir / "runs" / "study.csv"
    table.write_text("".join(line for line in table.open() if row_deleted.parent.name not in line))
    write_run(depth=1, seed=0, routes=routes(3))
    update("study")
    kept = stored(results_dir)
    assert set(kept) == {first.parent.name, gone.parent.name}
    assert kept[first.parent.name]["index"].max() == 3 and kept[gone.parent.name]["index"].max() == 1
    # A run that diverged at once has no routes to keep, nor those of the time before.
    write_run(depth=1, seed=0, diverged=True)
    update("study")
    assert set(stored(results_dir)) == {gone.parent.name}


def test_study_without_routes_has_no_file_of_them(write_run, update, results_dir):
    write_run(depth=1)
    update("study")
    assert not (results_dir / "runs" / "study.npz").exists()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK\x03\x04")])
def test_run_whose_routes_cannot_be_read_is_named_and_not_counted(write_run, runs_dir, damage):
    whole, broken = (write_run(depth=1, seed=seed, routes=routes()) for seed in (0, 1))
    damage(broken.with_name("routes.npz"))
    found = collect(runs_dir / "study")
    assert [row["seed"] for row in found.rows] == ["0"] and list(found.routes) == [whole.parent.name]
    (problem,) = found.problems
    assert str(broken) in problem and "routes.npz" in problem
