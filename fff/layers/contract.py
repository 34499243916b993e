"""What every routed layer gives: a plain tensor, its sizes, and the record of its last routing.

T rows, E experts, K chosen experts per row, N tree nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from inspect import Parameter, signature
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fff.ops.tree_route import path_to


class TreeTrace(NamedTuple):
    """Node logits, divided by the temperature, of one forward pass over P trees of depth d, detached.

    index: (T, P K) chosen leaves, as in the record: counted over all trees.
    top: (T, P, M) logits of all nodes of the first levels, M = 2^levels - 1; None where nodes were evaluated on the way
        to the leaves alone, as in native evaluation (but see `node_tracing`).
    visited: (T, P, K, V) logits of the last V decisions on the way to each leaf; None where there are none, and in
        PyTorch's evaluation of a single leaf with weight 1, which has no use for path probabilities.
    """

    depth: int
    index: Tensor
    top: Tensor | None = None
    visited: Tensor | None = None

    def node_entropy(self) -> Tensor:
        """Mean Bernoulli entropy of each node in nats, (P * (2^d - 1),), over the rows for which it was evaluated:
        all rows for the nodes in `top`, the visiting rows for the others, nan for a node that none visited."""
        known = 0 if self.top is None else self.top.shape[2]
        num_trees = (self.visited if self.top is None else self.top).shape[1]
        total = torch.full((num_trees, 2**self.depth - 1), torch.nan, dtype=torch.float32, device=self.index.device)
        if self.top is not None:
            total[:, :known] = _entropy(self.top).mean(0)
        if self.visited is not None:
            leaf = (self.index % 2**self.depth).view(self.visited.shape[:3])
            node = path_to(leaf, self.depth).node[..., self.depth - self.visited.shape[3] :]
            node = node.transpose(0, 1).flatten(1)
            entropy = _entropy(self.visited).transpose(0, 1).flatten(1)
            zeros = torch.zeros_like(total)
            mean = zeros.scatter_add(1, node, entropy) / zeros.scatter_add(1, node, torch.ones_like(entropy))
            total[:, known:] = mean[:, known:]
        return total.flatten()


def _entropy(logit: Tensor) -> Tensor:
    # Even in the logit; on its size nothing cancels.
    size = logit.float().abs()
    return torch.nn.functional.softplus(-size) + size * torch.sigmoid(-size)


class Record(NamedTuple):
    """What one forward pass decided and what it costs beyond the task loss.

    aux_loss: (), the weighted sum of the auxiliary losses; differentiable, 0 where nothing is weighted.
    losses: each raw (unweighted) auxiliary loss by name, (), detached.
    index: (T, K) the experts that the hard route chose for each row, -1 where a choice was dropped; detached. In
        training with `FFF.runner_up` the leaf beside the greedy one follows it, and counts in the load.
    num_experts: E.
    backend: resolved name of the `expert_mlp` backend that ran.
    tree: node logits of a tree; None for other layers.
    demand: (T, K) the choices before a capacity dropped any; None where they equal `index`.
    """

    aux_loss: Tensor
    losses: dict[str, Tensor]
    index: Tensor
    num_experts: int
    backend: str
    tree: TreeTrace | None = None
    demand: Tensor | None = None

    @property
    def node_entropy(self) -> Tensor | None:
        """Mean entropy of each tree node in nats, (N,), see `TreeTrace`; computed when asked for; None: no tree."""
        return None if self.tree is None else self.tree.node_entropy()

    @property
    def load(self) -> Tensor:
        """Rows routed to each expert, (E,) int64, counted from the hard choice; computed when asked for."""
        return _count(self.index, self.num_experts)

    @property
    def demanded_load(self) -> Tensor:
        """Rows that chose each expert, dropped ones included, (E,) int64, over all ranks of a distributed run."""
        load = _count(self.index if self.demand is None else self.demand, self.num_experts)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        return load


def _count(index: Tensor, num_experts: int) -> Tensor:
    index = index.flatten()
    kept = (index >= 0).to(torch.int64)
    return torch.zeros(num_experts, dtype=torch.int64, device=index.device).scatter_add_(0, index.clamp(min=0), kept)


class Size(NamedTuple):
    """Static cost of a layer, in neurons and in floating-point operations (a multiply-add counts as two).

    training_width: hidden units over all experts.  inference_width: hidden units that one row passes through.
    training_size, inference_size: the same plus the neurons of the router that are trained / evaluated for one row
        (FFF paper, section 3: (2^d - 1) n + 2^d l and d n + l).
    flops_per_row: router and experts of one row of hard inference, biases and activations left out.
    """

    training_width: int
    inference_width: int
    training_size: int
    inference_size: int
    flops_per_row: int


class RoutedLayer(nn.Module, ABC):
    """Base of all layers: `forward(x)` maps (..., in_features) to (..., out_features) in x's dtype.

    A layer of your own sets `in_features` and `out_features`, has the property `size`, and sets `record` in `forward`:

        class Dense(fff.RoutedLayer):
            def __init__(self, in_features, out_features=None, *, hidden=16):
                super().__init__()
                self.in_features, self.out_features = in_features, out_features or in_features
                self.up, self.down = nn.Linear(in_features, hidden), nn.Linear(hidden, self.out_features)

            def forward(self, x):
                index = torch.zeros(len(self.rows(x)), 1, dtype=torch.int64, device=x.device)  # one expert for all
                self.record = fff.Record(x.new_zeros(()), {}, index, num_experts=1, backend="reference")
                return self.down(torch.relu(self.up(x)))

            @property
            def size(self):
                hidden, flops = self.up.out_features, 2 * self.up.out_features * (self.in_features + self.out_features)
                return fff.Size(hidden, hidden, hidden, hidden, flops)

    Each forward replaces `record`; it is None before the first, after copying or unpickling, and under export.
    Under activation checkpointing use `use_reentrant=False`: the re-entrant kind runs the first forward without
    gradients, so that no auxiliary loss can reach the parameters.
    """

    record: Record | None
    in_features: int
    out_features: int
    trace_nodes: bool = False
    router_names: tuple[str, ...] = ()
    # Whether the answer to a row depends on the other rows, in evaluation as well.
    mixes_rows: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        layer = super().__new__(cls)
        layer.__dict__["_call"] = args, kwargs
        return layer

    def __init__(self) -> None:
        super().__init__()
        self.record = None

    def arguments(self) -> dict[str, Any]:
        """Arguments by which the constructor makes a layer as this one is now: those it was called with, defaults
        included. Where the layer has an attribute of an argument's name (of `act_layer`: `act`) it counts instead: it
        may have been set since.
        """
        args, kwargs = self._call
        bound = signature(type(self).__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *named = bound.signature.parameters.values()
        given = {parameter.name: bound.arguments[parameter.name] for parameter in named}
        for parameter in named:
            if parameter.kind is Parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name))
        if "act_layer" in given:
            given["act_layer"] = getattr(self, "act", given["act_layer"])  # a module is none of `vars`
        return {name: vars(self).get(name, value) for name, value in given.items()}

    @property
    @abstractmethod
    def size(self) -> Size:
        """Static cost of this layer."""

    def router_parameters(self) -> list[nn.Parameter]:
        """Those that decide where a row goes; none where nothing is decided by parameters of its own."""
        return [p for name in self.router_names if (p := getattr(self, name, None)) is not None]

    def update_bias(self) -> None:
        """Move the decision biases by the last load; nothing where the layer has none."""

    def __getstate__(self) -> dict:
        # A record holds non-leaf tensors, which can be neither deep-copied nor pickled.
        return {**super().__getstate__(), "record": None}

    def rows(self, x: Tensor) -> Tensor:
        """Check x and flatten it to (T, in_features)."""
        dim = x.dim()
        if dim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but {type(self).__name__} was built with in_features={self.in_features}"
            )
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}, but {type(self).__name__} needs a floating-point input")
        return x if dim == 2 else x.reshape(-1, self.in_features)


def routing(model: nn.Module) -> Iterator[tuple[str, Record]]:
    """The records of all layers of `model` that have run, each with its module name, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer) and module.record is not None:
            yield name, module.record


