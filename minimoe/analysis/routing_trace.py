"""What the experts do: the experts to which a trained model sends each token of a text, and their statistics.

    seen = trace(params, config, tokens)        the routing of every token in every layer
    load(seen)                                  (L, E)  each expert's share of the work
    repetition(seen)                            do neighbours in the text share an expert more often than by chance?
    favourite_tokens(seen, layer=0)             which tokens go to an expert more often than tokens do in general

The questions are those of section 5 of Jiang et al. 2024, arXiv 2401.04088 (Mixtral), which found that experts follow
syntax rather than topics. Layers and experts are counted from 0, as in that paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from minimoe.core.arrays import Array, array_module, like, to_host, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.ids import checked
from minimoe.core.summary import brief
from minimoe.inference import reading
from minimoe.layers import block, decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.routing import Routing, by_token, experts_by_token

Choice = Literal["first", "second", "either"]
"""Which of a token's K experts count: the best, the second best, or all K."""

MOST_EXPERTS = 1024
"""The largest number of experts E for which all E² pairs are counted and favourite tokens are listed."""


@brief
class Trace(NamedTuple):
    """The routing of N tokens in the L layers with a router, on the host; the tokens are in the order of the text."""

    tokens: Array  # (N,)
    window: Array  # (N,)  the number of the window that the token was read in
    experts: Array  # (L, N, K)  the one with the largest weight first; −1 where a token has fewer than K
    weights: Array  # (L, N, K)
    logits: Array  # (L, N, E)  the routers' clean logits, or what they compare; log weights if they compare nothing
    first_layer: int = 0  # the number of the first of the L layers; the dense layers before it have no routing


@brief
class Repetition(NamedTuple):
    """How often two consecutive tokens share an expert, and the same rate at three levels of chance."""

    observed: Array  # (L,)
    uniform: float  # if every token draws k of the E experts, all equally likely
    load: Array  # (L,)  if every token draws from the observed choices
    shuffled: Array  # (L,)  if the tokens of each window are in random order


class Favourite(NamedTuple):
    """A token that goes to an expert more often than tokens do in general."""

    token: int
    seen: int  # how often the token occurs in the text
    share: float  # the share of these occurrences that goes to this expert
    lift: float  # share divided by the expert's share of all tokens; closer to 1 if the token is rare


def trace(params: Decoder, config: ModelConfig, tokens: Array | Sequence[int]) -> Trace:
    """Runs the model over tokens (T,) or (B, T) and records what its routers decide, without noise and without drops.

    Text longer than ``config.context`` is cut into windows of that length, and each window is read without the windows
    before it. The tokens of the trace are the N = B·T given tokens, row by row.

    Raises:
        UserError: ``tokens`` has another shape, no token, or a token that is not in the vocabulary; or a router's
            logits are not finite.
    """
    ids = checked(tokens, config.vocab_size, axes=(1, 2), what="Tokens to trace")
    if ids.size == 0:
        raise UserError(f"Tokens to trace have shape {ids.shape}, expected at least one token: give a longer text.")
    rows = np.atleast_2d(ids)
    passes = [_trace_windows(params, config, windows) for windows in _batches(rows, config.context)]
    of_kind = zip(zip(*passes, strict=True), FILL, strict=True)
    experts, weights, logits = (_joined(parts, 1, fill) for parts, fill in of_kind)
    if not np.isfinite(logits).all():
        raise UserError(
            "a router gives logits that are not finite: the model has diverged or is damaged, so use an earlier "
            "checkpoint, or download it again."
        )
    windows_per_row = math.ceil(rows.shape[1] / config.context)
    in_row = np.arange(rows.shape[1]) // config.context
    window = (np.arange(len(rows))[:, None] * windows_per_row + in_row).reshape(-1)
    return Trace(ids.reshape(-1), window, experts, weights, logits, config.dense_layers)


