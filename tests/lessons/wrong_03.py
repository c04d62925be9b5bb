"""Wrong answers to the exercises of lesson 03, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_03 as check


def scale_ignored(dx, c):
    return dx


def scale_multiplied(dx, c):
    return dx * c


def scale_squared(dx, c):
    return dx / c**2


def length_forgotten_in_its_path(x, dy):
    return dy / (x * x).sum(-1, keepdims=True) ** 0.5


def length_as_rms(x, dy):
    norm = (x * x).sum(-1, keepdims=True) ** 0.5
    return (dy - x / norm * (x / norm * dy).mean(-1, keepdims=True)) / norm


def length_missing(x, dy):
    y = x / (x * x).sum(-1, keepdims=True) ** 0.5
    return dy - y * (y * dy).sum(-1, keepdims=True)


def layernorm_as_rmsnorm(x_hat, inv_std, dy):
    return inv_std * (dy - x_hat * (x_hat * dy).mean(-1, keepdims=True))


def layernorm_centred_only(x_hat, inv_std, dy):
    return inv_std * (dy - dy.mean(-1, keepdims=True))


def layernorm_over_tokens(x_hat, inv_std, dy):
    return inv_std * (dy - dy.mean(0) - x_hat * (x_hat * dy).mean(0))


def without_the_mean_term(gain, y, inv_rms, dy):
    return inv_rms * gain * dy, (y / gain * dy).sum(0)


def output_for_x_hat(gain, y, inv_rms, dy):
    return inv_rms * (gain * dy - y * (y * gain * dy).mean(-1, keepdims=True)), (y / gain * dy).sum(0)


def gain_not_summed(gain, y, inv_rms, dy):
    x_hat = y / gain
    return inv_rms * (gain * dy - x_hat * (x_hat * gain * dy).mean(-1, keepdims=True)), x_hat * dy


def gain_from_output(gain, y, inv_rms, dy):
    x_hat = y / gain
    return inv_rms * (gain * dy - x_hat * (x_hat * gain * dy).mean(-1, keepdims=True)), (y * dy).sum(0)


def length(ways=1, squared=False, over=1):
    """The right gradient but for one thing."""

    def l2_normalize_backward(x, dy):
        norm = (x * x).sum(-1, keepdims=True) ** 0.5
        y = x / norm
        return (dy - ways * y * (y * dy).sum(over, keepdims=True)) / norm ** (2 if squared else 1)

    return l2_normalize_backward


def x_for_y(x, dy):
    return (dy - x * (x * dy).sum(1, keepdims=True)) / (x * x).sum(-1, keepdims=True) ** 0.5


def layernorm(mean=1, along=1, power=1):
    """The right gradient but for one thing."""

    def layernorm_backward(x_hat, inv_std, dy):
        through_std = x_hat * (x_hat * dy).mean(-1, keepdims=True)
        return inv_std**power * (dy - mean * dy.mean(-1, keepdims=True) - along * through_std)

    return layernorm_backward


def from_output(scale=1, power=1, gained=True, dgain=lambda x_hat, dy: (x_hat * dy).sum(0)):
    """The right gradients but for one thing."""

    def rmsnorm_backward_from_output(gain, y, inv_rms, dy):
        x_hat, dx_hat = y / gain, gain * dy if gained else dy
        dx = inv_rms**power * (dx_hat - scale * x_hat * (x_hat * dx_hat).mean(-1, keepdims=True))
        return dx, dgain(x_hat, dy)

    return rmsnorm_backward_from_output


def gain_outside_the_mean(gain, y, inv_rms, dy):
    x_hat = y / gain
    return inv_rms * (gain * dy - x_hat * (x_hat * dy).mean(1, keepdims=True)), (x_hat * dy).sum(0)


def only_for_positive_gains(gain, y, inv_rms, dy):
    return without_x_hat(abs(gain), y, inv_rms, dy)


WRONG = {
    check.gradient_at_scaled_input: [
        (scale_ignored, "does not stay the same"),
        (scale_multiplied, "the other way"),
        (scale_squared, "once c is enough"),
        (lambda dx, c: dx / max(c, 1), "does not stay the same"),
        (lambda dx, c: dx / 3, "a constant factor is wrong"),
        (lambda dx, c: -dx / c, "wrong sign everywhere"),
    ],
    check.l2_normalize_backward: [
        (length_forgotten_in_its_path, "direct path only"),
        (length_as_rms, "without 1/D"),
        (length_missing, "length of x is missing"),
        (length(over=0), "each token has its own length"),
        (length(ways=-1), "subtract it"),
        (length(squared=True), "not by its square"),
        (x_for_y, "where the normalised y belongs"),
    ],
    check.layernorm_backward: [
        (layernorm_as_rmsnorm, "through the mean of x is missing"),
        (layernorm_centred_only, "standard deviation is not"),
        (layernorm_over_tokens, "over tokens"),
        (layernorm(mean=0, along=0), "three paths"),
        (layernorm(mean=6, along=6), "not sums"),
        (layernorm(along=6), "not a sum"),
        (layernorm(mean=-1), "subtract it"),
        (layernorm(power=0), "1/std is missing"),
        (layernorm(power=-1), "it divides x"),
    ],
    check.rmsnorm_backward_from_output: [
        (without_the_mean_term, "mean term"),
        (output_for_x_hat, "you used y"),
        (gain_not_summed, "summed over N"),
        (gain_from_output, "you used y"),
        (only_for_positive_gains, "dx: "),
        (gain_outside_the_mean, "dx̂ is gain ⊙ dy"),
        (from_output(scale=6), "not a sum"),
        (from_output(power=0), "1/rms is missing"),
        (from_output(gained=False), "the gain is missing"),
        (from_output(dgain=lambda x_hat, dy: (x_hat * dy).mean(0)), "take the sum"),
    ],
}


def by_the_jacobian(x, dy):
    norm = np.linalg.norm(x, axis=1)
    jacobians = [np.eye(x.shape[1]) / n - np.outer(row, row) / n**3 for row, n in zip(x, norm, strict=True)]
    return np.stack([jacobian @ d for jacobian, d in zip(jacobians, dy, strict=True)])


def all_tokens_at_once(x, dy):
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return dy / norm - x * np.einsum("td,td->t", x, dy)[:, None] / norm**3


def centred_matrix(x_hat, inv_std, dy):
    D = x_hat.shape[1]
    projected = [d @ (np.eye(D) - 1 / D - np.outer(row, row) / D) for row, d in zip(x_hat, dy, strict=True)]
    return inv_std * projected


def rms_of_a_centred_gradient(x_hat, inv_std, dy):
    dx = inv_std * (dy - x_hat * (x_hat * dy).mean(1, keepdims=True))
    return dx - dx.mean(1, keepdims=True)


def without_x_hat(gain, y, inv_rms, dy):
    shared = (y * dy).mean(1, keepdims=True)  # x̂ · dx̂ is y · dy
    return inv_rms * (gain * dy - y / gain * shared), (y * dy).sum(0) / gain


def token_by_token(gain, y, inv_rms, dy):
    dx, dgain = np.empty_like(y), np.zeros_like(gain)
    for t in range(len(y)):
        x_hat = y[t] / gain
        dgain += dy[t] * x_hat
        dx[t] = inv_rms[t] * (gain * dy[t] - x_hat * np.dot(x_hat, gain * dy[t]) / len(gain))
    return dx, dgain


RIGHT = {
    check.gradient_at_scaled_input: [lambda dx, c: c**-1 * dx, lambda dx, c: [row / c for row in dx]],
    check.l2_normalize_backward: [by_the_jacobian, all_tokens_at_once],
    check.layernorm_backward: [centred_matrix, rms_of_a_centred_gradient],
    check.rmsnorm_backward_from_output: [without_x_hat, token_by_token],
}
