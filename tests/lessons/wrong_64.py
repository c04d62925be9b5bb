"""Wrong answers to the exercises of lesson 64, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_64 as check

# Rewards


def from_each_step(reward, gamma):
    R = np.zeros_like(reward)
    for t in range(len(reward)):
        for k in range(t, len(reward)):
            R[t] += gamma ** (k - t) * reward[k]
    return R


def by_a_matrix(reward, gamma):
    T = len(reward)
    ahead = np.arange(T) - np.arange(T)[:, None]
    return np.where(ahead >= 0, gamma ** np.maximum(ahead, 0), 0) @ reward


def until_each_step(reward, gamma):
    return from_each_step(reward[::-1], gamma)[::-1]


def from_the_start(reward, gamma):
    power = gamma ** np.arange(len(reward))[:, None]
    return np.cumsum((power * reward)[::-1], axis=0)[::-1]


def from_the_end(reward, gamma):
    power = gamma ** np.arange(len(reward))[::-1, None]
    return np.cumsum((power * reward)[::-1], axis=0)[::-1]


def by_division(reward, gamma):
    return from_the_start(reward, gamma) / gamma ** np.arange(len(reward))[:, None]


def the_next(reward, gamma):
    return np.vstack([from_each_step(reward, gamma)[1:], np.zeros((1, reward.shape[1]))])


# One policy


def policy(first=1.0, second=1.0, entropy=True, mean=1.0, one_hot_only=False, one=False, by_advantage=False):
    """The right gradient but for one thing."""

    def policy_backward(pi, action, advantage, bonus):
        one_hot = np.eye(pi.shape[1])[action]
        H = -(pi * np.log(pi)).sum(1, keepdims=True)
        of_action = advantage[:, None] * ((0 if one_hot_only else pi) - one_hot)
        of_entropy = bonus * pi * (np.log(pi) + (1 if one else H if entropy else 0))
        return mean * (first * of_action + second * (advantage[:, None] if by_advantage else 1) * of_entropy)

    return policy_backward


def bonus_times(of_entropy):
    """The right gradient but for that of the entropy, a function of π and H."""

    def policy_backward(pi, action, advantage, bonus):
        H = -(pi * np.log(pi)).sum(1, keepdims=True)
        return policy(second=0)(pi, action, advantage, bonus) + bonus * of_entropy(pi, H)

    return policy_backward


def bonus_left_out(pi, action, advantage, bonus):
    return policy(second=0)(pi, action, advantage, bonus)


def without_beta(pi, action, advantage, bonus):
    return policy()(pi, action, advantage, 1.0)


def by_jacobians(pi, action, advantage, bonus):
    dz = np.zeros_like(pi)
    for n, p in enumerate(pi):
        dp = bonus * (np.log(p) + 1)
        dp[action[n]] -= advantage[n] / p[action[n]]
        dz[n] = (np.diag(p) - np.outer(p, p)) @ dp
    return dz


def by_log_pi(pi, action, advantage, bonus):
    """Through log π. The 1 of the entropy's derivative cancels, because Σ π d log π = 0."""
    dlog_pi = bonus * pi * np.log(pi)
    dlog_pi[np.arange(len(pi)), action] -= advantage
    return dlog_pi - pi * dlog_pi.sum(1, keepdims=True)


# A mixture


def mixture(weight=None, sign=1.0, gate_sign=1.0, prior=True, one_hot_only=False, gate=None, advantages=True):
    """The right gradients but for one thing; ``weight`` and ``gate`` stand in the posterior's place."""

    def mixture_backward(g, skills, action, advantage):
        likelihood = skills[np.arange(len(g)), :, action]
        kinds = {
            "posterior": g * likelihood / (g * likelihood).sum(1, keepdims=True),
            "joint": g * likelihood,
            "flat": likelihood / likelihood.sum(1, keepdims=True),
            "prior": g,
            "alone": np.ones_like(g),
        }
        kinds["likeliest"] = np.eye(g.shape[1])[kinds["posterior"].argmax(1)]
        kinds["twice"] = g * kinds["posterior"]
        of_gate, of_skill = kinds[gate or "posterior"], kinds[weight or "posterior"]
        delta = advantage[:, None] if advantages else 1.0
        ds = -gate_sign * delta * (of_gate - prior * g)
        one_hot = np.eye(skills.shape[2])[action][:, None]
        dz = -sign * (delta * of_skill)[:, :, None] * (one_hot - (0 if one_hot_only else skills))
        return ds, dz

    return mixture_backward


