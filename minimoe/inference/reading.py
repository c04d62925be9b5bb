"""Reading a text that is already there: the hidden states of every token, in pieces that need little memory.

Evaluation and the routing microscope read long texts and keep almost nothing of what a layer computes. A sequence of
more than ``TOKENS`` tokens is read in pieces, with the keys and values of the earlier pieces in a cache, so only the
memory for this cache grows with the length of the sequence. The logits are not computed here: for a large vocabulary,
they need more memory than everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig
from minimoe.inference.kv_cache import LayerCache
from minimoe.layers import block, decoder
from minimoe.layers.decoder import Decoder, Hidden
from minimoe.layers.mode import Mode

TOKENS = 2048
"""Tokens that go through the model at once, at most."""

READING = Mode(estimate_load=False)


def sequences_at_once(length: int) -> int:
    """How many sequences of this length go through the model together."""
    return max(1, TOKENS // length)


def read(
    params: Decoder,
    config: ModelConfig,
    tokens: Array,
    keep: Callable[[block.Cache], Any] | None = None,
    mode: Mode = READING,
) -> Iterator[tuple[slice, Hidden]]:
    """tokens (B, T) → the hidden states of consecutive positions, each time with the slice of these positions.

    ``keep`` says what is kept of each block's cache; nothing by default.
    """
    batch, length = tokens.shape
    at_once = max(1, TOKENS // batch)
    if length <= at_once:
        yield slice(0, length), decoder.hidden(params, tokens, config, mode, keep=keep)
        return
    gain = params.norm.gain
    empty = array_module(gain).empty((batch, 0, config.kv_heads, config.head_width), gain.dtype)
    seen = length if config.window is None else min(config.window, length)
    past = [LayerCache(empty, max(seen, at_once)) for _ in params.blocks]
    for start in range(0, length, at_once):
        part = slice(start, min(start + at_once, length))
        yield (
            part,
            decoder.hidden(params, tokens[:, part], config, mode, past=past, position=start, keep=keep),
        )
