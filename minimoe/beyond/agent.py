"""An agent with skills: a mixture of policies that learns from rewards alone, with every gradient by hand.

A skill is a small policy, and a gate says which skill the situation x asks for:

    g = softmax(x W_gate)    π_e = softmax(tanh(x W_in,e) W_out,e)    π(a) = Σ_e g_e π_e(a)

The agent improves by REINFORCE with a baseline. It plays, and raises the log-probability of each action in proportion
to the advantage δ = R − b, where R is the sum of the rewards that followed and b is the sum that the baseline had
predicted:

    loss = mean over episodes of  Σ_t [ −δ_t log π(a_t) − β H(π_t) ]  +  ½ Σ_t (R_t − b_t)²,    R_t = r_t + r_{t+1} + …

δ counts as a constant in the first part, so the baseline learns from the second alone. H is the entropy; its bonus β
keeps the agent exploring. A single policy is the case of one skill and no gate.

There are two ways to play. *Soft*: the action is drawn from π, and all skills run. *Sampled*: a skill is drawn from g,
only this skill runs, and the action is drawn from the policy of this skill.

Williams 1992 (REINFORCE); Jacobs et al. 1991 (the posterior).  Lesson: lessons/64_an_agent_of_many_skills.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minimoe.beyond import windy_world
from minimoe.core.arrays import Array, underflow_is_right
from minimoe.core.errors import UserError


class Policy(NamedTuple):
    gate: Array | None  # (D, E)  None: one skill, or a gate that is given from outside
    w_in: Array  # (E, D, F)
    w_out: Array  # (E, F, A)  A actions


class Agent(NamedTuple):
    policy: Policy
    baseline: Array  # (8,)  b = φ · baseline, with φ of ``features``


class Cache(NamedTuple):
    x: Array  # (N, D)
    hidden: Array  # (E, N, F)
    skill: Array  # (E, N, A)  π_e(a)
    gate: Array  # (N, E)  g
    posterior: Array  # (E, N, A)  h_e(a), how much skill e is behind action a
    given: bool  # whether g was given, so that the gate had no part in it


class SkillCache(NamedTuple):
    x: Array  # (N, D)
    chosen: Array  # (N,)
    gate: Array  # (N, E)
    hidden: Array  # (N, F)  of the chosen skill
    skill: Array  # (N, A)  of the chosen skill


class Episodes(NamedTuple):
    """What was seen and done in N episodes of at most T steps, side by side."""

    x: Array  # (T, N, D)
    action: Array  # (T, N)
    reward: Array  # (T, N)  0 after the end
    alive: Array  # (T, N)  bool: the step was taken
    position: Array  # (T + 1, N, 2)
    wind: Array  # (N,)
    gate: Array  # (T, N, E)  g, or what stood in its place
    skill: Array  # (T, N)  the skill in charge: the one that was drawn, or if all run, the one with the largest g
    sampled: bool  # whether the skill was drawn, and ran alone
    given: Array | None  # (T, N, E)  what was put in the gate's place, or None

    @property
    def arrived(self) -> Array:
        """Which episodes reached the origin, (N,) bool."""
        return self.reward.max(0) > windy_world.PRIZE / 2


class Loss(NamedTuple):
    policy: Array  # ()  −Σ δ log π, a mean over episodes
    entropy: Array  # ()  Σ H, a mean over episodes
    baseline: Array  # ()  ½ Σ (R − b)², a mean over episodes


def init(rng: np.random.Generator, skills: int, hidden: int, *, gated: bool = True, gate_std: float = 0.1) -> Agent:
    """Skills with W_in from N(0, 1/D) and W_out from N(0, 0.1²), a gate from N(0, gate_std²), a baseline of zero.

    A single skill, or ``gated=False``, has no gate.
    """
    D, A = windy_world.SEEN, windy_world.KEYS
    gate = gate_std * rng.standard_normal((D, skills)) if gated and skills > 1 else None
    w_in = D**-0.5 * rng.standard_normal((skills, D, hidden))
    return Agent(Policy(gate, w_in, 0.1 * rng.standard_normal((skills, hidden, A))), np.zeros(8))


def gate_of(policy: Policy, x: Array, given: Array | None = None) -> Array:
    """x (N, D) → log g (N, E), or the logarithm of what is ``given`` in its place: −∞ for a skill that must not act.

    Raises:
        UserError: there are several skills, but neither a gate nor ``given``.
    """
    if given is not None:
        nothing = np.full(given.shape, -np.inf)
        return np.log(given, out=nothing, where=given > 0)
    if policy.gate is not None:
        return _log_softmax(x @ policy.gate)
    if len(policy.w_in) > 1:
        raise UserError(
            f"a policy with {len(policy.w_in)} skills and no gate cannot choose between them: give a gate, or `given`."
        )
    return np.zeros((len(x), 1))


@underflow_is_right
def forward(policy: Policy, x: Array, given: Array | None = None) -> tuple[Array, Cache]:
    """x (N, D) → log π(a) (N, A) of the mixture. ``given`` (N, E) are probabilities of skills in the gate's place."""
    hidden = np.tanh(x @ policy.w_in)
    log_skill = _log_softmax(hidden @ policy.w_out)  # (E, N, A)
    log_gate = gate_of(policy, x, given)
    joint = log_gate.T[:, :, None] + log_skill  # log of g_e π_e(a)
    peak = joint.max(0)
    log_pi = peak + np.log(np.exp(joint - peak).sum(0))
    # The posterior by logarithms: a quotient of probabilities would be 0/0 where all of them underflow.
    return log_pi, Cache(x, hidden, np.exp(log_skill), np.exp(log_gate), np.exp(joint - log_pi), given is not None)


