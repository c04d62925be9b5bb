"""The decoder: tokens in, a score for every possible next token out. This is the whole model.

    embedding → L blocks → RMSNorm → linear

Jiang et al. 2024, arXiv 2401.04088 (Mixtral).  Lesson: lessons/10_decoder.ipynb
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.arrays import Array, array_module
from minimoe.config import ModelConfig
from minimoe.data_parallel import ALONE, Group
from minimoe.layers import block, embedding, linear, rmsnorm, rope
from minimoe.layers.attention import Past
from minimoe.layers.block import Block
from minimoe.layers.embedding import Embedding
from minimoe.layers.linear import Linear
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.router import RouterStats


class Decoder(NamedTuple):
    embedding: Embedding
    blocks: list[Block]
    norm: RMSNorm
    head: Linear | None  # (D, V), or None to use the embedding table again


class Cache(NamedTuple):
    embedding: embedding.Cache
    blocks: list[block.Cache]
    norm: rmsnorm.Cache
    head: linear.Cache


class Routed(NamedTuple):
    """What the routers of all layers report."""

    stats: list[RouterStats]  # L
    dropped: list[int]  # L: entries lost to a full expert


def init(rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> Decoder:
    """A decoder in the shapes of ``config``, drawn from ``rng``, on the host.

    The embedding starts large enough that the first blocks add to a token instead of drowning it; a table that is also
    the output layer starts as small as one, so that the first prediction is undecided.
    """
    table_std = 0.02 if config.tied_embeddings else 0.5
    return Decoder(
        embedding=embedding.init(rng, config.vocab_size, config.width, std=table_std, dtype=dtype),
        blocks=[block.init(rng, config, dtype) for _ in range(config.layers)],
        norm=rmsnorm.init(config.width, dtype),
        head=None
        if config.tied_embeddings
        else linear.init(rng, config.width, config.vocab_size, std=0.02, dtype=dtype),
    )


def forward(
    params: Decoder,
    tokens: Array,
    config: ModelConfig,
    *,
    noise: Array | None = None,
    capacity_factor: float | None = None,
    estimate_load: bool = True,
    mask: Array | None = None,
    past: Sequence[Past] | None = None,
    position: int = 0,
    group: Group = ALONE,
) -> tuple[Array, Routed, Cache]:
    """tokens (B, T) of integers in [0, V) → logits (B, T, V).

    Training passes ``noise`` (L, B, T, E) drawn from N(0, 1), and perhaps a ``capacity_factor``; without them the
    model is deterministic and drops nothing. ``mask`` (B, T) of 0 and 1 keeps padding out of the routers' sums.
    ``past`` holds each layer's keys and values of the ``position`` tokens before these (fewer under a window). The
    workers of a ``group`` keep experts of their own: see ``moe.forward``.
    """
    xp = array_module(params.norm.gain)
    dtype = params.norm.gain.dtype
    positions = xp.arange(position, position + tokens.shape[1])
    rotation = rope.init(positions, config.head_width, config.rope_theta, dtype)
    x, embedded = embedding.forward(params.embedding, tokens)
    routed, caches = Routed([], []), []
    for layer, block_params in enumerate(params.blocks):
        x, stats, dropped, cache = block.forward(
            block_params,
            x,
            rotation,
            config,
            noise=None if noise is None else noise[layer],
            capacity_factor=capacity_factor,
            estimate_load=estimate_load,
            mask=mask,
            past=None if past is None else past[layer],
            group=group,
        )
        routed.stats.append(stats)
        routed.dropped.append(dropped)
        caches.append(cache)
    x, normed = rmsnorm.forward(params.norm, x, config.norm_eps)
    logits, headed = linear.forward(output_layer(params), x)
    return logits, routed, Cache(embedded, caches, normed, headed)


def backward(params: Decoder, cache: Cache, dlogits: Array, dstats: list[RouterStats] | None = None) -> Decoder:
    """dlogits (B, T, V), and for each layer the gradient of the losses by its router's sums → every gradient.

    The chain of forward, walked from its end. A tied table is used twice, so its two gradients add up.
    """
    dx, dhead = linear.backward(output_layer(params), cache.head, dlogits.reshape(*cache.head.x.shape[:-1], -1))
    dx, dnorm = rmsnorm.backward(params.norm, cache.norm, dx)
    dblocks = []
    for layer in reversed(range(len(params.blocks))):
        dx, dblock = block.backward(
            params.blocks[layer], cache.blocks[layer], dx, None if dstats is None else dstats[layer]
        )
        dblocks.append(dblock)
    dembedding = embedding.backward(params.embedding, cache.embedding, dx)
    if params.head is None:
        dembedding = Embedding(dembedding.table + dhead.weight.T)
    return Decoder(dembedding, dblocks[::-1], dnorm, None if params.head is None else dhead)


def output_layer(params: Decoder) -> Linear:
    """The linear layer to the logits: the head, or the transposed embedding table where they are tied."""
    return Linear(params.embedding.table.T) if params.head is None else params.head
