"""No time without equal outputs; and the suites run."""

import csv
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fff.bench import floor, suite
from fff.bench.cases import Candidate, hard_inference, hard_training, soft_training
from fff.bench.suite import agrees, markdown, max_error, run_case

SMALL = dict(in_features=12, out_features=5, leaf_width=3, depth=3, batch=17)
SHORT = dict(in_features=12, out_features=5, hidden_features=3, batch=17, steps=4)
CONFIGS = Path(__file__).resolve().parents[2] / "conf" / "bench"
QUICK = dict(rounds=2, min_sample_s=0.0)
GRID = {
    "depth": [1, 3],
    "batch": [2],
    "in_features": [12],
    "out_features": [5],
    "leaf_width": [3],
    "num_experts": [4],
    "choices": [1, 2],
}


def toy_grid(case):
    return [(axis, GRID.get(axis, values)) for axis, values in case.get("grid", {}).items()]


def upstream_or_skip():
    pytest.importorskip("fastfeedforward")


@pytest.mark.parametrize("make", [soft_training, hard_training, hard_inference])
def test_cases_agree_with_their_references(make):
    upstream_or_skip()
    torch.manual_seed(0)
    case = run_case(make(**SMALL), **QUICK)
    checked = {name for name, row in case["rows"].items() if row["agrees"]}
    assert checked == {name for name in case["rows"] if not name.startswith("dense")}
    for row in case["rows"].values():
        assert row["median_s"] > 0 and row["peak_bytes"] > 0
        assert row["flops"] > 0
    assert agrees({"case": case})


@pytest.mark.parametrize("make", [soft_training, hard_inference])
@pytest.mark.parametrize("parameter", ["b_in", "b_out", "w_out", "node_weight"])
def test_a_wrong_parameter_is_never_timed(make, parameter):
    torch.manual_seed(0)
    candidates = make(**SMALL)
    name = next(name for name in candidates if name.startswith("fff"))
    module = candidates[name].module
    with torch.no_grad():
        getattr(module, parameter).neg_()
    target = {"quantity": "time", "of": name, "over": "dense", "at_most": 1e9}
    case = run_case(candidates, [target], **QUICK)
    assert case["rows"][name]["agrees"] is False and "median_s" not in case["rows"][name]
    assert case["ratios"][0]["median"] is None and case["ratios"][0]["met"] is None
    assert not agrees({"case": case})
    table = markdown({"case": case})
    assert "outputs differ" in table and "not measured" in table


def test_upstream_without_its_missing_bias_is_refused():
    """The correction is what makes the two equal, so that the comparison does compare."""
    upstream_or_skip()
    torch.manual_seed(0)
    candidates = hard_inference(**SMALL)
    honest = candidates["upstream"]
    x = torch.randn(9, SMALL["in_features"])
    lazy = honest._replace(
        outputs=lambda: {"y": honest.module(x)}, expected=lambda: {"y": candidates["fff_hard"].module(x)}
    )
    assert run_case({"upstream": lazy}, **QUICK)["rows"]["upstream"]["agrees"] is False


def test_max_error_is_relative_to_each_tensor():
    large, small = torch.tensor([100.0, 0.0]), torch.tensor([1e-3, 0.0])
    expected = {"large": large, "small": small}
    assert max_error({"large": large + 1e-3, "small": small}, expected) == pytest.approx(1e-5, rel=1e-2)
    assert max_error({"large": large, "small": small + 1e-3}, expected) == pytest.approx(1.0)
    assert max_error({"large": large}, expected) == float("inf")
    assert max_error({"large": large * torch.nan, "small": small}, expected) == float("inf")
    assert max_error({"large": large[:1], "small": small}, expected) == float("inf")


