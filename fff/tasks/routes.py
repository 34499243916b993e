"""Where rows go: the hard route of each test row, and of each point of the plane in which the training rows vary most.

T test rows, D inputs, K chosen experts per row, H W points of a grid in the plane.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fff.layers.contract import routing
from fff.tasks.protocol import evaluate

GRID = 128
# Of the grid around the projected rows, as a share of their extent.
_MARGIN = 0.05
_BATCH = 2048

Batches = Iterable[tuple[Tensor, Tensor]]


class Plane(NamedTuple):
    """mean: (D,).  axes: (2, D), orthonormal.  share: (2,) of the variance, along each axis.  float64, on the CPU."""

    mean: Tensor
    axes: Tensor
    share: Tensor

    def project(self, x: Tensor) -> Tensor:
        """(T, ...) inputs -> (T, 2) coordinates."""
        return (x.flatten(1).cpu().double() - self.mean) @ self.axes.T

    def points(self, coordinates: Tensor) -> Tensor:
        """(T, 2) coordinates -> (T, D) inputs that lie in the plane."""
        return self.mean + coordinates @ self.axes


def principal_plane(batches: Batches) -> Plane:
    """The plane through the mean of all rows along their first two principal components, the first first.

    Each axis points to where its largest entry is positive, so that the same rows give the same plane.
    """
    rows, total, products = 0, 0.0, 0.0
    for x, _ in batches:
        x = x.flatten(1).cpu().double()
        rows, total, products = rows + len(x), total + x.sum(0), products + x.T @ x
    mean = total / rows
    variance, vectors = torch.linalg.eigh(products / rows - mean.outer(mean))
    axes = vectors.T[-2:].flip(0)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return Plane(mean, axes * largest.sign(), variance[-2:].flip(0) / variance.sum())


def measure_routes(model: nn.Module, train: Batches, test: Batches) -> dict[str, np.ndarray]:
    """Arrays by name, of a model with one routed layer that sees each row of the data once.

    index: (T, K) experts of each test row, in the router's order (best first, but for "soft" and "expert_choice"), -1
        where a row has none.  label: (T,).  points: (T, 2) test rows, projected to the plane of the training rows.
    x, y: (W,), (H,) coordinates of a grid around these points.  plane_index, plane_class: (H, W) first expert and
        predicted class of its points. They lie in the plane, which the rows do not: it is a cut through the inputs.
    plane_share: (2,) share of the training rows' variance along x and along y.
    """
    plane = principal_plane(train)
    index, _, label = _route(model, test)
    points = torch.cat([plane.project(x) for x, _ in test])

    low, high = points.amin(0), points.amax(0)
    margin = _MARGIN * (high - low)
    x, y = (torch.linspace(*ends, GRID, dtype=torch.float64) for ends in zip(low - margin, high + margin, strict=True))
    inputs = plane.points(torch.cartesian_prod(y, x).flip(-1))  # row by row of y
    inputs = inputs.float().view(-1, *next(iter(test))[0].shape[1:])
    plane_index, plane_class, _ = _route(model, [(part, torch.zeros(len(part))) for part in inputs.split(_BATCH)])
    return {
        "index": _small(index),
        "label": _small(label),
        "points": points.numpy().astype(np.float32),
        "x": x.numpy().astype(np.float32),
        "y": y.numpy().astype(np.float32),
        "plane_index": _small(plane_index[:, 0].view(GRID, GRID)),
        "plane_class": _small(plane_class.view(GRID, GRID)),
        "plane_share": plane.share.numpy(),
    }


def _route(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """(T, K) experts, (T,) predicted classes and (T,) labels, on the CPU."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(logits: Tensor, y: Tensor) -> None:
        ((_, record),) = routing(model)
        parts.append((record.index.cpu(), logits.argmax(-1).cpu(), y.cpu()))

    evaluate(model, batches, observe=keep)
    index, answer, label = zip(*parts, strict=True)
    return torch.cat(index), torch.cat(answer), torch.cat(label)


def _small(values: Tensor) -> np.ndarray:
    """As the smallest signed integers that hold them and -1."""
    return values.numpy().astype(np.min_scalar_type(-1 - int(values.max())))
