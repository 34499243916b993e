"""Image sets as uint8 tensors: read from a local folder or the Hugging Face Hub, decoded once, then mapped from disk.

N rows, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fff.data.digest import content_digest
from fff.data.hub import read_folder, read_hub
from fff.data.sources import SOURCES, Source, cache_file, check_available, check_name, local_folder


class Images(NamedTuple):
    """train_x, test_x: (N, C, H, W) uint8.  train_y, test_y: (N,) int64.

    white: the largest possible pixel value.  mean, std: per channel, over the training rows, of pixels in [0, 1].
    digest: `content_digest` of the four tensors.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_names: list[str]
    white: int
    mean: list[float]
    std: list[float]
    digest: str


def load_images(name: str, root: str | Path | None = None, cache_dir: str | Path | None = None) -> Images:
    """One of NAMES, from the cache file of its source where there is one, else decoded and cached.

    root: folder of local copies; `<root>/<name>` is read as `datasets.load_dataset` reads it. Without such a folder the
        set comes from the Hub.
    cache_dir: default `$XDG_CACHE_HOME/fff`, else `~/.cache/fff`.
    Raises ValueError for an unknown name, FileNotFoundError (one line) for a set that cannot be had.
    """
    check_name(name)
    folder = local_folder(name, root)
    path = cache_file(name, root, cache_dir)
    images = _read_cache(path)
    if images is None:
        if name == "digits":
            images = _decode_digits()
        elif folder is not None:
            images = _decode_folder(SOURCES[name], folder)
        else:
            check_available(name, root, cache_dir)
            images = _decode_hub(name, root)
        _write_cache(path, images)
    expected = SOURCES[name].digest if name in SOURCES else None
    if expected not in (None, images.digest):
        warnings.warn(
            f"{folder or SOURCES[name].hub_id} holds rows of digest {images.digest},"
            f" results here were computed on those of {expected}",
            stacklevel=2,
        )
    return images


def _read_cache(path: Path) -> Images | None:
    try:
        with safe_open(path, framework="pt") as file:
            extra = json.loads(file.metadata()["images"])
            return Images(*(file.get_tensor(field) for field in Images._fields[:4]), **extra)
    except FileNotFoundError:
        return None
    except SafetensorError:  # cut short or damaged by the disk: as good as absent
        return None


def _write_cache(path: Path, images: Images) -> None:
    tensors = dict(zip(Images._fields[:4], images[:4], strict=True))
    extra = dict(zip(Images._fields[4:], images[4:], strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several workers may get here at once: each writes a file of its own, and the last rename wins.
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        save_file(tensors, part, metadata={"images": json.dumps(extra)})
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _decode_digits() -> Images:
    """The 1797 digits of scikit-learn. It has no official split: every fifth row of each class is a test row."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).to(torch.uint8)
    y = torch.from_numpy(digits.target).to(torch.int64)
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        test[(y == label).nonzero().flatten()[4::5]] = True
    return _images(x[~test], y[~test], x[test], y[test], [str(label) for label in range(10)], white=16)


def _decode_folder(source: Source, folder: Path) -> Images:
    # What `datasets` unpacks for itself is of no use after decoding.
    with tempfile.TemporaryDirectory(prefix="fff-", ignore_cleanup_errors=True) as scratch:
        return _decode(read_folder(folder, source.config, scratch), source, str(folder))


def _decode_hub(name: str, root: str | Path | None) -> Images:
    source = SOURCES[name]
    options: dict = {"revision": source.revision}
    if source.config is not None:
        # Not by the name of the configuration: that would fetch all of its splits, for SVHN 1 GB of extra rows.
        options["data_files"] = {split: f"{source.config}/{split}-*" for split in ("train", "test")}
    return _decode(read_hub(name, root, source.hub_id, **options), source, source.hub_id)


def _decode(splits, source: Source, place: str) -> Images:
    parts: list[Tensor] = []
    for split in ("train", "test"):
        if split not in splits:
            raise ValueError(f"{place} has no split {split!r}, only {list(splits)}")
        if absent := {source.image, source.label} - set(splits[split].column_names):
            raise ValueError(f"{place} has no column {min(absent)!r}, only {splits[split].column_names}")
        columns = splits[split].select_columns([source.image, source.label]).with_format("numpy")[:]
        parts += [torch.from_numpy(columns[source.image]), torch.from_numpy(columns[source.label]).to(torch.int64)]
    return _images(*parts, splits["train"].features[source.label].names, white=255)


def _images(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, class_names: list[str], *, white: int
) -> Images:
    """x: (N, H, W) or (N, H, W, C), as Pillow gives it."""
    train_x, test_x = (x.unsqueeze(1) if x.ndim == 3 else x.movedim(3, 1) for x in (train_x, test_x))
    moments = [torch.std_mean(channel.to(torch.float32) / white, correction=0) for channel in train_x.unbind(1)]
    return Images(
        train_x.contiguous(),
        train_y,
        test_x.contiguous(),
        test_y,
        list(class_names),
        white,
        mean=[float(mean) for _, mean in moments],
        std=[float(std) for std, _ in moments],
        digest=content_digest((train_x, train_y, test_x, test_y)),
    )
