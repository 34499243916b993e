"""Given routes: what the peers compute, and how the routes are spread."""

import pytest
import torch

from fff.bench import dispatch
from fff.bench.dispatch import expert_dispatch
from fff.bench.suite import agrees, run_case
from fff.ops.expert_mlp import cpu

SIZES = dict(in_features=12, out_features=8, leaf_width=4, num_experts=4, batch=17)
QUICK = dict(rounds=1, min_sample_s=0.0)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_all_backends_agree_with_the_reference(choices, gradient):
    peers = ["auto", "auto_pytorch", "native", "grouped", "gather", "dense", "grouped_mm"]
    torch.manual_seed(0)
    candidates = expert_dispatch(**SIZES, peers=peers, choices=choices, gradient=gradient)
    left_out = set() if cpu.available() else {"native"}
    left_out |= {"grouped_mm"} if choices > 1 or not hasattr(torch.nn.functional, "grouped_mm") else set()
    assert set(candidates) == set(peers) - left_out
    case = run_case(candidates, **QUICK)
    assert agrees({"case": case}) and all(row["agrees"] for row in case["rows"].values())
    backends = {name: row["backend"] for name, row in case["rows"].items()}
    assert backends["auto"] == ("native" if cpu.available() else backends["auto_pytorch"])
    assert backends["auto_pytorch"] in ("dense", "grouped", "gather")


def test_a_forgotten_bias_is_seen(monkeypatch):
    """Also in the gradients alone: an output bias that only the forward pass knows."""
    torch.manual_seed(0)
    plain = dispatch.expert_mlp

    def forgetful(x, index, gate, w_in, b_in, w_out, b_out, *, backend):
        return plain(
            x, index, gate, w_in, b_in, w_out, b_out if backend == "reference" else b_out.detach(), backend=backend
        )

    monkeypatch.setattr(dispatch, "expert_mlp", forgetful)
    with pytest.raises(RuntimeError, match="not have been used"):
        run_case(expert_dispatch(**SIZES, peers=["grouped"], gradient=True), **QUICK)
    monkeypatch.setattr(
        dispatch,
        "expert_mlp",
        lambda *call, backend: plain(*call[:-1], None if backend == "grouped" else call[-1], backend=backend),
    )
    assert run_case(expert_dispatch(**SIZES, peers=["grouped"]), **QUICK)["rows"]["grouped"]["agrees"] is False


def test_routes_are_spread_as_they_say():
    torch.manual_seed(0)
    experts, rows = 16, 4000
    even = dispatch._drawn(experts, rows, 1, skewed=False).flatten().bincount(minlength=experts)
    assert even.min() > 0.7 * rows / experts and even.max() < 1.3 * rows / experts
    skewed = (
        dispatch._drawn(experts, rows, 1, skewed=True)
        .flatten()
        .bincount(minlength=experts)
        .sort(descending=True)
        .values
    )
    share = 1 / torch.arange(1.0, experts + 1)
    assert torch.allclose(skewed / rows, share / share.sum(), atol=0.03)
    pairs = dispatch._drawn(experts, rows, 2, skewed=True)
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_trained_routes_are_those_of_a_tree():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    candidates = expert_dispatch(**{**SIZES, "out_features": 12, "batch": 500}, peers=["grouped"], routes="trained")
    assert agrees({"case": run_case(candidates, **QUICK)})
    with pytest.raises(ValueError, match="routes='trained' needs choices=1, not 2"):
        expert_dispatch(**SIZES, peers=["grouped"], routes="trained", choices=2)
    with pytest.raises(ValueError, match="routes='even' is none of uniform, zipf, trained"):
        expert_dispatch(**SIZES, peers=["grouped"], routes="even")


def test_work_counts_hit_experts_once():
    torch.manual_seed(0)
    work = expert_dispatch(**{**SIZES, "batch": 1}, peers=["grouped"])["grouped"].work
    assert work.flops == 2 * 4 * (12 + 8)
    assert work.bytes == 4 * (4 * (12 + 8 + 1) + 8 + 12 + 8)
