"""The dense feedforward layer: one expert that every row goes through."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fff.layers.check import check_choice, check_positive, check_probability
from fff.layers.contract import Record, RoutedLayer, Size
from fff.layers.init import uniform_fan_in_
from fff.ops.activation import Activation, resolve_activation
from fff.ops.context import exporting
from fff.ops.expert_mlp import expert_mlp


class FeedForward(RoutedLayer):
    """Two linear maps with an activation between them, in the parameter layout of an expert layer with E = 1.

    in_features, hidden_features, out_features: widths; out_features defaults to in_features.
    act_layer: name, callable or `nn.Module` class.  glu: gated linear unit (then w_in holds 2 L rows).
    bias: both biases.  drop: dropout of hidden units in training.  backend: "reference" or "dense" ("auto").
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        act_layer: Activation = "relu",
        glu: bool = False,
        bias: bool = True,
        drop: float = 0.0,
        backend: Literal["auto", "reference", "dense"] = "auto",
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        check_positive(in_features=in_features, hidden_features=hidden_features, out_features=out_features)
        check_probability(drop=drop)
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.act = resolve_activation(act_layer, "act_layer")
        self.glu, self.drop = glu, drop
        check_choice("backend", backend, ("auto", "reference", "dense"))
        self.backend = "dense" if backend == "auto" else backend
        rows = hidden_features * (2 if glu else 1)
        self.w_in = nn.Parameter(torch.empty(1, rows, in_features))
        self.b_in = nn.Parameter(torch.empty(1, rows)) if bias else None
        self.w_out = nn.Parameter(torch.empty(1, hidden_features, out_features))
        self.b_out = nn.Parameter(torch.empty(1, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan in), as `nn.Linear`."""
        uniform_fan_in_(self.in_features, self.w_in, self.b_in)
        uniform_fan_in_(self.hidden_features, self.w_out, self.b_out)

    @property
    def size(self) -> Size:
        width = self.hidden_features
        flops = 2 * width * (self.in_features * (2 if self.glu else 1) + self.out_features)
        return Size(width, width, width, width, flops)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        y = expert_mlp(
            rows,
            None,
            None,
            self.w_in,
            self.b_in,
            self.w_out,
            self.b_out,
            activation=self.act,
            glu=self.glu,
            dropout=self.drop if self.training else 0.0,
            backend=self.backend,
        )
        if not exporting():
            index = torch.zeros(rows.shape[0], 1, dtype=torch.int64, device=x.device)
            self.record = Record(x.new_zeros(()), {}, index, 1, self.backend)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, hidden_features={self.hidden_features}, "
            f"out_features={self.out_features}, glu={self.glu}, bias={self.b_in is not None}, drop={self.drop}"
        )
