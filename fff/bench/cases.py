"""What is compared with what: each function returns the competitors of one case.

D input width, O output width, L leaf width, d depth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.bench.floor import Work
from fff.bench.upstream import in_our_layout, missing_bias, upstream_copy
from fff.layers.contract import aux_loss
from fff.layers.fff import FFF
from fff.layers.moe import MoE

# Weights of the losses as in the recipes of the studies: a training step pays for them too.
HARDENING, BALANCE = 3.0, 0.1
# Small, so that the weights and with them the routes stay what they were while steps are repeated.
LEARNING_RATE = 1e-4


class Candidate(NamedTuple):
    """One competitor.

    module: what runs; a layer of this library names its backend in the record.
    run: the call that is timed.
    outputs, expected: results of the same module, and what they must be, computed by the plainest code there is; None
        for a competitor that computes another function by design, as a dense layer does.
    steps: that one call makes; time and operations are told per step.
    work: what a call cannot avoid; None where nobody has counted it.
    threads: that torch uses for it; None: those of the suite.
    dtype: of rows and weights.
    counted: whether memory and operations are counted, which takes calls of their own.
    backend: of `expert_mlp`; None: the one that the record of `module` names, if it has one.
    tolerance: largest share by which outputs may differ; None: that of the dtype, `fff.bench.suite.TOLERANCE`.
    """

    module: nn.Module
    run: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]] | None = None
    expected: Callable[[], dict[str, Tensor]] | None = None
    steps: int = 1
    work: Work | None = None
    threads: int | None = None
    dtype: torch.dtype = torch.float32
    counted: bool = True
    backend: str | None = None
    tolerance: float | None = None


def soft_training(
    *, in_features: int, out_features: int, leaf_width: int, depth: int, batch: int
) -> dict[str, Candidate]:
    """Soft training step with hardening loss: ours, upstream's, a dense layer of the same training width."""
    data = _Data(batch, in_features, out_features)
    layer = FFF(in_features, leaf_width, out_features, depth=depth, hardening_weight=HARDENING)
    candidates = {
        "fff_soft": _ours(layer, data),
        "dense": _dense_step(in_features, leaf_width * 2**depth, out_features, data),
    }
    if find_spec("fastfeedforward"):
        candidates["upstream"] = _upstream_step(layer, data)
    return candidates


def hard_training(
    *, in_features: int, out_features: int, leaf_width: int, depth: int, batch: int
) -> dict[str, Candidate]:
    """Straight-through training step with leaf balance, the soft one with hardening, and dense layers."""
    data = _Data(batch, in_features, out_features)
    hard = FFF(in_features, leaf_width, out_features, depth=depth, mode="straight_through", balance_weight=BALANCE)
    soft = FFF(in_features, leaf_width, out_features, depth=depth, hardening_weight=HARDENING)
    soft.load_state_dict(hard.state_dict())
    return {
        "fff_straight_through": _ours(hard, data),
        "fff_soft": _ours(soft, data),
        "dense": _dense_step(in_features, leaf_width * 2**depth, out_features, data),
        "dense_leaf": _dense_step(in_features, leaf_width, out_features, data),
    }


def training_memory(
    *, in_features: int, out_features: int, leaf_width: int, depth: int, batch: int
) -> dict[str, Candidate]:
    """Training steps of all that has `leaf_width * 2**depth` hidden units: dense, trees, a mixture of experts."""
    data = _Data(batch, in_features, out_features)
    candidates = hard_training(
        in_features=in_features, out_features=out_features, leaf_width=leaf_width, depth=depth, batch=batch
    )
    mixture = MoE(in_features, leaf_width, out_features, num_experts=2**depth, top_k=2, router="mixtral")
    mixture.balance_weight = BALANCE
    candidates["moe_top_2"] = _ours(mixture, data)
    if find_spec("fastfeedforward"):
        soft = candidates["fff_soft"].module
        candidates["upstream"] = _upstream_step(soft, data)
    return candidates


def hard_inference(
    *, in_features: int, out_features: int, leaf_width: int, depth: int, batch: int, expert_width: int | None = None
) -> dict[str, Candidate]:
    """Hard evaluation: ours, upstream's, dense layers of the training width and of one leaf; with `expert_width` a
    top-2 mixture of the training width too."""
    data = _Data(batch, in_features, out_features)
    layer = FFF(in_features, leaf_width, out_features, depth=depth).eval()
    plain = _reference(layer)
    dense = _dense(in_features, leaf_width * 2**depth, out_features)
    small = _dense(in_features, leaf_width, out_features)
    candidates = {
        "fff_hard": Candidate(layer, data.evaluate(layer), lambda: data.output(layer), lambda: data.output(plain)),
        "dense": Candidate(dense, data.evaluate(dense)),
        "dense_leaf": Candidate(small, data.evaluate(small)),
    }
    if expert_width:
        experts = leaf_width * 2**depth // expert_width
        mixture = MoE(in_features, expert_width, out_features, num_experts=experts, router="mixtral").eval()
        plain_mixture = _reference(mixture)
        candidates["moe_top_2"] = Candidate(
            mixture, data.evaluate(mixture), lambda: data.output(mixture), lambda: data.output(plain_mixture)
        )
    if find_spec("fastfeedforward"):
        other = upstream_copy(layer)
        candidates["upstream"] = Candidate(
            other,
            data.evaluate(other),
            lambda: {"y": data.output(other)["y"] + missing_bias(other, data.x)},
            lambda: data.output(plain),
        )
    return candidates


