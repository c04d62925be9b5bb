"""Agents at practice: what they play, that they learn, and what is said of them."""

import math
from typing import Any

import numpy as np
import pytest

from minimoe.beyond import agent as agents
from minimoe.beyond import agent_training, windy_world
from minimoe.beyond.agent_training import SETTINGS, Setting
from minimoe.core import tree

SOFT, SAMPLED, GIVEN = (SETTINGS[name] for name in ("skills, soft gate", "skills, sampled", "skills, wind given"))

every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))


@every_setting
def test_what_is_played_is_a_course_through_the_world(setting: Setting) -> None:
    agent = agent_training.init(setting, 0)
    played = agent_training.play(agent.policy, setting, np.random.default_rng(0), 40)
    T, N = windy_world.STEPS, 40
    assert played.x.shape == (T, N, windy_world.SEEN)
    np.testing.assert_allclose(played.x[:, :, :2], played.position[:-1] / 2)
    np.testing.assert_array_equal(played.alive, played.alive & np.vstack([np.ones((1, N), bool), played.alive[:-1]]))
    near = np.hypot(played.position[..., 0], played.position[..., 1])
    np.testing.assert_array_equal(played.arrived, near[-1] < windy_world.REACH)
    way = near[:-1] - near[1:] - 0.05 * played.alive
    np.testing.assert_allclose(played.reward.sum(0), way.sum(0) + played.arrived, atol=1e-12)
    assert (played.reward[~played.alive] == 0).all()
    np.testing.assert_allclose(played.gate.sum(2), 1)
    if setting.play == "given":
        assert (played.skill == played.wind).all()
    elif setting.play == "soft":
        np.testing.assert_array_equal(played.skill, played.gate.argmax(2))


def test_a_sampled_skill_alone_decides_on_the_action() -> None:
    """Skills that each press one key: the key tells which skill was drawn, and the gate how often it is."""
    agent = agent_training.init(SAMPLED, 0)
    agent.policy.w_in[:, -1] = 100
    agent.policy.w_out[:] = 1e3 * np.eye(4)[:, None]
    agent.policy.gate[:] = 0
    agent.policy.gate[-1] = np.log([0.1, 0.2, 0.3, 0.4])
    played = agent_training.play(agent.policy, SAMPLED, np.random.default_rng(0), 4000)
    np.testing.assert_array_equal(played.action, played.skill)
    np.testing.assert_allclose(np.bincount(played.skill[0]) / 4000, [0.1, 0.2, 0.3, 0.4], atol=0.03)
    greedy = agent_training.play(agent.policy, SAMPLED, np.random.default_rng(0), 40, greedy=True)
    assert (greedy.skill == 3).all()


def test_exchanged_gates_are_those_of_other_episodes() -> None:
    agent = agent_training.train(GIVEN, 0, 30).agent
    own, other = (
        agent_training.play(agent.policy, GIVEN, np.random.default_rng(1), 400, shuffled=shuffled)
        for shuffled in (False, True)
    )
    assert (own.skill == own.wind).all()
    assert 0.15 < (other.skill == other.wind).mean() < 0.35, "as often as by chance"
    assert np.bincount(other.skill[0]).tolist() == [100] * 4


@pytest.mark.parametrize("setting", [SOFT, SAMPLED, GIVEN], ids=["soft", "sampled", "given"])
def test_an_agent_learns_to_arrive(setting: Setting) -> None:
    run = agent_training.train(setting, 0, 80, keep=(0,))
    assert run.success[:5].mean() < 0.35
    assert run.success[-10:].mean() > 0.7
    before, after = (agent_training.measure(agent, setting, 400) for agent in (run.kept[0], run.agent))
    assert after.reward > before.reward + 1
    assert after.success > 0.9


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    one, again, other = (agent_training.train(SAMPLED, seed, 5).agent for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(tree.leaves(one), tree.leaves(again), strict=True))
    assert not np.allclose(one.policy.w_in, other.policy.w_in)


