"""The search: settings ranked by validation accuracy alone."""

import pytest

from fff.report.studies import search
from fff.report.study import load, publish
from tests.report.table_text import cells_of

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.01}


def test_settings_are_ranked_by_validation_and_defaults_are_told(write_run, update, results_dir):
    for seed in (0, 1):
        write_run("search", depth=2, optimizer=ADAMW, seed=seed, val_accuracy=0.90 + seed / 100, ga=None)
        write_run(
            "search",
            depth=2,
            optimizer=ADAMW | {"weight_decay": 0.3},
            seed=seed,
            val_accuracy=0.92 + seed / 100,
            ga=None,
        )
        write_run("search", depth=2, optimizer=ADAMW, more={"runner_up": True}, seed=seed, val_accuracy=0.97, ga=None)
        write_run("search", width=64, optimizer=ADAMW, seed=seed, val_accuracy=0.99, ga=None)
    update("search")
    best, trees, dense = publish(load("search", results_dir)).markdown.split("\n## ")[1:]
    header, _, *lines = [line for line in trees.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert [name.strip() for name in header.strip("|").split("|")][-4:] == ["validation", "MA", "leaves in use", "n"]
    assert ["97.00 ± 0.00" in lines[0], "92.50 ± 0.71" in lines[1], "90.50 ± 0.71" in lines[2]] == [True] * 3
    assert "true" in lines[0] and "false" in lines[1] and "0.3" in lines[1] and "0.01" in lines[2]
    found = cells_of(best, "trees of leaf width 8")
    assert found[0] == "3" and "runner up true" in found[1] and found[2] == "97.00 ± 0.00"
    assert cells_of(best, "dense layers of 64 units")[2] == "99.00 ± 0.00"
    assert "Dense layers of 64 units" in dense and "GA" not in best + dense + trees


def test_no_rows_are_an_error(results_dir):
    with pytest.raises(ValueError, match="no rows"):
        search.report(load("search", results_dir))
