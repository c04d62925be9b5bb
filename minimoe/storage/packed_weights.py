"""Weights that are no float32 arrays, but stand in the tree of parameters and act like arrays where layers use them.

    experts.w_up[e]     Stack     read from the disk, or from the cache, and made float32
    x @ query.weight    Matrix    in memory in the form of its file, made float32 for each product
    table[tokens]       Table     only the rows of the tokens are made float32

Each access gives a new array, so an array may be kept while the next one is made.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.core.arrays import Array
from minimoe.storage import encoded
from minimoe.storage.encoded import Encoded
from minimoe.storage.expert_cache import READING, WRITING, Content, ExpertCache


class Stack:
    """A stack of experts' matrices (E, inputs, outputs) that are read when they are asked for, one at a time."""

    def __init__(self, layer: int, field: str, of: list[Encoded], cache: ExpertCache, places: list[slice]) -> None:
        self.layer, self.field, self.of, self.cache, self.places = layer, field, of, cache, places
        self.shape, self.dtype = (len(of), *of[0].shape), np.dtype(np.float32)
        self.size, self.ndim = int(np.prod(self.shape)), 3

    def __getitem__(self, e: int) -> NDArray[np.float32]:
        # an expert is used once for its three matrices, of which w_gate comes first
        with self.cache.use((self.layer, e), counted=self.field == "w_gate") as content:
            return _timed(self.of[e], content[self.places[e]], self.cache)

    def __len__(self) -> int:
        return len(self.of)


class Matrix:
    """A matrix that is in memory in the form of its file and becomes float32 for each product ``x @ matrix``."""

    __array_ufunc__ = None  # so that an array leaves the product to this class

    def __init__(self, of: Encoded, content: Content, cache: ExpertCache) -> None:
        self.of, self.content, self.cache = of, content, cache
        self.shape, self.dtype, self.ndim = of.shape, np.dtype(np.float32), len(of.shape)
        self.size = int(np.prod(self.shape))

    def __rmatmul__(self, x: Array) -> Array:
        product: Array = x @ self.dense()
        return product

    def dense(self) -> Array:
        """The matrix in float32, for code that needs it for more than a product."""
        return _timed(self.of, self.content, self.cache)


class Table:
    """The embedding table (V, D), of which only the rows of a pass become float32. Every pass begins with it."""

    def __init__(self, of: Encoded, content: Content | None, values: Array | None, cache: ExpertCache) -> None:
        self.of, self.content, self.values, self.cache = of, content, values, cache
        self.shape, self.dtype, self.ndim = of.shape, np.dtype(np.float32), 2
        self.size = int(np.prod(self.shape))

    def __getitem__(self, tokens: Any) -> Array:
        count = int(np.size(tokens))
        self.cache.begin(WRITING if count == 1 else READING, count)
        if self.values is not None:
            return self.values[tokens]
        assert self.content is not None
        rows = encoded.views(self.of, self.content)[""][tokens]
        return encoded.widened(self.of, rows)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> Array:  # noqa: N802 - the name that arrays have for it
        """The output layer of a model with a tied table, which is kept in float32."""
        assert self.values is not None
        return self.values.T


def _timed(of: Encoded, content: Content, cache: ExpertCache) -> NDArray[np.float32]:
    start = time.perf_counter()
    values = encoded.decode(of, content)
    cache.unpacked(time.perf_counter() - start)
    return values
