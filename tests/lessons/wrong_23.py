"""Wrong answers to the exercises of lesson 23, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_23 as check


def moved(changed=None, keep=False, which=lambda T: np.tri(T, k=-1, dtype=bool), transpose=False, after=False):
    """The right answer but for one thing."""
    changed = changed or (lambda a, b: abs(a - b).max(1) > 1e-9)

    def moved_earlier(layer, x, new):
        T = len(x)
        found, now = np.zeros((T, T), bool), x.copy()
        for s in range(T):
            now = now.copy() if keep else x.copy()
            now[s] = new[s]
            if after:
                now[s:] = new[s:]
            found[s] = changed(layer(now), layer(x))
        found &= which(T)
        return found.T if transpose else found

    return moved_earlier


def moved_by_a_batch(layer, x, new):
    T = len(x)
    tried = np.where(np.eye(T, dtype=bool)[:, :, None], new, x)  # (T, T, D)
    change = np.stack([layer(one) for one in tried]) - layer(x)
    return np.tril(~np.isclose(change, 0, atol=1e-8).all(2), -1)


def moved_one_by_one(layer, x, new):
    T = len(x)
    return [
        [
            t < s and not np.allclose(layer(np.concatenate([x[:s], new[s : s + 1], x[s + 1 :]]))[t], layer(x)[t])
            for t in range(T)
        ]
        for s in range(T)
    ]


def chosen(quota=lambda K, n, T, E: -(-K * n // E), padding=False, sign=1, latest=False, cut=False):
    """Expert choice, right but for one thing."""

    def choose_tokens(p, real, K):
        B, T, E = p.shape
        taken = np.zeros(p.shape, bool)
        for b in range(B):
            ranked = p[b] * sign if padding else np.where(real[b][:, None], p[b] * sign, -2)
            ranked = ranked[::-1] if latest else ranked
            best = np.argsort(-ranked, axis=0, kind="stable")[: quota(K, int(real[b].sum()), T, E)]
            np.put_along_axis(taken[b], T - 1 - best if latest else best, True, axis=0)
        return taken & real[:, :, None] if cut else taken

    return choose_tokens


def tokens_choose(p, real, K):
    return np.argsort(np.argsort(-p, axis=2), axis=2) < K


def real_tokens_choose(p, real, K):
    return tokens_choose(p, real, K) & real[:, :, None]


def from_the_whole_batch(p, real, K):
    B, T, E = p.shape
    c = sum(-(-K * int(n) // E) for n in real.sum(1))
    ranked = np.where(real[:, :, None], p, -1).reshape(B * T, E)
    taken = np.zeros((B * T, E), bool)
    np.put_along_axis(taken, np.argsort(-ranked, axis=0, kind="stable")[:c], True, axis=0)
    return taken.reshape(B, T, E)


def all_of_equal_ones(p, real, K):
    B, T, E = p.shape
    taken = np.zeros(p.shape, bool)
    for b, n in enumerate(real.sum(1)):
        ranked = np.where(real[b][:, None], p[b], -1)
        taken[b] = ranked >= -np.sort(-ranked, axis=0)[-(-K * n // E) - 1]
    return taken & real[:, :, None]


def expert_by_expert(p, real, K):
    B, T, E = p.shape
    taken = np.zeros(p.shape, bool)
    for b in range(B):
        tokens = [t for t in range(T) if real[b, t]]
        for e in range(E):
            for t in sorted(tokens, key=lambda t: -p[b, t, e])[: -(-K * len(tokens) // E)]:
                taken[b, t, e] = True
    return taken


def by_counting_better_ones(p, real, K):
    """A token is taken if fewer than c real tokens are better, or equal and earlier."""
    B, T, E = p.shape
    c = np.ceil(K * real.sum(1) / E)[:, None, None]
    here, there = p[:, :, None, :], p[:, None, :, :]
    earlier = np.tri(T, k=-1, dtype=bool)[None, :, :, None]
    better = ((there > here) | ((there == here) & earlier)) & real[:, None, :, None]
    return (better.sum(2) < c) & real[:, :, None]


def weights(p, taken):
    kept = p * taken
    return kept / np.where(taken.any(1, keepdims=True), kept.sum(1, keepdims=True), 1)


def mean(w, dw):
    return (w * dw).sum(1, keepdims=True)


def raw(p, taken, dw):
    return p * (taken * dw - (p * taken * dw).sum(1, keepdims=True))


def no_mean(p, taken, dw):
    return weights(p, taken) * dw


def with_p(p, taken, dw):
    return taken * p * (dw - mean(weights(p, taken), dw))


def all_experts(p, taken, dw):
    return p * (taken * dw - mean(weights(p, taken), dw))


def plain_mean(p, taken, dw):
    among = (taken * dw).sum(1, keepdims=True) / np.maximum(taken.sum(1, keepdims=True), 1)
    return weights(p, taken) * (dw - among)


def over_tokens(p, taken, dw):
    w = weights(p, taken)
    return w * (dw - (w * dw).sum(0))


def wrong_way(p, taken, dw):
    w = weights(p, taken)
    return w * (mean(w, dw) - dw)


def by_jacobian(p, taken, dw):
    w = weights(p, taken)
    return np.stack([(np.diag(row) - np.outer(row, row)) @ d for row, d in zip(w, dw, strict=True)])


def by_the_quotient_rule(p, taken, dw):
    """First with respect to p, through the sum as well, then through the full softmax."""
    total = np.where(taken.any(1, keepdims=True), (p * taken).sum(1, keepdims=True), 1)
    dp = taken * (dw / total - (p * taken * dw).sum(1, keepdims=True) / total**2)
    return p * (dp - (p * dp).sum(1, keepdims=True))


def threshold(step=np.exp, fair=lambda tau, load, N, K: K * N / len(tau), minus=1.0, old=True, rate=0.05):
    def next_threshold(tau, load, N, K):
        factor = step(rate * (load / fair(tau, load, N, K) - minus))
        return tau * factor if old else factor

    return next_threshold


def threshold_one_by_one(tau, load, N, K):
    fair = K * N / len(tau)
    return [t * float(np.exp((n - fair) / (20 * fair))) for t, n in zip(tau, load, strict=True)]


def threshold_by_logarithm(tau, load, N, K):
    return np.exp(np.log(tau) + 0.05 * (len(tau) * load / (K * N) - 1))


def softmax(L, axis):
    p = np.exp(L - L.max(axis, keepdims=True))
    return p / p.sum(axis, keepdims=True)


def joint(L, *axes):
    return np.exp(L) / np.exp(L).sum(axes, keepdims=True)


def transposed(L):
    return np.swapaxes(softmax(np.swapaxes(L, 1, 2), 2), 1, 2), softmax(L, -1)


def sequence_by_sequence(L):
    return np.stack([softmax(one, 0) for one in L]), np.stack([softmax(one, 1) for one in L])


WRONG = {
    check.moved_earlier: [
        (moved(which=lambda T: np.ones((T, T), bool)), "from s on too"),
        (moved(which=lambda T: np.tri(T, dtype=bool)), "itself may move"),
        (moved(transpose=True), "transpose"),
        (moved(which=lambda T: ~np.tri(T, dtype=bool)), "outputs after s"),
        (moved(keep=True), "still there"),
        (moved(lambda a, b: abs((a - b).sum(1)) > 1e-9), "number by number"),
        (moved(lambda a, b: abs(a - b)[:, 0] > 1e-9), "a leak that this does not find"),
        (moved(lambda a, b: abs(a - b)[:, -1] > 1e-9), "a leak that this does not find"),
        (moved(after=True), "replace token s alone"),
        (moved(lambda a, b: (a != b).any(1)), "rounding"),
    ],
    check.choose_tokens: [
        (tokens_choose, "rank along T"),
        (real_tokens_choose, "padding none"),
        (chosen(padding=True), "below every real token"),
        (chosen(quota=lambda K, n, T, E: -(-K * T // E), cut=True), "counts padding: T_b"),
        (chosen(quota=lambda K, n, T, E: -(-K * T // E), padding=True), "and padding is taken"),
        (chosen(quota=lambda K, n, T, E: K * n // E), "rounded down"),
        (chosen(quota=lambda K, n, T, E: K * n // E + 1), "leaves a whole number"),
        (chosen(quota=lambda K, n, T, E: round(K * n / E)), "to the nearest"),
        (all_of_equal_ones, "takes exactly"),
        (chosen(quota=lambda K, n, T, E: -(-n // E)), "K is missing"),
        (from_the_whole_batch, "all sequences together"),
        (chosen(sign=-1), "worst tokens"),
        (chosen(latest=True), "earlier one should win"),
    ],
    check.renormalized_backward: [
        (lambda p, taken, dw: raw(p, taken, dw / np.maximum((p * taken).sum(1, keepdims=True), 1e-9)), "of its own"),
        (raw, "raw weights"),
        (no_mean, "mean term is missing"),
        (with_p, "only after the division"),
        (all_experts, "do not enter w"),
        (plain_mean, "weighted with w"),
        (over_tokens, "over tokens"),
        (wrong_way, "wrong way"),
        (lambda p, taken, dw: taken * dw, "softmax is left"),
    ],
    check.next_threshold: [
        (threshold(rate=-0.05), "wrong way"),
        (threshold(fair=lambda tau, load, N, K: N / len(tau)), "not N / E"),
        (lambda tau, load, N, K: tau * np.exp(0.05 * (load - K * N / len(tau))), "their difference"),
        (threshold(fair=lambda tau, load, N, K: load.mean()), "mean load"),
        (lambda tau, load, N, K: tau + 0.05 * (load * len(tau) / (K * N) - 1), "this adds"),
        (lambda tau, load, N, K: tau * np.exp(0.05 * np.sign(load - K * N / len(tau))), "only the direction"),
        (threshold(fair=lambda tau, load, N, K: K * N // len(tau)), "here it is rounded"),
        (threshold(rate=1), "rate η = 0.05 is missing"),
        (threshold(fair=lambda tau, load, N, K: N), "share of all N tokens"),
        (threshold(minus=0), "− 1 is missing"),
        (threshold(old=False), "old τ is missing"),
        (threshold(step=lambda s: 1 + s), "use exp"),
    ],
    check.two_softmaxes: [
        (lambda L: (softmax(L, 0), softmax(L, 2)), "over the sequences of the batch: strangers"),
        (lambda L: (joint(L, 0, 1), softmax(L, 2)), "tokens of all sequences"),
        (lambda L: (softmax(L, 2), softmax(L, 2)), "divides its attention among tokens"),
        (lambda L: (softmax(L, 1), softmax(L, 0)), "C: this softmax is over the sequences"),
        (lambda L: (softmax(L, 1), softmax(L, 1)), "divides its attention among slots"),
        (lambda L: (softmax(L, 1), joint(L, 1, 2)), "tokens and slots together"),
        (lambda L: (softmax(L, 2), softmax(L, 1)), "wrong order"),
    ],
}

RIGHT = {
    check.moved_earlier: [moved_by_a_batch, moved_one_by_one],
    check.choose_tokens: [expert_by_expert, by_counting_better_ones],
    check.renormalized_backward: [by_jacobian, by_the_quotient_rule],
    check.next_threshold: [threshold_one_by_one, threshold_by_logarithm],
    check.two_softmaxes: [transposed, sequence_by_sequence],
}
