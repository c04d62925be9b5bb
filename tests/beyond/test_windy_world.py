"""The windy world: what keys do under each wind, what a step is worth, and what waits after arriving."""

import numpy as np
import pytest

from minimoe.beyond import windy_world
from minimoe.beyond.windy_world import World
from minimoe.core.errors import UserError


def at(*positions: tuple[float, float], wind: int = 0) -> World:
    return World(np.array(positions), np.full(len(positions), wind), np.ones(len(positions), bool))


def test_each_key_moves_in_each_direction_under_one_wind() -> None:
    moves = np.array(
        [
            [windy_world.step(at((2.0, 1.0), wind=wind), np.array([key]))[0].position[0] - [2, 1] for key in range(4)]
            for wind in range(4)
        ]
    )  # (winds, keys, 2)
    np.testing.assert_allclose(np.hypot(*moves.T), 0.5)
    np.testing.assert_allclose(moves[0], [[0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    np.testing.assert_allclose(moves[1], [[0, 0.5], [-0.5, 0], [0, -0.5], [0.5, 0]])
    for table in (moves, moves.transpose(1, 0, 2)):
        assert all(len({tuple(move) for move in row.round(9)}) == 4 for row in table)


def test_a_step_is_worth_what_it_brings_nearer_less_its_cost_and_arriving_more() -> None:
    world, reward = windy_world.step(at((0.9, 0.0), (0.9, 0.0), (2.0, 0.0)), np.array([2, 0, 2]))
    np.testing.assert_allclose(reward, [0.5 - 0.05 + 1, -0.5 - 0.05, 0.5 - 0.05])
    assert world.alive.tolist() == [False, True, True]
    np.testing.assert_allclose(world.position, [[0.4, 0], [1.4, 0], [1.5, 0]])


def test_who_has_arrived_waits_without_reward() -> None:
    world = at((0.9, 0.0), (1.5, 0.0))
    world, _ = windy_world.step(world, np.array([2, 2]))
    later, reward = windy_world.step(world, np.array([2, 2]))
    assert reward[0] == 0
    assert (later.position[0] == world.position[0]).all()
    assert (later.position[1] != world.position[1]).any()
    assert not later.alive[0]


def test_the_rewards_of_an_episode_add_up_to_the_way_that_was_made(rng: np.random.Generator) -> None:
    world = first = windy_world.start(rng, 40)
    total, steps = np.zeros(40), np.zeros(40)
    for _ in range(windy_world.STEPS):
        steps += world.alive
        world, reward = windy_world.step(world, rng.integers(4, size=40))
        total += reward
    way = np.hypot(*first.position.T) - np.hypot(*world.position.T)
    np.testing.assert_allclose(total, way - 0.05 * steps + ~world.alive, atol=1e-12)
    assert 0 < (~world.alive).sum() < 40


def test_the_origin_can_always_be_reached_in_time(rng: np.random.Generator) -> None:
    """With the direction that brings it nearest, from anywhere and under every wind."""
    world = windy_world.start(rng, 400)
    for _ in range(8):
        ahead = world.position[:, None] + 0.5 * windy_world.DIRECTIONS
        best = np.hypot(ahead[..., 0], ahead[..., 1]).argmin(1)
        world, _ = windy_world.step(world, (best - world.wind) % 4)
    assert not world.alive.any()


def test_episodes_start_outside_the_reach_and_with_every_wind_equally_often(rng: np.random.Generator) -> None:
    world = windy_world.start(rng, 400)
    assert np.bincount(world.wind).tolist() == [100] * 4
    assert np.hypot(*world.position.T).min() >= 0.5
    assert abs(world.position).max() <= 2
    assert world.position.min() < -1.9 < 1.9 < world.position.max()
    assert world.alive.all()


@pytest.mark.parametrize("episodes", [0, -4, 6])
def test_winds_that_cannot_be_shared_evenly_are_refused(rng: np.random.Generator, episodes: int) -> None:
    with pytest.raises(UserError, match=f"{episodes} episodes .* positive multiple of 4"):
        windy_world.start(rng, episodes)


def test_the_agent_sees_the_position_and_a_noisy_wind(rng: np.random.Generator) -> None:
    world = at((1.0, -2.0), (0.5, 1.5), wind=2)
    noise = windy_world.draw_noise(rng, 2)
    x = windy_world.observe(world, noise)
    assert x.shape == (2, windy_world.SEEN)
    np.testing.assert_allclose(x[:, :2], [[0.5, -1], [0.25, 0.75]])
    np.testing.assert_allclose(x[:, 2:6] - noise, [[0, 0, 1, 0]] * 2, atol=1e-15)
    assert (x[:, 6] == 1).all()
    assert abs(windy_world.draw_noise(rng, 5000).std() - 0.1) < 2e-3