def _batches(rows: Array, context: int) -> Iterator[Array]:
    """Cuts rows (B, T) into windows, row by row, and stacks consecutive windows of equal length (·, ≤ context)."""
    windows = (row[start : start + context] for row in rows for start in range(0, len(row), context))
    for _, alike in itertools.groupby(windows, key=len):
        while stack := list(itertools.islice(alike, reading.sequences_at_once(context))):
            yield np.stack(stack)


def _trace_windows(params: Decoder, config: ModelConfig, windows: Array) -> tuple[Array, ...]:
    """windows (B, T) → experts (L, B·T, K), weights (L, B·T, K), clean logits (L, B·T, E)."""
    router = moe.router_of(config)
    batch, length = windows.shape
    parts = []

    def keep(cache: block.Cache) -> tuple[Any, Any] | None:
        return (cache.moe.routing, cache.moe.router) if isinstance(cache.moe, moe.Cache) else None

    for _, found in reading.read(params, config, like(params.norm.gain, windows), keep):
        experts, weights, logits = [], [], []
        kept = [of_layer for of_layer in found.blocks if of_layer is not None]
        for mixture, (routing, router_cache) in zip(decoder.mixtures(params), kept, strict=True):
            shape = (len(routing.place), config.experts)
            compared = (scores for scores, _ in router.compared(mixture.router, router_cache))
            of_token, weight = to_host(experts_by_token(routing)), to_host(by_token(routing.weight, routing.place))
            order = np.argsort(np.where(of_token < 0, np.inf, -weight), axis=1, kind="stable")
            experts.append(np.take_along_axis(of_token, order, axis=1)[None])
            weights.append(np.take_along_axis(weight, order, axis=1)[None])
            scores = next((scores for scores in compared if scores.shape == shape), None)
            logits.append(to_host(_log_weights(routing) if scores is None else scores)[None])
        parts.append([_joined(kind, 0, fill) for kind, fill in zip((experts, weights, logits), FILL, strict=True)])
    if len(parts) == 1:
        return tuple(parts[0])
    joined = []
    for of_kind, fill in zip(zip(*parts, strict=True), FILL, strict=True):
        by_row = [piece.reshape(len(piece), batch, -1, piece.shape[-1]) for piece in of_kind]
        joined.append(_joined(by_row, 2, fill).reshape(len(decoder.mixtures(params)), batch * length, -1))
    return tuple(joined)


FILL = (-1, 0, 0)
"""The values that fill the experts, weights and logits of a trace where a token has fewer experts than another."""


def _joined(parts: Sequence[Array], axis: int, fill: int) -> Array:
    """``concatenate``; the last axis of the parts may be of unequal length and is filled up."""
    longest = max(part.shape[-1] for part in parts)
    padded = [
        np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, longest - part.shape[-1])], constant_values=fill)
        for part in parts
    ]
    return np.concatenate(padded, axis=axis)


def alike(traces: Sequence[Trace]) -> list[Trace]:
    """The traces, padded to the same number of columns of experts and weights; an added column means "no expert".

    The tokens of one text may have more experts than those of another.
    """
    most = max(trace.experts.shape[2] for trace in traces)
    same = []
    for trace in traces:
        missing = [(0, 0), (0, 0), (0, most - trace.experts.shape[2])]
        experts, weights = np.pad(trace.experts, missing, constant_values=-1), np.pad(trace.weights, missing)
        same.append(trace._replace(experts=experts, weights=weights))
    return same


def _log_weights(routing: Routing) -> Array:
    """Scores (N, E) for a router that compares no scores: log of the weights, or of nearly 0 for other experts."""
    xp = array_module(routing.weight)
    dense = xp.zeros((len(routing.place), len(routing.counts)), routing.weight.dtype)
    expert = xp.repeat(xp.arange(len(routing.counts)), routing.counts)
    dense[routing.token, expert] = routing.weight
    return xp.log(xp.maximum(dense, np.finfo(np.float32).tiny))


