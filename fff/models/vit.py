"""A small vision transformer (Dosovitskiy et al. 2021) around a feedforward layer: FFF paper, section 3.4.

B images, P tokens (patches), D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fff.models.transformer import Block


class VisionTransformer(nn.Module):
    """Logits of images, (B, C, H, W) -> (B, num_classes); pre-norm blocks, learnt positions, mean over the tokens.

    The paper gives depth, patch size, width and input dropout; heads, position embedding and pooling are ours.

    make_ff: called once for each block as `make_ff(dim, out_features=dim)`.
    in_shape: (C, H, W); height and width multiples of patch_size.
    depth: number of blocks.  heads: of each attention; they share dim.
    input_dropout: of the embedded tokens, in training.
    """

    def __init__(
        self,
        make_ff: Callable[..., nn.Module],
        in_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch_size: int = 4,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        input_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(in_shape) != 3 or in_shape[1] % patch_size or in_shape[2] % patch_size:
            raise ValueError(f"in_shape={tuple(in_shape)} must be channels and multiples of patch_size={patch_size}")
        channels, height, width = in_shape
        self.embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        num_tokens = (height // patch_size) * (width // patch_size)
        self.position = nn.Parameter(nn.init.trunc_normal_(self.embed.weight.new_empty(num_tokens, dim), std=0.02))
        self.dropout = nn.Dropout(input_dropout)
        self.blocks = nn.Sequential(*(Block(make_ff, dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # (B, P, D), contiguous: every sum down the blocks keeps the strides of the first.
        tokens = self.embed(x).flatten(2).transpose(1, 2).contiguous()
        tokens = self.blocks(self.dropout(tokens + self.position))
        return self.head(self.norm(tokens).mean(1))
