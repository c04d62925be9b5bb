"""Solutions of lesson 41: preferences."""

import numpy as np


def answer_mask(prompt, answer, T):
    """prompt (B,) and answer (B,) numbers of tokens → m (B, T) of zeros and ones."""
    predicted = np.arange(T) + 1  # the token that each place predicts
    start = prompt[:, None]
    return ((predicted >= start) & (predicted < start + answer[:, None])).astype(float)


def doubt(mu, epsilon):
    """mu (P,), epsilon a number between 0 and 1/2 → loss (P,), slope (P,), best a number."""
    loss = (1 - epsilon) * np.logaddexp(0, -mu) + epsilon * np.logaddexp(0, mu)
    slope = 1 / (1 + np.exp(-mu)) - (1 - epsilon)  # (1 − ε)(σ − 1) + ε σ
    best = np.log((1 - epsilon) / epsilon)  # where σ(μ) = 1 − ε
    return loss, slope, best


def ipo_backward(delta_w, delta_l, length_w, length_l, beta):
    """Four arrays (P,) and a number → dl_w (P,), dl_l (P,)."""
    h = delta_w / length_w - delta_l / length_l
    dh = 2 * (h - 1 / (2 * beta)) / len(h)  # (P,)
    return dh / length_w, -dh / length_l
