"""`expert_mlp` as an experts implementation of transformers (`transformers.integrations.moe`).

T rows, D model width, E experts, L expert width, K chosen experts per row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fff.adapt.blocks import module_activation
from fff.ops.expert_mlp import Backend, expert_mlp


def register_experts(name: str = "fff", backend: Backend = "grouped") -> None:
    """Make `experts_implementation=name` known to transformers (5.7 or newer), for `from_pretrained`, `from_config` and
    `model.set_experts_implementation`; the experts then run through `fff.ops.expert_mlp`.

    backend: see `fff.ops.expert_mlp`. "grouped" reads the weights where they lie; "native" and "triton" want the second
        map of the experts transposed, which most models would have copied at every call.

    What cannot be computed is refused by a ValueError when the model runs: see `experts_forward`.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, partial(experts_forward, backend=backend))


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    backend: Backend = "grouped",
) -> Tensor:
    """The forward pass of a module that `use_experts_implementation` decorates; values and gradients of "eager".

    self: with `gate_up_proj` (E, 2 L, D), gates first, or without gates `up_proj` (E, L, D); `down_proj` (E, D, L);
        transposed both the other way. Their biases, if it has any, end in `_bias`.
    hidden_states (T, D), top_k_index and top_k_weights (T, K); an index of E is left out (expert parallelism). Weights
    of the choices are rounded to the type of the experts.

    ValueError for gates of a formula of their own, such as gpt-oss, where they alternate with the values and are cut
    off, and for a norm behind the experts.
    """
    _check_layout(self)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    w_in, w_out = getattr(self, first), self.down_proj
    w_in, w_out = (w_in.mT, w_out) if self.is_transposed else (w_in, w_out.mT)
    b_in, b_out = (getattr(self, f"{first}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    y = expert_mlp(
        hidden_states.to(w_in.dtype),
        torch.where(top_k_index < w_in.shape[0], top_k_index, -1),
        top_k_weights.to(w_in.dtype),
        w_in,
        b_in,
        w_out,
        b_out,
        activation=module_activation(self),
        glu=self.has_gate,
        backend=backend,
    )
    return y.to(hidden_states.dtype)


def _check_layout(experts: nn.Module) -> None:
    name = type(experts).__name__
    # The library gives its own formula, act(gate) * value with all gates first, to the classes that have none.
    if experts.has_gate and type(experts)._apply_gate.__module__ != "transformers.integrations.moe":
        raise ValueError(f"{name} has a formula of its own for its gates; fff computes act(gate) * value")
    if getattr(experts, "has_post_expert_norm", False):  # older versions know of none
        raise ValueError(f"{name} has a norm behind its experts, which fff does not compute")
