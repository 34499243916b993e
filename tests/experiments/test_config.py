"""Every file composes and builds; a run is known by what it computes, not by how or where it was asked for."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from experiments import config
from experiments.config import build, config_hash, config_path, explain, identity, run_id, tree_depth

CONF = Path(config_path())
GROUPS = ["layer", "model", "task", "data", "trainer", "logger", "recipe", "experiment"]
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
EXTRAS = {"tensorboard": "tensorboard"}


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_composes_and_builds(make_config, tmp_path, group, option):
    cfg = make_config(f"{group}={option}")
    identity(cfg)
    if option in EXTRAS:
        pytest.importorskip(EXTRAS[option])
    for node in ("layer", "model", "task", "data"):
        build(cfg[node])
    if cfg.logger:
        build(cfg.logger, save_dir=str(tmp_path))


@pytest.mark.parametrize("launcher, plugin", [("basic", None), ("joblib", "joblib"), ("slurm", "submitit")])
def test_every_launcher_composes(make_config, launcher, plugin):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher" if plugin else "hydra")
    settings = ["launcher.n_jobs=3"] if plugin else []
    cfg = make_config(f"launcher={launcher}", *settings)
    assert identity(cfg) == identity(make_config())


@pytest.mark.parametrize("recipe", [option for group, option in OPTIONS if group == "recipe"])
def test_a_recipe_bears_the_name_of_its_file_and_the_name_is_no_part_of_a_run(make_config, recipe):
    cfg = make_config(f"recipe={recipe}")
    assert cfg.recipe == recipe and make_config().recipe is None
    named = name(cfg)
    with open_dict(cfg):
        cfg.recipe = "another"
    assert name(cfg) == named and "recipe" not in identity(cfg)


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_recipe_specialises_the_layer_and_the_command_line_wins(make_config, recipe):
    mode = {"paper": "soft", "ours": "straight_through"}[recipe]
    assert make_config(f"recipe={recipe}", "layer=fff").layer.mode == mode
    assert "mode" not in make_config(f"recipe={recipe}", "layer=feedforward").layer
    assert make_config(f"recipe={recipe}", "layer.mode=gated").layer.mode == "gated"


@pytest.mark.parametrize("recipe", ["cifar", "ours"])
@pytest.mark.parametrize("first", ["feedforward", "moe"])
def test_a_recipe_trains_all_options_of_one_class_alike(make_config, recipe, first):
    """A dense control as wide as a leaf must not be regularised otherwise than the dense layer beside it."""
    options = [option for group, option in OPTIONS if group == "layer" and option.split("_")[0] == first]
    trained = {option: make_config(f"recipe={recipe}", f"layer={option}").task for option in options}
    assert len(trained) > 3
    assert all(task.optimizer == trained[first].optimizer for task in trained.values())
    assert all(task.label_smoothing == trained[first].label_smoothing for task in trained.values())


@pytest.mark.parametrize("data", ["usps", "mnist", "fashion_mnist", "digits"])
def test_our_recipe_trains_to_the_end_of_its_schedule(make_config, data):
    """Also where a study has a budget of its own, and where the command line changes the length."""
    for more in ([], ["experiment=table1"], ["experiment=table1", "trainer.max_epochs=7"]):
        cfg = make_config("recipe=ours", f"data={data}", *more)
        assert cfg.task.lr_schedule.T_max == cfg.trainer.max_epochs == cfg.task.patience
    assert make_config("recipe=paper", f"data={data}").task.patience == 50
    assert make_config("recipe=ours", f"data={data}", "experiment=debug").trainer.max_epochs == 1


def test_the_temperature_of_our_recipe_falls_to_a_tenth_from_what_the_depth_tells(make_config):
    def schedules(*overrides):
        return identity(make_config("layer=fff", "width=64", *overrides))["task"].get("schedules")

    ours = schedules("recipe=ours", "leaf_width=1", "trainer.max_epochs=7")["temperature"]
    assert [epoch for epoch, _ in ours] == [0, 7] and [t for _, t in ours] == pytest.approx([1.5, 0.15])
    assert schedules("recipe=ours", "leaf_width=8")["temperature"][0] == [0, 0.75]
    assert not schedules("recipe=second", "leaf_width=8")


@pytest.mark.parametrize("data", ["usps", "mnist", "fashion_mnist"])
def test_our_second_recipe_is_ours_at_one_temperature(make_config, data):
    ours, second = (identity(make_config(f"recipe={name}", f"data={data}", "layer=fff")) for name in ("ours", "second"))
    ours["task"]["schedules"] = second["task"]["schedules"]
    assert ours == second


@pytest.mark.parametrize(
    "layer, base",
    [
        *((f"feedforward_inference{kind}", "feedforward") for kind in ("", "_size", "_master")),
        *((f"fff_{kind}", "fff") for kind in ("soft", "master")),
    ],
)
def test_variants_spell_out_the_defaults_of_their_layer(make_config, layer, base):
    assert list(make_config(f"layer={layer}").layer) == list(make_config(f"layer={base}").layer)


def test_the_tree_of_our_recipe_has_two_names(make_config):
    """What it makes of layer=fff is a tree with runner-up, and that is trained alike where it is named so."""
    tree, named = (identity(make_config("recipe=ours", f"layer={name}")) for name in ("fff", "fff_runner_up"))
    assert tree == named and tree["layer"]["runner_up"]


@pytest.mark.parametrize("width, leaf_width, units", [(128, 8, 12), (16, 8, 9), (128, 1, 8), (16, 1, 5), (8, 8, 8)])
def test_a_dense_layer_of_the_inference_size_of_a_tree(make_config, width, leaf_width, units):
    sizes = f"width={width}", f"leaf_width={leaf_width}"
    assert identity(make_config("layer=feedforward_inference_size", *sizes))["layer"]["hidden_features"] == units
    tree = build(make_config("layer=fff", *sizes).layer)(4)
    assert tree.size.inference_size == units


def test_a_dense_layer_as_wide_as_what_a_tree_with_a_master_leaf_evaluates(make_config):
    tree = build(make_config("layer=fff_master", "leaf_width=2").layer)(4)
    dense = build(make_config("layer=feedforward_inference_master", "leaf_width=2").layer)(4)
    assert dense.size.training_width == tree.size.inference_width == 10


def test_a_width_that_is_no_tree_has_no_inference_size_either(make_config):
    with pytest.raises(Exception) as error:
        identity(make_config("layer=feedforward_inference_size", "width=12"))
    assert explain(error.value).startswith("layer.hidden_features: width=12 must be leaf_width=8 times a power of two")


def test_the_phases_of_load_balancing_reach_trees_alone(make_config):
    for layer, phases in (("fff", True), ("fff_master", True), ("feedforward_inference", False)):
        task = identity(make_config("recipe=efff", f"layer={layer}"))["task"]
        assert bool(task["schedules"]) == phases and task["restart_from_best"] == [20]
    assert "restart_from_best" not in identity(make_config())["task"], "it would rename every run of the past"


def test_the_files_of_a_wheel_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "__file__", str(tmp_path / "site-packages/fff/experiments/config.py"))
    assert config.config_path() == str(tmp_path / "site-packages/fff/conf")


def test_depth_follows_the_widths_unless_it_is_given(make_config):
    assert identity(make_config("width=64", "leaf_width=4"))["layer"]["depth"] == 4
    assert identity(make_config("width=12", "layer.depth=5"))["layer"]["depth"] == 5


@pytest.mark.parametrize("width, leaf_width, depth", [(8, 8, 0), (128, 8, 4), (16, 1, 4)])
def test_tree_depth(width, leaf_width, depth):
    assert tree_depth(width, leaf_width) == depth


@pytest.mark.parametrize("width, leaf_width", [(12, 8), (24, 8), (4, 8), (0, 8), (8, 0), (-8, 8)])
def test_tree_depth_names_both_widths(width, leaf_width):
    with pytest.raises(ValueError, match=f"width={width} .*leaf_width={leaf_width} "):
        tree_depth(width, leaf_width)


def name(cfg):
    return run_id(identity(cfg))


def test_run_id_does_not_depend_on_the_words_of_the_request(make_config):
    reference = name(make_config("layer=feedforward", "seed=1"))
    assert reference.startswith("feedforward-digits-s1-")
    assert name(make_config("seed=1", "layer=feedforward")) == reference
    assert (
        name(make_config("layer=feedforward", "seed=1", "layer.hidden_features=128", "trainer.max_epochs=100"))
        == reference
    )
    assert name(make_config("layer=feedforward", "seed=1", "width=256", "layer.hidden_features=128")) == reference
    assert name(make_config("layer=feedforward", "seed=1", "leaf_width=2")) == reference
    assert (
        run_id(identity(make_config("seed=1", "layer=feedforward")))
        in make_config("layer=feedforward", "seed=1", "logger=csv", "logger.name=${run_id:}").logger.name
    )


@pytest.mark.parametrize(
    "override",
    [
        "threads=2",
        "force=true",
        "study=other",
        "runs_dir=elsewhere",
        "logger=csv",
        "trainer.progress_bar=true",
        "trainer.checkpoint_every=1",
    ],
)
def test_run_id_does_not_depend_on_how_a_run_is_executed(make_config, override):
    assert name(make_config(override)) == name(make_config())


def test_run_id_does_not_depend_on_where_the_data_lie(make_config, monkeypatch):
    for data in ("usps", "random_labels"):
        monkeypatch.delenv("FFF_DATA_DIR", raising=False)
        here = name(make_config(f"data={data}"))
        monkeypatch.setenv("FFF_DATA_DIR", "/somewhere")
        assert name(make_config(f"data={data}")) == here


def test_a_part_of_the_rows_is_another_run_and_all_of_them_the_run_of_the_past(make_config):
    assert "num_rows" not in identity(make_config("data=random_labels"))["data"], (
        "it would rename every run of the past"
    )
    part = identity(make_config("experiment=random_labels", "data@data.data=cifar10"))
    assert part["data"]["num_rows"] == 11111 and part["data"]["data"]["name"] == "cifar10"
    assert part["task"]["optimizer"]["weight_decay"] == 0 and part["task"]["test"] is False
    assert part["task"]["patience"] == part["task"]["lr_schedule"]["T_max"] == part["trainer"]["max_epochs"]


@pytest.mark.parametrize(
    "override", ["seed=1", "width=64", "layer=moe", "layer.drop=0.1", "task.optimizer.lr=0.1", "data=usps"]
)
def test_run_id_depends_on_what_is_computed(make_config, override):
    assert name(make_config(override)) != name(make_config())


def test_hash_is_that_of_the_past(make_config):
    """Results on disk and in the committed tables are found by this hash; a change of its making orphans them all."""
    assert config_hash({"seed": 1, "layer": {"depth": 2, "drop": 0.1}}).startswith("faf3cfcede")


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["trainer.devices=2"], "trainer.devices=2: a run trains on one device"),
        (["layer._target_=null"], "layer has no _target_"),
        (["width=12"], "layer.depth: width=12 must be leaf_width=8 times a power of two"),
    ],
)
def test_what_is_refused(make_config, overrides, line):
    with pytest.raises(Exception) as error:
        identity(make_config(*overrides))
    assert explain(error.value).startswith(line)


def test_the_configuration_is_left_as_it_was(make_config):
    cfg = make_config()
    before = OmegaConf.to_yaml(cfg)
    identity(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    with open_dict(cfg):
        cfg.seed = 5
    assert identity(cfg)["data"]["seed"] == 5
