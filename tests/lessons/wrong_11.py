"""Wrong answers to the exercises of lesson 11, each with words that its hint must hold, and unusual right ones."""

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


def betas_swapped(beta1, beta2, step):
    return (1 - beta2 ** (step + 1)) / np.sqrt(1 - beta1 ** (step + 1))


def powers_alone(beta1, beta2, step):
    return beta1 ** (step + 1) / np.sqrt(beta2 ** (step + 1))


def two_runs(beta1, beta2, step):
    """Both versions, on a gradient of 1."""
    mean = square = 0.0
    for _ in range(step + 1):
        mean, square = beta1 * mean + 1 - beta1, beta2 * square + 1 - beta2
    right = mean / (1 - beta1 ** (step + 1)) / (square / (1 - beta2 ** (step + 1))) ** 0.5
    return mean / square**0.5 / right


def by_logarithms(beta1, beta2, step):
    t = step + 1
    return np.array([np.exp(np.log1p(-(beta1**t)) - np.log1p(-(beta2**t)) / 2)])[0]


def mean_updated_first(weight, mean, d, rate, beta1, beta2, decay):
    mean = beta2 * mean + (1 - beta2) * d
    return weight - rate * (np.sign(beta1 * mean + (1 - beta1) * d) + decay * weight), mean


def shares_swapped(weight, mean, d, rate, beta1, beta2, decay):
    blend = (1 - beta1) * mean + beta1 * d
    return weight - rate * (np.sign(blend) + decay * weight), beta2 * mean + (1 - beta2) * d


def betas_swapped_in_lion(weight, mean, d, rate, beta1, beta2, decay):
    blend = beta2 * mean + (1 - beta2) * d
    return weight - rate * (np.sign(blend) + decay * weight), beta1 * mean + (1 - beta1) * d


def decay_after_the_step(weight, mean, d, rate, beta1, beta2, decay):
    weight = weight - rate * np.sign(beta1 * mean + (1 - beta1) * d)
    return weight * (1 - rate * decay), beta2 * mean + (1 - beta2) * d


def no_decay(weight, mean, d, rate, beta1, beta2, decay):
    return weight - rate * np.sign(beta1 * mean + (1 - beta1) * d), beta2 * mean + (1 - beta2) * d


def no_rate(weight, mean, d, rate, beta1, beta2, decay):
    return weight - np.sign(beta1 * mean + (1 - beta1) * d) - decay * weight, beta2 * mean + (1 - beta2) * d


def lion_swapped(weight, mean, d, rate, beta1, beta2, decay):
    direction = np.sign(beta1 * mean + (1 - beta1) * d)
    return beta2 * mean + (1 - beta2) * d, weight - rate * (direction + decay * weight)


def decay_first(weight, mean, d, rate, beta1, beta2, decay):
    """The decay before the step, and a sign by hand."""
    blend = mean + (1 - beta1) * (d - mean)
    weight = weight * (1 - rate * decay)
    return np.where(blend > 0, weight - rate, weight + rate), mean + (1 - beta2) * (d - mean)


def lion_as_a_list(weight, mean, d, rate, beta1, beta2, decay):
    blend = beta1 * mean + d - beta1 * d
    new = weight.copy()
    new -= rate * decay * weight
    new -= rate * blend / np.abs(blend)
    return [new, np.average([mean, d], axis=0, weights=[beta2, 1 - beta2])]


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


def rate_averaged(weight, direction, rate, decay, dnew):
    return dnew * (1 - rate * decay), -(dnew * (direction + decay * weight)).mean()


def rate_uphill(weight, direction, rate, decay, dnew):
    return dnew * (1 - rate * decay), (dnew * (direction + decay * weight)).sum()


def decay_not_scaled(weight, direction, rate, decay, dnew):
    return dnew * (1 - decay), -(dnew * (direction + decay * weight)).sum()


def step_backward_swapped(weight, direction, rate, decay, dnew):
    return -(dnew * (direction + decay * weight)).sum(), dnew * (1 - rate * decay)