def test_targets_are_judged_by_their_bound():
    module = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    candidates = {"one": Candidate(module, lambda: module(x)), "same": Candidate(module, lambda: module(x))}
    targets = [
        {"quantity": "extra_ms", "of": "one", "over": "same", "at_most": 1e9},
        {"quantity": "extra_ms", "of": "one", "over": "same", "at_least": 1e9},
        {"quantity": "memory", "of": "one", "over": "same", "at_most": 1.0},
        {"quantity": "memory", "of": "one", "over": "same", "at_least": 1.5},
        {"quantity": "time", "of": "one", "over": "absent", "at_least": 1.0},
    ]
    ratios = run_case(candidates, targets, **QUICK)["ratios"]
    assert [entry["met"] for entry in ratios] == [True, False, True, False, None]
    rivals = {"quantity": "time", "of": "one", "over": ["absent", "slow", "same"], "at_most": 1e9}
    candidates["slow"] = Candidate(module, lambda: [module(x) for _ in range(100)])
    assert run_case(candidates, [rivals], **QUICK)["ratios"][0]["over"] == "same"  # the fastest that is there
    with pytest.raises(ValueError, match="quantity='speed'"):
        run_case(candidates, [{"quantity": "speed", "of": "one", "over": "same", "at_most": 1}], **QUICK)


def trainer_case(**options):
    pytest.importorskip("lightning")
    from fff.bench.overhead import trainer_overhead
    from fff.tasks import Classification

    options = {"make_task": Classification, "optimizer": partial(torch.optim.SGD, lr=0.1)} | options
    return trainer_overhead(**options, **SHORT)


def test_time_and_operations_are_those_of_a_step(monkeypatch):
    monkeypatch.setattr(suite, "time_interleaved", lambda calls, **_: {"trainer": [0.8, 1.6], "plain_loop": [0.4, 0.4]})
    target = {"quantity": "extra_ms", "of": "trainer", "over": "plain_loop", "at_most": 201}
    case = run_case(trainer_case(), [target], **QUICK)
    rows = case["rows"]
    assert [rows[name]["median_s"] for name in ("trainer", "plain_loop")] == pytest.approx([0.3, 0.1])
    assert case["ratios"][0]["median"] == pytest.approx(200) and case["ratios"][0]["met"]
    # A dense step: forward and the weights' gradients of both layers, the hidden units' gradient.
    assert rows["plain_loop"]["flops"] == 2 * 17 * (2 * 12 * 3 + 3 * 3 * 5)


def test_a_trainer_that_trains_otherwise_is_not_timed():
    from fff.tasks import Classification

    case = trainer_case(make_task=partial(Classification, label_smoothing=0.1))
    assert run_case(case, **QUICK)["rows"]["trainer"]["agrees"] is False


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "suite").glob("*.yaml")))
def test_command_writes_a_record_of_every_suite(name, tmp_path, capsys, monkeypatch):
    """The configured suites at toy sizes: same cases, same targets."""
    pytest.importorskip("hydra")
    import yaml
    from hydra.core.global_hydra import GlobalHydra

    from experiments.bench import expand, main

    suite = yaml.safe_load((CONFIGS / "suite" / f"{name}.yaml").read_text())["cases"]
    suite = {case: entry for case, entry in suite.items() if entry.get("device") != "cuda"}  # of those test_gpu.py
    grids = [f"suite.cases.{case}.grid.{axis}={toy}" for case in suite for axis, toy in toy_grid(suite[case])]
    sizes = (SHORT if name == "overhead" else SMALL | {"expert_width": 2}).items()
    toy = [f"suite.cases.{c}.build.{size}={value}" for c in suite for size, value in sizes if size in suite[c]["build"]]
    quick = [f"out={tmp_path}", "rounds=1", "min_sample_s=0"]
    monkeypatch.setattr(floor, "_best", lambda call, device: 1e-3)
    floor.matmul_rate.cache_clear(), floor.read_bandwidth.cache_clear()
    # Left by tests that compose configurations; one of the command's own cannot start beside it.
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setattr("sys.argv", ["bench", f"suite={name}", *quick, *toy, *grids])
    main()
    floor.matmul_rate.cache_clear(), floor.read_bandwidth.cache_clear()
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / f"{name}.ratios.csv").open() as file:
        ratios = list(csv.DictReader(file))
    small = expand({case: {**entry, "grid": dict(toy_grid(entry))} for case, entry in suite.items()})
    assert {row["case"] for row in rows} == set(small)
    assert all(row["torch"] and row["cpu"] and row["seed"] == "0" for row in [*rows, *ratios])
    assert all(float(row["median_s"]) > 0 and row["agrees"] in ("True", "") for row in rows)
    # All that stands in the rows is explained.
    schema = (CONFIGS.parents[1] / "results" / "README.md").read_text()
    assert [key for key in {**rows[0], **ratios[0]} if f"`{key}`" not in schema] == []
    assert len(ratios) == sum(len(point["targets"]) for point in small.values())
    printed = capsys.readouterr().out
    assert len(re.findall("(time|memory): .* / |extra_ms: .* - ", printed)) == len(ratios)


