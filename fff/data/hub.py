"""Splits of a data set as `datasets` reads them, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fff.data.sources import is_offline, not_found


def read_folder(folder: Path, config: str | None, scratch: str) -> Any:
    """Splits by name, of a clone of a Hub repository or a plain folder with its files; valid as long as `scratch`.

    ValueError for a clone that has no such configuration; a plain folder has none, and its files are read.
    """
    from datasets import get_dataset_config_names, load_dataset

    names = get_dataset_config_names(str(folder)) if config else []
    if config and names == ["default"]:
        config = None
    elif config and config not in names:
        raise ValueError(f"config={config!r} is none of {', '.join(names)}, which {folder} has")
    return load_dataset(str(folder), config, cache_dir=scratch)


def read_hub(name: str, root: str | Path | None, hub_id: str, /, **options: Any) -> Any:
    """Splits by name, as `load_dataset(hub_id, **options)` gives them; FileNotFoundError (one line) where it cannot."""
    from datasets import config, load_dataset

    if is_offline() and not config.HF_HUB_OFFLINE:
        raise not_found(name, root, "HF_HUB_OFFLINE was set after `datasets` was imported", hub_id)
    try:
        return load_dataset(hub_id, **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise not_found(name, root, first_line(error), hub_id) from None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
