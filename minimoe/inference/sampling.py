"""Sampling: from the scores of the last position to the next token.

    p = softmax(z / temperature)

A low temperature sharpens the probabilities and a high one flattens them; 0 always takes the likeliest token. Two
filters cut off the tail of unlikely tokens. Each of these tokens is rare, but together they would spoil a text:

    top-k    keep the k likeliest tokens
    top-p    keep the likeliest tokens until their probabilities add up to p: few if the model is sure, otherwise many

The remaining probabilities are scaled to add up to 1 again. Among equal logits, the lowest index comes first.

Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2019, arXiv 1904.09751 (top-p, or nucleus sampling).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimoe.core.arrays import underflow_is_right
from minimoe.core.errors import UserError


def sample(
    logits: NDArray[Any],
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """logits (V,) → the id of one token, drawn from ``probabilities``. Draws one number from ``rng``.

    Raises:
        UserError: as ``probabilities``.
    """
    cumulative = probabilities(logits, temperature, top_k, top_p).cumsum()
    # The first token whose cumulative probability exceeds the draw; this is never a token of probability 0.
    return int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))


@underflow_is_right
def probabilities(
    logits: NDArray[Any], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> NDArray[np.float64]:
    """logits (V,) → the probability (V,) of each token to be drawn, float64, zero where filtered out.

    ``temperature`` is applied first, then ``top_k``, then ``top_p`` to the tokens that top-k keeps. A logit may be −∞.

    Raises:
        UserError: a setting is out of its range, or the logits hold NaN or +∞, or nothing but −∞.
    """
    check(temperature, top_k, top_p)
    logits = np.asarray(logits, np.float64)
    peak = logits.max()
    if not math.isfinite(peak):
        raise UserError(
            f"The largest logit is {peak}, expected a finite number: the model has diverged, so use an earlier "
            "checkpoint, or train again with a lower learning rate."
        )
    if temperature == 0:  # in the limit, the likeliest token has all the probability
        temperature, top_k = 1, 1
    likeliest_first = (-logits).argsort(kind="stable")[:top_k]
    with np.errstate(over="ignore"):  # a temperature near 0 may send all but the likeliest to −∞, which is right
        p = np.exp((logits[likeliest_first] - peak) / temperature)
    p /= p.sum()
    if top_p is not None and top_p < 1:
        enough = p.cumsum().searchsorted(top_p)  # the token that reaches p
        p = p[: enough + 1]
        p /= p.sum()
    result = np.zeros(len(logits))
    result[likeliest_first[: len(p)]] = p
    return result


def check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ``UserError`` unless 0 ≤ temperature < ∞, top_k ≥ 1 and 0 < top_p ≤ 1; None switches a filter off."""
    if not 0 <= temperature < math.inf:  # NaN fails every comparison
        raise UserError(
            f"temperature {temperature} is not a finite number of at least 0: choose 0 for the likeliest token, 1 for "
            "the model's own probabilities, or a number between them or above."
        )
    if top_k is not None and (not isinstance(top_k, int | np.integer) or top_k < 1):
        raise UserError(
            f"top_k {top_k} is not a number of tokens to keep: choose a whole number of at least 1, or leave it out to "
            "keep all."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"top_p {top_p} is not a probability to keep: choose a number above 0 and at most 1, or leave it out to "
            "keep all tokens."
        )
