"""Checks of lesson 05: attention."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import attention


def visible_pairs(answer: Answer) -> Report:
    """(T, window) → the number of unmasked pairs, for windows shorter and longer than the text."""
    return first_failure(_visible_pairs(answer, *case) for case in ((8, 3), (5, 9), (6, 1), (300, 128)))


def _visible_pairs(answer: Answer, T: int, window: int) -> Report:
    seen = np.minimum(np.arange(T) + 1, window)  # keys of every query
    hints = {
        "this ignores the window.": T * (T + 1) // 2,
        "this ignores that the first tokens have fewer than w keys to see.": T * window,
        "this ignores the causal mask.": T * T,
        "the window is off by one: a query sees itself and w − 1 others.": int(
            np.minimum(np.arange(T) + 1, window + 1).sum()
        ),
        "the window may be longer than the text: query i never sees more than i + 1 keys.": (
            T * window - window * (window - 1) // 2
        ),
        "a query sees itself too.": int((seen - 1).sum()),
        "this counts the later keys within the window too, but they are masked.": 2 * int(seen.sum()) - T,
        "query i sees i + 1 keys, not i, until the window is full.": int(np.minimum(np.arange(T), window).sum()),
        "this ignores the window, and a query sees itself too.": T * (T - 1) // 2,
    }
    right = int(seen.sum())
    mistakes = {f"T = {T}, w = {window}: {hint}": wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (T, window), {"pairs": right}, mistakes={"pairs": mistakes})


def temperature_backward(answer: Answer) -> Report:
    """(S, temperature, dA) → dS, dtemperature."""
    rng = np.random.default_rng(5)
    T, temperature = 4, 0.7
    S, dA = rng.standard_normal((2, T, T))

    def loss(S: Array, temperature: Array) -> Array:
        return (_softmax(S / temperature) * dA).sum()

    A = _softmax(S / temperature)
    dZ = A * (dA - (A * dA).sum(-1, keepdims=True))
    plain = _softmax(S)
    return gradients(
        answer,
        (S, temperature, dA),
        loss,
        {"S": S, "temperature": np.array(temperature)},
        sizes={"T": T},
        mistakes={
            "dS": {
                "this is the gradient with respect to S/τ; one step is left to S.": dZ,
                "dS lacks the mean term: raising one weight lowers the others of its row.": A * dA / temperature,
                "the mean is over the wrong axis: each row has its own softmax.": (
                    A * (dA - (A * dA).sum(0)) / temperature
                ),
                "the mean must be weighted with A, because the weights of a row are not equal.": (
                    A * (dA - dA.mean(-1, keepdims=True)) / temperature
                ),
                "dA is the gradient with respect to the weights: it must go back through the softmax.": dA
                / temperature,
                "τ divides once too often: dS is dZ/τ.": dZ / temperature**2,
                "multiply by 1/τ, not by τ: S is divided by τ in the forward pass.": dZ * temperature,
                "the weights are those of S/τ, not of S.": (
                    plain * (dA - (plain * dA).sum(-1, keepdims=True)) / temperature
                ),
            },
            "dtemperature": {
                "what is the derivative of 1/τ? One power of τ is missing.": -(dZ * S).sum() / temperature,
                "what is the derivative of 1/τ? Its sign is wrong.": (dZ * S).sum() / temperature**2,
                "one power of τ is too many: the derivative of 1/τ is −1/τ².": -(dZ * S).sum() / temperature**3,
                "this lacks the derivative of 1/τ, which is −1/τ².": (dZ * S).sum(),
                "dA must go back through the softmax first.": -(dA * S).sum() / temperature**2,
                "τ divides S, so every dZ must be multiplied by its S.": -dZ.sum() / temperature**2,
            },
        },
    )


def keys_as_values_backward(answer: Answer) -> Report:
    """(A, q, k, do) → dq, dk."""
    rng = np.random.default_rng(5)
    T, C = 5, 3
    q, k, do = rng.standard_normal((3, T, C))

    def loss(q: Array, k: Array) -> Array:
        o, _ = attention.attend(_one_head(q), _one_head(k), _one_head(k))
        return (o[0, :, 0] * do).sum()

    scores = np.where(np.tri(T, dtype=bool), q @ k.T * C**-0.5, -np.inf)
    A = _softmax(scores)
    dA = do @ k.T
    dS = A * (dA - (A * dA).sum(-1, keepdims=True)) * C**-0.5
    return gradients(
        answer,
        (A, q, k, do),
        loss,
        {"q": q, "k": k},
        sizes={"T": T, "C": C},
        mistakes={
            "dq": {
                "dS lacks the mean of dA over its row.": A * dA * C**-0.5 @ k,
                "dA is the gradient with respect to the weights: it must go back through the softmax to the scores.": (
                    dA * C**-0.5 @ k
                ),
                "1/√C is missing.": dS @ k * C**0.5,
                "the transpose belongs to dk: row i of dq is a sum over the keys that query i sees.": dS.T @ k,
            },
            "dk": {
                "k reaches o by two paths, as keys and as values, and this is the path as values only.": A.T @ do,
                "k reaches o by two paths, as keys and as values, and this is the path as keys only.": dS.T @ q,
                "the path as keys lacks a transpose: row j of dk is a sum over all queries that see key j.": (
                    A.T @ do + dS @ q
                ),
                "the path as keys lacks 1/√C.": A.T @ do + dS.T @ q * C**0.5,
                "the path as values lacks a transpose: row j of dk is a sum over all queries that see key j.": (
                    A @ do + dS.T @ q
                ),
            },
        },
    )


def sink_backward(answer: Answer) -> Report:
    """(A, dA) → dS, db."""
    rng = np.random.default_rng(5)
    T, sink = 4, 0.3
    S, dA = rng.standard_normal((2, T, T))
    seen = np.tri(T)

    def weights(S: Array, b: Array) -> Array:
        exponentials = np.exp(S) * seen
        return exponentials / (np.exp(b) + exponentials.sum(-1, keepdims=True))

    def loss(S: Array, b: Array) -> Array:
        return (weights(S, b) * dA).sum()

    A = weights(S, np.array(sink))
    gathered = (A * dA).sum(-1, keepdims=True)  # (T, 1)
    spent = A.sum(-1, keepdims=True)  # (T, 1)
    return gradients(
        answer,
        (A, dA),
        loss,
        {"S": S, "b": np.array(sink)},
        sizes={"T": T},
        mistakes={
            "dS": {
                "dS lacks the mean term: raising one weight lowers the others of its row.": A * dA,
                "use A itself, not rows that are made to sum to one: the sink has a share in every row.": (
                    A * (dA - gathered / spent)
                ),
                "the mean must be weighted with A, because the weights of a row are not equal.": (
                    A * (dA - dA.mean(-1, keepdims=True))
                ),
                "the sum is over the wrong axis: each row has its own softmax.": A * (dA - (A * dA).sum(0)),
            },
            "db": {
                "every row has its own sink weight, which is 1 − Σ_j A_ij; it is missing.": -gathered.sum(),
                "raising b lowers all other weights of a row: look at the sign.": ((1 - spent) * gathered).sum(),
                "this uses the spent weight of a row, Σ_j A_ij; the sink has the rest.": -(spent * gathered).sum(),
                "b does reach the result: it is in the denominator of every weight.": np.array(0.0),
            },
        },
    )


def _softmax(S: Array) -> Array:
    weights = np.exp(S - S.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _one_head(x: Array) -> Array:
    """(T, C) → (B, T, H, C) with one sequence and one head."""
    return x[None, :, None]
