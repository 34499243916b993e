"""The command as users meet it: subprocesses, exit codes, one line for a mistake, resume after kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, "-m", "experiments.train"]

# All in one process, as torch is never imported; main ends each time by sys.exit.
MISTAKES = """
import contextlib, importlib, io, json, sys
for command, arguments in json.loads(sys.argv[1]):
    main = importlib.import_module(f"experiments.{command}").main
    sys.argv = [command, *arguments]
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    assert "torch" not in sys.modules, arguments
    print(json.dumps([code, said.getvalue()]))
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def train(tmp_path):
    """train("seed=1") runs the command with its runs below the test's folder."""
    return lambda *arguments: python(*TRAIN[1:], *arguments, f"runs_dir={tmp_path / 'runs'}")


def test_a_mistake_is_one_line_before_torch_is_imported(tmp_path, monkeypatch):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    for name, text in {
        "layer_typo": "layer: {dpth: 2}",
        "trainer_typo": "trainer: {max_epoch: 3}",
        "root_typo": "sed: 3",
        "sweep_typo": "hydra: {mode: MULTIRUN, sweeper: {params: {layer: 'fff,moe', width: '16,17'}}}",
        "no_yaml": "trainer: [3",
    }.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    (tmp_path / "conf" / "recipe").mkdir()
    for name in ("recipe/bare", "experiment/bare"):
        (tmp_path / "conf" / f"{name}.yaml").write_text("task: {optimizer: {lr: 0.01}}\n")
    (tmp_path / "conf" / "recipe" / "wrong.yaml").write_text(
        "# @package _global_\nrecipe: wrong\ntrainer: {max_epochs: x}\n"
    )
    mine = ["--config-dir", str(tmp_path / "conf")]
    cases = [
        (["layer.dpth=3"], "layer.dpth: fff.FFF has no 'dpth'; did you mean 'depth'?"),
        (["+layer.dpth=3"], "layer.dpth: fff.FFF has no 'dpth'; did you mean 'depth'?"),
        (["layer.depth=three"], "layer.depth='three': fff.FFF takes int here"),
        (["layer.act_layer=rellu"], "layer.act_layer='rellu': fff.FFF takes relu or gelu or gelu_tanh or silu"),
        (["data.normalize=none"], "data.normalize='none': fff.data.ImageData takes standardize or unit"),
        (["data.name=mnis"], "data.name='mnis': fff.data.ImageData takes digits or usps"),
        (["trainer.accelerator=cpuu"], "trainer.accelerator='cpuu': trainer takes auto or cpu"),
        (["trainer.precision=17"], "trainer.precision='17': trainer takes 32-true or"),
        (
            ["+task.schedules.hardning_weight=[[0,1]]"],
            "task.schedules.hardning_weight: fff.FFF has no 'hardning_weight'; did you mean 'hardening_weight'?",
        ),
        (
            ["+task.schedules.top_k=[[0,2]]"],
            "task.schedules.top_k: top_k of fff.FFF is none that may change from epoch to epoch",
        ),
        (["+task.schedules.temperature=5"], "task.schedules.temperature=5 must be [[epoch, value], ...]"),
        (["task.schedules=5"], "task.schedules=5 must be {attribute: [[epoch, value], ...]}"),
        (["layer._target_=mymodd.Plain"], "layer._target_='mymodd.Plain': no module 'mymodd' is installed"),
        (["threads=0"], "threads=0 must be at least 1"),
        (["-m", "seed=0,-1"], "seed=-1 must be at least 0"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 must be at least 1"),
        (["trainer.gradient_clip_val=0"], "trainer.gradient_clip_val=0.0 must be above 0"),
        (["study=a/b"], "study='a/b' must be the name of one folder"),
        (
            ["-m", "experiment=ablation_gate,ablation_leak"],
            "seed: this choice brings a grid of its own, range(3) where",
        ),
        (["-m", "launcher=basic,joblib"], "launcher: a sweep has one"),
        (["-m", "data=svhn", "seed=0,1"], "data set 'svhn' not found: neither in the folder "),
        (["task.optimizer.lrr=1"], "task.optimizer.lrr: torch.optim.AdamW has no 'lrr'; did you mean 'lr'?"),
        (["layer=fffx"], "layer=fffx: no such option; did you mean 'fff'?"),
        (["layr=fff"], "layr: the configuration has no 'layr'; did you mean 'layer'?"),
        (["+sed=3"], "sed: the configuration has no 'sed'; did you mean 'seed'?"),
        (["trainer.max_epoch=3"], "trainer.max_epoch: trainer has no 'max_epoch'; did you mean 'max_epochs'?"),
        (["+trainer.max_epoch=3"], "trainer.max_epoch: trainer has no 'max_epoch'; did you mean 'max_epochs'?"),
        (["trainer.max_epochs=abc"], "trainer.max_epochs: Value 'abc' of type 'str' could not be converted to Integer"),
        (["seed=1.5"], "seed: Value '1.5' of type 'float' could not be converted to Integer"),
        (["launcher.n_jobs=2"], "launcher.n_jobs: launcher has no 'n_jobs'"),
        (["width=12"], "layer.depth: width=12 must be leaf_width=8 times a power of two"),
        (["-m", "seed=0,1", "trainer.devices=2"], "trainer.devices=2: a run trains on one device"),
        (["-m", "layer=fff,moee"], "layer=moee: no such option; did you mean 'moe'?"),
        (["-m", "width=interval(1,2)"], "width=interval(1,2): a grid needs"),
        ([*mine, "experiment=layer_typo"], "layer.dpth: fff.FFF has no 'dpth'; did you mean 'depth'?"),
        (
            [*mine, "experiment=trainer_typo"],
            "trainer.max_epoch: trainer has no 'max_epoch'; did you mean 'max_epochs'?",
        ),
        ([*mine, "experiment=root_typo"], "sed: the configuration has no 'sed'; did you mean 'seed'?"),
        ([*mine, "experiment=sweep_typo"], "layer.depth: width=17 must be leaf_width=8 times"),
        ([*mine, "experiment=no_yaml"], "while parsing"),
        ([*mine, "recipe=bare"], "recipe/bare.yaml must begin with the line `# @package _global_`"),
        ([*mine, "experiment=bare"], "experiment/bare.yaml must begin with the line `# @package _global_`"),
        ([*mine, "recipe=wrong"], "trainer.max_epochs: In 'recipe/wrong': Value 'x' of type 'str' could not"),
    ]
    elsewhere = f"runs_dir={tmp_path / 'runs'}"
    benchmarks = [
        (["suit=training"], "suit: the configuration has no 'suit'; did you mean 'suite'?"),
        (["suite=infer"], "suite=infer: no such option; did you mean 'inference'?"),
        (["rounds=abc"], "rounds: Value 'abc' of type 'str' could not be converted to Integer"),
        (["+round=3"], "round: the configuration has no 'round'; did you mean 'rounds'?"),
        (["suite=inference", "+suite.cases.hard_d4.build.dpth=3"], "suite.cases.hard_d4.build.dpth: fff.bench.cases."),
    ]
    sent = [("train", [*arguments, elsewhere]) for arguments, _ in cases]
    sent += [("bench", [*arguments, f"out={tmp_path / 'runs'}"]) for arguments, _ in benchmarks]
    cases += benchmarks
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FFF_DATA_DIR", raising=False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    result = python("-c", MISTAKES, json.dumps(sent))
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for (arguments, expected), (code, said) in zip(cases, answers, strict=True):
        assert code == 2 and said.startswith(f"error: {expected}") and said.count("\n") == 1, (arguments, said)
    assert not (tmp_path / "runs").exists(), "a mistake must leave nothing behind"


def test_help_is_quick():
    code = (
        "import sys, time; start = time.process_time(); from experiments.train import main\n"
        "for sys.argv in (['train', '--help'], ['train', '--cfg', 'job']):\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "print('CPU', time.process_time() - start, 'torch' in sys.modules)"
    )
    result = python("-c", code)
    said = ["layer=fff layer.depth=5", "experiment: ", "layer: feedforward, ", "_target_: fff.FFF", "max_epochs: 100"]
    assert all(word in result.stdout for word in said), result.stderr
    assert "bench" not in result.stdout, "its options are none of a run's"
    seconds, torch_imported = result.stdout.splitlines()[-1].split()[1:]
    # CPU time, because the machine may be busy.
    assert float(seconds) < 2.5 and torch_imported == "False"


def test_a_recipe_that_knows_other_layers_of_a_kind_is_told_once(train):
    """Not of dense layers, for which it has no file at all."""
    few = "recipe=paper", "trainer.max_epochs=1"
    line = (
        "note: recipe=paper has settings of its own for layer=fff but none for layer=fff_gated, which trains with those"
        " for all layers\n"
    )
    swept = train("-m", *few, "layer=fff,fff_gated,feedforward", "width=16,32")
    assert (swept.returncode, swept.stderr) == (0, line)
    single = train(*few, "layer=fff_gated")
    assert (single.returncode, single.stderr) == (0, line)


def test_sweep_with_failures_killed_and_resumed(train, tmp_path):
    """kill -9 after the first of four runs; then those four in worker processes, and four more that cannot run; then
    one of the first four by itself."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ["-m", "width=16", "trainer.max_epochs=40", "study=s", "seed=0,1,0", "layer=fff,feedforward"]
    command = [*TRAIN, *sweep, f"runs_dir={tmp_path / 'runs'}"]
    heard = tmp_path / "heard.txt"
    with heard.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 100
    while not (done := list(tmp_path.glob("runs/s/*/result.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 1 <= len(done) < 4
    first, *told = heard.read_text().splitlines()
    assert "4 runs (6 combinations), 0 finished, 4 to do" in first
    assert all(line.startswith("[") for line in told), "no adverts, no doubled lines"
    before = {path: path.stat().st_mtime_ns for path in done}

    other_order = ["layer=feedforward,fff", "layer.drop=0.0,2.0", "seed=1,0", "study=s", "width=16"]
    workers = ["launcher=joblib", "launcher.n_jobs=2"]
    rest = train("-m", *other_order, "trainer.max_epochs=40", *workers)
    assert rest.returncode == 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert len(list(tmp_path.glob("runs/s/*/result.json"))) == 4
    lines = rest.stdout.splitlines()
    todo = 8 - len(done)
    assert f"8 runs, {len(done)} finished, {todo} to do" in lines[0]
    assert len(lines) == 1 + todo and lines[-1].startswith(f"[{todo}/{todo}] ") and lines[-1].endswith("(0 left)")
    failures = rest.stderr.splitlines()
    assert failures[0] == f"4 of {todo} runs failed:" and len(failures) == 5
    assert all("error.txt: ValueError: drop=2.0" in line for line in failures[1:])
    assert len(list(tmp_path.glob("runs/s/*/error.txt"))) == 4

    alone = train("layer=fff", "width=16", "study=s", "trainer.max_epochs=40")
    (result,) = tmp_path.glob("runs/s/fff-digits-s0-*/result.json")
    told, where = alone.stdout.splitlines()
    assert alone.returncode == 0 and alone.stderr == "" and str(result) == where
    assert told.startswith(f"{result.parent.name}  ma ") and " ga " in told and "finished before" in told
