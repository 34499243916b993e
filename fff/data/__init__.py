"""Data sets as LightningDataModules: tensors in memory, official splits, sliced batches.

Names load on first use: `fff.data.sources` then tells whether a set can be had before torch is imported.
"""

from importlib import import_module

_HOME = {
    "Batches": "fff.data.batches",
    "ClusterData": "fff.data.clusters",
    "ImageData": "fff.data.images",
    "InMemoryData": "fff.data.module",
    "RandomLabels": "fff.data.random_labels",
    "RotatedImages": "fff.data.rotate",
    "Rows": "fff.data.module",
    "TextData": "fff.data.text",
    "TokenizedText": "fff.data.tokenized",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fff.data' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
