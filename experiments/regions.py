"""Which part of the plane each leaf of a small tree takes, by two recipes: `python -m experiments.regions`.

Trains two trees of depth 3 on two moons and writes their record, results/runs/regions.npz, unless it is there;
`python -m experiments.tables regions` draws it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import Tensor
from torch.nn import functional as F

from fff import FFF, aux_loss, node_tracing
from fff.report.records import write

from .provenance import git_commit, hardware, versions

GRID = 240
BATCH = 256
LEAF_WIDTH, DEPTH = 4, 3


class Recipe(NamedTuple):
    title: str
    layer: dict[str, Any]
    optimizer: str
    lr: float


RECIPES = (
    Recipe("paper's recipe: soft, hardening", {"mode": "soft", "hardening_weight": 3.0}, "SGD", 0.2),
    Recipe("ours: straight-through, balance", {"mode": "straight_through", "balance_weight": 0.1}, "AdamW", 0.01),
)


def train(recipe: Recipe, x: Tensor, y: Tensor, *, seed: int, epochs: int) -> FFF:
    torch.manual_seed(seed)
    layer = FFF(2, LEAF_WIDTH, 2, depth=DEPTH, **recipe.layer)
    optimizer = getattr(torch.optim, recipe.optimizer)(layer.parameters(), lr=recipe.lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(layer(x[rows]), y[rows]) + aux_loss(layer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer.eval()


def grid_points(x: Tensor, y: Tensor) -> Tensor:
    """(H W, 2) points of the grid, row by row of y."""
    return torch.cartesian_prod(y, x).flip(-1)


@torch.no_grad()
def route(layer: FFF, x: Tensor) -> tuple[Tensor, Tensor]:
    """Leaf of the hard route and predicted class of each row; leaves the layer with the record of these rows."""
    with node_tracing(layer):
        label = layer(x).argmax(-1)
    return layer.record.index[:, 0], label


def configuration(recipe: Recipe, *, seed: int, epochs: int) -> dict[str, Any]:
    layer = {"_target_": "fff.FFF", "leaf_width": LEAF_WIDTH, "depth": DEPTH, **recipe.layer}
    optimizer = {"name": recipe.optimizer, "lr": recipe.lr}
    return {"title": recipe.title, "layer": layer, "optimizer": optimizer, "seed": seed, "epochs": epochs}


def holds(path: Path, wanted: list[dict[str, Any]]) -> bool:
    """Whether there is a whole record of these configurations."""
    try:
        with np.load(path, allow_pickle=False) as record:
            runs = json.loads(record["meta"].item())["runs"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    return [{key: run.get(key) for key in wanted[0]} for run in runs] == wanted


def measure(layer: FFF, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]) -> dict[str, Any]:
    accuracy = {}
    for name, (x, y) in (("train", train_set), ("test", test_set)):
        leaf, label = route(layer, x)
        accuracy[f"{name}_accuracy"] = (label == y).double().mean().item()
    load = torch.bincount(leaf, minlength=layer.num_leaves)
    entropy = layer.record.node_entropy
    return {
        **accuracy,
        "num_leaves": layer.num_leaves,
        "leaves_used": int((load > 0).sum()),
        "largest_leaf_share": load.max().item() / len(leaf),
        "leaf_load": load.tolist(),
        "node_entropy": entropy.mean().item(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="experiments.regions", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--force", action="store_true", help="train again although the record is there")
    options = parser.parse_args(arguments)
    path = options.results_dir / "runs" / "regions.npz"
    wanted = [configuration(recipe, seed=options.seed, epochs=options.epochs) for recipe in RECIPES]
    if not options.force and holds(path, wanted):
        print(f"{path}  (finished before; --force trains again)")
        return 0
    torch.set_num_threads(1)

    sets = []
    for rows, seed in ((600, options.seed), (2000, options.seed + 1)):
        points, classes = make_moons(rows, noise=0.15, random_state=seed)
        sets.append((torch.from_numpy(points).float(), torch.from_numpy(classes).long()))
    (x, y), _ = sets
    low, high = x.min(0).values - 0.4, x.max(0).values + 0.4
    axes = [torch.linspace(low[i], high[i], GRID) for i in range(2)]
    grid = grid_points(*axes)

    runs, leaves, labels = [], [], []
    for recipe, chosen in zip(RECIPES, wanted, strict=True):
        layer = train(recipe, x, y, seed=options.seed, epochs=options.epochs)
        run = {**chosen, **measure(layer, *sets)}
        leaf, label = (values.view(GRID, GRID).numpy().astype(np.uint8) for values in route(layer, grid))
        runs.append(run)
        leaves.append(leaf)
        labels.append(label)
        print(f"{recipe.title}: {run['leaves_used']} of {run['num_leaves']} leaves, test {run['test_accuracy']:.3f}")

    meta = {"runs": runs, "git_commit": git_commit(), "versions": versions(), "hardware": hardware()}
    record = io.BytesIO()
    np.savez_compressed(
        record,
        meta=json.dumps(meta, sort_keys=True),
        x=axes[0].numpy(),
        y=axes[1].numpy(),
        leaf=np.stack(leaves),
        label=np.stack(labels),
        points=x.numpy(),
        classes=y.numpy().astype(np.uint8),
    )
    write(path, record.getvalue())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
