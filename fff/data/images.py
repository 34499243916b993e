"""Image classification sets with their official training and test splits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from fff.data.augment import random_affine
from fff.data.image_cache import load_images
from fff.data.module import InMemoryData, Rows
from fff.data.sources import Name

Normalize = Literal["standardize", "unit", "symmetric"]
Augment = Literal["affine", "affine_flips"]


class ImageData(InMemoryData):
    """digits (scikit-learn), usps, mnist, fashion_mnist, cifar10, cifar100 (fine labels) or svhn (cropped digits).

    name, root, cache_dir: see `load_images`.
    normalize: "standardize" subtracts mean and divides by standard deviation per channel, both over the official
        training split (validation rows included: no label enters); "unit" maps pixels to [0, 1] and "symmetric" to
        [-1, 1].
    augment: what `random_affine` does with the training batches: "affine" turns, scales and moves each image,
        "affine_flips" also mirrors it left to right and upside down, which digits do not survive.
    """

    def __init__(
        self,
        name: Name,
        batch_size: int = 256,
        *,
        root: str | Path | None = None,
        normalize: Normalize = "standardize",
        cache_dir: str | Path | None = None,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = False,
        eval_batch_size: int = 2048,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(
            batch_size, seed=seed, split_seed=split_seed, drop_last=drop_last, eval_batch_size=eval_batch_size
        )
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
        if augment not in (None, *get_args(Augment)):
            raise ValueError(f"augment must be one of {', '.join(get_args(Augment))}, or None, got {augment!r}")
        self.name, self.root, self.cache_dir = name, root, cache_dir
        self.normalize, self.augment = normalize, augment

    def load(self) -> Rows:
        images = load_images(self.name, self.root, self.cache_dir)
        mean, std = torch.tensor(images.mean), torch.tensor(images.std)
        if self.normalize == "unit":
            scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        elif self.normalize == "symmetric":
            scale, shift = torch.full_like(mean, 2.0), torch.full_like(mean, -1.0)
        else:
            scale, shift = 1 / std, -mean / std
        scale, shift = (scale / images.white).view(-1, 1, 1), shift.view(-1, 1, 1)
        augment = partial(random_affine, flips=self.augment == "affine_flips") if self.augment else None
        return Rows(*images[:4], images.class_names, scale, shift, images.digest, augment)
