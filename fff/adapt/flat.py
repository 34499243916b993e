"""The hard route of a tree as one flat file, for devices without torch; `flat.c` beside this module reads it.

All numbers are little-endian, of 4 bytes. The header is the bytes "FFF1" and seven unsigned integers: D, L, O, depth d,
number of trees P, activation (place in `ACTIVATIONS`), and 1 for gated units or else 0. Float32 numbers follow:

    P (2^d - 1) nodes, each D weights and a bias; trees one after another, each in heap order
    P 2^d leaves, each O output biases, then L units: D weights and a bias (of gated units those of the gate, then
        those of the value), O output weights

so that a row reads each node on its way, and its leaf, from front to back. A bias that a layer lacks is 0.

D input width, L leaf width, O output width, E leaves, N nodes.
"""

from __future__ import annotations

import struct
from os import PathLike

import torch
from torch import Tensor

from fff.layers.fff import FFF
from fff.ops.activation import activation_name

MAGIC = b"FFF1"
ACTIVATIONS = ("relu", "gelu", "silu", "relu2", "identity", "gelu_tanh")


@torch.no_grad()
def to_flat(layer: FFF, path: str | PathLike[str]) -> None:
    """Write what evaluation of the layer computes to a file; compile its reader with `cc -O2 -o flat flat.c -lm`.

    Parallel trees, gated units, decision biases and a base (merged into the leaves) are in it; a layer of another type
    becomes float32, and may then decide close cases otherwise. ValueError for what is not in it: mode
    "gated", several leaves of a tree, node networks, a master leaf, soft evaluation, an unnamed activation.
    """
    activation = _check(layer)
    nodes, leaves = _nodes(layer), _leaves(layer)
    sizes = layer.in_features, layer.leaf_width, layer.out_features, layer.depth, layer.num_trees
    with open(path, "wb") as file:
        file.write(struct.pack("<4s7I", MAGIC, *sizes, ACTIVATIONS.index(activation), layer.glu))
        for part in (*nodes, *leaves):
            file.write(struct.pack(f"<{part.numel()}f", *part.tolist()))


def _check(layer: FFF) -> str:
    if not isinstance(layer, FFF):
        raise ValueError(f"layer={type(layer).__name__} is no fff.FFF")
    if layer.mode == "gated":
        raise ValueError("mode='gated' weighs leaves by their paths, for which a flat file has no place")
    plain = {"top_k": 1, "beam_width": 1, "node_width": 1, "master_width": 0, "soft_eval": False}
    for name, value in plain.items():
        if (found := getattr(layer, name)) != value:
            raise ValueError(f"{name}={found!r} has no place in a flat file, only {value!r}")
    name = activation_name(layer.act)
    if name is None:
        raise ValueError(f"act_layer={layer.act!r} is none of {list(ACTIVATIONS)}")
    return name


def _nodes(layer: FFF) -> Tensor:
    """(N, D + 1) weights and bias."""
    bias = layer.node_weight.new_zeros(len(layer.node_weight))
    for part in (layer.node_bias, layer.decision_bias):
        bias = bias if part is None else bias + part
    return torch.cat([layer.node_weight, bias.unsqueeze(1)], dim=1).float()


def _leaves(layer: FFF) -> Tensor:
    """(E, O + L (D + 1 + O)), of gated units (E, O + L (2 D + 2 + O))."""
    w_in, b_in, w_out, b_out = layer.experts()
    b_in = w_in.new_zeros(w_in.shape[:2]) if b_in is None else b_in
    b_out = w_out.new_zeros(len(w_out), layer.out_features) if b_out is None else b_out
    # The first L rows are those of the gate.
    maps = torch.cat([w_in, b_in.unsqueeze(-1)], dim=-1).unflatten(1, (-1, layer.leaf_width))
    units = torch.cat([maps.transpose(1, 2).flatten(2), w_out], dim=-1)
    return torch.cat([b_out, units.flatten(1)], dim=1).float()
