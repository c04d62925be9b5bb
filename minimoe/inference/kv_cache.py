"""The key/value cache: what attention remembers, so that a new token costs one token's work and not the whole text's.

A token's keys and values do not depend on what follows, so they are computed once. With a window w a token sees
itself and the w − 1 before it; older ones can be forgotten, and memory stays the same however long a text grows:

    append →   ▓▓▓▓▓▓▓▓▓▓▓▓░░░░    up to 2w rows, in order; the next token sees the last w − 1
    full →     ▓▓▓▓▓▓▓░░░░░░░░░    only those move, to the front of a new buffer: about once every w tokens

Appending thus costs O(1) on average, and what attention reads is always one piece of memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.attention import KeyValues
from minimoe.layers.decoder import Decoder


class LayerCache:
    """Rotated keys and values of one layer, of the positions that are still in sight."""

    def __init__(self, empty: Array, window: int) -> None:
        """``empty`` (B, 0, G, C) says where the cache lives, its dtype and its shape."""
        self.keys = self.values = empty  # (B, rows, G, C)
        self.length = 0  # rows in use
        self.window = window

    def append(self, keys: Array, values: Array) -> KeyValues:
        """keys and values (B, n, G, C) of the next n ≤ w positions → the (B, S, G, C) that at least one sees."""
        new = keys.shape[1]
        if self.length + new > self.keys.shape[1]:
            self._make_room(new)
        start, self.length = self.length, self.length + new
        self.keys[:, start : self.length] = keys
        self.values[:, start : self.length] = values
        seen = slice(max(0, start - self.window + 1), self.length)
        return KeyValues(self.keys[:, seen], self.values[:, seen])

    def _make_room(self, new: int) -> None:
        """Moves what the next token sees to new buffers, twice as long as needed but never longer than 2w."""
        kept = min(self.length, self.window - 1)
        rows = min(2 * (kept + new), 2 * self.window)
        seen = slice(self.length - kept, self.length)
        self.keys = _with_room(self.keys[:, seen], rows)
        self.values = _with_room(self.values[:, seen], rows)
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
    gain = params.norm.gain
    empty = array_module(gain).empty((batch, 0, config.kv_heads, config.head_width), gain.dtype)
    window = generation_window(config)
    layers = [LayerCache(empty, window) for _ in params.blocks]
    return KVCache(dataclasses.replace(config, window=window), batch, window, layers)


def generation_window(config: ModelConfig) -> int:
    """How many positions a token sees in generation: the model's window, but never more than its context.

    Trained on T tokens, a model has never looked further back, and the angles that RoPE gives to larger distances are
    unknown to it. So a text of any length is written by letting every token see the newest T at most. With a cache the
    logits are those of ``decoder.forward`` of the whole text with this window, to rounding.
    """
    return config.context if config.window is None else min(config.window, config.context)


def _with_room(kept: Array, rows: int) -> Array:
    """A buffer (B, rows, G, C) that begins with the rows of ``kept``."""
    xp = array_module(kept)
    buffer: Array = xp.empty((kept.shape[0], rows, *kept.shape[2:]), kept.dtype)
    buffer[:, : kept.shape[1]] = kept
    return buffer
