"""What the benchmark suites found on a GPU, as tables."""

from __future__ import annotations

import pandas as pd

from fff.report.tables import MISSING, Table, known, number

# Ours, and the peers that its time is told over. Graphs are compared with our graph.
_GRAPH = "_graph"
_AS_GRAPHS = "the same, both as graphs"
_LAYER = {
    "dense": "dense, training width",
    "dense_graph": _AS_GRAPHS,
    "dense_leaf": "dense, one leaf",
    "moe_top_1": "flat MoE, top-1",
    "moe_top_2": "flat MoE, top-2",
    "grouped_mm": "grouped_mm",
    "fff_grouped": "ours in PyTorch",
}
_DISPATCH = {"grouped_mm": "grouped_mm", "grouped_mm_graph": _AS_GRAPHS, "grouped": "ours in PyTorch"}
_COMPILED = {"dense_compiled": "dense, training width", "dense_compiled_graph": _AS_GRAPHS}
_STEP = {
    "dense": "dense, training width",
    "dense_graph": _AS_GRAPHS,
    "moe_top_1": "flat MoE, top-1",
    "moe_top_2": "flat MoE, top-2",
    "grouped_mm_top_1": "grouped_mm, top-1",
    "grouped_mm_top_2": "grouped_mm, top-2",
    "fff_grouped": "ours in PyTorch",
}
_ROUTING = {"gate": "flat gate", "gate_graph": _AS_GRAPHS, "descend_pytorch": "descent in PyTorch"}

# Candidates that choose for themselves, without the prefix that they share with those that are told.
_BY_ITSELF = "triton", "fff", "descend"


def tables(rows: pd.DataFrame, ratios: pd.DataFrame) -> list[Table]:
    """Tables of the suites that ran on a GPU; none where none did."""
    made = []
    for name, title, suite, cases, size, ours, peers in (
        ("", "Hard evaluation", "inference", ("layer", "deep"), "depth", "fff", _LAYER),
        ("_compiled", "Hard evaluation, compiled,", "inference", "compiled", "depth", "fff_compiled", _COMPILED),
        ("_dispatch", "Rows to given experts", "inference", "dispatch", "num_experts", "triton", _DISPATCH),
        ("_routing", "Decisions", "inference", "routing", "depth", "descend", _ROUTING),
        ("_step", "Forward and backward", "training", "step", "depth", "fff", _STEP),
        ("_step_compiled", "The same, compiled,", "training", "compiled", "depth", "fff_compiled", _COMPILED),
    ):
        part = rows[(rows["suite"] == f"{suite}_cuda") & rows["case"].str.startswith(cases)]
        if not part.empty:
            made.append(_times(part, ratios, f"bench_gpu{name}", f"{title} on a GPU", size, ours, peers))
    training = rows[rows["suite"] == "training_cuda"]
    if not training.empty:
        note = (
            f"{machine(training)}. step, compiled: forward and backward for rows and parameters; block:"
            " x + layer(norm(x)), and a step of AdamW. MiB that a call holds at once beyond the weights, not counted of"
            f" graphs. {MISSING}: refused, for its outputs differed."
        )
        made.append(steps(training, "bench_gpu_training", "Training steps on a GPU", note))
    chosen = rows[rows["suite"] == "crossover_cuda"]
    for name, title, cases in (
        ("levels", "How many levels of a tree go by matmul", "levels"),
        ("single", "Choices one by one or in tiles", "single"),
        ("tiles", "Tiles of rows x columns, warps and stages", "tiles"),
    ):
        part = chosen[chosen["case"].str.startswith(cases)]
        if not part.empty:
            made.append(_choices(part, f"bench_gpu_{name}", f"{title}: microseconds on a GPU"))
    return made


def machine(rows: pd.DataFrame) -> str:
    """What the rows were measured on, and the ceilings that were measured there."""
    names = rows[["gpu", "torch"]].drop_duplicates()
    where = "; ".join(f"{row.gpu}, torch {row.torch}" for row in names.itertuples())
    if rows["bandwidth"].notna().any():
        copy, rate = rows["bandwidth"].median() / 1e12, rows["matmul_rate"].median() / 1e12
        where += f"; copies at {copy:.3g} TB/s, matrix products at {rate:.3g} TFLOP/s"
    kinds = sorted(rows["dtype"].dropna().unique())
    return f"{where}; {', '.join(kinds)}"


