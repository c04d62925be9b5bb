"""What quantisation changed: the loss in nats per token, and how many routings are no longer the same.

A routing is the set of experts that a token is sent to in a layer. The experts of a quantised model have the numbers
of those that they were made from, so the sets can be compared; those of two models trained apart cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.arrays import Array, like, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.summary import brief
from minimoe.evaluate import intervals, text_loss
from minimoe.evaluate.intervals import Interval
from minimoe.inference import reading
from minimoe.layers import block, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.routing import experts_by_token
from minimoe.parallel.thread_pool import Map


@brief
class Changes(NamedTuple):
    """What a quantised model lost on a text."""

    name: str  # of the quantised model
    against: str
    nats: Interval  # its loss − that of the other one, in nats per token
    others: NDArray[np.int64]  # (L,)  tokens that are sent to another set of experts, in each layer with a router
    tokens: int  # that each of these layers routed

    @property
    def share(self) -> float:
        """The share of all routings that are others; 0 for a dense model, which has none."""
        return float(self.others.sum()) / max(self.tokens * len(self.others), 1)


def measure(
    names: tuple[str, str],
    quantised: Decoder,
    original: Decoder,
    config: ModelConfig,
    documents: Sequence[NDArray[np.int32]],
    run: Map = map,
    seed: int = 0,
) -> Changes:
    """Compares two models of one config on ``documents``; ``names`` are theirs, that of the quantised one first."""
    ours, theirs = (
        [piece for ids in documents for piece in text_loss.by_piece(params, config, ids, run)]
        for params in (quantised, original)
    )
    nats = intervals.ratios_apart(
        np.array([piece.nats for piece in ours]),
        np.array([piece.nats for piece in theirs]),
        np.array([len(piece.targets) for piece in ours]),
        seed,
    )
    if config.experts == 1:  # a router without a choice
        return Changes(*names, nats, np.zeros(0, np.int64), 0)
    batches = [rows for ids in documents for rows in _batches(ids[:-1], config.context)]

    def count(rows: Array) -> NDArray[np.int64]:
        return np.sum(list(others(quantised, original, config, rows)), axis=0, dtype=np.int64)

    counted = sum(run(count, batches))
    return Changes(*names, nats, np.asarray(counted), sum(rows.size for rows in batches))


def others(quantised: Decoder, original: Decoder, config: ModelConfig, rows: Array) -> Iterator[list[int]]:
    """How many tokens of ``rows`` (B, T) are sent to another set of experts in each layer, for consecutive pieces."""
    read = (reading.read(params, config, like(params.norm.gain, rows), _experts) for params in (quantised, original))
    for (_, mine), (_, theirs) in zip(*read, strict=True):
        yield [
            _differing(a, b) for a, b in zip(mine.blocks, theirs.blocks, strict=True) if a is not None and b is not None
        ]


def _experts(cache: block.Cache) -> NDArray[Any] | None:
    """The experts of each token in ascending order (N, K), -1 for missing ones; None in a dense layer."""
    if not isinstance(cache.moe, moe.Cache):
        return None
    return np.sort(to_host(experts_by_token(cache.moe.routing)), axis=1)


def _differing(ours: NDArray[Any], theirs: NDArray[Any]) -> int:
    """The rows that are not the same set; a router that lets K vary gives one model more columns than the other."""
    most = max(ours.shape[1], theirs.shape[1])
    one, other = (np.pad(a, [(0, 0), (most - a.shape[1], 0)], constant_values=-1) for a in (ours, theirs))
    return int((one != other).any(axis=1).sum())


def _batches(ids: NDArray[Any], context: int) -> Iterator[NDArray[Any]]:
    """A document as windows (B, T) of ``context`` tokens, several at once; the last, shorter one by itself."""
    whole = len(ids) // context * context
    windows, step = ids[:whole].reshape(-1, context), reading.sequences_at_once(context)
    yield from (windows[start : start + step] for start in range(0, len(windows), step))
    if whole < len(ids):
        yield ids[None, whole:]
