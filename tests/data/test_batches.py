"""The in-memory loader: what it yields, its order per epoch, and how Lightning's Trainer drives it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fff.data import Batches, ImageData


def loader(num_rows=23, batch_size=5, **keywords):
    x = torch.arange(num_rows, dtype=torch.float32)[:, None]
    return Batches(x, torch.arange(num_rows), torch.arange(num_rows), batch_size, **keywords)


def labels(batches):
    return [y.tolist() for _, y in batches]


def test_unshuffled_pass_is_the_rows_in_order():
    batches = labels(loader())
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sum(batches, []) == list(range(23))


@pytest.mark.parametrize(
    ("num_rows", "drop_last", "expected"), [(23, False, 5), (23, True, 4), (20, False, 4), (20, True, 4), (3, True, 0)]
)
def test_len_counts_the_batches(num_rows, drop_last, expected):
    batches = loader(num_rows, drop_last=drop_last)
    assert len(batches) == len(labels(batches)) == expected


def test_only_chosen_rows_and_their_own_labels():
    x = torch.arange(8, dtype=torch.float32)[:, None]
    (got_x, got_y), *rest = Batches(x, torch.arange(8) * 10, torch.tensor([6, 1, 3]), 4)
    assert not rest and got_x.flatten().tolist() == [6, 1, 3] and got_y.tolist() == [60, 10, 30]


def test_bytes_become_scaled_floats_and_stay_bytes_in_memory():
    x = torch.tensor([[[0, 255]], [[51, 102]]], dtype=torch.uint8)
    batches = Batches(x, torch.zeros(2), torch.arange(2), 2, scale=torch.tensor(2 / 255), shift=torch.tensor(-1.0))
    for _ in range(2):  # a second pass would show an in-place change of the store
        ((got, _),) = batches
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, torch.tensor([[[-1.0, 1.0]], [[-0.6, -0.2]]]))


def test_order_is_a_function_of_seed_and_epoch():
    batches = loader(seed=7)
    first = labels(batches)
    assert sorted(sum(first, [])) == list(range(23)) and sum(first, []) != list(range(23))
    assert labels(batches) == first
    batches.set_epoch(1)
    second = labels(batches)
    assert second != first
    again = loader(seed=7)
    again.set_epoch(1)
    assert labels(again) == second
    # A run with the next seed must not be this run, one epoch later.
    assert labels(loader(seed=8)) not in (first, second)


def test_a_pass_that_is_broken_off_starts_anew():
    batches = loader(seed=0)
    first = next(iter(batches))[1]
    assert torch.equal(next(iter(batches))[1], first)


def test_state_goes_on_where_the_epoch_stopped():
    batches = loader(seed=3)
    batches.set_epoch(2)
    whole = labels(batches)
    running = iter(batches)
    next(running), next(running)
    state = batches.state_dict()

    resumed = loader(seed=3)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert labels(resumed) == whole[2:]
    assert labels(resumed) == whole  # once only

    later = loader(seed=3)
    later.load_state_dict(state)
    later.set_epoch(3)
    assert len(labels(later)) == len(later)


class Probe(LightningModule):
    """Notes epoch, number and content of each batch that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((self.current_epoch, batch_idx, float(x.double().sum())))
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Stop(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.steps:
            raise Stop


def fit(tmp_path, *, epochs=2, callbacks=(), checkpoint=None):
    torch.manual_seed(0)
    module = Probe()
    data = ImageData("digits", batch_size=300, cache_dir=tmp_path / "cache", augment="affine")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
    )
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except Stop:
        pass
    return module, data


def test_trainer_sees_a_new_order_each_epoch(tmp_path):
    module, data = fit(tmp_path)
    batches = data.train_dataloader()
    expected = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        expected += [(epoch, i, float(x.double().sum())) for i, (x, _) in enumerate(batches)]
    assert module.seen == expected
    assert len(expected) == 2 * 5 and expected[0][2] != expected[5][2]


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        ({"every_n_train_steps": 7}, 8),  # in the middle of the second of three epochs of 5 steps
        ({"every_n_train_steps": 5}, 7),  # after the last step of the first epoch
        ({"every_n_epochs": 1}, 7),  # after its validation
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 7),
    ],
)
def test_resumed_training_equals_unbroken_training(tmp_path, when, steps):
    unbroken, _ = fit(tmp_path, epochs=3)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=False, save_top_k=1, **when)
    stopped, _ = fit(tmp_path, epochs=3, callbacks=[keep, StopAfter(steps)])
    assert stopped.seen == unbroken.seen[:steps]
    (checkpoint,) = (tmp_path / "ckpt").iterdir()
    resumed, _ = fit(tmp_path, epochs=3, checkpoint=checkpoint)
    saved_at = torch.load(checkpoint, weights_only=False)["global_step"]
    assert 0 < saved_at <= steps
    assert resumed.seen == unbroken.seen[saved_at:]
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
