"""Lightning on two processes, each with half of the rows, trains as on one with all, auxiliary loss included."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import fff
from fff.models import GPT, Classifier
from fff.tasks import Classification, LanguageModeling

# Its loss and its biases are those of the whole batch; a balance loss is not (tests/layers/test_distributed.py).
TREE = partial(fff.FFF, leaf_width=2, depth=2, mode="straight_through", hardening_weight=1.0, bias_update_rate=0.1)
OPTIMIZER = partial(torch.optim.SGD, lr=0.2)


class WithoutSchedule(LanguageModeling):
    """Its schedule asks the data module of a run for its length."""

    def configure_optimizers(self):
        return self.build_optimizer()


def classification():
    x, y = torch.randn(32, 4), torch.arange(32) % 5
    return Classification(Classifier(TREE, 4, 5), num_classes=5, optimizer=OPTIMIZER), x, y


def language_modeling():
    tokens = torch.randint(11, (32, 10))
    model = GPT(TREE, (9,), 11, dim=16, depth=2, heads=2)
    return WithoutSchedule(model, optimizer=OPTIMIZER), tokens[:, :-1], tokens[:, 1:]


TASKS = {make.__name__: make for make in (classification, language_modeling)}


def train(name, folder, rank=0, devices=1):
    """Two steps of 16 rows; means of the losses, and the weights."""
    torch.manual_seed(0)
    task, x, y = TASKS[name]()
    rows = torch.arange(32).view(-1, devices)[:, rank]
    loader = DataLoader(TensorDataset(x[rows], y[rows]), batch_size=16 // devices)
    Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,  # the rows are dealt out above
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    ).fit(task, loader)
    return task.pop_epoch_losses(), task.model.state_dict()


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that its processes are there
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({name: train(name, folder, rank, devices=2) for name in TASKS}, f"{folder}/{rank}.pt")
    # Lightning has destroyed the group if it made it its own.
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_train_as_one(ranks, name, tmp_path):
    losses, weights = train(name, tmp_path)
    (first, state), (second, other_state) = (rank[name] for rank in ranks)
    assert losses.keys() == first.keys() == {"loss", "aux_loss", "hardening"}
    assert losses["aux_loss"] == pytest.approx(losses["hardening"]) and losses["aux_loss"] > 0.1
    assert first != second, "each process has rows of its own"
    for key, value in losses.items():
        assert (first[key] + second[key]) / 2 == pytest.approx(value, rel=1e-5), key
    for key, value in weights.items():
        assert torch.equal(state[key], other_state[key]), key
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
