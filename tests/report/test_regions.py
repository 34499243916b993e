"""The producer's record is what the layout draws."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from experiments import regions, tables


def test_record_is_drawn(tmp_path, capsys):
    assert regions.main(["--epochs", "1", "--results-dir", str(tmp_path)]) == 0
    with np.load(tmp_path / "runs" / "regions.npz") as record:
        meta = json.loads(record["meta"].item())
        grids = record["leaf"].shape, record["label"].shape
    assert grids == ((2, regions.GRID, regions.GRID),) * 2
    assert {"runs", "git_commit", "versions", "hardware"} == set(meta)
    capsys.readouterr()
    assert tables.main(["regions", "--runs-dir", str(tmp_path), "--results-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for run in meta["runs"]:
        assert f"{run['leaves_used']} / 8" in printed
    assert (tmp_path / "figures" / "regions_map.png").stat().st_size > 10_000


def test_record_that_is_there_is_made_again_only_when_asked_or_for_another_configuration(tmp_path, monkeypatch, capsys):
    options = ["--epochs", "1", "--results-dir", str(tmp_path)]
    trained = []
    train = regions.train
    monkeypatch.setattr(regions, "train", lambda *a, **k: trained.append(k["seed"]) or train(*a, **k))

    def runs(*more):
        trained.clear()
        assert regions.main([*options, *more]) == 0
        return len(trained)

    path = tmp_path / "runs" / "regions.npz"
    assert runs() == 2
    before = path.read_bytes()
    assert runs() == 0 and "finished before" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert runs("--force") == 2
    assert runs("--seed", "1") == 2
    assert runs() == 2, "the record is that of another seed"
    for damaged in (before[: len(before) // 2], b""):
        path.write_bytes(damaged)
        assert runs() == 2, "the record was cut short"


def test_grid_is_read_as_rows_of_y():
    """A layer that only looks at x must give columns."""
    import torch

    x = torch.linspace(0, 1, 3)
    y = torch.linspace(5, 6, 2)
    grid = regions.grid_points(x, y)
    assert grid.view(2, 3, 2)[:, :, 0].tolist() == [[0, 0.5, 1]] * 2
    assert grid.view(2, 3, 2)[:, :, 1].tolist() == [[5, 5, 5], [6, 6, 6]]


def test_the_picture_of_the_front_page_is_drawn_from_the_committed_record(tmp_path):
    """Byte for byte, by the version of the library that drew it."""
    root = Path(__file__).resolve().parents[2]
    installed = version("matplotlib")
    if f"matplotlib=={installed}\n" not in (root / "requirements.lock").read_text():
        pytest.skip(f"matplotlib {installed} is not that of requirements.lock, and another draws other bytes")
    (tmp_path / "runs").mkdir()
    shutil.copy(root / "results" / "runs" / "regions.npz", tmp_path / "runs")
    assert tables.main(["regions", "--runs-dir", str(tmp_path), "--results-dir", str(tmp_path)]) == 0
    for name in ("regions_map.png", "regions_map.svg"):
        drawn = (tmp_path / "figures" / name).read_bytes()
        assert drawn == (root / "results" / "figures" / name).read_bytes(), name
