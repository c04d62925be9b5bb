"""Checks of lesson 42: LoRA."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def lora_backward(answer: Answer) -> Report:
    """(x, W, A, B, s, dy) → dx, dA, dB of y = x W + s x A B."""
    rng = np.random.default_rng(42)
    N, D, F, r, s = 7, 5, 4, 3, 0.3
    x, W, dy = rng.standard_normal((N, D)), rng.standard_normal((D, F)), rng.standard_normal((N, F))
    A, B = rng.standard_normal((D, r)), rng.standard_normal((r, F))

    def loss(x: Array, A: Array, B: Array) -> Array:
        return (dy * (x @ W + s * (x @ A) @ B)).sum()

    return gradients(
        answer,
        (x, W, A, B, s, dy),
        loss,
        {"x": x, "A": A, "B": B},
        sizes={"N": N, "D": D, "F": F, "r": r},
        mistakes={
            "dx": {
                "this is the path through W; x also reaches y through A and B.": dy @ W.T,
                "this is the path through the adapter; x also reaches y through W.": s * dy @ B.T @ A.T,
                "s is missing on the path through the adapter.": dy @ W.T + dy @ B.T @ A.T,
                "s belongs to the path through the adapter only.": s * (dy @ W.T + dy @ B.T @ A.T),
                "the path through the adapter has s once, here it is there twice.": dy @ W.T + s**2 * dy @ B.T @ A.T,
            },
            "dA": {
                "s is missing: y contains s x A B.": x.T @ dy @ B.T,
                "here s is there twice.": s**2 * x.T @ dy @ B.T,
                "this is the gradient that W would have; B carries dy to A.": x.T @ dy,
            },
            "dB": {
                "s is missing: y contains s x A B.": A.T @ x.T @ dy,
                "here s is there twice.": s**2 * A.T @ x.T @ dy,
                "this is the gradient that W would have; A carries x to B.": x.T @ dy,
            },
        },
    )


def adapter_size(answer: Answer) -> Report:
    """(D, H, G, C, E, F, r) → how many numbers the adapters of one layer have, without the router."""
    cases = ((4096, 32, 8, 128, 8, 14336, 16), (6, 3, 1, 5, 4, 7, 2), (10, 5, 5, 3, 2, 9, 3))
    return first_failure(_adapter_size(answer, *case) for case in cases)


def _adapter_size(answer: Answer, D: int, H: int, G: int, C: int, E: int, F: int, r: int) -> Report:
    attention = r * (2 * (D + H * C) + 2 * (D + G * C))
    experts = r * 3 * E * (D + F)
    right = attention + experts
    hints = {
        "keys and values have G heads, not H.": r * 4 * (D + H * C) + experts,
        "every one of the E experts has adapters of its own.": attention + experts // E,
        "an expert has three matrices.": attention + experts // 3,
        "an expert has three matrices, here two are counted.": attention + 2 * experts // 3,
        "the router has no adapter.": right + r * (D + E),
        "attention is missing.": experts,
        "the experts are missing.": attention,
        "this is A alone; B learns as well.": r * (3 * D + H * C + E * (2 * D + F)),
        "this is B alone; A learns as well.": r * (H * C + 2 * G * C + D + E * (2 * F + D)),
        "a head has width C, so H heads have H · C numbers.": r * (2 * (D + H) + 2 * (D + G)) + experts,
        "an adapter between D and F has r (D + F) numbers, not r D F.": (
            r * (2 * D * H * C + 2 * D * G * C + 3 * E * D * F)
        ),
        "this is for rank 1.": right // r,
        "these are the weights themselves, not their adapters.": 2 * D * H * C + 2 * D * G * C + 3 * E * D * F,
    }
    mistakes = {hint: wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (D, H, G, C, E, F, r), {"size": right}, mistakes={"size": mistakes})


def fused_correction(answer: Answer) -> Report:
    """(lora_A, lora_B, s, E) of peft's fused layout → the corrections s AB of all experts, (E, inputs, outputs)."""
    # in the second case E = r: an axis that is read in the wrong place then has the right size
    return first_failure(_fused_correction(answer, *case) for case in ((3, 2), (4, 4)))


def _fused_correction(answer: Answer, E: int, r: int) -> Report:
    rng = np.random.default_rng(42)
    D, F, s = 5, 7, 0.4
    lora_A, lora_B = rng.standard_normal((E * r, D)), rng.standard_normal((F, r * E))
    A, B = lora_A.reshape(E, r, D), lora_B.reshape(F, r, E)

    def corrections(A: Array, B: Array) -> Array:
        """A (E, r, D), B (F, r, E) → (E, D, F)."""
        return np.einsum("erd,fre->edf", A, B)

    right = s * corrections(A, B)
    slow = lora_B.reshape(F, E, r).swapaxes(1, 2)  # (F, r, E)
    swapped = lora_A.reshape(r, E, D).swapaxes(0, 1)  # (E, r, D)
    return values(
        answer,
        (lora_A, lora_B, s, E),
        {"delta": right},
        sizes={"E": E, "r": r, "D": D, "F": F},
        mistakes={
            "delta": {
                "this reads lora_B as (outputs, E, r), but in it the expert changes fastest.": s * corrections(A, slow),
                "this reads lora_A as (r, E, inputs), but in it the expert changes slowest.": s
                * corrections(swapped, B),
                "both are read the wrong way round: the expert is slowest in lora_A and fastest in lora_B.": (
                    s * corrections(swapped, slow)
                ),
                "s is missing.": corrections(A, B),
                "here s is there twice.": s**2 * corrections(A, B),
                "this is (E, outputs, inputs), the orientation of the file.": right.swapaxes(1, 2),
                "this adds up the experts, but each has a correction of its own.": right.sum(0),
            }
        },
    )
