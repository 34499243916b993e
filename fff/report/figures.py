"""Figures of a study; each takes plain frames or arrays and gives a matplotlib figure.

Drawn and saved within `style()`, the same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, safe for colour-blind readers; black is kept for the dense layer.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DENSE = "#000000"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Rounding a node's decision does no harm below this entropy (FFF paper, section 3).
HARD_ENTROPY = 0.10
_PLAIN = {"color": "#666666"}
# Percent; what lies below is drawn as empty.
_FLOOR = 0.02
_GRID = {"color": "#dddddd", "linewidth": 0.6}
_CENTRED = {"ha": "center", "va": "center"}
_BADGE = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}


def style() -> AbstractContextManager:
    return matplotlib.rc_context(
        {
            **matplotlib.rcParamsDefault,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "figure.dpi": 160,
            # Ids of clip paths are random otherwise.
            "svg.hashsalt": "fff",
            "svg.fonttype": "none",
        }
    )


def save(figure: Figure) -> dict[str, bytes]:
    """The figure as "svg" and "png", without date and version, so that the bytes depend on the content alone."""
    # The canvases themselves, and one layout for both: `savefig` would draw five times.
    vector, raster = io.BytesIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(vector, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")
    FigureCanvasAgg(figure).print_png(raster, metadata={"Software": None})
    return {"svg": vector.getvalue(), "png": raster.getvalue()}


class Series(NamedTuple):
    """Points of one line, fractions in percent already; mean, std and best may be None each.

    best is drawn hollow over the mean. linestyle "" draws points only."""

    label: str
    x: Sequence[float]
    mean: Sequence[float] | None
    std: Sequence[float] | None
    best: Sequence[float] | None
    color: str
    marker: str = "o"
    linestyle: str = "-"


def accuracy_panel(axes: Axes, series: Iterable[Series], x_label: str, y_label: str, sizes: Iterable[float]) -> None:
    """Mean with error bars and the best run, over a logarithmic size. sizes: what the ticks are to cover."""
    for s in series:
        if s.mean is not None:
            axes.errorbar(
                s.x,
                s.mean,
                yerr=None if s.std is None else np.nan_to_num(np.asarray(s.std, dtype=float)),
                color=s.color,
                marker=s.marker,
                markersize=4.5,
                linestyle=s.linestyle,
                linewidth=1.3,
                elinewidth=0.9,
                capsize=2,
                label=s.label,
            )
        if s.best is not None:
            axes.plot(
                s.x,
                s.best,
                color=s.color,
                marker=s.marker,
                markersize=6.5,
                markerfacecolor="none",
                linestyle=s.linestyle if s.mean is None else "",
                linewidth=1.0,
                label=s.label if s.mean is None else None,
            )
    _size_axis(axes, sizes)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", **_GRID)


def _size_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Powers of two as ticks."""
    positive = [size for size in sizes if size > 0]
    if not positive:
        return
    axes.set_xscale("log", base=2)
    low, high = int(np.floor(np.log2(min(positive)))), int(np.ceil(np.log2(max(positive))))
    ticks = [2.0**i for i in range(low, high + 1, max(1, (high - low) // 8))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def legend_below(figure: Figure, axes: Iterable[Axes], columns: int = 4, best: bool = False, dashed: str = "") -> None:
    """One legend for all panels, under them; with entries for the marker of the best run and for dashed lines."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    if best:
        handles["best run"] = Line2D([], [], **_PLAIN, marker="o", markersize=6.5, markerfacecolor="none", linestyle="")
    if dashed:
        handles[dashed] = Line2D([], [], **_PLAIN, linestyle="--", linewidth=1.0)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def colors(families: Iterable[tuple[str, bool]]) -> dict[str, str]:
    """Colour of each family (name, is it dense?), by order; dense ones black and greys, which the palette has not."""
    found: dict[str, str] = {}
    greys = iter((DENSE, "#777777", "#aaaaaa", "#cccccc"))
    for name, dense in families:
        if name not in found:
            colored = sum(color in PALETTE for color in found.values())
            found[name] = next(greys, DENSE) if dense else PALETTE[colored % len(PALETTE)]
    return found


def accuracy(cells: pd.DataFrame, palette: dict[str, str], size: str = "inference_size") -> Figure:
    """MA and GA of labelled cells against a size, one line for each family; cells of one size are not joined."""
    names = list(dict.fromkeys(cells["family"]))
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, metric, title in zip(panels, ("ma", "ga"), ("memorisation (MA)", "generalisation (GA)"), strict=True):
        series = []
        for i, name in enumerate(names):
            points = cells[cells["family"] == name].dropna(subset=[size, f"{metric}_mean"])
            points = points.sort_values(size, kind="stable")
            if points.empty:
                continue
            # Families that share a size stand side by side.
            shared = cells[size][cells["family"] != name].isin(points[size]).any()
            x = points[size] * (2 ** (0.07 * (i - (len(names) - 1) / 2)) if shared else 1)
            mean, std, best = (100 * points[f"{metric}_{kind}"] for kind in ("mean", "std", "best"))
            line = "-" if points[size].is_unique and points["data"].nunique() == 1 else ""
            series.append(Series(name, list(x), mean, std, best, palette[name], MARKERS[i % len(MARKERS)], line))
        accuracy_panel(panel, series, size.replace("_", " ") + " (neurons)", "accuracy in %", sizes=cells[size])
        panel.set_title(title)
    legend_below(figure, panels, columns=3, best=True)
    return figure


def entropy(history: pd.DataFrame, cells: pd.DataFrame, shade: str = "depth") -> Figure | None:
    """Mean node entropy per epoch, one panel for each family and one line for each cell, coloured by `shade`.

    history: columns cell, epoch, runs, node_entropy (over which nodes and rows: results/README.md).  cells: columns
    cell, family, and that of `shade`, of numbers. A line ends where fewer than half of the cell's runs are still
    training. None if there is no tree.
    """
    lines = history.dropna(subset=["node_entropy"]).merge(cells[["cell", "family", shade]], on="cell")
    lines = lines[lines["runs"] * 2 >= lines.groupby("cell")["runs"].transform("max")]
    if lines.empty:
        return None
    names = list(dict.fromkeys(cells["family"][cells["cell"].isin(lines["cell"])]))
    values = sorted(lines[shade].unique())
    map_ = matplotlib.colormaps["viridis"]
    color = {value: map_(0.92 * i / max(1, len(values) - 1)) for i, value in enumerate(values)}
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(min(4.0 * columns, 12.0), 2.4 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.remove()
    for panel, name in zip(panels.flat, names, strict=False):
        for cell in cells["cell"]:
            line = lines[(lines["cell"] == cell) & (lines["family"] == name)]
            if len(line):
                value = line[shade].iloc[0]
                panel.plot(line["epoch"], line["node_entropy"], color=color[value], linewidth=1.2, label=f"{value:g}")
        panel.axhline(HARD_ENTROPY, color="#888888", linestyle="--", linewidth=0.9)
        panel.axhline(np.log(2), color="#bbbbbb", linestyle=":", linewidth=0.9)
        # Logarithmic: nodes harden in a few epochs, and far below the line that is harmless.
        panel.set(title=name, xlabel="epoch", xscale="log", yscale="log", ylim=(1e-4, 1))
        panel.grid(axis="y", **_GRID)
    for panel in panels[:, 0]:
        panel.set_ylabel("mean node entropy, nats")
    for height, text in ((HARD_ENTROPY, "0.10"), (np.log(2), "ln 2")):
        panels.flat[len(names) - 1].annotate(
            text, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=7
        )
    handles = [Line2D([], [], color=color[value], label=f"{shade} {value:g}") for value in values]
    mark = f"{HARD_ENTROPY:.2f}: below it rounding is harmless (FFF paper)"
    handles.append(Line2D([], [], color="#888888", linestyle="--", linewidth=0.9, label=mark))
    figure.legend(handles=handles, loc="outside lower center", ncols=8)
    return figure


def leaf_usage(loads: Sequence[tuple[str, Sequence[int]]], palette: dict[str, str]) -> Figure | None:
    """Share of the rows in each leaf, leaves sorted by load in each run, then averaged over runs with equal count.

    loads: (family, rows in each leaf) of each run; families are drawn in the order of the palette. One panel for each
    number of leaves; None if none has two.
    """
    by_size: dict[int, dict[str, list[np.ndarray]]] = {}
    for name, load in loads:
        if len(load) > 1 and sum(load) > 0:
            share = np.sort(np.asarray(load, dtype=float))[::-1] / sum(load)
            by_size.setdefault(len(load), {}).setdefault(name, []).append(share)
    if not by_size:
        return None
    columns = min(4, len(by_size))
    rows = -(-len(by_size) // columns)
    figure = Figure(figsize=(max(4.5, 2.4 * columns), 2.2 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(by_size) :]:
        panel.remove()
    for i, (panel, count) in enumerate(zip(panels.flat, sorted(by_size), strict=False)):
        edges = np.arange(count + 1) + 0.5
        for name, color in palette.items():
            if name in by_size[count]:
                mean = 100 * np.mean(by_size[count][name], axis=0)
                panel.stairs(mean, edges, baseline=_FLOOR, fill=True, alpha=0.15, color=color)
                panel.stairs(np.maximum(mean, _FLOOR), edges, baseline=_FLOOR, color=color, linewidth=1.4, label=name)
        panel.axhline(100 / count, color="#555555", linestyle="--", linewidth=0.9)
        # Logarithmic, so that a leaf with few rows is told from an empty one.
        panel.set(title=f"{count} leaves", yscale="log", ylim=(_FLOOR, 110), xlim=(0.5, count + 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        panel.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        panel.minorticks_off()
        panel.grid(axis="y", **_GRID)
        if i % columns == 0:
            panel.set_ylabel("rows in the leaf, %")
        if i >= len(by_size) - columns:
            panel.set_xlabel("leaf, by load")
    legend_below(figure, panels.flat[: len(by_size)], columns=4, dashed="even use")
    return figure


class Regions(NamedTuple):
    """How one trained tree cuts the plane.

    leaf, label: (H, W) leaf and predicted class of each grid point.  title: above the panel."""

    title: str
    leaf: np.ndarray
    label: np.ndarray


def regions(
    panels: Sequence[Regions], x: np.ndarray, y: np.ndarray, points: np.ndarray, labels: np.ndarray, num_leaves: int
) -> Figure:
    """Grid coloured by the leaf of the hard route, the classes' borders as lines, and the data points.

    x (W,), y (H,): coordinates of the grid.  points: (N, 2).  labels: (N,) class of each point.
    """
    colors = _leaf_colors(num_leaves)
    figure, axes = _grid_of(len(panels), width=3.9, height=3.5)
    for panel, region in zip(axes, panels, strict=True):
        panel.pcolormesh(
            x,
            y,
            region.leaf,
            cmap=ListedColormap(colors),
            vmin=-0.5,
            vmax=num_leaves - 0.5,
            shading="nearest",
            rasterized=True,
        )
        for value in np.unique(region.label)[1:]:
            panel.contour(x, y, region.label == value, levels=[0.5], colors="black", linewidths=1.6)
        for i, value in enumerate(np.unique(labels)):
            chosen = points[labels == value]
            panel.scatter(
                *chosen.T,
                s=9,
                marker=MARKERS[i],
                color=("#ffffff", "#222222", *PALETTE)[i],
                edgecolors="#222222",
                linewidths=0.5,
            )
        for leaf in np.unique(region.leaf):
            rows, columns = np.nonzero(region.leaf == leaf)
            # The point of the leaf nearest to its centre: a centre itself may lie outside.
            centre = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            if len(rows) > 0.01 * region.leaf.size:
                panel.text(x[columns[centre]], y[rows[centre]], str(leaf), fontsize=8, bbox=_BADGE, **_CENTRED)
        panel.set(title=region.title, xticks=[], yticks=[])
    return figure


def _leaf_colors(num_leaves: int) -> list[tuple[float, ...]]:
    base = matplotlib.colormaps["tab20"]
    # The even entries are the strong tones, the odd ones the pale: pale first, as points lie on them.
    return [base((2 * i + 1) % 20) if i < 10 else base(2 * (i - 10) % 20) for i in range(num_leaves)]


def _grid_of(count: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of this size in inches, row by row."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes[count:]:
        panel.remove()
    return figure, axes[:count]


def class_counts(tables: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """How many rows of each class go to each leaf: (title, (C, E) counts) of each panel.

    Colour is the share of the class's rows; the number is the count, left out where it is 0.
    """
    figure, axes = _grid_of(len(tables), width=4.8, height=3.2)
    for panel, (title, counts) in zip(axes, tables, strict=True):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        panel.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[i, j] > 0.6 else "black"
                panel.text(j, i, str(count), fontsize=5.5, color=color, **_CENTRED)
        panel.set(title=title, xlabel="leaf or expert", ylabel="class")
        panel.set_xticks(range(counts.shape[1]))
        panel.set_yticks(range(counts.shape[0]))
        panel.tick_params(labelsize=6, length=2)
    return figure


def scattered(panels: Sequence[tuple[str, np.ndarray]], points: np.ndarray, classes: np.ndarray) -> Figure:
    """The same points (T, 2), first coloured by class (T,), then by the leaf of each panel: (title, (T,))."""
    figure, axes = _grid_of(1 + len(panels), width=3.4, height=3.2, columns=4)
    tones = matplotlib.colormaps["tab10"](np.arange(10))
    colored = [("class", tones[classes % 10])]
    colored += [(title, np.array(_leaf_colors(leaf.max() + 1))[leaf]) for title, leaf in panels]
    for panel, (title, color) in zip(axes, colored, strict=True):
        # Smooth edges would take several times the bytes.
        panel.scatter(*points.T, s=3, marker="s", c=color, linewidths=0, antialiased=False, rasterized=True)
        panel.set(title=title, xticks=[], yticks=[])
    for value in np.unique(classes):
        # Its number at the median of a class.
        axes[0].text(*np.median(points[classes == value], axis=0), str(value), fontsize=8, bbox=_BADGE, **_CENTRED)
    return figure
