"""Two processes, each with half of the rows, train as one: by DistributedDataParallel and by FSDP2, on gloo.

Losses that are means over rows, and decision biases, are those of the whole batch. A loss that multiplies the load of a
batch by something of the same batch is that of each process's own rows, averaged, as over micro-batches.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fff import FFF, MoE, UltraFFF, aux_loss, update_biases

WHOLE = {  # equal to one process with all rows
    "no nodes": lambda: FFF(6, 2, depth=0),
    "soft": lambda: FFF(6, 2, depth=2, hardening_weight=1.0),
    "biases of a tree": lambda: FFF(6, 2, depth=3, mode="straight_through", hardening_weight=0.5, bias_update_rate=0.1),
    "biases of a mixture": lambda: MoE(6, 2, num_experts=4, router="sigmoid", z_weight=0.1, bias_update_rate=0.1),
    "neurons": lambda: UltraFFF(6, depth=3),
}
OWN_ROWS = {  # equal to one process with the rows of each in turn
    "soft": lambda: FFF(6, 2, depth=2, balance_weight=1.0, node_balance_weight=1.0),
    "deep and hard": lambda: FFF(6, 2, depth=8, mode="straight_through", balance_weight=0.5, runner_up=True),
    "mixture": lambda: MoE(6, 2, num_experts=4, importance_weight=0.1, load_weight=0.1),
    "switch": lambda: MoE(6, 2, num_experts=4, top_k=1, router="switch", balance_weight=0.5),
}
LAYERS = {("whole", name): make for name, make in WHOLE.items()} | {
    ("own rows", name): make for name, make in OWN_ROWS.items()
}
STEPS, RATE = 3, 0.2
BIAS = "1.decision_bias"


def build(make):
    """The layer within a model, so that its input needs a gradient too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), make(), nn.Linear(6, 1))


def data_parallel(model):
    return DistributedDataParallel(model)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"DDP": data_parallel, "FSDP2": sharded}


def batch(step):
    """Of 16 rows, which are more alike within a half than the halves are."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator) + torch.tensor([1.0, -1.0]).repeat_interleave(8)[:, None]


def train(model, parts, run=None):
    """Steps of SGD on the mean loss of these parts of each batch (of 2); (losses of the steps, weights and biases)."""
    run = model if run is None else run
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            torch.manual_seed(10 * step + part.start)  # noise
            loss = (run(batch(step)[part]).square().mean() + aux_loss(model)) / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        update_biases(model)
        losses.append(total)
    state = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in model.state_dict().items()}
    return losses, {name: value.detach().clone() for name, value in state.items()}


HALVES = slice(0, 8), slice(8, 16)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for wrapper, wrap in WRAPPERS.items():
        for name, make in LAYERS.items():
            model = build(make)
            found[wrapper, *name] = train(model, HALVES[rank : rank + 1], wrap(model))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check_equal(ranks, key, expected):
    (losses, state), (other_losses, other_state) = (rank[key] for rank in ranks)
    assert losses != other_losses, "each process has rows of its own"
    mean = [(a + b) / 2 for a, b in zip(losses, other_losses, strict=True)]
    assert mean == pytest.approx(expected[0], rel=1e-5)
    assert state.keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(state[name], other_state[name]), name
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_train_as_one_with_all_rows(ranks, wrapper, name):
    model = build(WHOLE[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = train(model, [slice(0, 16)])
    if "biases" in name:
        assert not torch.equal(expected[1][BIAS], before[BIAS]), "biases that never moved would be equal for nothing"
    check_equal(ranks, (wrapper, "whole", name), expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OWN_ROWS)
def test_balance_is_that_of_the_rows_of_a_process(ranks, wrapper, name):
    check_equal(ranks, (wrapper, "own rows", name), train(build(OWN_ROWS[name]), HALVES))


@pytest.mark.parametrize("name", [name for name in OWN_ROWS if name != "mixture"])
def test_balance_of_halves_is_not_that_of_all_rows(name):
    """The mixture draws noise, which alone would make the difference."""
    first, second = (train(build(OWN_ROWS[name]), parts)[0][0] for parts in (HALVES, [slice(0, 16)]))
    assert first > 1.01 * second, "halves that differ are each less balanced than both together"
