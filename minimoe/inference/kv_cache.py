"""The key/value cache: keep the keys and values of earlier tokens, so that only the new token has to be computed.

The keys and values of a token do not depend on later tokens, so they are computed once. With a window w, a token sees
itself and the w − 1 tokens before it. Older ones can be forgotten, and the memory does not grow with the text:

    append →   ▓▓▓▓▓▓▓▓▓▓▓▓░░░░    up to 2w rows, in order; the next token sees the last w − 1
    full →     ▓▓▓▓▓▓▓░░░░░░░░░    only those are copied to the front of a new buffer: about once every w tokens

Appending therefore takes O(1) time on average, and attention always reads one contiguous range of rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.attention import KeyValues
from minimoe.layers.decoder import Decoder


class LayerCache:
    """The rotated keys and the values of one layer, for the positions that can still be seen."""

    def __init__(self, empty: Array, window: int) -> None:
        """``empty`` (B, 0, G, C) gives the device, the dtype and the shape of the cache."""
        self.keys = self.values = empty  # (B, rows, G, C)
        self.length = 0  # rows in use
        self.window = window

    def append(self, keys: Array, values: Array) -> KeyValues:
        """keys and values (B, n, G, C) of the next n ≤ w positions → all that at least one of these positions sees.

        The returned keys and values are (B, S, G, C), and include the new ones.
        """
        new = keys.shape[1]
        if self.length + new > self.keys.shape[1]:
            self._make_room(new)
        start, self.length = self.length, self.length + new
        self.keys[:, start : self.length] = keys
        self.values[:, start : self.length] = values
        seen = slice(max(0, start - self.window + 1), self.length)
        return KeyValues(self.keys[:, seen], self.values[:, seen])

    def _make_room(self, new: int) -> None:
        """Copies what the next token sees to new buffers, twice as long as needed but never longer than 2w."""
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
    position: int = 0  # the position of the next token, which is the number of tokens read so far
    plan: Any = None  # what fast_decode prepares at its first token


def init(params: Decoder, config: ModelConfig, batch: int = 1) -> KVCache:
    """An empty cache for ``batch`` sequences, on the device and in the dtype of ``params``.

    Raises:
        UserError: ``batch`` is less than 1.
    """
    if batch < 1:
        raise UserError(f"batch {batch} leaves no sequence: choose a whole number of at least 1.")
    gain = params.norm.gain
    empty = array_module(gain).empty((batch, 0, config.kv_heads, config.head_width), gain.dtype)
    window = generation_window(config)
    layers = [LayerCache(empty, window) for _ in params.blocks]
    return KVCache(dataclasses.replace(config, window=window), batch, window, layers)


def generation_window(config: ModelConfig) -> int:
    """How many positions a token sees in generation: the model's window, but never more than its context.

    A model that was trained on T tokens at a time has never seen larger distances, and it does not know the angles that
    RoPE gives to them. To write a text of any length, every token therefore sees at most the newest T. The logits with
    a cache are those of ``decoder.forward`` for the whole text with this window, up to rounding.
    """
    return config.context if config.window is None else min(config.window, config.context)


def _with_room(kept: Array, rows: int) -> Array:
    """A buffer (B, rows, G, C) that begins with the rows of ``kept``."""
    xp = array_module(kept)
    buffer: Array = xp.empty((kept.shape[0], rows, *kept.shape[2:]), kept.dtype)
    buffer[:, : kept.shape[1]] = kept
    return buffer
