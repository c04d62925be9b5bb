"""The proofs of the losses of tuning, through the whole decoder: rows for ``gradcheck.run``."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers import decoder, moe
from minimoe.losses import objective, preference
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.losses.preference import Answers, Preference
from minimoe.proof.finite_differences import Ranked, check
from minimoe.proof.results import Row

CONFIG = ModelConfig(
    vocab_size=11,
    width=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=4,
    context=6,
    experts=4,
    expert_width=5,
    noisy_gating=False,  # a preference is learned without noise, in the policy as in the reference
)
PREFERENCES = {
    "DPO": Preference("dpo", beta=0.7, label_smoothing=0.2),
    "IPO": Preference("ipo", beta=0.7),
    "SimPO": Preference("simpo", beta=2.0, margin=0.6),
}


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of the decoder for each loss."""
    return [row for name, loss in PREFERENCES.items() for row in _preference(name, loss, rng)]


def _preference(name: str, loss: Preference, rng: np.random.Generator) -> list[Row]:
    """Two pairs in two shards (one pair is split between them), uncounted prompts, padding, and a balance loss."""
    goal = Objective(Coefficients(balance=0.5), token_loss=loss)
    batch = pairs(rng, loss)

    def forward(params: Any, x: None) -> tuple[Array, Any]:
        forwards = [objective.forward(params, shard, CONFIG, goal) for shard in batch]
        return objective.add_up(params, forwards, CONFIG, goal).total, forwards

    def backward(params: Any, forwards: Any, dy: Array) -> tuple[None, Any]:
        _, gradient = objective.loss_and_gradient(params, batch, CONFIG, goal)
        return None, tree.map(lambda leaf: leaf * dy, gradient)

    def routing(params: Any, forwards: Any) -> list[Ranked]:
        return [
            Ranked(scores, k)
            for shard in forwards
            for layer, cache in zip(params.blocks, shard.caches[1].blocks, strict=True)
            for scores, k in moe.router_of(CONFIG).compared(layer.moe.router, cache.moe.router)
        ]

    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, CONFIG))
    return check(name, forward, backward, params, None, routing=routing, bound=1e-6, entries=3, directions=2)


def pairs(rng: np.random.Generator, loss: Preference) -> list[Shard]:
    """Four answers in two shards: the chosen answer of pair 1 is in the first shard, the rejected one in the second."""
    tokens, targets = rng.integers(CONFIG.vocab_size, size=(2, 4, CONFIG.context))
    mask, answer = np.ones((2, 4, CONFIG.context))
    mask[1, 5:] = 0
    for row, (start, stop) in enumerate([(3, 6), (1, 6), (2, 6), (0, 3)]):
        answer[row, :start] = answer[row, stop:] = 0
    reference = -3.0 * answer.sum(1) + rng.standard_normal(4)
    cut = [np.arange(3), np.arange(3, 4)]
    return [
        Shard(tokens[i], targets[i], None, mask[i], answer[i], extra=Answers(preference.places(2)[i], reference[i]))
        for i in cut
    ]
