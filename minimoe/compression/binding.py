"""M-SMoE: merge the experts of one model into groups, and keep the router as it is.

    1  the R experts with the most tokens lead a group each
    2  every other expert joins the leader whose router logits are most similar to its own, over the same tokens
    3  the neurons of a group's experts are aligned with the leader's, then averaged, weighted by numbers of tokens
    4  the router still has E outputs: those of one group are bound to one expert

If the experts of each group are equal, the bound model computes what the model computed before. With a router of only R
outputs it would not, because the softmax would be over fewer logits.

The bound experts take R/E of the memory. ``unbound`` makes an ordinary stack of E experts out of them, in which the
experts of a group are equal. Every other part of this package can use this stack, but it takes as much memory as before
the merge.

Li et al. 2024, arXiv 2310.01334.  Lesson: lessons/52_merging_and_upcycling.ipynb
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import alignment
from minimoe.compression.vectors import average
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder as decoders
from minimoe.layers import dense
from minimoe.layers import moe as mixtures
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.moe import MoE


class Bound(NamedTuple):
    """R experts, and for each of the E outputs of the router the expert to which it is bound."""

    experts: Experts  # (R, ...)
    group: NDArray[np.int64]  # (E,)


class Seen(NamedTuple):
    """What one layer did with some tokens."""

    logits: NDArray[Any]  # (N, E)  what the router compared
    counts: NDArray[np.int64]  # (E,)  the tokens of each expert


def look(params: Decoder, tokens: NDArray[Any], config: ModelConfig) -> list[Seen]:
    """tokens (B, T) → what each mixture does with them."""
    found = decoders.hidden(params, tokens, config, keep=lambda cache: cache.moe)
    router = mixtures.router_of(config)
    return [
        Seen(router.compared(block.moe.router, cache.router)[0][0], np.array(cache.routing.counts))
        for block, cache in zip(params.blocks, found.blocks, strict=True)
        if not dense.is_dense(block.moe)
    ]


def groups(seen: Seen, count: int) -> NDArray[np.int64]:
    """The group of each expert: (E,) of 0 … R−1, with groups in the order of their leaders' indices.

    Raises:
        UserError: ``count``, the number R of groups, is not between 1 and E.
    """
    E = len(seen.counts)
    if not 1 <= count <= E:
        raise UserError(f"{count} experts are not possible, expected 1 to {E}, the number there is: choose another.")
    leaders = np.sort(np.argsort(-seen.counts, kind="stable")[:count])
    alike = _cosines(seen.logits)[:, leaders]  # (E, R)
    group = alike.argmax(1)
    group[leaders] = np.arange(count)  # a leader leads its own group, even if another's logits are the same
    return group


def bind(moe: MoE, seen: Seen, group: Sequence[int] | NDArray[np.int64]) -> Bound:
    """The mean expert of each group: aligned with the one with most tokens, then averaged, weighted by tokens."""
    index = np.asarray(group)
    merged = []
    for g in range(int(index.max()) + 1):
        members = np.flatnonzero(index == g)
        leader = alignment.expert(moe.experts, int(members[seen.counts[members].argmax()]))
        aligned = [alignment.neurons(leader, alignment.expert(moe.experts, int(e))) for e in members]
        use = seen.counts[members] if seen.counts[members].any() else np.ones(len(members))
        merged.append(Experts(*(average(leaves, use.tolist()) for leaves in zip(*aligned, strict=True))))
    found = alignment.stack(merged)
    return Bound(Experts(*(new.astype(old.dtype) for new, old in zip(found, moe.experts, strict=True))), index)


def unbound(bound: Bound) -> Experts:
    """An ordinary stack of E experts, in which the experts of a group are equal."""
    return Experts(*(leaf[bound.group] for leaf in bound.experts))


def merge_experts(params: Decoder, config: ModelConfig, tokens: NDArray[Any], count: int) -> Decoder:
    """The model with ``count`` different experts in each layer, chosen by what the model does with ``tokens`` (B, T).

    The shape of the model is as before: see ``unbound``.

    Raises:
        UserError: the experts are not SwiGLUs, or there are fewer than ``count``.
    """
    alignment.check(config)
    first = config.dense_layers
    blocks = list(params.blocks[:first])
    for block, seen in zip(params.blocks[first:], look(params, tokens, config), strict=True):
        bound = bind(block.moe, seen, groups(seen, count))
        blocks.append(block._replace(moe=block.moe._replace(experts=unbound(bound))))
    return params._replace(blocks=blocks)


def _cosines(logits: NDArray[Any]) -> NDArray[Any]:
    """(N, E) → the cosine of the logits of each pair of experts, over the tokens: (E, E)."""
    unit = logits / np.maximum(np.linalg.norm(logits, axis=0), np.finfo(logits.dtype).tiny)
    similar: NDArray[Any] = unit.T @ unit
    return similar
