"""The papers' implementation, PyPI `fastfeedforward` 0.2.1, with the weights of an `fff.FFF`.

Its evaluation leaves out the output bias of the leaf that its training adds; `missing_bias` is the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fff.layers.fff import FFF
from fff.layers.upstream import check_upstream_form, to_our_layout


def upstream_copy(layer: FFF) -> nn.Module:
    """A `fastfeedforward.FFF` that computes what `layer` computes in mode "soft"; ModuleNotFoundError without it.

    ValueError for what upstream has no form of, see `check_upstream_form`.
    """
    check_upstream_form(layer)
    from fastfeedforward import FFF as Upstream

    other = Upstream(
        layer.in_features,
        layer.leaf_width,
        layer.out_features,
        layer.depth,
        activation=_Activation(layer.act),
        dropout=layer.drop,
        region_leak=layer.region_leak,
    )
    with torch.no_grad():
        for name, value in in_our_layout(other).items():
            value.copy_(getattr(layer, name))
    return other.train(layer.training)


def in_our_layout(other: nn.Module, *, grad: bool = False) -> dict[str, Tensor]:
    """Views of upstream's parameters, or of their gradients, under the names and shapes of `fff.FFF`."""
    return to_our_layout({name: p.grad if grad else p for name, p in other.named_parameters()})


@torch.no_grad()
def missing_bias(other: nn.Module, x: Tensor) -> Tensor:
    """(T, O) what upstream's evaluation must be given to equal its own hard training forward."""
    leaf = torch.zeros(x.shape[0], dtype=torch.int64)
    for level in range(int(other.depth)):
        node = 2**level - 1 + leaf
        logit = (x * other.node_weights[node]).sum(-1) + other.node_biases[node, 0]
        leaf = 2 * leaf + (logit >= 0)
    return other.b2s[leaf]


class _Activation(nn.Module):
    """Upstream keeps its activation as a submodule."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
