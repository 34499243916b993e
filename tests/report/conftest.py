"""Synthetic run directories."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fff.report import records

SGD = {"_target_": "torch.optim.SGD", "lr": 0.2}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.001}


@pytest.fixture
def runs_dir(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def results_dir(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def update(runs_dir, results_dir):
    """Bring the CSV files of a study up to date; returns the problems."""

    def write_files(study):
        files, problems = records.update(study, runs_dir, results_dir)
        for path, content in files.items():
            records.write(path, content)
        return problems

    return write_files


@pytest.fixture
def write_run(runs_dir):
    """Write the record of one run: a dense layer of `width`, or with `depth` a tree with leaves of `width`, or `layer`.

    routes: arrays by name, kept beside the record."""

    def write(
        study="study",
        *,
        width=8,
        depth=None,
        mode="soft",
        master_width=0,
        layer=None,
        model=None,
        optimizer=SGD,
        schedules=None,
        data="usps",
        recipe=None,
        patience=None,
        stop_loss=None,
        seed=0,
        history=None,
        digest=None,
        routes=None,
        max_epochs=100,
        **metrics,
    ) -> Path:
        tree = depth is not None
        leaves = 2**depth if tree else 1
        layer = layer or (
            {
                "_target_": "fff.FFF",
                "leaf_width": width,
                "depth": depth,
                "mode": mode,
                "master_width": master_width,
                "balance_weight": 0.1,
                "hardening_weight": 3.0 if mode == "soft" else 0.0,
            }
            if tree
            else {"_target_": "fff.FeedForward", "hidden_features": width}
        )
        config = {
            "seed": seed,
            "layer": layer,
            "task": {
                "optimizer": optimizer,
                "schedules": schedules or {},
                "patience": patience,
                "stop_loss": stop_loss,
            },
            "data": {"name": data, "seed": seed, "split_seed": 0, "root": "/a/place"},
            "trainer": {"max_epochs": max_epochs},
        }
        if model:
            config["model"] = model
        config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        run_id = f"{'fff' if tree else 'feedforward'}-{data}-s{seed}-{config_hash[:10]}"
        metrics = {
            "ma": 0.9,
            "ma_epochs": 20,
            "ga": 0.8,
            "ga_epochs": 10,
            "ga_soft": 0.7 if tree else None,
            "diverged": False,
            "leaves_used": leaves,
            "num_leaves": leaves,
            "largest_leaf_share": 1 / leaves,
            "leaf_load": [10] * leaves,
            "node_entropy": 0.2 if tree else None,
            "parameters": 100 * leaves,
            "training_width": width * leaves + master_width,
            "inference_width": width + master_width,
            "training_size": width * leaves + leaves - 1,
            "inference_size": width + (depth or 0) + master_width,
            "flops_per_row": 1000,
            "epochs": 30,
        } | metrics
        record = {
            "schema": 1,
            "study": study,
            "run_id": run_id,
            "config": config,
            "config_hash": config_hash,
            "seed": seed,
            "status": "finished",
            "metrics": metrics,
            "history": history
            or {"epoch": [1, 2], "train_loss": [2.0, 1.0], "node_entropy": [0.6 if tree else None] * 2},
            "wall_time_s": 1.5,
            "hardware": {"cores": 2, "cpu": "a processor"},
            "versions": {"torch": "2"},
            "git_commit": "abc",
            "backend": "dense",
        }
        # The records of older runs have none.
        if digest:
            record["data_digest"] = digest
        if recipe:
            record["recipe"] = recipe
        path = runs_dir / study / run_id / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if routes is not None:
            record["routes"] = "routes.npz"
            np.savez_compressed(path.parent / "routes.npz", **routes)
        path.write_text(json.dumps(record))
        return path

    return write
