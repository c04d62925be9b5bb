"""A block: attention moves information between tokens, experts process each token, and both add to a residual stream.

    h = x + Attention(RMSNorm(x)),    y = h + MoE(RMSNorm(h))

In the first ``dense_layers`` blocks of a model, a dense layer stands in the place of the mixture.

Normalising before attention and experts, not after them, leaves a straight path from the loss to every layer (Xiong et
al. 2020, arXiv 2002.04745).  Lesson: lessons/10_decoder.ipynb
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.summary import brief
from minimoe.layers import attention, dense, moe, rmsnorm
from minimoe.layers.attention import Attention, Past
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.moe import MoE
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.layers.rope import Rotation
from minimoe.layers.routing import RouterStats


@brief
class Block(NamedTuple):
    attention_norm: RMSNorm
    attention: Attention
    moe_norm: RMSNorm
    moe: MoE  # without router and experts in a dense layer


@brief
class Cache(NamedTuple):
    attention_norm: rmsnorm.Cache
    attention: attention.Cache
    moe_norm: rmsnorm.Cache
    moe: Any  # moe.Cache, or swiglu.Cache of a dense layer


@brief
class Result(NamedTuple):
    y: Array  # (B, T, D)
    stats: RouterStats | None  # None for a dense layer
    dropped: Any  # number of routing entries that were refused by a full expert
    cache: Cache


def init(
    rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32, *, is_dense: bool = False
) -> Block:
    """Fresh parameters of one block, in the shapes of ``config``; ``is_dense`` asks for a dense layer.

    The two products that write to the residual stream start smaller by a factor of √(2L), because the stream adds up
    2L of them (Radford et al. 2019).
    """
    residual = (2 * config.layers) ** -0.5
    return Block(
        attention_norm=rmsnorm.init(config.width, dtype),
        attention=attention.init(
            rng,
            config.width,
            config.heads,
            config.kv_heads,
            config.head_width,
            output_std=residual * (config.heads * config.head_width) ** -0.5,
            dtype=dtype,
            qk_norm=config.qk_norm,
        ),
        moe_norm=rmsnorm.init(config.width, dtype),
        moe=dense.init(rng, config, residual, dtype)
        if is_dense
        else moe.init(rng, config, output_std=residual * config.expert_width**-0.5, dtype=dtype),
    )


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array], *, is_dense: bool = False) -> Block:
    """The parameters, each made by calling ``array`` with its shape."""
    return Block(
        attention_norm=RMSNorm(array((config.width,))),
        attention=attention.blank(config, array),
        moe_norm=RMSNorm(array((config.width,))),
        moe=dense.blank(config, array) if is_dense else moe.blank(config, array),
    )


def forward(
    params: Block,
    x: Array,
    rotation: Rotation,
    config: ModelConfig,
    mode: Mode = EVALUATION,
    past: Past | None = None,
) -> Result:
    """x (B, T, D) → y (B, T, D), and what the router reports.

    The arguments are those of ``attention.forward`` and ``moe.forward``.
    """
    normed, attention_norm = rmsnorm.forward(params.attention_norm, x, config.norm_eps)
    gathered, attended = attention.forward(
        params.attention, normed, rotation, config.head_width, config.window, past, config.norm_eps, mode.starts
    )
    h = x + gathered
    normed, moe_norm = rmsnorm.forward(params.moe_norm, h, config.norm_eps)
    stats: RouterStats | None = None
    dropped: Any = 0
    mixed: Any
    if dense.is_dense(params.moe):
        y, mixed = dense.forward(params.moe, normed)
    else:
        y, stats, dropped, mixed = moe.forward(params.moe, normed, config, mode)
    y += h
    return Result(y, stats, dropped, Cache(attention_norm, attended, moe_norm, mixed))


def backward(params: Block, cache: Cache, dy: Array, dstats: RouterStats | None) -> tuple[Array, Block]:
    """dy (B, T, D), and the gradient with respect to the router's sums → dx (B, T, D) and the parameters' gradients.

    A residual connection adds, so the gradient takes both paths, the direct one and the one through the layer:

        dh = dy + d(MoE ∘ norm)(dy),    dx = dh + d(Attention ∘ norm)(dh)
    """
    if dense.is_dense(params.moe):
        dnormed, dmoe = dense.backward(params.moe, cache.moe, dy)
    else:
        dnormed, dmoe = moe.backward(params.moe, cache.moe, dy, dstats)
    dh, dmoe_norm = rmsnorm.backward(params.moe_norm, cache.moe_norm, dnormed)
    dh += dy
    dnormed, dattention = attention.backward(params.attention, cache.attention, dh)
    dx, dattention_norm = rmsnorm.backward(params.attention_norm, cache.attention_norm, dnormed)
    dx += dh
    return dx, Block(dattention_norm, dattention, dmoe_norm, dmoe)
