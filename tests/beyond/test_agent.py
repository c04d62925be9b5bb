"""The mixture policy and REINFORCE: gradients, posteriors, and an expected gradient that is that of the reward."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.beyond import agent as agents
from minimoe.beyond import windy_world
from minimoe.beyond.agent import Agent, Episodes, Policy
from minimoe.beyond.windy_world import World
from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.proof.finite_differences import gradient
from minimoe.proof.gradcheck import check, failed

D, A = windy_world.SEEN, windy_world.KEYS


def drawn(rng: np.random.Generator, skills: int = 3, hidden: int = 2, gated: bool = True) -> Agent:
    """Larger weights than fresh ones, so that the skills differ, and a baseline that predicts something."""
    agent = agents.init(rng, skills, hidden, gated=gated, gate_std=0.7)
    policy = agent.policy._replace(w_out=rng.standard_normal(agent.policy.w_out.shape))
    return Agent(policy, 0.3 * rng.standard_normal(8))


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def played(rng: np.random.Generator, episodes: int = 3, steps: int = 4, **changes: Any) -> Episodes:
    """Random episodes of unequal length: episode n ends after 1 + n mod ``steps`` steps."""
    alive = np.arange(steps)[:, None] <= np.arange(episodes) % steps
    made = Episodes(
        x=rng.standard_normal((steps, episodes, D)),
        action=rng.integers(A, size=(steps, episodes)),
        reward=rng.standard_normal((steps, episodes)) * alive,
        alive=alive,
        position=np.zeros((steps + 1, episodes, 2)),
        wind=np.zeros(episodes, int),
        gate=np.zeros((steps, episodes, 3)),
        skill=rng.integers(3, size=(steps, episodes)),
        sampled=False,
        given=None,
    )
    return made._replace(**changes)


def one(episodes: Episodes, n: int) -> Episodes:
    """Episode n alone."""
    parts = {name: getattr(episodes, name)[:, n : n + 1] for name in ("x", "action", "reward", "alive", "skill")}
    return episodes._replace(**parts)


def difference(a: Any, b: Any) -> float:
    return max(float(abs(x - y).max()) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


# The policy


@given(
    skills=st.integers(1, 4),
    hidden=st.integers(1, 3),
    rows=st.integers(1, 4),
    how=st.sampled_from(["gate", "given", "given beside a gate"]),
    seed=st.integers(0, 2**16),
)
@example(skills=3, hidden=2, rows=4, how="gate", seed=0)
@example(skills=3, hidden=2, rows=4, how="given beside a gate", seed=0)
def test_every_gradient_of_log_pi_is_right(skills: int, hidden: int, rows: int, how: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    policy = drawn(rng, skills, hidden, gated=how != "given").policy
    instead = None if how == "gate" else softmax(rng.standard_normal((rows, skills)))

    def forward(policy: Policy, x: np.ndarray) -> tuple[np.ndarray, agents.Cache]:
        return agents.forward(policy, x, instead)

    x = rng.standard_normal((rows, D))
    assert failed(check("agent", forward, agents.backward, policy, x, entries=10, directions=2)) == []


@given(skills=st.integers(1, 4), hidden=st.integers(1, 3), rows=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_every_gradient_of_a_sampled_skill_is_right(skills: int, hidden: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    policy, chosen = drawn(rng, skills, hidden).policy, rng.integers(skills, size=rows)

    def forward(policy: Policy, x: np.ndarray) -> tuple[Any, agents.SkillCache]:
        return agents.forward_sampled(policy, x, chosen)

    x = rng.standard_normal((rows, D))
    assert failed(check("agent", forward, agents.backward_sampled, policy, x, entries=10, directions=2)) == []


def test_the_policy_is_the_mean_of_its_skills_weighted_by_the_gate(rng: np.random.Generator) -> None:
    policy, x = drawn(rng).policy, rng.standard_normal((5, D))
    log_pi, cache = agents.forward(policy, x)
    for n in range(5):
        g = softmax(x[n] @ policy.gate)
        for a in range(A):
            pi = 0.0
            for e in range(3):
                hidden = [math.tanh(sum(x[n, d] * policy.w_in[e, d, f] for d in range(D))) for f in range(2)]
                pi += g[e] * softmax(np.array(hidden) @ policy.w_out[e])[a]
            assert log_pi[n, a] == pytest.approx(math.log(pi), rel=1e-12)
    np.testing.assert_allclose(np.exp(log_pi).sum(1), 1, rtol=1e-13)
    (log_gate, log_skill), alone = agents.forward_sampled(policy, x, np.array([0, 2, 1, 2, 0]))
    np.testing.assert_allclose(np.exp(log_gate), cache.gate, rtol=1e-13)
    np.testing.assert_allclose(alone.skill, cache.skill[[0, 2, 1, 2, 0], range(5)], rtol=1e-13)
    np.testing.assert_allclose(np.exp(log_skill), alone.skill)


@given(skills=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_the_posteriors_are_bayes_rule(skills: int, seed: int) -> None:
    """For each action they add up to 1, and their mean over the actions that are drawn is the gate."""
    rng = np.random.default_rng(seed)
    policy, x = drawn(rng, skills).policy, rng.standard_normal((4, D))
    log_pi, cache = agents.forward(policy, x)
    np.testing.assert_allclose(cache.posterior.sum(0), 1, rtol=1e-12)
    mean = (cache.posterior * np.exp(log_pi)).sum(2).T
    np.testing.assert_allclose(mean, cache.gate, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(cache.posterior, cache.gate.T[:, :, None] * cache.skill / np.exp(log_pi), rtol=1e-11)


def test_a_gate_learns_nothing_between_equal_skills(rng: np.random.Generator) -> None:
    policy = drawn(rng).policy
    policy.w_in[:], policy.w_out[:] = policy.w_in[0], policy.w_out[0]
    _, cache = agents.forward(policy, rng.standard_normal((5, D)))
    np.testing.assert_allclose(cache.posterior, np.broadcast_to(cache.gate.T[:, :, None], cache.posterior.shape))
    _, grads = agents.backward(policy, cache, rng.standard_normal((5, A)))
    np.testing.assert_allclose(grads.gate, 0, atol=1e-14)


def test_a_skill_that_is_not_in_charge_learns_nothing(rng: np.random.Generator) -> None:
    policy, x = drawn(rng, gated=False).policy, rng.standard_normal((4, D))
    log_pi, cache = agents.forward(policy, x, np.eye(3)[[0, 2, 2, 0]])
    np.testing.assert_allclose(np.exp(log_pi), cache.skill[[0, 2, 2, 0], range(4)], rtol=1e-13)
    _, grads = agents.backward(policy, cache, rng.standard_normal((4, A)))
    assert [bool(abs(leaf[e]).max() > 0) for leaf in grads[1:] for e in range(3)] == [True, False, True] * 2


def test_probabilities_that_underflow_leave_a_posterior(rng: np.random.Generator) -> None:
    """Gate and skills put everything on other actions, down to e^−20000, and Bayes' rule still divides."""
    policy = drawn(rng, 2, 1).policy
    policy.gate[:] = 0
    policy.gate[-1] = [1e4, -1e4]
    policy.w_in[:, -1] = 100  # tanh is 1
    policy.w_out[:, 0] = [[1e4, 0, 0, -1e4], [0, 0, 0, 2e4]]
    x = rng.standard_normal((3, D))
    x[:, -1] = 1
    with np.errstate(all="raise"):
        log_pi, cache = agents.forward(policy, x)
        dx, grads = agents.backward(policy, cache, np.ones((3, A)))
    assert all(np.isfinite(leaf).all() for leaf in (log_pi, dx, *tree.leaves(grads)))
    np.testing.assert_allclose(cache.posterior.sum(0), 1)
    np.testing.assert_allclose(log_pi[:, 3], -2e4 + math.log(2), rtol=1e-12)  # −20000 in two ways
    np.testing.assert_allclose(cache.posterior[:, :, 3], 0.5, rtol=1e-9)


