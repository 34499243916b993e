"""The pre-norm transformer block around a feedforward layer, of the vision transformer and the language model.

B rows, P tokens of each, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """(B, P, D) -> (B, P, D): attention, then the feedforward layer, each added to what it has normalised.

    make_ff: called as `make_ff(dim, out_features=dim)`.
    causal: see `Attention`.  dropout: of attention weights and of what both parts add, in training.
    """

    def __init__(
        self, make_ff: Callable[..., nn.Module], dim: int, heads: int, *, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal=causal, dropout=dropout)
        self.ff_norm = nn.LayerNorm(dim)
        self.ff = make_ff(dim, out_features=dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class Attention(nn.Module):
    """Every token attends to every token, with `causal` to itself and those before it: (B, P, D) -> (B, P, D)."""

    def __init__(self, dim: int, heads: int, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, P, d)
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal
        )
        return self.out(mixed.transpose(1, 2).flatten(2))
