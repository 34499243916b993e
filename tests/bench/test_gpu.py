"""The cases of a GPU at toy sizes, without one by Triton's interpreter; and what they may cost."""

from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("triton")

from fff.bench import floor, gpu
from fff.bench.cases import Candidate
from fff.bench.floor import Work
from fff.bench.suite import agrees, max_error, run_case
from fff.ops.expert_mlp import triton
from fff.ops.expert_mlp.triton import INTERPRETED
from fff.ops.tree_route import triton as routes

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("triton was imported without TRITON_INTERPRET=1, and there is no GPU", allow_module_level=True)

CONFIGS = Path(__file__).resolve().parents[2] / "conf" / "bench"
SUITES = "inference", "training"
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bfloat16") if GPU else ("cpu", "float32")  # the interpreter has no bfloat16, and is slow
SIZES = {"depth": 3, "num_experts": 8, "leaf_width": 16, "batch": 257} if GPU else {"depth": 2, "batch": 9}
SIZES = {"in_features": 64, "out_features": 64, "leaf_width": 8, "num_experts": 4} | SIZES
QUICK = {"rounds": 1, "min_sample_s": 0.0}
NAMES = "layer", "dispatch", "routing", "step", "block"


@pytest.fixture(autouse=True)
def quick_floor(monkeypatch):
    monkeypatch.setattr(floor, "_best", lambda call, device: 1e-3)
    measured = floor.matmul_rate, floor.read_bandwidth, floor.copy_bandwidth
    for rate in measured:
        rate.cache_clear()
    yield
    for rate in measured:
        rate.cache_clear()


def config(suite):
    return yaml.safe_load((CONFIGS / "suite" / f"{suite}.yaml").read_text())["cases"]


def cases(suite):
    from experiments.bench import expand

    return expand(config(suite), "cuda")


def toy(case, **fields):
    """The candidates of a configured case, small."""
    arguments = {key: value for key, value in case["build"].items() if not key.startswith("_")}
    arguments |= {key: size for key, size in SIZES.items() if key in arguments} | {"dtype": DTYPE} | fields
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return getattr(gpu, case["build"]["_target_"].rpartition(".")[2])(**arguments)


# Those that differ from another one by its grid alone are small versions of the same.
@pytest.mark.parametrize("suite, name", [(s, n) for s in SUITES for n in config(s) if n in NAMES])
def test_configured_peers_compute_what_they_are_compared_with(suite, name):
    case = config(suite)[name]
    left_out = set() if GPU else {p for p in case["build"]["peers"] if p.endswith("_graph")}
    candidates = toy(case)
    if not hasattr(torch.nn.functional, "grouped_mm"):
        left_out |= {p for p in case["build"]["peers"] if p.startswith("grouped_mm")}
    assert set(candidates) == set(case["build"]["peers"]) - left_out
    found = run_case(candidates, **QUICK, device=DEVICE)
    for peer, row in found["rows"].items():
        assert row["agrees"] is (None if peer.startswith(("dense", "gate")) else True), (peer, row)
        assert row["median_s"] > 0
    assert agrees({name: found})


@pytest.mark.parametrize("make, peer", [("layer", "fff"), ("layer", "moe_top_2"), ("step", "fff"), ("block", "fff")])
@pytest.mark.parametrize("parameter", ["b_in", "b_out", "w_out"])
def test_an_output_that_is_off_is_refused(make, peer, parameter, monkeypatch):
    """A layer that forgets a parameter, while what is expected of it does not."""
    forgotten = []

    def compute(x, index, gate, *experts, backend="auto", **options):
        experts = list(experts)
        if backend == "triton":
            i = ("w_in", "b_in", "w_out", "b_out").index(parameter)
            experts[i] = experts[i] * 0
            forgotten.append(parameter)
        return real(x, index, gate, *experts, backend=backend, **options)

    import fff.layers.fff as tree
    import fff.layers.moe as moe

    real = tree.expert_mlp
    monkeypatch.setattr(tree, "expert_mlp", compute)
    monkeypatch.setattr(moe, "expert_mlp", compute)
    case = next(config(suite)[make] for suite in SUITES if make in config(suite))
    row = run_case(toy(case, peers=[peer]), **QUICK, device=DEVICE)["rows"][peer]
    assert forgotten and row["agrees"] is False and "median_s" not in row


