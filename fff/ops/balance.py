"""Balance and hardening losses: one function per published loss, each a scalar to be weighted and minimised.

T rows, E experts (leaves), K chosen experts per row, N inner nodes of a binary tree in heap order, d levels.

Half-precision inputs are reduced, and returned, in float32. A batch without rows costs 0. NaN in, NaN out.
Where a loss multiplies a hard count by a probability, the gradient flows through the probability alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _share(index: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """Fraction of the entries of `index` (-1: no entry) that hold each of 0..num-1, (num,); all 0 without entries."""
    index = index.flatten()
    if index.is_cuda and not torch.are_deterministic_algorithms_enabled():  # histc would be refused
        # Counted in shared memory: few bins would have all rows wait for each other at one address.
        count = _histogram(index, num)
        return count.to(dtype) / count.sum().clamp(min=1).to(dtype)
    kept = (index >= 0).to(torch.int64)
    count = torch.zeros(num, dtype=torch.int64, device=index.device).scatter_add_(0, index.clamp(min=0), kept)
    return count.to(dtype) / kept.sum().clamp(min=1).to(dtype)


def _histogram(index: Tensor, num: int) -> Tensor:
    """(num,) how often each of 0..num-1 occurs, in float32; exact below 2^24 entries. Bins are centred on integers."""
    return torch.histc(index.clamp(min=-1).float(), num + 1, -1.5, num - 0.5)[1:]


def cv_squared(v: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation, var(v) / mean(v)^2, of non-negative values; 0 if all of them are 0.

    The variance is that of the set itself, as in the authors' tensor2tensor code: minimum 0, maximum E - 1. Ports with
    the unbiased variance are larger by E / (E - 1). No epsilon, so that the scale of v has no influence.
    """
    v = _wide(v)
    mean = v.mean()
    return ((v - mean) / torch.where(mean == 0, torch.ones_like(mean), mean)).square().mean()


