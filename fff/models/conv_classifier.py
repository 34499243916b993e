"""A small convolutional trunk with one feedforward layer as its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class ConvClassifier(nn.Module):
    """Logits of images, (B, C, H, W) -> (B, num_classes): blocks of a 3 x 3 convolution and ReLU that halve the picture
    (stride 2), then the layer `ff` on the flattened maps.

    Plain and cheap, as the CNN of Chen et al. 2022 is not among their published code. There an expert is a whole
    network and the router sees the picture; here the trunk is shared, and the head routes its features.

    make_ff: called as `make_ff(features, out_features=num_classes)`.
    in_shape: (C, H, W).
    channels: of each block.
    """

    def __init__(
        self,
        make_ff: Callable[..., nn.Module],
        in_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        smallest = 2 ** len(channels)
        if len(in_shape) != 3 or min(in_shape[1:]) < smallest:
            raise ValueError(f"in_shape={tuple(in_shape)} must be (C, H, W) with H and W at least {smallest}")
        width, height, length = in_shape
        blocks = []
        for channel in channels:
            blocks += [nn.Conv2d(width, channel, 3, stride=2, padding=1), nn.ReLU()]
            width, height, length = channel, (height + 1) // 2, (length + 1) // 2
        # Channels last: twice as fast on a CPU.
        self.trunk = nn.Sequential(*blocks).to(memory_format=torch.channels_last)
        self.ff = make_ff(width * height * length, out_features=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(self.trunk(x.contiguous(memory_format=torch.channels_last)).flatten(1))
