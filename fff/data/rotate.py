"""CIFAR-10-Rotate of Chen et al. 2022 (arXiv 2208.02813): is the picture upright or turned by 30 degrees?

N rows, C channels, S x S pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fff.data.digest import content_digest
from fff.data.module import DerivedData, InMemoryData, Rows

DEGREES = 30
# Side of the middle part that is kept and enlarged to the whole; of 32 pixels, 24.
CROP = 0.75
# Side of the picture between the two turns: it holds all that the crop can show after them.
_BETWEEN = 1.5
_KERNEL = 7, 3
_CHUNK = 2000
# Within 32 bits, as torch's generator knows no more.
_STREAM = 2**31


class RotatedImages(DerivedData):
    """`data` with half of the pictures of each split turned by 30 degrees, and that as the label: 0 upright, 1 turned.

    Clusters are the classes of `data` (`test_cluster`): how a picture ought to stand depends on what it shows. Middle
    24 x 24 of 32 x 32 pixels, enlarged to 32 x 32, so that the empty corners of a turned picture lie outside. The
    outermost half pixel of its corners is mirrored, as is that of upright ones.

    Where ours differs from the authors' code: a picture is in the set once, upright or turned, there as both; and they
    turn by the nearest pixel and leave upright ones alone, so that a linear classifier can tell them by smoothness.
    Here every picture is turned twice, by 15 degrees each time, there and back or there and on, so that both labels
    pass the same interpolation.

    blur: normal blur by a kernel of 7 x 3 pixels (height x width) as theirs, of a standard deviation that is drawn for
        each row, once, between these two numbers of pixels; None: none.
    blurred_rows: "train", as theirs: validation rows are sharp, as test rows are; or "all", so that none differ.
    rotate_seed: of the rows that are turned, and of the blur. Batch sizes, normalisation and the other seeds are those
        of `data`.
    """

    def __init__(
        self,
        data: InMemoryData,
        *,
        blur: Sequence[float] | None = (1.1, 2.2),
        blurred_rows: Literal["train", "all"] = "train",
        rotate_seed: int = 0,
    ) -> None:
        super().__init__(data)
        if blurred_rows not in ("train", "all"):
            raise ValueError(f"blurred_rows={blurred_rows!r} is none of 'train', 'all'")
        if blur is not None and not (len(blur) == 2 and 0 < blur[0] <= blur[1]):
            raise ValueError(f"blur must be None or two numbers, 0 < low <= high, got {blur}")
        self.blur, self.blurred_rows, self.rotate_seed = blur, blurred_rows, rotate_seed

    def load(self) -> Rows:
        rows = self.data.rows
        if rows.train_x.dim() != 4 or rows.train_x.shape[2] != rows.train_x.shape[3]:
            raise ValueError(f"data must hold square images (N, C, S, S), got {tuple(rows.train_x.shape)}")
        if rows.augment is not None:
            raise ValueError("data must not be augmented: a picture turned at random contradicts its label")
        # Apart from the seeds of the split: by the same permutation all validation rows would be turned ones.
        generator = torch.Generator().manual_seed(_STREAM + self.rotate_seed)
        train_y, test_y = (_half(len(y), generator) for y in (rows.train_y, rows.test_y))
        train_x, test_x = rotated(rows.train_x, train_y), rotated(rows.test_x, test_y)
        if self.blur is not None:
            # `data` has the same split, of as many rows by the same seed.
            chosen = self.data.train_rows if self.blurred_rows == "train" else torch.arange(len(train_x))
            train_x[chosen] = blurred(train_x[chosen], self._deviations(len(chosen), generator))
            if self.blurred_rows == "all":
                test_x = blurred(test_x, self._deviations(len(test_x), generator))
        # Labels and blur stand for the pixels, whose last bits depend on the machine.
        low, high = self.blur or (0.0, 0.0)
        blur = torch.tensor([low, high, self.blurred_rows == "all"], dtype=torch.float64)
        digest = self.data.content_digest[:8] + content_digest((train_y, test_y, blur))[:8]
        return Rows(train_x, train_y, test_x, test_y, ["upright", "turned"], rows.scale, rows.shift, digest)

    def _deviations(self, num_rows: int, generator: torch.Generator) -> Tensor:
        low, high = self.blur
        return low + (high - low) * torch.rand(num_rows, generator=generator)

    @property
    def test_cluster(self) -> Tensor:
        """Class in `data` of each row of `test_dataloader`, in its order."""
        return self.data.rows.test_y


def _half(num_rows: int, generator: torch.Generator) -> Tensor:
    label = torch.zeros(num_rows, dtype=torch.int64)
    label[torch.randperm(num_rows, generator=generator)[: num_rows // 2]] = 1
    return label


def rotated(x: Tensor, turned: Tensor) -> Tensor:
    """Middle part of each picture, enlarged to its size, turned counterclockwise where `turned` (N,) is 1; dtype of x.

    x: (N, C, S, S) uint8 or float.
    """
    size = x.shape[-1]
    between = round(_BETWEEN * size)
    out = torch.empty_like(x)
    for label, first in ((0, -DEGREES / 2), (1, DEGREES / 2)):
        rows = (turned == label).nonzero().flatten()
        for index in (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)):
            pictures = _turn(x[index].to(torch.float32), first, between, between / size)
            out[index] = _stored(_turn(pictures, DEGREES / 2, size, CROP * size / between), x)
    return out


def _turn(x: Tensor, degrees: float, size: int, scale: float) -> Tensor:
    """(N, C, size, size), bilinear: x turned counterclockwise, and the part of it `scale` times its side."""
    angle = math.radians(degrees)
    matrix = scale * torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]], dtype=torch.float32
    )
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """x (N, C, S, S) under a normal kernel of 7 x 3 pixels with deviation sigma (N,) in both directions; dtype of x."""
    out = torch.empty_like(x)
    for rows in torch.arange(len(x)).split(_CHUNK):
        pictures = x[rows].to(torch.float32)
        for dim, taps in zip((2, 3), _KERNEL, strict=True):
            reach, length = taps // 2, pictures.shape[dim]
            offset = torch.arange(taps) - reach
            weight = torch.softmax(-0.5 * (offset / sigma[rows, None]).square(), dim=1)
            margin = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
            padded = F.pad(pictures, margin, mode="reflect")
            pictures = sum(weight[:, i].view(-1, 1, 1, 1) * padded.narrow(dim, i, length) for i in range(taps))
        out[rows] = _stored(pictures, x)
    return out


def _stored(pictures: Tensor, like: Tensor) -> Tensor:
    """As the dtype of `like`; bilinear means and blur stay within its range."""
    return pictures.to(like.dtype) if like.is_floating_point() else pictures.round().to(like.dtype)
