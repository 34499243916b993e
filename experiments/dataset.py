"""What is known of a configured data set before torch is imported: whether it can be had, and which rows it holds."""

from __future__ import annotations

from typing import Any

from fff.data.sources import check_available, stored_digest


def check_data(node: Any) -> None:
    """Raise FileNotFoundError (one line) if an image set or text that the `data` node asks for cannot be had."""
    for place in stored_places(node):
        check_available(*place)


def other_rows(node: Any, record: dict[str, Any]) -> str:
    """In words, if the rows that `record` was computed on are known not to be those that `node` gives now; else ""."""
    then, now = record.get("data_digest"), None
    if then is not None and _is_image_set(node):
        now = stored_digest(*_place(node))
    return f"it was computed on rows of digest {then}, now they are {now}" if now not in (None, then) else ""


def stored_places(node: Any) -> list[tuple[str, Any, Any]]:
    """(name, root, cache_dir) of each image set or text in the node: a data set may be made from another one."""
    if not isinstance(node, dict):
        return []
    own = [_place(node)] if _is_image_set(node) or _is_text(node) else []
    return own + [place for value in node.values() for place in stored_places(value)]


def _is_image_set(node: dict[str, Any]) -> bool:
    return node.get("_target_") in ("fff.data.ImageData", "fff.data.images.ImageData")


def _is_text(node: dict[str, Any]) -> bool:
    return node.get("_target_") in ("fff.data.TextData", "fff.data.text.TextData")


def _place(node: dict[str, Any]) -> tuple[str, Any, Any]:
    return node["name"], node.get("root"), node.get("cache_dir")