@underflow_is_right
def backward(policy: Policy, cache: Cache, dlog_pi: Array) -> tuple[Array, Policy]:
    """dlog_pi (N, A) → dx (N, D) and the gradient of the policy.

    Let s be the gate's logits, z_e those of skill e, and h_e(a) = g_e π_e(a) / π(a) the posterior. For each action a

        d log π(a) / ds_e = h_e(a) − g_e,    d log π(a) / dz_e = h_e(a) (onehot_a − π_e)

    which is Jacobs's rule with an action in the place of a target: the gate moves from the prior towards the posterior,
    and each skill learns in proportion to its posterior h_e.
    """
    weighted = cache.posterior * dlog_pi  # (E, N, A)
    of_skill = weighted.sum(2, keepdims=True)  # (E, N, 1)
    dlogits = weighted - of_skill * cache.skill
    dpre = (dlogits @ policy.w_out.transpose(0, 2, 1)) * (1 - cache.hidden**2)  # (E, N, F)
    dx = (dpre @ policy.w_in.transpose(0, 2, 1)).sum(0)
    dgate = None
    if policy.gate is not None:
        ds = of_skill[:, :, 0].T - cache.gate * dlog_pi.sum(1, keepdims=True)  # (N, E)
        ds *= not cache.given
        dgate = cache.x.T @ ds
        dx += ds @ policy.gate.T
    return dx, Policy(dgate, cache.x.T @ dpre, cache.hidden.transpose(0, 2, 1) @ dlogits)


@underflow_is_right
def forward_sampled(policy: Policy, x: Array, chosen: Array) -> tuple[tuple[Array, Array], SkillCache]:
    """x (N, D), the skill of each row (N,) → log g (N, E) and log π_e(a) (N, A) of that skill, which runs alone."""
    log_gate = gate_of(policy, x)
    hidden = np.empty((len(x), policy.w_in.shape[2]))
    logits = np.empty((len(x), policy.w_out.shape[2]))
    for e in range(len(policy.w_in)):
        rows = chosen == e
        hidden[rows] = np.tanh(x[rows] @ policy.w_in[e])
        logits[rows] = hidden[rows] @ policy.w_out[e]
    log_skill = _log_softmax(logits)
    return (log_gate, log_skill), SkillCache(x, chosen, np.exp(log_gate), hidden, np.exp(log_skill))


@underflow_is_right
def backward_sampled(policy: Policy, cache: SkillCache, dlogs: tuple[Array, Array]) -> tuple[Array, Policy]:
    """The gradients with respect to log g (N, E) and log π_e(a) (N, A) → dx (N, D) and the gradient of the policy.

    Drawn skill i, drawn action a: the posterior h of ``backward`` is replaced by onehot_i. Over many draws the mean is
    the same, because h is the share of the draws with action a that came from each skill.
    """
    dlog_gate, dlog_skill = dlogs
    dlogits = dlog_skill - cache.skill * dlog_skill.sum(1, keepdims=True)
    dx, dw_in, dw_out = np.empty_like(cache.x), np.zeros_like(policy.w_in), np.zeros_like(policy.w_out)
    for e in range(len(policy.w_in)):
        rows = cache.chosen == e
        dw_out[e] = cache.hidden[rows].T @ dlogits[rows]
        dpre = (dlogits[rows] @ policy.w_out[e].T) * (1 - cache.hidden[rows] ** 2)
        dw_in[e] = cache.x[rows].T @ dpre
        dx[rows] = dpre @ policy.w_in[e].T
    dgate = None
    if policy.gate is not None:
        ds = dlog_gate - cache.gate * dlog_gate.sum(1, keepdims=True)
        dgate = cache.x.T @ ds
        dx += ds @ policy.gate.T
    return dx, Policy(dgate, dw_in, dw_out)


