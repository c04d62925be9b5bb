"""Gradient clipping: one norm of all arrays together, and no bit changed below the limit."""

import math

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import decoder
from minimoe.optim import clipping

CONFIG = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=4, experts=3, expert_width=12
)


def a_gradient(rng, dtype=np.float64):
    params = decoder.init(rng, CONFIG, dtype)
    return tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), params)


def test_global_norm_is_that_of_all_entries_together(rng):
    gradient = a_gradient(rng, np.float32)
    everything = np.concatenate([leaf.ravel() for leaf in tree.leaves(gradient)]).astype(np.float64)
    assert math.sqrt(clipping.squared_norm(gradient)) == pytest.approx(np.linalg.norm(everything), rel=1e-6)


def test_clipping_scales_to_exactly_the_limit_and_keeps_the_direction(rng):
    gradient = a_gradient(rng)
    before, norm = tree.map(np.copy, gradient), math.sqrt(clipping.squared_norm(gradient))
    assert float(clipping.clip(gradient, norm / 4)) == norm
    for d, old in zip(tree.leaves(gradient), tree.leaves(before), strict=True):
        np.testing.assert_allclose(d, old / 4, rtol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_clipping_changes_no_bit_below_the_limit_or_without_one(rng, limit):
    gradient = a_gradient(rng, np.float32)
    before = tree.map(np.copy, gradient)
    clipping.clip(gradient, limit)
    for d, old in zip(tree.leaves(gradient), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(d, old)


def test_a_zero_gradient_is_clipped_to_zero(rng):
    gradient = a_gradient(rng, np.float32)
    zero = tree.zeros_like(gradient)
    assert float(clipping.clip(zero, 1.0)) == 0
    assert not any(leaf.any() for leaf in tree.leaves(zero))
