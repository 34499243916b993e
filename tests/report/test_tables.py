"""Numbers of the tables worked by hand, the paper's cells beside them, and the same bytes from the same CSV."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tables import main
from fff.report.cells import label, read_runs, summarize
from fff.report.study import load, publish, report, studies
from tests.report.table_text import cells_of

ROOT = Path(__file__).resolve().parents[2]
SGD = {"_target_": "torch.optim.SGD", "lr": 0.2}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.001}


@pytest.fixture
def summary(update, results_dir):
    def make():
        update("study")
        return label(summarize(read_runs(results_dir / "runs" / "study.csv")))

    return make


def test_best_mean_and_sample_deviation(write_run, summary):
    for seed, ga in enumerate((0.8, 0.9, 1.0)):
        best = write_run(depth=1, seed=seed, ga=ga, leaves_used=1 + seed % 2)
    (cell,) = summary().to_dict("records")
    assert cell["n"] == 3
    assert cell["ga_best"] == 1.0
    assert cell["best_ga_run"] == best.parent.name
    assert cell["ga_mean"] == pytest.approx(0.9)
    assert cell["ga_std"] == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert cell["leaves_used"] == pytest.approx(4 / 3)


def test_diverged_runs_count(write_run, summary):
    write_run(depth=1, seed=0, ga=0.9)
    write_run(depth=1, seed=1, ga=0.1, diverged=True)
    write_run(depth=1, seed=2, ga=None, ma=None, diverged=True)
    (cell,) = summary().to_dict("records")
    assert (cell["n"], cell["diverged"]) == (3, 2)
    assert cell["ga_mean"] == pytest.approx(0.5)


def test_one_run_has_no_deviation(write_run, summary, results_dir):
    write_run(depth=1)
    assert math.isnan(summary()["ga_std"][0])
    assert "80.0 ± –" in publish(load("study", results_dir)).markdown


def test_settings_tell_cells_apart_and_say_no_more(write_run, summary):
    write_run(width=128)
    write_run(depth=4)
    # The optimiser changes with the mode and would say nothing new.
    write_run(depth=4, mode="straight_through", optimizer=ADAMW)
    write_run(depth=10, mode="straight_through", optimizer=ADAMW)
    cells = summary()
    assert list(zip(cells["layer"], cells["settings"], strict=True)) == [
        ("FeedForward", ""),
        ("FFF", "mode=soft, depth=4"),
        ("FFF", "mode=straight_through, depth=4"),
        ("FFF", "mode=straight_through, depth=10"),
    ]
    assert list(cells["family"]) == ["FeedForward", "FFF (soft)"] + ["FFF (straight_through)"] * 2


def test_a_recipe_stands_for_what_it_sets(write_run, results_dir, update):
    """Its optimiser, its mode and more: a table that named one of them alone would name it as the cause."""
    write_run(depth=4, recipe="paper")
    write_run(depth=4, mode="straight_through", optimizer=ADAMW, recipe="ours")
    write_run(depth=4, mode="straight_through", optimizer=SGD)
    update("study")
    cells = report(load("study", results_dir)).cells
    assert list(cells["settings"]) == ["", "recipe=ours", "recipe=paper"]
    assert list(cells["family"]) == ["FFF", "FFF (ours)", "FFF (paper)"]


def test_metrics_do_not_tell_cells_apart(write_run, summary):
    """nodes_below_0.10 is one, though its name has a dot as those of the configuration have."""
    for lr, share in ((0.1, 0.25), (0.2, 0.5)):
        write_run(depth=1, optimizer=SGD | {"lr": lr}, **{"nodes_below_0.10": share})
    assert list(summary()["settings"]) == ["lr=0.1", "lr=0.2"]


def test_seeds_do_not_tell_cells_apart(write_run, summary):
    """Runs of different single seeds have different data seeds too."""
    write_run(depth=1, seed=0)
    write_run(depth=2, seed=1)
    assert list(summary()["settings"]) == ["depth=1", "depth=2"]


def test_generic_table(write_run, summary, results_dir):
    write_run(width=128, seed=0)
    write_run(depth=4, seed=0, leaves_used=3, largest_leaf_share=0.5)
    summary()
    text = publish(load("study", results_dir)).markdown
    header = cells_of(text, "layer")
    tree = dict(zip(header, cells_of(text, "FFF"), strict=True))
    assert tree["leaves in use"] == "3.0 / 16"
    assert tree["largest %"] == "50.0"
    assert tree["GA best"] == "80.0"
    assert (tree["n"], tree["diverged"]) == ("1", "0")
    assert "settings" in header and "recipe" not in text
    dense = dict(zip(header, cells_of(text, "FeedForward"), strict=True))
    assert dense["leaves in use"] == dense["largest %"] == dense["GA soft"] == "–"


@pytest.fixture
def usps(write_run, update, results_dir):
    for seed, ga in enumerate((0.90, 0.92)):
        write_run("table1", depth=3, seed=seed, ga=ga, ma=0.99 + ga / 1000, leaves_used=2 - seed)
    write_run("table1", depth=3, mode="straight_through", optimizer=ADAMW, ga=0.931)
    write_run("table1", width=64)
    update("table1")
    return results_dir


def test_table1_sets_ours_beside_the_paper(usps):
    text = publish(load("table1", usps)).markdown
    glance, best, means, _, _, routing, runs = text.split("\n## ")[1:]
    assert cells_of(best, "model", "leaf width", "source") == ["16", "32", "64", "128"]
    # Leaf width 8, training width 64 in Tables 1 and 4 of the paper: 99.2 / 92.3, 99.2 ± 0.4 / 92.3 ± 0.7.
    assert cells_of(best, "FFF", "8", "paper")[2] == "99.2 / 92.3"
    assert cells_of(best, "FFF", "8", "paper's recipe") == ["–", "–", "99.1 / 92.0", "–"]
    assert cells_of(best, "FFF", "8", "our first recipe") == ["–", "–", "90.0 / 93.1", "–"]
    assert cells_of(best, "FF", "–", "paper")[0] == "100.0 / 93.1"
    assert cells_of(best, "FF", "–", "paper's recipe")[2] == "90.0 / 80.0"
    assert cells_of(means, "FFF", "8", "paper")[2] == "99.2 ± 0.4 / 92.3 ± 0.7"
    assert cells_of(means, "FFF", "8", "paper's recipe")[2] == "99.1 ± 0.0 / 91.0 ± 1.4"
    assert cells_of(routing, "leaves in use", "FFF", "8", "paper's recipe")[2] == "1.5 / 8"
    assert cells_of(routing, "GA hard / soft", "FFF", "8", "our first recipe")[2] == "93.1 / 70.0"
    assert cells_of(runs, "runs (diverged, capped)", "FFF", "8", "paper's recipe")[2] == "2 (0, 0)"
    assert cells_of(runs, "epochs", "FFF", "8", "paper's recipe")[2] == "30"
    assert "Hardware: a processor, device not recorded (4 runs)." in runs
    # 91 % of the tree less 80 % of the dense layer with its 64 units, and less 92.3 % of the paper; 1.5 of 8 leaves.
    against = ["1", "–", "–", "1 / 1", "+11.0"]
    assert cells_of(glance, "USPS", "paper's recipe") == [*against, "0 / 1", "-1.3", "–", "18.8", "18.8"]
    assert cells_of(glance, "USPS", "our first recipe")[5:8] == ["1 / 1", "+0.8", "–"]


def test_table1_compares_a_tree_with_the_dense_layers_of_its_recipe(write_run, update, results_dir):
    """Leaf width 4, depth 3: 7 neurons when it evaluates, 32 in training. By hand: 85 - 80, 85 - 90, 85 - 84 points."""
    for seed, ga in enumerate((0.84, 0.86)):
        write_run("table1", width=4, depth=3, seed=seed, ga=ga)
    for width, ga in ((7, 0.80), (4, 0.90), (32, 0.84)):
        write_run("table1", width=width, ga=ga)
    write_run("table1", width=7, optimizer=ADAMW, ga=0.1)
    update("table1")
    published = publish(load("table1", results_dir))
    glance, best, _, inference, small, *_ = published.markdown.split("\n## ")[1:]
    assert cells_of(inference, "paper's recipe", "4", "32", "7") == [
        *("85.0 ± 1.4", "80.0 ± –", "+5.0", "90.0 ± –", "-5.0", "84.0 ± –", "+1.0"),
    ]
    assert cells_of(glance, "USPS", "paper's recipe")[:5] == ["1", "1 / 1", "+5.0", "1 / 1", "+1.0"]
    assert cells_of(glance, "USPS", "our first recipe")[:5] == ["0", "–", "–", "–", "–"]
    assert cells_of(small, "7", "paper's recipe")[2:4] == ["80.0", "80.0 ± –"]
    assert cells_of(small, "4", "our first recipe") == ["–"] * 7
    # The small dense layers are no columns of the paper's table.
    assert cells_of(best, "model", "leaf width", "source") == ["16", "32", "64", "128"]


def test_table1_has_tables_of_the_data_sets_that_have_runs(write_run, update, results_dir):
    for data in ("fashion_mnist", "usps"):
        write_run("table1", depth=6, width=8, data=data, ga=0.875)
    update("table1")
    published = publish(load("table1", results_dir))
    titles = [part.partition("\n")[0].partition(":")[0] for part in published.markdown.split("\n## ")[2:]]
    assert titles == ["USPS"] * 6 + ["FashionMNIST"] * 6
    # Width 512, which no table of the paper has but its text: 97.1 / 88.1 on FashionMNIST.
    usps, fashion = (part for part in published.markdown.split("\n## ") if ": best of n" in part)
    assert cells_of(fashion, "FFF", "8", "paper")[-1] == "97.1 / 88.1"
    assert cells_of(fashion, "FFF", "8", "paper's recipe")[-1] == "90.0 / 87.5"
    assert cells_of(usps, "FFF", "8", "paper")[-1] == "–"
    figures = {path.stem for path in (results_dir / "figures").glob("*.svg")}
    assert {"table1_figure5", "table1_usps_size", "table1_fashion_mnist_paper"} <= figures
    assert not any("_mnist" in name.replace("fashion_mnist", "") for name in figures)


def test_table1_tells_recipes_by_their_name_where_a_run_has_one(write_run, update, results_dir):
    """Two versions of a recipe with one optimiser are two; what has no name and is no known one is told, not shown."""
    write_run("table1", depth=3, mode="straight_through", optimizer=ADAMW, ga=0.81)
    write_run("table1", depth=3, mode="gated", optimizer=ADAMW, ga=0.82, recipe="ours")
    write_run("table1", depth=3, mode="gated", optimizer=SGD, ga=0.83, recipe="mine")
    write_run("table1", depth=3, mode="gated", optimizer=ADAMW, ga=0.84, schedules={"balance_weight": [[0, 1.0]]})
    write_run("table1", depth=3, mode="soft", optimizer={**SGD, "lr": 0.1}, ga=0.85)
    update("table1")
    published = publish(load("table1", results_dir))
    best = published.markdown.split("\n## ")[2]
    for source, ga in (("our first recipe", "81.0"), ("our recipe", "82.0"), ("mine", "83.0")):
        assert cells_of(best, "FFF", "8", source)[2] == f"90.0 / {ga}"
    assert "paper's recipe" not in best.split("\n\n")[1]
    assert published.remarks == ["table1: 2 runs of no known recipe or layer are in no table"]


def test_table1_draws_no_recipe_whose_successor_was_run(write_run, update, results_dir):
    def panels():
        update("table1")
        drawn = report(load("table1", results_dir)).figures
        return [
            [axes.get_title() for axes in drawn[f"usps_{kind}"].axes if axes.get_title()] for kind in ("paper", "size")
        ]

    write_run("table1", depth=3, mode="straight_through", optimizer=ADAMW, ga=0.81)
    write_run("table1", depth=3, mode="gated", optimizer=ADAMW, ga=0.82, recipe="second")
    assert panels() == [["our first recipe", "our second recipe"]] * 2
    write_run("table1", depth=3, mode="soft", optimizer=ADAMW, ga=0.83, recipe="ours")
    assert panels() == [["our recipe"]] * 2


def test_table1_lends_a_dense_layer_to_the_recipe_that_trains_it_alike(write_run, update, results_dir):
    """A recipe that changes the layer alone has the dense layers of the one before, whose runs bear that one's name."""
    tree = {"width": 8, "depth": 1, "optimizer": ADAMW, "ga": 0.85}
    write_run("table1", **tree, mode="straight_through")
    write_run("table1", **tree, mode="gated", recipe="ours", schedules={"balance_weight": [[0, 1.0]]})
    write_run("table1", **tree, mode="soft", recipe="mine")
    write_run("table1", width=9, optimizer=ADAMW, ga=0.80)
    # "mine" has a dense layer of its own, and what was trained otherwise is lent to nobody.
    write_run("table1", width=9, optimizer={**ADAMW, "lr": 0.002}, ga=0.84, recipe="mine")
    write_run("table1", width=16, optimizer=SGD, ga=0.99)
    update("table1")
    inference = publish(load("table1", results_dir)).markdown.split("\n## ")[4]
    for source, gain in (("our first recipe", "+5.0"), ("our recipe", "+5.0"), ("mine", "+1.0")):
        cells = cells_of(inference, source, "8", "16", "9")
        assert (cells[2], cells[-1]) == (gain, "–")


