"""Flat routing: which K of E experts each row goes to, and with which gate; one function per published router.

T rows, E experts, K chosen experts per row.

All choices are deterministic given the logits (and the noise): the larger logit wins, and of equal logits the one with
the lower index, which `torch.topk` does not promise. NaN counts as the largest value, so a row of NaN goes to the first
K experts with NaN gates; it neither raises nor touches other rows of a token-choice router.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fff.ops.balance import noisy_top_k_load
from fff.ops.largest import largest

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class TopKRoute(NamedTuple):
    """Where the rows go.

    index: (T, K) int64, best first (except `soft` and `expert_choice`); -1 where there is no expert: gate 0.
    gate: (T, K) weight of each choice; differentiable.
    probability: (T, E) mass over all experts, chosen or not, each row sums to 1; what `balance.switch` needs.
    logits: (T, E) router logits without noise and bias; what `balance.z_loss` needs.
    load: (E,) smooth number of rows per expert, `balance.noisy_top_k_load`; None without noise.
    """

    index: Int[Tensor, "T K"]
    gate: Float[Tensor, "T K"]
    probability: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]
    load: Float[Tensor, " E"] | None = None

    @property
    def full_gate(self) -> Float[Tensor, "T E"]:
        """Gate of every expert, 0 where it was not chosen; what `balance.importance` needs."""
        return torch.zeros_like(self.probability).scatter_add(1, self.index.clamp(min=0), self.gate)


def noisy_top_k(
    logits: Float[Tensor, "T E"],
    k: int,
    noise_logits: Float[Tensor, "T E"] | None = None,
    *,
    noise: Float[Tensor, "T E"] | None = None,
    noise_floor: float = 1e-2,
    with_load: bool = True,
) -> TopKRoute:
    """Softmax over the k largest noisy logits; Shazeer et al. 2017, eq. 3-5, with the smooth load of eq. 8-9.

    H = logits + noise * (softplus(noise_logits) + noise_floor); no noise and no load where `noise_logits` is None, as
    in evaluation. The floor is not in the paper but in the authors' code; it keeps the load finite. `noise` is standard
    normal, drawn here if not given. With k = 1 the gate is the constant 1, so that the task trains no router: use
    `switch`.
    """
    noisy, load = logits, None
    if noise_logits is not None:
        std = F.softplus(noise_logits) + noise_floor
        noisy = logits + std * (torch.randn_like(logits) if noise is None else noise)
        load = noisy_top_k_load(logits, noisy, std, k) if with_load else None
    index = largest(noisy, k)
    return TopKRoute(index, noisy.gather(1, index).softmax(-1), noisy.softmax(-1), logits, load)


def mixtral(logits: Float[Tensor, "T E"], k: int) -> TopKRoute:
    """Softmax over the k largest logits; Jiang et al. 2024 (Mixtral), section 2.1: `noisy_top_k` without noise."""
    return noisy_top_k(logits, k)


def switch(logits: Float[Tensor, "T E"]) -> TopKRoute:
    """The most probable expert, gated with its probability among all; Fedus et al. 2022, eq. 1-2.

    The paper's jitter multiplies the router's input, before the logits: it belongs to the caller.
    """
    index = largest(logits, 1)
    probability = logits.softmax(-1)
    return TopKRoute(index, probability.gather(1, index), probability, logits)


def linear_top_1(logits: Float[Tensor, "T E"], noise: Float[Tensor, "T E"] | None = None) -> TopKRoute:
    """The largest of logits + noise, which is itself the gate, of either sign; Chen et al. 2022 (arXiv 2208.02813), as
    in the authors' code. Their noise is uniform in [0, 1), at test as well."""
    noisy = logits if noise is None else logits + noise
    index = largest(noisy, 1)
    return TopKRoute(index, noisy.gather(1, index), noisy.softmax(-1), logits)


def soft(logits: Float[Tensor, "T E"]) -> TopKRoute:
    """Every expert, gated with its probability; Jacobs et al. 1991. Index columns are in expert order."""
    probability = logits.softmax(-1)
    index = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    return TopKRoute(index, probability, probability, logits)


def sigmoid_bias(logits: Float[Tensor, "T E"], k: int, bias: Float[Tensor, " E"] | None = None) -> TopKRoute:
    """The k largest sigmoid(logits) + bias, gated with sigmoids normalised over the chosen; DeepSeek-V3, eq. 13-16.

    The bias (`balance.bias_step`) decides and does not gate. `probability` is normalised over all experts, as in the
    paper's eq. 19. Departure: no scaling factor on the gates.
    """
    score = logits.detach().sigmoid()
    index = largest(score if bias is None else score + bias, k)
    # softmax(log sigmoid) is the normalised sigmoid, also where every sigmoid underflows.
    log_score = F.logsigmoid(logits)
    return TopKRoute(index, log_score.gather(1, index).softmax(-1), log_score.softmax(-1), logits)


def expert_choice(logits: Float[Tensor, "T E"], capacity: int) -> TopKRoute:
    """Each expert takes the `capacity` rows that it is most probable for; Zhou et al. 2022, eq. 1-2.

    K = E: column i of `index` is i where expert i took the row and -1 elsewhere; a row may go to any number of experts,
    none included. The choice of a row depends on the other rows of the batch, in evaluation as well.
    """
    rows, num_experts = logits.shape
    if capacity < 0:
        raise ValueError(f"capacity={capacity}, expected >= 0")
    probability = logits.softmax(-1)
    order = probability.detach().T.argsort(dim=-1, descending=True, stable=True)
    # Comparing places, not slicing the order, keeps the number of taken rows out of the shapes of an exported graph.
    place = torch.empty_like(order).scatter(1, order, torch.arange(rows, device=order.device).expand_as(order))
    taken = (place < capacity).T
    index = torch.where(taken, torch.arange(num_experts, device=logits.device), -1)
    return TopKRoute(index, probability * taken, probability, logits)


def apply_capacity(route: TopKRoute, capacity: int) -> TopKRoute:
    """Keep the first `capacity` choices of each expert and drop the others: index -1, gate 0.

    First choices of all rows come before second choices, and rows in their order: the queue of GShard (Lepikhin et al.
    2021, algorithm 1) and Switch. The gates that remain are not normalised again; a row that lost all gets 0.
    """
    if capacity < 0:
        raise ValueError(f"capacity={capacity}, expected >= 0")
    rows, k = route.index.shape
    queue = route.index.T.flatten()
    expert, order = queue.sort(stable=True)
    # Place within its expert's queue: position in the sorted list, less the position where the expert's choices begin.
    begin = torch.searchsorted(expert, expert)
    place = torch.empty_like(queue).scatter(0, order, torch.arange(rows * k, device=queue.device) - begin)
    kept = ((place < capacity) & (queue >= 0)).view(k, rows).T
    return route._replace(index=torch.where(kept, route.index, -1), gate=route.gate * kept)
