"""The cluster task: the generator's definition, and the accuracies that follow from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fff.data import ClusterData
from fff.data.clusters import SETTINGS, generate


@pytest.fixture(scope="module")
def first():
    data = ClusterData(1)
    data.setup()
    return data


def test_shapes_and_counts(first):
    assert first.in_shape == (50,) and first.num_classes == 2
    assert (len(first.train_rows), len(first.val_rows), len(first.rows.test_y)) == (14_400, 1600, 16_000)
    assert first.rows.train_x.dtype == torch.float32
    assert ClusterData(1, features="flat").in_shape == (200,)
    assert ClusterData(1, features="patches").in_shape == (4, 50)


def test_the_three_forms_hold_the_same_rows(first):
    patches = ClusterData(1, features="patches").rows.test_x
    torch.testing.assert_close(ClusterData(1, features="flat").rows.test_x, patches.reshape(-1, 200), rtol=0, atol=0)
    torch.testing.assert_close(first.rows.test_x, patches.sum(1))


def test_clusters_follow_the_loaders(first):
    assert len(first.train_cluster) == 14_400 and len(first.val_cluster) == 1600 and len(first.test_cluster) == 16_000
    for name, rows in (("train", 14_400), ("val", 1600), ("test", 16_000)):
        assert len(getattr(ClusterData(1), f"{name}_cluster")) == rows  # before any set-up
    patches, _, cluster = generate(SETTINGS[1], 32_000, SETTINGS[1].seed)
    assert torch.equal(first.train_cluster, cluster[:16_000][first.train_rows])
    ((x, _), *_) = first.val_dataloader()
    torch.testing.assert_close(x, patches.sum(1)[first.val_rows][: len(x)])


@pytest.mark.parametrize("setting", SETTINGS)
def test_patches_are_as_defined(setting):
    """With the noise patch taken away, three orthogonal patches remain whose lengths lie in the stated ranges."""
    values = SETTINGS[setting]
    patches, label, cluster = (t.numpy() for t in generate(values._replace(sigma=0), 4000, 5))
    patches = patches / 10
    length = np.linalg.norm(patches, axis=2)
    place = np.argsort(length, axis=1)
    assert np.allclose(np.take_along_axis(length, place[:, :1], 1), 0, atol=1e-6)
    # The random order: each kind of patch lies in each place equally often.
    assert np.bincount(place[:, 0], minlength=4) / 4000 == pytest.approx([0.25] * 4, abs=0.03)

    # Mean of y x over a cluster's patch sums is E[alpha] v_k, and of x is E[beta] c_k: what does not belong cancels.
    total, sign = patches.sum(1), 2 * label - 1
    feature = np.stack([(sign[:, None] * total)[cluster == k].mean(0) for k in range(4)])
    centre = np.stack([total[cluster == k].mean(0) for k in range(4)])
    basis = np.concatenate([feature, centre])
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    assert basis @ basis.T == pytest.approx(np.eye(8), abs=0.15)

    # Exactly, by projecting on the directions: beta and alpha of each row, sign of alpha from the label.
    clean, _ = np.linalg.qr(patches.reshape(-1, 50)[:2000].T @ patches.reshape(-1, 50)[:2000])
    clean = clean[:, :8]
    assert np.allclose(patches @ clean @ clean.T, patches, atol=1e-4)  # eight directions and no more
    for bounds, direction in ((values.alpha, feature), (values.beta, centre)):
        direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        along = np.abs((patches * direction[cluster][:, None]).sum(2)).max(1)
        assert along.mean() == pytest.approx(sum(bounds) / 2, abs=0.05)


def test_labels_clusters_and_noise_are_balanced(first):
    label = torch.cat([first.rows.train_y, first.rows.test_y])
    assert float(label.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert (torch.bincount(first.test_cluster) / 16_000).tolist() == pytest.approx([0.25] * 4, abs=0.015)
    # E|x|^2 / 100 = E[alpha^2] + E[beta^2] + E[gamma^2] + sigma^2: 1.75 + 7/3 + 43/12 + 1 for the ranges of setting 1
    square = float(first.rows.test_x.double().square().sum(1).mean()) / 100
    assert square == pytest.approx(1.75 + 7 / 3 + 43 / 12 + 1, abs=0.05)


def linear_hits(x, y, train, test):
    """Which of the test rows a least-squares classifier fitted to the training rows gets right."""
    x = torch.nn.functional.pad(x, (0, 1), value=1).to(torch.float64)
    weight = torch.linalg.lstsq(x[train], 2.0 * y[train, None].double() - 1).solution
    return (x[test] @ weight > 0).flatten() == (y[test] == 1)


@pytest.mark.parametrize(("setting", "single"), [(1, 65.4), (2, 66.0), (3, 74.9), (4, 74.8)])
def test_a_linear_model_fails_and_an_oracle_of_clusters_does_not(setting, single):
    """single: logistic regression on patch sums of an independent re-generation with three other seeds."""
    data = ClusterData(setting)
    x, y = torch.cat([data.rows.train_x, data.rows.test_x]), torch.cat([data.rows.train_y, data.rows.test_y])
    cluster = generate(SETTINGS[setting], 32_000, SETTINGS[setting].seed)[2]
    row = torch.arange(32_000)
    alone = linear_hits(x, y, row < 16_000, row >= 16_000)
    assert 100 * float(alone.double().mean()) == pytest.approx(single, abs=1.5)
    experts = [linear_hits(x, y, (row < 16_000) & (cluster == k), (row >= 16_000) & (cluster == k)) for k in range(4)]
    # With the cluster known, x . v_k = alpha y + noise of deviation sigma / sqrt(50) is all there is to know.
    alpha = torch.linspace(*SETTINGS[setting].alpha, 10_000)
    best = torch.special.ndtr(alpha * 50**0.5 / SETTINGS[setting].sigma).mean()
    assert 100 * float(torch.cat(experts).double().mean()) == pytest.approx(100 * float(best), abs=0.15)


def test_seeds(first):
    assert torch.equal(ClusterData(1, seed=3).rows.train_x, first.rows.train_x)
    assert not torch.equal(ClusterData(1, data_seed=3).rows.train_x, first.rows.train_x)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"setting": 5}, "setting must be one of 1, 2, 3, 4, verify, got 5"), ({"features": "sum"}, "features .*'sum'")],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        ClusterData(**keywords)


def test_digest_is_the_same_on_machines_that_round_differently(monkeypatch):
    expected = ClusterData(1).content_digest
    assert ClusterData(2).content_digest != expected and ClusterData(1, data_seed=5).content_digest != expected
    qr = np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda matrix: (qr(matrix)[0] * (1 + 1e-7), None))
    assert ClusterData(1).content_digest == expected
