"""How rows are parted among leaves (or experts): evenness, agreement with labels, agreement of two partitions.

T rows, E leaves. Leaves and labels are numbers without order. What scikit-learn has (mutual information, its normalised
form, adjusted Rand index) is taken from there.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information


def entropy(values: np.ndarray) -> float:
    """Of the values of the rows (T,), in nats."""
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log(share)).sum())


def effective_number(leaf: np.ndarray) -> float:
    """exp(entropy) of the leaves of the rows (T,): E where all E are used alike, 1 where one takes every row."""
    return float(np.exp(entropy(leaf)))


def gini(load: np.ndarray) -> float:
    """Gini coefficient of the rows per leaf, (E,): mean absolute difference of two leaves over twice the mean.

    0 where all are used alike, 1 - 1 / E where one takes every row.
    """
    return float(np.abs(load[:, None] - load).mean() / (2 * load.mean()))


def purity(leaf: np.ndarray, label: np.ndarray) -> float:
    """Share of the rows (T,) whose label is the commonest of their leaf; at least the share of the commonest label."""
    return float(contingency_matrix(leaf, label).max(axis=1).sum() / len(leaf))


def chance_nmi(first: np.ndarray, second: np.ndarray) -> float:
    """Expected normalised mutual information of two partitions (T,) if the rows of one were shuffled.

    The normaliser is the mean of both entropies, as in scikit-learn's score; that is 1 for two partitions of one part.
    """
    size = (entropy(first) + entropy(second)) / 2
    if size == 0:
        return 1.0
    table = contingency_matrix(first, second, sparse=True)
    return float(expected_mutual_information(table, len(first)) / size)


def ari_within(first: np.ndarray, second: np.ndarray, label: np.ndarray) -> float:
    """Adjusted Rand index of two partitions (T,) among the rows of one class (T,), mean over the rows.

    What both have in common beyond the class; by chance 0, but 1 for a class that neither parts.
    """
    same = [label == value for value in np.unique(label)]
    return float(np.average([adjusted_rand_score(first[s], second[s]) for s in same], weights=[s.sum() for s in same]))
