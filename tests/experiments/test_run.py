"""One run in this process: its record, what makes it run or be skipped, and a resume that changes nothing."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Callback

from experiments import provenance, sweep
from experiments.check import ConfigError
from experiments.config import config_hash, config_path, identity
from experiments.run import CHECKPOINT, run, summary
from experiments.store import ERROR, RESULT, ROUTES, lock

EXPERIMENTS = sorted(path.stem for path in Path(config_path(), "experiment").glob("*.yaml"))
NUM_RUNS = {"debug": 1, "demo": 24, "table1": 620, "efff": 72, "routing": 45, "shakespeare": 45}
QUICK = ["trainer.max_epochs=2", "width=16", "trainer.accelerator=cpu"]
NOISY = ["layer=fff_straight_through", "layer.drop=0.2", "layer.region_leak=0.1"]


def read(outcome):
    return json.loads((outcome.run_dir / RESULT).read_text())


@pytest.fixture
def finished(make_config):
    cfg = make_config(*QUICK)
    outcome = run(cfg)
    assert outcome.status == "finished", outcome.error
    return cfg, outcome


def test_record(finished):
    cfg, outcome = finished
    record = read(outcome)
    assert record["config"] == identity(cfg) and record["config_hash"] == config_hash(identity(cfg))
    assert record["run_id"] == outcome.run_dir.name and outcome.run_dir.parent.name == record["study"] == "scratch"
    assert record["seed"] == 0 and record["schema"] == 1 and record["resumed"] is False
    assert {"ma", "ga", "leaves_used", "diverged"} <= set(record["metrics"]) and record["metrics"]["epochs"] == 2
    assert len(record["history"]["val_accuracy"]) == 2
    assert record["hardware"]["threads"] == 1 and record["hardware"]["cpu"] and record["versions"]["torch"]
    assert record["hardware"]["device"] == "cpu" and len(record["data_digest"]) == 16
    assert record["wall_time_s"] > 0 and record["backend"] and "git_commit" in record
    assert [path.name for path in outcome.run_dir.iterdir()] == [RESULT]
    assert "ga " in summary(record) and "leaves" in summary(record)


def test_dense_layers_of_a_deep_model_have_no_leaves_to_tell(finished):
    record = read(finished[1])
    record["metrics"] |= {"num_leaves": 4, "leaves_used": 4, "training_width": 512, "inference_width": 512}
    assert "leaves" not in summary(record)


def test_a_finished_run_is_skipped_unless_forced(finished, make_config):
    _, outcome = finished
    written = (outcome.run_dir / RESULT).stat().st_mtime_ns
    assert run(make_config(*QUICK)).status == "skipped"
    assert (outcome.run_dir / RESULT).stat().st_mtime_ns == written
    before = read(outcome)["metrics"]
    assert run(make_config(*QUICK, "force=true")).status == "finished"
    assert (outcome.run_dir / RESULT).stat().st_mtime_ns != written
    assert read(outcome)["metrics"] == before  # the same seed


def test_routes_are_kept_where_they_are_asked_for(make_config, monkeypatch):
    """One row of them for each test row; a run that is made again does not leave those of the run before."""
    import fff.tasks

    routed = [*QUICK, "task.keep_routes=true"]
    outcome = run(make_config(*routed))
    record = read(outcome)
    assert record["routes"] == ROUTES
    assert sorted(path.name for path in outcome.run_dir.iterdir()) == [RESULT, ROUTES]
    with np.load(outcome.run_dir / ROUTES) as routes:
        load = np.bincount(routes["index"][:, 0], minlength=record["metrics"]["num_leaves"])
    assert load.tolist() == record["metrics"]["leaf_load"]
    before = (outcome.run_dir / ROUTES).read_bytes()
    monkeypatch.setattr(fff.tasks.Classification, "results", lambda self, data: 1 / 0)
    assert run(make_config(*routed, "force=true")).status == "failed"
    assert read(outcome) == record and (outcome.run_dir / ROUTES).read_bytes() == before, "until there are others"
    monkeypatch.undo()
    assert run(make_config(*routed, "force=true")).status == "finished"
    assert (outcome.run_dir / ROUTES).read_bytes() == before, "the same seed"
    monkeypatch.setattr(fff.tasks.Classification, "routes", lambda self, data: None)
    assert run(make_config(*routed, "force=true")).status == "finished" and not (outcome.run_dir / ROUTES).exists()


def test_a_truncated_record_is_reported_and_run_again(finished, make_config, capsys):
    _, outcome = finished
    whole = (outcome.run_dir / RESULT).read_bytes()
    (outcome.run_dir / RESULT).write_bytes(whole[: len(whole) // 2])
    assert run(make_config(*QUICK)).status == "finished"
    assert f"{outcome.run_dir / RESULT} is unreadable" in capsys.readouterr().err
    assert read(outcome)["metrics"] == json.loads(whole)["metrics"]


def test_a_run_of_another_process_is_left_alone(make_config):
    cfg = make_config(*QUICK)
    outcome = run(make_config(*QUICK, "+layer.beam_width=-1"))
    assert outcome.status == "failed"
    with lock(outcome.run_dir):
        assert run(make_config(*QUICK, "+layer.beam_width=-1")).status == "busy"
    assert run(cfg).status == "finished"


def test_a_failed_run_leaves_its_traceback_and_may_succeed_later(make_config, monkeypatch):
    import fff.tasks

    monkeypatch.setattr(fff.tasks.Classification, "results", lambda self, data: 1 / 0)
    outcome = run(make_config(*QUICK))
    assert (outcome.status, outcome.error) == ("failed", "ZeroDivisionError: division by zero")
    assert "Traceback" in (outcome.run_dir / ERROR).read_text() and not (outcome.run_dir / RESULT).exists()
    monkeypatch.undo()
    assert run(make_config(*QUICK)).status == "finished"
    assert not (outcome.run_dir / ERROR).exists()


def test_a_result_of_other_rows_is_told_when_it_is_skipped(finished, make_config, plan, capsys, monkeypatch):
    cfg, outcome = finished
    path = outcome.run_dir / RESULT
    assert run(cfg).status == "skipped" and not capsys.readouterr().err
    path.write_text(path.read_text().replace(read(outcome)["data_digest"], "0123456789abcdef"))
    assert run(cfg).status == "skipped"
    assert f"{path}: it was computed on rows of digest 0123456789abcdef" in capsys.readouterr().err
    assert plan(*QUICK).finished == {outcome.run_dir}
    assert f"1 finished runs were computed on other rows than the data hold now, {path}" in capsys.readouterr().err


def test_a_missing_set_is_told_once_and_before_anything_starts(make_config, plan, tmp_path, monkeypatch):
    for name in ("FFF_DATA_DIR", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome = run(make_config("data=svhn"))
    assert outcome.status == "failed" and outcome.error.startswith("FileNotFoundError: data set 'svhn' not found")
    with pytest.raises(ConfigError, match="data set 'usps' not found: .*data=random_labels"):
        plan("data=digits,random_labels", "seed=0,1")
    with pytest.raises(ConfigError, match="'tiny_shakespeare' not found: neither as .*input.txt"):
        plan("data=digits,tiny_shakespeare")
    (tmp_path / "wikitext").mkdir()
    for place, missing in (("null", "data set 'wikitext'"), (tmp_path, "tokenizer='openai-community/gpt2'")):
        with pytest.raises(ConfigError, match=f"{missing} not found"):
            plan("experiment=shakespeare", "data=wikitext", "model=gpt_small", f"data.root={place}")


def test_the_commit_is_that_of_the_code_and_taken_before_the_training(make_config, monkeypatch, tmp_path):
    import fff.tasks

    (tmp_path / "experiments").mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "experiments" / "provenance.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
    (tmp_path / "results" / "README.md").write_text("a new table")
    clean = provenance.git_commit.__wrapped__()
    assert len(clean) == 40

    def edit_while_it_runs(self, data, results=fff.tasks.Classification.results):
        (tmp_path / "experiments" / "new_layer.py").write_text("")
        return results(self, data)

    monkeypatch.setattr(fff.tasks.Classification, "results", edit_while_it_runs)
    provenance.git_commit.cache_clear()
    assert read(run(make_config(*QUICK)))["git_commit"] == clean
    assert provenance.git_commit.__wrapped__() == f"{clean}-dirty"
    provenance.git_commit.cache_clear()


class CutAt(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, task):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("cut")


class Slow(Callback):
    """Half a second in the first epoch, so that the time of what came before a cut is known."""

    def on_train_epoch_start(self, trainer, task):
        if trainer.current_epoch == 0:
            time.sleep(0.5)


def test_a_run_resumed_in_the_middle_equals_an_unbroken_one(make_config, monkeypatch, tmp_path):
    import fff.tasks

    settings = [*QUICK, *NOISY, "trainer.max_epochs=6", "trainer.checkpoint_every=2"]
    unbroken = read(run(make_config(*settings, "study=unbroken")))

    callbacks = fff.tasks.Classification.protocol_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(fff.tasks.Classification, "protocol_callbacks", lambda self: [*callbacks(self), CutAt(5), Slow()])
        cut = run(make_config(*settings))
    assert cut.error == "RuntimeError: cut" and (cut.run_dir / CHECKPOINT).exists()

    start = time.perf_counter()
    resumed = run(make_config(*settings))
    seconds_of_the_rest = time.perf_counter() - start
    assert [path.name for path in resumed.run_dir.iterdir()] == [RESULT]
    record = read(resumed)
    assert record["resumed"] is True and unbroken["resumed"] is False
    assert record["wall_time_s"] > seconds_of_the_rest, "the part before the cut took time too"
    assert record["history"] == unbroken["history"] and record["metrics"] == unbroken["metrics"]

    without = read(run(make_config(*settings, "trainer.checkpoint_every=null", "study=without")))
    assert without["metrics"] == unbroken["metrics"], "checkpoints must not change a run: its identity leaves them out"


def test_a_resumed_run_keeps_what_was_logged_before(make_config, monkeypatch):
    import fff.tasks

    settings = [*QUICK, "trainer.max_epochs=4", "trainer.checkpoint_every=1", "logger=csv"]
    callbacks = fff.tasks.Classification.protocol_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(fff.tasks.Classification, "protocol_callbacks", lambda self: [*callbacks(self), CutAt(2)])
        assert run(make_config(*settings)).error == "RuntimeError: cut"
    folder = run(make_config(*settings)).run_dir
    epochs = [pd.read_csv(folder / name)["epoch"].unique().tolist() for name in ("metrics.1.csv", "metrics.csv")]
    assert epochs == [[0, 1], [2, 3]]


@pytest.mark.parametrize("checkpoint_every", ["null", "1"])
def test_a_terminated_run_does_not_count_as_done(make_config, monkeypatch, capsys, checkpoint_every):
    import fff.tasks

    class Terminate(Callback):
        def on_train_epoch_start(self, trainer, task):
            os.kill(os.getpid(), signal.SIGTERM)

    callbacks = fff.tasks.Classification.protocol_callbacks
    monkeypatch.setattr(fff.tasks.Classification, "protocol_callbacks", lambda self: [*callbacks(self), Terminate()])
    with pytest.raises(SystemExit) as stop:
        run(make_config(*QUICK, f"trainer.checkpoint_every={checkpoint_every}"))
    assert stop.value.code == 143 and "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, line",
    [
        ("data.batch_size=0", "ValueError: batch_size must be at least 1, got 0"),
        (
            "task.optimizer._target_=torch.optim.Adamm",
            "ValueError: task.optimizer: No module named 'torch.optim.Adamm'",
        ),
        ("task.schedules={temperature:[[0,-1]]}", "ValueError: schedule of 'temperature': temperature=-1.0 must be"),
    ],
)
def test_what_cannot_be_built_is_told_by_its_cause(make_config, override, line):
    outcome = run(make_config(*QUICK, override))
    assert outcome.status == "failed" and outcome.error.startswith(line)


def test_an_unreadable_checkpoint_is_reported_and_not_used(make_config, capsys):
    settings = [*QUICK, "trainer.checkpoint_every=1"]
    outcome = run(make_config(*settings))
    expected = read(outcome)["metrics"]
    shutil.rmtree(outcome.run_dir)
    outcome.run_dir.mkdir()
    (outcome.run_dir / CHECKPOINT).write_bytes(b"PK\x03\x04 not a checkpoint")
    assert read(run(make_config(*settings)))["metrics"] == expected
    assert "is unreadable" in capsys.readouterr().err


def write_text(folder):
    path = folder / "text" / "tiny_shakespeare" / "input.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(80 * "Ring a rose.\n")
    return folder / "text"


def test_tokens_of_a_text_set_are_trained_on_and_measured_in_bits_per_character(make_config, tmp_path):
    """Of the test's tokens ab ab b end ab ab end one window of four predicts ab b end ab: five characters."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "wikitext").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for split, rows in (("train", ["ababba"] * 20), ("validation", ["abba"] * 20), ("test", ["ababb", "abab"])):
        pd.DataFrame({"text": rows}).to_parquet(tmp_path / "wikitext" / f"{split}-00000-of-00001.parquet")

    data = [f"data.root={tmp_path}", f"data.tokenizer={tmp_path}/tokenizer.json", "data.context=4", "data.batch_size=4"]
    tiny = ["model.dim=16", "model.heads=2", "model.depth=1", "layer=moe", "trainer.max_epochs=1"]
    chosen = ["experiment=shakespeare", "data=wikitext", "model=gpt_small", "data.separator='<|endoftext|>'"]
    outcome = run(make_config(*chosen, *data, *tiny, "trainer.max_batches=2"))
    assert outcome.status == "finished", outcome.error
    record = read(outcome)
    metrics = record["metrics"]
    assert metrics["bits_per_character"] == pytest.approx(metrics["test_loss"] / np.log(2) * 4 / 5)
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["test_loss"]))
    assert len(record["data_digest"]) == 16 and len(record["history"]["train_loss"]) == 1
    with np.load(outcome.run_dir / ROUTES) as routes:
        by_class = dict(zip(routes["classes"], routes["count"][0].sum(1), strict=True))
    # The window itself is ab ab b end.
    assert by_class["lower vowel"] == 2 and by_class["lower consonant"] == by_class["punctuation"] == 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.filterwarnings("ignore:.* holds a text of digest")
