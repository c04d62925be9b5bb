"""Checks of lesson 02: backprop by hand."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import linear
from minimoe.layers.linear import Linear
from minimoe.losses import cross_entropy


def linear_with_bias_backward(answer: Answer) -> Report:
    """(x, W, dy) → dx, dW, db of y = x W + b."""
    rng = np.random.default_rng(2)
    N, D, F = 5, 3, 4
    x, W, b, dy = (rng.standard_normal(shape) for shape in ((N, D), (D, F), F, (N, F)))

    def loss(x: Array, W: Array, b: Array) -> Array:
        return ((linear.forward(Linear(W), x)[0] + b) * dy).sum()

    return gradients(
        answer,
        (x, W, dy),
        loss,
        {"x": x, "W": W, "b": b},
        sizes={"N": N, "D": D, "F": F},
        mistakes={
            "dx": {"this is dy Wᵀ averaged over tokens, but each token has its own dx.": dy.mean(0) @ W.T},
            "db": {
                "b is added to every token, but here the gradients of the tokens are separate: add them up.": dy,
                "you summed over the wrong axis: b has one entry for each column of y.": dy.sum(1),
                "this is a mean over tokens, but b is added in full to every token: take the sum.": dy.mean(0),
            },
            "dW": {
                "this is the first token's part, but every token uses W.": np.outer(x[0], dy[0]),
                "this is a mean over tokens, but W acts in full on every token: take the sum.": x.T @ dy / N,
                "only the last token is in it. Does a loop overwrite the sum instead of adding to it?": np.outer(
                    x[-1], dy[-1]
                ),
            },
        },
    )


def softmax_backward(answer: Answer) -> Report:
    """(p, dp) → dz of p = softmax(z)."""
    rng = np.random.default_rng(2)
    N, V = 4, 5
    z, dp = rng.standard_normal((2, N, V))
    p = _softmax(z)

    return gradients(
        answer,
        (p, dp),
        lambda z: (_softmax(z) * dp).sum(),
        {"z": z},
        sizes={"N": N, "V": V},
        mistakes={
            "dz": {
                "you have the diagonal only: z_v changes its own p_v, but also every other p of the row, through the "
                "sum in the denominator.": p * (1 - p) * dp,
                "you have the path through the numerator only, but z_v is also in the sum in the denominator.": p * dp,
                "the sum is over the wrong axis: each token has its own softmax.": p * (dp - (p * dp).sum(0)),
                "the sum is over the whole matrix, but each token has its own softmax.": p * (dp - (p * dp).sum()),
                "this subtracts the plain mean of dp, but the mean must be weighted with p.": (
                    p * (dp - dp.mean(1, keepdims=True))
                ),
                "this subtracts the plain sum of dp, but each dp must be weighted with its p.": (
                    p * (dp - dp.sum(1, keepdims=True))
                ),
                "the factor p in front of the bracket is missing.": dp - (p * dp).sum(1, keepdims=True),
                "p − target belongs to a softmax before a cross-entropy; here dp is a gradient, not a target.": (
                    p - dp
                ),
                "the average over the row must be subtracted, but here it is added.": (
                    p * (dp + (p * dp).sum(1, keepdims=True))
                ),
            }
        },
    )


def tied_backward(answer: Answer) -> Report:
    """(x, W, dy) → dx, dW of y = x W Wᵀ."""
    rng = np.random.default_rng(2)
    N, D, F = 5, 3, 4
    x, W, dy = (rng.standard_normal(shape) for shape in ((N, D), (D, F), (N, D)))
    first, second = x.T @ (dy @ W), dy.T @ (x @ W)

    return gradients(
        answer,
        (x, W, dy),
        lambda x, W: (x @ W @ W.T * dy).sum(),
        {"x": x, "W": W},
        sizes={"N": N, "D": D, "F": F},
        mistakes={
            "dW": {
                "you have the path through the first W only, but W is used twice.": first,
                "you have the path through Wᵀ only, but W is used twice.": second,
                "both paths are there, but they are averaged: add them.": (first + second) / 2,
                "you doubled the path through the first W, but the two uses of W have different gradients.": 2 * first,
                "you doubled the path through Wᵀ, but the two uses of W have different gradients.": 2 * second,
            },
            "dx": {"this stops half-way: it is the gradient with respect to x W. Go on to x, with Wᵀ.": dy @ W},
        },
    )


def masked_cross_entropy_backward(answer: Answer) -> Report:
    """(p, targets, mask) → dz of the mean loss over the tokens that count."""
    rng = np.random.default_rng(2)
    N, V = 7, 5
    z, targets = rng.standard_normal((N, V)), rng.integers(V, size=N)
    one_hot = np.eye(V)[targets]

    def case(mask: Array) -> Report:
        count = mask.sum()
        p = cross_entropy.forward(z, targets)[1].probabilities

        def loss(z: Array) -> Array:
            return cross_entropy.forward(z, targets, mask)[0].total / count

        counted = mask[:, None]
        return gradients(
            answer,
            (p, targets, mask),
            loss,
            {"z": z},
            sizes={"N": N, "V": V, "the number of tokens that count": int(count)},
            mistakes={
                "dz": {
                    "the padding still has a gradient: for a token that does not count, it must be zero.": (p - one_hot)
                    / count,
                    "the padding has a gradient, and it is counted in the mean.": (p - one_hot) / N,
                    "you divide by all N tokens, but the mean is over those that count.": (p - one_hot) * counted / N,
                    "you divide by the number of padding tokens, but the mean is over those that count.": (
                        (p - one_hot) * counted / max(N - count, 1)
                    ),
                    "the term of the target is missing: where is the −1?": p * counted / count,
                    "the sign is wrong: a step against this gradient makes the loss larger.": (
                        (one_hot - p) * counted / count
                    ),
                    "only the entry of the target is there, but the other scores have a gradient too.": (
                        (p - one_hot) * one_hot * counted / count
                    ),
                    "this is −1/p at the target, the gradient with respect to p. Go on to z, through the softmax.": (
                        -one_hot / p * counted / count
                    ),
                }
            },
        )

    some = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    return first_failure(case(mask) for mask in (some, np.ones(N)))


def best_step(answer: Answer) -> Report:
    """(value, curvature, epsilon) → the h with the smallest bound 2 ε |value| / h + h |curvature| / 2."""

    def case(value: float, curvature: float, epsilon: float) -> Report:
        ratio = epsilon * abs(value / curvature)
        return values(
            answer,
            (value, curvature, epsilon),
            {"h": 2 * np.sqrt(ratio)},
            mistakes={
                "h": {
                    "only a constant factor is missing: the bound is smallest where its derivative is zero.": (
                        np.sqrt(ratio)
                    ),
                    "√2 is missing: does each of the two losses have a rounding error?": np.sqrt(2 * ratio),
                    "this is the machine epsilon itself: with it, rounding errors are as large as the slope.": epsilon,
                    "the root is missing: one error grows as 1/h, the other as h.": ratio,
                    "value and curvature are swapped: the larger the curvature, the smaller the step.": (
                        2 * np.sqrt(epsilon * abs(curvature / value))
                    ),
                    "value and curvature are multiplied under the root: the larger the curvature, the smaller the "
                    "step.": 2 * np.sqrt(epsilon * abs(value * curvature)),
                    "the root is missing: this is h².": 4 * ratio,
                }
            },
            reference="The minimum of the bound",
        )

    cases = ((3.0, 0.7, 2e-16), (-0.2, 7.0, 1e-7), (1.9, -1.3, 2e-16))
    return first_failure(case(*arguments) for arguments in cases)


def _softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
