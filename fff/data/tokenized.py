"""Any text set of the Hugging Face Hub, or a local one in its schema, as windows of a tokenizer's tokens.

N tokens, V different ones.
"""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fff.data.digest import content_digest
from fff.data.hub import first_line, read_folder, read_hub
from fff.data.sources import check_tokenized, local_folder, tokenizer_file, tokenizer_not_found
from fff.data.text import Text, TextWindows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")


class TokenizedText(TextWindows):
    """Windows of the tokens of a set's rows, each of which is encoded by itself.

    The parts are the set's own splits. For a test or validation split that is missing, a tenth of the training tokens
    is cut off their end, the test's first.

    name: of the set in records, and of its folder: `<root>/<name>`, with `<split>-*.parquet` or whatever
        `datasets.load_dataset` reads; without such a folder the set comes from the Hub.
    hub_id, config, revision: repository of the Hub, its configuration where it has several, its commit or branch.
    column: which holds the text; a row without any (null) is an empty one.
    tokenizer: path of a `tokenizer.json`, or a repository of the Hub that has one.
    separator: token behind each row, for sets whose rows are documents; None: rows follow each other as they are.
    """

    def __init__(
        self,
        name: str,
        batch_size: int = 32,
        *,
        hub_id: str,
        tokenizer: str,
        separator: str | None,
        config: str | None = None,
        revision: str | None = None,
        column: str = "text",
        context: int = 128,
        root: str | Path | None = None,
        seed: int = 0,
        eval_batch_size: int = 64,
    ) -> None:
        super().__init__(batch_size, context=context, seed=seed, eval_batch_size=eval_batch_size)
        self.name, self.hub_id, self.config, self.revision, self.root = name, hub_id, config, revision, root
        self.column, self.tokenizer, self.separator = column, tokenizer, separator

    def read(self) -> Text:
        check_tokenized(self.name, self.hub_id, self.tokenizer, self.root)
        encoder = self._encoder
        end = [] if self.separator is None else [encoder.token_to_id(self.separator)]
        if end == [None]:
            raise ValueError(f"separator={self.separator!r} is no token of tokenizer={self.tokenizer!r}")
        folder = local_folder(self.name, self.root)
        # What `datasets` unpacks of a folder is of no use after encoding.
        with tempfile.TemporaryDirectory(prefix="fff-", ignore_cleanup_errors=True) as scratch:
            if folder is not None:
                splits = read_folder(folder, self.config, scratch)
            else:
                splits = read_hub(self.name, self.root, self.hub_id, name=self.config, revision=self.revision)
            parts = self._encode(splits, end, str(folder or self.hub_id))
        tenth = len(parts["train"]) // 10
        for split in ("test", "validation"):
            if split not in parts:
                border = len(parts["train"]) - tenth
                parts["train"], parts[split] = parts["train"][:border], parts["train"][border:]
        tokens = [parts[split] for split in SPLITS]
        borders = len(tokens[0]), len(tokens[0]) + len(tokens[1])
        size = 1 + max(encoder.get_vocab().values())
        vocabulary = encoder.decode_batch([[number] for number in range(size)], skip_special_tokens=False)
        return Text(torch.cat(tokens), *borders, vocabulary, content_digest([torch.tensor(borders), *tokens]))

    def _encode(self, splits: Any, end: list[int], place: str) -> dict[str, Tensor]:
        """(N,) int32 for each of `SPLITS` that there is."""
        if "train" not in splits:
            raise ValueError(f"{place} has no split 'train', only {list(splits)}")
        parts = {}
        for split in (split for split in SPLITS if split in splits):
            if self.column not in splits[split].column_names:
                raise ValueError(f"{place} has no column {self.column!r}, only {splits[split].column_names}")
            kind = splits[split].features[self.column]
            if "string" not in getattr(kind, "dtype", ""):  # large_string, string_view
                raise ValueError(f"{place} has no text in column {self.column!r} of split {split!r}, but {kind}")
            pieces = [torch.empty(0, dtype=torch.int32)]
            for batch in splits[split].select_columns(self.column).iter(1000):
                texts = [text or "" for text in batch[self.column]]
                rows = self._encoder.encode_batch(texts, add_special_tokens=False)
                pieces.append(torch.tensor([number for row in rows for number in row.ids + end], dtype=torch.int32))
            parts[split] = torch.cat(pieces)
        return parts

    @cached_property
    def characters_per_token(self) -> float:
        """Of the test's targets, decoded; special tokens, the separator among them, stand for no character."""
        targets = self.rows.test_y.flatten()
        return len(self._encoder.decode(targets.tolist())) / len(targets)

    @cached_property
    def _encoder(self) -> Tokenizer:
        from tokenizers import Tokenizer

        if (path := tokenizer_file(self.tokenizer)) is not None:
            try:
                encoder = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing more special
                raise ValueError(f"tokenizer={self.tokenizer!r} holds no tokenizer: {first_line(error)}") from None
        else:
            try:
                encoder = Tokenizer.from_pretrained(self.tokenizer)
            except OSError as error:
                raise tokenizer_not_found(self.tokenizer, first_line(error)) from None
        if encoder.decoder is None:  # tokens would be joined by spaces that the text has not
            raise ValueError(f"tokenizer={self.tokenizer!r} has no decoder, so its tokens have no number of characters")
        # Some files have the lengths of a model's rows in them.
        encoder.no_truncation()
        encoder.no_padding()
        return encoder
