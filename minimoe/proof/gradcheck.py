"""The proof of every gradient: each component, and the whole decoder, against finite differences in float64.

No check is at a special point: parameters that start at zero or one are moved away from this value, so that no gradient
is zero by accident and no wrong factor is hidden by a one. ``results.Row`` explains what a row says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np

from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.tree import Tree
from minimoe.layers import attention, block, decoder, dense, embedding, linear, moe, rmsnorm, rope, soft_moe
from minimoe.layers.attention import KeyValues
from minimoe.layers.experts import swiglu, zero_computation
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.layers.routing import RouterStats
from minimoe.losses import balance, cross_entropy, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.proof.finite_differences import Ranked, check
from minimoe.proof.results import Row, Rows, failed, table, to_json

__all__ = ["Ranked", "Row", "check", "check_decoder", "failed", "run", "table", "to_json"]

Compared = list[tuple[Array, int]]
"""Scores (N, ·), and how many of the largest scores of each row were chosen."""

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)

CONFIG = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=4, kv_heads=2, head_width=4, context=6, experts=4, expert_width=5
)


SWITCH = dataclasses.replace(CONFIG, router="switch", active_experts=1)
GSHARD = dataclasses.replace(CONFIG, router="gshard")
THRESHOLD = dataclasses.replace(CONFIG, router="expert_threshold")
SIGMOID_BIAS = dataclasses.replace(CONFIG, router="sigmoid_bias", routed_scale=2.5)
GROUPS = dataclasses.replace(SIGMOID_BIAS, experts=6, active_experts=4, expert_groups=3, active_groups=2)
SHARED = dataclasses.replace(CONFIG, shared_experts=2)
HASH = dataclasses.replace(CONFIG, router="token_hash", hash_gate=True)
ZERO = dataclasses.replace(CONFIG, expert_kind="zero_computation")
COSINE = dataclasses.replace(CONFIG, router="cosine")
X_MOE = dataclasses.replace(COSINE, cosine_form="x-moe")
PACKED = np.array([[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]])
"""Three documents in one sequence, two in the other: the first position that each query may see."""

REMOE = dataclasses.replace(CONFIG, router="remoe")
DENSE = dataclasses.replace(CONFIG, dense_layers=1, dense_width=7, qk_norm="per_head")


def run(seed: int = 0) -> Rows:
    """Checks every component and the decoder at a point drawn from ``seed``. Returns a row per tensor of each case.

    Raises:
        UserError: ``seed`` is negative.
    """
    if seed < 0:
        raise UserError(f"seed {seed} is not a seed: choose a whole number of at least 0.")
    # Imported here, because ``minimoe.gradcheck.check`` should not wait for all that these modules need.
    from minimoe.proof import of_beyond, of_compression, of_lora, of_tuning

    rng, packing = np.random.default_rng(seed), np.random.default_rng([seed, 42])
    windowed = dataclasses.replace(CONFIG, window=3, tied_embeddings=True)
    rows = [
        *_linear(rng),
        *_embedding(rng),
        *_rmsnorm(rng),
        *_rope(rng),
        *_attention(rng, "attention"),
        *_attention(rng, "attention, window 3", window=3),
        *_attention(rng, "attention after a past", past=4),
        *_swiglu(rng),
        *_gate(rng, "noisy_top_k"),
        *_gate(rng, "noisy_top_k, all probabilities", renormalize=False),
        *_gate(rng, "noisy_top_k, plain", noisy=False),
        *_gate(rng, "noisy_top_k, plain top-1", top_k=1, renormalize=False, noisy=False),
        *_gate(rng, "noisy_top_k, every expert", top_k=5),
        *_router(rng, "switch", SWITCH),
        *_router(rng, "switch, tokens dropped", SWITCH, capacity_factor=0.5),
        *_router(rng, "gshard", GSHARD),
        *_router(rng, "gshard, second drawn", dataclasses.replace(GSHARD, second_expert="sampling")),
        *_router(rng, "gshard, tokens dropped", GSHARD, capacity_factor=0.5),
        *_router(rng, "expert_choice", dataclasses.replace(CONFIG, router="expert_choice")),
        *_router(rng, "expert_threshold", THRESHOLD),
        *_router(rng, "expert_threshold, tokens dropped", THRESHOLD, capacity_factor=0.5),
        *_router(rng, "sigmoid_bias", SIGMOID_BIAS),
        *_router(rng, "sigmoid_bias, groups, tokens dropped", GROUPS, capacity_factor=0.5),
        *_router(rng, "token_hash", HASH),
        *_router(rng, "token_hash, tokens dropped", HASH, capacity_factor=0.5),
        *_zero_computation(rng),
        *_moe(rng, "moe, zero-computation experts", ZERO),
        *_router(rng, "cosine", COSINE),
        *_router(rng, "cosine, x-moe", X_MOE),
        *_router(rng, "cosine, tokens dropped", COSINE, capacity_factor=0.5),
        *_router(rng, "remoe", REMOE),
        *_router(rng, "remoe, tokens dropped", REMOE, capacity_factor=0.5),
        *_balance(rng),
        *_moe(rng, "moe", CONFIG),
        *_moe(rng, "moe, tokens dropped", CONFIG, capacity_factor=0.7),
        *_moe(rng, "moe, two shared experts", SHARED),
        *_block(rng),
        *_cross_entropy(rng),
        *check_decoder("decoder", CONFIG, rng),
        *check_decoder("decoder, two shards, padding", CONFIG, rng, shards=2, padding=2),
        *check_decoder("decoder, window, tied, dropping", windowed, rng, capacity_factor=0.7),
        *_soft_moe(rng),
        *of_beyond.rows(rng),
        *_attention(rng, "attention, norm over all heads", qk_norm="whole"),
        *_attention(rng, "attention, norm in each head", past=4, qk_norm="per_head"),
        *_dense(rng),
        *check_decoder("decoder, first layer dense, normalised heads", DENSE, rng),
        *of_lora.rows(rng),
        *of_tuning.rows(rng),
        *of_compression.rows(rng),
        *_attention(packing, "attention, packed documents", starts=PACKED),
        *check_decoder("decoder, packed, two shards, padding", CONFIG, packing, shards=2, padding=1, packed=True),
    ]
    return Rows(rows)


def _linear(rng: np.random.Generator) -> list[Row]:
    params = linear.init(rng, 6, 5)
    return check("linear", linear.forward, linear.backward, params, rng.standard_normal((2, 3, 6)))


def _embedding(rng: np.random.Generator) -> list[Row]:
    def backward(params: Any, cache: Any, dy: Array) -> tuple[None, Any]:
        return None, embedding.backward(params, cache, dy)

    tokens = np.array([[3, 0, 3, 6], [6, 3, 1, 1]])
    return check("embedding", embedding.forward, backward, embedding.init(rng, 7, 4), tokens)


def _rmsnorm(rng: np.random.Generator) -> list[Row]:
    params = _moved(rng, rmsnorm.init(6))
    return check("rmsnorm", rmsnorm.forward, rmsnorm.backward, params, rng.standard_normal((2, 3, 6)))


def _rope(rng: np.random.Generator) -> list[Row]:
    rotation = rope.init(np.arange(5, 9), head_width=6, dtype=np.float64)

    def forward(params: None, x: Array) -> tuple[Array, None]:
        return rope.forward(rotation, x), None

    def backward(params: None, cache: None, dy: Array) -> tuple[Array, None]:
        return rope.backward(rotation, dy), None

    return check("rope", forward, backward, None, rng.standard_normal((2, 4, 3, 6)))


def _attention(
    rng: np.random.Generator,
    name: str,
    window: int | None = None,
    past: int = 0,
    qk_norm: str = "none",
    starts: Array | None = None,
) -> list[Row]:
    rotation = rope.init(np.arange(past, past + 6), head_width=4, dtype=np.float64)
    earlier = KeyValues(*rng.standard_normal((2, 2, past, 2, 4))) if past else None

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return attention.forward(params, x, rotation, 4, window, earlier, starts=starts)

    params = attention.init(rng, 8, heads=4, kv_heads=2, head_width=4, qk_norm=qk_norm)
    params = params if qk_norm == "none" else _moved(rng, params)
    return check(name, forward, attention.backward, params, rng.standard_normal((2, 6, 8)))


def _swiglu(rng: np.random.Generator) -> list[Row]:
    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return swiglu.forward(params, x, [3, 0, 4])

    params = swiglu.init(rng, ModelConfig(experts=3, width=4, expert_width=5))
    return check("swiglu, one expert idle", forward, swiglu.backward, params, rng.standard_normal((7, 4)))


def _zero_computation(rng: np.random.Generator) -> list[Row]:
    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return zero_computation.forward(params, x, [2, 0, 3, 1, 2])

    config = ModelConfig(experts=5, zero_experts=1, copy_experts=2, width=4, expert_width=5)
    params, x = zero_computation.init(rng, config), rng.standard_normal((9, 4))
    return check("zero_computation", forward, zero_computation.backward, params, x)


def _gate(
    rng: np.random.Generator, name: str, *, top_k: int = 2, renormalize: bool = True, noisy: bool = True
) -> list[Row]:
    noise = rng.standard_normal((6, 5)) if noisy else None
    mask = np.array([1, 1, 0, 1, 1, 1])

    def forward(params: Any, x: Array) -> tuple[Array, RouterStats, Any]:
        choice, stats, cache = noisy_top_k.gate(
            params, x, top_k, renormalize=renormalize, noise=noise, mask=mask, sequences=2
        )
        return choice.weights, stats, noisy_top_k.Cache(cache, choice.experts, top_k, x.shape)

    def backward(params: Any, cache: Any, dy: Array, dstats: RouterStats) -> tuple[Array, Any]:
        return noisy_top_k.gate_backward(params, cache.gate, dy, dstats)

    params = _moved(rng, noisy_top_k.init(rng, ModelConfig(width=4, experts=5, noisy_gating=noisy)))
    return _check_routed(name, forward, backward, noisy_top_k.compared, params, rng.standard_normal((6, 4)))


def _router(
    rng: np.random.Generator, name: str, config: ModelConfig, capacity_factor: float | None = None
) -> list[Row]:
    """A router as the mixture-of-experts layer sees it: the weights of its sorted entries, and its sums."""
    router = moe.router_of(config)
    noise = router.draw_noise(rng, config, (2, 6), np.float64)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = np.arange(12).reshape(2, 6) % config.vocab_size
    mode = Mode(True, noise, capacity_factor, balance_by_sequence=True, mask=mask, labels=labels)

    def forward(params: Any, x: Array) -> tuple[Array, RouterStats, Any]:
        routing, stats, cache = router.forward(params, x, config, mode)
        return routing.weight, stats, cache

    params = _moved(rng, router.init(rng, config))
    x = rng.standard_normal((2, 6, config.width))
    return _check_routed(name, forward, router.backward, router.compared, params, x)


def _balance(rng: np.random.Generator) -> list[Row]:
    """The gradient of the losses with respect to every sum over tokens; sums that are counts have none."""
    stats = RouterStats(
        tokens=np.array(5),
        assignments=np.array([4, 1, 0, 3]),
        probability=rng.uniform(0.5, 3, 4),
        importance=rng.uniform(0.5, 3, 4) * [1, 2, 4, 8],  # uneven whatever is drawn, or the gradient would be small
        load=rng.uniform(0.5, 3, 4) * [8, 4, 2, 1],
        squared_lse=rng.uniform(1, 3, ()),
        by_sequence=rng.uniform(1, 3, ()),
        entropy=np.array(0),
    )

    def backward(params: None, dstats: RouterStats, dy: Array) -> tuple[RouterStats, None]:
        return _times(dstats, dy), None

    return check("balance", lambda params, stats: _losses(stats), backward, None, stats)


def _moe(rng: np.random.Generator, name: str, config: ModelConfig, capacity_factor: float | None = None) -> list[Row]:
    mode = Mode(True, moe.router_of(config).draw_noise(rng, config, (2, 6), np.float64), capacity_factor)

    def forward(params: Any, x: Array) -> tuple[Array, RouterStats, Any]:
        y, stats, _, cache = moe.forward(params, x, config, mode)
        return y, stats, cache

    def compared(params: Any, cache: Any) -> Compared:
        return moe.router_of(config).compared(params.router, cache.router)

    params = _moved(rng, moe.init(rng, config))
    return _check_routed(name, forward, moe.backward, compared, params, rng.standard_normal((2, 6, config.width)))


def _dense(rng: np.random.Generator) -> list[Row]:
    params = _moved(rng, dense.init(rng, CONFIG))
    return check("dense", dense.forward, dense.backward, params, rng.standard_normal((2, 6, CONFIG.width)))


def _soft_moe(rng: np.random.Generator) -> list[Row]:
    """Two slots per expert, and a scale that is not 1."""

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return soft_moe.forward(params, x, CONFIG)

    params = _moved(rng, soft_moe.init(rng, CONFIG, slots_per_expert=2))
    return check("soft_moe", forward, soft_moe.backward, params, rng.standard_normal((2, 6, CONFIG.width)))


def _block(rng: np.random.Generator) -> list[Row]:
    rotation = rope.init(np.arange(6), CONFIG.head_width, dtype=np.float64)
    router = moe.router_of(CONFIG)
    mode = Mode(True, router.draw_noise(rng, CONFIG, (2, 6), np.float64))

    def forward(params: Any, x: Array) -> tuple[Array, RouterStats, Any]:
        y, stats, _, cache = block.forward(params, x, rotation, CONFIG, mode)
        assert stats is not None  # the block has a router
        return y, stats, cache

    def compared(params: Any, cache: Any) -> Compared:
        return router.compared(params.moe.router, cache.moe.router)

    params = _moved(rng, block.init(rng, CONFIG))
    return _check_routed("block", forward, block.backward, compared, params, rng.standard_normal((2, 6, CONFIG.width)))


def _check_routed(
    name: str,
    forward: Callable[[Any, Any], tuple[Array, RouterStats, Any]],
    backward: Callable[[Any, Any, Array, RouterStats], tuple[Array, Any]],
    compared: Callable[[Any, Any], Compared],
    params: Any,
    x: Array,
) -> list[Row]:
    """``check`` for a layer that returns its router's sums: result and losses of the sums are checked together."""

    def routing(params: Any, cache: Any) -> list[Ranked]:
        return [Ranked(scores, k) for scores, k in compared(params, cache[0])]

    def forward_with_losses(params: Any, x: Array) -> tuple[Any, Any]:
        y, stats, cache = forward(params, x)
        losses, dstats = _losses(stats)
        return (y, losses), (cache, dstats)

    def backward_with_losses(params: Any, cache: Any, dy: Any) -> tuple[Array, Any]:
        return backward(params, cache[0], dy[0], _times(cache[1], dy[1]))

    return check(name, forward_with_losses, backward_with_losses, params, x, routing=routing)


