"""Language modelling: cross entropy of the next token plus the layers' auxiliary losses, measured in bits.

After each epoch, which is as many steps as the Trainer's batches, the hard route is evaluated on the validation text.
The weights of the best validation loss are those that are measured, once, on the test text. Training stops early only
after an epoch whose loss, or whose weights at its end, are not finite: it is in the history, but never the best.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fff.layers.contract import RoutedLayer, soft_evaluation
from fff.tasks.callbacks import RandomState
from fff.tasks.protocol import (
    USAGE_METRICS,
    Evaluation,
    backends,
    evaluate,
    is_finite,
    model_metrics,
    record_of,
)
from fff.tasks.task import RoutedTask
from fff.tasks.text_routes import measure_text_routes

Batches = Iterable[tuple[Tensor, Tensor]]
_BOOKS = ("history", "best_loss", "best_epoch", "best_weights", "speeds", "diverged", "training_backend")
_MEASURED = ("test_loss", "bits_per_character", "perplexity", "test_loss_soft", "test_accuracy", *USAGE_METRICS)


class LanguageModeling(RoutedTask):
    """Trains a model of (B, P) tokens -> (B, P, V) logits; with `protocol_callbacks()` in the Trainer, `results` then
    measures the run.

    optimizer, router_lr_factor, deviation_decay, schedules, test, keep_routes: see `RoutedTask`. The optimiser's weight
        decay is for matrices and embeddings; biases, also those of experts, and normalisation weights have none.
    warmup_steps: optimiser steps in which the learning rate rises to its full value; from there it falls, by a cosine
        over the steps that the Trainer has left, to `final_lr` of it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[..., Optimizer],
        warmup_steps: int = 100,
        final_lr: float = 0.1,
        router_lr_factor: float = 1.0,
        deviation_decay: float | None = None,
        schedules: Mapping[str, Sequence[Sequence[float]]] | None = None,
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
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} must be >= 0")
        if not 0.0 <= final_lr <= 1.0:
            raise ValueError(f"final_lr={final_lr} must be in [0, 1]")
        self.warmup_steps, self.final_lr = warmup_steps, final_lr
        self.protocol = LanguageProtocol()

    def task_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.build_optimizer()
        factor = warmup_cosine(self.warmup_steps, self._num_steps(), self.final_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def parameter_settings(self) -> dict[int, dict[str, float]]:
        own = super().parameter_settings()
        undecayed = [id(p) for name, p in self.model.named_parameters() if _is_undecayed(name, p)]
        return own | {key: {"weight_decay": 0.0} | own.get(key, {}) for key in undecayed}

    def _num_steps(self) -> int:
        """Of the optimiser in the whole run."""
        # Not the Trainer's own estimate: it sets up the loader before a resumed run has restored its place in it.
        limit, batches = self.trainer.limit_train_batches, len(self.trainer.datamodule.train_dataloader())
        batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
        return self.trainer.max_epochs * math.ceil(batches / self.trainer.accumulate_grad_batches)

    def protocol_callbacks(self) -> list[Callback]:
        # The protocol evaluates the validation rows itself, by the same code as all other rows.
        warnings.filterwarnings("ignore", message="You passed in a `val_dataloader` but have no `validation_step`")
        return [*self.schedules, self.protocol, RandomState()]

    def results(self, data: LightningDataModule) -> dict[str, Any]:
        """Metrics, history and backend of the finished run, all plain Python; looks at the test data once, or never.

        Losses in nats per token. Leaves the model with the weights of the best validation loss. Of several routed
        layers the sizes, leaves and loads are summed or chained, and the leaves in use are told of each, too. What is
        measured with weights is None if the first epoch diverged. tokens_per_second: in training, the median of the
        epochs. bits_per_character: by the `characters_per_token` of the data; perplexity: per token.
        active_parameters: those outside of the routed layers, and the weights of theirs (biases left out) that one
        token meets in hard evaluation.
        """
        protocol = self.protocol
        if not protocol.history["epoch"]:
            raise ValueError("results need a run of at least one epoch with protocol_callbacks() in the Trainer")
        # The Trainer leaves the model on the CPU.
        self.model.to(self.trainer.strategy.root_device)
        if protocol.best_weights:
            self.restore(protocol.best_epoch, protocol.best_weights)
            measured, evaluated = self._measure(data)
        else:
            measured, evaluated = dict.fromkeys(_MEASURED), protocol.training_backend
            evaluate(self.model, data.val_dataloader())  # layers tell their experts by their records
        metrics = {
            "val_loss": protocol.best_loss if protocol.best_weights else None,
            "val_epochs": protocol.best_epoch or None,
            **measured,
            "diverged": protocol.diverged,
            **model_metrics(self.model),
            "active_parameters": active_parameters(self.model),
            "epochs": len(protocol.history["epoch"]),
            "tokens_per_second": float(np.median(protocol.speeds)),
        }
        return record_of(metrics, protocol.history, protocol.training_backend, evaluated)

    def _measure(self, data: LightningDataModule) -> tuple[dict[str, Any], str]:
        """By the names in `_MEASURED` and those of each layer's leaves; and the backend of the hard route."""
        if not self.test:
            val = evaluate_text(self.model, data.val_dataloader()).routing
            return dict.fromkeys(_MEASURED), val.backend
        batches = data.test_dataloader()
        test = evaluate_text(self.model, batches)
        soft = None
        if any(isinstance(module, RoutedLayer) and hasattr(module, "soft_eval") for module in self.model.modules()):
            with soft_evaluation(self.model):
                soft = evaluate_text(self.model, batches).loss
        layers = enumerate(test.routing.usage, start=1) if len(test.routing.usage) > 1 else ()
        measured = {
            "test_loss": test.loss,
            "bits_per_character": test.loss / math.log(2) / data.characters_per_token,
            # The largest float is exp(709.8).
            "perplexity": math.inf if test.loss > 709 else math.exp(test.loss),
            "test_loss_soft": soft,
            "test_accuracy": test.routing.accuracy,
            **test.routing.usage_metrics,
            **{f"leaves_used_{number}": int((usage.load > 0).sum()) for number, usage in layers},
        }
        return measured, test.routing.backend

    def routes(self, data: LightningDataModule) -> dict[str, np.ndarray] | None:
        """`measure_text_routes` of the weights that `results` measured and left in the model; None without any, or
        where no layer chooses among its experts."""
        if not self.protocol.best_weights:
            return None
        return measure_text_routes(self.model, data.test_dataloader(), data.class_names)


def _is_undecayed(name: str, parameter: Tensor) -> bool:
    """Vectors, and the biases of experts: matrices of a row for each, called `b_in`, `shared_b_out` and so on."""
    words = name.rpartition(".")[2].split("_")
    return parameter.dim() < 2 or "b" in words or "bias" in words


class TextEvaluation(NamedTuple):
    """loss: mean over all tokens, in nats.  routing: what else is known of the pass, accuracy of the next token too."""

    loss: float
    routing: Evaluation


def evaluate_text(model: nn.Module, batches: Batches) -> TextEvaluation:
    """Of the hard route, or of whichever the context has switched on."""
    total, tokens = 0.0, 0

    def observe(logits: Tensor, y: Tensor) -> None:
        nonlocal total, tokens
        total = total + F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum").double()
        tokens += y.numel()

    routing = evaluate(model, batches, observe=observe)
    return TextEvaluation(float(total) / max(tokens, 1), routing)


def warmup_cosine(warmup: int, steps: int, final: float) -> Callable[[int], float]:
    """Share of the learning rate at a step from 0: it rises linearly over `warmup` steps to 1, then falls by a cosine
    to `final` at the last of `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def active_parameters(model: nn.Module) -> int:
    """See `LanguageModeling.results`."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    within = {id(p) for layer in layers for p in layer.parameters()}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in within)
    return outside + sum(layer.size.flops_per_row for layer in layers) // 2


class LanguageProtocol(Callback):
    """Keeps the books of one run; `LanguageModeling.results` reads them. Everything is in the checkpoint.

    The history's routing columns (mean entropy of the evaluated nodes, experts in use) are those of the validation
    text; val_accuracy is that of the next token.
    """

    def __init__(self) -> None:
        names = ("epoch", "train_loss", "val_loss", "val_accuracy", "node_entropy", "leaves_used")
        self.history: dict[str, list] = {name: [] for name in names}
        self.best_loss, self.best_epoch = math.inf, 0
        self.best_weights: dict[str, Tensor] = {}
        self.speeds: list[float] = []  # tokens per second of each epoch
        self.diverged = False
        self.training_backend = ""
        self._tokens, self._start = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _BOOKS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._val_rows = trainer.datamodule.val_dataloader()
        self.on_train_epoch_start(trainer, pl_module)  # a run resumed within an epoch does not start that epoch again
        # A run resumed from a checkpoint of its last epoch must not train one epoch more.
        trainer.should_stop = trainer.should_stop or self.diverged

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens, self._start = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tokens += batch[1].numel()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = pl_module.model
        losses = pl_module.pop_epoch_losses()  # waits for the accelerator
        self.speeds.append(self._tokens / (time.perf_counter() - self._start))
        self.training_backend = backends(model)
        val = evaluate_text(model, self._val_rows)

        epoch = len(self.history["epoch"]) + 1
        # The last step may spoil the weights after a loss that was still finite.
        self.diverged = not (math.isfinite(losses["loss"] + losses["aux_loss"] + val.loss) and is_finite(model))
        if not self.diverged and val.loss < self.best_loss:
            self.best_loss, self.best_epoch = val.loss, epoch
            self.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        row = {
            "epoch": epoch,
            "train_loss": losses["loss"] if math.isfinite(losses["loss"]) else None,
            "val_loss": val.loss if math.isfinite(val.loss) else None,
            "val_accuracy": val.routing.accuracy,
            **val.routing.usage_history,
        }
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)

        pl_module.log_dict({"train_loss": losses["loss"], "val_loss": val.loss}, prog_bar=True)
        if trainer.loggers:
            pl_module.log_dict({f"train_{name}": value for name, value in losses.items() if name != "loss"})
            routed = {"leaves_used": float(val.routing.leaves_used), "node_entropy": row["node_entropy"]}
            pl_module.log_dict({name: value for name, value in routed.items() if value is not None})
        if self.diverged:
            trainer.should_stop = True
