"""The key/value cache: what attention remembers, so that a new token costs one token's work and not the whole text's.

A token's keys and values depend on the tokens before it alone, so they are computed once and kept. With a window w a
query sees at most w positions, itself among them; older ones are forgotten, and memory stays the same however long
the text grows:

    append →  ▓▓▓▓▓▓▓▓▓▓▓▓░░░░    2w rows; the newest w are in sight
    full   →  ▓▓▓▓▓░░░░░░░░░░░    the newest w − 1 move to the front, about once every w tokens

so that appending costs O(1) on average and what attention reads is always one contiguous piece, in order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minimoe.arrays import Array, array_module
from minimoe.config import ModelConfig
from minimoe.errors import UserError
from minimoe.layers.attention import KeyValues
from minimoe.layers.decoder import Decoder


class LayerCache:
    """Rotated keys and values of one layer, up to the newest position."""

    def __init__(self, like: Array, batch: int, kv_heads: int, head_width: int, window: int) -> None:
        xp = array_module(like)
        self.window = window
        self.keys = xp.empty((batch, 2 * window, kv_heads, head_width), like.dtype)  # (B, 2w, G, C)
        self.values = xp.empty_like(self.keys)
        self.length = 0  # rows in use

    def append(self, keys: Array, values: Array) -> KeyValues:
        """keys and values (B, T, G, C) of T ≤ w new positions → views (B, S, G, C) of all that these may see.

        The views are good until the next call.
        """
        new = keys.shape[1]
        if self.length + new > self.keys.shape[1]:
            self._forget()
        stop = self.length + new
        self.keys[:, self.length : stop] = keys
        self.values[:, self.length : stop] = values
        self.length = stop
        seen = slice(max(0, stop - new - self.window + 1), stop)
        return KeyValues(self.keys[:, seen], self.values[:, seen])

    def _forget(self) -> None:
        """Moves the w − 1 newest rows, which the next query still sees, to the front."""
        kept = self.window - 1
        for rows in (self.keys, self.values):
            rows[:, :kept] = rows[:, self.length - kept : self.length].copy()  # they may overlap
        self.length = kept


@dataclass
class KVCache:
    """The cache of every layer, for a batch of sequences of equal length."""

    config: ModelConfig  # with the window of generation
    batch: int
    window: int
    layers: list[LayerCache]
    position: int = 0  # of the next token: how many were read so far


def init(params: Decoder, config: ModelConfig, batch: int = 1) -> KVCache:
    """An empty cache for ``batch`` sequences, where ``params`` live and in their dtype.

    Raises:
        UserError: ``batch`` is less than 1.
    """
    if batch < 1:
        raise UserError(f"batch {batch} holds no sequence: it must be at least 1.")
    window = generation_window(config)
    layers = [LayerCache(params.norm.gain, batch, config.kv_heads, config.head_width, window) for _ in params.blocks]
    return KVCache(dataclasses.replace(config, window=window), batch, window, layers)


def generation_window(config: ModelConfig) -> int:
    """How many positions a query sees in generation: the model's window, but never more than its context.

    Trained on T tokens, a model has never looked further back, and the angles that RoPE gives to larger distances are
    unknown to it. So a text of any length is written by letting every token see the newest T at most. With a cache the
    logits are those of ``decoder.forward`` of the whole text with this window, to rounding.
    """
    return config.context if config.window is None else min(config.window, config.context)
