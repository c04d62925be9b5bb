"""Checks of lesson 11: training."""

from __future__ import annotations

import math

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def uncorrected_step(answer: Answer) -> Report:
    """(beta1, beta2, step) → the length of AdamW's step without its corrections, divided by the right length."""
    return first_failure(_uncorrected(answer, *case) for case in ((0.8, 0.98, 7), (0.9, 0.999, 0), (0.9, 0.99, 500)))


def _uncorrected(answer: Answer, beta1: float, beta2: float, step: int) -> Report:
    def ratio(t: int) -> float:
        return (1 - beta1**t) / math.sqrt(1 - beta2**t) if t else 0.0

    t = step + 1
    return values(
        answer,
        (beta1, beta2, step),
        {"ratio": np.array(ratio(t))},
        mistakes={
            "ratio": {
                "steps count from 0: after step 0, one gradient is in the mean.": np.array(ratio(step)),
                "v is a mean of squares, and the step is divided by its root.": np.array(
                    (1 - beta1**t) / (1 - beta2**t)
                ),
                "this is the other way round: which of the two steps is the uncorrected one?": np.array(1 / ratio(t)),
                "this is the correction of the mean only; the size is not corrected either.": np.array(1 - beta1**t),
                "this is the correction of the size only; the mean is not corrected either.": np.array(
                    1 / math.sqrt(1 - beta2**t)
                ),
                "this is right at step 0 only: how much of the mean is filled after t steps?": np.array(
                    (1 - beta1) / math.sqrt(1 - beta2)
                ),
                "β₁ and β₂ are swapped: β₁ belongs to the mean, β₂ to the mean of squares.": np.array(
                    (1 - beta2**t) / math.sqrt(1 - beta1**t)
                ),
                "these are the powers themselves: after t steps, the weights in the mean sum to 1 − β₁ᵗ.": np.array(
                    beta1**t / math.sqrt(beta2**t)
                ),
            }
        },
    )


def lion_step(answer: Answer) -> Report:
    """(weight, mean, d, rate, beta1, beta2, decay) → the new weight and mean.

    The gradient is larger than the mean, so the sign depends on their blend and on the order of the two updates.
    """
    return first_failure(_lion_step(answer, *betas) for betas in ((0.6, 0.9), (0.7, 0.4)))


def _lion_step(answer: Answer, beta1: float, beta2: float) -> Report:
    rng = np.random.default_rng(11)
    D, F = 5, 8
    weight, mean, d = rng.standard_normal((3, D, F))
    d *= 1.5
    rate, decay = 0.1, 0.5

    def moved(blend: Array) -> Array:
        return weight - rate * (np.sign(blend) + decay * weight)

    blend = beta1 * mean + (1 - beta1) * d
    new_mean = beta2 * mean + (1 - beta2) * d
    return values(
        answer,
        (weight, mean, d, rate, beta1, beta2, decay),
        {"weight": moved(blend), "mean": new_mean},
        sizes={"D": D, "F": F},
        mistakes={
            "weight": {
                "this is the sign of the new mean, but the direction is a different blend, with β₁.": moved(new_mean),
                "the mean was updated before the direction was taken, but the direction needs the mean from before "
                "this step.": moved(beta1 * new_mean + (1 - beta1) * d),
                "β₁ is the share of the mean, and 1 − β₁ is that of the gradient.": moved(
                    (1 - beta1) * mean + beta1 * d
                ),
                "decay acts on the weight from before the step, not on the weight after it.": (
                    (weight - rate * np.sign(blend)) * (1 - rate * decay)
                ),
                "the rate is missing.": weight - (np.sign(blend) + decay * weight),
                "this is the sign of the old mean, but the direction contains the new gradient too.": moved(mean),
                "this is the sign of the gradient alone, but the direction contains the mean too.": moved(d),
                "the sign is missing: the step has the size of the gradient.": weight - rate * (blend + decay * weight),
                "decay is added to the sign; it is not inside the sign.": (
                    weight - rate * np.sign(blend + decay * weight)
                ),
                "decay must be multiplied by the rate: w ← w − rate · (direction + decay · w).": (
                    weight - rate * np.sign(blend) - decay * weight
                ),
                "decay is missing.": weight - rate * np.sign(blend),
                "this goes uphill: look at the sign of the step.": weight + rate * (np.sign(blend) - decay * weight),
            },
            "mean": {
                "the mean has its own β₂; β₁ belongs to the direction.": blend,
                "β₂ is the share of the old mean, and 1 − β₂ is that of the gradient.": (1 - beta2) * mean + beta2 * d,
            },
        },
    )


