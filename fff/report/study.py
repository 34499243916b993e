"""A study's tables and figures: from its committed CSV files alone, by a layout of its own or the generic one.

A layout is a module `fff/report/studies/<study>.py` with a function `report(data: StudyData) -> Report`.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures, tables
from fff.report.cells import label, read_runs, summarize
from fff.report.records import HISTORY, HISTORY_COLUMNS, RUN_COLUMNS, config_columns, read_csv, write
from fff.report.tables import Table

# What the page of the results opens with: the first table of these studies, and figures.
_LEADS = ("table2", "table1")
_LEAD_FIGURES = ("table2_width", "table1_usps_size", "table1_usps_leaves", "clusters_accuracy")


class StudyData(NamedTuple):
    """runs, history, archive (content of `runs/<study>.npz`): empty where the study has no such file.  results_dir: for
    reference values and other records."""

    name: str
    runs: pd.DataFrame
    history: pd.DataFrame
    results_dir: Path
    archive: bytes = b""


class Report(NamedTuple):
    """cells: unrounded numbers behind the tables, one row per cell.  tables: the first is the headline.
    figures: by the part of the file name that follows the study's.  remarks: what the reader of the tables has to know
    about this making of them, one line each."""

    cells: pd.DataFrame
    tables: list[Table]
    figures: dict[str, Figure]
    remarks: Sequence[str] = ()


class Published(NamedTuple):
    """markdown: the tables as written.  remarks: those of the report."""

    markdown: str
    remarks: Sequence[str]


def studies(runs_dir: Path, results_dir: Path) -> list[str]:
    """Names of all studies that have run directories or committed records."""
    names = {path.name for path in runs_dir.glob("*") if any(path.glob("*/result.json"))}
    records = [*(results_dir / "runs").glob("*.csv"), *(results_dir / "runs").glob("*.npz")]
    timed = {"bench"} if any((results_dir / "bench").glob("*.csv")) else set()
    return sorted(names | timed | {path.stem.removesuffix(".history") for path in records})


def load(name: str, results_dir: Path, files: Mapping[Path, str | bytes] | None = None) -> StudyData:
    """files: by path, what is to be read instead of what lies there (`records.update`).

    ValueError naming a file that is damaged.
    """
    files = files or {}

    def source(path: Path, needs: Sequence[str]) -> Path | io.StringIO | None:
        if path in files:
            return io.StringIO(files[path])
        read_csv(path, needs)  # pandas would make something of a damaged file as well
        return path if path.exists() else None

    runs = source(results_dir / "runs" / f"{name}.csv", RUN_COLUMNS)
    history = source(results_dir / "runs" / f"{name}.history.csv", HISTORY_COLUMNS)
    archive = results_dir / "runs" / f"{name}.npz"
    return StudyData(
        name,
        pd.DataFrame() if runs is None else read_runs(runs),
        pd.DataFrame(columns=["cell", "epoch", "runs", *HISTORY])
        if history is None
        else pd.read_csv(history, dtype={"cell": str}),
        results_dir,
        files[archive] if archive in files else archive.read_bytes() if archive.exists() else b"",
    )


def refusal(study: str, what: str, groups: Mapping[str, Iterable[str]]) -> ValueError:
    """The error of a study that holds runs which must not be mixed. groups: their ids, by what tells them apart."""
    listed = [f"  {name}: {', '.join(run_ids)}" for name, run_ids in groups.items()]
    remedy = (
        f"nothing is written. Keep one of them; of the others delete the run directories {study}/<run id>, their rows"
        f" in runs/{study}.csv and those of their cells in runs/{study}.history.csv, or give them a study of their own"
    )
    return ValueError("\n".join([f"{study} holds {what}; {remedy}:", *listed]))


def check_digests(data: StudyData) -> None:
    """ValueError if runs with the same configuration of the data were not computed on the same rows.

    The records of older runs have no digest and agree with any.
    """
    runs = data.runs
    if "data_digest" not in runs:
        return
    runs = runs[runs["data_digest"] != ""]
    names = [name for name in config_columns(runs.columns) if name.startswith("data.")]
    for _, group in runs.groupby(["study", *names]):
        if group["data_digest"].nunique() > 1:
            by_digest = group.groupby("data_digest", sort=False)["run_id"]
            versions = {f"data_digest {digest}": run_ids for digest, run_ids in by_digest}
            raise refusal(data.name, f"runs on {len(versions)} versions of one data set", versions)


def report(data: StudyData) -> Report:
    """By the layout of the study; ValueError for one whose runs must not be mixed."""
    check_digests(data)
    module = f"fff.report.studies.{data.name}"
    # A study may have any name; only one that can be a module has a layout.
    if data.name.isidentifier() and importlib.util.find_spec(module) is not None:
        return importlib.import_module(module).report(data)
    return generic(data)


def generic(data: StudyData) -> Report:
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv, and no layout that does without")
    cells = label(summarize(data.runs, keep=["recipe"]))
    return Report(cells, [tables.generic(cells, data.name)], generic_figures(data, cells))


def generic_figures(data: StudyData, cells: pd.DataFrame) -> dict[str, Figure]:
    """accuracy, entropy and leaves, each where the study has it. cells: labelled."""
    palette = figures.colors(zip(cells["family"], ~(cells["num_leaves"] > 1), strict=True))
    names = dict(zip(cells["cell"], cells["family"], strict=True))
    loads = [(names[cell], load) for cell, load in zip(data.runs["cell"], data.runs["metrics.leaf_load"], strict=True)]
    drawn = {
        "accuracy": figures.accuracy(cells, palette),
        "entropy": figures.entropy(data.history, cells),
        "leaves": figures.leaf_usage(loads, palette),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def publish(data: StudyData, files: Mapping[Path, str | bytes] | None = None) -> Published:
    """Write `tables/<study>.{md,tex,csv}`, `figures/<study>_*.{svg,png}` and `files`, once all of them are made."""
    written: dict[Path, str | bytes] = {**(files or {})}
    with figures.style():
        result = report(data)
        for name, figure in result.figures.items():
            for kind, content in figures.save(figure).items():
                written[data.results_dir / "figures" / f"{data.name}_{name}.{kind}"] = content
    origin = f"Made by `python -m experiments.tables {data.name}`; do not edit."
    text = "\n".join([f"# {data.name}", "", origin, "", *map(tables.markdown, result.tables)])
    folder = data.results_dir / "tables"
    written[folder / f"{data.name}.md"] = text
    written[folder / f"{data.name}.tex"] = f"% {origin}\n" + "\n".join(map(tables.latex, result.tables))
    written[folder / f"{data.name}.csv"] = result.cells.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    for path, content in written.items():
        write(path, content)
    return Published(text, result.remarks)


def update_block(path: Path, text: str, name: str = "generated") -> None:
    """Put `text` into the marked block of a page; ValueError without its markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begins, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        raise ValueError(f"{path}: the markers {begin!r} and {end!r} must both be there")
    write(path, f"{before}{begin}\n\n{text}\n{end}{after}")


