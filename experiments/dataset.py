"""What is known of a configured data set before torch is imported: whether it can be had, and which rows it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fff.data.sources import check_available, check_tokenized, stored_digest


def check_data(node: Any) -> None:
    """Raise FileNotFoundError (one line) if an image set or text that the `data` node asks for cannot be had."""
    for check, place in stored_places(node):
        check(*place)


def other_rows(node: Any, record: dict[str, Any]) -> str:
    """In words, if the rows that `record` was computed on are known not to be those that `node` gives now; else ""."""
    then, now = record.get("data_digest"), None
    if then is not None and _is(node, "images.ImageData"):
        now = stored_digest(*_place(node))
    return f"it was computed on rows of digest {then}, now they are {now}" if now not in (None, then) else ""


def stored_places(node: Any) -> list[tuple[Callable[..., None], tuple]]:
    """What looks for each image set or text in the node, and its arguments: a data set may be made from another one."""
    if not isinstance(node, dict):
        return []
    own = []
    if _is(node, "images.ImageData") or _is(node, "text.TextData"):
        own = [(check_available, _place(node))]
    elif _is(node, "tokenized.TokenizedText"):
        own = [(check_tokenized, (node["name"], node["hub_id"], node["tokenizer"], node.get("root")))]
    return own + [place for value in node.values() for place in stored_places(value)]


def _is(node: dict[str, Any], home: str) -> bool:
    """Whether the node makes a class of `fff.data`, by its short name or that of its module."""
    return node.get("_target_") in (f"fff.data.{home}", f"fff.data.{home.partition('.')[2]}")


def _place(node: dict[str, Any]) -> tuple[str, Any, Any]:
    return node["name"], node.get("root"), node.get("cache_dir")
