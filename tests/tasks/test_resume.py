"""A run that was cut and resumed equals an unbroken one bit for bit, from a checkpoint that loads with weights_only."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import fff
from fff.models import Classifier
from fff.tasks import Classification, RandomState


class Noisy(nn.Module):
    """Draws from every generator that a layer or an augmentation may use."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.ff = fff.FFF(in_features, 4, out_features, depth=2, drop=0.2)

    def forward(self, x):
        if self.training:
            x = x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.ff(x)


pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture
def data(tensor_data):
    def make():
        generator = torch.Generator().manual_seed(0)
        sets = []
        for rows in (60, 20, 20):
            x = torch.randn(rows, 8, generator=generator)
            sets.append((x, (x[:, :2].sum(1) + 2).clamp(0, 4).long()))
        return tensor_data(*sets, batch_size=16)

    return make


SCHEDULES = {
    "none": None,
    "plateau": partial(ReduceLROnPlateau, mode="max", factor=0.5, patience=0),
    "cosine": partial(CosineAnnealingLR, T_max=6),
}


WITHIN = "epoch=2-step=10"


def make_task(lr_schedule=None, patience=50, restart_from_best=()):
    return Classification(
        Classifier(Noisy, 8, 5),
        num_classes=5,
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        lr_schedule=lr_schedule,
        patience=patience,
        schedules={"hardening_weight": [[0, 0.0], [4, 1.0]]},
        restart_from_best=restart_from_best,
    )


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def outcome(task, data, trainer):
    return {
        "results": task.results(data),
        "weights": task.model.state_dict(),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "drawn": (torch.rand(1).item(), np.random.rand(), random.random()),
    }


@pytest.mark.parametrize(
    "schedule, cut, restart",
    [
        *((schedule, cut, []) for schedule in SCHEDULES for cut in ("epoch=0-step=4", "epoch=3-step=16", WITHIN)),
        # The third epoch starts from the best weights: cut right before, in it, and after.
        *(("none", cut, [2]) for cut in ("epoch=1-step=8", WITHIN, "epoch=3-step=16")),
    ],
)
def test_resumed_equals_unbroken(data, fit, tmp_path, schedule, cut, restart):
    """An epoch has 4 steps: `WITHIN` is a cut within the third epoch."""

    def checkpoints():
        when = {"every_n_train_steps": 10} if cut.endswith("10") else {"save_on_train_epoch_end": True}
        return ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="{epoch}-{step}", save_top_k=-1, **when)

    seed_everything(1)
    task, module = make_task(SCHEDULES[schedule], restart_from_best=restart), data()
    whole = outcome(task, module, fit(task, module, max_epochs=6, callbacks=[checkpoints()]))

    path = tmp_path / "checkpoints" / f"{cut}.ckpt"
    torch.load(path, weights_only=True)
    seed_everything(2)  # a fresh process: other weights, other generators
    task, module = make_task(SCHEDULES[schedule], restart_from_best=restart), data()
    resumed = outcome(task, module, fit(task, module, max_epochs=6, callbacks=[checkpoints()], ckpt_path=path))

    assert resumed["results"] == whole["results"]
    assert resumed["rate"] == whole["rate"]
    assert resumed["drawn"] == whole["drawn"]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


def test_a_run_that_had_ended_by_patience_is_not_trained_further(scripted, scripted_data, fit, tmp_path):
    def make():
        flat = [0.5] * 9
        model = scripted(train=flat, val=flat, test=flat)
        return Classification(model, num_classes=5, optimizer=partial(torch.optim.SGD, lr=0.1), patience=2)

    task = make()
    fit(task, scripted_data(), max_epochs=9, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="last")])
    resumed = make()
    fit(resumed, scripted_data(), max_epochs=9, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.results(scripted_data()) == task.results(scripted_data())
    assert len(resumed.protocol.history["epoch"]) == 3


def test_a_run_that_diverged_at_once_and_was_resumed_gives_the_same_record(scripted, scripted_data, fit, tmp_path):
    def make():
        model = scripted(train=[0.5], val=[0.5], test=[0.5], loss=[float("nan")])
        return Classification(model, num_classes=5, optimizer=partial(torch.optim.SGD, lr=0.1))

    task, resumed = make(), make()
    fit(task, scripted_data(), max_epochs=9, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="last")])
    fit(resumed, scripted_data(), max_epochs=9, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.results(scripted_data()) == task.results(scripted_data())
    assert resumed.results(scripted_data())["metrics"]["num_leaves"] == 5


def test_random_state_is_restored_when_training_starts_not_earlier():
    seed_everything(3)
    saved = RandomState().state_dict()
    expected = torch.rand(2), np.random.rand(2), [random.random()]
    fresh = RandomState()
    fresh.load_state_dict(saved)
    seed_everything(4)
    fresh.on_train_start(None, None)
    drawn = torch.rand(2), np.random.rand(2), [random.random()]
    assert torch.equal(drawn[0], expected[0]) and (drawn[1] == expected[1]).all() and drawn[2] == expected[2]
    fresh.on_train_start(None, None)  # a later fit of the same process goes on from where it is
    assert not torch.equal(torch.rand(2), expected[0])
