"""Run records to committed CSV files, tables and figures: `python -m experiments.tables [study ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from fff.report.records import update
    from fff.report.study import headline, load, publish, studies, update_block, update_readme
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; tables need the extra: pip install 'fff[train]'") from error


RESULTS, FRONT_PAGE = Path("results"), Path("README.md")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="experiments.tables",
        description="Merge the records of finished runs into RESULTS/runs/<study>.csv, then make the tables and figures"
        " of the study from the CSV files alone; prints the tables. The schema is in results/README.md.",
    )
    parser.add_argument("study", nargs="*", help="default: every study that has records")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="run directories (default: %(default)s)")
    parser.add_argument("--results-dir", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)

    known = studies(options.runs_dir, options.results_dir)
    if not known:
        print(f"no records in {options.runs_dir}/ or {options.results_dir}/runs/", file=sys.stderr)
        return 1
    failed = False
    for study in options.study or known:
        try:
            files, problems = update(study, options.runs_dir, options.results_dir)
            _tell(problems)
            if study not in known:
                places = f"{options.runs_dir}/ or {options.results_dir}/runs/"
                raise ValueError(f"no records of study {study!r} in {places}; there are: {', '.join(known)}")
            published = publish(load(study, options.results_dir, files), files)
            _tell(published.remarks)
            print(published.markdown)
            # The page of the project tells how fast, beside the committed results alone.
            if study == "bench" and options.results_dir == RESULTS and FRONT_PAGE.exists():
                update_block(FRONT_PAGE, headline(published.markdown, "Hard evaluation on a GPU"))
        except KeyError as error:  # of pandas
            print(f"error: {study}: its records lack what its tables show: {error}", file=sys.stderr)
            failed = True
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    try:
        update_readme(options.results_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        failed = True
    return int(failed)


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