def test_several_skills_without_a_gate_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match=r"3 skills and no gate .* give a gate, or `given`"):
        agents.forward(drawn(rng, gated=False).policy, np.ones((1, D)))
    assert agents.init(rng, 1, 2).policy.gate is None
    assert agents.forward(drawn(rng, 1).policy, np.ones((1, D)))[1].gate.tolist() == [[1.0]]


# Soft and sampled


def score(agent: Agent, x: np.ndarray, action: np.ndarray, skill: np.ndarray | None = None) -> Policy:
    """The gradient of Σ log π(a), or of Σ log g_i π_i(a)."""
    if skill is None:
        _, cache = agents.forward(agent.policy, x)
        return agents.backward(agent.policy, cache, np.eye(A)[action])[1]
    _, alone = agents.forward_sampled(agent.policy, x, skill)
    ones = np.eye(len(agent.policy.w_in))[skill], np.eye(A)[action]
    return agents.backward_sampled(agent.policy, alone, ones)[1]


def test_the_posterior_mean_of_sampled_gradients_is_the_soft_gradient(rng: np.random.Generator) -> None:
    agent, x = drawn(rng), rng.standard_normal((1, D))
    _, cache = agents.forward(agent.policy, x)
    for a in range(A):
        action = np.array([a])
        sampled = [score(agent, x, action, np.array([e])) for e in range(3)]
        weighted = [
            tree.map(lambda leaf, h=h: leaf * h, one) for one, h in zip(sampled, cache.posterior[:, 0, a], strict=True)
        ]
        assert difference(tree.add(*weighted), score(agent, x, action)) < 1e-13


