"""Embedding: a learned vector for every token of the vocabulary.

    y_t = table[token_t]

Lesson: lessons/01_tokens_and_embedding.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module
from minimoe.core.ids import check_on_host


class Embedding(NamedTuple):
    table: Array  # (V, D)


class Cache(NamedTuple):
    tokens: Array  # (...) integers


def init(
    rng: np.random.Generator, vocabulary: int, width: int, std: float = 0.02, dtype: DTypeLike = np.float32
) -> Embedding:
    """Rows drawn from N(0, std²)."""
    return Embedding((std * rng.standard_normal((vocabulary, width))).astype(dtype))


def forward(params: Embedding, tokens: Array) -> tuple[Array, Cache]:
    """tokens (...) of integers in [0, V) → y (..., D)."""
    check_on_host(tokens, len(params.table))
    return params.table[tokens], Cache(tokens)


def backward(params: Embedding, cache: Cache, dy: Array) -> Embedding:
    """dy (..., D) → the gradient of the table; tokens are integers and have none.

    A row is used once for every position at which its token occurs, so

        dtable[v] = Σ_{t : token_t = v} dy_t

    Sorting by token makes each sum one contiguous segment, which is faster than adding rows one by one, and always
    adds them in the same order. The plain form is ``np.add.at(dtable, tokens, dy)``.
    """
    xp = array_module(dy)
    tokens = cache.tokens.reshape(-1)
    order = xp.argsort(tokens, kind="stable")
    vocabulary = xp.arange(params.table.shape[0])
    starts = xp.searchsorted(tokens[order], vocabulary, side="left")  # (V,)
    stops = xp.searchsorted(tokens[order], vocabulary, side="right")
    # Tokens above the largest one that occurs start after the last row: one more row of zeros makes that start valid.
    dy_sorted = xp.zeros((len(tokens) + 1, dy.shape[-1]), dy.dtype)
    dy_sorted[:-1] = dy.reshape(-1, dy.shape[-1])[order]
    # In float64, because CuPy subtracts running sums: in float32 a rare token would get the rounding of all before it.
    sums = xp.add.reduceat(dy_sorted, starts, axis=0, dtype=np.float64)  # an empty segment gives a stray row
    return Embedding(xp.where((starts < stops)[:, None], sums, 0).astype(dy.dtype, copy=False))