def moved_from(away):
    """The right gradients but for what each skill moves away from, ``away`` (N, E, A), weighted already."""

    def mixture_backward(g, skills, action, advantage):
        ds, _ = one_by_one(g, skills, action, advantage)
        likelihood = skills[np.arange(len(g)), :, action]
        h = g * likelihood / (g * likelihood).sum(1, keepdims=True)
        one_hot = np.eye(skills.shape[2])[action][:, None]
        return ds, advantage[:, None, None] * (away(g, skills, h) - h[:, :, None] * one_hot)

    return mixture_backward


def by_the_product_rule(g, skills, action, advantage):
    """Through g and π_e, without a word of posteriors."""
    rows = np.arange(len(g))
    likelihood = skills[rows, :, action]
    dpi = -advantage / (g * likelihood).sum(1)
    dg = dpi[:, None] * likelihood
    ds = g * (dg - (g * dg).sum(1, keepdims=True))
    dskills = np.zeros_like(skills)
    dskills[rows, :, action] = dpi[:, None] * g
    dz = skills * (dskills - (skills * dskills).sum(2, keepdims=True))
    return ds, dz


def one_by_one(g, skills, action, advantage):
    ds, dz = np.zeros_like(g), np.zeros_like(skills)
    for n in range(len(g)):
        a = action[n]
        pi = sum(g[n, e] * skills[n, e, a] for e in range(g.shape[1]))
        for e in range(g.shape[1]):
            h = g[n, e] * skills[n, e, a] / pi
            ds[n, e] = advantage[n] * (g[n, e] - h)
            dz[n, e] = advantage[n] * h * skills[n, e]
            dz[n, e, a] -= advantage[n] * h
    return ds, dz


def before_the_softmax(g, skills, action, advantage):
    ds, dz = one_by_one(g, skills, action, advantage)
    likelihood = skills[np.arange(len(g)), :, action]
    return -advantage[:, None] * likelihood / (g * likelihood).sum(1, keepdims=True), dz


# Bits


def entropy(p):
    p = np.asarray(p, float).ravel()
    p = p[p > 0]
    return -(p * np.log2(p)).sum()


def by_entropies(counts):
    p = counts / counts.sum()
    return entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p)


def by_rows(counts):
    """The entropy of the wind less what each skill leaves open."""
    share = counts.sum(1) / counts.sum()
    left = sum(w * entropy(row / row.sum()) for w, row in zip(share, counts, strict=True))
    return entropy(counts.sum(0) / counts.sum()) - left


def left_open(counts):
    return entropy(counts.sum(0) / counts.sum()) - by_rows(counts)


def unweighted(counts):
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return np.log2((joint / independent)[joint > 0]).sum()


def without_division(counts):
    seen = counts > 0
    independent = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True)
    return (counts[seen] * np.log2(counts[seen] / independent[seen])).sum()


def with_nansum(counts):
    joint = counts / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(joint * np.log2(joint / np.outer(joint.sum(1), joint.sum(0))))