def load(trace: Trace, choice: Choice = "either") -> Array:
    """Each expert's share of a layer's assignments (L, E); rows sum to 1, and 1/E is the fair share.

    Figure 7 of the Mixtral paper shows ``"either"``; its Figure 9 shows the first and the second choice separately.
    """
    experts = trace.logits.shape[2]
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in _chosen(trace, choice)])
    shares: Array = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def load_by_domain(
    params: Decoder, config: ModelConfig, domains: Mapping[str, Array | Sequence[int]], choice: Choice = "either"
) -> dict[str, Array]:
    """The load (L, E) on each of several texts; ``domains`` gives the tokens (T,) of each text by its name."""
    return {name: load(trace(params, config, tokens), choice) for name, tokens in domains.items()}


def jensen_shannon(*distributions: Array) -> Array:
    """How different two or more distributions (…, E) are, in bits (…): 0 if equal, at most log₂ of their number.

        JS = H(mean of p₁ … p_n) − mean of H(p₁) … H(p_n)

    Two distributions without a common expert are 1 bit apart. Lin 1991, doi 10.1109/18.61115.

    Raises:
        UserError: fewer than two are given, their shapes differ, or a row is not a distribution.
    """
    if len(distributions) < 2 or len({np.shape(p) for p in distributions}) > 1:
        shapes = ", ".join(str(np.shape(p)) for p in distributions) or "none"
        raise UserError(f"Distributions of shapes {shapes} cannot be compared; give at least two of the same shape.")
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


def max_violation(load: Array) -> Array:
    """By how much the fullest expert exceeds the mean, load (…, E) → (…): 0 at perfect balance, at most E − 1.

    MaxVio of Wang et al. 2024, arXiv 2408.15664. A small number of tokens is never distributed evenly: with uniform
    random choices, a batch of 256 tokens that choose 2 of 8 experts has 0.17 on average.
    """
    violation: Array = load.max(-1) / load.mean(-1) - 1
    return violation


def divergence_by_chance(traces: Sequence[Trace], groupings: int = 20, seed: int = 0) -> Array:
    """The ``jensen_shannon`` (L,) between the loads of texts, if the texts made no difference.

    The windows of all texts are distributed at random over the same number of groups, of the same sizes. The result is
    the mean over several ``groupings``. Windows stay whole, because neighbours in a text resemble each other.

    Raises:
        UserError: fewer than two texts are given, or their routers have different numbers of experts or layers.
    """
    if len(traces) < 2 or len({(len(trace.logits), trace.logits.shape[2]) for trace in traces}) > 1:
        raise UserError(f"{len(traces)} traces cannot be compared; give at least two, of the same model.")
    experts = traces[0].logits.shape[2]
    counts = []  # for each text: (windows, L, E)
    for trace in traces:
        starts = np.flatnonzero(np.diff(trace.window, prepend=-1))
        sent = (trace.experts[..., None] == np.arange(experts)).sum(2)  # (L, N, E)
        counts.append(np.add.reduceat(sent, starts, axis=1).swapaxes(0, 1))
    ends = np.cumsum([len(of_text) for of_text in counts])[:-1]
    windows, rng = np.concatenate(counts), np.random.default_rng(seed)
    drawn = []
    for _ in range(groupings):
        totals = [group.sum(0) for group in np.split(rng.permutation(windows), ends)]  # (L, E) each
        drawn.append(jensen_shannon(*(total / total.sum(1, keepdims=True) for total in totals)))
    return np.asarray(np.mean(drawn, axis=0))