def _cross_entropy(rng: np.random.Generator) -> list[Row]:
    targets, mask = rng.integers(7, size=5), np.array([1, 1, 0, 1, 1])

    def forward(params: None, x: Array) -> tuple[Array, Any]:
        loss, cache = cross_entropy.forward(x, targets, mask)
        return loss.total, cache

    def backward(params: None, cache: Any, dy: Array) -> tuple[Array, None]:
        return cross_entropy.backward(cache, dy), None

    return check("cross-entropy", forward, backward, None, rng.standard_normal((5, 7)))


def check_decoder(
    name: str,
    config: ModelConfig,
    rng: np.random.Generator,
    *,
    capacity_factor: float | None = None,
    shards: int = 1,
    padding: int = 0,
    packed: bool = False,
    entries: int = 6,
) -> list[Row]:
    """Checks the whole training loss of two sequences, with noise and with every auxiliary loss.

    ``padding`` tokens at the end of the second sequence do not count. If it is ``packed``, each sequence holds several
    documents, and about half of the targets count. The bound is wider than that of a component,
    because rounding errors add up along the chain.
    """
    B, T = 2, config.context
    tokens, targets = rng.integers(config.vocab_size, size=(2, B, T))
    noise = decoder.draw_noise(rng, config, B, T, np.float64)
    mask = np.ones((B, T))
    mask[-1, T - padding :] = 0
    whole = Shard(tokens, targets, mask=mask)
    if packed:
        whole = whole._replace(loss_mask=rng.integers(2, size=(B, T)), starts=PACKED)
    batch = [
        tree.map(itemgetter(rows), whole)._replace(noise=None if noise is None else noise[:, rows])
        for rows in np.split(np.arange(B), shards)
    ]
    goal = Objective(EVERY_LOSS, capacity_factor)

    def forward(params: Any, x: None) -> tuple[Array, Any]:
        forwards = [objective.forward(params, shard, config, goal) for shard in batch]
        return objective.add_up(params, forwards, config, goal).total, forwards

    def backward(params: Any, forwards: Any, dy: Array) -> tuple[None, Any]:
        _, gradient = objective.loss_and_gradient(params, batch, config, goal)
        return None, _times(gradient, dy)

    def routing(params: Any, forwards: Any) -> list[Ranked]:
        return [
            Ranked(scores, k)
            for shard in forwards
            for layer, cache in zip(params.blocks, shard.caches[1].blocks, strict=True)
            if not dense.is_dense(layer.moe)
            for scores, k in moe.router_of(config).compared(layer.moe.router, cache.moe.router)
        ]

    params = _moved(rng, decoder.init(rng, config))
    return check(name, forward, backward, params, None, routing=routing, bound=1e-6, entries=entries, directions=2)


def _losses(stats: RouterStats) -> tuple[Array, RouterStats]:
    """The weighted sum of all auxiliary losses, and its gradient with respect to every sum."""
    losses, dstats = balance.loss(stats, EVERY_LOSS)
    return balance.weighted(losses, EVERY_LOSS), dstats


def _moved(rng: np.random.Generator, params: Tree) -> Tree:
    """Parameters moved away from the special values at which they start."""
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)


def _times(gradient: Tree, dy: Array) -> Tree:
    """The gradient of a loss, times dy, the gradient with respect to that loss."""
    return tree.map(lambda leaf: leaf * dy, gradient)
