"""The expert computation alone, on given routes: its backends against one another and against torch's grouped matmul.

T rows, D input width, O output width, E experts, L expert width, K chosen experts per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.bench.cases import Candidate
from fff.bench.floor import Work
from fff.layers.contract import aux_loss
from fff.layers.fff import FFF
from fff.ops.expert_mlp import Problem, choose_backend, cpu, expert_mlp, resolve_backend

Routes = Literal["uniform", "zipf", "trained"]


class _Weights(NamedTuple):
    """w_in (E, L, D), b_in (E, L), w_out (E, L, O), b_out (E, O)."""

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor


class _Call(NamedTuple):
    """x (T, D).  index (T, K).  gate (T, K); None where K = 1.  grad (T, O): of the loss for y."""

    x: Tensor
    index: Tensor
    gate: Tensor | None
    weights: _Weights
    grad: Tensor

    def forward(self, backend: str) -> Tensor:
        return expert_mlp(self.x, self.index, self.gate, *self.weights, backend=backend)

    def evaluate(self, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": compute()}

    def differentiate(self, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
        """y and its gradients for the rows, the gates and all weights."""
        inputs = {"x": self.x, "gate": self.gate, **self.weights._asdict()}
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items() if tensor is not None}
        y = compute()
        return {
            "y": y.detach(),
            **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), self.grad), strict=True)),
        }


def expert_dispatch(
    *,
    in_features: int,
    out_features: int,
    leaf_width: int,
    num_experts: int,
    batch: int,
    peers: Sequence[str],
    choices: int = 1,
    routes: Routes = "uniform",
    gradient: bool = False,
) -> dict[str, Candidate]:
    """Chosen experts of each row, all peers on the same routes and with the same weights.

    peers: backends of `expert_mlp`; "auto", with the native operator where it is built; "auto_pytorch", without it;
        "grouped_mm". What cannot be had here (native operators, `grouped_mm` in this torch) is left out.
    choices: K, different experts for each row; above 1 with gates.
    routes: "uniform"; "zipf": the r-th expert is chosen in proportion to 1 / r; "trained": those of a tree with
        num_experts leaves that was trained straight-through with balance loss, K = 1.
    gradient: forward and backward, for the rows, gates and weights.
    """
    if routes not in get_args(Routes):
        raise ValueError(f"routes={routes!r} is none of {', '.join(get_args(Routes))}")
    if routes == "trained":
        x, index = _trained(in_features, leaf_width, num_experts, batch, choices)
    else:
        x = torch.randn(batch, in_features)
        index = _drawn(num_experts, batch, choices, skewed=routes == "zipf")
    gate = None if choices == 1 else torch.rand(batch, choices).softmax(-1)
    scale_in, scale_out = in_features**-0.5, leaf_width**-0.5
    weights = _Weights(
        *(
            torch.randn(num_experts, leaf_width, in_features) * scale_in,
            torch.randn(num_experts, leaf_width) * scale_in,
        ),
        *(torch.randn(num_experts, leaf_width, out_features) * scale_out, torch.randn(num_experts, out_features)),
    )
    call = _Call(x, index, gate, weights, torch.randn(batch, out_features))
    measured = call.differentiate if gradient else call.evaluate
    expected = measured(lambda: call.forward("reference"))
    candidates = {}
    for name in peers:
        compute, backend = _peer(name, call, gradient)
        if compute is None:
            continue
        run = partial(measured, compute)
        candidates[name] = Candidate(
            nn.Module(), run, run, lambda: expected, work=_work(call, gradient), counted=False, backend=backend
        )
    return candidates


def _peer(name: str, call: _Call, gradient: bool) -> tuple[Callable[[], Tensor] | None, str]:
    """What computes y, None where it cannot be had; and the backend that stands for it."""
    if name == "grouped_mm":
        known = call.gate is None and takes_grouped_mm(call.weights.w_out, call.x.shape[1])
        return (lambda: grouped_mm(call.x, call.index[:, 0], *call.weights)) if known else None, name
    if name == "native" and not cpu.available():
        return None, name
    if name == "auto_pytorch":
        problem = Problem(*call.x.shape, *call.weights.w_out.shape, call.index.shape[1])
        name = backend = resolve_backend("auto", problem, gradient=gradient)
    elif name == "auto":
        rows = call.x.detach().requires_grad_(gradient)
        backend = choose_backend("auto", rows, call.index, call.gate, *call.weights)
    else:
        backend = name
    return partial(call.forward, name), backend


def takes_grouped_mm(w_out: Tensor, in_features: int) -> bool:
    """Whether this torch has it, and for these sizes: its rows must be multiples of 16 bytes."""
    sizes = in_features, *w_out.shape[1:]
    return hasattr(F, "grouped_mm") and all(size * w_out.element_size() % 16 == 0 for size in sizes)


def grouped_mm(x: Tensor, leaf: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """One expert per row by `torch.nn.functional.grouped_mm`, which knows no biases: sort, two grouped products, and
    back."""
    leaf, order = torch.sort(leaf)
    offset = torch.bincount(leaf, minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
    hidden = F.relu(F.grouped_mm(x[order], w_in.mT, offs=offset) + b_in[leaf])
    out = F.grouped_mm(hidden, w_out, offs=offset) + b_out[leaf]
    return torch.empty_like(out).index_copy(0, order, out)


def _drawn(num_experts: int, batch: int, choices: int, skewed: bool) -> Tensor:
    """(T, K) different experts; skewed by the weight 1 / rank, over ranks in random order."""
    if not skewed and choices == 1:
        return torch.randint(num_experts, (batch, 1))
    weight = 1 / torch.arange(1.0, num_experts + 1) if skewed else torch.ones(num_experts)
    return torch.multinomial(weight[torch.randperm(num_experts)].expand(batch, -1), choices)


# Training of the tree whose routes are taken: enough for the balance loss to have its say and for nodes to move.
_STEPS, _TRAINING_ROWS = 150, 1024


def _trained(in_features: int, leaf_width: int, num_experts: int, batch: int, choices: int) -> tuple[Tensor, Tensor]:
    """Rows, and the leaf of each in a tree that learnt to reproduce them.

    Rows: the digits of scikit-learn, each time with fresh noise, in a random projection to in_features numbers.
    """
    from sklearn.datasets import load_digits

    depth = num_experts.bit_length() - 1
    if choices != 1 or num_experts != 2**depth:
        raise ValueError(
            f"routes='trained' needs choices=1, not {choices}, and a power of two, not {num_experts} experts"
        )
    digits = torch.tensor(load_digits().data, dtype=torch.float32)
    digits = (digits - digits.mean(0)) / digits.std().clamp(min=1e-6)
    projection = torch.randn(digits.shape[1], in_features) / digits.shape[1] ** 0.5

    def rows(number: int) -> Tensor:
        picked = digits[torch.randint(len(digits), (number,))]
        return (picked + 0.3 * torch.randn_like(picked)) @ projection

    tree = FFF(in_features, leaf_width, depth=depth, mode="straight_through", balance_weight=0.1)
    optimizer = torch.optim.AdamW(tree.parameters(), lr=1e-3)
    for _ in range(_STEPS):
        x = rows(_TRAINING_ROWS)
        (F.mse_loss(tree(x), x) + aux_loss(tree)).backward()
        optimizer.step()
        optimizer.zero_grad()
    x = rows(batch)
    with torch.no_grad():
        tree.eval()(x)
    return x, tree.record.index.clone()


def _work(call: _Call, gradient: bool) -> Work:
    """Forward: rows, outputs and the weights that are hit, once each. Backward: twice the operations; the gradients of
    rows and of those weights are written, and the gradient of the outputs is read."""
    (rows, width), outputs, leaf = call.x.shape, call.weights.w_out.shape[2], call.weights.w_in.shape[1]
    flops = 2 * call.index.numel() * leaf * (width + outputs)
    hit = call.index.unique().numel() * (leaf * (width + outputs + 1) + outputs)
    numbers = hit + rows * (width + outputs)
    size = call.x.element_size()
    return Work(3 * flops, 2 * numbers * size) if gradient else Work(flops, numbers * size)
