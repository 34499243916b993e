"""How fast: the rows of all benchmark suites (`python -m experiments.bench`) as tables and figures."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fff.report import bench_gpu, figures
from fff.report.bench_gpu import steps
from fff.report.study import Report, StudyData
from fff.report.tables import MISSING, Table, known, number, short

# Peers that a speed-up is told over, in the order of the columns, and how a reader calls them.
PEERS = {
    "dense": "dense, training width",
    "dense_compiled": "the same, compiled",
    "dense_leaf": "dense, one leaf",
    "upstream": "authors' package",
    "gather_bmm": "gather + bmm",
    "grouped_mm": "grouped_mm",
    "moe_flat": "flat MoE, top-1",
    "fff_grouped": "ours in PyTorch",
}
OURS = "fff_native"
LABELS = {OURS: "FFF, native", "native_op": "its operator alone", **PEERS}
# Those that are drawn; the compiled dense layer would lie on the plain one.
_DRAWN = {name: title for name, title in LABELS.items() if name not in ("dense_compiled", "grouped_mm")}
_COLORS = {
    "dense": figures.DENSE,
    **dict(zip((name for name in _DRAWN if name != "dense"), figures.PALETTE, strict=True)),
}
_MARKERS = dict(zip(_DRAWN, figures.MARKERS + ("*",), strict=True))
_SIZES = ["depth", "batch"]


def report(data: StudyData) -> Report:
    folder = data.results_dir / "bench"
    ratio_files = sorted(folder.glob("*.ratios.csv"))
    row_files = [path for path in sorted(folder.glob("*.csv")) if path not in ratio_files]
    if not row_files:
        raise ValueError(f"no rows in {folder}/; make some with python -m experiments.bench")
    rows = pd.concat([pd.read_csv(path) for path in row_files], ignore_index=True)
    ratios = pd.concat([pd.read_csv(path) for path in ratio_files], ignore_index=True)
    made, remarks = [], []
    for suite, make in {
        "inference": lambda part: _inference(part, ratios[ratios["suite"] == "inference"]),
        "latency": _latency,
        "scaling": _scaling,
        "training": _training,
        "routing": _routing,
        "memory": _memory,
        "crossover": lambda part: _crossover(ratios[ratios["suite"] == "crossover"], part),
    }.items():
        part = rows[rows["suite"] == suite]
        if part.empty:
            remarks.append(f"bench: no rows of suite={suite}")
        else:
            made.append(make(part))
    made += bench_gpu.tables(rows, ratios)
    drawn = {
        "scaling": figure_scaling(rows[rows["suite"] == "scaling"]),
        "speedup": figure_speedup(rows[rows["suite"] == "inference"], ratios),
        "roofline": figure_roofline(rows[rows["suite"].isin(["inference", "scaling"])]),
    }
    tables = [*made, targets(ratios[ratios["suite"] != "crossover"])]
    # Those of crossovers are many, and summed up; they lie in bench/crossover.csv and bench/crossover_cuda.csv.
    rows = rows[~rows["suite"].str.startswith("crossover")]
    return Report(rows, tables, {name: figure for name, figure in drawn.items() if figure is not None}, remarks)


def machine(rows: pd.DataFrame) -> str:
    """What the rows were measured on."""
    names = rows[["cpu", "torch"]].drop_duplicates()
    threads = sorted(rows["threads"].dropna().astype(int).unique())
    return (
        "; ".join(f"{row.cpu}, torch {row.torch}" for row in names.itertuples())
        + f"; threads: {', '.join(map(str, threads))}"
    )


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Median seconds by size (rows) and candidate (columns); of float32."""
    single = rows[(rows["dtype"] == "float32") & rows["median_s"].notna()]
    return single.astype({size: int for size in _SIZES}).pivot_table(
        index=_SIZES, columns="candidate", values="median_s"
    )