def step_backward(answer: Answer) -> Report:
    """(weight, direction, rate, decay, dnew) → dweight, drate of w' = w − rate · (direction + decay · w)."""
    rng = np.random.default_rng(11)
    D, F = 3, 5
    weight, direction, dnew = rng.standard_normal((3, D, F))
    rate, decay = 0.3, 0.7

    def loss(weight: Array, rate: Array) -> Array:
        return ((weight - rate * (direction + decay * weight)) * dnew).sum()

    return gradients(
        answer,
        (weight, direction, rate, decay, dnew),
        loss,
        {"weight": weight, "rate": np.array(rate)},
        sizes={"D": D, "F": F},
        mistakes={
            "dweight": {
                "w reaches w' by two paths, directly and through the decay, and this is the direct path only.": dnew,
                "this is the path through the decay only, but w also reaches w' directly.": -rate * decay * dnew,
                "decay makes the weight smaller: look at the sign of that path.": dnew * (1 + rate * decay),
                "the decay is multiplied by the rate.": dnew * (1 - decay),
            },
            "drate": {
                "the rate scales the decay as well as the direction.": -(direction * dnew).sum(),
                "this is the decay's part only, but the rate scales the direction as well.": (
                    -(decay * weight * dnew).sum()
                ),
                "the rate is one number for all entries, so its gradient must be summed over them.": -dnew
                * (direction + decay * weight),
                "the gradient of the rate is the sum over all entries, not their mean.": (
                    -(dnew * (direction + decay * weight)).mean()
                ),
                "the step is subtracted: look at the sign.": (dnew * (direction + decay * weight)).sum(),
                "dw' is missing: what each entry of w' receives weighs how much it matters.": (
                    -(direction + decay * weight).sum()
                ),
            },
        },
    )


def newton_schulz(answer: Answer) -> Report:
    """(m, steps) → a stack of matrices, with 3/2 s − 1/2 s³ applied ``steps`` times to their singular values."""
    return first_failure(_newton_schulz(answer, shape, steps) for shape, steps in (((3, 4, 6), 4), ((2, 5, 3), 1)))


def _newton_schulz(answer: Answer, shape: tuple[int, int, int], steps: int) -> Report:
    rng = np.random.default_rng(11)
    m = rng.standard_normal(shape)
    norms = np.sqrt((m * m).sum((1, 2), keepdims=True))

    def moved(x: Array, steps: int, exact: float | None = None) -> Array:
        U, S, Vt = np.linalg.svd(x, full_matrices=False)
        for _ in range(steps):
            S = 1.5 * S - 0.5 * S**3
        scaled: Array = (U * S[..., None, :] if exact is None else exact * U) @ Vt
        return scaled

    entries = m / norms
    as_one = m.reshape(-1, shape[2]) / np.sqrt((m * m).sum())
    with np.errstate(over="ignore", invalid="ignore"):
        unscaled = moved(m, steps)
        for _ in range(steps):
            entries = 1.5 * entries - 0.5 * entries**3
    return values(
        answer,
        (m, steps),
        {"x": moved(m / norms, steps)},
        sizes={"E": shape[0], "D": shape[1], "F": shape[2]},
        mistakes={
            "x": {
                "this is the norm of the whole stack, but every expert's matrix has its own norm.": moved(
                    m / np.sqrt((m * m).sum()), steps
                ),
                "this cubes every entry, but X Xᵀ X is a product of matrices.": entries,
                "without division by the norm, the singular values start above 1 and run away.": unscaled,
                "there is one step too few.": moved(m / norms, steps - 1),
                "there is one step too many.": moved(m / norms, steps + 1),
                "this is the norm of each row, but the norm of the whole matrix is needed.": moved(
                    m / np.sqrt((m * m).sum(2, keepdims=True)), steps
                ),
                "this is the norm of each column, but the norm of the whole matrix is needed.": moved(
                    m / np.sqrt((m * m).sum(1, keepdims=True)), steps
                ),
                "the stack was treated as one tall matrix, but every expert has a matrix of its own.": (
                    moved(as_one, steps).reshape(shape)
                ),
                "this is U Vᵀ itself; the exercise asks for what so many steps of Newton–Schulz reach.": moved(
                    m, 0, 1.0
                ),
                "this divides by the largest singular value; the norm here is the root of the sum of squares.": moved(
                    m / np.linalg.norm(m, 2, axis=(1, 2), keepdims=True), steps
                ),
                "the matrix is divided by the square of its norm: take the root.": moved(m / norms**2, steps),
            }
        },
    )
