"""What a training step costs beyond the plain loop that it stands for."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fff.bench.cases import Candidate, step_work
from fff.layers.contract import aux_loss
from fff.layers.dense import FeedForward
from fff.models import Classifier


class _Repeated:
    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch, self.steps)


class _Data(LightningDataModule):
    """One batch, `steps` times in an epoch of training and once in an evaluation."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> _Repeated:
        return _Repeated(self.batch, self.steps)

    def train_eval_dataloader(self) -> _Repeated:
        return _Repeated(self.batch, 1)

    val_dataloader = train_eval_dataloader


def trainer_overhead(
    *,
    make_task: Callable[..., LightningModule],
    optimizer: Callable[..., Optimizer],
    in_features: int,
    out_features: int,
    hidden_features: int,
    batch: int,
    steps: int,
) -> dict[str, Candidate]:
    """One epoch of a dense classifier by `Trainer.fit`, as a sweep calls it, and by a plain loop; per step.

    What fit does once (its set-up, the evaluation at the end of the epoch) is in its time, divided by `steps`.
    make_task: called as `make_task(model, num_classes=out_features, optimizer=optimizer)`, and gives
        `protocol_callbacks()`.
    """
    data = _Data((torch.randn(batch, in_features), torch.randint(out_features, (batch,))), steps)
    initial = Classifier(partial(FeedForward, hidden_features=hidden_features), in_features, out_features)

    def fit() -> nn.Module:
        task = make_task(copy.deepcopy(initial), num_classes=out_features, optimizer=optimizer)
        callbacks = task.protocol_callbacks()
        _quiet()
        Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        ).fit(task, datamodule=data)
        return task.model

    def loop() -> nn.Module:
        model = copy.deepcopy(initial)
        stepper = optimizer(model.parameters())
        for x, y in data.train_dataloader():
            stepper.zero_grad()
            (F.cross_entropy(model(x), y) + aux_loss(model)).backward()
            stepper.step()
        return model

    parameters = sum(p.numel() for p in initial.parameters())
    work = step_work(in_features, hidden_features, out_features, 0, parameters, batch)
    return {
        "trainer": Candidate(initial, fit, lambda: _weights(fit()), lambda: _weights(loop()), steps, work),
        "plain_loop": Candidate(initial, loop, steps=steps, work=work),
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _quiet() -> None:
    """The remarks of each fit: which accelerators there are, loader workers, how often to log."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for remark in (".*does not have many workers", ".*LeafSpec"):
        warnings.filterwarnings("ignore", message=remark)
