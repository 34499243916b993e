"""The tables of the language model: bits and cost by layer, and what leaves know of characters, counted by hand."""

import numpy as np
import pandas as pd
import pytest

from fff.report import figures, tables
from fff.report.cells import read_runs
from fff.report.routes import pack
from fff.report.studies import shakespeare
from fff.report.study import StudyData
from tests.report.table_text import cells_of

TREE = {"layer._target_": "fff.FFF", "layer.depth": 1, "layer.leaf_width": 8, "layer.mode": "soft", "layer.top_k": 1}
DENSE = {"layer._target_": "fff.FeedForward", "layer.hidden_features": 16}
NONE = {"layer._target_": "fff.NoFeedForward"}
ULTRA = {"layer._target_": "fff.UltraFFF", "layer.depth": 6, "layer.num_trees": 9}


def routes(count, repeated=0.75, shared=np.nan, shared_chance=np.nan):
    """One layer; the two classes of `count` (2, E) are the first two."""
    full = np.zeros((1, 8, len(count[0])), dtype=np.int32)
    full[0, :2] = count
    classes = np.array([f"class {i}" for i in range(8)])
    shares = {"repeated": repeated, "shared": shared, "shared_chance": shared_chance}
    named = {name: np.array([share]) for name, share in shares.items()}
    return {"count": full, **named, "layer": np.array([1]), "classes": classes}


@pytest.fixture
def report(tmp_path):
    """report(*runs): each a layer, its test loss, and its routes or None."""

    def make(*runs):
        rows = [
            {
                "run_id": f"run{i}",
                "seed": i,
                "cell": str(sorted(layer.items())),
                "metrics.test_loss": loss,
                "metrics.bits_per_character": loss / np.log(2),
                "metrics.perplexity": np.exp(loss),
                "metrics.test_loss_soft": loss - 0.1 if layer == TREE else "",
                "metrics.val_loss": loss,
                "metrics.val_epochs": 2,
                "metrics.test_accuracy": 0.5,
                "metrics.tokens_per_second": 1000 + i,
                "metrics.active_parameters": 77,
                "metrics.parameters": 1234,
                "metrics.num_leaves": 8 if layer in (TREE, ULTRA) else 4,
                "metrics.training_width": layer.get("layer.hidden_features", 0),
                "metrics.leaves_used": 3,
                "wall_time_s": 1,
                "data.context": 128,
                "hardware.threads": 1 + i % 2,
                **layer,
            }
            for i, (layer, loss, _) in enumerate(runs)
        ]
        path = tmp_path / "runs.csv"
        pd.DataFrame([{name: str(value) for name, value in row.items()} for row in rows]).to_csv(path, index=False)
        found = read_runs(path)
        kept = {f"run{i}": arrays for i, (_, _, arrays) in enumerate(runs) if arrays is not None}
        history = pd.DataFrame(
            [
                {"cell": cell, "epoch": epoch, "train_loss": 3 - epoch, "val_loss": 3.5 - epoch}
                for cell in found["cell"].unique()
                for epoch in (1, 2)
            ]
        )
        archive = pack(kept) if kept else b""
        with figures.style():
            made = shakespeare.report(StudyData("shakespeare", found, history, tmp_path, archive))
            drawn = {name: figures.save(figure)["svg"].decode() for name, figure in made.figures.items()}
        return made, "\n".join(map(tables.markdown, made.tables)), drawn

    return make


def test_layers_stand_beside_each_other_with_their_loss_and_cost(report):
    runs = (TREE, 1.0, routes([[1, 1], [1, 1]])), (TREE, 1.2, None), (DENSE, 0.9, None), (NONE, 2.0, None)
    made, text, drawn = report(*runs)
    tree = cells_of(text, "FFF, 2 x 8, soft")
    assert tree == ["1.100 ± 0.141", "1.587 ± 0.204", "3.02", "1,234", "77", "1,000", "3.0 / 8", "2"]
    assert cells_of(text, "dense, 16 units")[0] == "0.900 ± –" and cells_of(text, "none")[-2:] == ["–", "1"]
    order = [text.index(f"| {name}") for name in ("dense, 16 units", "none", "FFF, 2 x 8, soft")]
    assert order == sorted(order)
    detail = cells_of(tables.markdown(made.tables[1]), "FFF, 2 x 8, soft")
    assert detail[3] == "1.000" and detail[4] == "50.0"
    assert not made.remarks and set(drawn) == {"curves", "routing"}
    assert ">validation<" in drawn["curves"] and ">dense, 16 units<" in drawn["curves"]


@pytest.mark.parametrize(
    "count, chance, told",
    [
        ([[5, 0], [0, 5]], "50.0", "100.0"),  # each leaf knows one class
        ([[3, 3], [1, 1]], "50.0", "0.0"),  # the leaf says nothing
        ([[4, 0], [4, 0]], "100.0", "0.0"),  # all go to one
        # Shares 3/4 and 1/4; the second leaf knows its class: ln 2 - 3/4 H(1/3) of ln 2.
        ([[2, 0], [1, 1]], "62.5", "31.1"),
    ],
)
def test_what_a_leaf_tells_of_the_class_of_a_character(report, count, chance, told):
    _, text, drawn = report((TREE, 1.0, routes(count, repeated=0.75)))
    assert cells_of(text, "FFF, 2 x 8, soft", "1") == ["75.0", chance, "–", "–", told]
    assert ">class 0<" in drawn["routing"]


def test_two_choices_have_shares_of_their_own(report):
    _, text, _ = report(
        (TREE, 1.0, routes([[1, 1], [1, 1]], 0.25, 0.6, 0.5)), (TREE, 1.0, routes([[2, 0]] * 2, 0.35, 0.8, 0.7))
    )
    assert cells_of(text, "FFF, 2 x 8, soft", "1") == ["30.0", "75.0", "70.0", "60.0", "0.0"]


def test_what_a_leaf_has_of_a_class_is_set_against_its_load():
    # Leaf 0 has 3 of 4 characters: half of the first class and all of the second. The third is not in the text.
    # A leaf without characters is shown, the last one too.
    found = shakespeare._excess(np.array([[1, 1, 0], [2, 0, 0], [0, 0, 0]]))
    assert found.tolist() == [[-25, 25, 0], [25, -25, 0], [0, 0, 0]]


def test_the_notes_tell_what_loss_and_speed_depend_on(report):
    made, _, _ = report((TREE, 1.0, None), (DENSE, 1.0, None))
    assert all("in windows of 128 characters" in table.note for table in made.tables)
    assert "(CPU threads: 1 or 2)" in made.tables[0].note


def test_a_layer_whose_runs_kept_no_routes_is_told(report):
    made, text, drawn = report((TREE, 1.0, None), (ULTRA, 1.0, None))
    assert len(made.remarks) == 2 and "keep_routes" in made.remarks[0] and set(drawn) == {"curves"}
    assert cells_of(text, "UltraFFF, 9 x 64")


def test_two_configurations_of_one_layer_are_refused(report):
    with pytest.raises(ValueError, match=r"2 configurations for one place of the table \(model=FFF, 2 x 8, soft\)"):
        report((TREE, 1.0, None), (TREE | {"layer.hardening_weight": 1.0}, 1.0, None))


def test_a_study_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        shakespeare.report(StudyData("shakespeare", pd.DataFrame(), pd.DataFrame(), tmp_path))
