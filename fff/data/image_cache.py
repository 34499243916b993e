"""Image sets as uint8 tensors: read from a local folder or the Hugging Face Hub, decoded once, then mapped from disk.

N rows, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
import urllib.request
import uuid
import warnings
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1  # of the cache files; a change of what is stored raises it


class Source(NamedTuple):
    """Where an image set lies and how its columns are called.

    revision: commit of the Hub repository.  config: its name where the repository has several.
    digest: start of the SHA-256 over the decoded rows, for a set whose revision is not a commit.
    """

    hub_id: str
    revision: str
    image: str = "image"
    label: str = "label"
    config: str | None = None
    digest: str | None = None


SOURCES = {
    "usps": Source(
        "flwrlabs/usps",
        # Its last commit is known by its short hash alone (a391e37), which the Hub does not take: pinned by content.
        "main",
        digest="c342bdef1aac1d15",
    ),
    "mnist": Source("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", "531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2"),
    "cifar10": Source("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", image="img"),
    "cifar100": Source("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", image="img", label="fine_label"),
    "svhn": Source("ufldl-stanford/svhn", "f9e1717d73324ebbc1ece84267ccd80d0aca0690", config="cropped_digits"),
}
NAMES = ("digits", *SOURCES)
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # of `datasets`, which reads them when it is imported


class Images(NamedTuple):
    """train_x, test_x: (N, C, H, W) uint8.  train_y, test_y: (N,) int64.

    white: the largest possible pixel value.  mean, std: per channel, over the training rows, of pixels in [0, 1].
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    class_names: list[str]
    white: int
    mean: list[float]
    std: list[float]


def load_images(name: str, root: str | Path | None = None, cache_dir: str | Path | None = None) -> Images:
    """One of NAMES, from the cache file of its source where there is one, else decoded and cached.

    root: folder of local copies; `<root>/<name>` is read as `datasets.load_dataset` reads it. Without such a folder the
        set comes from the Hub.
    cache_dir: default `$XDG_CACHE_HOME/fff`, else `~/.cache/fff`.
    Raises ValueError for an unknown name, FileNotFoundError (one line) for a set that cannot be had.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    folder = Path(root).expanduser() / name if root else None
    if folder is not None and not folder.is_dir():
        folder = None
    path = _cache_folder(cache_dir) / f"{name}-{_fingerprint(name, folder)}.safetensors"
    images = _read_cache(path)
    if images is None:
        if name == "digits":
            images = _decode_digits()
        elif folder is not None:
            images = _decode_folder(SOURCES[name], folder)
        else:
            images = _decode_hub(name, root)
        _write_cache(path, images)
    return images


def _cache_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    # An empty XDG_CACHE_HOME counts as unset (XDG base directory specification).
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fff"


def _fingerprint(name: str, folder: Path | None) -> str:
    if name == "digits":
        key: list = ["scikit-learn"]
    elif folder is not None:
        paths = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
        stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in paths]
        key = [(relative, stat.st_size, stat.st_mtime_ns) for relative, stat in stats]
    else:
        key = list(SOURCES[name])
    return hashlib.sha256(json.dumps([FORMAT, name, key]).encode()).hexdigest()[:16]


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
    from datasets import get_dataset_config_names, load_dataset

    # A clone of the Hub repository names its configurations, a plain folder of Parquet files has none.
    config = source.config if source.config and source.config in get_dataset_config_names(str(folder)) else None
    # What `datasets` unpacks for itself is of no use after decoding.
    with tempfile.TemporaryDirectory(prefix="fff-", ignore_cleanup_errors=True) as scratch:
        return _decode(load_dataset(str(folder), config, cache_dir=scratch), source, str(folder))


def _decode_hub(name: str, root: str | Path | None) -> Images:
    source = SOURCES[name]
    folder = f"<root>/{name} (root, or FFF_DATA_DIR, is not set)" if not root else Path(root).expanduser() / name
    missing = f"data set {name!r} not found: neither in the folder {folder} nor on the Hub as {source.hub_id!r}"
    offline = any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in OFFLINE_SWITCHES)
    if not offline and not _hub_reachable():
        # `datasets` itself would try for 23 s.
        raise FileNotFoundError(f"{missing} (host unreachable; HF_HUB_OFFLINE=1 uses what the Hub client has stored)")

    from datasets import config, load_dataset

    if offline and not config.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"{missing} (HF_HUB_OFFLINE was set after `datasets` was imported)")
    options: dict = {"revision": source.revision}
    if source.config is not None:
        # Not by the name of the configuration: that would fetch all of its splits, for SVHN 1 GB of extra rows.
        options["data_files"] = {split: f"{source.config}/{split}-*" for split in ("train", "test")}
    try:
        splits = load_dataset(source.hub_id, **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{missing} ({_first_line(error)})") from None
    images = _decode(splits, source, source.hub_id)
    if source.digest is not None and content_digest(images) != source.digest:
        warnings.warn(f"{source.hub_id} no longer holds the rows that results here were computed on", stacklevel=2)
    return images


def _hub_reachable(timeout: float = 1.5) -> bool:
    """Whether the Hub's host, or the proxy in front of it, takes a connection within `timeout` seconds."""
    target = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    reached: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), timeout=timeout).close()
            reached.append(True)
        except OSError:
            pass

    # In a thread, since the timeout of a socket does not cover the name look-up.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(reached)


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
    )


def content_digest(images: Images) -> str:
    digest = hashlib.sha256()
    for tensor in images[:4]:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
