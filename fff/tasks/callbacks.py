"""Callbacks of any task: schedules of layer attributes, and random state that survives a resume."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from fff.layers.contract import RoutedLayer


class LayerSchedule(Callback):
    """Sets `attribute` on every routed layer that has it, at the start of each epoch.

    points: (epoch, value) pairs with rising epochs, counted from 0; linear in between, constant outside.
        A ramp is [[0, 0.0], [20, 3.0]], a late start [[10, 0.0], [30, 3.0]], annealing [[0, 0.1], [50, 0.0]].
    Raises ValueError when training starts and no layer has the attribute, or a layer's constructor refuses a value.
    """

    def __init__(self, attribute: str, points: Sequence[Sequence[float]]) -> None:
        if not points or any(len(point) != 2 for point in points):
            raise ValueError(f"points={points} of the schedule of {attribute!r} must be [[epoch, value], ...]")
        self.attribute = attribute
        self.epochs = [float(epoch) for epoch, _ in points]
        self.values = [float(value) for _, value in points]
        if any(later <= earlier for earlier, later in zip(self.epochs, self.epochs[1:], strict=False)):
            raise ValueError(f"points={points} of the schedule of {attribute!r} must have rising epochs")

    def value(self, epoch: float) -> float:
        return float(np.interp(epoch, self.epochs, self.values))

    def apply(self, model: nn.Module, epoch: float) -> None:
        layers = [m for m in model.modules() if isinstance(m, RoutedLayer) and hasattr(m, self.attribute)]
        if not layers:
            raise ValueError(f"schedule of {self.attribute!r}: no routed layer of the model has this attribute")
        for layer in layers:
            setattr(layer, self.attribute, self.value(epoch))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run resumed in the middle of an epoch does not start that epoch again.
        self.apply(pl_module, trainer.current_epoch)
        self._check(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.apply(pl_module, trainer.current_epoch)

    def _check(self, model: nn.Module) -> None:
        """Values between two that a layer takes are taken too. Draws no numbers."""
        layers = [m for m in model.modules() if isinstance(m, RoutedLayer) and self.attribute in m.arguments()]
        for layer, value in itertools.product(layers, dict.fromkeys(self.values)):
            try:
                with torch.device("meta"), torch.random.fork_rng(devices=[]):
                    type(layer)(**layer.arguments() | {self.attribute: value})
            except ValueError as error:
                raise ValueError(f"schedule of {self.attribute!r}: {error}") from None


class RandomState(Callback):
    """Keeps the global generators of torch, CUDA, NumPy and Python in the checkpoint.

    With it a run that was cut at the end of an epoch and resumed draws the numbers of an unbroken one. The order of
    the training rows is not its business: the loader derives that from the seed and the epoch.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        name, keys, position, has_gauss, cached_gauss = np.random.get_state()
        # Plain containers and tensors, so that the checkpoint loads with weights_only=True.
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "numpy": (name, keys.tolist(), position, has_gauss, cached_gauss),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: the set-up between loading and the first epoch may itself draw numbers.
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["torch"].cpu())
        for device, state in zip(range(torch.cuda.device_count()), self._restored["cuda"], strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)
        np.random.set_state(tuple(self._restored["numpy"]))
        version, internal, gauss = self._restored["python"]
        random.setstate((version, tuple(internal), gauss))
        self._restored = None
