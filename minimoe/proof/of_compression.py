"""The proofs of distillation and of quantised weights: rows for ``gradcheck.run``."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from minimoe.compression import frozen
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers import decoder, linear, lora, moe
from minimoe.layers.experts import swiglu
from minimoe.layers.experts.swiglu import Experts
from minimoe.losses import distillation, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.distillation import Distillation, Settings
from minimoe.losses.objective import Objective, Shard
from minimoe.proof.finite_differences import Ranked, check
from minimoe.proof.results import Row

STUDENT = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=4, kv_heads=2, head_width=4, context=6, experts=3, expert_width=5
)
TEACHER = dataclasses.replace(STUDENT, width=12, layers=1, router="switch", experts=4, active_experts=1)


class Factors(NamedTuple):
    """What an adapter learns."""

    a: Array
    b: Array


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each case."""
    return [
        *_distillation(rng, "distillation", Settings(1.0, 0.0)),
        *_distillation(rng, "distillation, temperature 3, with the label", Settings(3.0, 0.4)),
        *_distillation(rng, "distillation, reverse", Settings(3.0, 0.4, reverse=True)),
        *_distilled_decoder(rng),
        *(row for scheme in frozen.SCHEMES for row in _frozen(rng, scheme)),
        *(row for scheme in frozen.SCHEMES for row in _frozen_experts(rng, scheme)),
    ]


def _distillation(rng: np.random.Generator, name: str, settings: Settings) -> list[Row]:
    targets, mask = rng.integers(7, size=5), np.array([1, 0.5, 0, 1, 1])
    teacher = 2 * rng.standard_normal((5, 7))

    def forward(params: None, x: Array) -> tuple[Array, Any]:
        loss, cache = distillation.forward(x, targets, teacher, settings, mask)
        return loss.total, cache

    def backward(params: None, cache: Any, dy: Array) -> tuple[Array, None]:
        return distillation.backward(cache, dy), None

    return check(name, forward, backward, None, rng.standard_normal((5, 7)))


def _distilled_decoder(rng: np.random.Generator) -> list[Row]:
    """A student with noise and every auxiliary loss, and a teacher of another width, with other experts."""
    tokens, targets = rng.integers(STUDENT.vocab_size, size=(2, 2, STUDENT.context))
    shard = Shard(tokens, targets, decoder.draw_noise(rng, STUDENT, 2, STUDENT.context, np.float64))
    teacher = _moved(rng, decoder.init(rng, TEACHER, np.float64))
    every_loss = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
    goal = Objective(every_loss, token_loss=Distillation(teacher, TEACHER, Settings(2.0, 0.3)))

    def forward(params: Any, x: None) -> tuple[Array, Any]:
        done = objective.forward(params, shard, STUDENT, goal)
        return objective.add_up(params, [done], STUDENT, goal).total, done

    def backward(params: Any, done: Any, dy: Array) -> tuple[None, Any]:
        totals = objective.add_up(params, [done], STUDENT, goal)
        gradient = objective.backward(params, done, totals)
        return None, tree.map(lambda leaf: leaf * dy, gradient)

    def routing(params: Any, done: Any) -> list[Ranked]:
        return [
            Ranked(scores, k)
            for layer, cache in zip(params.blocks, done.caches[1].blocks, strict=True)
            for scores, k in moe.router_of(STUDENT).compared(layer.moe.router, cache.moe.router)
        ]

    params = _moved(rng, decoder.init(rng, STUDENT, np.float64))
    found = check(
        "decoder, distilled", forward, backward, params, None, routing=routing, bound=1e-6, entries=2, directions=2
    )
    return found


def _frozen(rng: np.random.Generator, scheme: str) -> list[Row]:
    """x through a quantised matrix and through its adapter; the codes are constants and have no gradient."""
    weight = _adapted(rng, linear.init(rng, 6, 5).weight, scheme)

    def forward(params: Factors, x: Array) -> tuple[Array, Any]:
        return lora.forward(weight._replace(a=params.a, b=params.b), x)

    def backward(params: Factors, cache: Any, dy: Array) -> tuple[Array, Any]:
        dx, gradient = lora.backward(weight._replace(a=params.a, b=params.b), cache, dy)
        assert gradient.base is None  # no dW
        return dx, Factors(gradient.a, gradient.b)

    return check(f"frozen, {scheme}", forward, backward, Factors(weight.a, weight.b), rng.standard_normal((7, 6)))


def _frozen_experts(rng: np.random.Generator, scheme: str) -> list[Row]:
    """x through experts whose three stacks of matrices are quantised; one expert is idle."""
    experts = Experts(
        *(_adapted(rng, w, scheme) for w in swiglu.init(rng, ModelConfig(experts=3, width=4, expert_width=5)))
    )

    def forward(params: None, x: Array) -> tuple[Array, Any]:
        return swiglu.forward(experts, x, [3, 0, 4])

    def backward(params: None, cache: Any, dy: Array) -> tuple[Array, None]:
        return swiglu.backward(experts, cache, dy)[0], None

    return check(f"frozen experts, {scheme}", forward, backward, None, rng.standard_normal((7, 4)))


def _adapted(rng: np.random.Generator, w: Array, scheme: str) -> Any:
    """An adapter of rank 2, in float64 and away from zero, on the codes of w."""
    fresh = lora.init(rng, w, 2, 1.0)
    a, b = (leaf + rng.uniform(0.3, 0.9, leaf.shape) for leaf in (fresh.a, fresh.b))
    return fresh._replace(base=frozen.freeze(w, scheme), a=a, b=b)


def _moved(rng: np.random.Generator, params: Any) -> Any:
    """Parameters away from the special values at which they start."""
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)
