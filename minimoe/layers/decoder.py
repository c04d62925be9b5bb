"""The decoder: turn tokens into a score for every possible next token. This is the whole model.

    embedding → L blocks → RMSNorm → linear

Jiang et al. 2024, arXiv 2401.04088 (Mixtral).  Lesson: lessons/10_decoder.ipynb
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.layers import block, dense, embedding, linear, moe, rmsnorm, rope
from minimoe.layers.attention import Past
from minimoe.layers.block import Block
from minimoe.layers.embedding import Embedding
from minimoe.layers.linear import Linear
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.moe import MoE
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.routing import RouterStats


@brief
class Decoder(NamedTuple):
    embedding: Embedding
    blocks: list[Block]
    norm: RMSNorm
    head: Linear | None  # (D, V), or None to use the embedding table again


@brief
class Cache(NamedTuple):
    embedding: embedding.Cache
    blocks: list[block.Cache]
    norm: rmsnorm.Cache
    head: linear.Cache


@brief
class Routed(NamedTuple):
    """What the routers report, one entry for each layer with a router: L, less the dense layers."""

    stats: list[RouterStats]
    dropped: list[Any]  # number of routing entries that were refused by a full expert


@brief
class Result(NamedTuple):
    logits: Array  # (B, T, V)
    routed: Routed
    cache: Cache


@brief
class Hidden(NamedTuple):
    """Everything before the output layer."""

    x: Array  # (B, T, D)  normalised: the input of the output layer
    routed: Routed
    embedding: embedding.Cache
    blocks: list[Any]  # L: what was kept of each block's cache, the whole by default
    norm: rmsnorm.Cache


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` for settings that cannot train a language model: see ``moe.check`` and ``check_causal``."""
    moe.check(config)
    check_causal(config)


def check_causal(config: ModelConfig) -> None:
    """Raises ``UserError`` if the router lets a later token change the routing of an earlier one.

    Such a model would see, while it is trained, what it is asked to predict.
    """
    if getattr(moe.router_of(config), "LOOKS_AHEAD", False):
        raise UserError(
            f"router {config.router!r} looks at later tokens to route earlier ones, so a language model cannot use it: "
            f"choose one of {', '.join(moe.causal_routers())}; for images and actions, call it through "
            "minimoe.layers.moe."
        )


def init(
    rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32, *, look_ahead: bool = False
) -> Decoder:
    """Fresh parameters in the shapes of ``config``, drawn from ``rng``, on the host.

    The embedding starts large enough that the first blocks add to a token and do not dominate it. A table that is also
    the output layer starts as small as an output layer, so that the first predictions are nearly uniform.

    ``look_ahead`` allows a router that is not causal, to show what goes wrong with it.

    Raises:
        UserError: the router or the kind of experts does not exist, the router does not allow these settings, or it
            looks at later tokens.
    """
    moe.check_forward(config)
    if not look_ahead:
        check_causal(config)
    table_std = 0.02 if config.tied_embeddings else 0.5
    return Decoder(
        embedding=embedding.init(rng, config.vocab_size, config.width, std=table_std, dtype=dtype),
        blocks=[block.init(rng, config, dtype, is_dense=i < config.dense_layers) for i in range(config.layers)],
        norm=rmsnorm.init(config.width, dtype),
        head=None
        if config.tied_embeddings
        else linear.init(rng, config.width, config.vocab_size, std=0.02, dtype=dtype),
    )


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Decoder:
    """The parameters, each made by calling ``array`` with its shape: for counting, and for filling from a file."""
    return Decoder(
        embedding=Embedding(array((config.vocab_size, config.width))),
        blocks=[block.blank(config, array, is_dense=i < config.dense_layers) for i in range(config.layers)],
        norm=RMSNorm(array((config.width,))),
        head=None if config.tied_embeddings else Linear(array((config.width, config.vocab_size))),
    )


def draw_noise(
    rng: np.random.Generator, config: ModelConfig, batch: int, context: int, dtype: DTypeLike
) -> Array | None:
    """The noise of the routers for one training step, on the host: (L, B, T, ·), or None if the router uses none."""
    return moe.router_of(config).draw_noise(rng, config, (config.layers, batch, context), dtype)


@underflow_is_right
def forward(
    params: Decoder,
    tokens: Array,
    config: ModelConfig,
    mode: Mode = EVALUATION,
    *,
    past: Sequence[Past] | None = None,
    position: int = 0,
) -> Result:
    """tokens (B, T) of integers in [0, V) → logits (B, T, V), and what the routers report.

    ``mode`` says how the pass is run: see ``Mode``. By default the model is deterministic and drops nothing. ``past``
    holds the keys and values of each layer for the ``position`` earlier tokens, or, if there is a window, for only the
    latest of these tokens.
    """
    x, routed, embedded, caches, normed = hidden(params, tokens, config, mode, past=past, position=position)
    logits, headed = linear.forward(output_layer(params), x)
    return Result(logits, routed, Cache(embedded, caches, normed, headed))


@underflow_is_right
def hidden(
    params: Decoder,
    tokens: Array,
    config: ModelConfig,
    mode: Mode = EVALUATION,
    *,
    past: Sequence[Past] | None = None,
    position: int = 0,
    keep: Callable[[block.Cache], Any] | None = lambda cache: cache,
) -> Hidden:
    """``forward`` without the output layer, for when the logits of all tokens at once would be too large.

    ``keep`` says what is kept of each block's cache; None keeps nothing, so that no cache outlives its block.
    """
    xp = array_module(params.norm.gain)
    dtype = params.norm.gain.dtype
    positions = xp.arange(position, position + tokens.shape[1])
    rotation = rope.init(positions, config.head_width, config.rope_theta, dtype)
    x, embedded = embedding.forward(params.embedding, tokens)
    mode = mode if mode.labels is not None else mode._replace(labels=tokens)
    routed, caches = Routed([], []), []
    for layer, block_params in enumerate(params.blocks):
        x, stats, dropped, cache = block.forward(
            block_params, x, rotation, config, mode.at_layer(layer), None if past is None else past[layer]
        )
        if stats is not None:
            routed.stats.append(stats)
            routed.dropped.append(dropped)
        caches.append(None if keep is None else keep(cache))
        del cache  # or it would live until the next block has made its own
    x, normed = rmsnorm.forward(params.norm, x, config.norm_eps)
    return Hidden(x, routed, embedded, caches, normed)


@underflow_is_right
def backward(
    params: Decoder, cache: Cache, dlogits: Array, dstats: Sequence[RouterStats | None] | None = None
) -> Decoder:
    """dlogits (B, T, V) or (N, V), and the gradient with respect to each router's sums → every gradient.

    The steps of forward are taken in reverse order. A tied table is used twice, so its two gradients add up.
    """
    # The cross-entropy gives dlogits as rows, (N, V).
    dx, dhead = linear.backward(output_layer(params), cache.head, dlogits.reshape(*cache.head.x.shape[:-1], -1))
    dx, dnorm = rmsnorm.backward(params.norm, cache.norm, dx)
    if dstats is not None:  # the dense layers come first, and have no sums
        dstats = [*[None] * (len(params.blocks) - len(dstats)), *dstats]
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


def mixtures(params: Decoder) -> list[MoE]:
    """The mixtures of a decoder, in the order of its layers, without those layers that are dense."""
    return [of.moe for of in params.blocks if not dense.is_dense(of.moe)]


def output_layer(params: Decoder) -> Linear:
    """The linear layer that computes the logits: the head, or the transposed embedding table if the two are tied."""
    return Linear(params.embedding.table.T) if params.head is None else params.head
