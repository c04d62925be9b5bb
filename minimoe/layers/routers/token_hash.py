"""The hash router: a fixed table names the K experts of each token id, and the choice is not learned.

    S = table[id]                 K different experts, the same in every layer and at every step
    w = 1/K                       or, with ``hash_gate``,
    w = softmax(z_S),  z = x W    a gate that weighs the experts of the set but cannot change the set

The set never depends on x, so the output has no jump anywhere: finite differences need no margin. There is nothing to
balance either, because the load follows from the table and from how often each id occurs.

The table is not a parameter. It is computed from V, E and K with whole-number arithmetic, so it is the same with every
seed, on every machine and with every version of NumPy, and a checkpoint need not hold it. The numbers of *ids* of any
two experts differ by at most one; ``ids_by_count`` renames the ids so that each expert gets nearly the same number of
*tokens*.

The module is not called ``hash``, because an import of that name would hide Python's own function.

Roller et al. 2021, arXiv 2106.04426.  Lesson: lessons/24_hash_and_zero.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minimoe.core.arrays import Array, array_module, like, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import capacity, routing
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.routers import scores
from minimoe.layers.routing import Choice, RouterStats, Routing

BALANCE_LOSS = 0.0
"""No loss can change the load of a fixed table."""

BY_TABLE = True
"""The table names all E experts, so none of them can be removed."""


class TokenHash(NamedTuple):
    w_gate: Array | None  # (D, E), or None if all K weights are 1/K


class Cache(NamedTuple):
    x: Array  # (N, D)
    probability: Array  # (N, E)  the weights of the set, 0 elsewhere
    lse: Array  # (N, 1)  log Σ exp over the set
    chosen: Array  # (N, K)
    mask: Array | None  # (N, 1)
    shares: Array | None  # (B, E)  of each sequence, if its balance is summed up
    place: Array  # (N, K)  the index of each of a token's entries in the routing
    shape: tuple[int, ...]  # (B, T, D)


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` for a gate that weighs a set of one expert: the weight would always be 1."""
    if config.hash_gate and config.active_experts == 1 and config.experts > 1:
        raise UserError(
            "hash_gate with active_experts 1 gives the only expert of each set the constant weight 1, so the gate gets "
            "no gradient: set hash_gate to false (--no-hash-gate), or active_experts to 2 or more."
        )