def test_what_was_kept_is_the_agent_of_that_time() -> None:
    run = agent_training.train(SOFT, 0, 4, keep=(0, 2))
    fresh = agent_training.init(SOFT, 0)
    assert all((a == b).all() for a, b in zip(tree.leaves(run.kept[0]), tree.leaves(fresh), strict=True))
    early = agent_training.train(SOFT, 0, 2).agent
    assert all((a == b).all() for a, b in zip(tree.leaves(run.kept[2]), tree.leaves(early), strict=True))


def test_a_random_gate_stays_and_a_gate_for_the_wind_never_sees_the_position() -> None:
    for name, held in (("skills, random gate", slice(None)), ("skills, gate sees the wind only", slice(0, 2))):
        setting = SETTINGS[name]
        fresh, run = agent_training.init(setting, 0).policy.gate, agent_training.train(setting, 0, 5).agent.policy.gate
        assert (fresh[held] == run[held]).all()
    assert (run[:2] == 0).all()
    assert (run[2:] != fresh[2:]).all()
    assert not np.allclose(agent_training.train(SOFT, 0, 5).agent.policy.gate, agent_training.init(SOFT, 0).policy.gate)


def test_two_bits_are_known_of_a_wind_that_is_given() -> None:
    found = agent_training.measure(agent_training.train(GIVEN, 0, 60).agent, GIVEN, 400)
    assert found.bits == pytest.approx(2, abs=0.03)
    assert found.chance < 0.05
    assert found.shuffled_success < 0.4 < 0.9 < found.success
    assert found.shuffled_reward < 0 < found.reward


def test_one_policy_has_no_gate_to_exchange() -> None:
    setting = SETTINGS["one policy, equal active size"]
    found = agent_training.measure(agent_training.init(setting, 0), setting, 400)
    assert abs(found.bits) < 1e-12
    assert (found.shuffled_success, found.shuffled_reward) == (found.success, found.reward)


@pytest.mark.parametrize(
    ("a", "b", "bits"),
    [
        ([0, 1, 2, 3], [3, 1, 0, 2], 2),
        ([0, 0, 1, 1], [0, 1, 0, 1], 0),
        ([1, 1, 1], [0, 1, 2], 0),
        ([0, 0, 1, 1], [0, 0, 0, 1], 1.5 - 0.75 * math.log2(3)),  # 1/2 log 4/3 + 1/4 log 2/3 + 1/4 log 2
    ],
)
def test_mutual_information_by_hand(a: list[int], b: list[int], bits: float) -> None:
    for one, other in ((a, b), (b, a)):
        found = agent_training.mutual_information(np.array(one), np.array(other))
        assert found == pytest.approx(bits, abs=1e-12)


def test_only_steps_that_were_taken_tell_of_the_wind() -> None:
    """Two episodes and two skills: the skill follows the wind until the end, and does not after it."""
    played = agent_training.play(agent_training.init(SOFT, 0).policy, SOFT, np.random.default_rng(0), 4)
    played = played._replace(
        wind=np.array([0, 0, 1, 1]),
        skill=np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]]),
        alive=np.array([[True] * 4, [True] * 4, [False] * 4]),
    )
    assert agent_training.wind_known(played, played.wind) == 1
    assert agent_training.wind_known(played, np.array([0, 1, 0, 1])) == 0


@pytest.mark.parametrize(
    ("success", "first"),
    [([0.0] * 10, None), ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 8), ([1.0] * 5, 5), ([0.5] * 5, 5), ([0.9] * 4, None)],
)
def test_half_of_the_episodes_in_five_updates_are_needed(success: list[float], first: Any) -> None:
    assert agent_training.updates_to(np.array(success, float)) == first


def test_the_sizes_of_the_agents_that_are_compared() -> None:
    found = {name: agent_training.sizes(agent_training.init(each, 0), each) for name, each in SETTINGS.items()}
    assert found == {
        "one policy, as large as a skill": (44, 44),
        "one policy, equal active size": (77, 77),
        "one policy, equal total size": (209, 209),
        "skills, soft gate": (204, 204),
        "skills, sampled": (72, 204),
        "skills, random gate": (204, 204),
        "skills, gate sees the wind only": (204, 204),
        "skills, wind given": (44, 176),
    }
    assert tree.size(agents.init(np.random.default_rng(0), 4, 4).policy) == 204
