"""Routed feedforward layers for PyTorch: dense, mixture of experts, and binary-tree (fast feedforward) layers.

Importing this package costs nothing: names load on first use, and the layers need torch alone.
"""

from importlib import import_module

_HOME = {
    "FFF": "fff.layers.fff",
    "FeedForward": "fff.layers.dense",
    "MoE": "fff.layers.moe",
    "NoFeedForward": "fff.layers.none",
    "PatchMoE": "fff.layers.patch_moe",
    "UltraFFF": "fff.layers.ultra_fff",
    "Record": "fff.layers.contract",
    "RoutedLayer": "fff.layers.contract",
    "Size": "fff.layers.contract",
    "aux_loss": "fff.layers.contract",
    "inspect": "fff.adapt.inspection",
    "node_tracing": "fff.layers.contract",
    "prune": "fff.adapt.inspection",
    "routing": "fff.layers.contract",
    "soft_evaluation": "fff.layers.contract",
    "update_biases": "fff.layers.contract",
}

_MODULES = ("adapt", "hub")

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"fff.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fff' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
