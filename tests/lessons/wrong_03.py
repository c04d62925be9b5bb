"""Wrong answers to the exercises of lesson 03, each with words that its hint must hold."""

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


WRONG = {
    check.gradient_at_scaled_input: [
        (scale_ignored, "does not stay the same"),
        (scale_multiplied, "the other way"),
        (scale_squared, "once c is enough"),
    ],
    check.l2_normalize_backward: [
        (length_forgotten_in_its_path, "direct path only"),
        (length_as_rms, "without 1/D"),
        (length_missing, "length of x is missing"),
    ],
    check.layernorm_backward: [
        (layernorm_as_rmsnorm, "through the mean of x is missing"),
        (layernorm_centred_only, "standard deviation is not"),
        (layernorm_over_tokens, "over tokens"),
    ],
    check.rmsnorm_backward_from_output: [
        (without_the_mean_term, "mean term"),
        (output_for_x_hat, "you used y"),
        (gain_not_summed, "summed over N"),
        (gain_from_output, "you used y"),
    ],
}
