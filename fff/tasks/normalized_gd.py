"""The optimiser of Chen et al. 2022 (arXiv 2208.02813): normalised gradient descent for experts, plain for routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class NormalizedGD(Optimizer):
    """Each expert moves by the same length, however small its gradient, so that none is left behind.

        expert e:  w <- w - lr * g / sum over its tensors of |g|        router:  w <- w - router_lr * g

    The sum (of weights' and biases' norms) is that of the authors' code; their theory has the norm of all together. An
    expert without a row has gradient 0 and stays.

    params: names and parameters. What is called `gate_weight` is a router; all others hold the experts along axis 0.
    """

    def __init__(self, params: Iterable[tuple[str, Tensor]], lr: float, router_lr: float) -> None:
        for name, value in (("lr", lr), ("router_lr", router_lr)):
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be > 0")
        params = list(params)
        if any(isinstance(entry, dict) for entry in params):
            raise ValueError(
                "NormalizedGD makes its groups itself: it takes no router_lr_factor (router_lr is its own) and no"
                " deviation_decay, and trains no language model"
            )
        experts, routers = [], []
        for name, parameter in params:
            (routers if name.rpartition(".")[2] == "gate_weight" else experts).append((name, parameter))
        groups = [{"params": experts, "normalized": True}, {"params": routers, "normalized": False, "lr": router_lr}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            length = torch.ones(())
            if group["normalized"]:
                length = torch.stack([p.grad.flatten(1).norm(dim=1) for p in moved]).sum(0)
                length = torch.where(length > 0, length, 1.0)
            for p in moved:
                p.sub_(group["lr"] * p.grad / length.to(p).view(-1, *[1] * (p.dim() - 1)))
        return loss
