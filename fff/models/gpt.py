"""A small language model (GPT-2, Radford et al. 2019) around a feedforward layer.

B rows, P tokens of each, D model width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.layers.contract import RoutedLayer
from fff.models.transformer import Block


class GPT(nn.Module):
    """Logits of the next token at each place, (B, P) int64 -> (B, P, V); pre-norm blocks, learnt positions.

    The output layer is the embedding of the tokens (tied), without a bias. Embeddings begin normal with deviation 0.02,
    as GPT-2's; all else begins as its layers do.

    make_ff: called once for each block as `make_ff(dim, out_features=dim)`; ValueError for a layer whose answer to a
        row depends on the other rows (`RoutedLayer.mixes_rows`), by which a token would see later ones. A mixture with
        a capacity and several choices passes: in training first choices of later tokens may displace second ones.
    in_shape: (longest P,).  num_classes: V.
    depth: number of blocks.  heads: of each attention; they share dim.
    dropout: of the embedded tokens, the attention weights and what each block adds, in training.
    """

    def __init__(
        self,
        make_ff: Callable[..., nn.Module],
        in_shape: tuple[int],
        num_classes: int,
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(in_shape) != 1:
            raise ValueError(f"in_shape={tuple(in_shape)} must be the one number of tokens in a row")
        self.embed = nn.Embedding(num_classes, dim)
        self.position = nn.Parameter(torch.empty(in_shape[0], dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(make_ff, dim, heads, causal=True, dropout=dropout) for _ in range(depth)))
        for layer in self.blocks.modules():
            if isinstance(layer, RoutedLayer) and layer.mixes_rows:
                raise ValueError(f"make_ff gives {layer}: a row's answer depends on other rows, so on later tokens")
        self.norm = nn.LayerNorm(dim)
        for weight in (self.embed.weight, self.position):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length, longest = tokens.shape[1], len(self.position)
        if length > longest:
            raise ValueError(f"tokens has rows of {length}, but GPT was built with in_shape=({longest},)")
        x = self.blocks(self.dropout(self.embed(tokens) + self.position[:length]))
        return F.linear(self.norm(x), self.embed.weight)
