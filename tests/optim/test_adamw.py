"""AdamW: against its formula, worked by hand."""

import math

import numpy as np
import pytest

from minimoe.core.config import TrainConfig
from minimoe.optim import adamw


def test_adam_follows_a_sequence_worked_by_hand():
    """β₁ = ½, β₂ = ¾, gradients 1, 3: means ½, 7/4, unbiased 1, 7/3; squares ¼, 39/16, unbiased 1, 39/7."""
    recipe = TrainConfig(beta1=0.5, beta2=0.75)
    mean, square = np.zeros(1), np.zeros(1)
    assert adamw.direction(np.array([1.0]), mean, square, recipe, 0) == pytest.approx(1.0)
    assert adamw.direction(np.array([3.0]), mean, square, recipe, 1) == pytest.approx((7 / 3) / math.sqrt(39 / 7))
    assert mean == pytest.approx(7 / 4)
    assert square == pytest.approx(39 / 16)


def test_adam_of_a_constant_gradient_has_its_sign_at_every_step():
    mean, square = np.zeros(3), np.zeros(3)
    gradient = np.array([1e-3, -2.0, 50.0])
    for step in range(20):
        found = adamw.direction(gradient, mean, square, TrainConfig(), step)
        np.testing.assert_allclose(found, [1, -1, 1], atol=1e-4)


def test_adam_does_not_move_what_has_no_gradient():
    assert not adamw.direction(np.zeros(2), np.zeros(2), np.zeros(2), TrainConfig(), 0).any()