def _times(
    rows: pd.DataFrame, ratios: pd.DataFrame, name: str, title: str, size: str, ours: str, peers: dict[str, str]
) -> Table:
    sizes = rows[[size, "batch"]].astype(int).drop_duplicates().sort_values(["batch", size])
    points = pd.MultiIndex.from_frame(sizes)
    columns = [ours, ours + _GRAPH, *peers]

    def of(value: str) -> pd.DataFrame:
        """Absent where a candidate was refused or could not be had."""
        table = rows.astype({size: int, "batch": int}).pivot(index=[size, "batch"], columns="candidate", values=value)
        return table.reindex(index=points, columns=columns)

    times, share = of("median_s"), of("floor_share")
    over = {peer: times[peer] / times[ours + _GRAPH if peer.endswith(_GRAPH) else ours] for peer in peers}
    # Where samples of the same rounds were divided, that counts: a slow phase of the machine cancels.
    point = rows.drop_duplicates("case").astype({size: int, "batch": int}).set_index("case")[[size, "batch"]]
    same = ratios["suite"].isin(set(rows["suite"])) & ratios["case"].isin(point.index) & (ratios["quantity"] == "time")
    for ratio in ratios[same & ratios["median"].notna()].itertuples():
        if ratio.of in over and ratio.over == (ours + _GRAPH if ratio.of.endswith(_GRAPH) else ours):
            over[ratio.of].loc[tuple(point.loc[ratio.case])] = ratio.median
    frame = pd.DataFrame(
        {
            {"num_experts": "experts"}.get(size, size): [str(point[0]) for point in points],
            "batch": [str(point[1]) for point in points],
            "ours, us": [known(1e6 * value) for value in times[ours]],
            "as a graph, us": [known(1e6 * value) for value in times[ours + _GRAPH]],
            "graph, of the floor": [known(100 * value, " %") for value in share[ours + _GRAPH]],
            **{label: [known(value, "x") for value in over[peer]] for peer, label in peers.items()},
        }
    )
    note = (
        f"{machine(rows)}. How many times longer each other takes than ours; where a target asks for it, the median"
        " over the rounds in which both ran. A graph is replayed without the launches that the host makes between"
        " kernels. What computes the same function, and flat MoEs, gave the outputs of float64 on the same routes"
        " before they were timed. Floor: counted bytes at the speed of a copy or counted operations at that of matrix"
        f" products; what lies in a cache can be faster. {MISSING}: refused, or not to be had."
    )
    return Table(name, title, frame, note, text_columns=2)


def steps(rows: pd.DataFrame, name: str, title: str, note: str) -> Table:
    frame = pd.DataFrame(
        {
            "case": rows["case"],
            "candidate": rows["candidate"],
            "depth": rows["depth"].astype(int).map(str),
            "batch": rows["batch"].astype(int).map(str),
            "step, ms": [MISSING if pd.isna(value) else f"{1e3 * value:.3g}" for value in rows["median_s"]],
            "peak, MiB": [number(value / 2**20, 0) for value in rows["peak_bytes"]],
        }
    )
    return Table(name, title, frame, note, 2)


def _choices(rows: pd.DataFrame, name: str, title: str) -> Table:
    """Time of each way to run a kernel, by case; first of what a call chooses by itself. The longer list goes down."""
    ways = rows["candidate"].str.removesuffix(_GRAPH).str.rpartition("_")[2]
    ways = ways.where(~ways.isin(_BY_ITSELF), "by itself")
    cells = (
        rows["median_s"].map(lambda value: known(1e6 * value)).where(rows["agrees"].astype(str) != "False", "refused")
    )
    made = pd.DataFrame({"case": rows["case"], "way": ways, "cell": cells})
    frame = made.pivot(index="case", columns="way", values="cell").fillna(MISSING)
    frame = frame.reindex(index=dict.fromkeys(made["case"]), columns=dict.fromkeys(made["way"]))
    if len(frame.columns) > len(frame):
        frame = frame.T
    frame = frame.rename_axis(index="", columns=None).reset_index()
    note = (
        f"{machine(rows)}. Graphs, so that the launches of the host do not count. refused: its outputs differed."
        f" {MISSING}: not run."
    )
    return Table(name, title, frame, note, text_columns=1)
