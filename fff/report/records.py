"""Run records to tidy CSV files: one row per run, and the mean history of each cell; their routes to one file.

A cell is a configuration without its seed: the runs of a cell differ by nothing else. All values are kept as text, so
that reading a file and writing it again changes no byte.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fff.report.routes import Arrays, pack, read_arrays, unpack

SCHEMA = 1
HISTORY = ("train_loss", "train_accuracy", "val_accuracy", "node_entropy", "leaves_used")
HISTORY_BYTES = 500_000
# What a table of runs, and one of their epochs, cannot be without.
RUN_COLUMNS = ("run_id", "cell", "seed", "wall_time_s")
HISTORY_COLUMNS = ("cell", "epoch", "runs")

_FIRST = ("study", "recipe", "run_id", "cell", "seed", "config_hash")
_METRICS = (
    *("ma", "ma_epochs", "ga", "ga_epochs", "val_accuracy", "ma_soft", "ga_soft", "diverged"),
    *("leaves_used", "num_leaves", "largest_leaf_share", "leaf_load", "node_entropy", "nodes_below_0.10"),
    *("val_loss", "test_loss", "bits_per_character", "perplexity", "test_loss_soft", "test_accuracy", "val_epochs"),
    *("parameters", "training_width", "inference_width", "training_size", "inference_size", "flops_per_row", "epochs"),
)
_RUN = ("wall_time_s", "resumed", "backend", "data_digest", "git_commit")
# Where a run was executed is not part of what was run.
_PLACES = ("root", "cache_dir")

Row = dict[str, str]


class Collected(NamedTuple):
    """rows: one per readable record.  histories: (cell, history) of the same runs.  routes: by run id, of those that
    kept them.  problems: one line for each record that is not counted and each run without one."""

    rows: list[Row]
    histories: list[tuple[str, dict[str, list]]]
    routes: dict[str, Arrays]
    problems: list[str]


def collect(folder: Path) -> Collected:
    """Read `<folder>/*/result.json`, and the routes where the record names them."""
    found = Collected([], [], {}, [])
    for run in sorted(path for path in folder.glob("*") if path.is_dir()):
        path = run / "result.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            row = flatten(record)
            routes = _routes(run, record)
        except FileNotFoundError:
            found.problems.append(f"{run}: {'failed' if (run / 'error.txt').exists() else 'not finished'}, not counted")
        except (OSError, ValueError) as error:
            found.problems.append(f"{path}: not counted, {error}")
        else:
            found.rows.append(row)
            found.histories.append((row["cell"], record.get("history") or {}))
            if routes:
                found.routes[row["run_id"]] = routes
    return found


def _routes(run: Path, record: dict[str, Any]) -> Arrays:
    """Empty where the run kept none; ValueError where those that it kept cannot be read."""
    if not record.get("routes"):
        return {}
    path = run / record["routes"]
    if not path.exists():
        raise ValueError(f"{path.name} is not there")
    return read_arrays(path.name, path.read_bytes())


def flatten(record: Any) -> Row:
    """The row of one record; ValueError if it is not the record of a finished run."""
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {record.get('schema')!r}, not {SCHEMA}")
    if record.get("status") != "finished":
        raise ValueError(f"its status is {record.get('status')!r}")
    for key, kind in (("study", str), ("run_id", str), ("config_hash", str), ("config", dict), ("metrics", dict)):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"it has no {key}")
    if not isinstance(record.get("seed"), int):
        raise ValueError("it has no seed")
    config = {
        name: value
        for name, value in _flat(record["config"], digits=None).items()
        if "." in name and name.rpartition(".")[2] not in _PLACES
    }
    return {
        **{key: _text(record[key]) for key in ("study", "run_id", "seed", "config_hash")},
        "recipe": _text(record.get("recipe")),
        "cell": cell(config),
        **config,
        **_flat({key: record.get(key) for key in _RUN}, digits=6),
        **_flat({"metrics": record["metrics"]}, digits=6),
        **_flat({key: record.get(key) or {} for key in ("hardware", "versions")}, digits=6),
    }


def cell(config: Row) -> str:
    """Name of the group of runs that share this flat configuration but for the seed."""
    identity = {name: value for name, value in config.items() if not _is_seed(name) and value != ""}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def _flat(node: dict[str, Any], digits: int | None, prefix: str = "") -> Row:
    row: Row = {}
    for key, value in node.items():
        if isinstance(value, dict):
            row |= _flat(value, digits, f"{prefix}{key}.")
        else:
            row[f"{prefix}{key}"] = _text(value, digits)
    return row


def _text(value: Any, digits: int | None = None) -> str:
    """Text of a cell: "" for nothing and for what is no number, floats to `digits` significant digits."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float) and digits is not None:
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def config_columns(columns: Iterable[str]) -> list[str]:
    """The columns that hold the configuration, but for its seeds; sorted."""
    return sorted(name for name in columns if _is_config(name) and not _is_seed(name))


def _is_config(name: str) -> bool:
    parts = name.split(".")
    # The metric nodes_below_0.10 has a dot too, and cells have it without its prefix.
    keys = len(parts) > 1 and all(part.isidentifier() for part in parts)
    return keys and parts[0] not in ("metrics", "hardware", "versions")


def _is_seed(name: str) -> bool:
    """`data.seed` follows the seed of the run; `data.split_seed` belongs to the configuration."""
    return name.rpartition(".")[2] == "seed"


def merge(rows: list[Row], new: list[Row]) -> list[Row]:
    """Both, a new row in the place of the old one with the same run_id; sorted by configuration, then seed."""
    merged = list({row["run_id"]: row for row in [*rows, *new]}.values())
    columns = config_columns({name for row in merged for name in row})
    return sorted(
        merged,
        key=lambda row: ([natural(row.get(name, "")) for name in columns], natural(row["seed"]), row["run_id"]),
    )


