"""Two processes: every parameter gets its gradient, and decision biases follow the load of both."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fff import FFF, MoE, UltraFFF, aux_loss, update_biases

LAYERS = {
    "no nodes": lambda: FFF(6, 2, depth=0),
    "soft": lambda: FFF(6, 2, depth=2, hardening_weight=1.0),
    "deep and hard": lambda: FFF(6, 2, depth=8, mode="straight_through", balance_weight=0.1),
    "mixture": lambda: MoE(6, 2, num_experts=4, top_k=2, importance_weight=0.1, load_weight=0.1),
    "neurons": lambda: UltraFFF(6, depth=3),
}


def train(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gradients = {}
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        layer = make()
        model = DistributedDataParallel(layer)
        torch.manual_seed(1 + rank)
        for _ in range(2):  # a parameter left out of the first pass would stop the second
            (model(torch.randn(8, 6)).square().sum() + aux_loss(layer)).backward()
        gradients[name] = [p.grad for p in layer.parameters() if p.grad is not None]

    torch.manual_seed(0)
    balanced = FFF(1, 1, depth=1, mode="straight_through", bias_update_rate=0.5)
    with torch.no_grad():
        balanced.node_weight.fill_(1.0), balanced.node_bias.zero_()
    # Rank 0 sends 6 rows right, rank 1 sends 4 rows left: together more go right.
    balanced(torch.ones(6, 1) if rank == 0 else -torch.ones(4, 1))
    update_biases(balanced)
    torch.save({"gradients": gradients, "bias": balanced.decision_bias}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["bias"].tolist() == second["bias"].tolist() == [-0.5]
    for name in LAYERS:
        assert first["gradients"][name], name
        for a, b in zip(first["gradients"][name], second["gradients"][name], strict=True):
            assert torch.equal(a, b), name
