"""Data sets as LightningDataModules: tensors in memory, official splits, sliced batches."""

from fff.data.batches import Batches
from fff.data.clusters import ClusterData
from fff.data.images import ImageData
from fff.data.module import InMemoryData, Rows
from fff.data.random_labels import RandomLabels

__all__ = ["Batches", "ClusterData", "ImageData", "InMemoryData", "RandomLabels", "Rows"]