def natural(text: str) -> tuple[int, float, str]:
    """Sort key: nothing, then numbers by value, then text."""
    if text == "":
        return 0, 0.0, ""
    try:
        return 1, float(text), text
    except ValueError:
        return 2, 0.0, text


def columns(rows: list[Row]) -> list[str]:
    """Column order of the runs' CSV, whichever run came first."""
    present = {name for row in rows for name in row}

    def group(prefix: str, first: Iterable[str] = ()) -> list[str]:
        known = [prefix + name for name in first]
        rest = sorted(name for name in present if name.startswith(prefix) and name not in known)
        return [name for name in known if name in present] + rest

    config = [*config_columns(present), *sorted(name for name in present if _is_config(name) and _is_seed(name))]
    return [*_FIRST, *config, *group("metrics.", _METRICS), *_RUN, *group("hardware."), *group("versions.")]


def _history_values(names: Iterable[str]) -> list[str]:
    """What is told of an epoch, where a history has these names: `HISTORY`, then the validation loss of language models
    and the entropy of each layer."""
    names = set(names)
    layers = (name for name in names if name.startswith("node_entropy_"))
    return [*HISTORY, *sorted(names & {"val_loss"}), *sorted(layers, key=lambda name: (len(name), name))]


def merge_history(rows: list[Row], histories: list[tuple[str, dict[str, list]]]) -> list[Row]:
    """Mean over the runs of each cell and epoch, thinned; `runs` says over how many.

    A mean cannot be taken apart, so the stored one of a cell stays where it was made of more runs than there are now.
    """
    cells: dict[str, list[dict[str, list]]] = {}
    for name, history in histories:
        cells.setdefault(name, []).append(history)
    kept: dict[str, list[Row]] = {}
    for row in rows:
        kept.setdefault(row["cell"], []).append(row)
    for name, runs in cells.items():
        if len(runs) >= max((int(row["runs"]) for row in kept.get(name, [])), default=0):
            kept[name] = _mean_history(name, runs)
    return _thin([row for name in sorted(kept) for row in kept[name]])


def _mean_history(name: str, runs: list[dict[str, list]]) -> list[Row]:
    sums: dict[int, dict[str, list[float]]] = {}
    names = _history_values({key for history in runs for key in history})
    for history in runs:
        for i, epoch in enumerate(history.get("epoch", [])):
            at = sums.setdefault(epoch, {"epoch": []})
            at["epoch"].append(epoch)
            for key in names:
                value = history.get(key, [])[i : i + 1]
                if value and value[0] is not None and math.isfinite(value[0]):
                    at.setdefault(key, []).append(value[0])
    return [
        {"cell": name, "epoch": str(epoch), "runs": str(len(at["epoch"]))}
        | {key: _text(math.fsum(at[key]) / len(at[key]), digits=5) if key in at else "" for key in names}
        for epoch, at in sorted(sums.items())
    ]


def _thin(rows: list[Row]) -> list[Row]:
    """Drop late epochs, ever more of them, until the file is small enough; first and last epoch of a cell stay."""
    last = {row["cell"]: int(row["epoch"]) for row in sorted(rows, key=lambda row: int(row["epoch"]))}
    for growth in (1.0, 1.03, 1.05, 1.1, 1.2, 1.5, 2.0):
        epochs, epoch = set(), 1
        while epoch <= max(last.values(), default=0):
            epochs.add(epoch)
            epoch = max(epoch + 1, int(epoch * growth))
        thinned = [row for row in rows if int(row["epoch"]) in epochs or int(row["epoch"]) == last[row["cell"]]]
        if len(_history_text(thinned)) <= HISTORY_BYTES:
            break
    return thinned


def _history_text(rows: list[Row]) -> str:
    return csv_text(rows, ["cell", "epoch", "runs", *_history_values({name for row in rows for name in row})])


def csv_text(rows: list[Row], names: Iterable[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path, needs: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV file, empty where there is none; ValueError naming the path where it is damaged, or lacks a column
    that it `needs`."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        rows = list(reader)
    if lacking := [name for name in needs if name not in header]:
        raise ValueError(f"{path}: its header lacks {', '.join(lacking)}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} does not have the {len(header)} values of its header")
    return rows


def write(path: Path, content: str | bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


class Update(NamedTuple):
    """files: what the CSV files of a study and its routes are to hold, by path; empty if no run directory has a record.
    problems: what is not counted, one line each."""

    files: dict[Path, str | bytes]
    problems: list[str]


def update(study: str, runs_dir: Path, results_dir: Path) -> Update:
    """`<results_dir>/runs/<study>.csv`, its `.history.csv` and, where runs kept routes, its `.npz`, with the records of
    the run directories; not written."""
    found = collect(runs_dir / study)
    if not found.rows:
        return Update({}, found.problems)
    path = results_dir / "runs" / f"{study}.csv"
    history = path.with_suffix(".history.csv")
    rows = merge(read_csv(path, RUN_COLUMNS), found.rows)
    means = merge_history(read_csv(history, HISTORY_COLUMNS), found.histories)
    files: dict[Path, str | bytes] = {
        path: csv_text(rows, columns(rows)),
        history: _history_text(means),
    }
    archive = path.with_suffix(".npz")
    older = {row["run_id"] for row in rows} - {row["run_id"] for row in found.rows}
    stored = unpack(archive, archive.read_bytes()) if archive.exists() else {}
    if routes := {run_id: arrays for run_id, arrays in stored.items() if run_id in older} | found.routes:
        files[archive] = pack(routes)
    return Update(files, found.problems)
