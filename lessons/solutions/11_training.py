"""Solutions of lesson 11: training."""

import numpy as np


def uncorrected_step(beta1, beta2, step):
    """→ a number: 1 would mean no difference."""
    t = step + 1
    return (1 - beta1**t) / np.sqrt(1 - beta2**t)


def lion_step(weight, mean, d, rate, beta1, beta2, decay):
    """weight, mean and gradient d (D, F), four numbers → the new weight, the new mean (D, F)."""
    direction = np.sign(beta1 * mean + (1 - beta1) * d)
    return weight - rate * (direction + decay * weight), beta2 * mean + (1 - beta2) * d


def step_backward(weight, direction, rate, decay, dnew):
    """weight, direction, dnew (D, F), rate and decay numbers → dweight (D, F), drate ()."""
    return dnew * (1 - rate * decay), -(dnew * (direction + decay * weight)).sum()


def newton_schulz(m, steps):
    """m (E, D, F) → (E, D, F) after ``steps`` steps."""
    x = m / np.sqrt((m * m).sum((1, 2), keepdims=True))
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ x.swapaxes(1, 2) @ x
    return x