def test_over_many_draws_the_sampled_gradient_has_the_soft_mean_and_more_variance(rng: np.random.Generator) -> None:
    agent, N = drawn(rng), 20_000
    x = np.repeat(rng.standard_normal((1, D)), N, axis=0)
    worth = rng.standard_normal(A)  # of each action
    (log_gate, _), _ = agents.forward_sampled(agent.policy, x, np.zeros(N, int))
    skill = agents.draw(np.exp(log_gate), rng.random(N))
    (_, log_skill), _ = agents.forward_sampled(agent.policy, x, skill)
    action = agents.draw(np.exp(log_skill), rng.random(N))
    _, cache = agents.forward(agent.policy, x)
    g, h = cache.gate, cache.posterior[:, np.arange(N), action].T  # (N, E)
    soft = worth[action][:, None] * (h - g)
    sampled = worth[action][:, None] * (np.eye(3)[skill] - g)
    error = np.sqrt((soft - sampled).var(0) / N)
    assert (abs(soft.mean(0) - sampled.mean(0)) < 4 * error).all()
    assert (sampled.var(0) > 1.05 * soft.var(0)).all()
    np.testing.assert_allclose(soft.sum(0) @ np.ones(3), 0, atol=1e-9)


def test_indices_are_drawn_with_their_probabilities(rng: np.random.Generator) -> None:
    p = np.tile([0.0, 0.2, 0.5, 0.3], (50_000, 1))
    drawn = agents.draw(p, rng.random(50_000))
    np.testing.assert_allclose(np.bincount(drawn) / 50_000, p[0], atol=0.01)
    assert agents.draw(p[:3], np.array([0.0, 0.2, 1 - 1e-16])).tolist() == [1, 2, 3], "never one of probability 0"


# The objective


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("skills", [1, 3])
def test_the_gradient_of_the_objective_is_right_part_by_part(skills: int, sampled: bool) -> None:
    """The policy with the advantage held fixed, the baseline in its own loss alone."""
    rng = np.random.default_rng(5)
    agent, made = drawn(rng, skills), played(rng, sampled=sampled, skill=rng.integers(skills, size=(4, 3)))

    def of_policy(policy: Policy, _: None) -> tuple[np.ndarray, Policy]:
        loss, grads = agents.objective(Agent(policy, agent.baseline), made, 0.7)
        return loss.policy - 0.7 * loss.entropy, grads.policy

    def of_baseline(baseline: np.ndarray, _: None) -> tuple[np.ndarray, np.ndarray]:
        loss, grads = agents.objective(Agent(agent.policy, baseline), made, 0.7)
        return loss.baseline, grads.baseline

    def backward(_: Any, grads: Any, dy: np.ndarray) -> tuple[None, Any]:
        return None, tree.map(lambda leaf: leaf * dy, grads)

    for forward, params in ((of_policy, agent.policy), (of_baseline, agent.baseline)):
        assert failed(check("agent", forward, backward, params, None, entries=12, directions=2)) == []


