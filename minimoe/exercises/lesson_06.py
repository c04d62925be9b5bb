"""Checks of lesson 06: a SwiGLU expert."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers.experts import swiglu
from minimoe.layers.experts.swiglu import Experts

N, D, F = 5, 4, 6


def llama_width(answer: Answer) -> Report:
    """(D) → 8D/3, rounded up to a multiple of 256."""
    return first_failure(_llama_width(answer, width) for width in (4096, 5120, 768, 96))


def _llama_width(answer: Answer, width: int) -> Report:
    right = 256 * math.ceil(8 * width / 3 / 256)
    hints = {
        "the number of parameters is right, but the width is not a multiple of 256.": 8 * width / 3,
        "this is rounded down, but not to a multiple of 256.": 8 * width // 3,
        "round up, not down, nor to the nearest multiple.": 256 * (8 * width // 3 // 256),
        "this is the classic layer's width, but a third matrix takes parameters too.": 4 * width,
        "this is half of the classic width; three matrices instead of two cost one half more, not double.": 2 * width,
    }
    mistakes = {f"D = {width}: {hint}": wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (width,), {"F": right}, mistakes={"F": mistakes})


def glu_backward(answer: Answer) -> Report:
    """(a, b, dh) → da, db of h = sigmoid(a) ⊙ b."""
    rng = np.random.default_rng(6)
    a, b, dh = rng.standard_normal((3, N, F))
    s = swiglu.sigmoid(a)

    def loss(a: Array, b: Array) -> Array:
        return (swiglu.sigmoid(a) * b * dh).sum()

    return gradients(
        answer,
        (a, b, dh),
        loss,
        {"a": a, "b": b},
        sizes={"N": N, "F": F},
        mistakes={
            "da": {
                "this is the slope of silu, but here a is inside the sigmoid only.": dh * b * s * (1 + a * (1 - s)),
                "the other factor, b, is missing.": dh * s * (1 - s),
                "the slope of the sigmoid is missing: this treats the gate as if it were a itself.": dh * b,
                "the slope of a sigmoid is s (1 − s), not s.": dh * b * s,
            },
            "db": {
                "b is multiplied by sigmoid(a), not by silu(a).": dh * a * s,
                "b is multiplied by the sigmoid of a, not by a.": dh * a,
                "b is multiplied by the sigmoid itself; its slope belongs to da.": dh * s * (1 - s),
            },
        },
    )


def multiplier(answer: Answer) -> Report:
    """() → three matrices whose expert answers x_0 · x_1."""
    x = np.random.default_rng(6).uniform(-3, 3, (7, 2))

    def product() -> Any:
        matrices = answer()
        if matrices is None or matrices is ... or any(matrix is ... for matrix in matrices):
            return None if matrices is None else ...  # the engine says that nothing was returned
        if len(matrices) != 3:
            raise ValueError(f"it returns {len(matrices)} matrices, expected 3: W_gate, W_up, W_down")
        w_gate, w_up, w_down = (np.asarray(matrix, float) for matrix in matrices)
        _require(w_gate, "W_gate", (2, 2))
        _require(w_up, "W_up", (2, 2))
        _require(w_down, "W_down", (2, 1))
        a = x @ w_gate
        return a * swiglu.sigmoid(a) * (x @ w_up) @ w_down

    product.__name__ = getattr(answer, "__name__", "your answer")
    product.__dict__["__wrapped__"] = answer
    right = x[:, :1] * x[:, 1:]
    s = swiglu.sigmoid(x)
    lead = 2 * s - 1  # sigmoid(a) − sigmoid(−a)
    return values(
        product,
        (),
        {"answer": right},
        sizes={"N": 7},
        mistakes={
            "answer": {
                "one channel gives silu(x_0) · x_1; the second channel must add what silu(x_0) lacks to be x_0.": (
                    right * s[:, :1]
                ),
                "one channel gives silu(x_1) · x_0; the second channel must add what silu(x_1) lacks to be x_1.": (
                    right * s[:, 1:]
                ),
                "the second channel must be subtracted, not added.": right * lead[:, :1],
                "the second channel must be subtracted, and not added.": right * lead[:, 1:],
                "this is 2 · silu(x_0) · x_1: give the two gates opposite signs, and both channels the same W_up.": (
                    2 * right * s[:, :1]
                ),
                "this is 2 · silu(x_1) · x_0: give the two gates opposite signs, and both channels the same W_up.": (
                    2 * right * s[:, 1:]
                ),
            }
        },
    )


def one_matrix_backward(answer: Answer) -> Report:
    """(x, W, dh) → dx, dW of h = silu(x W) ⊙ x W."""
    rng = np.random.default_rng(6)
    x, W, dh = rng.standard_normal((N, D)), rng.standard_normal((D, F)), rng.standard_normal((N, F))
    identity = np.eye(F)[None]  # so that the expert's answer is h itself

    def loss(x: Array, W: Array) -> Array:
        a = x @ W
        y, _ = swiglu.forward(Experts(identity, identity, identity), a, [len(a)])
        return (y * dh).sum()

    a = x @ W
    s = swiglu.sigmoid(a)
    slope = s * (1 + a * (1 - s))
    as_gate, as_value = dh * a * slope, dh * a * s
    wrong = {
        "a reaches h by two paths, as gate and as value, and this is the path as gate only.": as_gate,
        "a reaches h by two paths, as gate and as value, and this is the path as value only.": as_value,
        "the slope of silu has two terms, because a is also inside the sigmoid.": dh * a * s + as_value,
        "the gradient of one factor contains the other: in the path as gate, the factor a is missing.": (
            dh * slope + as_value
        ),
        "in the path as gate, the slope of silu is missing.": dh * a + as_value,
        "in the path as value, a is multiplied by silu(a), so its gradient is dh · silu(a), not dh · s.": (
            as_gate + dh * s
        ),
    }
    return gradients(
        answer,
        (x, W, dh),
        loss,
        {"x": x, "W": W},
        sizes={"N": N, "D": D, "F": F},
        mistakes={
            "dx": {hint: da @ W.T for hint, da in wrong.items()},
            "dW": {hint: x.T @ da for hint, da in wrong.items()},
        },
    )


def _require(matrix: Array, name: str, shape: tuple[int, int]) -> None:
    if matrix.shape != shape:
        raise ValueError(f"{name} has shape {matrix.shape}, expected {shape}")
