"""Checks of lesson 64: an agent of many skills."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def reward_to_go(answer: Answer) -> Report:
    """(reward, gamma) → R with R_t = r_t + γ R_{t+1}."""
    rng = np.random.default_rng(64)
    T, N, gamma = 5, 3, 0.8
    reward = rng.standard_normal((T, N))

    def discounted(steps: Array) -> Array:
        """What follows each row, itself included, discounted from that row on."""
        R = np.zeros_like(steps)
        for t in reversed(range(len(steps))):
            R[t] = steps[t] + (gamma * R[t + 1] if t + 1 < len(steps) else 0)
        return R

    right = discounted(reward)
    later = np.concatenate([right[1:], np.zeros((1, N))])
    power = gamma ** np.arange(T)[:, None]
    hints = {
        "this is the return of the whole episode at every step, but an action has no part in earlier rewards.": (
            np.broadcast_to(right[0], right.shape)
        ),
        "this adds up the rewards until a step; add up those from it on.": discounted(reward[::-1])[::-1],
        "the discount γ is missing.": np.cumsum(reward[::-1], axis=0)[::-1],
        "this counts the discount from the start of the episode; count it from step t.": power * right,
        "the reward of step t itself is missing.": gamma * later,
        "this is R of the next step: the reward of step t is missing, and the rest is not discounted.": later,
        "this discounts step t itself too.": gamma * right,
        "this applies γ once to the whole future, but a reward k steps later counts γᵏ.": (
            reward + gamma * (np.cumsum(reward[::-1], axis=0)[::-1] - reward)
        ),
        "this adds up along the episodes; add up along the steps.": _along_episodes(reward, gamma),
        "the discount is counted from the end of the episode; count it from step t.": np.cumsum(
            (power[::-1] * reward)[::-1], axis=0
        )[::-1],
        "this looks one step ahead only; R of the next step holds all that follows.": reward
        + gamma * np.concatenate([reward[1:], np.zeros((1, N))]),
        "after the last step comes nothing, not the first step again.": reward + gamma * np.roll(right, -1, axis=0),
        "the steps are in reverse order: turn the result round again.": right[::-1],
        "this is the return of the whole episode, undiscounted, at every step.": np.broadcast_to(
            reward.sum(0), right.shape
        ),
        "divide by nothing: R is a sum, not a mean.": right / np.arange(T, 0, -1)[:, None],
    }
    return values(answer, (reward, gamma), {"R": right}, sizes={"T": T, "N": N}, mistakes={"R": hints})


def policy_backward(answer: Answer) -> Report:
    """(pi, action, advantage, bonus) → dz of Σ −δ log π(a) − β H."""
    rng = np.random.default_rng(64)
    N, A = 5, 4
    z, advantage = rng.standard_normal((N, A)), rng.standard_normal(N)
    action, bonus = np.array([0, 2, 3, 2, 1]), 0.3
    rows = np.arange(N)

    def loss(z: Array) -> Array:
        pi = _softmax(z)
        return (-advantage * np.log(pi[rows, action]) + bonus * (pi * np.log(pi)).sum(1)).sum()

    pi, one_hot, delta = _softmax(z), np.eye(A)[action], advantage[:, None]
    entropy = -(pi * np.log(pi)).sum(1, keepdims=True)
    of_action, of_entropy = delta * (pi - one_hot), bonus * pi * (np.log(pi) + entropy)
    return gradients(
        answer,
        (pi, action, advantage, bonus),
        loss,
        {"z": z},
        sizes={"N": N, "A": A},
        mistakes={
            "dz": {
                "the first term goes the wrong way: the loss falls when a good action becomes likelier.": (
                    -of_action + of_entropy
                ),
                "the bonus goes the wrong way: the loss falls when the entropy rises.": of_action - of_entropy,
                "both terms go the wrong way: this climbs the loss.": -of_action - of_entropy,
                "the entropy bonus is missing.": of_action,
                "the bonus is not multiplied by β.": of_action + of_entropy / bonus,
                "the first term is missing.": of_entropy,
                "the softmax's mean term of the entropy is missing: H belongs into the bracket.": (
                    of_action + bonus * pi * np.log(pi)
                ),
                "this has the 1 of the derivative of π log π but not the softmax's mean term.": (
                    of_action + bonus * pi * (np.log(pi) + 1)
                ),
                "only the action that was taken gets a gradient here; the others share its softmax.": (
                    -delta * one_hot + of_entropy
                ),
                "this is a mean over the N steps; the loss is a sum.": (of_action + of_entropy) / N,
                "the advantage multiplies the bonus too.": of_action + delta * of_entropy,
                "the advantage is missing.": pi - one_hot + of_entropy,
                "H is added to log π, not subtracted: H = −Σ π log π.": (
                    of_action + bonus * pi * (np.log(pi) - entropy)
                ),
                "the 1 of the derivative of π log π cancels with that in the softmax's mean term.": (
                    of_action + bonus * pi * (np.log(pi) + 1 + entropy)
                ),
                "this is the gradient with respect to log π; the softmax is left.": (
                    -delta * one_hot + bonus * pi * (np.log(pi) + 1)
                ),
                "this is the gradient with respect to π; the softmax is left.": (
                    -delta * one_hot / pi + bonus * (np.log(pi) + 1)
                ),
                "in the bonus, the factor π of the softmax is missing.": of_action + bonus * (np.log(pi) + entropy),
                "every step has its own entropy; this takes the mean of all.": (
                    of_action + bonus * pi * (np.log(pi) + entropy.mean())
                ),
                "H is in nats: take the natural logarithm.": of_action + of_entropy / np.log(2),
            }
        },
    )


def mixture_backward(answer: Answer) -> Report:
    """(g, skills, action, advantage) → ds, dz of Σ −δ log Σ_e g_e π_e(a)."""
    rng = np.random.default_rng(64)
    N, E, A = 5, 3, 4
    s, z, advantage = rng.standard_normal((N, E)), rng.standard_normal((N, E, A)), rng.standard_normal(N)
    action = np.array([0, 2, 3, 2, 1])
    rows = np.arange(N)

    def loss(s: Array, z: Array) -> Array:
        pi = (_softmax(s)[:, :, None] * _softmax(z)).sum(1)
        return -(advantage * np.log(pi[rows, action])).sum()

    g, skills, delta = _softmax(s), _softmax(z), advantage[:, None]
    likelihood = skills[rows, :, action]  # (N, E)
    joint = g * likelihood
    h = joint / joint.sum(1, keepdims=True)
    flat = likelihood / likelihood.sum(1, keepdims=True)
    mixed = (g[:, :, None] * skills).sum(1)  # (N, A)
    away = (skills - np.eye(A)[action][:, None]) * delta[:, :, None]  # π_e − onehot, times δ
    return gradients(
        answer,
        (g, skills, action, advantage),
        loss,
        {"s": s, "z": z},
        sizes={"N": N, "E": E, "A": A},
        mistakes={
            "ds": {
                "this goes the wrong way: the loss falls when a good action becomes likelier.": delta * (h - g),
                "the prior g is missing: the gate moves from g towards h.": -delta * h,
                "h does not add up to 1 here: divide by π(a).": delta * (g - joint),
                "this posterior leaves out the prior: h is proportional to g_e π_e(a).": delta * (g - flat),
                "the advantage is missing.": g - h,
                "this is the gradient with respect to g; the gate's softmax is left.": -delta * h / g,
                "the posterior is a share; this takes the likeliest skill for certain.": delta
                * (g - np.eye(E)[h.argmax(1)]),
                "the gate moves away from its own prior g, not from equal shares.": delta * (1 / E - h),
                "the softmax's mean term is the same for all skills, h − g, not h (1 − g).": -delta * h * (1 - g),
            },
            "dz": {
                "this goes the wrong way: the loss falls when a good action becomes likelier.": -h[:, :, None] * away,
                "every skill learns by its prior here; it should learn by its posterior h.": g[:, :, None] * away,
                "every skill learns as if it had acted alone: weigh it by its posterior h.": away,
                "h does not add up to 1 here: divide by π(a).": joint[:, :, None] * away,
                "this posterior leaves out the prior: h is proportional to g_e π_e(a).": flat[:, :, None] * away,
                "only the action that was taken gets a gradient here; the others share its softmax.": (
                    -h[:, :, None] * delta[:, :, None] * np.eye(A)[action][:, None]
                ),
                "the advantage is missing.": h[:, :, None] * (skills - np.eye(A)[action][:, None]),
                "each skill moves away from its own policy π_e, not from the mixture.": (
                    h[:, :, None] * delta[:, :, None] * (mixed[:, None] - np.eye(A)[action][:, None])
                ),
                "the posterior is a share; this takes the likeliest skill for certain.": (
                    np.eye(E)[h.argmax(1)][:, :, None] * away
                ),
                "the posterior h multiplies π_e too, not the prior.": delta[:, :, None]
                * (g[:, :, None] * skills - h[:, :, None] * np.eye(A)[action][:, None]),
                "h holds the prior already: g is one factor too much.": (h * g)[:, :, None] * away,
            },
        },
    )


def bits_known(answer: Answer) -> Report:
    """counts (E, W) → the mutual information of skill and wind, in bits."""
    tables = ([[30, 0, 10], [5, 15, 20]], [[7, 0], [0, 7], [2, 2]], [[6, 3, 9], [4, 2, 6]])
    return first_failure(_bits_known(answer, np.array(table)) for table in tables)


def _bits_known(answer: Answer, counts: Array) -> Report:
    joint = counts / counts.sum()
    skill, wind = joint.sum(1), joint.sum(0)
    right = _bits(skill) + _bits(wind) - _bits(joint)
    hints = {
        "this is in nats; bits are logarithms to base 2.": right * np.log(2),
        "this is the entropy of the pair.": _bits(joint),
        "this is what the skill leaves open about the wind; subtract it from the entropy of the wind.": (
            _bits(joint) - _bits(skill)
        ),
        "this is what the wind leaves open about the skill; subtract it from the entropy of the skill.": (
            _bits(joint) - _bits(wind)
        ),
        "this is the entropy of the wind, all that could be known.": _bits(wind),
        "this is the entropy of the skill.": _bits(skill),
        "this has the wrong sign.": -right,
        "this is the information as a share of the entropy of the wind.": right / _bits(wind),
        "the counts must be divided by their sum first.": _unnormalised(counts),
        "every skill counts alike here, but a skill counts as often as it was in charge.": _information(
            counts / counts.sum(1, keepdims=True)
        ),
        "every wind counts alike here, but a wind counts as often as it blew.": _information(
            counts / counts.sum(0, keepdims=True)
        ),
        "this is the information as a share of the largest entropy of the skill.": right / np.log2(len(counts)),
        "add nothing to the counts: 0 log 0 counts as 0.": _information(counts + 1),
        "each term must be weighted by the share of its pair.": float(
            np.log2((joint / (skill[:, None] * wind))[joint > 0]).sum()
        ),
    }
    different = {hint: wrong for hint, wrong in hints.items() if not np.isclose(wrong, right)}
    sizes = {"E": counts.shape[0], "W": counts.shape[1]}
    return values(answer, (counts,), {"bits": right}, sizes=sizes, mistakes={"bits": different})


def _information(table: Array) -> float:
    joint = table / table.sum()
    return _bits(joint.sum(1)) + _bits(joint.sum(0)) - _bits(joint)


def _unnormalised(counts: Array) -> float:
    seen = counts > 0
    independent = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True)
    return float((counts[seen] * np.log2(counts[seen] / independent[seen])).sum())


def _bits(p: Array) -> float:
    seen = p[p > 0]
    return float(-(seen * np.log2(seen)).sum())


def _along_episodes(reward: Array, gamma: float) -> Array:
    R = np.zeros_like(reward)
    for n in reversed(range(reward.shape[1])):
        R[:, n] = reward[:, n] + (gamma * R[:, n + 1] if n + 1 < reward.shape[1] else 0)
    return R


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