def test_the_skill_that_was_given_is_used_again(rng: np.random.Generator) -> None:
    agent = drawn(rng, gated=False)
    given = np.eye(3)[rng.integers(3, size=(4, 3))]
    made = played(rng, given=given)

    def of_policy(policy: Policy, _: None) -> tuple[np.ndarray, Policy]:
        loss, grads = agents.objective(Agent(policy, agent.baseline), made, 0.1)
        return loss.policy - 0.1 * loss.entropy, grads.policy

    def backward(_: Any, grads: Any, dy: np.ndarray) -> tuple[None, Any]:
        return None, tree.map(lambda leaf: leaf * dy, grads)

    assert failed(check("agent", of_policy, backward, agent.policy, None, entries=12, directions=2)) == []


def test_the_baseline_learns_nothing_from_the_part_of_the_policy(rng: np.random.Generator) -> None:
    """Its gradient is that of ½ Σ (R − b)², whatever the policy was and did."""
    agent, made = drawn(rng), played(rng)
    loss, grads = agents.objective(agent, made, 0.5)
    other = made._replace(action=(made.action + 1) % A)
    _, changed = agents.objective(Agent(drawn(rng).policy, agent.baseline), other, 0.0)
    np.testing.assert_allclose(changed.baseline, grads.baseline, rtol=1e-13)
    by_hand = np.zeros(8)
    phi = agents.features(made.x)
    for t, n in itertools.product(range(4), range(3)):
        if made.alive[t, n]:
            by_hand -= (made.reward[t:, n].sum() - phi[t, n] @ agent.baseline) * phi[t, n] / 3
    np.testing.assert_allclose(grads.baseline, by_hand, rtol=1e-12)
    assert loss.baseline > 0


def test_the_baseline_is_a_quadratic_in_position_and_time() -> None:
    x = np.zeros((windy_world.STEPS, 1, D))
    x[:, 0, :2] = 2, -3
    phi = agents.features(x)
    np.testing.assert_allclose(phi[0, 0], [1, 2, -3, 4, 9, -6, 1, 1])
    np.testing.assert_allclose(phi[3, 0], [1, 2, -3, 4, 9, -6, 0.75, 0.5625])


def test_reward_to_go_by_hand() -> None:
    reward = np.array([[1.0, 0], [2, 5], [4, 0]])
    assert agents.reward_to_go(reward).tolist() == [[7, 5], [6, 5], [4, 0]]


def test_an_action_has_no_part_in_earlier_rewards(rng: np.random.Generator) -> None:
    """Another reward at step t changes what the actions up to t learn, and nothing of what later ones learn."""
    agent, made = drawn(rng), played(rng, episodes=1, steps=4, alive=np.ones((4, 1), bool))
    _, before = agents.objective(agent, made, 0.0)
    reward = made.reward.copy()
    reward[1] += 1
    _, after = agents.objective(agent, made._replace(reward=reward), 0.0)
    _, cache = agents.forward(agent.policy, made.x[:, 0])
    until = np.eye(A)[made.action[:, 0]] * np.array([1.0, 1, 0, 0])[:, None]
    _, expected = agents.backward(agent.policy, cache, -until)
    assert difference(tree.map(np.subtract, after.policy, before.policy), expected) < 1e-13


@pytest.mark.parametrize("sampled", [False, True])
def test_two_episodes_of_unequal_length_each_count_as_the_sum_of_their_steps(
    rng: np.random.Generator, sampled: bool
) -> None:
    agent, made = drawn(rng), played(rng, episodes=2, steps=5, sampled=sampled)
    made = made._replace(alive=np.arange(5)[:, None] < np.array([2, 5]))
    made = made._replace(reward=made.reward * made.alive)
    together = agents.objective(agent, made, 0.3)
    alone = [agents.objective(agent, one(made, n), 0.3) for n in range(2)]
    half = tree.map(lambda leaf: leaf / 2, tree.add(*alone))
    assert difference(together, half) < 1e-13
    if not sampled:  # the first episode, step by step
        total = 0.0
        for t in range(2):
            ahead = made.reward[t:, 0].sum() - agents.features(made.x)[t, 0] @ agent.baseline
            total -= ahead * agents.forward(agent.policy, made.x[t, :1])[0][0, made.action[t, 0]]
        assert alone[0][0].policy == pytest.approx(total, rel=1e-12)