def aux_loss(model: nn.Module) -> Tensor:
    """Sum of the weighted auxiliary losses of the last forward over all layers of `model`, each layer once; ().

    Add it to the task loss once per forward pass (with the `Trainer` of transformers in `compute_loss`). A layer called
    several times in one pass counts its last call; one that a pass leaves out still has the record of the pass before.
    `nn.DataParallel` leaves the records with its copies, so that this is 0: use `DistributedDataParallel`.

    Balance losses are computed for each forward pass: with gradient accumulation or DistributedDataParallel the sum is
    the mean of the micro-batches' losses, which is not the balance loss of the whole batch. Entropies and z-losses are
    means over rows, the same either way, and the load that moves decision biases is summed over processes.
    """
    losses = [record.aux_loss for _, record in routing(model)]
    if losses:
        # In float32 at least: a layer without losses has a zero of its input's type.
        wide = reduce(torch.promote_types, (loss.dtype for loss in losses), torch.float32)
        return torch.stack([loss.to(losses[0].device, wide) for loss in losses]).sum()
    parameter = next(model.parameters(), None)
    return torch.zeros((), device=None if parameter is None else parameter.device)


def update_biases(model: nn.Module) -> None:
    """Loss-free balancing: let every layer of `model` that balances by decision biases move them by its last load.

    Call it once after each optimiser step. It is not part of forward, so that recomputing a forward pass (activation
    checkpointing) finds the biases as they were.
    """
    for module in model.modules():
        if isinstance(module, RoutedLayer) and module.record is not None:
            module.update_bias()


def soft_evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """Inside this context the trees of `model` evaluate their soft mixture instead of the hard route.

    Layers without a soft route are left as they are.
    """
    return _switched_on(model, "soft_eval")


def node_tracing(model: nn.Module) -> AbstractContextManager[None]:
    """Inside this context the trees of `model` evaluate the nodes of their first levels for every row, even in hard
    evaluation, where a native route sees only those on its way: node entropies are then means over all rows."""
    return _switched_on(model, "trace_nodes")


@contextmanager
def _switched_on(model: nn.Module, name: str) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, RoutedLayer) and hasattr(m, name)]
    before = [getattr(layer, name) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, name, True)
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            setattr(layer, name, value)
