"""More tokens: an embedding and an output layer get a row for each id that a tokenizer has gained.

    params, config = grow.vocabulary(params, config, codec.vocab_size, rng)

A model that learned from plain text knows no token that begins an answer or ends one. The logits of the ids that it
knows stay the same, up to the rounding of a wider product.

A new row of the embedding is drawn around the mean of the table, with the spread of each of its columns, so that the
new tokens differ from each other from the first step on. A new column of the output layer is the mean of the old
columns, which makes the new token about as likely as an average one. A table that is also the output layer gets the
rows of an embedding.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.decoder import Decoder
from minimoe.layers.embedding import Embedding
from minimoe.layers.linear import Linear


def vocabulary(
    params: Decoder, config: ModelConfig, size: int, rng: np.random.Generator
) -> tuple[Decoder, ModelConfig]:
    """The model with ``size`` ids, the new ones last. ``params`` are on the host; other leaves are the same arrays.

    Raises:
        UserError: ``size`` is less than the number of ids that the model has; or the router chooses experts by the id,
            from a table that depends on the number of ids.
    """
    V = config.vocab_size
    if size < V:
        raise UserError(f"a vocabulary of {size} is smaller than the {V} ids of the model: give at least as many.")
    if size == V:
        return params, config
    if config.router == "token_hash":
        raise UserError(
            f"router 'token_hash' deals its experts to {V} ids, and would deal all of them again for {size}: tune a "
            "model with another router."
        )
    table = np.concatenate([params.embedding.table, _around_the_mean(params.embedding.table, size - V, rng)])
    head = None if params.head is None else Linear(_with_mean_columns(params.head.weight, size - V))
    return params._replace(embedding=Embedding(table), head=head), dataclasses.replace(config, vocab_size=size)


def _around_the_mean(table: Array, count: int, rng: np.random.Generator) -> Array:
    """New rows (count, D) for a table (V, D): N(mean, variance) of each of its columns."""
    drawn = rng.standard_normal((count, table.shape[1]))
    return (table.mean(0) + table.std(0) * drawn).astype(table.dtype)


def _with_mean_columns(weight: Array, count: int) -> Array:
    """A weight (D, V) with ``count`` more columns, each the mean of the V others."""
    return np.concatenate([weight, np.repeat(weight.mean(1, keepdims=True), count, axis=1)], axis=1)
