"""What every data set of the library gives: in-memory rows, a fixed validation split, and loaders over them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from fff.data.batches import Batches
from fff.data.digest import content_digest


class Rows(NamedTuple):
    """One data set in memory.

    train_x (T, *in_shape), train_y (T,) int64: the official training split, validation rows included.
    test_x, test_y: the official test split.  scale, shift: see `Batches`; None where x is float32 already.
    digest: names the content; None where `content_digest` of the four tensors shall do so.
    augment: see `Batches`; of the training batches alone.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_names: list[str]
    scale: Tensor | None = None
    shift: Tensor | None = None
    digest: str | None = None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None


class InMemoryData(LightningDataModule, ABC):
    """Loaders over `Rows`; one tenth of the training split is held out for validation.

    A data set of your own is a subclass whose `load` gives the rows:

        class Mine(fff.data.InMemoryData):
            def load(self):
                return fff.data.Rows(train_x, train_y, test_x, test_y, ["cat", "dog"])  # x float32, y int64

    seed: order of the training batches (of the run).  split_seed: choice of the validation rows; it is a number of its
        own so that runs with different seeds are validated on the same rows.
    eval_batch_size: rows in a batch of the three unshuffled loaders.
    """

    def __init__(
        self,
        batch_size: int = 256,
        *,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = False,
        eval_batch_size: int = 2048,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.seed, self.split_seed = seed, split_seed

    @abstractmethod
    def load(self) -> Rows:
        """Read or make the rows; called once."""

    @cached_property
    def rows(self) -> Rows:
        return self.load()

    @cached_property
    def content_digest(self) -> str:
        """Names the content of all rows and labels; the record of a run holds it."""
        return self.rows.digest or content_digest(self.rows[:4])

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        num_rows = len(self.rows.train_y)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(self.split_seed))
        num_val = round(num_rows / 10)
        # Ascending, so that an unshuffled pass reads memory forwards.
        return order[num_val:].sort().values, order[:num_val].sort().values

    def setup(self, stage: str | None = None) -> None:
        """Read the rows now; without it they are read when first asked for."""
        _ = self.rows

    @property
    def train_rows(self) -> Tensor:
        """Rows of the official training split that are trained on, ascending; (9 T / 10,)."""
        return self._split[0]

    @property
    def val_rows(self) -> Tensor:
        return self._split[1]

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(self.rows.train_x.shape[1:])

    @property
    def in_features(self) -> int:
        return math.prod(self.in_shape)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        return self.rows.class_names

    def train_dataloader(self) -> Batches:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(f"in-memory batches are for one device, got world_size={self.trainer.world_size}")
        rows = self.rows
        return Batches(
            rows.train_x,
            rows.train_y,
            self.train_rows,
            self.batch_size,
            scale=rows.scale,
            shift=rows.shift,
            seed=self.seed,
            drop_last=self.drop_last,
            augment=rows.augment,
        )

    def train_eval_dataloader(self) -> Batches:
        """The rows of `train_dataloader`, each once, as they are, unshuffled, in large batches."""
        return self._unshuffled(self.rows.train_x, self.rows.train_y, self.train_rows)

    def val_dataloader(self) -> Batches:
        return self._unshuffled(self.rows.train_x, self.rows.train_y, self.val_rows)

    def test_dataloader(self) -> Batches:
        return self._unshuffled(self.rows.test_x, self.rows.test_y, torch.arange(len(self.rows.test_y)))

    def _unshuffled(self, x: Tensor, y: Tensor, rows: Tensor) -> Batches:
        return Batches(x, y, rows, self.eval_batch_size, scale=self.rows.scale, shift=self.rows.shift)


class DerivedData(InMemoryData, ABC):
    """Made from the rows of `data`, whose batch sizes and seeds of order and split it takes over."""

    def __init__(self, data: InMemoryData) -> None:
        super().__init__(
            data.batch_size,
            seed=data.seed,
            split_seed=data.split_seed,
            drop_last=data.drop_last,
            eval_batch_size=data.eval_batch_size,
        )
        self.data = data
