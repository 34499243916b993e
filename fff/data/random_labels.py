"""A data set with part of its training labels replaced by random ones, to measure memorisation."""

from __future__ import annotations

import torch

from fff.data.digest import content_digest
from fff.data.module import DerivedData, InMemoryData, Rows


class RandomLabels(DerivedData):
    """`data` with each training label replaced, with probability `fraction`, by a uniformly random class.

    As in Zhang et al. 2017, "Understanding deep learning requires rethinking generalization", section 2 (partially
    corrupted labels): the random class may be the true one, test labels stay, and the whole official training split is
    corrupted, so validation labels too. At fraction 1 the validation accuracy is chance level and chooses nothing.

    num_rows: how many rows of the training split are kept, chosen at random by `label_seed`, fewer among more, with the
        labels that they have among all; None: all. A tenth of them is held out for validation: of 11 111 rows, 10 000
        are trained on.
    label_seed: of the random labels; what it corrupts at a small fraction, it corrupts at a larger one too, to the same
        labels. Batch sizes, normalisation and the other two seeds are those of `data`.
    """

    def __init__(
        self, data: InMemoryData, fraction: float = 1.0, *, num_rows: int | None = None, label_seed: int = 0
    ) -> None:
        super().__init__(data)
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be None or at least 1, got {num_rows}")
        self.fraction, self.num_rows, self.label_seed = fraction, num_rows, label_seed

    def load(self) -> Rows:
        rows = self.data.rows
        generator = torch.Generator().manual_seed(self.label_seed)
        corrupt = torch.rand(len(rows.train_y), generator=generator) < self.fraction
        random_y = torch.randint(len(rows.class_names), rows.train_y.shape, generator=generator)
        train_y = torch.where(corrupt, random_y, rows.train_y)
        train_x, named = rows.train_x, [train_y]
        if self.num_rows is not None:
            if self.num_rows > len(train_y):
                raise ValueError(f"num_rows={self.num_rows}, but the training split has {len(train_y)} rows")
            kept = torch.randperm(len(train_y), generator=generator)[: self.num_rows].sort().values
            train_x, train_y = train_x[kept], train_y[kept]
            named = [kept, train_y]
        # Of the set underneath, of the labels and of the choice of rows.
        digest = self.data.content_digest[:8] + content_digest(named)[:8]
        return rows._replace(train_x=train_x, train_y=train_y, digest=digest)
