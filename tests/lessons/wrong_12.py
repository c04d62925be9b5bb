"""Wrong answers to the exercises of lesson 12, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_12 as check


def kept(config, tokens):
    return tokens if config.window is None else min(tokens, config.window)


def keys_only(config, tokens, size):
    return config.layers * config.kv_heads * config.head_width * kept(config, tokens) * size


def every_query_head(config, tokens, size):
    return 2 * config.layers * config.heads * config.head_width * kept(config, tokens) * size


def window_ignored(config, tokens, size):
    return 2 * config.layers * config.kv_heads * config.head_width * tokens * size


def window_always_full(config, tokens, size):
    return 2 * config.layers * config.kv_heads * config.head_width * (config.window or tokens) * size


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def threshold_not_relative(logits, min_p):
    p = softmax(logits)
    p[p < min_p] = 0
    return p / max(p.sum(), 1e-30)


def threshold_not_relative_and_perhaps_nothing_left(logits, min_p):
    p = softmax(logits)
    p[p < min_p] = 0
    return p / p.sum()


def not_scaled(logits, min_p):
    p = softmax(logits)
    return p * (p >= min_p * p.max())


def strictly_likelier(logits, min_p):
    p = softmax(logits)
    p = p * (p > min_p * p.max())
    return p / max(p.sum(), 1e-30)


def attend(q, keys, values, share, scale):
    weights = softmax((q * keys[:, share]).sum(-1).T * scale)
    return np.einsum("hs,shc->hc", weights, values[:, share])


def groups(q, keys):
    return np.arange(len(q)) // (len(q) // keys.shape[1])


def no_window(q, keys, values, window):
    return attend(q, keys, values, groups(q, keys), q.shape[1] ** -0.5)


def window_and_itself(q, keys, values, window):
    return attend(q, keys[-window - 1 :], values[-window - 1 :], groups(q, keys), q.shape[1] ** -0.5)


def dealt_like_cards(q, keys, values, window):
    share = np.arange(len(q)) % keys.shape[1]
    return attend(q, keys[-window:], values[-window:], share, q.shape[1] ** -0.5)


def not_scaled_scores(q, keys, values, window):
    return attend(q, keys[-window:], values[-window:], groups(q, keys), 1)


def parts(logits, temperature):
    p = softmax(logits / temperature)
    return p, -np.log(p), (p * logits**2).sum() - (p * logits).sum() ** 2


def softmax_forgotten(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return surprise - 1, variance / temperature**3


def mean_forgotten(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return p * surprise / temperature, variance / temperature**3


def one_power_of_temperature(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return p * (surprise - (p * surprise).sum()) / temperature, variance / temperature**2


def cooling(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return p * (surprise - (p * surprise).sum()) / temperature, -variance / temperature**3


WRONG = {
    check.cache_bytes: [
        (keys_only, "half of it"),
        (every_query_head, "query heads"),
        (window_ignored, "not kept"),
        (window_always_full, "shorter than the window"),
    ],
    check.min_p_probabilities: [
        (threshold_not_relative, "share of the largest"),
        (threshold_not_relative_and_perhaps_nothing_left, "share of the largest"),
        (not_scaled, "sum to one"),
        (strictly_likelier, "with ≥, not with >"),
    ],
    check.attend_one: [
        (no_window, "ignores the window"),
        (window_and_itself, "one too wide"),
        (dealt_like_cards, "like cards"),
        (not_scaled_scores, "1/√C"),
    ],
    check.entropy_backward: [
        (softmax_forgotten, "the softmax is left"),
        (mean_forgotten, "a mean is missing"),
        (one_power_of_temperature, "power of τ"),
        (cooling, "what does a higher temperature do"),
    ],
}
