"""Checks of lesson 10: the decoder."""

from __future__ import annotations

import math

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import linear, rmsnorm
from minimoe.layers.experts import swiglu
from minimoe.layers.linear import Linear
from minimoe.layers.rmsnorm import RMSNorm
from minimoe.losses import cross_entropy


def stream_size(answer: Answer) -> Report:
    """(start, step, L) → the root mean square of the stream."""
    return first_failure(_stream_size(answer, *case) for case in ((0.5, 0.3, 5), (0.02, 0.1, 32)))


def _stream_size(answer: Answer, start: float, step: float, L: int) -> Report:
    hints = {
        "sizes add up only if all vectors point the same way; if they are independent, the squares add up.": (
            start + 2 * L * step
        ),
        "a block writes to the stream twice.": math.sqrt(start**2 + L * step**2),
        "the embedding is in the stream too.": math.sqrt(2 * L) * step,
        "this is the mean square; the question is about its root.": start**2 + 2 * L * step**2,
        "square the sizes before you add them.": math.sqrt(start + 2 * L * step),
        "the embedding is one of the independent terms: square its size too, and take the root of the whole sum.": (
            start + math.sqrt(2 * L) * step
        ),
    }
    return values(answer, (start, step, L), {"size": math.sqrt(start**2 + 2 * L * step**2)}, mistakes={"size": hints})


def parallel_block_backward(answer: Answer) -> Report:
    """(norm_backward, attention_backward, moe_backward, dy) → dx; the layers are small stand-ins."""
    rng = np.random.default_rng(10)
    N, D = 5, 4
    x, dy = rng.standard_normal((2, N, D))
    norm, mixing = RMSNorm(rng.uniform(0.5, 2, D)), Linear(rng.standard_normal((D, D)))
    experts = swiglu.init(rng, ModelConfig(experts=1, active_experts=1, width=D, expert_width=3), dtype=np.float64)

    normed, norm_cache = rmsnorm.forward(norm, x)
    _, mixing_cache = linear.forward(mixing, normed)
    _, experts_cache = swiglu.forward(experts, normed, [N])

    def norm_backward(dy: Array) -> Array:
        return rmsnorm.backward(norm, norm_cache, dy)[0]

    def attention_backward(dy: Array) -> Array:
        return linear.backward(mixing, mixing_cache, dy)[0]

    def moe_backward(dy: Array) -> Array:
        return swiglu.backward(experts, experts_cache, dy)[0]

    def loss(x: Array) -> Array:
        normed, _ = rmsnorm.forward(norm, x)
        y = x + linear.forward(mixing, normed)[0] + swiglu.forward(experts, normed, [N])[0]
        return (y * dy).sum()

    one_after_the_other = dy + norm_backward(moe_backward(dy))
    return gradients(
        answer,
        (norm_backward, attention_backward, moe_backward, dy),
        loss,
        {"x": x},
        sizes={"N": N, "D": D},
        mistakes={
            "dx": {
                "the straight path is missing: y = x + …": norm_backward(attention_backward(dy) + moe_backward(dy)),
                "x reaches the two layers through the norm, and the norm's own backward pass is missing.": (
                    dy + attention_backward(dy) + moe_backward(dy)
                ),
                "the straight path goes around the norm, not through it.": norm_backward(
                    dy + attention_backward(dy) + moe_backward(dy)
                ),
                "this is the block with one layer after the other, but here both layers get the same dy.": (
                    one_after_the_other + norm_backward(attention_backward(one_after_the_other))
                ),
                "the two layers are side by side, so add their gradients; do not send one through the other.": (
                    dy + norm_backward(attention_backward(moe_backward(dy)))
                ),
                "this is the path through the MoE; the path through attention is missing.": one_after_the_other,
                "this is the path through attention; the path through the MoE is missing.": (
                    dy + norm_backward(attention_backward(dy))
                ),
            }
        },
    )


def tied_table_gradient(answer: Answer) -> Report:
    """(table, tokens, dx, y, dz) → dtable; some tokens repeat, and some of the vocabulary never occur."""
    rng = np.random.default_rng(10)
    V, D, N = 7, 4, 6
    tokens = np.array([3, 0, 3, 6, 3, 1])
    table = rng.standard_normal((V, D))
    dx, y = rng.standard_normal((2, N, D))
    dz = rng.standard_normal((N, V))

    def loss(table: Array) -> Array:
        return (table[tokens] * dx).sum() + (y @ table.T * dz).sum()

    below, last_wins = np.zeros((V, D)), np.zeros((V, D))
    np.add.at(below, tokens, dx)
    last_wins[tokens] = dx
    above = dz.T @ y
    return gradients(
        answer,
        (table, tokens, dx, y, dz),
        loss,
        {"table": table},
        sizes={"V": V, "D": D, "N": N},
        mistakes={
            "dtable": {
                "this is the gradient from the bottom, but the table is used at the top too.": below,
                "this is the gradient from the top, but the table is used at the bottom too.": above,
                "token 3 occurs in three places, and all three add to its row; here only the last one counts.": (
                    above + last_wins
                ),
                "the gradients of the two uses must be added, not averaged.": (above + below) / 2,
                "token 3 occurs in three places, and all three add to its row; this is their mean.": (
                    above + below / np.maximum(np.bincount(tokens, minlength=V), 1)[:, None]
                ),
                "the gradients of the two uses must be added, not subtracted.": above - below,
            }
        },
    )


def softcapped_cross_entropy_backward(answer: Answer) -> Report:
    """(z, targets, cap) → dz, with logits that are large enough for the cap to matter."""
    rng = np.random.default_rng(10)
    N, V, cap = 4, 6, 3.0
    z, targets = 3 * rng.standard_normal((N, V)), rng.integers(V, size=N)

    def loss(z: Array) -> Array:
        total, _ = cross_entropy.forward(cap * np.tanh(z / cap), targets)
        return total.total / total.tokens

    def by_logits(logits: Array) -> Array:
        return cross_entropy.backward(cross_entropy.forward(logits, targets)[1], 1 / N)

    capped = np.tanh(z / cap)
    right = by_logits(cap * capped)
    slope = 1 - capped**2
    return gradients(
        answer,
        (z, targets, cap),
        loss,
        {"z": z},
        sizes={"N": N, "V": V},
        mistakes={
            "dz": {
                "this is the gradient with respect to the capped logits; the tanh is left.": right,
                "the softmax is taken of the capped logits, not of z.": by_logits(z) * slope,
                "this is the gradient without any cap.": by_logits(z),
                "the derivative of tanh(u) is 1 − tanh(u)², not 1 − u².": right * (1 - (z / cap) ** 2),
                "c multiplies the tanh and divides z: in the derivative, the two cancel.": right * slope / cap,
                "the derivative of tanh(u) is 1 − tanh(u)²; here cap · tanh(u) was squared.": (
                    right * (1 - (cap * capped) ** 2)
                ),
                "the derivative of tanh(u) is 1 − tanh(u)², not 1 − tanh(u).": right * (1 - capped),
                "the derivative of tanh must be taken at z / c, not at z.": right * (1 - np.tanh(z) ** 2),
            }
        },
    )
