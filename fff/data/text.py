"""A text as windows of characters in memory: the rows of a language model.

T characters, P of them in a window (`context`), V different ones.
"""

from __future__ import annotations

import hashlib
import warnings
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fff.data.batches import Batches
from fff.data.module import InMemoryData, Rows
from fff.data.sources import TEXTS, TextName, check_available, not_found, text_file


class TextData(InMemoryData):
    """Windows x (B, P) int64 of a text's characters, y the same one character on: the next one at each place.

    By position, the first 80 % of the text are trained on, the next 10 % are for validation and the last 10 % for the
    test, so the text that is not the test's is the 90 % that nanoGPT trains on. No window crosses a border. Training
    windows begin at every character, in a new order in each epoch; an epoch that has them all is long, so let the
    Trainer limit its batches. The other loaders have each window once, one behind the other, without what is left.

    name: a text of `TEXTS`, read from `<root>/<name>/input.txt`, else from the Hub.
    class_names: the V characters of the whole text, in the order of their code points.
    """

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
        super().__init__(batch_size, seed=seed, drop_last=True, eval_batch_size=eval_batch_size)
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self.name, self.root, self.context = name, root, context

    def load(self) -> Rows:
        text = load_text(self.name, self.root)
        characters = sorted(set(text))
        code = {character: number for number, character in enumerate(characters)}
        tokens = torch.tensor([code[character] for character in text])
        border = len(text) * 9 // 10
        train, test = self._windows(tokens[:border], 1), self._windows(tokens[border:], self.context)
        return Rows(*train, *test, characters, digest=_digest(text)[:16])

    def _windows(self, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """x and y as views, (windows, P) each, which begin at every `step`-th character."""
        if len(tokens) <= self.context:
            raise ValueError(f"context={self.context} is too long for a part of {len(tokens)} characters")
        return tokens[:-1].unfold(0, self.context, step), tokens[1:].unfold(0, self.context, step)

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        num_windows = len(self.rows.train_x)  # each named by the place of its first character
        border = (num_windows + self.context) * 8 // 9
        if border <= self.context or border >= num_windows:
            raise ValueError(f"context={self.context} is too long for the training or validation text")
        return torch.arange(border - self.context), torch.arange(border, num_windows, self.context)

    def train_eval_dataloader(self) -> Batches:
        """Training windows one behind the other, each character once."""
        return self._unshuffled(self.rows.train_x, self.rows.train_y, self.train_rows[:: self.context])


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
    from datasets import load_dataset

    source = TEXTS[name]
    try:
        parts = load_dataset(source.hub_id, revision=source.revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise not_found(name, root, f"{type(error).__name__}: {error}".partition("\n")[0]) from None
    return "".join(text for split in ("train", "validation", "test") for text in parts[split]["text"])
