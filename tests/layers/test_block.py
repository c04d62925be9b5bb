"""A block: two layers on a residual stream, and a gradient that takes every way."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import attention, block, dense, moe, rmsnorm, rope
from minimoe.layers.block import Block
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.losses import balance
from minimoe.losses.balance import Coefficients
from minimoe.proof.gradcheck import Ranked, check, failed

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)


def drawn(rng: np.random.Generator, config: ModelConfig) -> Block:
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), block.init(rng, config, np.float64))


def rotation_of(config: ModelConfig) -> rope.Rotation:
    return rope.init(np.arange(config.context), config.head_width, dtype=np.float64)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_right(
    rng: np.random.Generator, small: ModelConfig, window: int | None, capacity_factor: float | None, masked: bool
) -> None:
    config = dataclasses.replace(small, window=window)
    rotation = rotation_of(config)
    noise = rng.standard_normal((2, 7, config.experts))
    mask = np.arange(14).reshape(2, 7) % 3 > 0 if masked else None
    mode = Mode(training=True, noise=noise, capacity_factor=capacity_factor, mask=mask)

    def forward(params: Block, x: np.ndarray) -> tuple[Any, Any]:
        y, stats, _, cache = block.forward(params, x, rotation, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (y, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: Block, cache: Any, dy: Any) -> tuple[Any, Any]:
        return block.backward(params, cache[0], dy[0], tree.map(lambda sum: sum * dy[1], cache[1]))

    def routing(params: Block, cache: Any) -> list[Ranked]:
        return [Ranked(*one) for one in noisy_top_k.compared(params.moe.router, cache[0].moe.router)]

    x = rng.standard_normal((2, 7, config.width))
    rows = check("block", forward, backward, drawn(rng, config), x, routing=routing, entries=4, directions=2)
    assert failed(rows) == []
    assert len(rows) == 1 + len(tree.leaves(block.init(rng, config)))


def test_gradient_of_a_dense_block_is_right(rng: np.random.Generator, small: ModelConfig) -> None:
    config = dataclasses.replace(small, dense_layers=1, dense_width=4, qk_norm="per_head", norm_eps=0.1)
    rotation = rotation_of(config)
    params = tree.map(
        lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape),
        block.init(rng, config, np.float64, is_dense=True),
    )

    def forward(params: Block, x: np.ndarray) -> tuple[Any, Any]:
        y, stats, dropped, cache = block.forward(params, x, rotation, config)
        assert (stats, dropped) == (None, 0)
        return y, cache

    def backward(params: Block, cache: Any, dy: Any) -> tuple[Any, Any]:
        return block.backward(params, cache, dy, None)

    rows = check("block", forward, backward, params, rng.standard_normal((2, 7, 6)), entries=4, directions=2)
    assert failed(rows) == []
    assert len(rows) == 1 + 2 + 6 + 3, "x, two norms, the attention with its own two, and three matrices"


def test_a_dense_block_has_a_dense_layer_in_the_place_of_its_mixture(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    config = dataclasses.replace(small, dense_layers=1, dense_width=4, qk_norm="whole", norm_eps=0.1)
    params, x = block.init(rng, config, np.float64, is_dense=True), rng.standard_normal((2, 7, 6))
    rotation = rotation_of(config)
    normed, _ = rmsnorm.forward(params.attention_norm, x, 0.1)
    h = x + attention.forward(params.attention, normed, rotation, 8, norm_eps=0.1)[0]
    normed, _ = rmsnorm.forward(params.moe_norm, h, 0.1)
    expected = h + dense.forward(params.moe, normed)[0]
    np.testing.assert_allclose(block.forward(params, x, rotation, config)[0], expected, atol=1e-14)
    blank = block.blank(config, np.zeros, is_dense=True)
    assert tree.map(np.shape, blank) == tree.map(np.shape, params)
    wide = block.init(rng, dataclasses.replace(config, width=64), is_dense=True)
    assert abs(wide.moe.shared.w_down.std() - (2 * config.layers * 4) ** -0.5) < 0.05


def test_it_is_attention_and_experts_each_behind_a_norm_on_a_residual_stream(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    config = dataclasses.replace(small, window=3, norm_eps=0.1, renormalize=False)
    params, x, rotation = drawn(rng, config), rng.standard_normal((2, 7, 6)), rotation_of(config)
    normed, _ = rmsnorm.forward(params.attention_norm, x, 0.1)
    h = x + attention.forward(params.attention, normed, rotation, 8, 3)[0]
    normed, _ = rmsnorm.forward(params.moe_norm, h, 0.1)
    expected = h + moe.forward(params.moe, normed, config)[0]
    np.testing.assert_allclose(block.forward(params, x, rotation, config)[0], expected, atol=1e-14)


def test_a_window_hides_what_is_too_far_away(rng: np.random.Generator, small: ModelConfig) -> None:
    config = dataclasses.replace(small, window=3)
    params, x, rotation = drawn(rng, config), rng.standard_normal((1, 7, 6)), rotation_of(config)
    other = x.copy()
    other[:, 1] += 1.0
    change = block.forward(params, other, rotation, config)[0] - block.forward(params, x, rotation, config)[0]
    moved = abs(change[0]).max(axis=-1) > 1e-9
    assert moved.tolist() == [False, True, True, True, False, False, False]


def test_the_mode_reaches_the_router(rng: np.random.Generator, small: ModelConfig) -> None:
    params, x, rotation = drawn(rng, small), rng.standard_normal((2, 7, 6)), rotation_of(small)
    noise, mask = rng.standard_normal((2, 7, 5)), np.arange(14).reshape(2, 7) < 10
    y, stats, dropped, _ = block.forward(params, x, rotation, small)
    assert (block.forward(params, x, rotation, small, Mode(noise=noise)).y != y).any()
    assert block.forward(params, x, rotation, small, Mode(capacity_factor=0.3)).dropped > dropped == 0
    assert (block.forward(params, x, rotation, small, Mode(mask=mask)).stats.tokens, stats.tokens) == (10, 14)
    modes = [Mode(noise=noise, estimate_load=estimate_load) for estimate_load in (True, False)]
    loads = [block.forward(params, x, rotation, small, mode).stats.load for mode in modes]
    assert (loads[0] != loads[1]).any()


def test_layers_that_say_nothing_leave_the_stream_and_its_gradient_as_they_are(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    params, rotation = drawn(rng, small), rotation_of(small)
    params.attention.output.weight[:] = 0
    params.moe.experts.w_down[:] = 0
    x, dy = rng.standard_normal((2, 2, 7, 6))
    y, _, _, cache = block.forward(params, x, rotation, small)
    dx, _ = block.backward(params, cache, dy, None)
    assert (y == x).all()
    assert (dx == dy).all()


def test_what_writes_to_the_stream_starts_smaller_the_more_layers_there_are(small: ModelConfig) -> None:
    config = dataclasses.replace(small, width=64, heads=8, expert_width=64, layers=8)
    params = block.init(np.random.default_rng(0), config)
    assert abs(params.attention.output.weight.std() * (8 * 8) ** 0.5 - 16**-0.5) < 0.01
    assert abs(params.moe.experts.w_down.std() * 64**0.5 - 16**-0.5) < 0.01
    assert abs(params.moe.experts.w_up.std() * 64**0.5 - 1) < 0.02


def test_packed_documents_are_read_apart(rng: np.random.Generator, small: ModelConfig) -> None:
    params, rotation = drawn(rng, small), rotation_of(small)
    x = rng.standard_normal((1, 7, small.width))
    packed = block.forward(params, x, rotation, small, Mode(starts=np.array([[0, 0, 0, 3, 3, 3, 3]]))).y
    for place in (slice(0, 3), slice(3, 7)):
        turned = rope.init(np.arange(place.stop - place.start), small.head_width, dtype=np.float64)
        alone = block.forward(params, x[:, place], turned, small).y
        np.testing.assert_allclose(packed[:, place], alone, atol=1e-12)
