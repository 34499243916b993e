"""The mixture-of-clusters task of Chen et al. 2022, "Towards Understanding Mixture of Experts in Deep Learning".

T rows, P = 4 patches of D = 50 numbers each, K = 4 clusters.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fff.data.digest import content_digest
from fff.data.module import InMemoryData, Rows

NUM_PATCHES, NUM_CLUSTERS, PATCH_WIDTH = 4, 4, 50
NUM_TRAIN = NUM_TEST = 16_000
SettingName = Literal[1, 2, 3, 4, "verify"]
Features = Literal["patch_sum", "flat", "patches"]


class Setting(NamedTuple):
    """Ranges of the uniform factors of feature (alpha), centre (beta) and feature noise (gamma); sigma of the noise."""

    alpha: tuple[float, float]
    beta: tuple[float, float]
    gamma: tuple[float, float]
    sigma: float
    seed: int


SETTINGS: dict[SettingName, Setting] = {
    1: Setting((0.5, 2), (1, 2), (0.5, 3), 1, 12),
    2: Setting((0.5, 2), (1, 2), (0.5, 3), 2, 11),
    3: Setting((0.5, 2), (1, 2), (0.5, 2), 1, 11),
    4: Setting((0.5, 2), (1, 2), (0.5, 2), 2, 11),
    "verify": Setting((1, 2), (1, 2), (1, 2), 1, 11),
}


class ClusterData(InMemoryData):
    """Binary labels whose sign can be read only by an expert that knows the row's cluster.

    A row holds, in random order, the patches  y alpha v_k,  beta c_k,  eps gamma v_k'  and noise N(0, sigma^2 / D I),
    all times 10, where v_1..4 and c_1..4 are orthonormal, y and eps are random signs, k is the cluster and k' another
    one. 16 000 training rows (validation rows included) and 16 000 test rows. The random numbers are
    drawn by numpy's own generator from the seeds that the authors used, so the rows are not bit for bit theirs.

    setting: 1 to 4 of the paper, or "verify" of the authors' code, where alpha, beta and gamma are alike.
    features: "flat" (200,); "patches" (4, 50); "patch_sum" (50,), which undoes the random order and is what a router
        that scores each patch and sums the scores sees.
    data_seed: of the generator; None means the seed of the setting.
    """

    def __init__(
        self,
        setting: SettingName = 1,
        batch_size: int = 256,
        *,
        features: Features = "patch_sum",
        data_seed: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = False,
        eval_batch_size: int = 2048,
    ) -> None:
        super().__init__(
            batch_size, seed=seed, split_seed=split_seed, drop_last=drop_last, eval_batch_size=eval_batch_size
        )
        if setting not in SETTINGS:
            raise ValueError(f"setting must be one of {', '.join(map(str, SETTINGS))}, got {setting!r}")
        if features not in get_args(Features):
            raise ValueError(f"features must be one of {', '.join(get_args(Features))}, got {features!r}")
        self.setting, self.features, self.data_seed = setting, features, data_seed
        self._cluster = torch.empty(0, dtype=torch.int64)

    def load(self) -> Rows:
        setting = SETTINGS[self.setting]
        seed = setting.seed if self.data_seed is None else self.data_seed
        patches, y, self._cluster = generate(setting, NUM_TRAIN + NUM_TEST, seed)
        if self.features == "patch_sum":
            x = patches.sum(1)
        else:
            x = patches.flatten(1) if self.features == "flat" else patches
        return Rows(
            *(x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:]),
            class_names=["-1", "+1"],
            # The drawn integers stand for the rows, whose last bits depend on the machine's linear algebra.
            digest=content_digest((y, self._cluster)),
        )

    @property
    def train_cluster(self) -> Tensor:
        """Cluster 0..3 of each row of `train_eval_dataloader`, in its order; the other two likewise."""
        self.setup()
        return self._cluster[self.train_rows]

    @property
    def val_cluster(self) -> Tensor:
        self.setup()
        return self._cluster[self.val_rows]

    @property
    def test_cluster(self) -> Tensor:
        self.setup()
        return self._cluster[NUM_TRAIN:]


def generate(setting: Setting, num_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (T, P, D) float32, labels 0/1 (T,), clusters (T,)."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((PATCH_WIDTH, 2 * NUM_CLUSTERS)))
    feature, centre = basis.T[:NUM_CLUSTERS], basis.T[NUM_CLUSTERS:]

    label = rng.integers(0, 2, num_rows)
    cluster = rng.integers(0, NUM_CLUSTERS, num_rows)
    other = (cluster + rng.integers(1, NUM_CLUSTERS, num_rows)) % NUM_CLUSTERS
    sign = 2 * rng.integers(0, 2, num_rows) - 1
    alpha, beta, gamma = (rng.uniform(*bounds, num_rows) for bounds in setting[:3])
    patches = np.stack(
        [
            ((2 * label - 1) * alpha)[:, None] * feature[cluster],
            beta[:, None] * centre[cluster],
            (sign * gamma)[:, None] * feature[other],
            rng.normal(0, setting.sigma / np.sqrt(PATCH_WIDTH), (num_rows, PATCH_WIDTH)),
        ],
        axis=1,
    )
    order = rng.permuted(np.tile(np.arange(NUM_PATCHES), (num_rows, 1)), axis=1)
    patches = 10 * np.take_along_axis(patches, order[:, :, None], axis=1)
    return torch.from_numpy(patches).to(torch.float32), torch.from_numpy(label), torch.from_numpy(cluster)
