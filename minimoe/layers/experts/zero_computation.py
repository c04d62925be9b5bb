"""Zero-computation experts: of the E experts, the last ones do nothing (0) or repeat their input (x).

    expert               answer             how many
    SwiGLU               as in ``swiglu``   E − zero_experts − copy_experts, the first
    zero                 0                  zero_experts
    copy                 x                  copy_experts, the last

They compute nothing and have no parameters, but the router treats them like all others. A token that is sent to one of
them needs less work, so the router decides how much work each token gets. The weight of a zero expert has an effect: it
lowers the weights of the token's other experts, and from this effect the router learns which tokens need no answer.

Jin et al. 2024, arXiv 2410.07348 (MoE++), without its constant experts and gating residuals.
Lesson: lessons/24_hash_and_zero.ipynb
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core import tree
from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers.experts import swiglu


class ZeroComputation(NamedTuple):
    feed_forward: swiglu.Experts  # the stack of the SwiGLU experts, the first of the E
    zero: tuple[None, ...]  # one None for each zero expert: it has no parameters
    copy: tuple[None, ...]  # one None for each copy expert


class Cache(NamedTuple):
    feed_forward: swiglu.Cache
    copied: slice  # the rows of the copy experts


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` unless some experts compute and some do not."""
    cheap = config.zero_experts + config.copy_experts
    if not 0 < cheap < config.experts:
        raise UserError(
            f"zero_experts {config.zero_experts} and copy_experts {config.copy_experts} are {cheap} of experts "
            f"{config.experts}, but expert_kind 'zero_computation' needs at least one of them and at least one that "
            "computes: change these numbers, or choose expert_kind 'swiglu'."
        )


def init(
    rng: np.random.Generator, config: ModelConfig, output_std: float | None = None, dtype: DTypeLike = np.float32
) -> ZeroComputation:
    """SwiGLU experts as in ``swiglu.init``; the others need no parameters."""
    return _around(config, swiglu.init(rng, _computing(config), output_std, dtype))


def blank(config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> ZeroComputation:
    """The parameters, each made by calling ``array`` with its shape."""
    return _around(config, swiglu.blank(_computing(config), array))


def active_parameters(config: ModelConfig) -> int:
    """How many parameters of one layer are active for one token, at most: when its experts are SwiGLU experts.

    The mean is lower, and depends on what the router has learned: it is the share of the assignments that go to SwiGLU
    experts, times K experts.
    """
    return swiglu.active_parameters(_computing(config))


def balance_weights(config: ModelConfig) -> list[float]:
    """E numbers η: the balance loss is E Σ η f p̄, so experts with a small η may get more tokens than the others."""
    cheap = config.zero_experts + config.copy_experts
    return [1.0] * (config.experts - cheap) + [config.cheap_balance] * cheap


def forward(params: ZeroComputation, x: Array, counts: Sequence[int]) -> tuple[Array, Cache]:
    """x (M, D), the first ``counts[0]`` rows for expert 0 and so on → y (M, D).

    Only the rows of the SwiGLU experts need memory for a hidden layer. Rows after the last segment belong to no expert,
    and their y is zero.

    Raises:
        UserError: there are not E counts, as when workers exchange rows: these experts cannot be divided among them.
    """
    xp = array_module(x)
    computing, zero, copy = _count(params.feed_forward), len(params.zero), len(params.copy)
    if len(counts) != computing + zero + copy:
        raise UserError(
            f"counts of {len(counts)} experts do not fit {computing} SwiGLU, {zero} zero and {copy} copy experts: give "
            "one count for each, and leave the experts undivided if there are several workers."
        )
    stop = sum(counts[:computing])
    copied = slice(sum(counts[: computing + zero]), sum(counts))
    y = xp.zeros_like(x)
    y[:stop], cache = swiglu.forward(params.feed_forward, x[:stop], counts[:computing])
    y[copied] = x[copied]
    return y, Cache(cache, copied)


def backward(params: ZeroComputation, cache: Cache, dy: Array) -> tuple[Array, ZeroComputation]:
    """dy (M, D) → dx (M, D) and the gradient of every expert that has parameters.

    The output of a zero expert does not depend on x, so its dx is 0. A copy expert returns x, so its dx is dy:

        dx = 0 for zero,    dx = dy for copy

    The router learns about both from its weights: dw = dy · y is 0 for a zero expert and dy · x for a copy expert.
    """
    dx = array_module(dy).zeros_like(dy)
    stop = len(cache.feed_forward.x)
    dx[:stop], grads = swiglu.backward(params.feed_forward, cache.feed_forward, dy[:stop])
    dx[cache.copied] = dy[cache.copied]
    return dx, params._replace(feed_forward=grads)


def decode(params: ZeroComputation, x: Array, chosen: list[int], weights: list[float]) -> Array:
    """x (D,), one token → y (D,): the weighted sum over its chosen experts; weights are not renormalised."""
    computing = _count(params.feed_forward)
    first_copy = computing + len(params.zero)
    working = [(e, w) for e, w in zip(chosen, weights, strict=True) if e < computing]
    y = swiglu.decode(params.feed_forward, x, [e for e, _ in working], [w for _, w in working])
    for e, w in zip(chosen, weights, strict=True):
        if e >= first_copy:
            y += w * x
    return y


def _count(experts: swiglu.Experts) -> int:
    """The number of SwiGLU experts: the length of every stack, with an adapter or without."""
    return len(tree.leaves(experts)[0])


def _computing(config: ModelConfig) -> ModelConfig:
    """A config with the SwiGLU experts alone."""
    experts = config.experts - config.zero_experts - config.copy_experts
    return dataclasses.replace(config, experts=experts, active_experts=min(config.active_experts, experts))


def _around(config: ModelConfig, feed_forward: swiglu.Experts) -> ZeroComputation:
    return ZeroComputation(feed_forward, (None,) * config.zero_experts, (None,) * config.copy_experts)
