"""Checks of lesson 03: RMSNorm."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import rmsnorm
from minimoe.layers.rmsnorm import RMSNorm

N, D = 5, 6


def gradient_at_scaled_input(answer: Answer) -> Report:
    """(dx, c) → the gradient with respect to x at c·x instead of x, for the same dy."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, N, D))
    params = RMSNorm(_gain(rng))
    dx = rmsnorm.backward(params, rmsnorm.forward(params, x, eps=0)[1], dy)[0]

    def case(c: float) -> Report:
        return gradients(
            answer,
            (dx, c),
            lambda x: (rmsnorm.forward(params, x, eps=0)[0] * dy).sum(),
            {"x": c * x},
            mistakes={
                "dx": {
                    "dx does not stay the same: y does, but a longer x must move further to change y as much.": dx,
                    "it goes the other way: a longer x must move further to change y as much.": dx * c,
                    "once c is enough: r appears only once in dx.": dx / c**2,
                }
            },
        )

    return first_failure(case(c) for c in (3.0, 0.25))


def l2_normalize_backward(answer: Answer) -> Report:
    """(x, dy) → dx of y = x / ‖x‖, row by row."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, N, D))
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    y = x / norm

    return gradients(
        answer,
        (x, dy),
        lambda x: (x / np.sqrt((x * x).sum(1, keepdims=True)) * dy).sum(),
        {"x": x},
        sizes={"N": N, "D": D},
        mistakes={
            "dx": {
                "you have the direct path only, but ‖x‖ depends on x too.": dy / norm,
                "this is RMSNorm's mean, but a length is a sum of squares, without 1/D.": (
                    dy - y * (y * dy).mean(1, keepdims=True)
                )
                / norm,
                "the sum is over tokens, but each token has its own length.": (dy - y * (y * dy).sum(0)) / norm,
                "the direction is right, but the length of x is missing.": dy - y * (y * dy).sum(1, keepdims=True),
                "the second path is added, but a longer x makes every entry of y smaller: subtract it.": (
                    dy + y * (y * dy).sum(1, keepdims=True)
                )
                / norm,
                "the length is a root: divide by ‖x‖, not by its square.": (
                    (dy - y * (y * dy).sum(1, keepdims=True)) / norm**2
                ),
                "you used x where the normalised y belongs.": (dy - x * (x * dy).sum(1, keepdims=True)) / norm,
            }
        },
    )


def layernorm_backward(answer: Answer) -> Report:
    """(x_hat, inv_std, dy) → dx of y = (x − mean x) / std x, without gain and bias."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, N, D))
    x_hat, inv_std = _standardize(x)
    mean, along = dy.mean(1, keepdims=True), x_hat * (x_hat * dy).mean(1, keepdims=True)

    return gradients(
        answer,
        (x_hat, inv_std, dy),
        lambda x: (_standardize(x)[0] * dy).sum(),
        {"x": x},
        sizes={"N": N, "D": D},
        mistakes={
            "dx": {
                "this is RMSNorm's backward: the path through the mean of x is missing.": inv_std * (dy - along),
                "the path through the mean is there, but the path through the standard deviation is not.": inv_std
                * (dy - mean),
                "you have the direct path only, but x reaches y by three paths.": inv_std * dy,
                "a mean is over tokens, but each token is normalised by itself.": inv_std
                * (dy - dy.mean(0) - x_hat * (x_hat * dy).mean(0)),
                "both terms are there, but 1/std is missing.": dy - mean - along,
                "the last term is a mean over the D channels, not a sum.": inv_std * (dy - mean - D * along),
                "the two terms are means over the D channels, not sums.": inv_std * (dy - D * mean - D * along),
                "a mean is added, but a larger mean makes every entry smaller: subtract it.": (
                    inv_std * (dy + mean - along)
                ),
                "you multiplied by the standard deviation, but it divides x.": (dy - mean - along) / inv_std,
            }
        },
    )


def rmsnorm_backward_from_output(answer: Answer) -> Report:
    """(gain, y, inv_rms, dy) → dx, dgain, without x and x̂."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, N, D))
    gain = _gain(rng)
    y, (x_hat, inv_rms) = rmsnorm.forward(RMSNorm(gain), x)

    def loss(x: Array, gain: Array) -> Array:
        return (rmsnorm.forward(RMSNorm(gain), x)[0] * dy).sum()

    dx_hat = gain * dy
    return gradients(
        answer,
        (gain, y, inv_rms, dy),
        loss,
        {"x": x, "gain": gain},
        sizes={"N": N, "D": D},
        mistakes={
            "dx": {
                "the mean term is missing: the rms of x depends on x too.": inv_rms * dx_hat,
                "you used y where x̂ belongs: they differ by the gain.": inv_rms
                * (dx_hat - y * (y * dx_hat).mean(1, keepdims=True)),
                "the gain is missing: dy is the gradient after the gain, and you need the gradient before it.": inv_rms
                * (dy - x_hat * (x_hat * dy).mean(1, keepdims=True)),
                "the mean is over tokens, but each token has its own rms.": inv_rms
                * (dx_hat - x_hat * (x_hat * dx_hat).mean(0)),
                "the mean term is a mean over the D channels, not a sum.": inv_rms
                * (dx_hat - x_hat * (x_hat * dx_hat).sum(1, keepdims=True)),
                "the mean must be of x̂ ⊙ dx̂, and dx̂ is gain ⊙ dy.": inv_rms
                * (dx_hat - x_hat * (x_hat * dy).mean(1, keepdims=True)),
                "1/rms is missing.": dx_hat - x_hat * (x_hat * dx_hat).mean(1, keepdims=True),
            },
            "dgain": {
                "you used y where x̂ belongs: they differ by the gain.": (y * dy).sum(0),
                "this is a mean over tokens, but every token uses the full gain: take the sum.": (x_hat * dy).mean(0),
            },
        },
    )


def _gain(rng: np.random.Generator) -> Array:
    """Gains of both signs, none of them near zero."""
    return rng.uniform(0.5, 2, D) * np.resize([1, -1], D)


def _standardize(x: Array) -> tuple[Array, Array]:
    """x (N, D) → x̂ (N, D) and 1/std (N, 1)."""
    centred = x - x.mean(1, keepdims=True)
    inv_std = 1 / np.sqrt((centred * centred).mean(1, keepdims=True) + 1e-5)
    return centred * inv_std, inv_std
