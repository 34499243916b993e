"""The experts of Chen et al. 2022 (arXiv 2208.02813): convolutions over a few patches with a fixed read-out.

T rows, P patches of D / P numbers, E experts, J channels per output, O output width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fff.layers.check import check_choice, check_non_negative, check_positive
from fff.layers.contract import Record, RoutedLayer, Size
from fff.layers.init import uniform_fan_in_
from fff.ops import top_k_route
from fff.ops.activation import Activation
from fff.ops.context import exporting, without_autocast
from fff.ops.expert_mlp import choose_backend, expert_mlp

ChannelActivation = Literal["identity", "cube"]


class PatchMoE(RoutedLayer):
    """Output o of expert e is the sum of its J channels over the patches p of a row:

        f_e(x)_o = sum over p, j of  act(w_eoj . x_p + b_eoj)

    The best of E linear scores of the patch sum chooses the expert, and the score itself is its weight. In training,
    uniform noise in [0, 1) is added to the scores. One expert is a plain network, without a router and with weight 1.

    in_features, out_features: D and O; out_features defaults to in_features.  channels: J, so that an expert has J O
        hidden units.  num_patches: P; 1 takes the row as a whole.
    act_layer: "cube" (z^3) or "identity".
    init_scale: times the default initialisation of a convolution. The router starts at 0.

    Departure from the authors' code: no noise in evaluation; they never leave training mode.
    """

    router_names = ("gate_weight",)

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        num_experts: int = 8,
        channels: int = 8,
        num_patches: int = 1,
        act_layer: ChannelActivation = "cube",
        init_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        check_positive(
            in_features=in_features,
            out_features=out_features,
            num_experts=num_experts,
            channels=channels,
            num_patches=num_patches,
        )
        if in_features % num_patches:
            raise ValueError(f"in_features={in_features} must be a multiple of num_patches={num_patches}")
        check_choice("act_layer", act_layer, get_args(ChannelActivation))
        check_non_negative(init_scale=init_scale)
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.channels, self.num_patches, self.init_scale = channels, num_patches, init_scale
        self.act_layer = act_layer
        self.act: Activation = _cube if act_layer == "cube" else act_layer

        patch_width, expert_width = in_features // num_patches, channels * out_features
        self.gate_weight = nn.Parameter(torch.empty(num_experts, patch_width)) if num_experts > 1 else None
        self.w_in = nn.Parameter(torch.empty(num_experts, expert_width, patch_width))
        self.b_in = nn.Parameter(torch.empty(num_experts, expert_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts uniform in +-1/sqrt(fan in), times `init_scale`; the router 0."""
        uniform_fan_in_(self.w_in.shape[2], self.w_in, self.b_in)
        with torch.no_grad():
            self.w_in.mul_(self.init_scale)
            self.b_in.mul_(self.init_scale)
        if self.gate_weight is not None:
            nn.init.zeros_(self.gate_weight)

    @property
    def size(self) -> Size:
        """A channel counts as one hidden unit, although it sees every patch. Only multiplications with weights that
        are trained count as operations."""
        width, routers = self.channels * self.out_features, 0 if self.gate_weight is None else self.num_experts
        flops = 2 * width * self.in_features + 2 * routers * (self.in_features // self.num_patches)
        training_width = self.num_experts * width
        return Size(training_width, width, training_width + routers, width + routers, flops)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        patches = rows.unflatten(1, (self.num_patches, -1))
        index, gate = self._route(patches)
        b_in = self.b_in
        if self.act_layer == "identity":  # the sum over patches may come first
            patches, b_in = patches.sum(1, keepdim=True), self.num_patches * b_in
        # Every patch of a row goes through the expert of the row; the only one needs no dispatch.
        each = None if gate is None else index.repeat_interleave(patches.shape[1], 0)
        # Adds up the channels of each output.
        w_out = torch.eye(self.out_features, dtype=self.w_in.dtype, device=self.w_in.device)
        w_out = w_out.repeat_interleave(self.channels, 0).expand(self.num_experts, -1, -1)
        call = patches.flatten(0, 1), each, None, self.w_in, b_in, w_out, None
        backend = choose_backend("auto", *call, activation=self.act)
        y = expert_mlp(*call, activation=self.act, backend=backend).unflatten(0, (-1, patches.shape[1])).sum(1)
        if gate is not None:
            y = y * gate.to(y.dtype)
        if not exporting():
            self.record = Record(y.new_zeros(()), {}, index, self.num_experts, backend)
        return y.view(*x.shape[:-1], self.out_features)

    def _route(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.gate_weight is None:
            return torch.zeros(patches.shape[0], 1, dtype=torch.int64, device=patches.device), None
        with without_autocast(patches):
            total = patches.sum(1)
            precise = torch.promote_types(total.dtype, torch.float32)
            logits = F.linear(total.to(precise), self.gate_weight.to(precise))
        route = top_k_route.linear_top_1(logits, torch.rand_like(logits) if self.training else None)
        return route.index, route.gate

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}, "
            f"channels={self.channels}, num_patches={self.num_patches}, act_layer={self.act_layer!r}"
        )


def _cube(z: Tensor) -> Tensor:
    return z**3
