"""The GShard router: each token goes to its best expert, and to its second best with a probability that depends on its
weight.

    z = x W                          logits
    S = the 2 largest of z           the lowest index wins a tie
    g = softmax(z_S)                 g₁ + g₂ = 1
    w = (g₁, k g₂),  k = [2 g₂ > u]  u ~ U(0, 1), only in training

A second expert with a small weight is usually dropped, which saves its work. The weights are normalised before the
second expert is dropped, so g₁ = 1 − g₂ still depends on both logits. The gate therefore learns even from a token with
only one expert left. The mean of w₂ over u is 2 g₂².

``second_expert`` chooses how training treats the second expert:

    random      the second best, kept by chance as above
    sampling    drawn from the probabilities of all but the best, by Gumbel noise; always kept
    all         the second best, always kept

In training an expert accepts at most 2T/E entries of a sequence of T tokens, unless the recipe sets another capacity
factor. In evaluation no noise is used, both experts are kept, and no entry is refused: this is Mixtral's top 2.

As in the paper: the normalised pair, the probability 2 g₂, and the capacity 2T/E of a group of T tokens. Unlike the
paper: a group is one sequence, and its entries are accepted in reading order. (GShard accepts all first choices of a
group before any second one, so a later token can take the place of an earlier token's second choice.) There is no
capacity in evaluation, and the balance loss counts every expert that a token asks for, not only the first.

Lepikhin et al. 2020, arXiv 2006.16668.
Lesson: lessons/20_switch_and_gshard.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import routing
from minimoe.layers.capacity import within_capacity
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import Choice, RouterStats, Routing

CAPACITY_FACTOR = 1.0
"""The capacity factor of training if the recipe sets none: with two entries per token, 1 means 2T/E entries."""


class GShard(NamedTuple):
    w_gate: Array  # (D, E)


class Cache(NamedTuple):
    x: Array  # (N, D)
    logits: Array  # (N, E)
    probability: Array  # (N, E)
    lse: Array  # (N, 1)
    chosen: Array  # (N, 2)
    gate: Array  # (N, 2)  g
    asked: Array  # (N, 2)  1, or 0 for a second expert that chance dropped
    noise: Array | None  # (N, 1)  u, or (N, E) for ``sampling``
    second_expert: str
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    place: Array  # (N, 2)  the index of each of a token's entries in the routing
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` unless ``config`` sends each token to two experts."""
    if config.active_experts != 2:
        raise UserError(
            f"active_experts {config.active_experts} is not possible with the router 'gshard', which sends each token "
            "to two experts: set active_experts to 2."
        )


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> GShard:
    """W drawn from N(0, 0.02²), so that the first probabilities are nearly equal."""
    return GShard((0.02 * rng.standard_normal((config.width, config.experts))).astype(dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> GShard:
    """The parameters, each made by calling ``array`` with its shape."""
    return GShard(array((config.width, config.experts)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> Array | None:
    """The noise for tokens of a ``shape`` such as (L, B, T), by the policy ``second_expert``.

    ``random``: u, uniform in [0, 1), (L, B, T, 1). ``sampling``: Gumbel noise, (L, B, T, E). ``all``, or no noisy
    gating: None, and training keeps both experts.
    """
    if not config.noisy_gating or config.second_expert == "all":
        return None
    if config.second_expert == "sampling":
        return rng.gumbel(size=(*shape, config.experts)).astype(dtype)
    kind: Any = np.dtype(dtype).type
    noise: Array = rng.random((*shape, 1), kind)
    return noise


def forward(
    params: GShard, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, at most two entries per token, and the sums over them."""
    xp = array_module(x)
    B, _, D = x.shape
    rows = x.reshape(-1, D)
    noise = mode.noise if mode.training else None  # chance belongs to training: two evaluations are equal
    noise = None if noise is None else noise.reshape(len(rows), -1)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    logits = rows @ params.w_gate  # (N, E)
    probability, lse = scores.softmax(logits)
    chosen = scores.largest(logits, 2)
    if noise is not None and config.second_expert == "sampling":
        chosen[:, 1] = _noisy_rest(logits, noise, chosen).argmax(1)
    # Normalised before the second expert can be dropped: afterwards, a weight left alone would always be 1.
    gate, _ = scores.softmax(xp.take_along_axis(logits, chosen, axis=1))
    asked = xp.ones_like(gate)
    if noise is not None and config.second_expert == "random":
        asked[:, 1] = 2 * gate[:, 1] > noise[:, 0]

    factor = CAPACITY_FACTOR if mode.training and mode.capacity_factor is None else mode.capacity_factor
    made = _limit(Choice(chosen, gate * asked), asked > 0, B, config.experts, factor, mode.mask)

    one_hot, gated = xp.zeros_like(probability), xp.zeros_like(probability)
    xp.put_along_axis(one_hot, chosen, asked, axis=1)
    xp.put_along_axis(gated, chosen, gate * asked, axis=1)
    shares = scores.shares_by_sequence(one_hot, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(logits, probability, lse, one_hot, gated, one_hot, mask, shares)
    kept = (chosen, gate, asked, noise, config.second_expert, mask, shares, made.place)
    return made, stats, Cache(rows, logits, probability, lse, *kept, x.shape)


def backward(params: GShard, cache: Cache, dweight: Array, dstats: RouterStats | None) -> tuple[Array, GShard]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of W.

    With k = (1, [2 g₂ > u]), w = k ⊙ g, so dg = k ⊙ dw, and through the softmax of the two logits

        dz_S = g ⊙ (dg − Σ g dg),    dx = dz Wᵀ

    A dropped second expert has dg₂ = 0, but its logit is still pushed: dz₁ = −dz₂ = g₁ g₂ dw₁. The drop is a jump and
    has no gradient of its own. The losses reach all logits through Σp and Σ lse², and the pair through Σw.
    """
    xp = array_module(dweight)
    dgate = routing.by_token(dweight, cache.place)  # (N, 2), zero for an entry that was dropped or refused
    if dstats is not None:  # the importance is the sum of all weights, those of refused entries included
        dgate = dgate + cache.asked * scores.once_per_token(dstats.importance[cache.chosen], cache.mask)
    dpair = cache.gate * (dgate - (cache.gate * dgate).sum(1, keepdims=True))
    dlogits = xp.zeros_like(cache.probability)
    xp.put_along_axis(dlogits, cache.chosen, dpair, axis=1)
    if dstats is not None:
        dlogits += scores.sums_backward(cache.probability, cache.lse, dstats, cache.mask, cache.shares)
    return (dlogits @ params.w_gate.T).reshape(cache.shape), GShard(cache.x.T @ dlogits)


def compared(params: GShard, cache: Cache) -> list[tuple[Array, int]]:
    """What was compared: the logits (N, E); then 2 g₂ and u, or the noisy logits of all experts but the best."""
    if cache.noise is None:
        return [(cache.logits, 2)]
    if cache.second_expert == "sampling":
        return [(cache.logits, 1), (_noisy_rest(cache.logits, cache.noise, cache.chosen), 1)]
    pair = array_module(cache.gate).concatenate([2 * cache.gate[:, 1:], cache.noise], axis=1)  # (N, 2)
    return [(cache.logits, 2), (pair, 1)]


def decode(params: GShard, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → its two experts and their weights."""
    logits = to_host(x @ params.w_gate).tolist()
    first, second = sorted(range(len(logits)), key=lambda e: -logits[e])[:2]  # stable: the lowest index wins a tie
    ratio = math.exp(logits[second] - logits[first])
    return [first, second], [1 / (1 + ratio), ratio / (1 + ratio)]


def mixtral_tensors(params: GShard) -> list[tuple[str, Array]]:
    """The names of the parameters within a layer of Mixtral's layout: in evaluation, the two routers are the same."""
    return [("block_sparse_moe.gate.weight", params.w_gate.T)]


def _noisy_rest(logits: Array, noise: Array, chosen: Array) -> Array:
    """The noisy logits (N, E) from which the second expert is drawn: −∞ for the first, which is chosen already.

    The largest of logits with Gumbel noise is a draw from their softmax.
    """
    xp = array_module(logits)
    rest = logits + noise
    rest[xp.arange(len(rest)), chosen[:, 0]] = -np.inf
    return rest


def _limit(choice: Choice, asked: Array, batch: int, experts: int, factor: float | None, mask: Array | None) -> Routing:
    """``capacity.limit`` for entries of which only those ``asked`` for, (N, 2) bools, take a place.

    The capacity is that of two entries per token, however many second experts were dropped.
    """
    if factor is None:
        return routing.from_choice(choice, experts, asked)
    xp = array_module(asked)
    entries, real = choice.experts.reshape(batch, -1), asked.reshape(batch, -1)  # (B, 2T)
    capacity: int | Array = math.ceil(factor * entries.shape[1] / experts)
    if mask is not None:
        present = mask.astype(bool).repeat(2, axis=1)
        real = real & present
        capacity = xp.ceil(factor * present.sum(1, keepdims=True) / experts)  # (B, 1)
    made = routing.from_choice(choice, experts, within_capacity(entries, experts, capacity, real))
    return made._replace(dropped=real.sum() - sum(made.counts))
