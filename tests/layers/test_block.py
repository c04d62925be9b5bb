"""A block: two layers on a residual stream, and a gradient that takes every way."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minimoe import tree
from minimoe.config import ModelConfig
from minimoe.gradcheck import Ranked, check, failed
from minimoe.layers import attention, balance, block, moe, rmsnorm, rope
from minimoe.layers.balance import Coefficients
from minimoe.layers.block import Block

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2)


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

    def forward(params: Block, x: np.ndarray) -> tuple[Any, Any]:
        y, stats, _, cache = block.forward(
            params, x, rotation, config, noise=noise, capacity_factor=capacity_factor, mask=mask
        )
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (y, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: Block, cache: Any, dy: Any) -> tuple[Any, Any]:
        return block.backward(params, cache[0], dy[0], tree.map(lambda sum: sum * dy[1], cache[1]))

    def routing(params: Block, cache: Any) -> list[Ranked]:
        c = cache[0].moe.router
        return [Ranked(c.x @ params.moe.router.w_gate + c.noise * c.sigma, config.active_experts)]

    x = rng.standard_normal((2, 7, config.width))
    rows = check("block", forward, backward, drawn(rng, config), x, routing=routing, entries=4, directions=2)
    assert failed(rows) == []
    assert len(rows) == 1 + len(tree.leaves(block.init(rng, config)))


def test_it_is_attention_and_experts_each_behind_a_norm_on_a_residual_stream(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    params, x, rotation = drawn(rng, small), rng.standard_normal((2, 7, 6)), rotation_of(small)
    normed, _ = rmsnorm.forward(params.attention_norm, x, small.norm_eps)
    h = x + attention.forward(params.attention, normed, rotation, small.head_width)[0]
    normed, _ = rmsnorm.forward(params.moe_norm, h, small.norm_eps)
    expected = h + moe.forward(params.moe, normed, small)[0]
    np.testing.assert_allclose(block.forward(params, x, rotation, small)[0], expected, atol=1e-14)


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