def importance(gate: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """CV^2 of the summed gates of each expert (0 where an expert is not chosen); Shazeer et al. 2017, eq. 6-7."""
    return cv_squared(_wide(gate).sum(0))


def noisy_top_k_load(
    logits: Float[Tensor, "T E"], noisy_logits: Float[Tensor, "T E"], noise_std: Float[Tensor, "T E"], k: int
) -> Float[Tensor, " E"]:
    """Smooth number of rows per expert, to be given to `cv_squared`; Shazeer et al. 2017, appendix A, eq. 8-10.

    Sums P(x, i) over the rows: the probability that expert i is among the k largest noisy logits of x when the noise
    of i alone is drawn anew. Logits are compared with logits; the sum over the experts is k T in expectation.
    noise_std is the standard deviation of the noise, > 0.
    """
    rows, num_experts = logits.shape
    logits, noisy_logits, noise_std = _wide(logits), _wide(noisy_logits), _wide(noise_std)
    if k >= num_experts:
        return logits.new_full((num_experts,), rows)
    largest = noisy_logits.topk(k + 1, dim=-1).values
    kth, next_after = largest[:, k - 1 : k], largest[:, k:]
    # The k-th largest of the others: an expert within the top k leaves its place to the (k+1)-th.
    threshold = torch.where(noisy_logits > next_after, next_after, kth)
    return torch.special.ndtr((logits - threshold) / noise_std).sum(0)


def switch(probability: Float[Tensor, "T E"], index: Int[Tensor, "T K"] | Int[Tensor, " T"]) -> Float[Tensor, ""]:
    """E * sum_i f_i P_i, f_i share of the choices on i, P_i its mean probability; Fedus et al. 2022, eq. 4.

    1 where f or P is uniform, E where all rows go to one expert for sure. `index` should be the choice before a
    capacity dropped any; -1 entries do not count. With K > 1, f is still a share of all choices (sums to 1).
    """
    probability = _wide(probability)
    rows, num_experts = probability.shape
    share = _share(index, num_experts, probability.dtype)
    return num_experts * (share * probability.sum(0)).sum() / max(rows, 1)


def z_loss(logits: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Mean over the rows of (log sum_i exp logits_i)^2; keeps router logits small; Zoph et al. 2022 (ST-MoE), eq. 5."""
    return _wide(logits).logsumexp(-1).square().sum() / max(logits.shape[0], 1)


def leaf_balance(
    leaf_probability: Float[Tensor, "T E"], leaf: Int[Tensor, "T K"] | Int[Tensor, " T"]
) -> Float[Tensor, ""]:
    """The Switch loss over the leaves of a tree: probabilities of the soft mixture, leaves of the hard route.

    Charalampopoulos et al. 2024 (arXiv 2405.16836), L_balance, as in the authors' code.
    """
    return switch(leaf_probability, leaf)


def path_balance(child: Int[Tensor, "T d"], right_probability: Float[Tensor, "T d"], depth: int) -> Float[Tensor, ""]:
    """Switch losses of the visited nodes over their two children, summed over levels; needs the path alone.

    Ours, the logarithmic-time form of `leaf_balance`: at level m a row costs 2^(m+1) [c f(right) + (1 - c) f(left)],
    c = right_probability, f(child) = share of all rows that enter that child. Summed, not averaged, so that a node's
    gradient does not shrink with depth (as in `leaf_balance`); less d - 1, so that it is 1 where rows spread evenly.
    child: heap index (1 .. 2^(depth+1) - 2) of the child that the row enters from each node of its path.
    """
    rows = child.shape[0]
    right_probability = _wide(right_probability)
    if depth == 0:
        return right_probability.sum()
    # Shares of all T * depth entries, hence the factor depth.
    share = depth * _share(child, 2 ** (depth + 1) - 1, right_probability.dtype)
    left = (child - 1) // 2 * 2 + 1
    width = 2 ** torch.arange(1, depth + 1, device=child.device)
    cost = right_probability * share[left + 1] + (1 - right_probability) * share[left]
    return ((width * cost).sum() - (depth - 1) * rows) / max(rows, 1)


def node_balance(logits: Float[Tensor, "T N"]) -> Float[Tensor, ""]:
    """- sum_i 2^-depth(i) 1/2 [log a_i + log(1 - a_i)]; Frosst & Hinton 2017, section 3.2 (there times lambda).

    a_i is the mean probability of going right at node i over the rows, each weighted by its probability of reaching i.
    Minimum depth * log 2, where every node splits its mass evenly. Departure: a_i is taken over this
    batch, not over a moving window of batches. Evaluated in log space, so that saturated nodes have a finite gradient.
    """
    logits = _wide(logits)
    rows, num_nodes = logits.shape
    if rows == 0 or num_nodes == 0:
        return logits.sum()
    cost = logits.new_zeros(())
    log_reach = logits.new_zeros(rows, 1)
    weight, first = 1.0, 0
    while first < num_nodes:
        level = logits[:, first : 2 * first + 1]
        left, right = log_reach + F.logsigmoid(-level), log_reach + F.logsigmoid(level)
        log_split = left.logsumexp(0) + right.logsumexp(0) - 2 * log_reach.logsumexp(0)
        cost = cost - weight * 0.5 * log_split.sum()
        log_reach = torch.stack([left, right], dim=-1).flatten(1)
        weight, first = weight / 2, 2 * first + 1
    return cost


def hardening_entropy(logits: Float[Tensor, " *any"]) -> Float[Tensor, ""]:
    """Mean entropy in nats of the Bernoulli decisions with these logits; Belcak & Wattenhofer 2023, L_harden.

    The mean over rows and nodes is what the authors' code computes, and what their weight h = 3.0 belongs to; the paper
    prints a sum. Between 0 and log 2. Value and gradient are finite for every finite logit.
    """
    # The entropy is even in the logit; on |logit| both terms are positive, so that nothing cancels.
    size = _wide(logits).abs()
    return (F.softplus(-size) + size * torch.sigmoid(-size)).sum() / max(logits.numel(), 1)


@torch.no_grad()
def bias_step(
    bias: Float[Tensor, " E"], load: Float[Tensor, " E"] | Int[Tensor, " E"], rate: float
) -> Float[Tensor, " E"]:
    """New routing bias, bias + rate * sign(mean load - load): overloaded experts become less likely to be chosen.

    Wang et al. 2024 (arXiv 2408.15664), algorithm 1; DeepSeek-V3, section 2.1.2.
    """
    load = load.to(torch.float32)
    return bias + rate * (load.mean() - load).sign().to(bias.dtype)
