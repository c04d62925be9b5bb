"""The forward dynamics of an arm with two joints: which accelerations follow from given torques?

The state of an arm in a plane is two angles and two speeds; with two torques that makes six inputs. The equations of
motion are

    M(θ) θ̈ + c(θ, θ̇) = τ,    M the inertia, which depends on the angle of the elbow

so each acceleration is linear in the torques, with factors that depend on the state. The arm of the experiment of 1994
had four joints and twelve inputs. This one is smaller.

Lesson: lessons/61_hierarchies_and_em.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minimoe.beyond import hidden_layer
from minimoe.beyond.hidden_layer import HiddenLayer
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.optim import adamw

LENGTH = (1.0, 0.8)  # metres, of the upper arm and the forearm
MASS = (1.0, 0.8)  # kilograms, at the end of each


class Moves(NamedTuple):
    """Cases whose columns have mean 0 and standard deviation 1 over all cases that were drawn together."""

    x: Array  # (N, 6)  two angles, two speeds, two torques
    y: Array  # (N, 2)  two accelerations

    def split(self, first: int) -> tuple[Moves, Moves]:
        """The ``first`` cases to learn from, and the others."""
        return Moves(self.x[:first], self.y[:first]), Moves(self.x[first:], self.y[first:])


def accelerations(angle: Array, speed: Array, torque: Array) -> Array:
    """Angles in radians (N, 2), the second one that of the elbow; speeds per second; torques in Nm → rad/s² (N, 2).

    The arm lies in a horizontal plane, so gravity does not move it.
    """
    (l1, l2), (m1, m2) = LENGTH, MASS
    cosine, sine = np.cos(angle[:, 1]), np.sin(angle[:, 1])
    shared = m2 * (l2**2 + l1 * l2 * cosine)
    first = (m1 + m2) * l1**2 + m2 * (l2**2 + 2 * l1 * l2 * cosine)
    second = m2 * l2**2
    pull = m2 * l1 * l2 * sine  # of the centrifugal and Coriolis forces
    left1 = torque[:, 0] + pull * (2 * speed[:, 0] * speed[:, 1] + speed[:, 1] ** 2)
    left2 = torque[:, 1] - pull * speed[:, 0] ** 2
    determinant = first * second - shared**2
    return np.stack(
        [(second * left1 - shared * left2) / determinant, (first * left2 - shared * left1) / determinant], axis=1
    )


def moves(rng: np.random.Generator, cases: int) -> Moves:
    """Random states and torques; all columns are scaled by the mean and spread of these cases.

    Raises:
        UserError: there are fewer than two cases.
    """
    if cases < 2:
        raise UserError(f"cases {cases} have no spread: choose at least 2.")
    angle = rng.uniform(-np.pi, np.pi, (cases, 2))
    speed = rng.uniform(-2, 2, (cases, 2))
    torque = rng.uniform(-5, 5, (cases, 2))
    y = accelerations(angle, speed, torque)
    x = np.concatenate([angle, speed, torque], axis=1)
    return Moves((x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0))


def relative_error(guess: Array, y: Array) -> float:
    """Mean squared error of a guess (N, M), relative to that of always guessing the mean of y; 0 is perfect."""
    return float(((guess - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def train_network(
    rng: np.random.Generator,
    learned: Moves,
    heldout: Moves,
    hidden: int,
    rate: float,
    epochs: int,
    *,
    batch: int | None = None,
    adam: bool = False,
) -> list[float]:
    """Trains a network with one hidden layer on the squared error → its relative error on ``heldout`` after each epoch.

    An epoch sees every case once, in steps of ``batch`` cases; by default one step of all cases. Steps are those of
    gradient descent, or of Adam with minimoe's own settings.

    Raises:
        UserError: ``rate``, ``epochs`` or ``batch`` is not above 0.
    """
    cases = len(learned.x)
    batch = cases if batch is None else batch
    if rate <= 0 or epochs < 1 or batch < 1:
        raise UserError(f"rate {rate}, epochs {epochs} and batch {batch} train nothing: choose numbers above 0.")
    params = hidden_layer.init(rng, learned.x.shape[1], hidden, learned.y.shape[1])
    mean, square, recipe = tree.zeros_like(params), tree.zeros_like(params), TrainConfig()
    errors, step = [], 0
    for _ in range(epochs):
        order = rng.permutation(cases)
        for start in range(0, cases, batch):
            rows = order[start : start + batch]
            y, cache = hidden_layer.forward(params, learned.x[rows])
            _, change = hidden_layer.backward(params, cache, 2 * (y - learned.y[rows]) / len(rows))
            if adam:
                parts = zip(change, mean, square, strict=True)
                change = HiddenLayer(*(adamw.direction(*part, recipe, step) for part in parts))
            params = HiddenLayer(*(old - rate * new for old, new in zip(params, change, strict=True)))
            step += 1
        errors.append(relative_error(hidden_layer.forward(params, heldout.x)[0], heldout.y))
    return errors
