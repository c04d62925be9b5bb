"""Soft MoE: each expert reads weighted means of all tokens of a sequence; each token takes a mean of the outputs.

    L = s X̂ Φ̂                    cosines of tokens and slots, times a learned scale
    D = softmax of L over tokens      what each slot reads        X̃ = Dᵀ X
    C = softmax of L over slots       what each token takes       Y = C f(X̃)

An expert owns P slots, and X̃ has a row for each of the S = E·P slots. The experts' work is that of S rows, and for a
given S it depends neither on the number of tokens nor on that of experts. No token is dropped, nothing jumps, and no
balancing loss is needed, because each expert always gets P rows. Tokens are compared by direction (X̂ has unit rows),
but the slots read X itself, with its lengths.

A slot reads the whole sequence, so each output depends on later tokens. The layer therefore serves data in which all
tokens are given at once, such as the patches of an image. It must not be used in a decoder.

Puigcerver et al. 2023, arXiv 2308.00951.  Lesson: lessons/23_who_may_look_ahead.ipynb
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import moe

EPS = 1e-6
"""Added to a squared length before its root. It keeps a vector of zeros finite: see ``normalize``."""


@tree.marks(by_expert=("experts",))
class SoftMoE(NamedTuple):
    slots: Array  # (D, S)  Φ, one column per slot; slot s belongs to expert s // P
    scale: Array  # (1,)  s
    experts: Any  # the parameters of moe.EXPERTS[config.expert_kind], stacked by expert


class Cache(NamedTuple):
    x: Array  # (B, T, D)
    x_hat: Array  # (B, T, D)
    x_inv: Array  # (B, T, 1)  1 / length
    slots_hat: Array  # (D, S)
    slots_inv: Array  # (1, S)
    cosine: Array  # (B, T, S)  X̂ Φ̂
    dispatch: Array  # (B, T, S)  D: each column of a sequence adds up to 1
    combine: Array  # (B, T, S)  C: each row adds up to 1
    answers: Array  # (B, S, D)  f(X̃)
    experts: Any
    config: ModelConfig


def init(
    rng: np.random.Generator,
    config: ModelConfig,
    slots_per_expert: int = 1,
    output_std: float | None = None,
    dtype: DTypeLike = np.float32,
) -> SoftMoE:
    """Φ drawn from N(0, 1/D), a scale of 1, and fresh experts; ``output_std`` is that of the experts' output weights.

    Raises:
        UserError: ``slots_per_expert`` is less than 1.
    """
    if slots_per_expert < 1:
        raise UserError(f"slots_per_expert {slots_per_expert} leaves the experts without rows: choose at least 1.")
    S = config.experts * slots_per_expert
    slots = (config.width**-0.5 * rng.standard_normal((config.width, S))).astype(dtype)
    return SoftMoE(slots, np.ones(1, dtype), moe.experts_of(config).init(rng, config, output_std, dtype))


def blank(config: ModelConfig, slots_per_expert: int, array: Callable[[tuple[int, ...]], Array]) -> SoftMoE:
    """The parameters, each made by calling ``array`` with its shape."""
    S = config.experts * slots_per_expert
    return SoftMoE(array((config.width, S)), array((1,)), moe.experts_of(config).blank(config, array))


@underflow_is_right
def forward(params: SoftMoE, x: Array, config: ModelConfig) -> tuple[Array, Cache]:
    """x (B, T, D) → y (B, T, D). The sequences of a batch are independent; within a sequence, every token sees all.

    Raises:
        UserError: a sequence has no tokens, or the number of slots is not a multiple of the number of experts.
    """
    B, T, D = x.shape
    S = params.slots.shape[1]
    if T == 0:
        raise UserError("x has sequences of 0 tokens, which leaves the slots nothing to read: give at least 1 token.")
    if S % config.experts:
        raise UserError(
            f"{S} slots cannot be shared evenly by {config.experts} experts: give every expert as many slots."
        )
    x_hat, x_inv = normalize(x, axis=2)
    slots_hat, slots_inv = normalize(params.slots, axis=0)
    cosine = x_hat @ slots_hat  # (B, T, S)
    logits = params.scale * cosine
    dispatch = softmax(logits, axis=1)  # over the tokens of one sequence
    combine = softmax(logits, axis=2)  # over the slots
    read = dispatch.transpose(0, 2, 1) @ x  # (B, S, D)  X̃ mixes x, not x̂

    # Slots before sequences: then the rows of an expert's P slots, from all sequences, are neighbours.
    rows = read.transpose(1, 0, 2).reshape(S * B, D)
    counts = [S * B // config.experts] * config.experts
    answered, experts_cache = moe.experts_of(config).forward(params.experts, rows, counts)
    answers = answered.reshape(S, B, D).transpose(1, 0, 2)
    cache = Cache(x, x_hat, x_inv, slots_hat, slots_inv, cosine, dispatch, combine, answers, experts_cache, config)
    return combine @ answers, cache


@underflow_is_right
def backward(params: SoftMoE, cache: Cache, dy: Array) -> tuple[Array, SoftMoE]:
    """dy (B, T, D) → dx (B, T, D) and the gradient of the slots, the scale and every expert.

    With Ỹ = f(X̃), the product rule gives dC = dY Ỹᵀ, dỸ = Cᵀ dY and dD = X dX̃ᵀ. L feeds both softmaxes:

        dL = C ⊙ (dC − Σ_slots C ⊙ dC) + D ⊙ (dD − Σ_tokens D ⊙ dD)
        ds = Σ dL ⊙ X̂Φ̂,    dX̂ = s dL Φ̂ᵀ,    dΦ̂ = s X̂ᵀ dL
        dX = D dX̃ + the part through X̂ = X/‖X‖, since X is both read and compared
    """
    B, T, D = dy.shape
    S = params.slots.shape[1]
    dcombine = dy @ cache.answers.transpose(0, 2, 1)  # (B, T, S)
    danswers = cache.combine.transpose(0, 2, 1) @ dy  # (B, S, D)
    drows, dexperts = moe.experts_of(cache.config).backward(
        params.experts, cache.experts, danswers.transpose(1, 0, 2).reshape(S * B, D)
    )
    dread = drows.reshape(S, B, D).transpose(1, 0, 2)
    ddispatch = cache.x @ dread.transpose(0, 2, 1)  # (B, T, S)
    dlogits = softmax_backward(cache.combine, dcombine, axis=2)
    dlogits += softmax_backward(cache.dispatch, ddispatch, axis=1)

    dscale = (dlogits * cache.cosine).sum().reshape(1)
    dcosine = params.scale * dlogits
    dslots_hat = cache.x_hat.reshape(-1, D).T @ dcosine.reshape(-1, S)  # every sequence adds its part
    dx = cache.dispatch @ dread  # through what the slots read
    dx += normalize_backward(cache.x_hat, cache.x_inv, dcosine @ cache.slots_hat.T, axis=2)  # and how they choose it
    dslots = normalize_backward(cache.slots_hat, cache.slots_inv, dslots_hat, axis=0)
    return dx, SoftMoE(dslots, dscale, dexperts)


@underflow_is_right
def normalize(x: Array, axis: int) -> tuple[Array, Array]:
    """x → x̂ = x / √(‖x‖² + ε) along ``axis``, and the factor 1/√(‖x‖² + ε).

    A vector of zeros stays zero. Its logits are 0, like those of a token that is orthogonal to the slots, and it takes
    the plain mean of all outputs. Its gradient is finite, at most 1/√ε = 1000 times that of x̂. x̂ is nearly zero if x
    is much shorter than √ε; if x is much longer, x̂ has a length of almost exactly 1.
    """
    inv = 1 / array_module(x).sqrt((x * x).sum(axis, keepdims=True) + EPS)
    return x * inv, inv


@underflow_is_right
def normalize_backward(x_hat: Array, inv: Array, dx_hat: Array, axis: int) -> Array:
    """dx = (dx̂ − x̂ (x̂·dx̂)) / √(‖x‖² + ε): a change along x leaves its direction as it is."""
    return inv * (dx_hat - x_hat * (x_hat * dx_hat).sum(axis, keepdims=True))


@underflow_is_right
def softmax(z: Array, axis: int) -> Array:
    """The softmax of z along ``axis``; the largest number is subtracted first, so that no exp overflows."""
    p = array_module(z).exp(z - z.max(axis, keepdims=True))
    p /= p.sum(axis, keepdims=True)
    return p


@underflow_is_right
def softmax_backward(p: Array, dp: Array, axis: int) -> Array:
    """dz = p ⊙ (dp − Σ p ⊙ dp), with the sum along ``axis``."""
    return p * (dp - (p * dp).sum(axis, keepdims=True))