def test_what_comes_after_the_end_of_an_episode_does_not_count(rng: np.random.Generator) -> None:
    agent, made = drawn(rng), played(rng)
    ended = ~made.alive
    x, action = made.x.copy(), made.action.copy()
    x[ended], action[ended] = 7.0, 3
    assert (
        difference(agents.objective(agent, made._replace(x=x, action=action), 0.3), agents.objective(agent, made, 0.3))
        == 0
    )


def test_the_entropy_bonus_rewards_indecision(rng: np.random.Generator) -> None:
    """Without advantages, a step against the gradient raises the entropy."""
    agent = drawn(rng)._replace(baseline=np.zeros(8))
    made = played(rng, reward=np.zeros((4, 3)))
    loss, grads = agents.objective(agent, made, 1.0)
    moved = Agent(tree.map(lambda leaf, d: leaf - 1e-3 * d, agent.policy, grads.policy), agent.baseline)
    assert agents.objective(moved, made, 1.0)[0].entropy > loss.entropy


@pytest.mark.parametrize("sampled", [False, True])
def test_the_expected_gradient_is_that_of_the_expected_reward(rng: np.random.Generator, sampled: bool) -> None:
    """Every course that two steps can take, weighted by its probability: what REINFORCE promises, without sampling.

    The start is one stride from arriving, so that courses have unequal lengths; the baseline predicts nonsense, which
    must not matter.
    """
    agent, T, E = drawn(rng, 2), 2, 2
    choices = list(itertools.product(range(E), range(A))) if sampled else [(0, a) for a in range(A)]

    def course(moves: tuple[tuple[int, int], ...]) -> Episodes:
        world = World(np.array([[0.85, 0.2]]), np.array([1]), np.ones(1, bool))
        seen: list[Any] = []
        for _, a in moves:
            x = windy_world.observe(world, np.zeros((1, 4)))
            after, reward = windy_world.step(world, np.array([a]))
            seen.append((x, reward, world.alive))
            world = after
        x, reward, alive = (np.stack(column) for column in zip(*seen, strict=True))
        skill, action = (np.array(column)[:, None] for column in zip(*moves, strict=True))
        empty = played(rng, episodes=1, steps=T)
        return empty._replace(x=x, action=action, reward=reward, alive=alive, skill=skill, sampled=sampled)

    courses = [course(moves) for moves in itertools.product(choices, repeat=T)]
    assert {int(made.alive.sum()) for made in courses} == {1, 2}

    def probability(policy: Policy, made: Episodes) -> float:
        """Of the steps that were taken; the others are spread evenly over what could follow."""
        p = 1.0
        for t in range(T):
            if not made.alive[t, 0]:
                p /= len(choices)
            elif sampled:
                (log_gate, log_skill), _ = agents.forward_sampled(policy, made.x[t], made.skill[t])
                p *= math.exp(log_gate[0, made.skill[t, 0]] + log_skill[0, made.action[t, 0]])
            else:
                p *= math.exp(agents.forward(policy, made.x[t])[0][0, made.action[t, 0]])
        return p

    weights = [probability(agent.policy, made) for made in courses]
    assert sum(weights) == pytest.approx(1, rel=1e-12)
    parts = [
        tree.map(lambda leaf, p=p: p * leaf, agents.objective(agent, made, 0.0)[1].policy)
        for p, made in zip(weights, courses, strict=True)
    ]
    expected = tree.add(*parts)
    for name, leaf in tree.named_leaves(agent.policy):

        def reward(moved: np.ndarray, name: str = name) -> float:
            policy = agent.policy._replace(**{name: moved})
            return -sum(probability(policy, made) * float(made.reward.sum()) for made in courses)

        found = dict(tree.named_leaves(expected))[name]
        np.testing.assert_allclose(found, gradient(reward, leaf), atol=1e-9, err_msg=name)
