"""What the Trainer costs per step over a plain loop: `python -m fff.tasks.overhead`.

Both loops run the same model, optimiser and batches. CPU time of the process counts, in the fastest epoch of several:
other work on the machine only ever adds to it. Set one thread first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from fff.layers.contract import aux_loss
from fff.layers.dense import FeedForward
from fff.models import Classifier
from fff.tasks.classification import Classification


class Overhead(NamedTuple):
    """Milliseconds per training step, of the plain loop and of `Trainer.fit` with the protocol's callbacks."""

    plain: float
    fit: float


class _Repeated:
    """One batch, `steps` times."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch, self.steps)


class _Data(LightningDataModule):
    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> _Repeated:
        return _Repeated(self.batch, self.steps)

    def train_eval_dataloader(self) -> _Repeated:
        return _Repeated(self.batch, 1)

    val_dataloader = train_eval_dataloader


class _EpochTimes(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.process_time() - self._start)


def measure(*, epochs: int = 6, steps: int = 200, width: int = 128, batch_size: int = 256) -> Overhead:
    """A 256 -> `width` -> 10 network on random rows on the CPU; everything optional in the Trainer is off."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 256, generator=generator)
    data = _Data((x, torch.randint(10, (batch_size,), generator=generator)), steps)

    def make_model() -> Classifier:
        return Classifier(partial(FeedForward, hidden_features=width), 256, 10)

    make_optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    plain = []
    for _ in range(epochs):
        start = time.process_time()
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + aux_loss(model)).backward()
            optimizer.step()
        plain.append(time.process_time() - start)

    task = Classification(make_model(), num_classes=10, optimizer=make_optimizer)
    # Before the protocol, whose evaluation at the end of an epoch is not a cost of the Trainer.
    times = _EpochTimes()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[times, *task.protocol_callbacks()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data)
    return Overhead(plain=min(plain) / steps * 1e3, fit=min(times.seconds) / steps * 1e3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = measure()
    print(f"plain {result.plain:.3f} ms, fit {result.fit:.3f} ms, overhead {result.fit - result.plain:.3f} ms per step")