def update_readme(results_dir: Path) -> None:
    """Fill the marked blocks of `<results_dir>/README.md`: the lead, and the first table and figures of every study."""
    path = results_dir / "README.md"
    if not path.exists():
        return
    parts, headlines = [], {}
    files = sorted((results_dir / "tables").glob("*.md"))
    for table in files:
        study = table.stem
        # The name of one study may begin with that of another.
        longer = tuple(f"{other.stem}_" for other in files if other.stem.startswith(f"{study}_"))
        drawn = [f for f in sorted((results_dir / "figures").glob(f"{study}_*.svg")) if not f.name.startswith(longer)]
        first = headline(table.read_text(encoding="utf-8"))
        parts += [f"### {study}", "", f"All tables: [tables/{study}.md](tables/{study}.md)", ""]
        parts += [first]
        parts += [_image(figure.name) for figure in drawn]
        headlines[study] = first
    opening = [headlines[study] for study in _LEADS if study in headlines]
    opening += [_image(f"{name}.svg") for name in _LEAD_FIGURES if (results_dir / "figures" / f"{name}.svg").exists()]
    update_block(path, "\n".join(opening), "generated lead")
    update_block(path, "\n".join(parts))


def _image(name: str) -> str:
    return f"![{name.removesuffix('.svg')}](figures/{name})\n"


def headline(markdown: str, *others: str) -> str:
    """The first table of a published study, and those of these titles that it has."""
    _, first, *rest = markdown.split("\n## ")
    wanted = [first, *(section for section in rest if section.partition("\n")[0] in others)]
    parts = (section.partition("\n") for section in wanted)
    return "\n".join(f"**{title}**\n{body}" for title, _, body in parts)
