"""Evaluation: the loss over every token of a text, without router noise and without dropped assignments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import tree
from minimoe.core.arrays import Array, like, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.losses import cross_entropy, objective
from minimoe.losses.objective import Objective, Shard
from minimoe.parallel.thread_pool import Map

SEQUENCES = 16
"""Sequences per forward pass; this changes only the speed."""


class Evaluation(NamedTuple):
    loss: float  # nats per token
    tokens: int  # how many tokens were predicted
    load: NDArray[np.float64]  # (L, E)  share of each layer's assignments


def evaluate(
    params: Decoder, config: ModelConfig, documents: Sequence[NDArray[np.int32]], run: Map = map
) -> Evaluation:
    """The mean loss over all tokens of ``documents`` except the first of each document, which nothing predicts.

    A document is read in consecutive pieces of ``config.context`` tokens, each without the pieces before it.

    Raises:
        UserError: no document has two tokens, so there is nothing to predict; or the loss is not finite.
    """
    shards = [shard for document in documents for shard in _shards(params, document, config.context)]
    if not shards:
        raise UserError("the text is one token long, which leaves nothing to predict: give a longer text.")
    goal = Objective(training=False)
    done = list(run(lambda shard: objective.forward(params, shard, config, goal, keep=False), shards))
    count = sum(int(one.sums.loss.tokens) for one in done)
    loss = sum(float(one.sums.loss.total) for one in done) / count
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss}, expected a finite number: the model has diverged or is damaged, so use an earlier "
            "checkpoint, or download it again."
        )
    stats = tree.add(*(one.sums.stats for one in done))
    assignments = np.stack([to_host(layer.assignments) for layer in stats])
    load = assignments / assignments.sum(1, keepdims=True, dtype=np.float64)
    return Evaluation(loss, count, load)


def bits_per_byte(result: Evaluation, size: int) -> float:
    """The loss in bits per byte of the predicted text, of ``size`` UTF-8 bytes; comparable between tokenizers."""
    return result.loss * result.tokens / (math.log(2) * size)


class Piece(NamedTuple):
    targets: NDArray[np.int32]  # (T,)  the predicted tokens; the last piece may be shorter
    nats: float  # the loss, summed over the targets


def by_piece(params: Decoder, config: ModelConfig, document: NDArray[np.int32], run: Map = map) -> list[Piece]:
    """The summed loss of each piece of a document, in order; ``evaluate`` takes the mean over the same tokens."""

    def pieces(shard: Shard) -> list[Piece]:
        logits, _, _ = decoder.forward(params, shard.tokens, config, Mode(estimate_load=False))
        return [
            Piece(to_host(targets), float(cross_entropy.forward(z, targets)[0].total))
            for z, targets in zip(logits, shard.targets, strict=True)
        ]

    return [piece for shard in run(pieces, _shards(params, document, config.context)) for piece in shard]


def _shards(params: Decoder, document: NDArray[np.int32], context: int) -> list[Shard]:
    """The pieces of a document, ``SEQUENCES`` at a time; the last, shorter piece is a shard of its own."""
    tokens, targets = document[:-1], document[1:]
    whole = len(tokens) // context * context

    def shard(start: int, stop: int, length: int) -> Shard:
        def rows(ids: NDArray[np.int32]) -> Array:
            return like(params.norm.gain, ids[start:stop].reshape(-1, length))

        return Shard(rows(tokens), rows(targets))

    step = SEQUENCES * context
    shards = [shard(start, min(start + step, whole), context) for start in range(0, whole, step)]
    if whole < len(tokens):
        shards.append(shard(whole, len(tokens), len(tokens) - whole))
    return shards
