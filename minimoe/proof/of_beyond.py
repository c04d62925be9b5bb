"""The proofs of the models in ``minimoe.beyond``: rows for ``gradcheck.run``."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.beyond import prefix_loss
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.losses import cross_entropy
from minimoe.proof.finite_differences import check
from minimoe.proof.results import Row


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each model."""
    return [*_soft_decoder(rng)]


def _soft_decoder(rng: np.random.Generator) -> list[Row]:
    """The summed loss of a decoder with Soft MoE, whose output layer is the embedding table."""
    config = ModelConfig(
        vocab_size=7, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=5, experts=2, expert_width=3,
        tied_embeddings=True,
    )  # fmt: skip
    tokens, targets = rng.integers(7, size=(2, 2, 5))

    def forward(params: Any, x: None) -> tuple[Array, Any]:
        logits, cache = prefix_loss.forward(params, tokens, config)
        loss, at_loss = cross_entropy.forward(logits, targets)
        return loss.total, (cache, at_loss, logits.shape)

    def backward(params: Any, caches: Any, dy: Array) -> tuple[None, Any]:
        cache, at_loss, shape = caches
        return None, prefix_loss.backward(params, cache, cross_entropy.backward(at_loss, dy).reshape(shape))

    fresh = prefix_loss.init(rng, config, slots_per_expert=2)
    params = tree.map(lambda leaf: leaf + 1.0 * rng.standard_normal(leaf.shape), fresh)
    return check("decoder with Soft MoE", forward, backward, params, None, bound=1e-6, entries=6, directions=2)
