"""Wrong answers to the exercises of lesson 12, each with words that its hint must hold, and unusual right ones."""

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


def model_width(config, tokens, size):
    return 2 * config.layers * config.width * kept(config, tokens) * size


def one_layer(config, tokens, size):
    return 2 * config.kv_heads * config.head_width * kept(config, tokens) * size


def numbers_not_bytes(config, tokens, size):
    return 2 * config.layers * config.kv_heads * config.head_width * kept(config, tokens)


def bits(config, tokens, size):
    return 16 * config.layers * config.kv_heads * config.head_width * kept(config, tokens) * size


def no_heads(config, tokens, size):
    return 2 * config.layers * config.head_width * kept(config, tokens) * size


def none_is_no_number(config, tokens, size):
    return 2 * config.layers * config.kv_heads * config.head_width * min(tokens, config.window) * size


def within_the_context(config, tokens, size):
    seen = min(tokens, config.window or config.context)
    return float(sum(2 * seen * size * config.kv_heads * config.head_width for _ in range(config.layers)))


def from_an_array(config, tokens, size):
    rows = np.arange(tokens)[-(config.window or tokens) :]
    one = np.zeros((2, config.kv_heads, config.head_width), dtype=f"f{size}")
    return np.int64(one.nbytes) * len(rows) * config.layers


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


def threshold_from_the_other_end(logits, min_p):
    p = softmax(logits)
    p = p * (p >= (1 - min_p) * p.max())
    return p / p.sum()


def distance_of_logits(logits, min_p):
    p = softmax(logits) * (logits >= logits.max() - min_p)
    return p / p.sum()


def no_filter(logits, min_p):
    return softmax(logits)


def in_logits(logits, min_p):
    return softmax(np.where(logits - logits.max() >= np.log(min_p), logits, -np.inf))


def one_by_one(logits, min_p):
    p = np.exp(logits)
    best = max(p)
    kept = [value if value / best >= min_p else 0.0 for value in p]
    return [value / sum(kept) for value in kept]


def attend(q, keys, values, share, scale):
    weights = softmax((q * keys[:, share]).sum(-1).T * scale)
    return np.einsum("hs,shc->hc", weights, values[:, share])


def groups(q, keys):
    return np.arange(len(q)) // (len(q) // keys.shape[1])


def no_window(q, keys, values, window):
    return attend(q, keys, values, groups(q, keys), q.shape[1] ** -0.5)


def window_and_itself(q, keys, values, window):
    return attend(q, keys[-window - 1 :], values[-window - 1 :], groups(q, keys), q.shape[1] ** -0.5)


def window_without_itself(q, keys, values, window):
    seen = window - 1
    return attend(q, keys[-seen:], values[-seen:], groups(q, keys), q.shape[1] ** -0.5)


def oldest(q, keys, values, window):
    return attend(q, keys[:window], values[:window], groups(q, keys), q.shape[1] ** -0.5)


def divided_by_width(q, keys, values, window):
    return attend(q, keys[-window:], values[-window:], groups(q, keys), 1 / q.shape[1])


def multiplied_by_root(q, keys, values, window):
    return attend(q, keys[-window:], values[-window:], groups(q, keys), q.shape[1] ** 0.5)


def one_head_for_all(q, keys, values, window):
    return attend(q, keys[-window:], values[-window:], 0 * groups(q, keys), q.shape[1] ** -0.5)


def head_by_head(q, keys, values, window):
    H, C = q.shape
    each, S = H // keys.shape[1], len(keys)
    rows = []
    for h in range(H):
        seen = [s for s in range(S) if S - 1 - s < window]
        weights = softmax(np.array([q[h] @ keys[s, h // each] for s in seen]) / np.sqrt(C))
        rows.append(sum(w * values[s, h // each] for w, s in zip(weights, seen, strict=True)))
    return rows


def repeated_and_masked(q, keys, values, window):
    each = len(q) // keys.shape[1]
    k, v = np.repeat(keys, each, axis=1), np.repeat(values, each, axis=1)
    scores = np.einsum("hc,shc->hs", q, k) / q.shape[1] ** 0.5
    scores[:, : max(0, len(k) - window)] = -np.inf
    return np.einsum("hs,shc->hc", softmax(scores), v)


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


def both_signs_wrong(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return p * ((p * surprise).sum() - surprise) / temperature, variance / temperature**3


def unweighted_mean(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return p * (surprise - surprise.mean()) / temperature, variance / temperature**3


def scaled_logits(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return p * (surprise - (p * surprise).sum()), variance / temperature**3


def mean_square(logits, temperature):
    p, surprise, _ = parts(logits, temperature)
    return p * (surprise - (p * surprise).sum()) / temperature, (p * logits**2).sum() / temperature**3


def entropy_swapped(logits, temperature):
    p, surprise, variance = parts(logits, temperature)
    return variance / temperature**3, p * (surprise - (p * surprise).sum()) / temperature


def through_the_jacobian(logits, temperature):
    p = softmax(logits / temperature)
    ds = (np.diag(p) - np.outer(p, p)) @ (-np.log(p) - 1)
    return ds / temperature, np.dot(ds, -logits / temperature**2)


def by_covariance(logits, temperature):
    p = softmax(logits / temperature)
    z = logits - p @ logits
    return [-p * z / temperature**2, np.array([(p * z * z).sum() / temperature**3])[0]]


WRONG = {
    check.cache_bytes: [
        (keys_only, "half of it"),
        (every_query_head, "query heads"),
        (window_ignored, "not kept"),
        (window_always_full, "shorter than the window"),
        (model_width, "width of the model"),
        (one_layer, "every layer"),
        (numbers_not_bytes, "takes some bytes"),
        (bits, "counts bits"),
        (no_heads, "heads are missing"),
        (none_is_no_number, "TypeError"),
    ],
    check.min_p_probabilities: [
        (threshold_not_relative, "share of the largest"),
        (threshold_not_relative_and_perhaps_nothing_left, "share of the largest"),
        (not_scaled, "sum to one"),
        (strictly_likelier, "with ≥, not with >"),
        (threshold_from_the_other_end, "not 1 − min_p"),
        (distance_of_logits, "ratio of probabilities"),
        (no_filter, "nothing was filtered"),
    ],
    check.attend_one: [
        (no_window, "ignores the window"),
        (window_and_itself, "one too wide"),
        (dealt_like_cards, "like cards"),
        (not_scaled_scores, "1/√C"),
        (window_without_itself, "one too narrow"),
        (oldest, "oldest tokens"),
        (divided_by_width, "not by its root"),
        (multiplied_by_root, "not divided"),
        (one_head_for_all, "first key/value head"),
    ],
    check.entropy_backward: [
        (softmax_forgotten, "the softmax is left"),
        (mean_forgotten, "a mean is missing"),
        (one_power_of_temperature, "power of τ"),
        (cooling, "what does a higher temperature do"),
        (both_signs_wrong, "sign is wrong"),
        (unweighted_mean, "weighted with p"),
        (scaled_logits, "with respect to z/τ"),
        (mean_square, "a constant added to all"),
        (entropy_swapped, "wrong order"),
    ],
}
RIGHT = {
    check.cache_bytes: [within_the_context, from_an_array],
    check.min_p_probabilities: [in_logits, one_by_one],
    check.attend_one: [head_by_head, repeated_and_masked],
    check.entropy_backward: [through_the_jacobian, by_covariance],
}
