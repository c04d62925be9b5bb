"""Checks of lesson 12: generation."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.core.presets import preset
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import attention


def cache_bytes(answer: Answer) -> Report:
    """(config, tokens, bytes_per_number) → the size of the key/value cache, with and without a window."""
    windowed = ModelConfig(width=60, layers=3, heads=15, kv_heads=5, head_width=10, window=50)
    cases = ((windowed, 70, 4), (windowed, 20, 4), (preset("mixtral-8x7b").config, 32_768, 2))
    return first_failure(_cache_bytes(answer, *case) for case in cases)


def _cache_bytes(answer: Answer, config: ModelConfig, tokens: int, size: int) -> Report:
    kept = tokens if config.window is None else min(tokens, config.window)
    right = 2 * config.layers * config.kv_heads * config.head_width * kept * size
    hints = {
        "half of it is missing: both keys and values are stored.": right // 2,
        "this counts query heads, but queries are used once and never stored.": (
            right // config.kv_heads * config.heads
        ),
        "every layer has its own cache.": right // config.layers,
        "keys and values have kv_heads · head_width numbers, which is not the width of the model.": (
            right // (config.kv_heads * config.head_width) * config.width
        ),
        "this counts bits: the answer is in bytes.": 8 * right,
        "the heads are missing: every key/value head stores keys and values of its own.": right // config.kv_heads,
        "this is the count of numbers, but each of them takes some bytes.": right // size,
        "the width of a head is missing.": right // config.head_width,
        "tokens that are outside every later window are not kept.": right // kept * tokens,
        "a text that is shorter than the window fills only a part of it.": right // kept * (config.window or kept),
    }
    mistakes = {hint: wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (config, tokens, size), {"bytes": right}, mistakes={"bytes": mistakes})


def min_p_probabilities(answer: Answer) -> Report:
    """(logits, min_p) → probabilities, for a flat and for a peaked distribution."""
    rng = np.random.default_rng(12)
    flat = rng.standard_normal(9) * 0.5
    telling = 2.6 + np.log([0.4, 1, 0.1, 0.8, 0.2, 0.72])  # every usual mistake keeps other tokens
    return first_failure(_min_p(answer, *case) for case in ((telling, 0.3), (3 * flat, 0.2), (flat, 1.0)))


def _min_p(answer: Answer, logits: Array, min_p: float) -> Report:
    p = _softmax(logits)
    kept = p * (p >= min_p * p.max())
    mistakes = {
        "the remaining probabilities do not sum to one.": kept,
        "min_p is a share of the largest probability, not a probability.": _scaled(p * (p >= min_p)),
        "min_p is a share of the largest probability, not a probability; also, the sum is not one.": p * (p >= min_p),
        "this compares logits, but their zero has no meaning: compare probabilities.": _scaled(
            p * (logits >= min_p * logits.max())
        ),
        "the threshold is min_p times the largest probability, not 1 − min_p times.": _scaled(
            p * (p >= (1 - min_p) * p.max())
        ),
        "min_p is a ratio of probabilities: for logits it is a distance of −log(min_p).": _scaled(
            p * (logits >= logits.max() - min_p)
        ),
        "nothing was filtered out.": p,
    }
    mistakes = {hint: wrong for hint, wrong in mistakes.items() if wrong.any()}
    if min_p == 1:  # the other mistakes show in the cases before
        mistakes = {
            "compare with ≥, not with >: the likeliest token itself must stay.": _scaled(p * (p > min_p * p.max()))
        }
    return values(
        answer,
        (logits, min_p),
        {"p": kept / kept.sum()},
        sizes={"V": len(p)},
        mistakes={"p": mistakes},
    )


def attend_one(answer: Answer) -> Report:
    """(q, keys, values, window) → o, for a window shorter than the cached text, and for a longer one."""
    return first_failure(_attend_one(answer, window) for window in (5, 30))


def _attend_one(answer: Answer, window: int) -> Report:
    rng = np.random.default_rng(12)
    S, H, G, C = 7, 6, 3, 4
    q = rng.standard_normal((H, C))
    keys, cached = rng.standard_normal((2, S, G, C))

    def attend(window: int, share: Array, scale: float, last: int = S) -> Array:
        """Head h reads key/value head share[h], of the positions from S − window to last."""
        first = max(0, S - window)
        seen, taken = keys[first:last, share], cached[first:last, share]  # (S', H, C)
        weights = _softmax((q * seen).sum(-1).T * scale)  # (H, S')
        return np.einsum("hs,shc->hc", weights, taken)

    groups = np.arange(H) // (H // G)
    return values(
        answer,
        (q, keys, cached, window),
        {"o": attention.attend(q[None, None], keys[None], cached[None], window)[0][0, 0]},
        sizes={"S": S, "H": H, "G": G, "C": C},
        mistakes={
            "o": {
                "this ignores the window.": attend(S, groups, C**-0.5),
                "the window is one too wide: a token sees w tokens in total, including itself.": attend(
                    window + 1, groups, C**-0.5
                ),
                "the window is one too narrow: a token sees w tokens in total, including itself.": attend(
                    window - 1, groups, C**-0.5
                ),
                "the heads are dealt out to the groups like cards, but neighbouring heads share a key.": attend(
                    window, np.arange(H) % G, C**-0.5
                ),
                "1/√C is missing.": attend(window, groups, 1.0),
                "the scores are divided by C, not by its root.": attend(window, groups, 1 / C),
                "the scores are multiplied by √C, not divided by it.": attend(window, groups, C**0.5),
                "these are the oldest tokens of the cache, but the window holds the newest.": attend(
                    S, groups, C**-0.5, last=window
                ),
                "all query heads read the first key/value head.": attend(window, 0 * groups, C**-0.5),
            }
        },
    )


def entropy_backward(answer: Answer) -> Report:
    """(logits, temperature) → dlogits, dtemperature of the entropy of softmax(logits / temperature)."""
    rng = np.random.default_rng(12)
    V, temperature = 5, 0.7
    logits = rng.standard_normal(V)

    def entropy(logits: Array, temperature: Array) -> Array:
        p = _softmax(logits / temperature)
        return -(p * np.log(p)).sum()

    p = _softmax(logits / temperature)
    surprise = -np.log(p)
    H = (p * surprise).sum()
    variance = (p * logits**2).sum() - (p * logits).sum() ** 2
    return gradients(
        answer,
        (logits, temperature),
        entropy,
        {"logits": logits, "temperature": np.array(temperature)},
        sizes={"V": V},
        mistakes={
            "dlogits": {
                "this is the gradient with respect to z/τ; one step is left to z.": p * (surprise - H),
                "the gradient must go back through the softmax: a mean is missing.": p * surprise / temperature,
                "this is the gradient with respect to p; the softmax is left.": surprise - 1,
                "the mean must be weighted with p.": p * (surprise - surprise.mean()) / temperature,
                "the sign is wrong: a likely token that becomes likelier makes the model more certain.": (
                    p * (H - surprise) / temperature
                ),
            },
            "dtemperature": {
                "how does z/τ change with τ? One power of τ is missing.": variance / temperature**2,
                "the derivative of z/τ with respect to τ is −z/τ², and dH/d(z/τ) contains another 1/τ: powers of τ are "
                "missing.": variance / temperature,
                "all powers of τ are missing.": variance,
                "the sign is wrong: what does a higher temperature do to a distribution?": -variance / temperature**3,
                "this is the mean square of the logits, but a constant added to all of them must not matter.": (
                    (p * logits**2).sum() / temperature**3
                ),
                "the variance of the logits must be weighted with p.": logits.var() / temperature**3,
            },
        },
    )


def _softmax(z: Array) -> Array:
    """Softmax along the last axis."""
    weights: Array = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _scaled(p: Array) -> Array:
    """p scaled to sum to one, where it can be."""
    return p / (p.sum() or 1)