@pytest.mark.parametrize(
    "suite, case, peer, taken",
    [
        ("inference", "dispatch", "triton_tiles16x32x4x2", ["tile of 16"]),
        ("inference", "dispatch", "triton_tiles32x32x4x2", ["tile of 32"]),
        ("inference", "dispatch", "triton_tiled", ["tile of 16"]),
        ("inference", "dispatch", "triton_single", ["one by one"]),
        ("training", "step", "fff_tiles32x32x4x2", ["tile of 32"]),
    ],
)
def test_a_forced_choice_is_made_and_computes_the_same(suite, case, peer, taken, monkeypatch):
    order, single, seen = triton.tiled_order, triton.triton_expert_mlp_single, []
    monkeypatch.setattr(triton, "tiled_order", lambda *call: seen.append(f"tile of {call[2]}") or order(*call))
    monkeypatch.setattr(triton, "triton_expert_mlp_single", lambda *call: seen.append("one by one") or single(*call))
    row = run_case(toy(config(suite)[case], peers=[peer]), **QUICK, device=DEVICE)["rows"][peer]
    assert row["agrees"] and row["median_s"] > 0 and set(seen) == set(taken)


def test_levels_may_be_forced_and_other_choices_are_refused(monkeypatch):
    case, walk, seen = config("inference"), routes.descend, set()
    monkeypatch.setattr(routes, "descend", lambda *call, levels: seen.add(levels) or walk(*call, levels=levels))
    routing = run_case(toy(case["routing"], peers=["descend_levels0", "descend_levels2"]), **QUICK, device=DEVICE)
    assert agrees({"routing": routing}) and len(routing["rows"]) == 2 and seen == {0, 2}
    for unknown in ("triton_fast", "triton_tilesx"):
        with pytest.raises(ValueError, match=f"{unknown.removeprefix('triton_')!r} is none of"):
            toy(case["dispatch"], peers=[unknown])


def test_half_precision_is_within_its_tolerance_and_a_forgotten_bias_is_not():
    """At the widths that are timed, on PyTorch's path: the interpreter has no bfloat16."""
    sizes = {"in_features": 768, "out_features": 768, "leaf_width": 32, "batch": 512, "depth": 2}
    torch.manual_seed(0)
    found = gpu.tree_training(**sizes, peers=["fff_grouped", "grouped_mm_top_2"])
    assert all(max_error(c.outputs(), c.expected()) <= c.tolerance for c in found.values())
    candidate = gpu.tree_inference(**sizes, peers=["fff_grouped"])["fff_grouped"]
    candidate.run()
    expected = candidate.expected()
    assert max_error(candidate.outputs(), expected) <= candidate.tolerance
    for name in ("b_in", "b_out", "node_bias"):
        parameter = getattr(candidate.module, name).data
        kept = parameter.clone()
        parameter.zero_()
        assert max_error(candidate.outputs(), expected) > candidate.tolerance, name
        parameter.copy_(kept)


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("make", ["layer", "routing", "step"])
def test_a_graph_must_compute_anew_what_it_is_compared_on(make, works, monkeypatch):
    """Graphs that are none: one that runs the call again and puts its results where the first ones lay, and one that
    returns what it has."""

    def captured(run):
        results = dict(run())

        def replay():
            if works:
                for name, result in dict(run()).items():
                    results[name].copy_(result)
            return results

        return replay

    monkeypatch.setattr(gpu, "captured", captured)
    real = gpu._candidate
    monkeypatch.setattr(gpu, "_candidate", lambda make, x, graph: real(make, x, True))
    case = next(config(suite)[make] for suite in SUITES if make in config(suite))
    peer = {"routing": "descend_pytorch"}.get(make, "fff_grouped")
    row = run_case(toy(case, peers=[peer]), **QUICK, device=DEVICE)["rows"][peer]
    assert row["agrees"] is works and ("median_s" in row) is works


def test_rows_that_went_astray_equal_nothing():
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), torch.tensor([0.0, 0.25, 0.25])
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0], [1e-9, 0.0], [1.0, 0.25]])
    # Right and right; right and left; left and right; twice right by little, and once more by a logit of exactly 0.
    leaf = torch.tensor([3, 2, 1, 3, 3])
    assert not gpu.misrouted(x, weight, bias, leaf, 2).any()
    # The other child at depth 2; none of the leaves.
    assert gpu.misrouted(x[:3], weight, bias, leaf[:3] ^ 1, 2).all()
    assert gpu.misrouted(x[:2], weight, bias, torch.tensor([-1, 4]), 2).all()


