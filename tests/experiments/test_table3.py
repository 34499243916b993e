"""The sweep of table 3 is what its comment says, and its layout has a place for each of its runs."""

from experiments import sweep
from experiments.config import build, identity
from fff.layers.contract import RoutedLayer
from fff.report import records
from fff.report.study import load, report

SIZES = ("training_width", "inference_width", "training_size", "inference_size")


def test_every_run_has_a_place_and_the_sizes_of_the_paper(plan, make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "check_data", lambda node: None)
    tables, mixtures = plan("experiment=table3"), plan("experiment=table3", "layer=moe,moe_switch", "leaf_width=16")
    assert (tables.combinations, len(tables.jobs)) == (60, 24)
    rows, layers = [], []
    for job in [*tables.jobs, *mixtures.jobs]:
        cfg = make_config(*job.overrides)
        layers.append((cfg.recipe, cfg.layer._target_.removeprefix("fff.")))
        model = build(cfg.model)(make_ff=build(cfg.layer), in_shape=(3, 32, 32), num_classes=10)
        sizes = [module.size for module in model.modules() if isinstance(module, RoutedLayer)]
        metrics = {"ga": 0.5, **{name: sum(getattr(size, name) for size in sizes) for name in SIZES}}
        record = {"schema": 1, "status": "finished", "study": "table3", "recipe": cfg.recipe, "seed": 0}
        record |= {"run_id": job.run_dir.name, "config_hash": job.config_hash}
        rows.append(records.flatten(record | {"config": identity(cfg), "metrics": metrics}))
    # The recipes differ in trees alone.
    assert {key: layers.count(key) for key in layers} == {
        ("paper_vit_5", "FFF"): 6,
        ("paper_vit_10", "FFF"): 6,
        ("paper_vit_5", "FeedForward"): 11,
        ("paper_vit_5", "NoFeedForward"): 1,
        ("paper_vit_5", "MoE"): 2,
    }

    records.write(tmp_path / "runs/table3.csv", records.csv_text(rows, records.columns(rows)))
    found = report(load("table3", tmp_path))
    beside, against = found.tables[0].frame, found.tables[1].frame
    assert not found.remarks and len(beside) == 6 + 11 + 1 + 2
    assert not (beside["paper's recipe, h = 5"] == "–").any()
    assert not (against[["Δ dense, training width", "Δ dense, inference size", "Δ none"]] == "–").any(axis=None)
    # Sizes of ours, which a line shows where both are there, are those of the paper.
    trees = beside[beside["layer"] == "tree"]
    assert list(trees["training size"]) == ["131", "135", "143", "159", "191", "255"]
    assert list(trees["inference size"]) == ["34", "19", "12", "9", "8", "8"]
    assert list(beside.loc[beside["layer"].str.startswith("mixture"), "leaf width"]) == ["16", "16"]


def test_the_paper_halves_its_rate_on_the_validation_accuracy(make_config):
    cfg = identity(make_config("experiment=table3", "recipe=paper_vit_10", "layer=fff"))
    assert cfg["task"]["plateau"] == "val" and cfg["task"]["lr_schedule"]["patience"] == 50
    assert (cfg["layer"]["mode"], cfg["layer"]["hardening_weight"]) == ("soft", 10.0)
    assert (cfg["data"]["name"], cfg["data"]["augment"]) == ("cifar10", "affine_flips")
    assert cfg["trainer"]["max_epochs"] == cfg["task"]["patience"] == 30
    assert not {"plateau", "augment"} & {*identity(make_config())["task"], *identity(make_config())["data"]}, (
        "they would rename every run of the past"
    )
