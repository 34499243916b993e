"""The mixture-of-clusters data of Chen et al. 2022 (arXiv 2208.02813): their models and our layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import erf, sqrt

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fff.report import figures
from fff.report.cells import summarize
from fff.report.paper import layer_name, reference
from fff.report.study import Report, StudyData, refusal
from fff.report.tables import MISSING, Table, integer, number, of

SETTINGS = ("1", "2", "3", "4")
_SOURCES = {
    "paper table": "paper",
    "official notebook output": "authors' notebook",
    "official notebook rerun": "authors' notebook",
}
_ACTIVATIONS = {"identity": "linear", "cube": "cubic", "linear": "linear", "nonlinear": "cubic"}
_NOTE = (
    "Columns: settings of the data. Mean ± standard deviation over the seeds, test rows, hard route, weights of the"
    " best validation accuracy; runs that diverged count with their best weights before that. Trees, dense layers and"
    " the switch and mixtral mixtures take the sum of a row's four patches, the models of the paper the four patches."
    " 8 x 4: eight experts or leaves of 4 units; a tree of depth 2 has four leaves, one of depth 3 eight."
)


def report(data: StudyData) -> Report:
    """ValueError if the study holds two configurations for one place of a table: their runs must not be mixed."""
    if data.runs.empty:
        raise ValueError(f"{data.name} has no rows in runs/{data.name}.csv")
    runs = data.runs.assign(
        model=[_model(row) for row in data.runs.to_dict("records")], setting=data.runs["data.setting"]
    )
    cells = summarize(runs, keep=["model", "setting"])
    _check_places(data.name, runs, cells)
    by_cell = runs.groupby("cell")
    entropy = by_cell["metrics.dispatch_entropy"]
    cells["entropy_mean"], cells["entropy_std"] = cells["cell"].map(entropy.mean()), cells["cell"].map(entropy.std())
    cells["ga_worst"] = cells["cell"].map(by_cell["metrics.ga"].min())
    published = _published(reference("chen2022_synthetic", data.results_dir))
    cells = cells.sort_values(["num_leaves", "training_width", "model", "setting"], kind="stable", ignore_index=True)
    # The models of the paper first, with theirs that are not among ours.
    theirs = list(dict.fromkeys(published["model"]))
    models = theirs + [model for model in dict.fromkeys(cells["model"]) if model not in theirs]
    ceilings = {"model": "cluster known", "source": "best possible"} | _ceilings(data)
    accuracy = _beside(cells, published, models, _accuracy, lambda row: _with_spread(row["acc"], row["acc_std"]))
    tables = [
        Table(
            data.name,
            "Mixture of clusters: test accuracy in percent",
            pd.DataFrame([ceilings, *accuracy]),
            f"{_NOTE} Best possible: the sign of the row's projection on the feature of its cluster.",
            2,
        ),
        Table(
            f"{data.name}_entropy",
            "Mixture of clusters: dispatch entropy in nats",
            pd.DataFrame(
                _beside(
                    cells[cells["num_leaves"] > 1],
                    published[published["entropy"].notna()],
                    models,
                    lambda c: f"{number(c['entropy_mean'], 3)} ± {number(c['entropy_std'], 3)}",
                    lambda row: _with_spread(row["entropy"], row["entropy_std"], 3),
                )
            ),
            f"{_NOTE} Dispatch entropy: entropy of the cluster among the rows of an expert (leaf), mean over the rows:"
            " 0 where each knows one cluster, ln 4 = 1.386 where none specialises. Where two are chosen, both choices"
            " count. Theirs: training rows, with noise.",
            2,
        ),
        Table(
            f"{data.name}_runs",
            "Mixture of clusters: runs, worst seed, experts in use",
            pd.DataFrame(
                [
                    {"quantity": quantity, "model": model}
                    | {s: _or_missing(_of(cells, model, s), text) for s in SETTINGS}
                    for quantity, text in {
                        "runs (diverged, capped)": lambda c: f"{c['n']} ({c['diverged']}, {c['capped']})",
                        "worst seed, %": lambda c: number(100 * c["ga_worst"], 2),
                        "experts in use": lambda c: of(c["leaves_used"], c["num_leaves"]),
                        "size trained / used": lambda c: (
                            f"{integer(c['training_size'])} / {integer(c['inference_size'])}"
                        ),
                    }.items()
                    for model in dict.fromkeys(cells["model"])
                ]
            ),
            f"{_NOTE} Capped: ended by the limit of epochs. Size: hidden units and neurons of the router.",
            2,
        ),
    ]
    paper = published[published["source"] == "paper"]
    beside = [_of(paper, *place) for place in cells[["model", "setting"]].itertuples(index=False)]
    cells["paper_acc"] = [float("nan") if row is None else row["acc"] for row in beside]
    return Report(cells, tables, {"accuracy": _figure(runs, cells, published)})


def _model(row: dict[str, str]) -> str:
    """What a reader calls the layer of a run."""
    layer = row["layer._target_"].rpartition(".")[2]
    if layer == "PatchMoE":
        kind = _ACTIVATIONS[row["layer.act_layer"]]
        if row["layer.num_experts"] == "1":
            return f"single, {kind}, {2 * int(row['layer.channels'])} units"
        return f"mixture, {kind}, {row['layer.num_experts']} x {2 * int(row['layer.channels'])}"
    return layer_name(row)


def _published(values: pd.DataFrame) -> pd.DataFrame:
    """Columns model, source, setting, acc and entropy with their deviations: percent and nats."""
    names = ["model", "source", "setting", "acc", "acc_std", "entropy", "entropy_std"]
    rows = []
    for row in values[values["source"].isin(_SOURCES)].to_dict("records") if len(values) else []:
        kind, _, activation = row["model"].partition("_")
        size = row["neurons"].replace("x", " x ") if isinstance(row["neurons"], str) else ""
        words = "mixture" if kind == "moe" else "single"
        ending = size if kind == "moe" else f"{size} units" if size else "size not told"
        numbers = row["test_acc"], row["test_acc_std"], row["dispatch_entropy"], row["dispatch_entropy_std"]
        model = f"{words}, {_ACTIVATIONS[activation]}, {ending}"
        rows.append(dict(zip(names, (model, _SOURCES[row["source"]], str(row["setting"]), *numbers), strict=True)))
    return pd.DataFrame(rows, columns=names)


def _check_places(study: str, runs: pd.DataFrame, cells: pd.DataFrame) -> None:
    for (model, setting), group in cells.groupby(["model", "setting"], sort=False):
        if len(group) > 1:
            ids = {f"cell {cell}": runs["run_id"][runs["cell"] == cell] for cell in group["cell"]}
            raise refusal(study, f"{len(group)} configurations for one place of the table ({model}, {setting})", ids)


def _ceilings(data: StudyData) -> dict[str, str]:
    """Mean of Phi(sqrt(50) alpha / sigma) over alpha, from the settings as the reference file states them."""
    found = {}
    values = reference("chen2022_synthetic", data.results_dir)
    for row in values[values["setting"].isin(SETTINGS)].to_dict("records") if len(values) else []:
        low, high = map(float, re.search(r"alpha~U\(([\d.]+),([\d.]+)\)", row["coefficients"]).groups())
        alpha = np.linspace(low, high, 1001)
        share = np.mean([(1 + erf(sqrt(50 / 2) * a / row["sigma"])) / 2 for a in alpha])
        found.setdefault(str(row["setting"]), number(100 * share, 2))
    return {setting: found.get(setting, MISSING) for setting in SETTINGS}


def _of(frame: pd.DataFrame, model: str, setting: str) -> dict | None:
    rows = frame[(frame["model"] == model) & (frame["setting"] == setting)]
    return rows.iloc[0].to_dict() if len(rows) else None


def _or_missing(row: dict | None, text: Callable[[dict], str]) -> str:
    return MISSING if row is None else text(row)


def _accuracy(cell: dict) -> str:
    return _with_spread(100 * cell["ga_mean"], 100 * cell["ga_std"])


def _with_spread(mean: float, std: float, decimals: int = 2) -> str:
    return number(mean, decimals) if np.isnan(std) else f"{number(mean, decimals)} ± {number(std, decimals)}"


def _beside(
    cells: pd.DataFrame,
    published: pd.DataFrame,
    models: list[str],
    our_text: Callable[[dict], str],
    their_text: Callable[[dict], str],
) -> list[dict[str, str]]:
    """For each model a line of each source that knows it."""
    lines = []
    for model in models:
        for source in dict.fromkeys(_SOURCES.values()):
            theirs = published[(published["model"] == model) & (published["source"] == source)]
            if len(theirs):
                values = {s: _or_missing(_of(theirs, model, s), their_text) for s in SETTINGS}
                lines.append({"model": model, "source": source} | values)
        if model in set(cells["model"]):
            values = {s: _or_missing(_of(cells, model, s), our_text) for s in SETTINGS}
            lines.append({"model": model, "source": "ours"} | values)
    return lines


def _figure(runs: pd.DataFrame, cells: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Test error of each model, logarithmic, a panel for each setting: pale dots are seeds, hollow marks published."""
    models = list(dict.fromkeys(cells["model"]))[::-1]
    figure = Figure(figsize=(11.0, 1.2 + 0.24 * len(models)), layout="constrained")
    panels = figure.subplots(1, len(SETTINGS), sharey=True, sharex=True)
    places = {"seeds": (runs, "metrics.ga", 100), "mean": (cells, "ga_mean", 100), "published": (published, "acc", 1)}
    looks = {
        "seeds": {"color": figures.PALETTE[5], "marker": "o", "markersize": 3},
        "mean": {"color": figures.PALETTE[0], "marker": "o", "markersize": 5},
        "published": {"color": figures.PALETTE[1], "marker": "D", "markersize": 6, "markerfacecolor": "none"},
    }
    for panel, setting in zip(panels, SETTINGS, strict=True):
        for name, (frame, column, scale) in places.items():
            points = frame[(frame["setting"] == setting) & frame["model"].isin(models)]
            error = 100 - scale * points[column]
            panel.plot(error, [models.index(m) for m in points["model"]], linestyle="", label=name, **looks[name])
        panel.set(title=f"setting {setting}", xlabel="test error in %", xscale="log")
        panel.grid(axis="both", color="#dddddd", linewidth=0.6)
    panels[0].set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    panels[0].set_yticks(range(len(models)), models)
    figures.legend_below(figure, panels)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # long names are wider in a bitmap than in the layout
    return figure
