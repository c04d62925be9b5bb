"""What the experts do: which tokens go where, on any text, once a model is trained.

    seen = trace(params, config, tokens)        every layer's routing of every token; everything below reads it
    load(seen)                                  (L, E)  each expert's share of the work
    repetition(seen)                            do neighbours in the text share an expert more often than by chance?
    favourite_tokens(seen, layer=0)             which tokens each expert takes more of than its fair share

The questions are those of section 5 of Jiang et al. 2024, arXiv 2401.04088 (Mixtral), which found syntax rather than
topics. Layers and experts are counted from 0, as there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from minimoe.core.arrays import Array, like, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.routing import by_token, experts_by_token

Choice = Literal["first", "second", "either"]
"""Which of a token's K experts count: the best, the second best, or all K."""

TOKENS_AT_ONCE = 2048
"""About how many tokens go through the model together, which bounds the memory."""


class Trace(NamedTuple):
    """The routing of N tokens in L layers, on the host, tokens in the order of the text."""

    tokens: Array  # (N,)
    window: Array  # (N,)  the number of the stretch of text that the token was read in
    experts: Array  # (L, N, K)  best first
    weights: Array  # (L, N, K)
    logits: Array  # (L, N, E)  the routers' clean logits


class Repetition(NamedTuple):
    """How often two consecutive tokens share an expert, beside three kinds of chance."""

    observed: Array  # (L,)
    uniform: float  # every token draws k of the E experts, all alike
    load: Array  # (L,)  every token draws from the choices that were really made
    shuffled: Array  # (L,)  the tokens of each window in random order


class Favourite(NamedTuple):
    """A token that an expert takes more often than it takes tokens in general."""

    token: int
    seen: int  # how often the token is in the text
    share: float  # how much of that goes to this expert
    lift: float  # share over the expert's share of all tokens, drawn towards 1 where the count is small


