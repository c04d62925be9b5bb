"""The training of agents in the windy world: they play, learn, and are measured.

    run = train(SETTINGS["skills, soft gate"], seed=0)
    measure(run.agent, SETTINGS["skills, soft gate"])

Lesson: lessons/64_an_agent_of_many_skills.ipynb
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from minimoe.beyond import agent as agents
from minimoe.beyond import windy_world
from minimoe.beyond.agent import Agent, Episodes, Policy
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.core.config import TrainConfig
from minimoe.optim import adamw

EPISODES = 128
"""Episodes per update."""
RATE = 0.04
"""Adam's learning rate."""
BONUS = 0.02
"""β, what a nat of entropy is worth."""

POSITION = slice(0, 2)
"""Which of the numbers that an agent sees are the position."""

Play = Literal["soft", "sampled", "given"]
Gate = Literal["learned", "random", "wind"]


class Setting(NamedTuple):
    """What an agent is, and how it plays."""

    skills: int
    hidden: int
    play: Play = "soft"  # all skills run; one is drawn; or the true wind names the one in charge
    gate: Gate = "learned"  # or "random": it stays as it was drawn; or "wind": it learns, but does not see the position


SETTINGS = {
    "one policy, as large as a skill": Setting(1, 4),
    "one policy, equal active size": Setting(1, 7),
    "one policy, equal total size": Setting(1, 19),
    "skills, soft gate": Setting(4, 4),
    "skills, sampled": Setting(4, 4, "sampled"),
    "skills, random gate": Setting(4, 4, gate="random"),
    "skills, gate sees the wind only": Setting(4, 4, gate="wind"),
    "skills, wind given": Setting(4, 4, "given"),
}
"""The agents that are compared."""


class Run(NamedTuple):
    agent: Agent
    success: Array  # (updates,)  the share of each update's episodes that arrived, while it still tries at random
    kept: dict[int, Agent]  # the agent before these updates


class Measured(NamedTuple):
    """What an agent does when it always takes the likeliest skill and action."""

    success: float  # the share of episodes that arrive
    reward: float  # of an episode, on average
    bits: float  # I(skill in charge; wind), of 2 possible bits
    chance: float  # the same with the winds of the episodes exchanged at random
    shuffled_success: float  # with the gate of another episode
    shuffled_reward: float


def init(setting: Setting, seed: int) -> Agent:
    """A fresh agent; a gate that will not learn is drawn larger, so that it tells situations apart."""
    rng = np.random.default_rng(seed)
    std = 1.0 if setting.gate == "random" else 0.1
    agent = agents.init(rng, setting.skills, setting.hidden, gated=setting.play != "given", gate_std=std)
    if setting.gate == "wind" and agent.policy.gate is not None:
        agent.policy.gate[POSITION] = 0
    return agent


def play(
    policy: Policy,
    setting: Setting,
    rng: np.random.Generator,
    episodes: int = EPISODES,
    *,
    greedy: bool = False,
    shuffled: bool = False,
) -> Episodes:
    """Plays episodes side by side. ``greedy`` takes the likeliest skill and action; ``shuffled`` exchanges the gates.

    With exchanged gates, every episode uses the gate of another episode, which usually has another wind.
    """
    world = windy_world.start(rng, episodes)
    partner = rng.permutation(episodes)
    steps: list[tuple[Array, ...]] = []
    positions = [world.position]
    for _ in range(windy_world.STEPS):
        x = windy_world.observe(world, windy_world.draw_noise(rng, episodes))
        given = np.eye(setting.skills)[world.wind] if setting.play == "given" else None
        gate = np.exp(agents.gate_of(policy, x, given))
        if shuffled:
            given = gate = gate[partner]
        luck = rng.random((2, episodes))
        skill = gate.argmax(1)
        if setting.play == "sampled":
            skill = skill if greedy else agents.draw(gate, luck[0])
            (_, log_pi), _ = agents.forward_sampled(policy, x, skill)
        else:
            log_pi, _ = agents.forward(policy, x, given)
        action = log_pi.argmax(1) if greedy else agents.draw(np.exp(log_pi), luck[1])
        after, reward = windy_world.step(world, action)
        steps.append((x, action, reward, world.alive, gate, skill))
        positions.append(after.position)
        world = after
    x, action, reward, alive, gates, skills = (np.stack(column) for column in zip(*steps, strict=True))
    kept = gates if setting.play == "given" or shuffled else None
    sampled = setting.play == "sampled"
    return Episodes(x, action, reward, alive, np.stack(positions), world.wind, gates, skills, sampled, kept)


