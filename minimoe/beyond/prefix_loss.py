"""Does a small decoder profit from seeing the future? Its loss on whole sequences, and on prefixes without the future.

    losses(model, sequences, lengths)    nats at the same targets: within whole sequences, and at the end of prefixes

A causal model gives a token the same prediction whether or not other tokens follow it, so the two losses are equal up
to rounding. A layer that looks ahead can read the answer in a whole sequence. When a model writes, only the prefix
exists, and the answer is not in it. The loss on a prefix therefore shows how well the model predicts in use.

``train`` makes a small decoder with any router, even one that language models refuse, or with ``SOFT``: Soft MoE in the
place of router and experts, which the package's own decoder does not offer. For Soft MoE, this module has a forward and
a backward pass of the decoder; all other models are those of
``minimoe.layers.decoder``.  Lesson: lessons/23_who_may_look_ahead.ipynb
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array, underflow_is_right
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.layers import attention, decoder, embedding, linear, moe, rmsnorm, rope, soft_moe
from minimoe.layers.block import Block
from minimoe.layers.decoder import Decoder
from minimoe.losses import cross_entropy, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import clipping, optimizer
from minimoe.text.batches import Texts

SOFT = "soft_moe"
"""The name that stands for Soft MoE where the name of a router is expected."""


@brief
class Model(NamedTuple):
    """A decoder, and what it was trained with."""

    params: Decoder  # with SOFT, the ``moe`` of each block is a SoftMoE
    config: ModelConfig
    router: str


class BlockCache(NamedTuple):
    attention_norm: rmsnorm.Cache
    attention: attention.Cache
    moe_norm: rmsnorm.Cache
    moe: soft_moe.Cache


@brief
class Cache(NamedTuple):
    embedding: embedding.Cache
    blocks: list[BlockCache]
    norm: rmsnorm.Cache
    head: linear.Cache


class Compared(NamedTuple):
    """Mean nats per token at the same targets."""

    whole: float  # in whole sequences
    prefix: float  # at the end of prefixes


class Course(NamedTuple):
    """How often the experts were chosen in each step of a training run."""

    assignments: Array  # (steps, L, E); no columns with SOFT
    tokens: int  # per step


def init(
    rng: np.random.Generator, config: ModelConfig, slots_per_expert: int, dtype: DTypeLike = np.float32
) -> Decoder:
    """A fresh decoder with Soft MoE in every block."""
    params = decoder.init(rng, config, dtype)
    std = (2 * config.layers * config.expert_width) ** -0.5
    layers = [soft_moe.init(rng, config, slots_per_expert, std, dtype) for _ in params.blocks]
    blocks = [block._replace(moe=cast(Any, layer)) for block, layer in zip(params.blocks, layers, strict=True)]
    return params._replace(blocks=blocks)


@underflow_is_right
def forward(params: Decoder, tokens: Array, config: ModelConfig) -> tuple[Array, Cache]:
    """tokens (B, T) → logits (B, T, V): ``decoder.forward`` with Soft MoE."""
    rotation = rope.init(np.arange(tokens.shape[1]), config.head_width, config.rope_theta, params.norm.gain.dtype)
    x, embedded = embedding.forward(params.embedding, tokens)
    caches = []
    for block in params.blocks:
        normed, attention_norm = rmsnorm.forward(block.attention_norm, x, config.norm_eps)
        gathered, attended = attention.forward(
            block.attention, normed, rotation, config.head_width, config.window, norm_eps=config.norm_eps
        )
        x = x + gathered
        normed, moe_norm = rmsnorm.forward(block.moe_norm, x, config.norm_eps)
        mixed, soft = soft_moe.forward(_soft(block.moe), normed, config)
        x = x + mixed
        caches.append(BlockCache(attention_norm, attended, moe_norm, soft))
    x, normed_at_end = rmsnorm.forward(params.norm, x, config.norm_eps)
    logits, headed = linear.forward(decoder.output_layer(params), x)
    return logits, Cache(embedded, caches, normed_at_end, headed)


@underflow_is_right
def backward(params: Decoder, cache: Cache, dlogits: Array) -> Decoder:
    """dlogits (B, T, V) → every gradient: ``decoder.backward`` with Soft MoE, but without sums over tokens.

    Each residual connection passes the gradient on and adds the one through its layer: dx = dy + d(layer ∘ norm)(dy).
    """
    dx, dhead = linear.backward(decoder.output_layer(params), cache.head, dlogits)
    dx, dnorm = rmsnorm.backward(params.norm, cache.norm, dx)
    dblocks = []
    for block, kept in zip(reversed(params.blocks), reversed(cache.blocks), strict=True):
        dnormed, dmoe = soft_moe.backward(_soft(block.moe), kept.moe, dx)
        through, dmoe_norm = rmsnorm.backward(block.moe_norm, kept.moe_norm, dnormed)
        dx = dx + through
        dnormed, dattention = attention.backward(block.attention, kept.attention, dx)
        through, dattention_norm = rmsnorm.backward(block.attention_norm, kept.attention_norm, dnormed)
        dx = dx + through
        dblocks.append(Block(dattention_norm, dattention, dmoe_norm, cast(Any, dmoe)))
    dembedding = embedding.backward(params.embedding, cache.embedding, dx)
    if params.head is None:
        return Decoder(embedding.Embedding(dembedding.table + dhead.weight.T), dblocks[::-1], dnorm, None)
    return Decoder(dembedding, dblocks[::-1], dnorm, dhead)


def train(
    router: str,
    data: Texts,
    config: ModelConfig,
    recipe: TrainConfig,
    seed: int = 0,
    *,
    slots_per_expert: int = 1,
) -> tuple[Model, Course]:
    """Trains a small decoder with a router, whether or not it looks ahead, or with ``SOFT``.

    The coefficient of the balance loss is the router's own. No other auxiliary loss is used, and no noise, so that the
    same seed gives every router the same batches.

    Raises:
        UserError: there is no such router, or it does not allow these settings.
    """
    rng = np.random.default_rng(seed)
    soft = router == SOFT
    config = config if soft else dataclasses.replace(config, router=router)
    start = np.random.default_rng([seed, 1])
    params = init(start, config, slots_per_expert) if soft else decoder.init(start, config, look_ahead=True)
    moments = optimizer.init(params, recipe)
    counts = []
    for step in range(recipe.steps):
        tokens, targets = data.draw(rng, recipe.batch, config.context)
        if soft:
            logits, cache = forward(params, tokens, config)
            loss, at_loss = cross_entropy.forward(logits, targets)
            dlogits = cross_entropy.backward(at_loss, 1 / loss.tokens).reshape(logits.shape)
            gradient, assignments = backward(params, cache, dlogits), []
        else:
            goal = Objective(Coefficients(balance=moe.balance_coefficient(config)))
            totals, gradient = objective.loss_and_gradient(params, [Shard(tokens, targets)], config, goal)
            assignments = [layer.assignments for layer in totals.stats]
        clipping.clip(gradient, recipe.clip)
        optimizer.update(params, gradient, moments, recipe, step)
        if not soft:
            moe.update_state(decoder.mixtures(params), totals.stats, config, recipe)
        counts.append(assignments)
    return Model(params, config, router), Course(np.array(counts), recipe.batch * config.context)


def predict(model: Model, tokens: Array) -> Array:
    """tokens (B, T) → logits (B, T, V), in evaluation."""
    if model.router == SOFT:
        return forward(model.params, tokens, model.config)[0]
    return decoder.forward(model.params, tokens, model.config).logits


def losses(model: Model, sequences: Array, lengths: Sequence[int]) -> Compared:
    """sequences (B, T + 1) → for each n of ``lengths``, the loss of the one token that follows the first n.

    In a whole sequence, the model sees all T tokens, and the token to be predicted is one of them. A prefix ends before
    that token.

    Raises:
        UserError: a length is not in 1 … T.
    """
    T = sequences.shape[1] - 1
    for n in lengths:
        if not 1 <= n <= T:
            raise UserError(f"length {n} is not that of a prefix: choose lengths from 1 to {T}.")
    at = np.array(lengths) - 1
    whole = _nats(predict(model, sequences[:, :-1])[:, at], sequences[:, at + 1])
    prefixes = [_nats(predict(model, sequences[:, :n])[:, -1:], sequences[:, n : n + 1]) for n in lengths]
    return Compared(whole, float(np.mean(prefixes)))


def windows(documents: Sequence[Array], length: int) -> Array:
    """Every document cut into pieces of ``length`` tokens, without its end if that is shorter: (B, length)."""
    pieces = [ids[: len(ids) // length * length].reshape(-1, length) for ids in documents]
    return np.concatenate(pieces)


def _nats(logits: Array, targets: Array) -> float:
    loss, _ = cross_entropy.forward(logits.astype(np.float64), targets)
    return float(loss.total / loss.tokens)


def _soft(layer: Any) -> soft_moe.SoftMoE:
    """The Soft MoE that stands in a block in the place of its ``moe``."""
    assert isinstance(layer, soft_moe.SoftMoE)
    return layer
