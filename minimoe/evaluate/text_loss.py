"""Evaluation: the loss over every token of a text, without router noise and without dropped assignments.

The memory is bounded for any context (see ``inference.reading``) and for any vocabulary (see ``LOGITS``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import tree
from minimoe.core.arrays import Array, like, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.ids import checked
from minimoe.core.summary import brief
from minimoe.inference import reading
from minimoe.layers import decoder, linear
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.routing import RouterStats
from minimoe.losses import cross_entropy
from minimoe.losses.objective import Shard
from minimoe.parallel.thread_pool import Map

SEQUENCES = 16
"""Sequences per forward pass, at most; this changes only the speed."""

LOGITS = 2**22
"""Logits that are in memory at once, at most, unless a single token has more."""


@brief
class Evaluation(NamedTuple):
    loss: float  # nats per token
    tokens: int  # how many tokens were predicted
    load: NDArray[np.float64]  # (L, E)  share of each layer's assignments; dense layers are left out


def evaluate(
    params: Decoder,
    config: ModelConfig,
    documents: Sequence[NDArray[np.int32]],
    run: Map = map,
    mode: Mode = reading.READING,
) -> Evaluation:
    """The mean loss over all tokens of ``documents`` except the first of each document, which nothing predicts.

    A document is read in consecutive pieces of ``config.context`` tokens, each without the pieces before it. ``mode``
    may set ``skip_below``; the load counts the experts that the router chose before any is skipped.

    Raises:
        UserError: no document has two tokens, so there is nothing to predict; a document is not one row of ids in the
            vocabulary; or the loss is not finite.
    """
    rows = [_checked(document, config) for document in documents]
    shards = [shard for ids in rows for shard in _shards(params, ids, config.context)]
    if not shards:
        raise UserError("the text is one token long, which leaves nothing to predict: give a longer text.")

    def read(shard: Shard) -> tuple[float, list[RouterStats]]:
        nats, stats = 0.0, []
        for _, logits, targets, of_piece in _read(params, config, shard, mode):
            nats += float(cross_entropy.forward(logits, targets)[0].total)
            stats += of_piece
        return nats, tree.add(*stats)

    done = list(run(read, shards))
    count = sum(shard.targets.size for shard in shards)
    loss = sum(nats for nats, _ in done) / count
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss}, expected a finite number: the model has diverged or is damaged, so use an earlier "
            "checkpoint, or download it again."
        )
    stats = tree.add(*(of_shard for _, of_shard in done))
    assignments = np.stack([to_host(layer.assignments) for layer in stats])
    load = assignments / np.maximum(assignments.sum(1, keepdims=True, dtype=np.float64), 1)
    return Evaluation(loss, count, load)


def bits_per_byte(result: Evaluation, size: int) -> float:
    """The loss in bits per byte of the predicted text, of ``size`` UTF-8 bytes; comparable between tokenizers."""
    return result.loss * result.tokens / (math.log(2) * size)


@brief
class Piece(NamedTuple):
    targets: NDArray[np.int32]  # (T,)  the predicted tokens; the last piece may be shorter
    nats: float  # the loss, summed over the targets


def by_piece(params: Decoder, config: ModelConfig, document: NDArray[np.int32], run: Map = map) -> list[Piece]:
    """The summed loss of each piece of a document, in order; ``evaluate`` takes the mean over the same tokens."""
    ids = _checked(document, config)

    def pieces(shard: Shard) -> list[Piece]:
        nats = [0.0] * len(shard.targets)
        for first, logits, targets, _ in _read(params, config, shard):
            for row, (z, of_row) in enumerate(zip(logits, targets, strict=True), first):
                nats[row] += float(cross_entropy.forward(z, of_row)[0].total)
        return [Piece(to_host(targets), total) for targets, total in zip(shard.targets, nats, strict=True)]

    return [piece for shard in run(pieces, _shards(params, ids, config.context)) for piece in shard]


def _checked(document: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    return checked(document, config.vocab_size, axes=(1,), what="The ids of a document")


def _read(
    params: Decoder, config: ModelConfig, shard: Shard, mode: Mode = reading.READING
) -> Iterator[tuple[int, Array, Array, list[list[RouterStats]]]]:
    """Yields the logits (b, t, V) and targets (b, t) of some tokens, at most ``LOGITS`` logits at a time.

    The number in front is the index of the first of these sequences in the shard. The list at the end has the reports
    of the routers; it is empty if other logits of the same positions were yielded before, with these reports.
    """
    head = decoder.output_layer(params)
    for where, found in reading.read(params, config, shard.tokens, mode=mode):
        targets, stats = shard.targets[:, where], [found.routed.stats]
        rows: Any = slice(None), slice(None)
        parts = [rows]
        if targets.size * config.vocab_size > LOGITS:
            step = max(1, LOGITS // config.vocab_size)
            starts = range(0, targets.shape[1], step)
            parts = [(slice(row, row + 1), slice(at, at + step)) for row in range(len(targets)) for at in starts]
        for part in parts:
            logits, _ = linear.forward(head, found.x[part])
            yield part[0].start or 0, logits, targets[part], stats
            stats = []


def _shards(params: Decoder, document: NDArray[Any], context: int) -> list[Shard]:
    """The pieces of a document, ``SEQUENCES`` at a time; the last, shorter piece is a shard of its own."""
    tokens, targets = document[:-1], document[1:]
    whole = len(tokens) // context * context

    def shard(start: int, stop: int, length: int) -> Shard:
        def rows(ids: NDArray[Any]) -> Array:
            return like(params.norm.gain, ids[start:stop].reshape(-1, length))

        return Shard(rows(tokens), rows(targets))

    step = min(SEQUENCES, reading.sequences_at_once(context)) * context
    shards = [shard(start, min(start + step, whole), context) for start in range(0, whole, step)]
    if whole < len(tokens):
        shards.append(shard(whole, len(tokens), len(tokens) - whole))
    return shards
