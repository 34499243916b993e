"""A text as windows of tokens in memory, here of characters: the rows of a language model.

N tokens, P of them in a window (`context`), V different ones.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fff.data.batches import Batches
from fff.data.hub import read_hub
from fff.data.module import InMemoryData, Rows
from fff.data.sources import TEXTS, TextName, check_available, text_file


class Text(NamedTuple):
    """tokens (N,), those to train on first.

    validation, test: places where these parts begin.  vocabulary: the V tokens as text.  digest: names the content.
    """

    tokens: Tensor
    validation: int
    test: int
    vocabulary: list[str]
    digest: str


class TextWindows(InMemoryData, ABC):
    """Windows x (B, P) int64 of a text's tokens, y the same one token on: the next one at each place.

    No window crosses a border of the three parts. Training windows begin at every token, in a new order in each epoch;
    an epoch that has them all is long, so let the Trainer limit its batches. The other loaders have each window once,
    one behind the other, without what is left.

    class_names: the V tokens as text.
    characters_per_token: mean over the targets of the test loader.
    """

    characters_per_token: float

    def __init__(self, batch_size: int, *, context: int, seed: int, eval_batch_size: int) -> None:
        super().__init__(batch_size, seed=seed, drop_last=True, eval_batch_size=eval_batch_size)
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self.context = context

    @abstractmethod
    def read(self) -> Text:
        """Called once."""

    @cached_property
    def text(self) -> Text:
        return self.read()

    def load(self) -> Rows:
        tokens, _, border, vocabulary, digest = self.text
        train, test = self._windows(tokens[:border], 1), self._windows(tokens[border:], self.context)
        return Rows(*train, *test, vocabulary, digest=digest)

    def _windows(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """x and y as views, (windows, P) each, which begin at every `step`-th token."""
        if len(tokens) <= self.context:
            raise ValueError(f"context={self.context} is too long for a part of {len(tokens)} tokens")
        return tokens[:-1].unfold(0, self.context, step), tokens[1:].unfold(0, self.context, step)

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        num_windows = len(self.rows.train_x)  # each named by the place of its first token
        border = self.text.validation
        if border <= self.context or border >= num_windows:
            raise ValueError(f"context={self.context} is too long for the training or validation text")
        return torch.arange(border - self.context), torch.arange(border, num_windows, self.context)

    def train_eval_dataloader(self) -> Batches:
        """Training windows one behind the other, each token once."""
        return self._unshuffled(self.rows.train_x, self.rows.train_y, self.train_rows[:: self.context])


class TextData(TextWindows):
    """Windows of a text's characters.

    By position, the first 80 % of the text are trained on, the next 10 % are for validation and the last 10 % for the
    test, so the text that is not the test's is the 90 % that nanoGPT trains on.

    name: a text of `TEXTS`, read from `<root>/<name>/input.txt`, else from the Hub.
    class_names: the V characters of the whole text, in the order of their code points.
    """

    characters_per_token = 1.0

    def __init__(
        self,
        name: TextName,
        batch_size: int = 32,
        *,
        context: int = 128,
        root: str | Path | None = None,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        super().__init__(batch_size, context=context, seed=seed, eval_batch_size=eval_batch_size)
        self.name, self.root = name, root

    def read(self) -> Text:
        text = load_text(self.name, self.root)
        characters = sorted(set(text))
        code = {character: number for number, character in enumerate(characters)}
        tokens = torch.tensor([code[character] for character in text])
        test = len(text) * 9 // 10
        return Text(tokens, test * 8 // 9, test, characters, _digest(text)[:16])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_text(name: TextName, root: str | Path | None = None) -> str:
    """FileNotFoundError (one line) for a text that cannot be had; a warning where it is not the known one."""
    path = text_file(name, root)
    if path is not None:
        text = path.read_bytes().decode()
    else:
        check_available(name, root)
        text = _from_hub(name, root)
    if (digest := _digest(text)) != TEXTS[name].digest:
        warnings.warn(
            f"{path or TEXTS[name].hub_id} holds a text of digest {digest[:16]},"
            f" results here were computed on that of {TEXTS[name].digest[:16]}",
            stacklevel=2,
        )
    return text


def _from_hub(name: TextName, root: str | Path | None) -> str:
    """The splits of the Hub, which part the text by position, joined again."""
    parts = read_hub(name, root, TEXTS[name].hub_id, revision=TEXTS[name].revision)
    return "".join(text for split in ("train", "validation", "test") for text in parts[split]["text"])
