"""Tables as Markdown and LaTeX, from data frames whose cells are finished text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import pandas as pd

MISSING = "–"
CELL_NOTE = (
    "Accuracies are those of the hard route, in percent: MA on the training rows (best over the epochs), GA on the test"
    " rows with the weights of the best validation accuracy. Best is the best of n runs; ± is the standard deviation"
    " of a sample. ETT is the mean epoch that reached the value. Runs that diverged count in n and enter with the"
    " metrics of their best weights before that, if there are any. Capped: ended by the limit of epochs,"
    " not by a standstill of both accuracies, and not settled beforehand. Leaves in use: leaves that at least one test"
    " row reaches, mean over the runs; largest: share of the test rows in the fullest leaf."
)


class Table(NamedTuple):
    """name: of the LaTeX label.  frame: text to print, index not shown.  text_columns: how many columns from the left
    are words, the rest is aligned as numbers."""

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""
    text_columns: int = 1


def known(value: float, unit: str = "") -> str:
    return MISSING if pd.isna(value) else f"{short(value)}{unit}"


def short(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def number(value: float | None, decimals: int = 1) -> str:
    """Fixed decimals, "–" for nothing."""
    return MISSING if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def integer(value: float | None) -> str:
    return MISSING if value is None or math.isnan(value) else f"{value:,.0f}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    return MISSING if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{decimals}f}"


def spread(mean: float, std: float, decimals: int = 1) -> str:
    """mean ± std of fractions, in percent."""
    return MISSING if math.isnan(mean) else f"{percent(mean, decimals)} ± {percent(std, decimals)}"


def of(part: float, whole: float) -> str:
    """Part / whole; "–" for a layer with a single expert, which has nothing to choose."""
    return MISSING if math.isnan(part) or not whole > 1 else f"{part:.1f} / {whole:.0f}"


def generic(cells: pd.DataFrame, name: str) -> Table:
    """One row per labelled cell, for a study that brings no layout of its own."""
    single = ~(cells["num_leaves"] > 1)
    frame = pd.DataFrame(
        {
            "data": cells["data"],
            "layer": cells["layer"],
            "settings": cells["settings"].where(cells["settings"] != "", MISSING),
            "MA best": cells["ma_best"].map(percent),
            "MA mean": [spread(*values) for values in zip(cells["ma_mean"], cells["ma_std"], strict=True)],
            "ETT (MA)": cells["ma_epochs"].map(integer),
            "GA best": cells["ga_best"].map(percent),
            "GA mean": [spread(*values) for values in zip(cells["ga_mean"], cells["ga_std"], strict=True)],
            "ETT (GA)": cells["ga_epochs"].map(integer),
            "GA soft": cells["ga_soft_mean"].map(percent),
            "leaves in use": [of(*values) for values in zip(cells["leaves_used"], cells["num_leaves"], strict=True)],
            "largest %": cells["largest_leaf_share"].mask(single).map(percent),
            "n": cells["n"].map(str),
            "diverged": cells["diverged"].map(str),
            "capped": cells["capped"].map(str),
            "parameters": cells["parameters"].map(integer),
            "width trained": cells["training_width"].map(integer),
            "width used": cells["inference_width"].map(integer),
            "FLOPs / row": cells["flops_per_row"].map(integer),
        }
    )
    words = 3
    if frame["data"].nunique() == 1:
        frame, words = frame.drop(columns="data"), 2
    return Table(name, f"{name}: all cells", frame, CELL_NOTE, words)


def markdown(table: Table) -> str:
    """Section with a title, padded so that it reads well as plain text."""
    rows = [[str(name) for name in table.frame.columns], *table.frame.astype(str).values.tolist()]
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        padded = (
            text.ljust(width) if i < table.text_columns else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < table.text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [f"## {table.title}", "", line(rows[0]), line(rule), *map(line, rows[1:])]
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def latex(table: Table) -> str:
    """A `table` environment; needs the package booktabs."""
    alignment = "".join("l" if i < table.text_columns else "r" for i in range(table.frame.shape[1]))
    header = [_tex(str(name)) for name in table.frame.columns]
    body = [[_tex(text) for text in row] for row in table.frame.astype(str).values.tolist()]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
}


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _TEX)), lambda match: _TEX[match.group()], text)
