"""Solutions of lesson 64: an agent of many skills."""

import numpy as np


def reward_to_go(reward, gamma):
    """reward (T, N), a discount γ → R (T, N) with R_t = r_t + γ R_{t+1}."""
    R = np.zeros_like(reward)
    later = np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        later = reward[t] + gamma * later
        R[t] = later
    return R


def policy_backward(pi, action, advantage, bonus):
    """pi = softmax(z) (N, A), action (N,), advantage (N,), β → dz (N, A) of Σ_n [−δ log π(a) − β H(π)]."""
    one_hot = np.eye(pi.shape[1])[action]
    entropy = -(pi * np.log(pi)).sum(1, keepdims=True)
    return advantage[:, None] * (pi - one_hot) + bonus * pi * (np.log(pi) + entropy)


def mixture_backward(g, skills, action, advantage):
    """g = softmax(s) (N, E), skills = softmax(z) (N, E, A) → ds (N, E), dz (N, E, A) of Σ_n −δ log Σ_e g_e π_e(a)."""
    likelihood = skills[np.arange(len(g)), :, action]  # (N, E)
    h = g * likelihood
    h = h / h.sum(1, keepdims=True)
    one_hot = np.eye(skills.shape[2])[action]
    ds = -advantage[:, None] * (h - g)
    dz = -(advantage[:, None] * h)[:, :, None] * (one_hot[:, None] - skills)
    return ds, dz


def bits_known(counts):
    """counts (E, W): how often each skill was in charge under each wind → I(skill; wind) in bits."""
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0  # 0 log 0 is 0
    return (joint[seen] * np.log2(joint[seen] / independent[seen])).sum()