class _Data:
    """Normal rows and targets, and what is done with them."""

    def __init__(self, batch: int, in_features: int, out_features: int) -> None:
        self.x = torch.randn(batch, in_features)
        self.target = torch.randn(batch, out_features)

    def loss(self, module: nn.Module) -> Tensor:
        return F.mse_loss(module(self.x), self.target) + aux_loss(module)

    def step(self, module: nn.Module, loss: Callable | None = None) -> Callable[[], None]:
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LEARNING_RATE)

        def run() -> None:
            (loss(module, self) if loss else self.loss(module)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def gradients(
        self, module: nn.Module, loss: Callable | None = None, collect: Callable[[], dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Loss and all gradients of one step, which takes no step."""
        value = loss(module, self) if loss else self.loss(module)
        value.backward()
        found = collect() if collect else {name: p.grad for name, p in module.named_parameters()}
        found = {"loss": value.detach()} | {name: grad.clone() for name, grad in found.items()}
        module.zero_grad(set_to_none=True)
        return found

    def evaluate(self, module: nn.Module) -> Callable[[], Tensor]:
        module.eval()

        def run() -> Tensor:
            with torch.no_grad():
                return module(self.x)

        return run

    def output(self, module: nn.Module) -> dict[str, Tensor]:
        return {"y": self.evaluate(module)()}


def _ours(layer: FFF | MoE, data: _Data) -> Candidate:
    plain = _reference(layer)
    work = None
    if isinstance(layer, FFF):
        layer(data.x)
        soft = layer.mode == "soft"
        index = torch.arange(layer.num_leaves) if soft else layer.record.index
        width, nodes = (layer.size.training_width, layer.num_leaves - 1) if soft else (layer.leaf_width, layer.depth)
        work = step_work(layer.in_features, width, layer.out_features, nodes, hit_parameters(layer, index), len(data.x))
    return Candidate(layer, data.step(layer), lambda: data.gradients(layer), lambda: data.gradients(plain), work=work)


def _dense_step(in_features: int, hidden_features: int, out_features: int, data: _Data) -> Candidate:
    module = _dense(in_features, hidden_features, out_features)
    parameters = sum(p.numel() for p in module.parameters())
    work = step_work(in_features, hidden_features, out_features, 0, parameters, len(data.x))
    return Candidate(module, data.step(module), work=work)


def _upstream_step(layer: FFF, data: _Data) -> Candidate:
    other, plain = upstream_copy(layer), _reference(layer)
    return Candidate(
        other,
        data.step(other, _upstream_loss),
        lambda: data.gradients(other, _upstream_loss, lambda: in_our_layout(other, grad=True)),
        lambda: data.gradients(plain),
    )


def step_work(in_features: int, width: int, out_features: int, nodes: int, parameters: int, rows: int) -> Work:
    """Of a step in which each row passes `width` hidden units and `nodes` nodes, and `parameters` are hit.

    Forward, the gradients of all weights, that of the hidden units; none of the rows. Rows and targets are read,
    parameters are read and written.
    """
    flops = 2 * rows * (2 * (width + nodes) * in_features + 3 * width * out_features)
    return Work(flops, 4 * (rows * (in_features + out_features) + 2 * parameters))


def hit_parameters(layer: FFF, index: Tensor) -> int:
    """Numbers in the leaves `index` of a single tree and in the nodes on the way to them, each once."""
    hit = index.unique()
    nodes = sum((hit >> (layer.depth - level)).unique().numel() for level in range(layer.depth))
    leaf = layer.leaf_width * (layer.in_features + layer.out_features + 1) + layer.out_features
    return hit.numel() * leaf + nodes * (layer.in_features + 1)


def _reference(layer: FFF | MoE) -> FFF | MoE:
    plain = copy.deepcopy(layer)
    plain.backend = "reference"
    return plain


def _dense(in_features: int, hidden_features: int, out_features: int) -> nn.Module:
    """What a user would otherwise write; not `fff.FeedForward`, so that no flaw of ours is on both sides of a ratio."""
    return nn.Sequential(nn.Linear(in_features, hidden_features), nn.ReLU(), nn.Linear(hidden_features, out_features))


def _upstream_loss(module: nn.Module, data: _Data) -> Tensor:
    y, entropy = module(data.x, return_entropies=True)
    return F.mse_loss(y, data.target) + HARDENING * entropy.mean()
