"""Which part of the plane each leaf of a small tree takes (`python -m experiments.regions`)."""

import io
import json

import numpy as np
import pandas as pd

from fff.report import figures
from fff.report.study import Report, StudyData
from fff.report.tables import Table, number, percent


def report(data: StudyData) -> Report:
    with np.load(io.BytesIO(data.archive), allow_pickle=False) as record:
        runs = json.loads(record["meta"].item())["runs"]
        arms = [
            figures.Regions(
                f"{run['title']}\n{run['leaves_used']} of {run['num_leaves']} leaves, "
                f"accuracy {percent(run['test_accuracy'])} %",
                record["leaf"][i],
                record["label"][i],
            )
            for i, run in enumerate(runs)
        ]
        num_leaves = max(run["num_leaves"] for run in runs)
        figure = figures.regions(arms, record["x"], record["y"], record["points"], record["classes"], num_leaves)
    frame = pd.DataFrame(
        {
            "recipe": [run["title"] for run in runs],
            "training accuracy": [percent(run["train_accuracy"]) for run in runs],
            "test accuracy": [percent(run["test_accuracy"]) for run in runs],
            "leaves in use": [f"{run['leaves_used']} / {run['num_leaves']}" for run in runs],
            "largest %": [percent(run["largest_leaf_share"]) for run in runs],
            "node entropy": [number(run["node_entropy"], 3) for run in runs],
            "seed": [str(run["seed"]) for run in runs],
        }
    )
    note = (
        "One run each: an example to look at, not a measurement. Leaves, share and entropy are those of the test rows,"
        " the entropy is the mean over all nodes and rows, in nats."
    )
    return Report(pd.json_normalize(runs), [Table(data.name, "Two moons, depth 3", frame, note)], {"map": figure})
