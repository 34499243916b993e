"""Classification: cross entropy plus the layers' auxiliary losses, measured by the MA/GA protocol."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from fff.layers.contract import RoutedLayer, routing
from fff.tasks.callbacks import RandomState
from fff.tasks.protocol import USAGE_METRICS, Protocol, dispatch_entropy, evaluate, model_metrics, record_of
from fff.tasks.routes import measure_routes
from fff.tasks.task import RoutedTask


class Classification(RoutedTask):
    """Trains `model` on (x, y) batches; with `protocol_callbacks()` in the Trainer, `results` then measures the run.

    optimizer, router_lr_factor, deviation_decay, schedules, test, keep_routes: see `RoutedTask`; keep_routes needs a
        model with one routed layer that sees each row once, not its tokens.
    lr_schedule: Optimizer -> scheduler, stepped at the end of each epoch.
    plateau: the accuracy that a ReduceLROnPlateau gets (give it `mode="max"`), of the training or the validation rows.
    patience: epochs without a better training or validation accuracy after which training stops.
    stop_loss: mean task loss of an epoch that ends training; None: none does.
    restart_from_best: epochs, counted from 0 as in a schedule, before which the model goes back to the weights of the
        best validation accuracy so far, and the optimiser forgets its averages.
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
        super().__init__(
            model,
            optimizer=optimizer,
            router_lr_factor=router_lr_factor,
            deviation_decay=deviation_decay,
            schedules=schedules,
            test=test,
            keep_routes=keep_routes,
        )
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1]")
        if plateau not in ("train", "val"):
            raise ValueError(f"plateau={plateau!r} must be 'train' or 'val'")
        if any(epoch < 1 for epoch in restart_from_best):
            raise ValueError(f"restart_from_best={list(restart_from_best)}: before epoch 1 there is no best")
        num_layers = sum(isinstance(module, RoutedLayer) for module in model.modules())
        if keep_routes and num_layers != 1:
            raise ValueError(f"keep_routes={keep_routes} needs a model with one routed layer, not {num_layers}")
        self.num_classes = num_classes
        self.make_lr_schedule = lr_schedule
        self.plateau = plateau
        self.label_smoothing = label_smoothing
        self.protocol = Protocol(patience, stop_loss)
        self.restart_from_best = frozenset(restart_from_best)
        self._lr_schedule: LRScheduler | None = None
        self._restored_lr_schedule: dict[str, Any] | None = None

    def on_train_start(self) -> None:
        if self.keep_routes:
            x, y = next(iter(self.trainer.datamodule.val_dataloader()))
            evaluate(self.model, [(x, y)])
            ((_, record),) = routing(self.model)
            if len(record.index) != len(y):
                raise ValueError(
                    f"keep_routes={self.keep_routes} needs a layer that sees each row once: of {len(y)} rows it sees"
                    f" {len(record.index)}"
                )

    def on_train_epoch_start(self) -> None:
        # A run resumed in the middle of an epoch does not come by here: its weights have gone on since.
        if self.current_epoch in self.restart_from_best:
            self.model.load_state_dict(self.protocol.best["val"].weights)
            self.trainer.optimizers[0].state.clear()

    def task_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y, label_smoothing=self.label_smoothing)

    def configure_optimizers(self) -> Optimizer:
        optimizer = self.build_optimizer()
        if self.make_lr_schedule is not None:
            self._lr_schedule = self.make_lr_schedule(optimizer)
            if isinstance(self._lr_schedule, ReduceLROnPlateau) and self._lr_schedule.mode != "max":
                raise ValueError("lr_schedule: a ReduceLROnPlateau gets an accuracy and needs mode='max'")
            if self._restored_lr_schedule is not None:
                self._lr_schedule.load_state_dict(self._restored_lr_schedule)
        return optimizer

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
        super().on_save_checkpoint(checkpoint)
        if self._lr_schedule is not None:
            checkpoint["lr_schedule"] = self._lr_schedule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
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
        module knows the cluster of each test row (`test_cluster`, in the order of its loader), and layers see rows and
        not their tokens, the dispatch entropy is measured too.
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
        metrics = {
            **measured,
            "diverged": protocol.diverged,
            **model_metrics(self.model),
            "epochs": len(protocol.history["epoch"]),
        }
        return record_of(metrics, protocol.history, protocol.training_backend, evaluated)

    def routes(self, data: LightningDataModule) -> dict[str, np.ndarray] | None:
        """`measure_routes` of the weights that `results` measured and left in the model; None if there are none."""
        if not self.protocol.best["val"].weights:
            return None
        return measure_routes(self.model, data.train_eval_dataloader(), data.test_dataloader())

    def _measure(self, data: LightningDataModule) -> tuple[dict[str, Any], str]:
        """What the best weights do with the rows, by the names in `_MEASURED`, and the backend of the hard route."""
        ma, ga = self.protocol.best["train"], self.protocol.best["val"]
        self.restore(ma.epoch, ma.weights)
        ma_soft = evaluate(self.model, data.train_eval_dataloader(), soft=True).soft_accuracy
        self.restore(ga.epoch, ga.weights)
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
            if cluster is not None and all(len(record.index) == len(y) for _, record in routing(self.model)):
                chosen.append(self._chosen_experts())

        test = evaluate(self.model, data.test_dataloader(), soft=True, observe=observe)

        measured = {
            "ma": ma.accuracy,
            "ma_epochs": ma.epoch,
            "ga": test.accuracy,
            "ga_epochs": ga.epoch,
            "val_accuracy": ga.accuracy,
            "ga_soft": test.soft_accuracy,
            "ma_soft": ma_soft,
            **test.usage_metrics,
            **{name: value.item() for name, value in report.compute().items()},
        }
        if chosen:
            measured["dispatch_entropy"] = dispatch_entropy(torch.cat(chosen), cluster.to(chosen[0].device))
        return measured, test.backend

    def _chosen_experts(self) -> Tensor:
        """(T, K) hard choices of the last forward over all layers, whose experts are counted through."""
        indices, first = [], 0
        for _, record in routing(self.model):
            indices.append(torch.where(record.index < 0, -1, record.index + first))
            first += record.num_experts
        return torch.cat(indices, dim=1)


_MEASURED = (
    *("ma", "ma_epochs", "ga", "ga_epochs", "val_accuracy", "ga_soft", "ma_soft"),
    *USAGE_METRICS,
    *("macro_f1", "calibration_error"),
)