def test_every_experiment_plans_its_runs_and_trains_two_batches_of_each(
    plan, make_config, monkeypatch, tmp_path, experiment
):
    monkeypatch.setattr(sweep, "check_data", lambda node: None)  # the experiment's own data may not be here
    jobs = plan(f"experiment={experiment}").jobs
    assert len(jobs) == NUM_RUNS.get(experiment, len(jobs)) > 0
    # Widths and seeds change sizes, recipes and layers what is built.
    kinds = {}
    for job in jobs:
        chosen = dict(override.split("=", 1) for override in job.overrides)
        kinds.setdefault((chosen.get("recipe"), chosen.get("layer")), job.overrides)
    for overrides in kinds.values():
        data = ["data=digits"]
        kind = make_config(*overrides).data._target_.rpartition(".")[2]
        if kind == "ClusterData":  # generated data are always here
            data = []
        elif kind in ("RandomLabels", "RotatedImages"):  # wrap another set
            data = ["data@data.data=digits", *(["data.num_rows=1000"] if kind == "RandomLabels" else [])]
            overrides = [override for override in overrides if not override.startswith("data@data.data=")]
        elif kind == "TextData":
            data = [f"data.root={write_text(tmp_path)}", "data.context=16", "model.depth=1"]
        outcome = run(make_config(*overrides, *data, "trainer.max_epochs=1", "trainer.max_batches=2"))
        assert outcome.status == "finished", (overrides, outcome.error)


