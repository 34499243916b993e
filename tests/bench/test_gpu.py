"""The cases of a GPU on a CPU, at toy sizes, with the kernels in Triton's interpreter; and what they may cost."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("triton")

from fff.bench import gpu
from fff.bench.suite import agrees, run_case
from fff.layers.fff import FFF
from fff.ops.expert_mlp.triton import INTERPRETED

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("triton was imported without TRITON_INTERPRET=1, and there is no GPU", allow_module_level=True)

CONFIGS = Path(__file__).resolve().parents[2] / "conf" / "bench"
SUITES = "inference", "training"
SIZES = {"in_features": 24, "out_features": 24, "leaf_width": 8, "depth": 3, "num_experts": 4, "batch": 19}
QUICK = {"rounds": 1, "min_sample_s": 0.0}
DESCENDS = (Path(gpu.__file__).parents[1] / "ops" / "tree_route" / "triton.py").exists()


def config(suite):
    return yaml.safe_load((CONFIGS / "suite" / f"{suite}.yaml").read_text())["cases"]


def cases(suite):
    from experiments.bench import expand

    return expand(config(suite), "cuda")


def toy(case, **fields):
    """The candidates of a configured case, small, and in float32, which is all that the interpreter computes rightly."""
    arguments = {key: value for key, value in case["build"].items() if not key.startswith("_")}
    arguments |= {key: size for key, size in SIZES.items() if key in arguments} | {"dtype": "float32"} | fields
    torch.manual_seed(0)
    return getattr(gpu, case["build"]["_target_"].rpartition(".")[2])(**arguments)


@pytest.mark.parametrize("suite, name", [(s, n) for s in SUITES for n, c in config(s).items() if c.get("device") == "cuda"])
def test_configured_peers_compute_what_they_are_compared_with(suite, name):
    case = config(suite)[name]
    left_out = set() if torch.cuda.is_available() else {p for p in case["build"]["peers"] if p.endswith("_graph")}
    if not DESCENDS:
        case["build"]["peers"] = [p for p in case["build"]["peers"] if p != "descend"]
    candidates = toy(case)
    if not hasattr(torch.nn.functional, "grouped_mm"):
        left_out |= {p for p in case["build"]["peers"] if p.startswith("grouped_mm")}
    assert set(candidates) == set(case["build"]["peers"]) - left_out
    found = run_case(candidates, **QUICK)
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
    row = run_case(toy(case, peers=[peer]), **QUICK)["rows"][peer]
    assert forgotten and row["agrees"] is False and "median_s" not in row


def test_half_precision_passes_and_its_errors_do_not():
    """The tolerance of bfloat16 at the widths that are timed, on PyTorch's path: the interpreter has no bfloat16."""
    sizes = {"in_features": 768, "out_features": 768, "leaf_width": 32, "batch": 512}
    torch.manual_seed(0)
    found = gpu.tree_training(**sizes, depth=2, peers=["fff_grouped", "grouped_mm_top_2"])
    assert agrees({"step": run_case(found, **QUICK)}) and len(found) == 2
    candidates = gpu.tree_inference(**sizes, depth=2, peers=["fff_grouped"])
    layer = candidates["fff_grouped"].module
    assert run_case(candidates, **QUICK)["rows"]["fff_grouped"]["agrees"]
    expected = candidates["fff_grouped"].expected()
    for name in ("b_in", "b_out", "node_bias"):
        forgetful = copy.deepcopy(layer)
        forgetful.load_state_dict(layer.state_dict())
        with torch.no_grad():
            getattr(forgetful, name).zero_()
            y = forgetful(layer_rows(candidates))
        case = candidates["fff_grouped"]._replace(outputs=lambda y=y: {"y": y}, expected=lambda: expected)
        assert run_case({"fff": case}, **QUICK)["rows"]["fff"]["agrees"] is False, name
