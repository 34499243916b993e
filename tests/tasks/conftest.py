"""A layer with scripted accuracies and a data module on tensors."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

from fff.data import Batches
from fff.layers.contract import Record, RoutedLayer, Size, TreeTrace

NUM_CLASSES = 5


class TensorData(LightningDataModule):
    """sets: (x, y) of train, val and test."""

    def __init__(self, train, val, test, batch_size=10_000, eval_batch_size=10_000):
        super().__init__()
        self.sets = {"train": train, "val": val, "test": test}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.looks_at_test = 0
        self.num_classes = NUM_CLASSES

    def _batches(self, name, batch_size, seed=None):
        x, y = self.sets[name]
        return Batches(x, y, torch.arange(len(x)), batch_size, seed=seed)

    def train_dataloader(self):
        return self._batches("train", self.batch_size, seed=0)

    def train_eval_dataloader(self):
        return self._batches("train", self.eval_batch_size)

    def val_dataloader(self):
        return self._batches("val", self.eval_batch_size)

    def test_dataloader(self):
        self.looks_at_test += 1
        return self._batches("test", self.eval_batch_size)


class Scripted(RoutedLayer):
    """Reaches the given accuracies epoch by epoch; "weights" are the number of training forwards it has seen.

    Inputs have the columns (set number, position of the row in its set in [0, 1), label). Rows whose position lies
    under the accuracy are right. Row position p goes to expert floor(4 p) of 5, so that the last expert stays empty.
    """

    def __init__(self, train, val, test, soft=None, loss=None):
        super().__init__()
        self.in_features, self.out_features = 3, NUM_CLASSES
        script = torch.tensor([train, val, test])
        self.register_buffer("script", script, persistent=False)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.weight = nn.Parameter(torch.zeros(()))
        self.loss = loss
        self.temperature = 1.0
        self.temperatures_in_evaluation = []
        if soft is not None:
            self.soft_eval = False
            self.register_buffer("soft_script", torch.tensor(soft), persistent=False)

    @property
    def size(self):
        return Size(40, 8, 43, 10, 1234)

    def forward(self, x):
        if self.training:
            self.forwards += 1
        else:
            self.temperatures_in_evaluation.append(self.temperature)
        epoch = int(self.forwards) - 1
        part, position, label = x.unbind(1)
        if getattr(self, "soft_eval", False):
            right = position < self.soft_script[epoch]
        else:
            right = position < self.script[part.long(), epoch]
        answer = (label.long() + (~right).long()) % NUM_CLASSES
        loss = 0.0 if self.loss is None else self.loss[epoch]
        self.record = Record(
            aux_loss=self.weight * 0 + loss,
            losses={"scripted": torch.tensor(loss)},
            index=(4 * position).long()[:, None],
            num_experts=5,
            backend="scripted",
            # The root is undecided (ln 2) for all rows; of the nodes below, which rows visit one by one, the left is
            # sure (0) and the right has no row (nan).
            tree=TreeTrace(
                depth=2,
                index=torch.zeros(len(x), 1, dtype=torch.int64),
                top=torch.zeros(len(x), 1, 1),
                visited=torch.full((len(x), 1, 1, 1), -50.0),
            ),
        )
        return nn.functional.one_hot(answer, NUM_CLASSES) * 1.0 + self.weight


def scripted_rows(part, rows=40):
    position = torch.arange(rows) / rows
    label = torch.arange(rows) % NUM_CLASSES
    return torch.stack([torch.full((rows,), float(part)), position, label.float()], 1), label


class ScriptedModel(nn.Module):
    def __init__(self, **script):
        super().__init__()
        self.ff = Scripted(**script)

    def forward(self, x):
        return self.ff(x)


@pytest.fixture
def scripted():
    return ScriptedModel


@pytest.fixture
def scripted_data():
    return lambda **options: TensorData(*(scripted_rows(part) for part in range(3)), **options)


@pytest.fixture
def tensor_data():
    return TensorData


@pytest.fixture
def fit(tmp_path):
    """Trains a task with the flags of a sweep; returns the trainer."""

    def run(task, data, *, max_epochs, callbacks=(), ckpt_path=None, logger=False, **flags):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=max_epochs,
            logger=logger,
            callbacks=[*task.protocol_callbacks(), *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            **flags,
        )
        trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
