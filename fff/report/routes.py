"""The routes of all runs of a study in one file, `runs/<study>.npz`: arrays by run and name (results/README.md)."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def read_arrays(path: Path | str, content: bytes) -> Arrays:
    """The arrays of an npz file; ValueError naming `path` where it is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, {error}") from error


def pack(routes: dict[str, Arrays]) -> bytes:
    """Routes by run id as an npz file, the same bytes whatever their order.

    An array is stored under its digest, hence once for all runs that have it (labels, projected rows); `meta` is a JSON
    object: run id -> name -> digest.
    """
    stored: Arrays = {}
    meta: dict[str, dict[str, str]] = {}
    for run_id, arrays in routes.items():
        for name, array in arrays.items():
            content = f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            stored[digest] = array
            meta.setdefault(run_id, {})[name] = digest
    file = io.BytesIO()
    np.savez_compressed(file, meta=json.dumps(meta, sort_keys=True), **dict(sorted(stored.items())))
    return file.getvalue()


def unpack(path: Path | str, content: bytes) -> dict[str, Arrays]:
    """Routes by run id; ValueError naming `path` where the file is damaged."""
    stored = read_arrays(path, content)
    try:
        meta = json.loads(stored["meta"].item())
        return {run_id: {name: stored[digest] for name, digest in names.items()} for run_id, names in meta.items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no routes of runs") from error