def train(setting: Setting, seed: int, updates: int = 200, keep: tuple[int, ...] = (), rate: float = RATE) -> Run:
    """Plays and learns. With the same seed, the episodes begin in the same states for every setting."""
    agent, rng = init(setting, seed), np.random.default_rng([seed, 1])
    moments = tree.zeros_like(agent), tree.zeros_like(agent)
    recipe = TrainConfig()
    success, kept = [], {}
    for update in range(updates):
        if update in keep:
            kept[update] = tree.map(np.copy, agent)
        played = play(agent.policy, setting, rng)
        success.append(played.arrived.mean())
        _, gradient = agents.objective(agent, played, BONUS)
        if gradient.policy.gate is not None and setting.gate != "learned":
            gradient.policy.gate[POSITION if setting.gate == "wind" else slice(None)] = 0
        for leaf, d, mean, square in zip(*map(tree.leaves, (agent, gradient, *moments)), strict=True):
            leaf -= rate * adamw.direction(d, mean, square, recipe, update)
    return Run(agent, np.array(success), kept)


def measure(agent: Agent, setting: Setting, episodes: int = 2000, seed: int = 1000) -> Measured:
    """Fresh episodes, played greedily, once with the agent's own gate and once with exchanged gates."""
    own = play(agent.policy, setting, np.random.default_rng(seed), episodes, greedy=True)
    other = play(agent.policy, setting, np.random.default_rng(seed), episodes, greedy=True, shuffled=True)
    rng = np.random.default_rng(seed + 1)
    chance = [wind_known(own, rng.permutation(own.wind)) for _ in range(10)]
    return Measured(
        success=float(own.arrived.mean()),
        reward=float(own.reward.sum(0).mean()),
        bits=wind_known(own, own.wind),
        chance=float(np.mean(chance)),
        shuffled_success=float(other.arrived.mean()),
        shuffled_reward=float(other.reward.sum(0).mean()),
    )


def updates_to(success: Array, share: float = 0.5, window: int = 5) -> int | None:
    """success (updates,) → the first update at which the mean of the last ``window`` reaches ``share``, or None."""
    sums = np.cumsum(np.concatenate([[0.0], success]))
    reached = np.flatnonzero(sums[window:] - sums[:-window] >= share * window - 1e-9)
    return int(reached[0]) + window if len(reached) else None


def sizes(agent: Agent, setting: Setting) -> tuple[int, int]:
    """How many parameters of the policy compute one action, and how many the policy has.

    If all skills run, all parameters are active. If the wind is given or a skill is drawn, those of one skill and of
    the gate, if there is one, are active.
    """
    total = tree.size(agent.policy)
    gate = 0 if agent.policy.gate is None else agent.policy.gate.size
    return (total if setting.play == "soft" else gate + (total - gate) // setting.skills), total


def mutual_information(a: Array, b: Array) -> float:
    """Whole numbers a (N,) and b (N,) → how many bits each tells about the other, from joint frequencies."""
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a, b), 1)
    joint /= len(a)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def wind_known(played: Episodes, wind: Array) -> float:
    """I(skill in charge; wind (N,)) in bits, over all steps that were taken."""
    each = np.broadcast_to(wind, played.skill.shape)
    return mutual_information(played.skill[played.alive], each[played.alive])
