"""Random training labels over another set."""

from __future__ import annotations

import pytest
import torch

from fff.data import ImageData, RandomLabels


@pytest.fixture(scope="module")
def digits(cache_dir):
    return ImageData("digits", cache_dir=cache_dir, batch_size=100, seed=4, split_seed=2, normalize="unit")


def test_share_of_changed_labels(digits):
    """A tenth of the random classes are the true ones; three standard deviations of 1442 draws."""
    true = digits.rows.train_y
    for fraction in (0.3, 1.0):
        changed = float((RandomLabels(digits, fraction).rows.train_y != true).double().mean())
        expected = 0.9 * fraction
        assert changed == pytest.approx(expected, abs=3 * (expected * (1 - expected) / len(true)) ** 0.5)


def test_random_classes_are_uniform(digits):
    counts = torch.bincount(RandomLabels(digits, 1.0).rows.train_y, minlength=10)
    assert float(((counts - 144.2) ** 2 / 144.2).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_fraction_zero_and_test_labels_stay(digits):
    assert torch.equal(RandomLabels(digits, 0.0).rows.train_y, digits.rows.train_y)
    assert torch.equal(RandomLabels(digits, 1.0).rows.test_y, digits.rows.test_y)


def test_wrapped_set_is_not_changed(digits):
    before = digits.rows.train_y.clone()
    RandomLabels(digits, 1.0).setup()
    assert torch.equal(digits.rows.train_y, before)


def test_corrupted_rows_are_nested_in_the_fraction(digits):
    true = digits.rows.train_y
    few, many = (RandomLabels(digits, fraction).rows.train_y for fraction in (0.2, 0.6))
    assert torch.equal(few[few != true], many[few != true])


def test_label_seed(digits):
    one, same, other = (RandomLabels(digits, 1.0, label_seed=seed).rows.train_y for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_all_else_is_that_of_the_wrapped_set(digits):
    data = RandomLabels(digits, 1.0)
    assert data.in_shape == digits.in_shape and data.class_names == digits.class_names
    assert torch.equal(data.val_rows, digits.val_rows)
    for (x, y), (wrapped_x, wrapped_y) in zip(data.train_dataloader(), digits.train_dataloader(), strict=True):
        assert torch.equal(x, wrapped_x) and len(y) == len(wrapped_y)
    # Validation rows belong to the training split: their labels are random too.
    val_y = torch.cat([y for _, y in data.val_dataloader()])
    assert float((val_y == digits.rows.train_y[digits.val_rows]).double().mean()) < 0.3


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_bad_fraction(digits, fraction):
    with pytest.raises(ValueError, match=f"fraction must lie in .0, 1., got {fraction}"):
        RandomLabels(digits, fraction)


def test_a_part_of_the_rows(digits):
    every = RandomLabels(digits, 0.5)
    few, many = (RandomLabels(digits, 0.5, num_rows=count) for count in (200, 500))
    assert len(few.rows.train_y) == 200 and len(few.train_rows) == 180 and len(few.val_rows) == 20
    pairs = [set(zip(_names(data), data.rows.train_y.tolist(), strict=True)) for data in (few, many, every)]
    assert pairs[0] < pairs[1] < pairs[2], "fewer rows are among more, and labelled as there"
    assert torch.equal(few.rows.test_x, digits.rows.test_x)
    assert len({data.content_digest for data in (every, few, many)}) == 3
    assert RandomLabels(digits, 0.5, num_rows=200, label_seed=1).content_digest != few.content_digest


def _names(data):
    return [row.numpy().tobytes() for row in data.rows.train_x]


def test_bad_num_rows(digits):
    with pytest.raises(ValueError, match="num_rows must be None or at least 1, got 0"):
        RandomLabels(digits, num_rows=0)
    with pytest.raises(ValueError, match="num_rows=1443, but the training split has 1442 rows"):
        RandomLabels(digits, num_rows=1443).setup()