def two_paths(weight, direction, rate, decay, dnew):
    through_decay = -rate * decay * dnew
    return dnew + through_decay, -np.vdot(dnew, direction) - decay * np.vdot(dnew, weight)


def from_the_result(weight, direction, rate, decay, dnew):
    new = weight - rate * (direction + decay * weight)
    return [dnew - dnew * rate * decay, np.sum(dnew * (new - weight) / rate)]


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


def iterate(x, steps):
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ x.swapaxes(-1, -2) @ x
    return x


def one_step_long(m, steps):
    return iterate(m / np.sqrt((m * m).sum((1, 2), keepdims=True)), steps + 1)


def stack_as_one_matrix(m, steps):
    x = m.reshape(-1, m.shape[2])
    return iterate(x / np.linalg.norm(x), steps).reshape(m.shape)


def exact(m, steps):
    U, _, Vt = np.linalg.svd(m, full_matrices=False)
    return U @ Vt


def spectral_norm(m, steps):
    return iterate(m / np.linalg.norm(m, ord=2, axis=(1, 2), keepdims=True), steps)


def row_norms(m, steps):
    return iterate(m / np.linalg.norm(m, axis=2, keepdims=True), steps)


def column_norms(m, steps):
    return iterate(m / np.linalg.norm(m, axis=1, keepdims=True), steps)


def norm_squared(m, steps):
    return iterate(m / (m * m).sum((1, 2), keepdims=True), steps)


def matrix_by_matrix(m, steps):
    return np.stack([iterate(matrix / np.linalg.norm(matrix), steps) for matrix in m])


def other_side(m, steps):
    """X Xᵀ X with the product Xᵀ X taken first, by einsum."""
    x = m / np.linalg.norm(m, axis=(1, 2))[:, None, None]
    for _ in range(steps):
        x = x + 0.5 * (x - np.einsum("edf,egf,egh->edh", x, x, x))
    return (x,)


WRONG = {
    check.uncorrected_step: [
        (counted_from_one, "count from 0"),
        (counted_from_one_without_a_guard, "count from 0"),
        (without_the_root, "its root"),
        (upside_down, "other way round"),
        (first_step_for_all, "at step 0 only"),
        (betas_swapped, "are swapped"),
        (powers_alone, "powers themselves"),
    ],
    check.lion_step: [
        (sign_of_the_new_mean, "sign of the new mean"),
        (decay_inside, "not inside the sign"),
        (one_mean_for_both, "β₁ belongs to the direction"),
        (mean_updated_first, "updated before the direction"),
        (shares_swapped, "1 − β₁ is that of the gradient"),
        (betas_swapped_in_lion, "with β₁"),
        (decay_after_the_step, "before the step"),
        (no_decay, "decay is missing"),
        (no_rate, "rate is missing"),
        (lion_swapped, "wrong order"),
    ],
    check.step_backward: [
        (decay_path_forgotten, "two paths"),
        (rate_on_the_direction_only, "scales the decay"),
        (rate_not_summed, "summed"),
        (rate_averaged, "not their mean"),
        (rate_uphill, "look at the sign"),
        (decay_not_scaled, "multiplied by the rate"),
        (step_backward_swapped, "wrong order"),
    ],
    check.newton_schulz: [
        (norm_of_the_stack, "whole stack"),
        (entries_cubed, "product of matrices"),
        (no_norm, "run away"),
        (one_step_short, "too few"),
        (one_step_long, "too many"),
        (stack_as_one_matrix, "one tall matrix"),
        (exact, "U Vᵀ itself"),
        (spectral_norm, "largest singular value"),
        (row_norms, "each row"),
        (column_norms, "each column"),
        (norm_squared, "square of its norm"),
    ],
}
RIGHT = {
    check.uncorrected_step: [two_runs, by_logarithms],
    check.lion_step: [decay_first, lion_as_a_list],
    check.step_backward: [two_paths, from_the_result],
    check.newton_schulz: [matrix_by_matrix, other_side],
}
