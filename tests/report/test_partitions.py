"""Measures of a partition, worked by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from fff.report.partitions import ari_within, chance_nmi, effective_number, entropy, gini, purity


def test_evenness_of_even_and_of_collapsed_use():
    assert effective_number(np.array([3, 0, 1, 2])) == pytest.approx(4)
    assert effective_number(np.array([2, 2, 2])) == pytest.approx(1)
    assert gini(np.array([5, 5, 5, 5])) == 0
    assert gini(np.array([0, 20, 0, 0])) == pytest.approx(3 / 4)


def test_evenness_between_the_two():
    # Half of the rows in one leaf, a quarter in each of two others: 3/2 ln 2.
    leaf = np.array([7, 7, 1, 0])
    assert entropy(leaf) == pytest.approx(1.5 * math.log(2))
    assert effective_number(leaf) == pytest.approx(2**1.5)
    # |differences| of (0, 1, 3): 1 + 3 + 2, each twice over 9 pairs, mean 4/3, over twice the mean 4/3.
    assert gini(np.array([0, 1, 3])) == pytest.approx((2 * 6 / 9) / (2 * 4 / 3))


def test_purity_counts_the_commonest_class_of_each_leaf():
    #          leaf 0: classes 1 1 2   leaf 5: classes 2 0
    assert purity(np.array([0, 0, 0, 5, 5]), np.array([1, 1, 2, 2, 0])) == pytest.approx(3 / 5)
    assert purity(np.zeros(4), np.array([1, 1, 1, 0])) == pytest.approx(3 / 4)
    assert purity(np.arange(4), np.array([1, 1, 1, 0])) == 1


def test_chance_of_two_pairs_worked_by_hand():
    """Two parts of two rows each: of the 6 ways to place the second, 2 agree (NMI 1), 4 are independent (NMI 0)."""
    assert chance_nmi(np.array([0, 0, 1, 1]), np.array([4, 9, 9, 4])) == pytest.approx(1 / 3)


def test_chance_is_the_mean_over_shuffles():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, 60), generator.integers(0, 3, 60)
    shuffled = [normalized_mutual_info_score(first, generator.permutation(second)) for _ in range(2000)]
    deviation = np.std(shuffled) / math.sqrt(len(shuffled))
    assert chance_nmi(first, second) == pytest.approx(np.mean(shuffled), abs=4 * deviation)


def test_chance_of_partitions_that_part_nothing_is_their_score():
    one, two = np.zeros(4), np.array([0, 0, 1, 1])
    assert chance_nmi(one, one) == normalized_mutual_info_score(one, one) == 1
    assert chance_nmi(one, two) == normalized_mutual_info_score(one, two) == 0


def test_agreement_within_classes_does_not_count_what_the_class_explains():
    label = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    #                 parted by class, then alike among class 0 and across each other among class 1
    first = np.array([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    second = np.array([5, 5, 4, 4, 6, 6, 7, 7, 6, 6, 7, 7])
    # Class 1: of the 28 pairs of rows each partition joins 12 and both 4; 12 * 12 / 28 = 36 / 7 is expected, and
    # (4 - 36 / 7) / (12 - 36 / 7) = -1 / 6. Class 0 has 1.
    assert ari_within(first, second, label) == pytest.approx((4 * 1 + 8 * -1 / 6) / 12)
    assert ari_within(label, label, label) == 1, "no class is parted"