WRONG = {
    check.reward_to_go: [
        (lambda reward, gamma: np.broadcast_to(from_each_step(reward, gamma)[0], reward.shape), "whole episode"),
        (until_each_step, "until a step"),
        (lambda reward, gamma: from_each_step(reward, 1.0), "γ is missing"),
        (from_the_start, "from the start"),
        (lambda reward, gamma: from_each_step(reward, gamma) - reward, "step t itself is missing"),
        (the_next, "R of the next step"),
        (lambda reward, gamma: gamma * from_each_step(reward, gamma), "discounts step t itself"),
        (lambda reward, gamma: reward + gamma * (from_each_step(reward, 1.0) - reward), "γ once"),
        (lambda reward, gamma: from_each_step(reward.T, gamma).T, "along the episodes"),
        (from_the_end, "from the end of the episode"),
        (lambda reward, gamma: reward + gamma * the_next(reward, 0.0), "one step ahead only"),
        (
            lambda reward, gamma: reward + gamma * np.roll(from_each_step(reward, gamma), -1, axis=0),
            "the first step again",
        ),
        (lambda reward, gamma: from_each_step(reward, gamma)[::-1], "turn the result round"),
        (lambda reward, gamma: np.tile(reward.sum(0), (len(reward), 1)), "undiscounted, at every step"),
        (lambda reward, gamma: from_each_step(reward, gamma) / np.arange(len(reward), 0, -1)[:, None], "not a mean"),
        (lambda reward, gamma: from_each_step(reward, gamma) - from_each_step(reward, gamma).mean(0), ""),
    ],
    check.policy_backward: [
        (policy(first=-1), "first term goes the wrong way"),
        (policy(second=-1), "bonus goes the wrong way"),
        (policy(mean=-1), "climbs the loss"),
        (bonus_left_out, "bonus is missing"),
        (without_beta, "not multiplied by β"),
        (policy(first=0), "first term is missing"),
        (policy(entropy=False), "H belongs into the bracket"),
        (policy(one=True), "not the softmax's mean term"),
        (policy(one_hot_only=True), "share its softmax"),
        (policy(mean=1 / 5), "mean over the N steps"),
        (policy(by_advantage=True), "multiplies the bonus"),
        (
            lambda pi, action, advantage, bonus: policy()(pi, action, np.ones(len(pi)), bonus),
            "the advantage is missing",
        ),
        (bonus_times(lambda pi, H: pi * (np.log(pi) - H)), "not subtracted"),
        (bonus_times(lambda pi, H: pi * (np.log(pi) + 1 + H)), "cancels with that"),
        (bonus_times(lambda pi, H: np.log(pi) + H), "factor π of the softmax is missing"),
        (bonus_times(lambda pi, H: pi * (np.log(pi) + H.mean())), "its own entropy"),
        (bonus_times(lambda pi, H: pi * (np.log(pi) + H) / np.log(2)), "in nats"),
        (policy(one_hot_only=True, one=True), "with respect to log π"),
        (lambda pi, *given: policy(one_hot_only=True, one=True)(pi, *given) / pi, "with respect to π"),
    ],
    check.mixture_backward: [
        (mixture(gate_sign=-1), "wrong way"),
        (mixture(sign=-1), "wrong way"),
        (mixture(prior=False), "prior g is missing"),
        (mixture(gate="joint"), "divide by π(a)"),
        (mixture(weight="joint"), "divide by π(a)"),
        (mixture(gate="flat"), "leaves out the prior"),
        (mixture(weight="flat"), "leaves out the prior"),
        (mixture(weight="prior"), "by its prior"),
        (mixture(weight="alone"), "acted alone"),
        (mixture(one_hot_only=True), "share its softmax"),
        (mixture(advantages=False), "advantage is missing"),
        (before_the_softmax, "softmax is left"),
        (mixture(gate="likeliest"), "takes the likeliest skill for certain"),
        (mixture(weight="likeliest"), "takes the likeliest skill for certain"),
        (mixture(weight="twice"), "one factor too much"),
        (moved_from(lambda g, skills, h: h[:, :, None] * (g[:, :, None] * skills).sum(1)[:, None]), "from the mixture"),
        (moved_from(lambda g, skills, h: g[:, :, None] * skills), "not the prior"),
        (
            lambda g, *given: (one_by_one(g, *given)[0] + given[2][:, None] * (1 / 3 - g), one_by_one(g, *given)[1]),
            "equal",
        ),
        (lambda *given: one_by_one(*given)[::-1], "wrong order"),
    ],
    check.bits_known: [
        (lambda counts: by_entropies(counts) * np.log(2), "in nats"),
        (lambda counts: entropy(counts / counts.sum()), "entropy of the pair"),
        (left_open, "leaves open about the wind"),
        (lambda counts: left_open(counts.T), "leaves open about the skill"),
        (lambda counts: entropy(counts.sum(0) / counts.sum()), "all that could be known"),
        (lambda counts: entropy(counts.sum(1) / counts.sum()), "entropy of the skill"),
        (lambda counts: -by_entropies(counts), "wrong sign"),
        (lambda counts: by_entropies(counts) / entropy(counts.sum(0) / counts.sum()), "as a share"),
        (without_division, "divided by their sum"),
        (lambda counts: by_entropies(counts / counts.sum(1, keepdims=True)), "every skill counts alike"),
        (lambda counts: by_entropies(counts / counts.sum(0, keepdims=True)), "every wind counts alike"),
        (lambda counts: by_entropies(counts) / np.log2(len(counts)), "largest entropy of the skill"),
        (lambda counts: by_entropies(counts + 1), "add nothing to the counts"),
        (unweighted, "weighted by the share"),
    ],
}

RIGHT = {
    check.reward_to_go: [from_each_step, by_a_matrix, by_division],
    check.policy_backward: [by_jacobians, by_log_pi],
    check.mixture_backward: [by_the_product_rule, one_by_one],
    check.bits_known: [by_entropies, by_rows, with_nansum],
}