def test_a_grid_becomes_cases_and_targets_stay_where_they_belong():
    pytest.importorskip("hydra")
    from experiments.bench import expand
    from experiments.check import ConfigError

    target = {"quantity": "time", "of": "a", "over": "b", "at_least": 2}
    case = {"build": {"depth": 0, "batch": 0, "width": 7}, "grid": {"depth": [1, 2], "batch": [3]}}
    points = expand({"one": case | {"targets": [target | {"when": {"depth": 2}}]}, "plain": {"build": {"depth": 5}}})
    assert list(points) == ["one_depth1_batch3", "one_depth2_batch3", "plain"]
    assert points["one_depth2_batch3"] == {"build": {"depth": 2, "batch": 3, "width": 7}, "targets": [target]}
    assert points["one_depth1_batch3"]["targets"] == [] and points["plain"]["targets"] == []
    for broken, message in [
        (case | {"grid": {"dept": [1]}}, "one.grid: 'dept' is no argument"),
        (case | {"grdi": {}}, "one: unknown key 'grdi'"),
        (case | {"targets": [target | {"when": {"width": 7}}]}, "'width' in .when. is no axis"),
    ]:
        with pytest.raises(ConfigError, match=message):
            expand({"one": broken})


def test_peers_compute_the_tree_that_they_are_compared_with():
    from fff.bench.peers import PEERS, tree_inference

    sizes = dict(in_features=12, out_features=5, leaf_width=3, depth=3, batch=17)
    torch.manual_seed(0)
    candidates = tree_inference(**sizes, peers=list(PEERS))
    case = run_case(candidates, **QUICK)
    same = {name for name, row in case["rows"].items() if row["agrees"]}
    assert same >= {"fff_grouped", "gather_bmm"} and all(not name.startswith(("dense", "moe")) for name in same)
    assert agrees({"case": case})
    with torch.no_grad():
        candidates["gather_bmm"].module.layer.b_out[:] += 1  # the tree of all peers but what was expected of them
    assert run_case(candidates, **QUICK)["rows"]["gather_bmm"]["agrees"] is False
    with pytest.raises(ValueError, match="'upstraem' is none of"):
        tree_inference(**sizes, peers=["upstraem"])


def test_work_counts_what_is_hit_once():
    from fff.bench.peers import tree_work
    from fff.layers.fff import FFF

    layer = FFF(10, 3, 4, depth=2)
    # Leaves 0 and 1: the root and its left child.
    work = tree_work(layer, torch.tensor([[0], [1], [1]]), batch=3)
    assert work.bytes == 4 * (2 * (3 * 10 + 3 + 3 * 4 + 4) + 2 * 11 + 3 * 14)
    assert work.flops == 3 * (2 * 2 * 10 + 2 * 3 * (10 + 4))


def test_floor_is_the_slower_of_the_two_ways(monkeypatch):
    monkeypatch.setattr(floor, "matmul_rate", lambda dtype, threads, device: 1e9)
    monkeypatch.setattr(floor, "read_bandwidth", lambda size, threads: {2**16: 1e6, 1_000_000: 1e5}[size])
    assert floor.floor(floor.Work(2_000_000, 1000), torch.float32)[:2] == (2e-3, "compute")
    assert floor.floor(floor.Work(2_000_000, 1_000_000), torch.float32)[:2] == (10.0, "memory")
    monkeypatch.setattr(floor, "copy_bandwidth", lambda device: 1e6)
    assert floor.floor(floor.Work(2_000_000, 1_000_000), torch.float32, "cuda")[:2] == (1.0, "memory")