@pytest.mark.parametrize(
    "bias, dtype, excused", [(1e-8, "float32", True), (0.01, "float32", False), (0.01, "bfloat16", True)]
)
def test_near_zero_a_row_may_go_either_way(bias, dtype, excused):
    """The logit is 1 - 1 + bias; in bfloat16 a product may have rounded parts of it to 2^-8 of themselves."""
    dtype = getattr(torch, dtype)
    x, weight = torch.ones(1, 2, dtype=dtype), torch.tensor([[1.0, -1.0]], dtype=dtype)
    bias = torch.tensor([bias], dtype=dtype)
    assert not gpu.misrouted(x, weight, bias, torch.tensor([1]), 1).any()
    assert gpu.misrouted(x, weight, bias, torch.tensor([0]), 1).item() is not excused


def test_what_fails_is_left_out_and_ours_is_refused(capsys):
    def fails(rows):
        raise RuntimeError("no room\nand more")

    x = torch.randn(3, 4)
    known = {"fff": fails, "dense": fails, "gate": lambda rows: gpu.Peer(torch.nn.Module(), lambda: {"y": rows + 1})}
    candidates = gpu._candidates(["fff", "dense", "gate"], known, x)
    assert set(candidates) == {"fff", "gate"}
    found = run_case(candidates, **QUICK)
    assert found["rows"]["fff"]["agrees"] is False and "median_s" not in found["rows"]["fff"]
    assert not agrees({"case": found}) and found["rows"]["gate"]["median_s"] > 0
    assert capsys.readouterr().err == "fff failed: RuntimeError: no room\ndense failed: RuntimeError: no room\n"
    with pytest.raises(ValueError, match="'fast' is none of"):
        gpu._candidates(["fast"], known, x)


def test_a_target_may_be_a_share_of_the_floor():
    module = torch.nn.Linear(64, 64)
    x = torch.randn(64, 64)
    candidate = Candidate(module, lambda: module(x), work=Work(2 * 64**3, 4 * 3 * 64**2), counted=False)
    bounds = [{"at_most": 1e9}, {"at_most": 1e-9}]
    targets = [{"quantity": "time", "of": "a", "over": "floor", **bound} for bound in bounds]
    found = run_case({"a": candidate}, targets, **QUICK)
    assert [ratio["met"] for ratio in found["ratios"]] == [True, False]
    assert found["ratios"][0]["median"] == pytest.approx(1 / found["rows"]["a"]["floor_share"])


@pytest.mark.parametrize("suite", SUITES)
def test_command_chooses_the_cases_of_the_device(suite, monkeypatch):
    pytest.importorskip("hydra")
    from hydra.core.global_hydra import GlobalHydra

    from experiments import bench

    seen = []
    monkeypatch.setattr(bench, "run", lambda cfg: seen.append(cfg) or True)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
        monkeypatch.setattr("sys.argv", ["bench", f"suite={suite}", f"device={device}"])
        bench.main()
    chosen = [set(bench.expand(config(suite), cfg.device)) for cfg in seen]
    built = [case["build"] for name, case in config(suite).items() if name in NAMES]
    others = [case["build"] for name, case in config(suite).items() if case["device"] == "cuda" and name not in NAMES]
    assert all(any({**build, "peers": other["peers"]} == other for build in built) for other in others)
    assert [cfg.device for cfg in seen] == ["cpu", "cuda"] and not chosen[0] & chosen[1]
    assert all(point["build"]["_target_"].startswith("fff.bench.gpu.") for point in cases(suite).values())
    assert {point["build"].get("dtype", "bfloat16") for point in cases(suite).values()} == {"bfloat16"}


@pytest.mark.parametrize("suite", [*SUITES, "crossover"])
def test_suites_end_within_eight_minutes(suite):
    """If every candidate takes all the time that it may, half of it is left for what is not timed: kernels that are
    compiled, references in float64, and calls before the samples. Where one call is longer than a third of a
    candidate's time, three samples of it still are taken."""
    limit = yaml.safe_load((CONFIGS / "device" / "cuda.yaml").read_text())["max_candidate_s"]
    candidates = sum(len(point["build"]["peers"]) for point in cases(suite).values())
    assert candidates * limit <= 240