def test_table1_without_any_reference_says_so_and_shows_missing_cells(usps, monkeypatch, capsys, runs_dir):
    import pandas as pd

    assert not publish(load("table1", usps)).remarks
    for module in ("paper", "studies.table1"):
        monkeypatch.setattr(f"fff.report.{module}.reference", lambda *_: pd.DataFrame())
    assert main(["table1", "--runs-dir", str(runs_dir), "--results-dir", str(usps)]) == 0
    printed = capsys.readouterr()
    assert cells_of(printed.out, "FFF", "8", "paper") == ["–"] * 4
    assert "no reference/table1_explorative.csv" in printed.err and "no reference/table4_means.csv" in printed.err


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_table1_refuses_to_mix_two_configurations(write_run, usps, runs_dir, capsys):
    """It names what to delete, and leaves nothing behind that would have to be deleted as well."""
    other = write_run("table1", depth=3, optimizer={"_target_": "torch.optim.SGD", "lr": 0.1}, recipe="paper")
    before = files_in(usps)
    options = ["table1", "--runs-dir", str(runs_dir), "--results-dir", str(usps)]
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "2 configurations" in said and "data=usps, recipe=paper, model=fff, leaf_width=8, width=64" in said
    for path in runs_dir.glob("table1/*/result.json"):
        mixed = path.parent.name.startswith("fff") and "SGD" in path.read_text()
        assert (path.parent.name in said) == mixed
    assert files_in(usps) == before
    shutil.rmtree(other.parent)
    assert main(options) == 0


