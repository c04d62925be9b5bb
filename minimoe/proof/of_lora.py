"""The proofs of adapters on attention and on experts: rows for ``gradcheck.run``.

Only A, B and x have gradients. The frozen bases are held fixed, so they are no parameters of these checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers import attention, lora, rope
from minimoe.layers.attention import Attention
from minimoe.layers.experts import swiglu
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.linear import Linear
from minimoe.layers.lora import Adapted
from minimoe.proof.finite_differences import check
from minimoe.proof.results import Row

RANK = 2


class Eighths(NamedTuple):
    """A base in few bits: whole numbers of eighths."""

    codes: Array  # integers

    def dense(self, inputs: int, outputs: int, dtype: DTypeLike) -> Array:
        """The matrix (inputs, outputs)."""
        return (self.codes / 8).astype(dtype)


class Factors(NamedTuple):
    """What is trained of an adapted weight."""

    a: Array
    b: Array


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each case."""
    return [
        *_attention(rng, "lora, attention"),
        *_attention(rng, "lora, attention, dropout", dropout=True),
        *_experts(rng, "lora, experts, one idle"),
        *_experts(rng, "lora, experts, one idle, dropout", dropout=True),
        *_matrix(rng, "lora, dropout for each token", dropout=True),
        *_matrix(rng, "lora, quantised base", quantized=True),
    ]


def _matrix(rng: np.random.Generator, name: str, dropout: bool = False, quantized: bool = False) -> list[Row]:
    x = rng.standard_normal((7, 6))
    weight = _adapted(rng, rng.standard_normal((6, 5)))
    if dropout:
        weight = weight._replace(keep=(rng.random(x.shape) < 0.7) / 0.7)
    if quantized:
        weight = weight._replace(base=Eighths(rng.integers(-20, 20, (6, 5))))

    def forward(params: Factors, x: Array) -> tuple[Array, Any]:
        return lora.forward(weight._replace(a=params.a, b=params.b), x)

    def backward(params: Factors, cache: Any, dy: Array) -> tuple[Array, Any]:
        dx, gradient = lora.backward(weight._replace(a=params.a, b=params.b), cache, dy)
        return dx, Factors(gradient.a, gradient.b)

    return check(name, forward, backward, Factors(weight.a, weight.b), x)


def _attention(rng: np.random.Generator, name: str, dropout: bool = False) -> list[Row]:
    rotation = rope.init(np.arange(6), head_width=4, dtype=np.float64)
    plain = attention.init(rng, 8, heads=4, kv_heads=2, head_width=4, dtype=np.float64)
    weights = [_adapted(rng, linear.weight, dropout) for linear in plain[:4]]

    def whole(params: Attention) -> Attention:
        return Attention(*(Linear(w) for w in _with(weights, params[:4])))  # type: ignore[arg-type]

    def forward(params: Attention, x: Array) -> tuple[Array, Any]:
        return attention.forward(whole(params), x, rotation, 4)

    def backward(params: Attention, cache: Any, dy: Array) -> tuple[Array, Any]:
        dx, gradient = attention.backward(whole(params), cache, dy)
        return dx, Attention(*(_factors(linear.weight) for linear in gradient[:4]))

    trained = Attention(*(_factors(weight) for weight in weights))
    return check(name, forward, backward, trained, rng.standard_normal((2, 6, 8)))


def _experts(rng: np.random.Generator, name: str, dropout: bool = False) -> list[Row]:
    plain = swiglu.init(rng, ModelConfig(experts=3, width=4, expert_width=5), dtype=np.float64)
    weights = [_adapted(rng, stack, dropout) for stack in plain]

    def whole(params: Experts) -> Experts:
        return Experts(*_with(weights, params))  # type: ignore[arg-type]

    def forward(params: Experts, x: Array) -> tuple[Array, Any]:
        return swiglu.forward(whole(params), x, [3, 0, 4])

    def backward(params: Experts, cache: Any, dy: Array) -> tuple[Array, Any]:
        dx, gradient = swiglu.backward(whole(params), cache, dy)
        return dx, Experts(*(_factors(stack) for stack in gradient))

    return check(
        name, forward, backward, Experts(*(_factors(weight) for weight in weights)), rng.standard_normal((7, 4))
    )


def _adapted(rng: np.random.Generator, base: Array, dropout: bool = False) -> Adapted:
    """An adapter whose A, B and s are all away from special values."""
    fresh = lora.init(rng, base, RANK, 1.0)
    a, b, scale = (leaf + rng.uniform(0.3, 0.9, leaf.shape) for leaf in (fresh.a, fresh.b, fresh.scale))
    keep = (rng.random(base.shape[:-1]) < 0.7) / 0.7 if dropout else None
    return Adapted(base, a, b, scale, keep)


def _factors(weight: Any) -> Any:
    return Factors(weight.a, weight.b)


def _with(weights: list[Adapted], trained: Any) -> list[Adapted]:
    """The weights with the trained factors in their places."""
    return [weight._replace(a=new.a, b=new.b) for weight, new in zip(weights, trained, strict=True)]
