"""A small world for agents: a point must reach the origin, and the wind decides what its four keys do.

In each of at most 12 steps, the agent presses one of four keys and the point moves by 1/2: east, north, west or south.
There are four winds. Without wind (wind 0) key 0 moves the point east; each of the next winds turns every key by
another quarter turn:

    direction = (key + wind) mod 4

So each key moves the point in another direction under each of the four winds. An agent that ignores the wind can do no
better than guess, and one that has learned a wind must learn something else for the next one.

    reward of a step = distance before − distance after − 0.05,    and 1 more on arrival

The wind stays the same for an episode. The agent sees it through noise. Many episodes are played side by side; episodes
whose point has arrived wait, without reward. Only ``start`` and ``draw_noise`` draw random numbers.

Lesson: lessons/64_an_agent_of_many_skills.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.errors import UserError

STEPS = 12
"""The most steps of an episode."""
STRIDE = 0.5
"""How far a key moves the point."""
REACH = 0.5
"""The distance from the origin at which a point has arrived."""
REGION = 2.0
"""Points start in the square from −2 to 2, so that 8 strides always suffice."""
COST = 0.05
"""What each step costs."""
PRIZE = 1.0
"""The reward for arriving."""
NOISE = 0.1
"""The standard deviation of the noise through which the wind is seen."""

WINDS = KEYS = 4
SEEN = 2 + WINDS + 1
"""How many numbers an agent sees: the position, a noisy 1 for the wind among noisy zeros, and a constant 1."""

DIRECTIONS = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
"""East, north, west, south."""


class World(NamedTuple):
    """The state of N episodes that are played side by side."""

    position: Array  # (N, 2)
    wind: Array  # (N,)  0 to 3
    alive: Array  # (N,)  bool: has not arrived yet


def start(rng: np.random.Generator, episodes: int) -> World:
    """Fresh episodes: positions uniform in the square outside the reach of the origin, and every wind equally often.

    Raises:
        UserError: ``episodes`` is not a positive multiple of 4.
    """
    if episodes < 1 or episodes % WINDS:
        raise UserError(f"{episodes} episodes cannot share four winds evenly: choose a positive multiple of 4.")
    position = rng.uniform(-REGION, REGION, (episodes, 2))
    while (inside := _distance(position) < REACH).any():
        position[inside] = rng.uniform(-REGION, REGION, (int(inside.sum()), 2))
    return World(position, np.arange(episodes) % WINDS, np.ones(episodes, bool))


def draw_noise(rng: np.random.Generator, episodes: int) -> Array:
    """The noise of one step, (N, 4)."""
    return NOISE * rng.standard_normal((episodes, WINDS))


def observe(world: World, noise: Array) -> Array:
    """What the agent sees, (N, 7): x and y in units of 2, the wind as a one-hot row plus ``noise`` (N, 4), and 1."""
    wind = np.eye(WINDS)[world.wind] + noise
    return np.concatenate([world.position / REGION, wind, np.ones((len(wind), 1))], axis=1)


def step(world: World, key: Array) -> tuple[World, Array]:
    """Every living point moves as its key (N,) and its wind say → the next state and the reward (N,)."""
    moved = world.position + STRIDE * DIRECTIONS[(key + world.wind) % KEYS]
    position = np.where(world.alive[:, None], moved, world.position)
    arrived = world.alive & (_distance(position) < REACH)
    reward = _distance(world.position) - _distance(position) - COST + PRIZE * arrived
    return World(position, world.wind, world.alive & ~arrived), np.where(world.alive, reward, 0.0)


def _distance(position: Array) -> Array:
    return np.hypot(position[:, 0], position[:, 1])
