"""Random flips and linear maps of images in memory, one resampling for a whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_affine(
    x: Tensor,
    generator: torch.Generator,
    *,
    flips: bool = False,
    degrees: float = 15.0,
    translate: float = 1 / 8,
    scale: float = 0.1,
) -> Tensor:
    """(B, C, S, S) images, each rotated, scaled and moved by numbers of its own; what comes in from outside repeats
    the border.

    The augmentation of the FFF paper's section 3.4, which does not give strengths; these are usual ones.
    flips: mirror each image left to right, and upside down, each with probability a half.
    degrees: largest rotation.  translate: largest shift, as a fraction of the side.  scale: largest change of size, as
        a fraction. All are drawn uniformly, in both directions.
    """

    def uniform(limit: float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(len(x), *shape, generator=generator) - 1)

    angle, size = uniform(math.radians(degrees)), 1 + uniform(scale)
    cos, sin = angle.cos() / size, angle.sin() / size
    # Rows map a place of the result to one of the source, both from -1 to 1.
    linear = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    shift = uniform(2 * translate, 2, 1)
    if flips:
        linear = linear * (2 * torch.randint(2, (len(x), 2, 1), generator=generator) - 1)
    grid = F.affine_grid(torch.cat([linear, shift], 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
