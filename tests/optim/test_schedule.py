"""The learning rate of each step: its warm-up, its decay, its ends."""

import numpy as np
import pytest

from minimoe.core.config import TrainConfig
from minimoe.optim.schedule import learning_rate


def test_learning_rate_warms_up_then_falls_in_a_straight_line_to_its_end():
    recipe = TrainConfig(learning_rate=0.8, warmup=4, steps=12, final_rate=0.25, schedule="linear")
    rates = [learning_rate(step, recipe) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx(np.linspace(0.8, 0.2, 9))
    assert learning_rate(1000, recipe) == pytest.approx(0.2)


def test_a_cosine_starts_and_ends_flat_and_is_half_way_at_half_time():
    recipe = TrainConfig(learning_rate=0.8, warmup=4, steps=12, final_rate=0.25)
    rates = [learning_rate(step, recipe) for step in range(4, 13)]
    assert rates[0] == 0.8
    assert rates[4] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[0] - rates[1] == pytest.approx(rates[-2] - rates[-1])
    assert rates[0] - rates[1] < 0.25 * (rates[3] - rates[4])


def test_learning_rate_starts_at_its_peak_without_warm_up():
    assert learning_rate(0, TrainConfig(learning_rate=0.8, warmup=0)) == 0.8


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_learning_rate_of_a_run_shorter_than_its_warm_up_only_rises(steps):
    recipe = TrainConfig(learning_rate=1.0, warmup=3, steps=steps)
    assert [learning_rate(step, recipe) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
