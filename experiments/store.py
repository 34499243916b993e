"""Run directories: record and routes of a finished run, the error of a failed one, and the lock of one in progress."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
RESULT, ROUTES, ERROR, LOCK = "result.json", "routes.npz", "error.txt", "lock"


def read_record(run_dir: Path, config_hash: str) -> tuple[dict[str, Any] | None, str]:
    """The record of a finished run of this configuration, or None and why the file there is not one ("" if none is)."""
    path = run_dir / RESULT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{path} is unreadable ({error})"
    if not isinstance(record, dict) or record.get("status") != "finished":
        return None, f"{path} is not the record of a finished run"
    if record.get("schema") != SCHEMA:
        return None, f"{path} has schema {record.get('schema')}, not {SCHEMA}"
    if record.get("config_hash") != config_hash:
        return None, f"{path} belongs to another configuration"
    return record, ""


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Put result.json in place; non-finite numbers become null."""
    _write(run_dir / RESULT, json.dumps(_finite(record), allow_nan=False).encode() + b"\n")


def write_routes(run_dir: Path, routes: dict[str, np.ndarray]) -> None:
    """Put routes.npz in place; before the record, which names it."""
    import numpy as np  # here, as a sweep plans its runs without it

    content = io.BytesIO()
    np.savez_compressed(content, **routes)
    _write(run_dir / ROUTES, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    """In one step, so that the file is either whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def lock(run_dir: Path, wait: bool = False) -> Iterator[bool]:
    """Own a run directory while in the context; yields False if another process does and `wait` is off.

    The kernel drops the lock when its process ends, however it ends, so that no lock can be stale. The file tells
    people who holds it.
    """
    path = run_dir / LOCK
    run_dir.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            # The owner before may have removed the file between our opening and our locking it.
            if not _is_at(file, path):
                continue
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_locked(run_dir: Path) -> bool:
    with lock(run_dir) as owned:
        return not owned
