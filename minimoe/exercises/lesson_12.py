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
    windowed = ModelConfig(width=60, layers=3, heads=12, kv_heads=4, head_width=10, window=50)
    cases = ((preset("mixtral-8x7b").config, 32_768, 2), (windowed, 70, 4), (windowed, 20, 4))
    return first_failure(_cache_bytes(answer, *case) for case in cases)


def _cache_bytes(answer: Answer, config: ModelConfig, tokens: int, size: int) -> Report:
    kept = tokens if config.window is None else min(tokens, config.window)
    right = 2 * config.layers * config.kv_heads * config.head_width * kept * size
    hints = {
        "keys and values: half of it is missing.": right // 2,
        "this counts query heads; queries are used once and never stored.": (right // config.kv_heads * config.heads),
        "every layer has a cache of its own.": right // config.layers,
        "this is a count of numbers; each takes some bytes.": right // size,
        "every head has a width.": right // config.head_width,
        "tokens that no window will show again are not kept.": right // kept * tokens,
        "a text shorter than the window fills only a part of it.": right // kept * (config.window or kept),
    }
    mistakes = {hint: wrong for hint, wrong in hints.items() if wrong != right}
    return values(answer, (config, tokens, size), {"bytes": right}, mistakes={"bytes": mistakes})


def min_p_probabilities(answer: Answer) -> Report:
    """(logits, min_p) → probabilities, for a flat and for a peaked distribution."""
    rng = np.random.default_rng(12)
    flat = rng.standard_normal(9) * 0.5
    cases = ((3 * flat, 0.2), (flat, 0.5), (flat, 1.0))
    return first_failure(_min_p(answer, *case) for case in cases)


def _min_p(answer: Answer, logits: Array, min_p: float) -> Report:
    p = _softmax(logits)
    kept = p * (p >= min_p * p.max())
    return values(
        answer,
        (logits, min_p),
        {"p": kept / kept.sum()},
        sizes={"V": len(p)},
        mistakes={
            "p": {
                "the likeliest token itself has to stay: at least as likely, not likelier.": _scaled(
                    p * (p > min_p * p.max())
                ),
                "what is left does not sum to one.": kept,
                "min_p is a share of the largest probability, not a probability.": _scaled(p * (p >= min_p)),
                "min_p is a share of the largest probability, not a probability; and the sum is not one.": p
                * (p >= min_p),
                "this compares logits; their zero means nothing, so compare probabilities.": _scaled(
                    p * (logits >= min_p * logits.max())
                ),
                "nothing was filtered out.": p,
            }
        },
    )


def attend_one(answer: Answer) -> Report:
    """(q, keys, values, window) → o, for a window shorter and longer than what the cache holds."""
    return first_failure(_attend_one(answer, window) for window in (5, 30))


def _attend_one(answer: Answer, window: int) -> Report:
    rng = np.random.default_rng(12)
    S, H, G, C = 7, 6, 3, 4
    q = rng.standard_normal((H, C))
    keys, cached = rng.standard_normal((2, S, G, C))

    def attend(window: int, share: Array, scale: float) -> Array:
        """Head h reads key/value head share[h]."""
        first = max(0, S - window)
        seen, taken = keys[first:, share], cached[first:, share]  # (S', H, C)
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
                "the window is off by one: w tokens in all, with itself.": attend(window + 1, groups, C**-0.5),
                "the window is off by one: it sees itself too, so w tokens in all.": attend(
                    window - 1, groups, C**-0.5
                ),
                "the groups are dealt out like cards: neighbours should share a key, not every G-th head.": attend(
                    window, np.arange(H) % G, C**-0.5
                ),
                "1/√C is missing.": attend(window, groups, 1.0),
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
                "this is the gradient by z/τ; one step is left to z.": p * (surprise - H),
                "p itself still has to go back through the softmax: a mean is missing.": p * surprise / temperature,
                "this is the gradient by p; the softmax is still to come.": surprise - 1,
                "the mean has to be weighted with p.": p * (surprise - surprise.mean()) / temperature,
            },
            "dtemperature": {
                "how does z/τ feel τ? One power of τ is missing.": variance / temperature**2,
                "z/τ feels τ as −z/τ², and dH/d(z/τ) holds another 1/τ: powers of τ are missing.": (
                    variance / temperature
                ),
                "no power of τ is there at all.": variance,
                "the sign: what does heat do to a distribution?": -variance / temperature**3,
                "this is the mean square of the logits; a constant added to all of them must not matter.": (
                    (p * logits**2).sum() / temperature**3
                ),
                "the spread of the logits has to be weighted with p.": logits.var() / temperature**3,
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
