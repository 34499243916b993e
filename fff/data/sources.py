"""Where image sets and texts come from, and whether they can be had: known without importing torch."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from urllib.parse import urlsplit

FORMAT = 2  # of the cache files; a change of what is stored raises it


class Source(NamedTuple):
    """Where an image set or a text lies and how the columns of the former are called.

    revision: commit of the Hub repository.  config: its name where the repository has several.
    digest: of the decoded rows (`content_digest`), for a set whose revision is not a commit; SHA-256 of a text.
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
TEXTS = {
    "tiny_shakespeare": Source(
        "karpathy/tiny_shakespeare",
        # The repository itself holds a script, which `datasets` runs no more: the Hub's own conversion of it.
        "refs/convert/parquet",
        digest="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
# Spelled out for readers of the source, `experiments.check` among them.
Name = Literal["digits", "usps", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"]
TextName = Literal["tiny_shakespeare"]
NAMES = get_args(Name)
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # of `datasets`, which reads them when it is imported


def check_available(name: str, root: str | Path | None = None, cache_dir: str | Path | None = None) -> None:
    """Raise FileNotFoundError (one line) if there is nothing that `load_images` or `load_text` could read; what there
    is stays unread.

    Takes milliseconds, or 1.5 s where the Hub does not answer.
    """
    if name in TEXTS:
        if text_file(name, root) is not None:
            return
    else:
        check_name(name)
        if name == "digits" or local_folder(name, root) is not None or cache_file(name, root, cache_dir).is_file():
            return
    if why := _out_of_reach(_source(name).hub_id):
        raise not_found(name, root, why)


def check_tokenized(name: str, hub_id: str, tokenizer: str, root: str | Path | None = None) -> None:
    """The same for what a `TokenizedText` reads: its set and its tokenizer."""
    if local_folder(name, root) is None and (why := _out_of_reach(hub_id)):
        raise not_found(name, root, why, hub_id)
    if tokenizer_file(tokenizer) is None and (why := _out_of_reach(tokenizer)):
        raise tokenizer_not_found(tokenizer, why)


def _out_of_reach(hub_id: str) -> str:
    """Why nothing of this Hub repository can be read; "" where nothing speaks against it."""
    if is_offline():
        return "" if _stored_by_client(hub_id) else "offline, and the Hub client has stored nothing of it"
    # `datasets` itself would try for 23 s.
    return "" if _hub_reachable() else "host unreachable; HF_HUB_OFFLINE=1 uses what the Hub client has stored"


def stored_digest(name: str, root: str | Path | None = None, cache_dir: str | Path | None = None) -> str | None:
    """Digest of the rows that `load_images` would give, from the header of the cache file; None if there is none."""
    try:
        with cache_file(name, root, cache_dir).open("rb") as file:
            # safetensors: eight bytes hold the length of the JSON header that follows.
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1_000_000)))
        return json.loads(header["__metadata__"]["images"])["digest"]
    except (OSError, ValueError, KeyError):
        return None


def check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")


def local_folder(name: str, root: str | Path | None) -> Path | None:
    """`<root>/<name>` where that is a folder."""
    folder = Path(root).expanduser() / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def text_file(name: str, root: str | Path | None) -> Path | None:
    """`<root>/<name>/input.txt` where there is one; ValueError for no text of ours."""
    if name not in TEXTS:
        raise ValueError(f"name must be one of {', '.join(TEXTS)}, got {name!r}")
    path = Path(root).expanduser() / name / "input.txt" if root else None
    return path if path is not None and path.is_file() else None


def tokenizer_file(tokenizer: str) -> Path | None:
    """The path that `tokenizer` is if it ends in .json, FileNotFoundError if nothing lies there; None for a Hub id."""
    if not tokenizer.endswith(".json"):
        return None
    path = Path(tokenizer).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer={tokenizer!r} not found: no such file")
    return path


def tokenizer_not_found(tokenizer: str, why: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"tokenizer={tokenizer!r} not found on the Hub ({why}); the path of a tokenizer.json reads that file"
    )


def _source(name: str) -> Source:
    return TEXTS[name] if name in TEXTS else SOURCES[name]


def cache_file(name: str, root: str | Path | None, cache_dir: str | Path | None) -> Path:
    return _cache_folder(cache_dir) / f"{name}-{_fingerprint(name, local_folder(name, root))}.safetensors"


def _cache_folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir is not None else _user_cache() / "fff"


def _user_cache() -> Path:
    # An empty XDG_CACHE_HOME counts as unset (XDG base directory specification).
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


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


def not_found(name: str, root: str | Path | None, why: str, hub_id: str | None = None) -> FileNotFoundError:
    """hub_id: of a set that has no entry here."""
    file = "/input.txt" if name in TEXTS else ""
    place = Path(root).expanduser() / name if root else f"<root>/{name}"
    unset = "" if root else " (root, or FFF_DATA_DIR, is not set)"
    kind = "as" if file else "in the folder"
    hub_id = hub_id or _source(name).hub_id
    return FileNotFoundError(
        f"data set {name!r} not found: neither {kind} {place}{file}{unset} nor on the Hub as {hub_id!r} ({why})"
    )


def is_offline() -> bool:
    return any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in OFFLINE_SWITCHES)


def _stored_by_client(hub_id: str) -> bool:
    """Whether the Hub client's folders hold anything of this repository."""
    home = Path(os.environ.get("HF_HOME") or _user_cache() / "huggingface")
    folders = [
        os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub",
        os.environ.get("HF_DATASETS_CACHE") or home / "datasets",
    ]
    pattern = f"*{hub_id.replace('/', '*')}*"
    return any(next(Path(folder).expanduser().glob(pattern), None) for folder in folders)


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