def reward_to_go(reward: Array) -> Array:
    """reward (T, N) → R (T, N), the sum of the rewards from each step on. An action does not affect earlier rewards."""
    return np.cumsum(reward[::-1], axis=0)[::-1]


def features(x: Array) -> Array:
    """x (T, N, D) → φ (T, N, 8). The baseline is a weighted sum of these: a quadratic in position and time."""
    px, py = x[..., 0], x[..., 1]
    left = np.broadcast_to((1 - np.arange(len(x)) / windy_world.STEPS)[:, None], px.shape)
    return np.stack([np.ones_like(px), px, py, px * px, py * py, px * py, left, left * left], axis=-1)


def surrogate(
    log_pi: Array, action: Array, advantage: Array, alive: Array, bonus: float, episodes: int
) -> tuple[Array, Array, Array]:
    """log π (M, A) of M steps → −Σ δ log π(a) and Σ H, each divided by ``episodes``, and the loss's gradient (M, A).

    Sums over the steps of an episode, not means: an action counts the same in a short episode as in a long one. H is
    −Σ π log π, so its gradient with respect to log π is −π (log π + 1).
    """
    pi = np.exp(log_pi)
    taken = np.arange(len(action)), action
    scale = alive / episodes  # (M,)  0 after the end of an episode
    policy_loss = -(scale * advantage * log_pi[taken]).sum()
    entropy = -(scale[:, None] * pi * log_pi).sum()
    dlog_pi = bonus * scale[:, None] * pi * (log_pi + 1)
    dlog_pi[taken] -= scale * advantage
    return policy_loss, entropy, dlog_pi


def objective(agent: Agent, played: Episodes, bonus: float) -> tuple[Loss, Agent]:
    """The loss of the episodes that were played, and its gradient: policy − bonus · entropy + baseline.

    The advantage is a constant for the policy. If it were differentiated, the baseline would learn to make the first
    part small instead of predicting rewards.
    """
    T, N, D = played.x.shape
    alive = played.alive.reshape(-1)
    phi = features(played.x)
    error = np.where(played.alive, reward_to_go(played.reward) - phi @ agent.baseline, 0.0)  # (T, N)  R − b
    baseline_loss = 0.5 * (error**2).sum() / N
    dbaseline = -np.einsum("tn,tnf->f", error, phi) / N

    x, action, advantage = played.x.reshape(-1, D), played.action.reshape(-1), error.reshape(-1)
    if played.sampled:
        skill = played.skill.reshape(-1)
        (log_gate, log_skill), kept = forward_sampled(agent.policy, x, skill)
        of_skill, entropy, dlog_skill = surrogate(log_skill, action, advantage, alive, bonus, N)
        of_gate, gate_entropy, dlog_gate = surrogate(log_gate, skill, advantage, alive, bonus, N)
        _, dpolicy = backward_sampled(agent.policy, kept, (dlog_gate, dlog_skill))
        loss = Loss(of_skill + of_gate, entropy + gate_entropy, baseline_loss)
    else:
        given = None if played.given is None else played.given.reshape(len(x), -1)
        log_pi, cache = forward(agent.policy, x, given)
        policy_loss, entropy, dlog_pi = surrogate(log_pi, action, advantage, alive, bonus, N)
        _, dpolicy = backward(agent.policy, cache, dlog_pi)
        loss = Loss(policy_loss, entropy, baseline_loss)
    return loss, Agent(dpolicy, dbaseline)


def draw(probability: Array, uniform: Array) -> Array:
    """probability (N, A), uniform (N,) in [0, 1) → an index for each row, drawn with these probabilities."""
    return np.minimum((np.cumsum(probability, axis=1) <= uniform[:, None]).sum(1), probability.shape[1] - 1)


def _log_softmax(z: Array) -> Array:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
