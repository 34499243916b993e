"""Parameter layout of the papers' implementation, PyPI `fastfeedforward` 0.2.1, beside that of `fff.FFF`.

Theirs holds w1s (E, D, L), b1s (E, L), w2s (E, L, O), b2s (E, O), node_weights (N, D) and node_biases (N, 1).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fff.layers.contract import RoutedLayer

UPSTREAM_NAMES = {
    "w_in": "w1s",
    "b_in": "b1s",
    "w_out": "w2s",
    "b_out": "b2s",
    "node_weight": "node_weights",
    "node_bias": "node_biases",
}


def to_our_layout(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of upstream's parameters, or of their gradients, under the names and shapes of `fff.FFF`."""
    ours = {name: theirs[other] for name, other in UPSTREAM_NAMES.items()}
    return {**ours, "w_in": ours["w_in"].mT, "node_bias": ours["node_bias"].squeeze(-1)}


def to_upstream_layout(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views the other way."""
    theirs = {other: ours[name] for name, other in UPSTREAM_NAMES.items()}
    return {**theirs, "w1s": theirs["w1s"].mT, "node_biases": theirs["node_biases"].unsqueeze(-1)}


def check_upstream_form(layer: RoutedLayer) -> None:
    """ValueError for an `fff.FFF` whose function upstream has no form of: parallel trees, several leaves for a row or
    several paths to it, a master leaf, a base, node networks, gated units, additive gates, decision biases, no bias."""
    ones = layer.num_trees == layer.top_k == layer.beam_width == layer.node_width == 1
    plain = ones and not layer.master_width and not layer.glu and layer.soft_gate == "sigmoid"
    if not plain or layer.has_base or layer.decision_bias is not None or layer.b_in is None:
        raise ValueError(f"layer={layer} has no upstream form")
