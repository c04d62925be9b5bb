"""DeepSeek-V3's router: a score for each expert by itself, and a bias per expert that balances the load without a loss.

    s = σ(x W)                     each expert has a score of its own: they need not add up to 1
    S = the K largest of s + b     the bias chooses
    w = r · s_S / Σ_S s            the scores weigh, without the bias
    b ← b + γ · sign(mean load − load)    after each step, from the counts of the whole step

b has no gradient: an expert with too much work loses a little of its bias, one with too little gains as much. Only the
differences between biases matter. b comes from earlier steps only, so the routing of a token never depends on later
tokens.

The experts may be divided into G groups (DeepSeek: the experts of one machine). A token then uses only the M best
groups, where the score of a group is the sum of its K/M largest s + b. The experts of all other
groups score −∞, not 0, because s + b may be negative.

A share s/Σs is a softmax of log s. The weights are computed in this way over the chosen experts, and the probability in
the balance losses over all experts, so there is no division by a sum that may be 0.

What the losses see: ``squared_lse`` is that of the raw logits, as in every router, so that the coefficient of the
z-loss has the same meaning; DeepSeek has no z-loss. ``sequence_loss`` is DeepSeek's sequence-wise loss. As in the
paper, it is 1 at perfect balance, so its coefficient is the paper's α, per layer. Its f is E times an expert's share of
the sequence's assignments. f counts the actual choices, the K largest s + b; Eq. 18 of the paper counts the K largest
s. The load is a count and has no gradient.

DeepSeek-AI 2024, arXiv 2412.19437 (router, groups, sequence-wise loss); Wang et al. 2024, arXiv 2408.15664 (bias).
Lesson: lessons/22_balance_without_a_loss.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, to_host, underflow_is_right
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import capacity, routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import Choice, RouterStats, Routing

BALANCE_LOSS = 0.0
"""The bias balances, so a recipe that names no coefficient of the balance loss uses none."""


@tree.marks(state=("bias",))
class SigmoidBias(NamedTuple):
    w_gate: Array  # (D, E)
    bias: Array  # (E,)  moved by ``next_state``, not by a gradient


class Cache(NamedTuple):
    x: Array  # (N, D)
    logits: Array  # (N, E)  z
    log_scores: Array  # (N, E)  log s
    probability: Array  # (N, E)  s/Σs, over all experts
    softmax: Array  # (N, E)  of z, for the z-loss
    lse: Array  # (N, 1)  log Σ exp z
    chosen: Array  # (N, K)
    shares: Array  # (N, K)  s_S/Σ_S s: the weights before the scale
    mask: Array | None  # (N, 1)
    by_sequence: Array | None  # (B, E)  shares of each sequence's assignments, if its balance is summed up
    place: Array  # (N, K)  the index of each of a token's entries in the routing
    shape: tuple[int, ...]  # (B, T, D)
    config: ModelConfig


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` if the groups are impossible, or if every token has one expert, whose weight is always the
    same."""
    check_forward(config)
    if config.active_experts == 1 < config.experts:
        raise UserError(
            "active_experts 1 gives the router 'sigmoid_bias' no gradient from the language-model loss, because the "
            "weight of a single chosen expert is always the same: set active_experts to 2 or more, or choose the "
            "router switch."
        )


