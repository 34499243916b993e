"""The mixture-of-experts layer: a flat router scores all experts and sends each row to the best few.

T rows, D input width, O output width, E experts, L expert width, K chosen experts per row.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.layers.base import ExpertLayer
from fff.layers.check import (
    check_above_zero,
    check_choice,
    check_non_negative,
    check_positive,
    check_probability,
    check_width,
)
from fff.layers.contract import Record, Size
from fff.layers.init import uniform_fan_in_
from fff.ops import balance, top_k_route
from fff.ops.activation import Activation, resolve_activation
from fff.ops.context import exporting, without_autocast
from fff.ops.expert_mlp import HARD_BACKENDS, Backend, choose_backend, expert_mlp
from fff.ops.top_k_route import TopKRoute

Router = Literal["noisy_top_k", "switch", "mixtral", "soft", "sigmoid", "expert_choice"]


class MoE(ExpertLayer):
    """Mixture of two-layer experts behind a linear router; `fff.ops.top_k_route` defines each router.

    in_features, expert_width, out_features: D, L and O; out_features defaults to in_features.
    num_experts, top_k: E and K. "switch" takes K = 1 and "soft" K = E, for both None will do.
    router: "noisy_top_k" (Shazeer et al. 2017), "switch", "mixtral", "soft", "sigmoid" (DeepSeek-V3), or
        "expert_choice", where each expert takes its ceil(K T / E) best rows of the batch: outputs depend on the other
        rows, in evaluation as well. With K = 1 the gates of "noisy_top_k", "mixtral" and "sigmoid" are 1, so that
        their router has no gradient from the task; "switch" is made for it.
    capacity_factor: at most ceil(factor K T / E) rows per expert in training, choices beyond are dropped; evaluation
        drops none. For "expert_choice" it scales the rows that each expert takes, also in evaluation. None is dropless.
    importance_weight: times the squared variation of summed gates.  load_weight: times that of the smooth load
        ("noisy_top_k" only).  balance_weight: times the Switch loss (not for "soft" and "expert_choice", which are
        even by themselves).  z_weight: times the router z-loss.
    bias_update_rate: > 0 balances by decision biases without a loss ("sigmoid" only); call `fff.update_biases(model)`
        after each step. In bfloat16 the biases lose their small steps: keep parameters in float32 and train under
        autocast.
    jitter: half-width of the uniform noise around 1 that multiplies the router's input in training (Switch: 1e-2).
    shared_width: width of a dense expert that sees every row with weight 1; 0 is none.
    base: the experts deviate from one that they have in common (`ExpertLayer`).
    act_layer, glu, bias, drop: activation (a name of `fff.ops.activation`, a function or a module class), gated hidden
        units, biases of the experts, dropout of their hidden units.

    Without a balance loss (or bias_update_rate) experts fall out of use. The four loss weights, bias_update_rate,
    top_k, capacity_factor, jitter and drop may be changed between steps. Auxiliary losses and noise belong to training
    mode. The router decides in float32 where x is of half precision.
    """

    router_names = ("gate_weight", "noise_weight")

    def __init__(
        self,
        in_features: int,
        expert_width: int,
        out_features: int | None = None,
        *,
        num_experts: int,
        top_k: int | None = 2,
        router: Router = "noisy_top_k",
        capacity_factor: float | None = None,
        importance_weight: float = 0.0,
        load_weight: float = 0.0,
        balance_weight: float = 0.0,
        z_weight: float = 0.0,
        bias_update_rate: float = 0.0,
        jitter: float = 0.0,
        shared_width: int = 0,
        base: bool = False,
        act_layer: Activation = "relu",
        glu: bool = False,
        bias: bool = True,
        drop: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        check_choice("router", router, get_args(Router))
        check_positive(
            in_features=in_features, expert_width=expert_width, out_features=out_features, num_experts=num_experts
        )
        top_k = {"switch": 1, "soft": num_experts}.get(router) if top_k is None else top_k
        check_positive(top_k=top_k)
        check_non_negative(
            importance_weight=importance_weight,
            load_weight=load_weight,
            balance_weight=balance_weight,
            z_weight=z_weight,
            bias_update_rate=bias_update_rate,
        )
        check_width(shared_width=shared_width)
        check_probability(jitter=jitter, drop=drop)
        if capacity_factor is not None:
            check_above_zero(capacity_factor=capacity_factor)
        if capacity_factor is not None and router == "soft":
            raise ValueError(f"capacity_factor={capacity_factor!r}, but router='soft' drops nothing")
        check_choice("backend", backend, ("auto", "reference", "dense", *(() if router == "soft" else HARD_BACKENDS)))
        self.in_features, self.expert_width, self.out_features = in_features, expert_width, out_features
        self.num_experts, self.top_k, self.router, self.capacity_factor = num_experts, top_k, router, capacity_factor
        self.importance_weight, self.load_weight = importance_weight, load_weight
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.bias_update_rate, self.jitter, self.shared_width = bias_update_rate, jitter, shared_width
        self._check_settings()
        self.act, self.glu, self.drop, self.backend = resolve_activation(act_layer, "act_layer"), glu, drop, backend

        self.gate_weight = nn.Parameter(torch.empty(num_experts, in_features))
        noisy = router == "noisy_top_k"
        self.noise_weight = nn.Parameter(torch.empty(num_experts, in_features)) if noisy else None
        rows = expert_width * (2 if glu else 1)
        self.w_in = nn.Parameter(torch.empty(num_experts, rows, in_features))
        self.b_in = nn.Parameter(torch.empty(num_experts, rows)) if bias else None
        self.w_out = nn.Parameter(torch.empty(num_experts, expert_width, out_features))
        self.b_out = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self._add_base(int(base))
        if shared_width:
            rows = shared_width * (2 if glu else 1)
            self.shared_w_in = nn.Parameter(torch.empty(1, rows, in_features))
            self.shared_b_in = nn.Parameter(torch.empty(1, rows)) if bias else None
            self.shared_w_out = nn.Parameter(torch.empty(1, shared_width, out_features))
            self.shared_b_out = nn.Parameter(torch.empty(1, out_features)) if bias else None
        self.register_buffer("decision_bias", torch.zeros(num_experts) if router == "sigmoid" else None)
        self.reset_parameters()

    def _check_settings(self) -> None:
        """Those that may be changed between steps and that the router must have a use for."""
        router, num_experts, top_k = self.router, self.num_experts, self.top_k
        only = {"switch": 1, "soft": num_experts}.get(router, top_k)
        if top_k != only:
            raise ValueError(f"top_k={top_k}, but router={router!r} with num_experts={num_experts} takes {only}")
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} exceeds num_experts={num_experts}")
        if self.load_weight and router != "noisy_top_k":
            raise ValueError(
                f"load_weight={self.load_weight!r} needs the noise of 'noisy_top_k', not router={router!r}"
            )
        if self.balance_weight and router in ("soft", "expert_choice"):
            raise ValueError(f"balance_weight={self.balance_weight!r}, but router={router!r} loads all experts alike")
        if self.bias_update_rate and router != "sigmoid":
            raise ValueError(f"bias_update_rate={self.bias_update_rate!r} needs router='sigmoid', not {router!r}")

    def reset_parameters(self) -> None:
        """Experts uniform in +-1/sqrt(fan in), as `nn.Linear`. A router with noise starts at 0 (Shazeer et al. 2017,
        appendix A): all experts equally likely. Without noise 0 would send every row to the same K: as the experts."""
        if self.noise_weight is not None:
            nn.init.zeros_(self.gate_weight)
            nn.init.zeros_(self.noise_weight)
        else:
            uniform_fan_in_(self.in_features, self.gate_weight)
        w_in, b_in, w_out, b_out = self._begin()
        uniform_fan_in_(self.in_features, w_in, b_in)
        uniform_fan_in_(self.expert_width, w_out, b_out)
        if self.shared_width:
            uniform_fan_in_(self.in_features, self.shared_w_in, self.shared_b_in)
            uniform_fan_in_(self.shared_width, self.shared_w_out, self.shared_b_out)
        if self.decision_bias is not None:
            self.decision_bias.zero_()

    @property
    def mixes_rows(self) -> bool:
        return self.router == "expert_choice"

    @property
    def size(self) -> Size:
        """The router evaluates all E scores for every row; its noise, trained with it, is not counted. With
        "expert_choice" a row has K experts, times the capacity factor, in the mean of a batch."""
        chosen = self.top_k
        if self.router == "expert_choice" and self.capacity_factor is not None:
            chosen = min(self.capacity_factor * chosen, self.num_experts)
        training_width = self.num_experts * self.expert_width + self.shared_width
        inference_width = math.ceil(chosen * self.expert_width) + self.shared_width
        unit_flops = 2 * (self.in_features * (2 if self.glu else 1) + self.out_features)
        return Size(
            training_width,
            inference_width,
            training_width + self.num_experts,
            inference_width + self.num_experts,
            2 * self.in_features * self.num_experts + inference_width * unit_flops,
        )

    def forward(self, x: Tensor) -> Tensor:
        self._check_settings()
        rows = self.rows(x)
        soft = self.router == "soft"
        route = chosen = self._route(rows)
        if self.training and self.capacity_factor is not None and self.router != "expert_choice":
            route = top_k_route.apply_capacity(chosen, self._capacity(rows, self.capacity_factor))
        drop = self.drop if self.training else 0.0
        compute = partial(expert_mlp, activation=self.act, glu=self.glu, dropout=drop)
        index, gate = None if soft else route.index, route.gate.to(rows.dtype)
        call = rows, index, gate, *self.experts()
        backend = choose_backend(self.backend, *call, activation=self.act, dropout=drop)
        y = compute(*call, backend=backend)
        if self.shared_width:
            y = y + compute(rows, None, None, self.shared_w_in, self.shared_b_in, self.shared_w_out, self.shared_b_out)
        if not exporting():
            # Losses see the choice as the router made it: dropped rows are what they should prevent.
            losses = self._losses(chosen) if self.training else {}
            aux = chosen.logits.new_zeros(())
            for name, loss in losses.items():
                aux = aux + getattr(self, f"{name}_weight") * loss
            raw = {name: loss.detach() for name, loss in losses.items()}
            demand = None if route is chosen else chosen.index
            self.record = Record(aux, raw, route.index, self.num_experts, backend, demand=demand)
        return y.view(*x.shape[:-1], self.out_features)

    def _capacity(self, rows: Tensor, factor: float) -> int:
        # Rounded, lest 1.1 * 100 / 11 be 11.
        return math.ceil(round(factor * self.top_k * rows.shape[0] / self.num_experts, 6))

    def _route(self, rows: Tensor) -> TopKRoute:
        routed = _at_least_float32(rows) if self.training else rows
        if self.training and self.jitter:
            routed = routed * torch.empty_like(routed).uniform_(1 - self.jitter, 1 + self.jitter)
        with without_autocast(routed):
            logits = self._scores(routed)
            noise = None
            if self.training and self.noise_weight is not None:
                noise = F.linear(routed, _at_least_float32(self.noise_weight))
        if self.router == "noisy_top_k":
            return top_k_route.noisy_top_k(logits, self.top_k, noise, with_load=self.load_weight != 0)
        if self.router == "mixtral":
            return top_k_route.mixtral(logits, self.top_k)
        if self.router == "sigmoid":
            return top_k_route.sigmoid_bias(logits, self.top_k, self.decision_bias)
        if self.router == "expert_choice":
            return top_k_route.expert_choice(logits, self._capacity(rows, self.capacity_factor or 1.0))
        return top_k_route.switch(logits) if self.router == "switch" else top_k_route.soft(logits)

    def _scores(self, rows: Tensor) -> Tensor:
        """(T, E) in float32 at least. Products of half-precision numbers are exact in float32, so where no gradient is
        wanted a GPU multiplies them as they are."""
        weight = self.gate_weight
        half = rows.is_cuda and rows.dtype == weight.dtype and weight.dtype in (torch.float16, torch.bfloat16)
        gradient = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
        if half and not gradient and _MM_WIDENS and not torch.compiler.is_compiling():
            return torch.mm(rows, weight.T, out_dtype=torch.float32)
        return F.linear(_at_least_float32(rows), _at_least_float32(weight))

    def _losses(self, route: TopKRoute) -> dict[str, Tensor]:
        losses = {}
        if self.importance_weight:
            losses["importance"] = balance.importance(route.full_gate)
        if self.load_weight:
            losses["load"] = balance.cv_squared(route.load)
        if self.balance_weight:
            losses["balance"] = balance.switch(route.probability, route.index)
        if self.z_weight:
            losses["z"] = balance.z_loss(route.logits)
        return losses

    @torch.no_grad()
    def update_bias(self) -> None:
        """Shift the decision biases by `bias_update_rate` towards the experts that the last forward used less."""
        if self.bias_update_rate and self.record is not None:
            load = self.record.demanded_load
            self.decision_bias.copy_(balance.bias_step(self.decision_bias, load, self.bias_update_rate))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, expert_width={self.expert_width}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, router={self.router!r}, "
            f"capacity_factor={self.capacity_factor}, shared_width={self.shared_width}, glu={self.glu}, "
            f"base={self.has_base}, bias={self.b_in is not None}, drop={self.drop}"
        )


# `out_dtype` is older, but dynamo could not trace it, nor ROCm run it.
_MM_WIDENS = torch.__version__ >= (2, 11) and torch.version.hip is None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
