"""Classification: cross entropy plus the layers' auxiliary losses, measured by the MA/GA protocol."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from fff.layers.base import ExpertLayer
from fff.layers.contract import RoutedLayer, aux_loss, routing, update_biases
from fff.tasks.callbacks import LayerSchedule, RandomState
from fff.tasks.protocol import Protocol, dispatch_entropy, evaluate
from fff.tasks.routes import measure_routes


class Classification(LightningModule):
    """Trains `model` on (x, y) batches; with `protocol_callbacks()` in the Trainer, `results` then measures the run.

    optimizer: named parameters -> Optimizer, for example `functools.partial(torch.optim.AdamW, lr=1e-3)`. `fused=True`
        is added where the optimiser and the parameters allow it and nothing else was asked for.
    lr_schedule: Optimizer -> scheduler, stepped at the end of each epoch.
    plateau: the accuracy that a ReduceLROnPlateau gets (give it `mode="max"`), of the training or the validation rows.
    patience: epochs without a better training or validation accuracy after which training stops.
    stop_loss: mean task loss of an epoch that ends training; None: none does.
    schedules: attribute of the layers -> points of its `LayerSchedule`.
    restart_from_best: epochs, counted from 0 as in a schedule, before which the model goes back to the weights of the
        best validation accuracy so far, and the optimiser forgets its averages.
    router_lr_factor: times the learning rate, for the parameters that decide where rows go.
    deviation_decay: weight decay, in place of the optimiser's, of what experts have beside their base (`ExpertLayer`).
    test: whether `results` looks at the test rows; False for a search, whose runs then have no GA to select by.
    keep_routes: whether the record of a run is to have `routes`; for a model with one routed layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        optimizer: Callable[..., Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler] | None = None,
        plateau: Literal["train", "val"] = "train",
        label_smoothing: float = 0.0,
        patience: int = 50,
        stop_loss: float | None = None,
        schedules: Mapping[str, Sequence[Sequence[float]]] | None = None,
        restart_from_best: Sequence[int] = (),
        router_lr_factor: float = 1.0,
        deviation_decay: float | None = None,
        test: bool = True,
        keep_routes: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1]")
        if plateau not in ("train", "val"):
            raise ValueError(f"plateau={plateau!r} must be 'train' or 'val'")
        if any(epoch < 1 for epoch in restart_from_best):
            raise ValueError(f"restart_from_best={list(restart_from_best)}: before epoch 1 there is no best")
        if not router_lr_factor > 0:
            raise ValueError(f"router_lr_factor={router_lr_factor!r} must be > 0")
        if deviation_decay is not None and not deviation_decay >= 0:
            raise ValueError(f"deviation_decay={deviation_decay!r} must be >= 0")
        if keep_routes and not test:
            raise ValueError("keep_routes=True keeps those of the test rows, which test=False never looks at")
        num_layers = sum(isinstance(module, RoutedLayer) for module in model.modules())
        if keep_routes and num_layers != 1:
            raise ValueError(f"keep_routes={keep_routes} needs a model with one routed layer, not {num_layers}")
        self.model = model
        self.num_classes = num_classes
        self.make_optimizer = optimizer
        self.make_lr_schedule = lr_schedule
        self.plateau = plateau
        self.label_smoothing = label_smoothing
        self.keep_routes = keep_routes
        self.protocol = Protocol(patience, stop_loss)
        self.restart_from_best = frozenset(restart_from_best)
        self.router_lr_factor, self.deviation_decay = router_lr_factor, deviation_decay
        self.test = test
        self.schedules = [LayerSchedule(attribute, points) for attribute, points in (schedules or {}).items()]
        self._lr_schedule: LRScheduler | None = None
        self._restored_lr_schedule: dict[str, Any] | None = None
        self._loss_sums: dict[str, Tensor | float] = {}
        self._rows = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_epoch_start(self) -> None:
        # A run resumed in the middle of an epoch does not come by here: its weights have gone on since.
        if self.current_epoch in self.restart_from_best:
            self.model.load_state_dict(self.protocol.best["val"].weights)
            self.trainer.optimizers[0].state.clear()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        task_loss = F.cross_entropy(self.model(x), y, label_smoothing=self.label_smoothing)
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
        self._loss_sums[name] = value.detach() * rows + self._loss_sums.get(name, 0.0)

    def pop_epoch_losses(self) -> dict[str, float]:
        """Mean over the rows since the last call: "loss" is the task's, "aux_loss" the weighted auxiliary sum, the rest
        each raw auxiliary loss summed over the layers."""
        losses = {name: float(total) / self._rows for name, total in self._loss_sums.items()}
        self._loss_sums, self._rows = {}, 0
        return losses

    def configure_optimizers(self) -> Optimizer:
        optimizer = self.make_optimizer(self._optimized(), **self._fused())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_factor", 1.0)
        if self.make_lr_schedule is not None:
            self._lr_schedule = self.make_lr_schedule(optimizer)
            if self._restored_lr_schedule is not None:
                self._lr_schedule.load_state_dict(self._restored_lr_schedule)
        return optimizer

    def _optimized(self) -> Iterable[tuple[str, Parameter]] | list[dict[str, Any]]:
        layers = [module for module in self.model.modules() if isinstance(module, RoutedLayer)]
        settings: dict[int, dict[str, float]] = {}  # of parameters, by id
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

    def on_train_epoch_end(self) -> None:
        # Not given to the Trainer, which steps plateau schedulers after its checkpoint is written: a resumed run would
        # miss one step.
        if self._lr_schedule is None:
            return
        if isinstance(self._lr_schedule, ReduceLROnPlateau):
            self._lr_schedule.step(self.protocol.history[f"{self.plateau}_accuracy"][-1])
        else:
            self._lr_schedule.step()
        if self.loggers:
            self.log("lr", self._lr_schedule.get_last_lr()[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sums = {name: float(total) for name, total in self._loss_sums.items()}
        checkpoint["epoch_losses"] = {"sums": sums, "rows": self._rows}
        if self._lr_schedule is not None:
            checkpoint["lr_schedule"] = self._lr_schedule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loss_sums, self._rows = checkpoint["epoch_losses"]["sums"], checkpoint["epoch_losses"]["rows"]
        self._restored_lr_schedule = checkpoint.get("lr_schedule")

    def protocol_callbacks(self) -> list[Callback]:
        # The protocol evaluates the validation rows itself, more cheaply and by the same code as all other rows.
        warnings.filterwarnings("ignore", message="You passed in a `val_dataloader` but have no `validation_step`")
        return [*self.schedules, self.protocol, RandomState()]

    def results(self, data: LightningDataModule) -> dict[str, Any]:
        """Metrics, history and backend of the finished run, all plain Python; looks at the test data once, or never.

        Leaves the model with the weights of the best validation accuracy. Of several routed layers the sizes, leaves
        and loads are summed or chained, and the largest share is the largest of any. NaN becomes None, and so does all
        that is measured with weights if the first epoch diverged, as there are none to measure then. Where the data
        module knows the cluster of each test row (`test_cluster`, in the order of its loader), the dispatch entropy is
        measured too.
        """
        protocol = self.protocol
        if not protocol.history["epoch"]:
            raise ValueError("results need a run of at least one epoch with protocol_callbacks() in the Trainer")
        # The Trainer leaves the model on the CPU.
        self.model.to(self.trainer.strategy.root_device)
        if protocol.best["val"].weights:
            measured, evaluated = self._measure(data)
        else:
            measured, evaluated = dict.fromkeys(_MEASURED), protocol.training_backend
            # A run resumed after its last epoch has not run its layers, which tell their experts by their records.
            evaluate(self.model, data.val_dataloader())
        layers = [layer for layer in self.model.modules() if isinstance(layer, RoutedLayer)]
        metrics = {
            **measured,
            "diverged": protocol.diverged,
            "num_leaves": sum(record.num_experts for _, record in routing(self.model)),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **{field: sum(getattr(layer.size, field) for layer in layers) for field in _SIZES},
            "epochs": len(protocol.history["epoch"]),
        }
        trained = protocol.training_backend
        return {
            "metrics": {name: _plain(value) for name, value in metrics.items()},
            "history": {name: list(values) for name, values in protocol.history.items()},
            "backend": trained if trained == evaluated else f"{trained} (training), {evaluated} (evaluation)",
        }

    def routes(self, data: LightningDataModule) -> dict[str, np.ndarray] | None:
        """`measure_routes` of the weights that `results` measured and left in the model; None if there are none."""
        if not self.protocol.best["val"].weights:
            return None
        return measure_routes(self.model, data.train_eval_dataloader(), data.test_dataloader())

    def _measure(self, data: LightningDataModule) -> tuple[dict[str, Any], str]:
        """What the best weights do with the rows, by the names in `_MEASURED`, and the backend of the hard route."""
        ma, ga = self.protocol.best["train"], self.protocol.best["val"]
        self._restore(ma.epoch, ma.weights)
        ma_soft = evaluate(self.model, data.train_eval_dataloader(), soft=True).soft_accuracy
        self._restore(ga.epoch, ga.weights)
        if not self.test:
            val = evaluate(self.model, data.val_dataloader())
            known = {"ma": ma.accuracy, "ma_epochs": ma.epoch, "ga_epochs": ga.epoch, "val_accuracy": ga.accuracy}
            return {**dict.fromkeys(_MEASURED), **known, "ma_soft": ma_soft}, val.backend
        report = MetricCollection(
            {
                "macro_f1": MulticlassF1Score(self.num_classes, average="macro"),
                "calibration_error": MulticlassCalibrationError(self.num_classes),
            }
        ).to(next(self.model.parameters()).device)
        cluster, chosen = getattr(data, "test_cluster", None), []

        def observe(logits: Tensor, y: Tensor) -> None:
            report.update(logits.float().softmax(-1), y)
            if cluster is not None:
                chosen.append(self._chosen_experts())

        test = evaluate(self.model, data.test_dataloader(), soft=True, observe=observe)

        entropy = test.node_entropy
        measured = {
            "ma": ma.accuracy,
            "ma_epochs": ma.epoch,
            "ga": test.accuracy,
            "ga_epochs": ga.epoch,
            "val_accuracy": ga.accuracy,
            "ga_soft": test.soft_accuracy,
            "ma_soft": ma_soft,
            "leaves_used": test.leaves_used,
            "largest_leaf_share": max((usage.load.max().item() / usage.rows for usage in test.usage), default=None),
            "node_entropy": test.mean_node_entropy,
            "nodes_below_0.10": None if entropy is None else (entropy < 0.10).double().mean().item(),
            "leaf_load": [count for usage in test.usage for count in usage.load.tolist()],
            **{name: value.item() for name, value in report.compute().items()},
        }
        if cluster is not None:
            measured["dispatch_entropy"] = dispatch_entropy(torch.cat(chosen), cluster.to(chosen[0].device))
        return measured, test.backend

    def _chosen_experts(self) -> Tensor:
        """(T, K) hard choices of the last forward over all layers, whose experts are counted through."""
        indices, first = [], 0
        for _, record in routing(self.model):
            indices.append(torch.where(record.index < 0, -1, record.index + first))
            first += record.num_experts
        return torch.cat(indices, dim=1)

    def _restore(self, epoch: int, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)
        # A scheduled temperature is no weight, but the accuracy of that epoch depended on it.
        for schedule in self.schedules:
            schedule.apply(self.model, epoch - 1)


_MEASURED = (
    *("ma", "ma_epochs", "ga", "ga_epochs", "val_accuracy", "ga_soft", "ma_soft"),
    *("leaves_used", "largest_leaf_share", "node_entropy", "nodes_below_0.10", "leaf_load"),
    *("macro_f1", "calibration_error"),
)
_SIZES = ("training_width", "inference_width", "training_size", "inference_size", "flops_per_row")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