def check_forward(config: ModelConfig) -> None:
    """Allows every config: a gate for a set of one expert cannot be trained, but it can be run."""


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> TokenHash:
    """W drawn from N(0, 0.02²), so that the first weights are nearly 1/K; nothing at all without ``hash_gate``."""
    if not config.hash_gate:
        return TokenHash(None)
    return TokenHash((0.02 * rng.standard_normal((config.width, config.experts))).astype(dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> TokenHash:
    """The parameters, each made by calling ``array`` with its shape."""
    return TokenHash(array((config.width, config.experts)) if config.hash_gate else None)


def draw_noise(rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """None: noise explores other choices, and here there are none."""


def forward(
    params: TokenHash, x: Array, config: ModelConfig, mode: Mode = EVALUATION
) -> tuple[Routing, RouterStats, Cache]:
    """x (B, T, D), and the ids of its tokens in ``mode.labels`` → the routing of its N tokens, and the sums over them.

    The sums are those of a softmax over the set: an expert outside it has probability 0. Without a gate there are no
    logits, so Σ lse² is 0.

    Raises:
        UserError: there are no labels; or, on the host, one of them is not in [0, V).
    """
    xp = array_module(x)
    B, _, D = x.shape
    rows = x.reshape(-1, D)
    mask = None if mode.mask is None else mode.mask.reshape(-1, 1).astype(x.dtype)  # (N, 1)

    experts_of_id = like(x, table(config.vocab_size, config.experts, config.active_experts))  # (V, K)
    chosen = experts_of_id[_ids(mode.labels, config)]  # (N, K)
    if params.w_gate is None:
        logits = xp.zeros((len(rows), config.experts), x.dtype)  # equal, so every weight is 1/K
        weights, lse = scores.softmax(xp.take_along_axis(logits, chosen, axis=1))
    else:
        logits = rows @ params.w_gate
        weights, lse = scores.softmax(xp.take_along_axis(logits, chosen, axis=1))
        best_first = xp.argsort(-weights, axis=1, kind="stable")  # only the order of the entries depends on this
        chosen, weights = (xp.take_along_axis(one, best_first, axis=1) for one in (chosen, weights))
    made = capacity.limit(Choice(chosen, weights), B, config.experts, mode.capacity_factor, mode.mask)

    probability, one_hot = xp.zeros_like(logits), xp.zeros_like(logits)
    xp.put_along_axis(probability, chosen, weights, axis=1)
    xp.put_along_axis(one_hot, chosen, 1, axis=1)
    shares = scores.shares_by_sequence(one_hot, B, mask) if mode.balance_by_sequence else None
    stats = scores.sums(logits, probability, lse, one_hot, probability, one_hot, mask, shares)
    if params.w_gate is None:
        stats = stats._replace(squared_lse=xp.zeros_like(stats.squared_lse))
    return made, stats, Cache(rows, probability, lse, chosen, mask, shares, made.place, x.shape)


def backward(params: TokenHash, cache: Cache, dweight: Array, dstats: RouterStats | None) -> tuple[Array, TokenHash]:
    """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of W.

    The table is constant, so only the gate has a gradient, by the softmax over the set S. With p its weights, 0 outside
    the set, one formula serves all E logits:

        dz = p ⊙ (dw − Σ p dw),    dx = dz Wᵀ,    dW = xᵀ dz

    A logit outside the set gets a gradient of exactly 0. Without a gate, every logit gets 0.
    """
    xp = array_module(dweight)
    if params.w_gate is None:
        return xp.zeros(cache.shape, cache.x.dtype), TokenHash(None)
    p = cache.probability
    dp = xp.zeros_like(p)
    xp.put_along_axis(dp, cache.chosen, routing.by_token(dweight, cache.place), axis=1)  # 0 for a refused entry
    if dstats is not None:  # the importance is the sum of all weights, those of refused entries included
        dp += scores.once_per_token(dstats.importance[None], cache.mask)
    dlogits = p * (dp - (p * dp).sum(1, keepdims=True))
    if dstats is not None:
        dlogits += scores.sums_backward(p, cache.lse, dstats, cache.mask, cache.shares)
    return (dlogits @ params.w_gate.T).reshape(cache.shape), TokenHash(cache.x.T @ dlogits)


def compared(params: TokenHash, cache: Cache) -> list[tuple[Array, int]]:
    """Nothing: no scores decide who is chosen, so no gradient check can cross a change of the choice."""
    return []


def decode_label(params: TokenHash, x: Array, config: ModelConfig, label: int) -> tuple[list[int], list[float]]:
    """x (D,), one token in evaluation, and its id → its K experts and their weights."""
    chosen = table(config.vocab_size, config.experts, config.active_experts)[label].tolist()
    if params.w_gate is None:
        return chosen, [1 / len(chosen)] * len(chosen)
    logits = to_host(x @ params.w_gate).tolist()
    peak = max(logits[e] for e in chosen)
    exp = [math.exp(logits[e] - peak) for e in chosen]
    return chosen, [one / sum(exp) for one in exp]


@lru_cache(maxsize=8)
def table(vocabulary: int, experts: int, active: int) -> NDArray[np.int64]:
    """The K different experts of each id, (V, K), read-only.

    The numbers of times that any two experts are named differ by at most one.

    The ids are shuffled and dealt out in rounds of E. In a round, the k-th choice of the r-th id is r + s_k modulo E,
    where the K shifts s are different and drawn anew for each round: so a round names every expert K times, and any two
    experts can meet. In the last round, which may be shorter, the experts take turns.
    """
    shuffled = np.argsort(_scrambled(np.arange(vocabulary)), kind="stable")  # (V,)
    rounds = -(-vocabulary // experts)
    drawn = _scrambled(vocabulary + np.arange(rounds * experts)).reshape(rounds, experts)
    shifts = np.argsort(drawn, axis=1, kind="stable")[:, :active]  # (rounds, K)
    place = np.arange(vocabulary)
    dealt = (place[:, None] + shifts[place // experts]) % experts  # (V, K)
    if rest := vocabulary % experts:
        dealt[-rest:] = np.arange(rest * active).reshape(rest, active) % experts
    result = np.empty_like(dealt)
    result[shuffled] = dealt
    result.flags.writeable = False
    return result


def ids_by_count(counts: NDArray[np.int64], experts: int, active: int) -> NDArray[np.int64]:
    """counts (V,), how often each token occurs → a new id for each token, (V,), with which the loads are nearly even.

    The table stays as it is, and the tokens exchange their rows: from the most frequent token to the rarest, each takes
    the free row whose busiest expert has the least to do. If the counts are those of the training text, this is the
    balanced table of Roller et al.
    """
    rows = table(len(counts), experts, active)
    load = np.zeros(experts)
    free = np.ones(len(counts), bool)
    ids = np.empty(len(counts), np.int64)
    for token in np.argsort(-counts, kind="stable"):
        busiest = np.where(free, load[rows].max(1), np.inf)
        ids[token] = busiest.argmin()
        free[ids[token]] = False
        load[rows[ids[token]]] += counts[token]
    return ids


def _ids(labels: Array | None, config: ModelConfig) -> Array:
    """labels (B, T) → (N,), checked on the host, but not on a GPU, where reading them would wait for the device."""
    if labels is None:
        raise UserError(
            "labels is None, but the router 'token_hash' looks up the experts of token ids: give them as "
            "Mode(labels=...), as the decoder does."
        )
    if isinstance(labels, np.ndarray) and labels.size and not 0 <= labels.min() <= labels.max() < config.vocab_size:
        raise UserError(
            f"labels from {labels.min()} to {labels.max()} are not token ids of a vocabulary of {config.vocab_size}: "
            f"give whole numbers from 0 to {config.vocab_size - 1}."
        )
    return labels.reshape(-1)


def _scrambled(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Whole numbers → 64 bits each that look random: the last step of SplitMix64 (Steele et al. 2014).

    NumPy's own random generators may give other numbers in another version, and a saved model would then get a
    different table.
    """
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2⁶⁴
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return scrambled