def _slower(rows: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """How many times longer than ours each candidate (columns) takes, by size (rows)."""
    times = _grid(rows)
    slower = times.div(times[OURS], axis=0)
    # Where samples of the same rounds were divided, that counts: a slow phase of the machine cancels.
    sizes = rows.drop_duplicates("case").set_index("case")[_SIZES].astype(int)
    paired = ratios[(ratios["over"] == OURS) & (ratios["quantity"] == "time") & ratios["case"].isin(sizes.index)]
    for case, name, median in zip(paired["case"], paired["of"], paired["median"], strict=True):
        if name in slower:
            slower.loc[tuple(sizes.loc[case]), name] = median
    return slower


def _inference(rows: pd.DataFrame, ratios: pd.DataFrame) -> Table:
    rows = rows[rows["case"].str.startswith("grid")]
    times, slower = _grid(rows), _slower(rows, ratios)
    share = rows[rows["candidate"] == OURS].set_index(_SIZES)["floor_share"]
    frame = pd.DataFrame(
        {
            "depth": [str(depth) for depth, _ in times.index],
            "batch": [str(batch) for _, batch in times.index],
            "ours, ms": [f"{1e3 * value:.3g}" for value in times[OURS]],
            "of the floor": [f"{100 * share[size]:.0f} %" for size in times.index],
            **{title: _times(slower[name]) for name, title in PEERS.items() if name in slower},
        }
    )
    note = (
        f"{machine(rows)}. Hard evaluation, 768 -> 768, leaf width 32, float32, one thread: how many times longer each"
        " other takes than ours with the native operators (below 1x ours takes longer), median over the rounds in which"
        " both ran. Each call has the same rows as the one before, so that what they hit may still lie in a cache."
        " Dense layers and the MoE compute other functions; all others gave the same outputs before they were timed."
        " Floor: the larger of counted operations over the measured matmul rate and counted bytes over the measured"
        " bandwidth, as in a roofline."
    )
    title = "Hard evaluation on one CPU thread: how many times longer others take than ours"
    return Table("bench", title, frame, note, text_columns=2)


def _times(values: pd.Series) -> list[str]:
    return [MISSING if pd.isna(value) else f"{short(value)}x" for value in values]


def _latency(rows: pd.DataFrame) -> Table:
    times = 1e6 * _grid(rows)
    columns = {title: [number(value) for value in times[name]] for name, title in LABELS.items() if name in times}
    frame = pd.DataFrame({"depth": [str(depth) for depth, _ in times.index], **columns})
    return Table("bench_latency", "One row: microseconds", frame, f"{machine(rows)}. 768 -> 768, leaf width 32.")


def _scaling(rows: pd.DataFrame) -> Table:
    times = 1e3 * _grid(rows)
    columns = {
        title: [MISSING if pd.isna(value) else short(value) for value in times[name]]
        for name, title in LABELS.items()
        if name in times
    }
    sizes = {"blocks": [str(2**depth) for depth, _ in times.index], "batch": [str(batch) for _, batch in times.index]}
    note = f"{machine(rows)}. 768 -> 768; a block is 32 units: of a dense layer, or an expert, or a leaf."
    return Table("bench_scaling", "Time against the number of blocks, ms", pd.DataFrame(sizes | columns), note, 2)


def _training(rows: pd.DataFrame) -> Table:
    return steps(rows, "bench_training", "Training steps", f"{machine(rows)}. Forward, backward, SGD.")


def _routing(rows: pd.DataFrame) -> Table:
    """Milliseconds of each backend by routes."""
    kind = {False: "inference", True: "training"}
    rows = rows[rows["median_s"].notna()]
    rows = rows.assign(gradient=rows["gradient"].astype(str) == "True")  # empty where the case does not say
    keys = ["gradient", "num_experts", "batch", "routes"]
    times = rows.astype({"num_experts": int, "batch": int}).pivot_table(
        index=keys, columns="candidate", values="median_s", sort=False
    )
    chosen = rows[rows["candidate"] == "auto"].set_index(keys)
    frame = pd.DataFrame(
        {
            "": [kind[bool(key[0])] for key in times.index],
            "experts": [str(key[1]) for key in times.index],
            "batch": [str(key[2]) for key in times.index],
            "routes": [key[3] for key in times.index],
            "auto took": list(chosen["backend"]),
            **{
                name: [MISSING if pd.isna(value) else f"{1e3 * value:.3g}" for value in times[name]]
                for name in ("auto", "native", "grouped", "grouped_mm", "gather", "dense")
                if name in times
            },
            "auto, of the floor": [f"{100 * value:.0f} %" for value in chosen["floor_share"]],
        }
    )
    note = (
        f"{machine(rows)}. Milliseconds of the expert computation alone on given routes, 768 -> 768, 32 units each."
        " Zipf: the r-th expert is chosen in proportion to 1 / r; trained: the leaves of a tree that was trained"
        " straight-through with balance loss."
    )
    return Table("bench_routing", "Even, skewed and learnt routes", frame, note, 5)


def _memory(rows: pd.DataFrame) -> Table:
    rows = rows[rows["peak_bytes"].notna()].astype(dict.fromkeys(_SIZES, int))
    kind = rows["case"].str.partition("_")[0]
    peak = rows.assign(kind=kind).pivot_table(
        index=["kind", *_SIZES], columns="candidate", values="peak_bytes", sort=False
    )
    frame = pd.DataFrame(
        {
            "": [key[0] for key in peak.index],
            "depth": [str(key[1]) for key in peak.index],
            "batch": [str(key[2]) for key in peak.index],
            **{
                name.replace("_", " "): [MISSING if pd.isna(v) else short(v / 2**20) for v in peak[name]]
                for name in dict.fromkeys(rows["candidate"])
            },
        }
    )
    note = (
        f"{machine(rows)}. MiB that a call holds at once beyond the weights, counted at torch's allocator. 768 -> 768."
    )
    return Table("bench_memory", "Peak memory", frame, note, 3)


def _crossover(ratios: pd.DataFrame, rows: pd.DataFrame) -> Table:
    """How far the choice of "auto" is from the best backend, over all cases of a kind."""
    judged = ratios[ratios["met"].notna()]
    titles = {"auto": "auto", "auto_pytorch": "auto without native operators"}
    lines = []
    for (kind, of), part in judged.groupby([judged["case"].str.partition("_")[0], "of"], sort=False):
        worst = part.loc[part["median"].idxmax()]
        lines.append(
            {
                "": kind,
                "choice": titles[of],
                "cases": str(len(part)),
                "within 1.3": str(int((part["met"].astype(str) == "True").sum())),
                "median": short(part["median"].median()),
                "worst": short(worst["median"]),
                "worst case": f"{worst['case'].partition('_')[2]}, where {worst['over']} is best",
            }
        )
    note = f'{machine(rows)}. Time of the backend that "auto" takes over that of the fastest one in the same case.'
    return Table("bench_crossover", "The choice of a backend", pd.DataFrame(lines), note, 2)


def targets(ratios: pd.DataFrame) -> Table:
    """Every comparison that had a target: met, missed, or not measured, where one was refused or not to be had."""
    judged = ratios[ratios["at_least"].notna() | ratios["at_most"].notna()]
    bound = [
        f">= {at_least:g}" if pd.notna(at_least) else f"<= {at_most:g}"
        for at_least, at_most in zip(judged["at_least"], judged["at_most"], strict=True)
    ]
    frame = pd.DataFrame(
        {
            "suite": judged["suite"],
            "case": judged["case"],
            "compared": [
                f"{q}: {of} / {over}"
                for q, of, over in zip(judged["quantity"], judged["of"], judged["over"], strict=True)
            ],
            "median": [known(value) for value in judged["median"]],
            "quartiles": [
                MISSING if pd.isna(low) else f"{short(low)} - {short(high)}"
                for low, high in zip(judged["low"], judged["high"], strict=True)
            ],
            "target": bound,
            "met": [
                "not measured" if pd.isna(met) else "yes" if str(met) == "True" else "missed" for met in judged["met"]
            ],
        }
    )
    return Table("bench_targets", "Targets", frame, "extra_ms: the difference in milliseconds a step.", 3)


def figure_scaling(rows: pd.DataFrame) -> Figure | None:
    """Time against the number of blocks, both logarithmic; dashed: the floor of the same function."""
    rows = rows[rows["median_s"].notna()]
    if rows.empty:
        return None
    batches = sorted(rows["batch"].unique())
    figure = Figure(figsize=(3.6 * len(batches), 3.2), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        part = rows[rows["batch"] == batch]
        for name, title in ((n, t) for n, t in _DRAWN.items() if n in set(part["candidate"])):
            line = part[part["candidate"] == name].sort_values("depth")
            color = _COLORS[name]
            axes.plot(
                2 ** line["depth"], line["median_s"], color=color, marker=_MARKERS[name], label=title, markersize=4
            )
            if name in (OURS, "dense"):
                axes.plot(2 ** line["depth"], line["floor_s"], color=color, linestyle="--", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="blocks of 32 units", ylabel="seconds", title=f"batch {int(batch)}")
        axes.set_xscale("log", base=2)
        if batch == batches[0]:
            axes.legend()
    return figure


def figure_speedup(rows: pd.DataFrame, ratios: pd.DataFrame) -> Figure | None:
    """How many times faster than a dense layer of the training width, by depth and batch."""
    rows = rows[rows["case"].str.startswith("grid")]
    if rows.empty:
        return None
    times = _grid(rows)
    if not {OURS, "dense"} <= set(times.columns):
        return None
    ratio = _slower(rows, ratios)["dense"].unstack("batch")
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.imshow(ratio.map(lambda value: max(value, 1.0)).to_numpy(), norm="log", cmap="Blues", aspect="auto")
    middle = ratio.to_numpy().max() ** 0.6
    for i, depth in enumerate(ratio.index):
        for j, batch in enumerate(ratio.columns):
            value = ratio.loc[depth, batch]
            axes.text(j, i, f"{short(value)}x", ha="center", va="center", color="white" if value > middle else "black")
    axes.set_xticks(range(len(ratio.columns)), [str(int(batch)) for batch in ratio.columns])
    axes.set_yticks(range(len(ratio.index)), [str(int(depth)) for depth in ratio.index])
    axes.set(xlabel="batch", ylabel="depth", title="faster than dense of the training width")
    return figure


def figure_roofline(rows: pd.DataFrame) -> Figure | None:
    """Operations per second that were needed and done, against operations per byte; the roof is what was measured."""
    rows = rows[rows["floor_s"].notna() & (rows["threads"] == 1) & (rows["dtype"] == "float32")]
    if rows.empty:
        return None
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.subplots()
    intensity = rows["least_flops"] / rows["least_bytes"]
    rate, slow, fast = rows["matmul_rate"].max(), rows["bandwidth"].min(), rows["bandwidth"].max()
    ends = [intensity.min() / 2, intensity.max() * 2]
    for bandwidth, style in ((slow, "-"), (fast, ":")):
        corner = rate / bandwidth
        x = sorted([ends[0], corner, ends[1]])
        label = f"{bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s"
        axes.plot(x, [min(rate, bandwidth * value) for value in x], color="#666666", linestyle=style, label=label)
    for name, title in _DRAWN.items():
        part = rows[rows["candidate"] == name]
        if not part.empty:
            done = part["least_flops"] / part["median_s"]
            axes.scatter(intensity[part.index], done, s=14, color=_COLORS[name], marker=_MARKERS[name], label=title)
    axes.set(xscale="log", yscale="log", xlabel="counted FLOP per counted byte", ylabel="counted FLOP/s")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=6, ncols=2)
    return figure
