"""UltraFFF: a tree whose nodes are the neurons (UltraFastBERT, arXiv 2311.10770), several trees in parallel.

T rows, D input width, O output width, P parallel trees, d depth, M = 2^(d+1) - 1 neurons of one tree.

    y = sum over trees and over the d + 1 neurons i on the row's path of  act(logit_i) * w_out[i]

A neuron's logit both scales its output row and, by its sign, decides where the path goes on.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.layers.check import check_choice, check_depth, check_positive
from fff.layers.contract import Record, RoutedLayer, Size, TreeTrace
from fff.layers.init import uniform_fan_in_
from fff.ops.activation import Activation, resolve_activation
from fff.ops.context import autocast_dtype, exporting, summed_precisely, without_autocast
from fff.ops.tree_route import DENSE_LEVELS, Nodes, dense_logits, greedy_leaf, path_logits, path_to

MAX_DEPTH = 15


class UltraFFF(RoutedLayer):
    """in_features, out_features: D and O; out_features defaults to in_features.

    depth: 0 .. 15 decisions per tree; a row passes depth + 1 neurons of each tree.  num_trees: P.
    act_layer: activation of every neuron.  bias: of the neurons; there is no output bias.
    backend: "dense" multiplies a (T, P M) matrix that is zero off the path with all output rows, "gather" sums the
        output rows on the path; "auto" takes the first up to depth 6.

    Training and evaluation are the same function. The choice of the path has no gradient: only the activations on it
    train the neurons. Departure from the authors' code: a logit of exactly 0 goes right, as everywhere in this package.
    The record counts the leaves, the 2^depth neurons of the last level of each tree.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        depth: int,
        num_trees: int = 1,
        act_layer: Activation = "gelu",
        bias: bool = True,
        backend: Literal["auto", "dense", "gather"] = "auto",
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        check_positive(in_features=in_features, out_features=out_features, num_trees=num_trees)
        check_depth(depth, MAX_DEPTH)
        check_choice("backend", backend, ("auto", "dense", "gather"))
        self.in_features, self.out_features, self.depth, self.num_trees = in_features, out_features, depth, num_trees
        self.act = resolve_activation(act_layer, "act_layer")
        self.backend = ("dense" if depth < DENSE_LEVELS else "gather") if backend == "auto" else backend
        neurons = num_trees * (2 ** (depth + 1) - 1)
        self.w_in = nn.Parameter(torch.empty(neurons, in_features))
        self.b_in = nn.Parameter(torch.empty(neurons)) if bias else None
        self.w_out = nn.Parameter(torch.empty(neurons, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(D) and +-1/sqrt((d + 1) P), the numbers of inputs that each output adds up."""
        uniform_fan_in_(self.in_features, self.w_in, self.b_in)
        uniform_fan_in_((self.depth + 1) * self.num_trees, self.w_out)

    @property
    def size(self) -> Size:
        trained = self.num_trees * (2 ** (self.depth + 1) - 1)
        visited = self.num_trees * (self.depth + 1)
        return Size(trained, visited, trained, visited, 2 * visited * (self.in_features + self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        dtype = autocast_dtype(rows)
        if dtype is None:
            y = self._walk(rows)
        else:  # a neuron decides too, so all of it is computed in the type of the parameters
            with without_autocast(rows):
                y = self._walk(rows.to(self.w_in.dtype)).to(dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _walk(self, rows: Tensor) -> Tensor:
        neurons = self.w_in.shape[0] // self.num_trees
        bias = None if self.b_in is None else self.b_in.view(self.num_trees, neurons)
        nodes = Nodes(self.w_in.view(self.num_trees, neurons, -1), bias)
        levels = min(self.depth + 1, DENSE_LEVELS)
        top = dense_logits(rows, nodes, levels)
        # The walk takes depth decisions; the neuron that it ends in is the last one on the path.
        leaf = greedy_leaf(rows, nodes, self.depth, top[..., : 2 ** min(self.depth, levels) - 1])
        last = (2**self.depth - 1 + leaf).unsqueeze(-1)
        node = torch.cat([path_to(leaf, self.depth).node, last], dim=-1)
        logit = path_logits(rows, nodes, node, top)
        tree = torch.arange(self.num_trees, device=rows.device).view(1, -1, 1)
        index = (node.squeeze(2) + tree * neurons).flatten(1)
        hidden = self.act(logit).flatten(1)
        if self.backend == "dense":
            on_path = hidden.new_zeros(rows.shape[0], self.w_out.shape[0]).scatter(1, index, hidden)
            y = on_path @ self.w_out
        elif exporting():  # ONNX knows an embedding bag as a loop over rows only
            y = torch.bmm(hidden.to(self.w_out.dtype).unsqueeze(1), F.embedding(index, self.w_out)).squeeze(1)
        else:
            table = summed_precisely(self.w_out)
            y = F.embedding_bag(index, table, per_sample_weights=hidden.to(table.dtype), mode="sum").to(rows.dtype)
        if not exporting():
            index = (leaf.squeeze(2) + tree.squeeze(2) * 2**self.depth).flatten(1)
            decisions = min(self.depth, levels)
            trace = TreeTrace(self.depth, index, top.detach()[..., : 2**decisions - 1])
            if self.depth > levels:
                trace = trace._replace(visited=logit.detach()[..., levels : self.depth])
            self.record = Record(rows.new_zeros(()), {}, index, self.num_trees * 2**self.depth, self.backend, trace)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, depth={self.depth}, "
            f"num_trees={self.num_trees}, bias={self.b_in is not None}"
        )
