"""What every task does alike: add the layers' losses to its own, keep their means, and group the parameters."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from fff.layers.base import ExpertLayer
from fff.layers.contract import RoutedLayer, aux_loss, routing, update_biases
from fff.tasks.callbacks import LayerSchedule


class RoutedTask(LightningModule, ABC):
    """Trains `model` on (x, y) batches by the loss of the task plus the auxiliary losses of the model's layers.

    optimizer: named parameters -> Optimizer, for example `functools.partial(torch.optim.AdamW, lr=1e-3)`. `fused=True`
        is added where the optimiser and the parameters allow it and nothing else was asked for.
    router_lr_factor: times the learning rate, for the parameters that decide where rows go.
    deviation_decay: weight decay, in place of the optimiser's, of what experts have beside their base (`ExpertLayer`).
    schedules: attribute of the layers -> points of its `LayerSchedule`, a callback of the run.
    test: whether the test data are looked at when the run is measured; False for a search, which selects without them.
    keep_routes: whether the record of a run is to have `routes`, which are those of the test data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[..., Optimizer],
        router_lr_factor: float,
        deviation_decay: float | None,
        schedules: Mapping[str, Sequence[Sequence[float]]] | None,
        test: bool,
        keep_routes: bool,
    ) -> None:
        super().__init__()
        if not router_lr_factor > 0:
            raise ValueError(f"router_lr_factor={router_lr_factor!r} must be > 0")
        if deviation_decay is not None and not deviation_decay >= 0:
            raise ValueError(f"deviation_decay={deviation_decay!r} must be >= 0")
        if keep_routes and not test:
            raise ValueError("keep_routes=True keeps those of the test data, which test=False never looks at")
        self.model = model
        self.make_optimizer = optimizer
        self.router_lr_factor, self.deviation_decay = router_lr_factor, deviation_decay
        self.schedules = [LayerSchedule(attribute, points) for attribute, points in (schedules or {}).items()]
        self.test, self.keep_routes = test, keep_routes
        self._loss_sums: dict[str, Tensor | float] = {}
        self._rows = 0

    @abstractmethod
    def task_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the rows of the batch, (); runs the model once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        task_loss = self.task_loss(x, y)
        auxiliary = aux_loss(self.model)
        self._add("loss", task_loss, len(y))
        self._add("aux_loss", auxiliary, len(y))
        for _, record in routing(self.model):
            for name, value in record.losses.items():
                self._add(name, value, len(y))
        self._rows += len(y)
        return task_loss + auxiliary

    def _add(self, name: str, value: Tensor, rows: int) -> None:
        # Sums stay on the device: reading one in each step would wait for the accelerator, self.log costs 0.4 ms.
        # In half precision they would stand still, or overflow.
        wide = torch.promote_types(value.dtype, torch.float32)
        self._loss_sums[name] = value.detach().to(wide) * rows + self._loss_sums.get(name, 0.0)

    def pop_epoch_losses(self) -> dict[str, float]:
        """Mean over the rows since the last call: "loss" is the task's, "aux_loss" the weighted auxiliary sum, the rest
        each raw auxiliary loss summed over the layers."""
        losses = {name: float(total) / self._rows for name, total in self._loss_sums.items()}
        self._loss_sums, self._rows = {}, 0
        return losses

    def restore(self, epoch: int, weights: dict[str, Tensor]) -> None:
        """Give the model the weights that it had after an epoch, counted from 1, and what was scheduled for it: a
        temperature is no weight, but what was measured then depended on it."""
        self.model.load_state_dict(weights)
        for schedule in self.schedules:
            schedule.apply(self.model, epoch - 1)

    def build_optimizer(self) -> Optimizer:
        optimizer = self.make_optimizer(self._optimized(), **self._fused())
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.pop("lr_factor", 1.0)  # not in place: groups may share a tensor
        if self.deviation_decay is not None and "weight_decay" not in optimizer.defaults:
            name = type(optimizer).__name__
            raise ValueError(f"deviation_decay={self.deviation_decay!r}: the optimizer {name} has no weight decay")
        return optimizer

    def parameter_settings(self) -> dict[int, dict[str, float]]:
        """What the optimiser does otherwise with some parameters, by their id: "lr_factor", and its own settings."""
        layers = [module for module in self.model.modules() if isinstance(module, RoutedLayer)]
        settings: dict[int, dict[str, float]] = {}
        if self.router_lr_factor != 1.0:
            router = [p for layer in layers for p in layer.router_parameters()]
            if not router:
                raise ValueError(f"router_lr_factor={self.router_lr_factor!r}: no layer of the model has a router")
            settings |= {id(p): {"lr_factor": self.router_lr_factor} for p in router}
        if self.deviation_decay is not None:
            deviations = [p for layer in layers if isinstance(layer, ExpertLayer) for p in layer.deviations()]
            if not deviations:
                raise ValueError(f"deviation_decay={self.deviation_decay!r}: no layer of the model has a base")
            settings |= {id(p): {"weight_decay": self.deviation_decay} for p in deviations}
        return settings

    def _optimized(self) -> Iterable[tuple[str, Parameter]] | list[dict[str, Any]]:
        settings = self.parameter_settings()
        if not settings:
            return self.model.named_parameters()
        groups: dict[tuple, dict[str, Any]] = {(): {"params": []}}  # the rest first, even where there is none
        for name, parameter in self.model.named_parameters():
            own = settings.get(id(parameter), {})
            groups.setdefault(tuple(own.items()), {"params": [], **own})["params"].append((name, parameter))
        return list(groups.values())

    def _fused(self) -> dict[str, bool]:
        keywords = getattr(self.make_optimizer, "keywords", {})
        known = "fused" in inspect.signature(self.make_optimizer).parameters
        if not known or {"fused", "foreach", "differentiable"} & set(keywords):
            return {}
        # Under a gradient scaler a fused optimiser unscales by itself, and the Trainer then refuses to clip gradients.
        scaled = self._trainer is not None and self.trainer.precision == "16-mixed"
        allowed = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.model.parameters())
        return {"fused": True} if allowed and not scaled else {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        update_biases(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sums = {name: float(total) for name, total in self._loss_sums.items()}
        checkpoint["epoch_losses"] = {"sums": sums, "rows": self._rows}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loss_sums, self._rows = checkpoint["epoch_losses"]["sums"], checkpoint["epoch_losses"]["rows"]