def trace(params: Decoder, config: ModelConfig, tokens: Array | Sequence[int]) -> Trace:
    """Runs the model over tokens (T,) or (B, T) and keeps what its routers decide: no noise, nothing dropped.

    Text longer than ``config.context`` is cut into windows of that length, each read without the ones before it. The
    tokens of a trace are the N = B·T given ones, row by row.

    Raises:
        UserError: ``tokens`` has another shape, no token, or one that is not in the vocabulary; or a router's logits
            are no finite numbers.
    """
    try:
        ids = np.asarray(tokens) if isinstance(tokens, Sequence) else to_host(tokens)
    except ValueError:
        raise UserError("Tokens to trace come in rows of different lengths; trace one after the other.") from None
    if ids.ndim not in (1, 2) or ids.size == 0 or ids.dtype.kind not in "iu":
        raise UserError(
            f"Tokens to trace have shape {ids.shape} and type {ids.dtype}; give one row or several equal rows of "
            "integers, as a tokenizer's encode returns them."
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        outside = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(
            f"Token {outside} is not in the model's vocabulary of {config.vocab_size}; encode the text with the "
            "tokenizer that the model was trained with."
        )
    rows = np.atleast_2d(ids)
    passes = [_trace_windows(params, config, windows) for windows in _batches(rows, config.context)]
    experts, weights, logits = (np.concatenate(parts, axis=1) for parts in zip(*passes, strict=True))
    if not np.isfinite(logits).all():
        raise UserError(
            "a router gives logits that are no finite numbers: the model has diverged or is damaged, so use an earlier "
            "checkpoint, or download it again."
        )
    windows_per_row = math.ceil(rows.shape[1] / config.context)
    in_row = np.arange(rows.shape[1]) // config.context
    window = (np.arange(len(rows))[:, None] * windows_per_row + in_row).reshape(-1)
    return Trace(ids.reshape(-1), window, experts, weights, logits)


def _batches(rows: Array, context: int) -> Iterator[Array]:
    """rows (B, T) cut into windows, row by row, and those stacked (·, ≤ context) as far as their lengths agree."""
    windows = (row[start : start + context] for row in rows for start in range(0, len(row), context))
    for _, alike in itertools.groupby(windows, key=len):
        while stack := list(itertools.islice(alike, max(1, TOKENS_AT_ONCE // context))):
            yield np.stack(stack)


def _trace_windows(params: Decoder, config: ModelConfig, windows: Array) -> tuple[Array, Array, Array]:
    """windows (B, T) → experts (L, B·T, K), weights (L, B·T, K), clean logits (L, B·T, E)."""
    _, _, cache = decoder.forward(params, like(params.norm.gain, windows), config, Mode(estimate_load=False))
    router = moe.router_of(config)
    experts, weights, logits = [], [], []
    for block_params, of_block in zip(params.blocks, cache.blocks, strict=True):
        routing = of_block.moe.routing
        (scores, _), *_ = router.compared(block_params.moe.router, of_block.moe.router)
        experts.append(to_host(experts_by_token(routing)))
        weights.append(to_host(by_token(routing.weight, routing.place)))
        logits.append(to_host(scores))
    return np.stack(experts), np.stack(weights), np.stack(logits)


def load(trace: Trace, choice: Choice = "either") -> Array:
    """Each expert's share of a layer's assignments (L, E); rows sum to 1, and 1/E is the fair share.

    Figure 7 of the Mixtral paper shows ``"either"``, its Figure 9 the first and the second choice apart.
    """
    experts = trace.logits.shape[2]
    counts = np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in _chosen(trace, choice)])
    shares: Array = counts / counts.sum(1, keepdims=True)
    return shares


def load_by_domain(
    params: Decoder, config: ModelConfig, domains: Mapping[str, Array | Sequence[int]], choice: Choice = "either"
) -> dict[str, Array]:
    """The load (L, E) on each of several texts, given as tokens (T,) by name."""
    return {name: load(trace(params, config, tokens), choice) for name, tokens in domains.items()}


def jensen_shannon(*distributions: Array) -> Array:
    """How different two or more distributions (…, E) are, in bits (…): 0 if equal, log₂ of their number at most.

        JS = H(mean of p₁ … p_n) − mean of H(p₁) … H(p_n)

    Two that have no expert in common are 1 bit apart. Lin 1991, doi 10.1109/18.61115.

    Raises:
        UserError: fewer than two are given, their shapes differ, or a row is not a distribution.
    """
    if len(distributions) < 2 or len({np.shape(p) for p in distributions}) > 1:
        shapes = ", ".join(str(np.shape(p)) for p in distributions) or "none"
        raise UserError(f"Distributions of shapes {shapes} cannot be compared; give at least two of one shape.")
    p = np.stack(distributions).astype(np.float64)  # (n, …, E)
    sums = p.sum(-1)
    if not (np.allclose(sums, 1, atol=1e-6) and (p >= 0).all()):
        worst = sums.flat[np.abs(sums - 1).argmax()]
        raise UserError(
            f"A row to compare sums to {worst:g} or has a negative entry; give shares that sum to 1, as load returns "
            "them."
        )

    def bits(p: Array) -> Array:
        entropy: Array = -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)
        return entropy

    return np.maximum(bits(p.mean(0)) - bits(p).mean(0), 0)  # rounding can leave −1e-17 where all are equal


def repetition(trace: Trace, choice: Choice = "first", *, shuffles: int = 20, seed: int = 0) -> Repetition:
    """How often two tokens in a row share an expert: Table 5 of the Mixtral paper.

    With ``"first"``, both have the same best expert; with ``"either"``, their sets of K have one in common ("first or
    second choice" there). Pairs across the edge of a window do not count. Three nulls, each stricter than the last:

        uniform     1 − C(E−k, k)/C(E, k), k the experts that count: 1/E for one, 46.4 % for 2 of 8
        load        Σ p_S p_S' over all sets that meet, p as observed: Σ p² for one. Uneven load repeats by itself.
        shuffled    observed again after ``shuffles`` random orders, by ``seed``, within each window. A window keeps
                    its own subject and so its own load: what observed has beyond this is due to order alone.

    Raises:
        UserError: the trace has no two tokens in a row.
    """
    chosen = _chosen(trace, choice)  # (L, N, k)
    k, experts = chosen.shape[2], trace.logits.shape[2]
    together = trace.window[1:] == trace.window[:-1]
    if not together.any():
        raise UserError("The trace has no two tokens in a row; trace a text of at least two tokens.")

    def rate(order: Array) -> Array:
        """(L,): the share of pairs in a row that meet, with the tokens in this order."""
        before, after = chosen[:, order[:-1]][:, together], chosen[:, order[1:]][:, together]
        shares: Array = _meet(before, after).mean(1)
        return shares

    if shuffles < 1 or seed < 0:
        raise UserError(f"shuffles {shuffles} from seed {seed} are none: give at least 1, from a seed of at least 0.")
    rng = np.random.default_rng(seed)
    # Sorted by window and a random fraction: every window has its tokens in random order, where it was.
    orders = (np.argsort(trace.window + rng.random(len(trace.window))) for _ in range(shuffles))
    return Repetition(
        observed=rate(np.arange(len(trace.window))),
        uniform=1 - math.comb(experts - k, k) / math.comb(experts, k),
        load=np.array([_chance_of_meeting(layer) for layer in chosen]),
        shuffled=np.mean([rate(order) for order in orders], axis=0),
    )


def _meet(one: Array, other: Array) -> Array:
    """Sets of experts, one (…, k) and other (…, k) → whether they have one in common, (…) bool."""
    common: Array = (one[..., :, None] == other[..., None, :]).any((-2, -1))
    return common


def _chance_of_meeting(chosen: Array) -> float:
    """chosen (N, k) → the chance that the sets of two tokens, drawn with replacement, have an expert in common."""
    sets, counts = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    share = counts / counts.sum()
    return float(sum(p * (share @ _meet(one, sets)) for p, one in zip(share, sets, strict=True)))


def entropy(trace: Trace) -> Array:
    """How undecided the routers are: the entropy of their softmax over all experts, in nats (L, N), at most ln E."""
    logits = trace.logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    total = p.sum(-1)
    undecided: Array = np.log(total) - (p * logits).sum(-1) / total
    return undecided


def margin(trace: Trace) -> Array:
    """By how much the worst chosen expert beats the best one not chosen, in logits (L, N); infinite if K = E.

    A token with a small margin changes its experts at the smallest change of the weights.
    """
    k = trace.experts.shape[2]
    if k == trace.logits.shape[2]:
        return np.full(trace.logits.shape[:2], np.inf)
    ranked = np.sort(trace.logits, axis=-1)[..., ::-1]
    gap: Array = ranked[..., k - 1] - ranked[..., k]
    return gap


def co_activation(trace: Trace) -> Array:
    """The share of tokens that go to expert i and to expert j, (L, E, E); on the diagonal, to expert i at all.

    Row i over its diagonal entry is the chance of each other expert, given i.
    """
    sent = _sent(trace.experts, trace.logits.shape[2])  # (L, N, E)
    together: Array = np.swapaxes(sent, 1, 2) @ sent / len(trace.tokens)
    return together


def favourite_tokens(
    trace: Trace, layer: int, top: int = 5, prior: float = 10.0, choice: Choice = "either"
) -> list[list[Favourite]]:
    """For each of the E experts of a layer, the ``top`` tokens it takes most over its base rate, best first.

        lift = (n_ve + prior · b_e) / (n_v + prior) / b_e

    n_v counts token v, n_ve how often expert e is its ``choice``, and b_e is e's share of all tokens. The ``prior``
    imaginary tokens, routed like all others, keep a rare token from winning by luck. Only tokens with a lift above 1
    are listed.

    Raises:
        UserError: there is no such layer, or no such choice.
    """
    layers = len(trace.experts)
    if not 0 <= layer < layers:
        raise UserError(f"There is no layer {layer}; choose one from 0 to {layers - 1}.")
    sent = _sent(_chosen(trace, choice)[layer], trace.logits.shape[2])  # (N, E)
    vocabulary, index = np.unique(trace.tokens, return_inverse=True)
    count = np.bincount(index)[:, None]  # (V, 1)  n_v
    taken = np.stack([np.bincount(index, weights=column) for column in sent.T], axis=1)  # (V, E)  n_ve
    base = sent.mean(0)  # (E,)  b_e
    lift = (taken + prior * base) / ((count + prior) * np.where(base > 0, base, 1))
    return [
        [
            Favourite(int(vocabulary[v]), int(count[v, 0]), float(taken[v, e] / count[v, 0]), float(lift[v, e]))
            for v in np.argsort(-lift[:, e], kind="stable")[:top]
            if lift[v, e] > 1
        ]
        for e in range(sent.shape[1])
    ]


def _chosen(trace: Trace, choice: Choice) -> Array:
    """The experts that count (L, N, k), k = 1 or K."""
    active = trace.experts.shape[2]
    if choice == "second" and active == 1:
        raise UserError("There is no second choice where active_experts is 1; ask for the first.")
    columns = {"first": slice(0, 1), "second": slice(1, 2), "either": slice(None)}
    if choice not in columns:
        raise UserError(f"The choice {choice!r} is unknown; ask for first, second or either.")
    return trace.experts[:, :, columns[choice]]


def _sent(chosen: Array, experts: int) -> Array:
    """chosen (…, N, k) → 1 where a token was sent to an expert, 0 elsewhere: (…, N, E)."""
    sent = np.zeros((*chosen.shape[:-1], experts))
    np.put_along_axis(sent, chosen, 1, axis=-1)
    return sent
