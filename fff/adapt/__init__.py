"""Routed layers in other people's models: blocks replaced, experts run, dense layers converted, weights read."""

from fff.adapt.blocks import Block, feedforward_blocks, known_block
from fff.adapt.checkpoints import (
    from_fastfeedforward,
    from_ultrafastbert,
    to_fastfeedforward,
    to_ultrafastbert,
)
from fff.adapt.convert import Conversion, from_dense, relative_error
from fff.adapt.distill import convert_feedforward, distillation
from fff.adapt.experts import experts_forward, register_experts
from fff.adapt.flat import to_flat
from fff.adapt.inspection import Inspection, inspect, prune
from fff.adapt.padding import skip_padding
from fff.adapt.pretrained import routed
from fff.adapt.replace import Replacement, replace_feedforward, timm_mlp

__all__ = [
    "Block",
    "Conversion",
    "Inspection",
    "Replacement",
    "convert_feedforward",
    "distillation",
    "experts_forward",
    "feedforward_blocks",
    "from_dense",
    "from_fastfeedforward",
    "from_ultrafastbert",
    "inspect",
    "known_block",
    "prune",
    "register_experts",
    "relative_error",
    "replace_feedforward",
    "routed",
    "skip_padding",
    "timm_mlp",
    "to_fastfeedforward",
    "to_flat",
    "to_ultrafastbert",
]