def test_runs_on_other_rows_are_named_and_refused(write_run, runs_dir, results_dir, capsys):
    """Between the seeds of one cell and between cells alike; older records have no digest and agree with any."""
    write_run(depth=1, seed=0, digest="a" * 16)
    old = write_run(depth=1, seed=1)
    dense = write_run(width=64, digest="a" * 16)
    options = ["study", "--runs-dir", str(runs_dir), "--results-dir", str(results_dir)]
    assert main(options) == 0
    before = files_in(results_dir)
    for other in ({"depth": 1, "seed": 2}, {"width": 128}):
        capsys.readouterr()
        path = write_run(**other, digest="b" * 16)
        assert main(options) == 1
        said = capsys.readouterr().err
        assert f"data_digest {'b' * 16}: {path.parent.name}" in said and dense.parent.name in said
        assert old.parent.name not in said
        assert files_in(results_dir) == before
        shutil.rmtree(path.parent)
    write_run("other", depth=1, digest="b" * 16)
    assert main(["other", *options]) == 0


def test_runs_that_the_limit_of_epochs_ended_are_counted(write_run, summary):
    write_run(depth=1, seed=0, epochs=99)
    write_run(depth=1, seed=1, epochs=100)
    write_run(depth=1, seed=2, epochs=100, diverged=True)
    (cell,) = summary().to_dict("records")
    assert (cell["n"], cell["diverged"], cell["capped"]) == (3, 1, 1)


