"""Weights of the two upstream implementations, as layers of ours and back.

State dicts are as `module.state_dict()` gives them; the tensors of a result are copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fff.layers.check import check_depth
from fff.layers.fff import FFF
from fff.layers.ultra_fff import MAX_DEPTH, UltraFFF
from fff.layers.upstream import UPSTREAM_NAMES, check_upstream_form, to_our_layout, to_upstream_layout

_ULTRA_NAMES = ("linear_in.weight", "linear_in.bias", "linear_out.weight")
_USAGE = {"node_usage", "leaf_usage"}


def from_fastfeedforward(state_dict: Mapping[str, Tensor], *, prefix: str = "", **options: Any) -> FFF:
    """The layer with the weights of a `fastfeedforward.FFF` (PyPI 0.2.1, arXiv 2308.14711).

    prefix: of the layer's names in the state dict of a whole model, with its dot at the end.
    options: further arguments of `fff.FFF`. What a state dict does not hold is for them to say: act_layer (both default
        to ReLU), drop, region_leak.

    The soft forwards of training are the same. Evaluation differs by a bias: upstream adds the output bias of the leaf
    in training and leaves it out of evaluation, this layer adds it in both. `layer.b_out.data.zero_()` gives upstream's
    evaluation, and with it the accuracy that was measured there. Usage counters are dropped.

    ValueError where a name is missing or unknown, or depth and shapes do not fit.
    """
    theirs = _under(prefix, state_dict, {*UPSTREAM_NAMES.values(), "depth"}, optional=_USAGE)
    ours, depth = to_our_layout(theirs), int(theirs["depth"])
    leaves, leaf_width, in_features = ours["w_in"].shape
    if leaves != 2**depth:
        raise ValueError(f"state_dict: depth={depth} does not fit {leaves} leaves")
    layer = FFF(in_features, leaf_width, ours["w_out"].shape[2], depth=depth, **options)
    check_upstream_form(layer)
    return _filled(layer, ours)


def to_fastfeedforward(layer: FFF) -> dict[str, Tensor]:
    """The state dict of a `fastfeedforward.FFF(in_features, leaf_width, out_features, depth)` with the layer's weights.

    Its training computes what the layer's soft mixture does at temperature 1, its evaluation leaves out the output bias
    (and fails at depth 0). ValueError for layers that upstream has no form of, those of mode "gated" too.
    """
    if not isinstance(layer, FFF):
        raise ValueError(f"layer is a {type(layer).__name__}, and upstream has none but trees")
    check_upstream_form(layer)
    if layer.mode == "gated":
        raise ValueError("mode='gated' weighs the leaf by its probability, which upstream's evaluation does not")
    theirs = to_upstream_layout(layer.state_dict())
    return {"depth": torch.tensor(layer.depth), **_copied(theirs)}


def from_ultrafastbert(state_dict: Mapping[str, Tensor], *, depth: int, prefix: str = "", **options: Any) -> UltraFFF:
    """The layer with the weights of UltraFastBERT's FFF (arXiv 2311.10770, training/cramming/architectures/fff.py).

    depth: theirs, the number of decisions; a state dict does not tell one deep tree from several shallow ones. The
        number of trees follows from it.
    prefix: see `from_fastfeedforward`.
    options: further arguments of `fff.UltraFFF`; act_layer defaults to GELU in both.

    Biases agree: one per neuron, none of the output. A logit of exactly 0 goes left there and right here.

    ValueError where a name is missing or unknown, or the depth does not fit the shapes.
    """
    theirs = _under(prefix, state_dict, set(_ULTRA_NAMES))
    check_depth(depth, MAX_DEPTH)
    weight, bias, out = (theirs[name] for name in _ULTRA_NAMES)
    num_trees, left_over = divmod(weight.shape[0], 2 ** (depth + 1) - 1)
    if left_over or not num_trees:
        raise ValueError(f"depth={depth}: {weight.shape[0]} neurons are no trees of {2 ** (depth + 1) - 1}")
    layer = UltraFFF(weight.shape[1], out.shape[0], depth=depth, num_trees=num_trees, **options)
    return _filled(layer, {"w_in": weight, "b_in": bias, "w_out": out.T})


def to_ultrafastbert(layer: UltraFFF) -> dict[str, Tensor]:
    """The state dict of UltraFastBERT's `FFF(in_features, out_features, depth, parallel_size=num_trees)`, whose forward
    needs out_features = in_features. A layer without biases gets zeros there."""
    bias = layer.w_in.new_zeros(len(layer.w_in)) if layer.b_in is None else layer.b_in
    return _copied(dict(zip(_ULTRA_NAMES, (layer.w_in, bias, layer.w_out.T), strict=True)))


def _under(
    prefix: str, state_dict: Mapping[str, Tensor], names: set[str], optional: set[str] = frozenset()
) -> dict[str, Tensor]:
    """The tensors below a prefix, without it; ValueError unless these are the names, some of them optional."""
    found = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    missing, unknown = sorted(names - set(found)), sorted(set(found) - names - optional)
    if missing or unknown:
        raise ValueError(f"state_dict with prefix={prefix!r} lacks {missing} and has unknown names {unknown}")
    return found


def _filled(layer: FFF | UltraFFF, tensors: dict[str, Tensor]) -> FFF | UltraFFF:
    layer.to(device=tensors["w_in"].device, dtype=tensors["w_in"].dtype).load_state_dict(tensors)
    return layer


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
