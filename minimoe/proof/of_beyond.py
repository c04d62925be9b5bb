"""The proofs of the models in ``minimoe.beyond``: rows for ``gradcheck.run``."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.beyond import lstm, lstm_moe, stacked_experts
from minimoe.beyond.stacked_experts import PerLayer
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.tree import Tree
from minimoe.layers import moe
from minimoe.layers.mode import Mode
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.finite_differences import Ranked, check
from minimoe.proof.results import Row


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each model."""
    return [
        *_stacked_experts(rng),
        *_lstm(rng),
        *_lstm_moe(rng),
    ]


def _stacked_experts(rng: np.random.Generator) -> list[Row]:
    opened = PerLayer(np.array([True, False, True]), np.array([True, True, True, False]))

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return stacked_experts.forward(params, x, opened)

    params = _moved(rng, stacked_experts.init(rng, 7, 5, (3, 4), (6, 8), 9))
    x = rng.standard_normal((5, 7))
    return [
        *check("stacked_experts", stacked_experts.forward, stacked_experts.backward, params, x),
        *check("stacked_experts, two barred", forward, stacked_experts.backward, params, x),
    ]


def _lstm(rng: np.random.Generator) -> list[Row]:
    params = _moved(rng, lstm.init(rng, 5, 4))
    return check("lstm", lstm.forward, lstm.backward, params, rng.standard_normal((2, 6, 5)))


def _lstm_moe(rng: np.random.Generator) -> list[Row]:
    config = ModelConfig(vocab_size=7, width=4, context=6, experts=5, active_experts=2, expert_width=3)
    every_loss = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2)
    tokens, noise = rng.integers(7, size=(2, 6)), rng.standard_normal((2, 6, 5))

    def forward(params: Any, x: None) -> tuple[Any, Any]:
        logits, stats, cache = lstm_moe.forward(params, tokens, config, Mode(True, noise))
        assert stats is not None
        losses, dstats = balance.loss(stats, every_loss)
        return (logits, balance.weighted(losses, every_loss)), (cache, dstats)

    def backward(params: Any, cache: Any, dy: Any) -> tuple[None, Any]:
        dstats = tree.map(lambda leaf: leaf * dy[1], cache[1])
        return None, lstm_moe.backward(params, cache[0], dy[0], dstats)

    def routing(params: Any, cache: Any) -> list[Ranked]:
        compared = moe.router_of(config).compared(params.moe.router, cache[0].moe.router)
        return [Ranked(scores, k) for scores, k in compared]

    params = _moved(rng, lstm_moe.init(rng, config))
    return check("lstm_moe", forward, backward, params, None, routing=routing)


def _moved(rng: np.random.Generator, params: Tree) -> Tree:
    """Parameters moved away from the special values at which they start."""
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)
