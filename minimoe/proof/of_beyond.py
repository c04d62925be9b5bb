"""The proofs of the models in ``minimoe.beyond``: rows for ``gradcheck.run``."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.beyond import (
    adaptive_mixture,
    agent,
    agent_training,
    hidden_layer,
    hierarchical_mixture,
    lstm,
    lstm_moe,
    prefix_loss,
    stacked_experts,
)
from minimoe.beyond.adaptive_mixture import Answers, Error
from minimoe.beyond.agent import Agent, Policy
from minimoe.beyond.stacked_experts import PerLayer
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.tree import Tree
from minimoe.layers import moe
from minimoe.layers.mode import Mode
from minimoe.losses import balance, cross_entropy
from minimoe.losses.balance import Coefficients
from minimoe.proof.finite_differences import Ranked, check
from minimoe.proof.results import Row


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each model."""
    return [
        *_soft_decoder(rng),
        *_adaptive_mixture(rng),
        *_hidden_layer(rng),
        *_hierarchical_mixture(rng),
        *_stacked_experts(rng),
        *_lstm(rng),
        *_lstm_moe(rng),
        *_agent(rng),
    ]


def _agent(rng: np.random.Generator) -> list[Row]:
    """log π of the mixture and of a drawn skill, and both parts of the loss on episodes that were played.

    The advantage is a constant for the policy, so each part is checked with the other parameters held fixed.
    """
    soft, sampled = (agent_training.Setting(3, 4, play) for play in ("soft", "sampled"))
    fresh = agent.init(rng, 3, 4)
    whole = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), fresh)
    x, chosen = rng.standard_normal((5, fresh.policy.w_in.shape[1])), np.array([0, 2, 1, 2, 0])

    def of_skill(policy: Policy, x: Array) -> tuple[Any, Any]:
        return agent.forward_sampled(policy, x, chosen)

    def backward(params: Any, gradient: Any, dy: Array) -> tuple[None, Any]:
        return None, tree.map(lambda leaf: leaf * dy, gradient)

    made = [
        *check("agent, soft", agent.forward, agent.backward, whole.policy, x),
        *check("agent, sampled skill", of_skill, agent.backward_sampled, whole.policy, x),
    ]
    for name, setting in (("soft", soft), ("sampled", sampled)):
        played = agent_training.play(whole.policy, setting, rng, 8)

        def of_policy(policy: Policy, _: None, played: agent.Episodes = played) -> tuple[Array, Policy]:
            loss, gradient = agent.objective(Agent(policy, whole.baseline), played, 0.3)
            return loss.policy - 0.3 * loss.entropy, gradient.policy

        def of_baseline(baseline: Array, _: None, played: agent.Episodes = played) -> tuple[Array, Array]:
            loss, gradient = agent.objective(Agent(whole.policy, baseline), played, 0.3)
            return loss.baseline, gradient.baseline

        made += check(f"agent, loss of the policy, {name}", of_policy, backward, whole.policy, None)
        if name == "soft":
            made += check("agent, loss of the baseline", of_baseline, backward, whole.baseline, None)
    return made


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


def _adaptive_mixture(rng: np.random.Generator) -> list[Row]:
    """The linear model with each of its errors, for targets that are numbers and for classes."""
    x, numbers, labels = rng.standard_normal((5, 3)), rng.standard_normal((5, 2)), np.array([1, 0, 0, 1, 1])
    found = []
    for errors, target, kind in (
        (adaptive_mixture.ERRORS, numbers, ""),
        (adaptive_mixture.CLASS_ERRORS, labels, ", classes"),
    ):
        for name, error in errors.items():
            params = adaptive_mixture.init(rng, 3, 2, 4, scale=0.7)
            found += _of_error(f"adaptive mixture, {name}{kind}", error, params, x, target)
    return found


def _of_error(name: str, error: Error, params: Any, x: Array, target: Array) -> list[Row]:
    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        answers, cache = adaptive_mixture.forward(params, x)
        value, gradient = error(answers, target)
        return value, (cache, gradient)

    def backward(params: Any, cache: Any, dy: Array) -> tuple[Array, Any]:
        dgate, doutput = cache[1]
        return adaptive_mixture.backward(params, cache[0], Answers(dgate * dy[:, None], doutput * dy[:, None, None]))

    return check(name, forward, backward, params, x)


def _hidden_layer(rng: np.random.Generator) -> list[Row]:
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), hidden_layer.init(rng, 3, 5, 2))
    return check("hidden layer", hidden_layer.forward, hidden_layer.backward, params, rng.standard_normal((4, 3)))


def _hierarchical_mixture(rng: np.random.Generator) -> list[Row]:
    x, y = hierarchical_mixture.with_one(rng.standard_normal((6, 3))), rng.standard_normal((6, 2))
    params = hierarchical_mixture.init(rng, x, y, branches=2, leaves=3, scale=0.7)
    params = params._replace(log_variance=rng.uniform(-1, 1, (2, 3)))

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return hierarchical_mixture.forward(params, x, y)

    return check("hierarchical mixture", forward, hierarchical_mixture.backward, params, x)


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
