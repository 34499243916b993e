"""Load balancing and master leaf: their files beside ours, and the dense layers that a gain is measured against."""

import pytest

from fff.report.paper import reference
from fff.report.study import load, publish
from tests.report.table_text import cells_of

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.001}


@pytest.fixture
def sections(write_run, update, results_dir):
    def make():
        update("efff")
        return publish(load("efff", results_dir)).markdown.split("\n## ")[1:]

    return make


def test_theirs_are_those_of_their_files(write_run, sections, results_dir):
    write_run("efff", data="fashion_mnist", width=16, depth=3, optimizer=ADAMW, ma_soft=0.97)
    write_run("efff", data="mnist", width=8, depth=1, optimizer=ADAMW, master_width=8)
    mnist, fashion = (part for part in sections() if "theirs and ours" in part)
    # Nine complete runs with balance weight 1; their best checkpoint, 87.38, is of a run without.
    theirs = cells_of(fashion, "tree", "16", "128")
    assert theirs[:2] == ["86.9", "86.6 ± 0.2 (9)"] and theirs[5:7] == ["93.6 ± 1.1 (9)", "97.0 ± –"]
    assert cells_of(fashion, "tree", "64", "128")[:3] == ["88.8", "–", "–"]
    assert cells_of(mnist, "tree + master leaf", "8", "16")[:4] == ["94.8", "–", "80.0", "80.0 ± –"]
    # The logs know nothing of the master leaf, and two of them, ten runs each, are of one tree.
    assert cells_of(mnist, "tree", "8", "16")[1] == "91.1 ± 2.0 (20)"
    assert len(reference("efff_best_models", results_dir)) == 23


def test_a_tree_is_measured_against_one_leaf_the_master_leaf_and_both(write_run, sections):
    tree = {"data": "mnist", "width": 2, "depth": 3, "optimizer": ADAMW}
    write_run("efff", **tree, ga=0.90)
    write_run("efff", **tree, master_width=8, ga=0.94, leaves_used=6)
    for units, ga in ((2, 0.50), (8, 0.92), (10, 0.95)):
        write_run("efff", data="mnist", width=units, optimizer=ADAMW, ga=ga)
    _, dense, routing, units = sections()
    assert cells_of(dense, "tree + master leaf", "2", "16") == [
        *("94.0 ± –", "50.0 ± –", "+44.0", "92.0 ± –", "+2.0", "95.0 ± –", "-1.0"),
    ]
    assert cells_of(dense, "tree", "2", "16")[4] == "-2.0"
    assert cells_of(routing, "tree + master leaf", "2", "16")[1] == "6.0 / 8"
    assert cells_of(units, "10")[1] == "95.0 ± –"


def test_without_their_files_it_says_so(write_run, update, results_dir, monkeypatch):
    import pandas as pd

    write_run("efff", data="mnist", depth=1, optimizer=ADAMW)
    update("efff")
    for module in ("paper", "studies.efff"):
        monkeypatch.setattr(f"fff.report.{module}.reference", lambda *_: pd.DataFrame())
    published = publish(load("efff", results_dir))
    assert cells_of(published.markdown, "tree", "8", "16")[:3] == ["–", "–", "80.0"]
    assert len(published.remarks) == 2