def repetition(trace: Trace, choice: Choice = "first", *, shuffles: int = 20, seed: int = 0) -> Repetition:
    """How often two consecutive tokens share an expert: Table 5 of the Mixtral paper.

    With ``"first"``, both tokens have the same best expert; with ``"either"``, their sets of K have an expert in common
    (the paper's "first or second choice"). Pairs across the edge of a window do not count. The observed rate is
    compared with three levels of chance, each stricter than the one before; k is the number of choices that count:

        uniform     1 − C(E−k, k)/C(E, k): 1/E for k = 1, and 46.4 % for 2 of 8. If k differs between tokens, the mean
                    over all pairs and layers
        load        Σ p_S p_S' over all pairs of sets S, S' that share an expert, where p_S is the observed
                    frequency of S: Σ p² for k = 1. An uneven load makes neighbours share an expert, whatever
                    the order of the text.
        shuffled    the mean rate over ``shuffles`` random orders within each window, drawn by ``seed``. A window keeps
                    its subject and therefore its load, so a higher observed rate is due to order alone.

    Raises:
        UserError: the trace has no two consecutive tokens, or ``shuffles`` or ``seed`` is out of range.
    """
    chosen = _chosen(trace, choice)  # (L, N, k)
    experts = trace.logits.shape[2]
    together = trace.window[1:] == trace.window[:-1]
    if not together.any():
        raise UserError("The trace has no two tokens in a row; trace a text of at least two tokens.")

    def rate(order: Array) -> Array:
        """The share of consecutive pairs that have an expert in common (L,), with the tokens in this order."""
        before, after = chosen[:, order[:-1]][:, together], chosen[:, order[1:]][:, together]
        shares: Array = _meet(before, after, experts).mean(1)
        return shares

    if shuffles < 1 or seed < 0:
        raise UserError(
            f"{shuffles} shuffles from seed {seed} are impossible: give at least 1, from a seed of at least 0."
        )
    rng = np.random.default_rng(seed)
    # Sorting by window plus a random fraction keeps every window in its place and shuffles the tokens inside it.
    orders = (np.argsort(trace.window + rng.random(len(trace.window))) for _ in range(shuffles))
    return Repetition(
        observed=rate(np.arange(len(trace.window))),
        uniform=_chance_of_uniform_sets((chosen >= 0).sum(2), experts),
        load=np.array([_chance_of_meeting(layer, experts) for layer in chosen]),
        shuffled=np.mean([rate(order) for order in orders], axis=0),
    )


def _chance_of_uniform_sets(sizes: Array, experts: int) -> float:
    """sizes of sets of experts → the chance that two of them meet if all sets of a size are equally likely."""
    share = np.bincount(sizes.reshape(-1)) / sizes.size
    return sum(
        float(share[a] * share[b]) * (1 - math.comb(experts - a, b) / math.comb(experts, b))
        for a, b in itertools.product(range(len(share)), repeat=2)
    )


def _meet(one: Array, other: Array, experts: int) -> Array:
    """Sets of experts, one (…, k) and other (…, k) → whether they have an expert in common, (…) bool.

    Large sets are compared expert by expert, because of k experts there are k² pairs.
    """
    if one.shape[-1] ** 2 > experts:
        return np.asarray((_members(one, experts) & _members(other, experts)).any(-1))
    common: Array = ((one[..., :, None] == other[..., None, :]) & (one[..., :, None] >= 0)).any((-2, -1))
    return common


def _members(chosen: Array, experts: int) -> Array:
    """chosen (…, k) → whether an expert is in the set, (…, E) bool."""
    inside = np.zeros((*chosen.shape[:-1], experts + 1), bool)  # the last column takes the missing experts
    np.put_along_axis(inside, chosen, True, axis=-1)
    return inside[..., :experts]


def _chance_of_meeting(chosen: Array, experts: int) -> float:
    """chosen (N, k) → the chance that the sets of two tokens, drawn with replacement, have an expert in common."""
    sets, counts = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    share = counts / counts.sum()
    if sets.shape[1] ** 2 <= experts:
        return float(sum(p * (share @ _meet(one, sets, experts)) for p, one in zip(share, sets, strict=True)))
    members, rows = _members(sets, experts).astype(np.float32), 1024  # most tokens may have a set of their own
    blocks = (slice(start, start + rows) for start in range(0, len(sets), rows))
    return float(sum(share[some] @ ((members[some] @ members.T > 0) @ share) for some in blocks))


@underflow_is_right
def entropy(trace: Trace) -> Array:
    """How undecided the routers are: the entropy of their softmax over all experts, in nats (L, N), at most ln E."""
    logits = trace.logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    total = p.sum(-1)
    undecided: Array = np.log(total) - (p * logits).sum(-1) / total
    return undecided


