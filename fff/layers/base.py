"""Experts that deviate from a base: what all experts of a layer have in common is one set of parameters.

E experts, P trees (1 in a mixture), L expert width, D input width, O output width.
"""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor, nn

from fff.layers.contract import RoutedLayer

_EXPERT = ("w_in", "b_in", "w_out", "b_out")


class ExpertLayer(RoutedLayer, ABC):
    """A layer whose experts are `w_in` (E, L, D), `b_in` (E, L), `w_out` (E, L, O), `b_out` (E, O); biases may be None.

    With a base these hold how each expert deviates from `base_w_in` (P, L, D) and so on, and begin at 0: at first all
    experts are the same, and the base learns from every row. Weight decay of the `deviations()` says how far apart they
    may go: with much of it the layer is a dense one as wide as a single expert, with none its experts are their own.
    """

    def _add_base(self, groups: int) -> None:
        """Make the base of each of `groups` groups of experts, uninitialised; of 0 groups there is none."""
        for name in _EXPERT:
            own = getattr(self, name) if groups else None
            base = None if own is None else nn.Parameter(own.new_empty(groups, *own.shape[1:]))
            self.register_parameter(f"base_{name}", base)

    @property
    def has_base(self) -> bool:
        return self._tensors("base_w_in")[0] is not None

    def _begin(self) -> list[Tensor | None]:
        """What is to be initialised as the experts are, by the names of `_EXPERT`: the base where there is one, whose
        deviations become 0, else the experts themselves."""
        if not self.has_base:
            return [getattr(self, name) for name in _EXPERT]
        for deviation in self.deviations():
            nn.init.zeros_(deviation)
        return [getattr(self, f"base_{name}") for name in _EXPERT]

    def deviations(self) -> list[nn.Parameter]:
        """The parameters by which experts deviate from their base; none without one."""
        own = [getattr(self, name) for name in _EXPERT] if self.has_base else []
        return [parameter for parameter in own if parameter is not None]

    def experts(self) -> list[Tensor | None]:
        """w_in, b_in, w_out and b_out of the experts as they compute, base included."""
        own = self._tensors(*_EXPERT)
        if not self.has_base:
            return own
        base = self._tensors(*(f"base_{name}" for name in _EXPERT))
        return [None if part is None else _deviate(part, common) for part, common in zip(own, base, strict=True)]

    @torch.no_grad()
    def merge_base(self) -> None:
        """Add the base to every expert and drop it: the same function, whose evaluation then reads the chosen experts
        alone, where before each call adds the base to all of them. An optimiser that was made before knows neither."""
        for name, expert in zip(_EXPERT, self.experts(), strict=True):
            if expert is not None:
                getattr(self, name).copy_(expert)
            self.register_parameter(f"base_{name}", None)
        self.base = False  # of `arguments()`

    def _tensors(self, *names: str) -> list[Tensor | None]:
        """Parameters by name. At one row, a sixth of a call would be nn.Module's attribute lookup."""
        own = self._parameters
        return [own[name] if name in own else getattr(self, name) for name in names]  # parametrised ones are elsewhere


def _deviate(own: Tensor, base: Tensor) -> Tensor:
    return (own.unflatten(0, (base.shape[0], -1)) + base.unsqueeze(1)).flatten(0, 1)
