"""The arm: its accelerations obey the laws of motion, and networks learn them."""

import numpy as np
import pytest

from minimoe.beyond import arm, hidden_layer
from minimoe.core.errors import UserError


def positions(angle: np.ndarray) -> np.ndarray:
    """Where the two masses are: (2, 2)."""
    (l1, l2), (first, second) = arm.LENGTH, angle
    elbow = l1 * np.array([np.cos(first), np.sin(first)])
    return np.stack([elbow, elbow + l2 * np.array([np.cos(first + second), np.sin(first + second)])])


def jacobian(angle: np.ndarray) -> np.ndarray:
    """How the masses move with the angles (2, 2, joint), by central differences."""
    h = 1e-6
    return np.stack([(positions(angle + h * e) - positions(angle - h * e)) / (2 * h) for e in np.eye(2)], axis=-1)


def energy(angle: np.ndarray, speed: np.ndarray) -> float:
    velocity = jacobian(angle) @ speed
    return float(sum(mass * (v**2).sum() / 2 for mass, v in zip(arm.MASS, velocity, strict=True)))


def test_the_power_of_the_torques_is_what_the_energy_gains(rng: np.random.Generator) -> None:
    """dT/dt = τ · θ̇, with the energy from the positions of the masses: no formula is shared with the arm."""
    for _ in range(20):
        angle, speed, torque = rng.uniform(-3, 3, (3, 2))
        acceleration = arm.accelerations(angle[None], speed[None], torque[None])[0]
        h = 1e-4
        gain = energy(angle + h * speed, speed + h * acceleration) - energy(angle - h * speed, speed - h * acceleration)
        assert gain / (2 * h) == pytest.approx(torque @ speed, rel=1e-4, abs=1e-4)


def test_at_rest_the_accelerations_are_the_inverse_inertia_times_the_torques(rng: np.random.Generator) -> None:
    for _ in range(20):
        angle, torque = rng.uniform(-3, 3, (2, 2))
        J = jacobian(angle)
        inertia = sum(mass * part.T @ part for mass, part in zip(arm.MASS, J, strict=True))
        got = arm.accelerations(angle[None], np.zeros((1, 2)), torque[None])[0]
        np.testing.assert_allclose(got, np.linalg.solve(inertia, torque), rtol=1e-6)


def test_the_angle_of_the_shoulder_does_not_matter_without_gravity(rng: np.random.Generator) -> None:
    angle, speed, torque = rng.uniform(-3, 3, (3, 5, 2))
    turned = angle + [[1.3, 0]]
    np.testing.assert_allclose(arm.accelerations(turned, speed, torque), arm.accelerations(angle, speed, torque))


def test_every_column_is_scaled(rng: np.random.Generator) -> None:
    drawn = arm.moves(rng, 500)
    assert (drawn.x.shape, drawn.y.shape) == ((500, 6), (500, 2))
    for part in drawn:
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(part.std(0), 1)
    first, rest = drawn.split(300)
    np.testing.assert_array_equal(np.concatenate([first.x, rest.x]), drawn.x)
    assert (len(first.y), len(rest.y)) == (300, 200)


def test_the_relative_error_is_one_for_the_mean_and_zero_for_the_truth(rng: np.random.Generator) -> None:
    y = rng.standard_normal((50, 2)) + 4
    assert arm.relative_error(y, y) == 0
    assert arm.relative_error(np.broadcast_to(y.mean(0), y.shape), y) == pytest.approx(1)


@pytest.mark.parametrize(("adam", "rate", "batch"), [(False, 0.1, None), (True, 0.01, None), (True, 0.01, 32)])
def test_a_network_learns_the_arm(adam: bool, rate: float, batch: int | None) -> None:
    rng = np.random.default_rng(0)
    learned, heldout = arm.moves(rng, 500).split(400)
    errors = arm.train_network(rng, learned, heldout, 20, rate, 60, batch=batch, adam=adam)
    assert len(errors) == 60
    assert errors[-1] < 0.5 < errors[0]


def test_an_epoch_is_one_pass_whatever_the_batch() -> None:
    """With 100 cases, a batch of 100 and one of 1000 are the same step; four of 25 go further."""
    learned, heldout = arm.moves(np.random.default_rng(0), 150).split(100)

    def last(batch: int | None) -> float:
        return arm.train_network(np.random.default_rng(1), learned, heldout, 8, 0.05, 5, batch=batch)[-1]

    assert last(None) == last(100) == last(1000)
    assert last(25) < last(None)


def test_useless_settings_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="cases 1 have no spread: choose at least 2"):
        arm.moves(rng, 1)
    learned, heldout = arm.moves(rng, 20).split(10)
    for rate, epochs, batch in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(UserError, match=f"rate {rate}, epochs {epochs} and batch {batch} train nothing"):
            arm.train_network(rng, learned, heldout, 3, rate, epochs, batch=batch)


def test_an_epoch_takes_the_batches_in_a_random_order_and_each_case_once() -> None:
    """The same steps written out, with the random numbers of the training."""
    learned, heldout = arm.moves(np.random.default_rng(0), 60).split(50)
    errors = arm.train_network(np.random.default_rng(1), learned, heldout, 8, 0.05, 2, batch=20)
    rng = np.random.default_rng(1)
    params = hidden_layer.init(rng, 6, 8, 2)
    for _ in range(2):
        order = rng.permutation(50)
        for rows in (order[:20], order[20:40], order[40:]):
            y, cache = hidden_layer.forward(params, learned.x[rows])
            _, change = hidden_layer.backward(params, cache, 2 * (y - learned.y[rows]) / len(rows))
            params = hidden_layer.HiddenLayer(*(old - 0.05 * new for old, new in zip(params, change, strict=True)))
    assert errors[-1] == pytest.approx(arm.relative_error(hidden_layer.forward(params, heldout.x)[0], heldout.y))
