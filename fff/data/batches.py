"""Batches of rows that lie in memory, sliced from whole tensors: the loader of every data module here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Batches:
    """Iterable of (x (B, *in_shape), y int64 (B,)), without worker processes or per-row Python.

    x: all rows: float32; or uint8, turned into float32 batch by batch as `x * scale + shift`, which takes a quarter of
        the memory and is faster than indexing a float copy; or int32 or int64 tokens (B, P), with as many targets y
        (B, P), both int64 in a batch.
    rows: the rows to go through, in this order unless `seed` is given.
    seed: with a seed, each epoch has its own order, a pure function of (seed, epoch); in a plain loop call
        `set_epoch(epoch)` before each pass, Lightning's Trainer does so by itself.
    drop_last: leave out the last batch where it is smaller than the others.
    augment: called with each batch of x, as float32, and a generator that is a function of seed, epoch and position in
        the epoch; needs a seed.

    `state_dict` holds the position within the epoch, so that a Trainer that resumes from a checkpoint written in the
    middle of an epoch goes on with the batch that would have come next.
    """

    # Lightning calls set_epoch on `loader.sampler`, and reads `batch_sampler` of whatever has a sampler.
    batch_sampler = None

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        rows: Tensor,
        batch_size: int,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if augment is not None and seed is None:
            raise ValueError(f"augment={augment!r} needs a seed")
        self.x, self.y, self.rows = x, y, rows
        self.batch_size, self.drop_last, self.seed = batch_size, drop_last, seed
        self.scale, self.shift, self.augment = scale, shift, augment
        self.epoch = 0
        self._position = 0  # batches of this epoch handed out
        self._resume: tuple[int, int] | None = None
        if seed is not None:
            self.sampler = self

    def __len__(self) -> int:
        full, rest = divmod(len(self.rows), self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self._position = self._resume = state["epoch"], state["position"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: nothing here runs before the first batch is asked for, which is after Lightning's set_epoch.
        order, seeds = self._order()
        epoch, start = self._resume or (self.epoch, 0)
        self._resume = None
        if epoch != self.epoch:
            start = 0
        for position in range(start, len(self)):
            index = order[position * self.batch_size : (position + 1) * self.batch_size]
            x, y = self.x.index_select(0, index), self.y.index_select(0, index).to(torch.int64)
            if self.scale is not None:
                x = x.to(torch.float32).mul_(self.scale).add_(self.shift)
            elif x.dtype == torch.int32:
                x = x.to(torch.int64)
            if self.augment is not None:
                x = self.augment(x, torch.Generator().manual_seed(seeds[position]))
            self._position = position + 1
            yield x, y

    def _order(self) -> tuple[Tensor, list[int]]:
        """The rows of this epoch, and a seed for what is random in each of its batches."""
        if self.seed is None:
            return self.rows, []
        # Not seed + epoch: run s + 1 would then go through the orders of run s, one epoch early.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = self.rows[torch.randperm(len(self.rows), generator=generator)]
        return order, torch.randint(2**62, (len(self),), generator=generator).tolist()
