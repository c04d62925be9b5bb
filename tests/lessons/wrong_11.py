"""Wrong answers to the exercises of lesson 11, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_11 as check


def counted_from_one(beta1, beta2, step):
    return (1 - beta1**step) / np.sqrt(1 - beta2**step) if step else 0.0


def counted_from_one_without_a_guard(beta1, beta2, step):
    return (1 - beta1**step) / np.sqrt(1 - beta2**step)


def without_the_root(beta1, beta2, step):
    return (1 - beta1 ** (step + 1)) / (1 - beta2 ** (step + 1))


def upside_down(beta1, beta2, step):
    return np.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))


def first_step_for_all(beta1, beta2, step):
    return (1 - beta1) / np.sqrt(1 - beta2)


def sign_of_the_new_mean(weight, mean, d, rate, beta1, beta2, decay):
    mean = beta2 * mean + (1 - beta2) * d
    return weight - rate * (np.sign(mean) + decay * weight), mean


def decay_inside(weight, mean, d, rate, beta1, beta2, decay):
    direction = np.sign(beta1 * mean + (1 - beta1) * d + decay * weight)
    return weight - rate * direction, beta2 * mean + (1 - beta2) * d


def one_mean_for_both(weight, mean, d, rate, beta1, beta2, decay):
    mean = beta1 * mean + (1 - beta1) * d
    return weight - rate * (np.sign(mean) + decay * weight), mean


def decay_path_forgotten(weight, direction, rate, decay, dnew):
    return dnew, -(dnew * direction).sum()


def rate_on_the_direction_only(weight, direction, rate, decay, dnew):
    return dnew * (1 - rate * decay), -(dnew * direction).sum()


def rate_not_summed(weight, direction, rate, decay, dnew):
    return dnew * (1 - rate * decay), -dnew * (direction + decay * weight)


def norm_of_the_stack(m, steps):
    x = m / np.linalg.norm(m)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ x.swapaxes(1, 2) @ x
    return x


def entries_cubed(m, steps):
    x = m / np.sqrt((m * m).sum((1, 2), keepdims=True))
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x**3
    return x


def no_norm(m, steps):
    x = m
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ x.swapaxes(1, 2) @ x
    return x


def one_step_short(m, steps):
    x = m / np.sqrt((m * m).sum((1, 2), keepdims=True))
    for _ in range(steps - 1):
        x = 1.5 * x - 0.5 * x @ x.swapaxes(1, 2) @ x
    return x


WRONG = {
    check.uncorrected_step: [
        (counted_from_one, "count from 0"),
        (counted_from_one_without_a_guard, "count from 0"),
        (without_the_root, "its root"),
        (upside_down, "other way round"),
        (first_step_for_all, "at step 0 only"),
    ],
    check.lion_step: [
        (sign_of_the_new_mean, "sign of the new mean"),
        (decay_inside, "not inside the sign"),
        (one_mean_for_both, "β₁ belongs to the direction"),
    ],
    check.step_backward: [
        (decay_path_forgotten, "two paths"),
        (rate_on_the_direction_only, "scales the decay"),
        (rate_not_summed, "summed"),
    ],
    check.newton_schulz: [
        (norm_of_the_stack, "whole stack"),
        (entries_cubed, "product of matrices"),
        (no_norm, "run away"),
        (one_step_short, "too few"),
    ],
}