def check_forward(config: ModelConfig) -> None:
    """Raises ``UserError`` unless the groups divide the experts equally, and the active groups have K experts or
    more."""
    E, K, G, M = config.experts, config.active_experts, config.expert_groups, config.active_groups
    if E % G:
        raise UserError(
            f"expert_groups {G} cannot divide experts {E} evenly: choose a number that divides {E}, or 1 for no groups."
        )
    if M > G:
        raise UserError(f"active_groups {M} is more than expert_groups {G}: choose at most {G}.")
    if K % M:
        raise UserError(
            f"active_groups {M} does not divide active_experts {K}, but a group is judged by its best "
            f"active_experts/active_groups experts: choose a number that divides {K}."
        )
    if K // M > E // G:
        raise UserError(
            f"active_groups {M} of {G} groups have {M * E // G} experts, which is fewer than active_experts {K}: "
            "choose more active_groups, fewer expert_groups or fewer active_experts."
        )


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> SigmoidBias:
    """W drawn from N(0, 0.02²), so that all first scores are nearly 1/2; b = 0."""
    w_gate = 0.02 * rng.standard_normal((config.width, config.experts))
    return SigmoidBias(w_gate.astype(dtype), np.zeros(config.experts, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> SigmoidBias:
    """The parameters, each made by calling ``array`` with its shape."""
    return SigmoidBias(array((config.width, config.experts)), array((config.experts,)))


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> Array | None:
    """None: this router has no noise."""
    return None


def forward(
    params: SigmoidBias, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D) → the routing of its N tokens, K entries per token, and the sums over them."""
    xp = array_module(x)
    B, _, D = x.shape
    rows = x.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    logits = rows @ params.w_gate  # (N, E)
    log_scores = log_sigmoid(logits)
    chosen, shares = choose(log_scores, params.bias, config)
    weights = config.routed_scale * shares
    made = capacity.limit(Choice(chosen, weights), B, config.experts, mode.capacity_factor, mode.mask)

    probability, log_total = scores.softmax(log_scores)
    softmax, lse = scores.softmax(logits)
    one_hot, gated = xp.zeros_like(probability), xp.zeros_like(probability)
    xp.put_along_axis(one_hot, chosen, 1, axis=1)
    xp.put_along_axis(gated, chosen, weights, axis=1)
    by_sequence = scores.shares_by_sequence(one_hot, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(log_scores, probability, log_total, one_hot, gated, one_hot, mask, by_sequence)
    stats = stats._replace(squared_lse=scores.once_per_token(xp.square(lse), mask).sum())
    scored = logits, log_scores, probability, softmax, lse
    cache = Cache(rows, *scored, chosen, shares, mask, by_sequence, made.place, x.shape, config)
    return made, stats, cache


def backward(
    params: SigmoidBias, cache: Cache, dweight: Array, dstats: RouterStats | None
) -> tuple[Array, SigmoidBias]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of W; none for b.

    With v = s_S/Σ_S s and p = s/Σs, both softmaxes of log s, and u the gradient with respect to p,

        d log s_S = r v ⊙ (dw − Σ v dw),    d log s += p ⊙ (u − Σ p u),    dz = d log s ⊙ (1 − s)

    and the z-loss adds 2 lse · softmax(z) · dΣlse². 1 − s = s exp(−z) is computed without a difference of nearly equal
    numbers.
    """
    xp = array_module(dweight)
    dweights = routing.by_token(dweight, cache.place)  # (N, K), zero for a refused entry
    if dstats is not None:  # the importance is the sum of all weights, those of refused entries included
        dweights = dweights + scores.once_per_token(dstats.importance[cache.chosen], cache.mask)
    along = (cache.shares * dweights).sum(1, keepdims=True)
    dlogs = xp.zeros_like(cache.logits)  # with respect to log s
    xp.put_along_axis(dlogs, cache.chosen, cache.config.routed_scale * cache.shares * (dweights - along), axis=1)
    if dstats is not None:
        without_z = dstats._replace(squared_lse=xp.zeros_like(dstats.squared_lse))
        dlogs += scores.sums_backward(cache.probability, cache.lse, without_z, cache.mask, cache.by_sequence)
    dlogits = dlogs * _complement(cache.log_scores, cache.logits)
    if dstats is not None:
        dlogits += scores.once_per_token(2 * dstats.squared_lse * cache.lse, cache.mask) * cache.softmax
    dx = dlogits @ params.w_gate.T
    return dx.reshape(cache.shape), SigmoidBias(cache.x.T @ dlogits, xp.zeros_like(params.bias))


def next_state(
    params: Sequence[SigmoidBias], stats: Sequence[RouterStats], config: ModelConfig, recipe: TrainConfig
) -> list[SigmoidBias]:
    """The parameters of all layers after a step: b ← b + γ · sign(mean load − load), γ the recipe's ``bias_rate``.

    The loads are those of the whole step, of all its shards and workers. Only the sign counts, so a step moves each
    bias by γ, or not at all if the expert has exactly its fair share.
    """
    moved = []
    for layer, sums in zip(params, stats, strict=True):
        xp = array_module(layer.bias)
        lacking = xp.sign(sums.assignments.mean() - sums.assignments).astype(layer.bias.dtype)
        moved.append(layer._replace(bias=layer.bias + recipe.bias_rate * lacking))
    return moved


def compared(params: SigmoidBias, cache: Cache) -> list[tuple[Array, int]]:
    """What was compared: s + b (N, E), lowest for experts outside the active groups; and the scores of the groups."""
    xp = array_module(cache.logits)
    config, biased = cache.config, xp.exp(cache.log_scores) + params.bias
    if config.expert_groups == 1:
        return [(biased, config.active_experts)]
    groups = group_scores(biased, config)
    lowest = biased.min() - 1  # finite, so that margins between scores stay numbers
    inside = within_best_groups(groups, config)
    return [(xp.where(inside, biased, lowest), config.active_experts), (groups, config.active_groups)]


def decode(params: SigmoidBias, x: Array, config: ModelConfig) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation → its K experts, best first, and their weights.

    Without groups, the part after the scores is in plain Python, which is several times faster for so few numbers. The
    scores keep the dtype of x, so that scores which are equal in ``forward`` are equal here.
    """
    log_scores = log_sigmoid(x @ params.w_gate)
    if config.expert_groups > 1:
        among, shares = choose(log_scores[None], params.bias, config)
        return to_host(among)[0].tolist(), to_host(config.routed_scale * shares)[0].tolist()
    biased = to_host(array_module(x).exp(log_scores) + params.bias).tolist()
    # sorted is stable, so the lowest index wins a tie, as in ``forward``
    chosen = sorted(range(len(biased)), key=lambda e: -biased[e])[: config.active_experts]
    logs = to_host(log_scores).tolist()
    peak = max(logs[e] for e in chosen)
    exp = [math.exp(logs[e] - peak) for e in chosen]
    return chosen, [config.routed_scale * one / sum(exp) for one in exp]


@underflow_is_right
def choose(log_scores: Array, bias: Array, config: ModelConfig) -> tuple[Array, Array]:
    """log s (N, E) and b (E,) → the K chosen experts, best by s + b first, and s_S/Σ_S s, both (N, K)."""
    xp = array_module(log_scores)
    biased = xp.exp(log_scores) + bias
    if config.expert_groups > 1:
        biased = xp.where(within_best_groups(group_scores(biased, config), config), biased, -np.inf)
    chosen = scores.largest(biased, config.active_experts)
    # The weights come from s itself. (s + b) − b would lose a small s beside a large b.
    shares, _ = scores.softmax(xp.take_along_axis(log_scores, chosen, axis=1))
    return chosen, shares


def group_scores(biased: Array, config: ModelConfig) -> Array:
    """s + b (N, E) → (N, G): for each group of E/G neighbours, the sum of its K/M largest."""
    by_group = biased.reshape(-1, config.experts // config.expert_groups)  # (N·G, E/G)
    best = scores.largest(by_group, config.active_experts // config.active_groups)
    total: Array = array_module(biased).take_along_axis(by_group, best, axis=1).sum(1)
    return total.reshape(-1, config.expert_groups)


def within_best_groups(groups: Array, config: ModelConfig) -> Array:
    """Scores of the groups (N, G) → (N, E) bools: whether an expert is in one of the M best groups of a token."""
    xp = array_module(groups)
    best = xp.zeros(groups.shape, bool)
    xp.put_along_axis(best, scores.largest(groups, config.active_groups), True, axis=1)
    inside: Array = best.repeat(config.experts // config.expert_groups, axis=1)
    return inside


@underflow_is_right
def log_sigmoid(z: Array) -> Array:
    """log σ(z) = min(z, 0) − log(1 + exp(−|z|)), which neither overflows nor becomes −∞ for any finite z."""
    xp = array_module(z)
    return xp.minimum(z, 0) - xp.log1p(xp.exp(-xp.abs(z)))


@underflow_is_right
def _complement(log_scores: Array, z: Array) -> Array:
    """1 − σ(z) = σ(z) exp(−z), the slope of log σ(z)."""
    return array_module(z).exp(log_scores - z)