@pytest.mark.parametrize(
    "patience, stop_loss, capped", [(99, None, 1), (100, None, 0), (100, 0.3, 1), (101, None, 1), (None, None, 1)]
)
def test_a_length_that_was_settled_beforehand_is_no_cap(write_run, summary, patience, stop_loss, capped):
    write_run(epochs=100, patience=patience, stop_loss=stop_loss)
    assert summary()["capped"].tolist() == [capped]


def test_latex_escapes_and_has_every_row(usps):
    publish(load("table1", usps))
    text = (usps / "tables" / "table1.tex").read_text()
    assert r"99.2 $\pm$ 0.4 / 92.3 $\pm$ 0.7" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 7
    assert "–" not in text and "±" not in text


def test_same_csv_gives_the_same_bytes(usps, runs_dir):
    """A second process, other hash seed, no run directories."""
    blocks = (f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->" for name in ("generated lead", "generated"))
    (usps / "README.md").write_text("\n".join(["before", next(blocks), "findings", next(blocks), "after\n"]))

    def files():
        return {path: path.read_bytes() for path in usps.rglob("*") if path.is_file() and path.parent.name != "runs"}

    assert main(["table1", "--runs-dir", str(runs_dir), "--results-dir", str(usps)]) == 0
    first = files()
    assert {path.name for path in first} >= {
        *(f"table1.{kind}" for kind in ("md", "tex", "csv")),
        *(f"table1_usps_{name}.{kind}" for name in ("paper", "size", "leaves") for kind in ("svg", "png")),
        *("table1_figure5.svg", "table1_figure5.png"),
    }
    for path in first:
        if path.name != "README.md":
            path.unlink()
    subprocess.run(
        [sys.executable, "-m", "experiments.tables", "--runs-dir", "nowhere", "--results-dir", str(usps)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    assert files() == first
    readme = (usps / "README.md").read_text()
    assert readme.startswith("before") and readme.endswith("after\n") and "old" not in readme
    lead, _, rest = readme.partition("findings")
    assert "(figures/table1_usps_paper.svg)" in rest and "(figures/table1_usps_paper.svg)" not in lead
    assert "(figures/table1_usps_size.svg)" in lead
    assert "Trees against dense layers" in lead and "Trees against dense layers" in rest


def test_command_reports_and_goes_on(write_run, runs_dir, results_dir, capsys):
    write_run("a", depth=1)
    broken = write_run("a", depth=2)
    broken.write_text("{")
    options = ["--runs-dir", str(runs_dir), "--results-dir", str(results_dir)]
    assert main(["missing", "a", *options]) == 1
    printed = capsys.readouterr()
    assert "missing" in printed.err and str(broken) in printed.err
    assert cells_of(printed.out, "FFF")
    assert main(options) == 0
    assert studies(runs_dir, results_dir) == ["a"]


@pytest.mark.parametrize("name", ["a.csv", "a.history.csv"])
@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: "<<<<<<< HEAD\n" + text, lambda text: ""])
def test_committed_records_that_are_damaged_are_named(write_run, update, results_dir, capsys, name, damage):
    write_run("a")
    update("a")
    path = results_dir / "runs" / name
    path.write_text(damage(path.read_text()))
    assert main(["a", "--runs-dir", "nowhere", "--results-dir", str(results_dir)]) == 1
    assert f"error: {path}" in capsys.readouterr().err
    assert not (results_dir / "tables").exists()


def test_a_study_that_lacks_what_its_tables_show_does_not_stop_others(write_run, runs_dir, results_dir, capsys):
    write_run("clusters")
    write_run("z", depth=1)
    assert main(["--runs-dir", str(runs_dir), "--results-dir", str(results_dir)]) == 1
    assert "error: clusters: " in capsys.readouterr().err
    assert (results_dir / "tables" / "z.md").exists()


def test_command_without_records_says_so(tmp_path, capsys):
    assert main(["--runs-dir", str(tmp_path / "a"), "--results-dir", str(tmp_path / "b")]) == 1
    assert "no records" in capsys.readouterr().err


def test_command_without_the_extra_names_it():
    code = "import sys; sys.modules['pandas'] = None; import experiments.tables"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'fff[train]'" in result.stderr and "Traceback" not in result.stderr


def test_command_loads_no_torch():
    code = "import sys, experiments.tables; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
