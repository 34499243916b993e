"""A data set with part of its training labels replaced by random ones, to measure memorisation."""

from __future__ import annotations

import torch

from fff.data.digest import content_digest
from fff.data.module import InMemoryData, Rows


class RandomLabels(InMemoryData):
    """`data` with each training label replaced, with probability `fraction`, by a uniformly random class.

    As in Zhang et al. 2017, "Understanding deep learning requires rethinking generalization", section 2 (partially
    corrupted labels): the random class may be the true one, test labels stay, and the whole official training split is
    corrupted, so validation labels too. At fraction 1 the validation accuracy is chance level and chooses nothing.

    label_seed: of the random labels; what it corrupts at a small fraction, it corrupts at a larger one too, to the same
        labels. Batch sizes, normalisation and the other two seeds are those of `data`.
    """

    def __init__(self, data: InMemoryData, fraction: float = 1.0, *, label_seed: int = 0) -> None:
        super().__init__(
            data.batch_size,
            seed=data.seed,
            split_seed=data.split_seed,
            drop_last=data.drop_last,
            eval_batch_size=data.eval_batch_size,
        )
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        self.data, self.fraction, self.label_seed = data, fraction, label_seed

    def load(self) -> Rows:
        rows = self.data.rows
        generator = torch.Generator().manual_seed(self.label_seed)
        corrupt = torch.rand(len(rows.train_y), generator=generator) < self.fraction
        random_y = torch.randint(len(rows.class_names), rows.train_y.shape, generator=generator)
        train_y = torch.where(corrupt, random_y, rows.train_y)
        # Of the set underneath and of the labels.
        digest = self.data.content_digest[:8] + content_digest([train_y])[:8]
        return rows._replace(train_y=train_y, digest=digest)