def test_one_parameter_in_two_forms_is_one(plan):
    jobs = plan("layer.temperature=1.0,2.0", "++layer.temperature=3.0").jobs
    assert [job.overrides[0] for job in jobs] == ["++layer.temperature=3.0"]


def test_data_sets_with_grids_of_their_own_share_one_that_is_named(plan, monkeypatch):
    monkeypatch.setattr(sweep, "check_data", lambda node: None)
    with pytest.raises(ConfigError, match="seed: this choice brings a grid of its own"):
        plan("experiment=table1", "recipe=ours", "data=usps,mnist", "layer=fff")
    named = plan("experiment=table1", "recipe=ours", "data=usps,mnist", "layer=fff", "seed=0,1").jobs
    assert {job.run_dir.name.split("-")[1] for job in named} == {"usps", "mnist"}


def test_the_runs_of_the_committed_tables_keep_their_names(plan, monkeypatch):
    """A change of the configuration that gives them other names orphans all of them."""
    monkeypatch.setattr(sweep, "check_data", lambda node: None)
    with (Path(config_path()).parent / "results" / "runs" / "table1.csv").open() as file:
        committed = {row["run_id"] for row in csv.DictReader(file) if row["data.name"] == "usps"}
    planned = plan("experiment=table1", "recipe=paper,first,second,ours", "seed=0,1,9").jobs
    names = {job.run_dir.name for job in planned}
    assert len(committed) == 980
    assert {name for name in committed if "-s0-" in name or "-s1-" in name or "-s9-" in name} <= names


def test_the_name_of_the_recipe_is_recorded(make_config):
    assert read(run(make_config(*QUICK, "recipe=paper", "layer=fff")))["recipe"] == "paper"


def test_csv_logger_writes_into_the_run_directory(make_config):
    outcome = run(make_config(*QUICK, "logger=csv"))
    assert "val_accuracy" in (outcome.run_dir / "metrics.csv").read_text()