def margin(trace: Trace) -> Array:
    """By how much the worst chosen expert exceeds the best one not chosen, in logits (L, N); infinite where K = E.

    If the margin is small, even a tiny change of the weights sends the token to other experts. It is negative if a
    router chooses by something other than its logits, for example after a capacity has refused an expert.
    """
    chosen = (trace.experts[..., None] == np.arange(trace.logits.shape[2])).any(2)  # (L, N, E)
    worst_in = np.where(chosen, trace.logits, np.inf).min(-1)
    best_out = np.where(chosen, -np.inf, trace.logits).max(-1)
    gap: Array = worst_in - best_out
    return gap


def co_activation(trace: Trace) -> Array:
    """The share of tokens that go to both expert i and expert j, (L, E, E); the diagonal is the share that goes to i.

    Row i divided by its diagonal entry is the probability of each other expert, given expert i.

    Raises:
        UserError: there are more than ``MOST_EXPERTS`` experts.
    """
    experts = trace.logits.shape[2]
    check_experts(experts)
    counts = []
    for chosen in trace.experts:  # (N, K)
        pairs = chosen[:, :, None] * experts + chosen[:, None, :]  # (N, K, K)
        there = (chosen[:, :, None] >= 0) & (chosen[:, None, :] >= 0)
        counts.append(np.bincount(pairs[there], minlength=experts**2).reshape(experts, experts))
    together: Array = np.stack(counts) / len(trace.tokens)
    return together


def check_experts(experts: int) -> None:
    """Raises ``UserError`` if a layer has more experts than ``MOST_EXPERTS``."""
    if experts > MOST_EXPERTS:
        raise UserError(
            f"the model has {experts:,} experts per layer, which is {experts**2:,} pairs of experts: statistics of "
            f"pairs and of single experts are possible for up to {MOST_EXPERTS:,}, so look at a smaller model."
        )


def favourite_tokens(
    trace: Trace, layer: int, top: int = 5, prior: float = 10.0, choice: Choice = "either"
) -> list[list[Favourite]]:
    """For each of the E experts of a layer, the ``top`` tokens with the largest lift, best first.

        lift = (n_ve + prior · b_e) / (n_v + prior) / b_e

    n_v is how often token v occurs, n_ve how often token v goes to expert e as its ``choice``, and b_e the share of all
    tokens that go to e. The ``prior`` imaginary occurrences of v, routed like the average token, prevent a rare token
    from ranking high by luck. Only tokens with a lift above 1 are listed.

    Raises:
        UserError: there is no such layer, or no such choice; or there are more than ``MOST_EXPERTS`` experts.
    """
    layers = len(trace.experts)
    check_experts(trace.logits.shape[2])
    if not 0 <= layer < layers:
        raise UserError(f"There is no layer {layer}; choose one from 0 to {layers - 1}.")
    chosen = _chosen(trace, choice)[layer]  # (N, k)
    vocabulary, index = np.unique(trace.tokens, return_inverse=True)
    count = np.bincount(index)  # (V,)  n_v
    favourites = []
    for e in range(trace.logits.shape[2]):  # one by one, because (V, E) numbers may be too many
        sent = (chosen == e).any(1)  # (N,)
        taken = np.bincount(index, weights=sent)  # (V,)  n_ve
        base = sent.mean()  # b_e
        lift = (taken + prior * base) / ((count + prior) * (base if base > 0 else 1))
        favourites.append(
            [
                Favourite(int(vocabulary[v]), int(count[v]), float(taken[v] / count[v]), float(lift[v]))
                for v in np.argsort(-lift, kind="stable")[:top]
                if lift[v] > 1
            ]
        )
    return favourites


def _chosen(trace: Trace, choice: Choice) -> Array:
    """The experts that count (L, N, k), k = 1 or K."""
    active = trace.experts.shape[2]
    if choice == "second" and active == 1:
        raise UserError("There is no second choice if active_experts is 1; choose the first.")
    columns = {"first": slice(0, 1), "second": slice(1, 2), "either": slice(None)}
    if choice not in columns:
        raise UserError(f"The choice {choice!r} is unknown; choose first, second or either.")
    return trace.experts[:, :, columns[choice]]
