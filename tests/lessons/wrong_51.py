"""Wrong answers to the exercises of lesson 51, each with words that its hint must hold, and unusual right ones."""

from itertools import combinations

import numpy as np

from minimoe.exercises import lesson_51 as check


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def soft(scale=lambda tau, z: tau / len(z), of=lambda z, told, tau: softmax(z / tau) - softmax(told / tau)):
    """The right gradient but for one thing."""

    def soft_backward(z, told, tau):
        return scale(tau, z) * of(z, told, tau)

    return soft_backward


def swapped_kl(z, told, tau):
    p, q = softmax(z / tau), softmax(told / tau)
    ratio = np.log(p / q)
    return p * (ratio - (p * ratio).sum(1, keepdims=True))


def soft_by_jacobian(z, told, tau):
    """Through dp = −p_t/p_s and the Jacobian of the softmax, token by token."""
    dz = np.zeros_like(z)
    for t in range(len(z)):
        p, q = softmax(z[None, t] / tau)[0], softmax(told[None, t] / tau)[0]
        dz[t] = tau**2 * (np.diag(p) - np.outer(p, p)) @ (-q / p) / tau / len(z)
    return dz


def soft_as_cross_entropy(z, told, tau):
    """The teacher's entropy is a constant, so only the cross-entropy with p_t is left."""
    q = softmax(told / tau)
    total = q.sum(1, keepdims=True)
    return (softmax(z / tau) * total - q) * tau / z.shape[0]


def reverse(of):
    """dz from p_s, p_t, the logarithm of their ratio and the KL of each token, over the number of tokens."""

    def reverse_backward(z, told):
        p, q = softmax(z), softmax(told)
        ratio = np.log(p) - np.log(q)
        return of(p, q, ratio, (p * ratio).sum(1, keepdims=True)) / len(z)

    return reverse_backward


def reverse_by_jacobian(z, told):
    dz = np.zeros_like(z)
    for t in range(len(z)):
        p, q = softmax(z[None, t])[0], softmax(told[None, t])[0]
        dz[t] = (np.diag(p) - np.outer(p, p)) @ (np.log(p / q) + 1) / len(z)
    return dz


def reverse_from_logits(z, told):
    """log p_s/p_t is z − told up to a number for each token, which the mean takes away."""
    p = softmax(z)
    difference = z - told
    return p * (difference - (p * difference).sum(1, keepdims=True)) / len(z)


def chosen(measure=np.linalg.norm, best=min, weights=None, lost=False, after=lambda kept, E: kept):
    """The right search but for one thing."""

    def layer(logits, outputs, kept):
        z = logits if lost else np.where(np.isin(np.arange(logits.shape[1]), kept), logits, -np.inf)
        two = np.argsort(-z, axis=1)[:, :2]
        near = np.take_along_axis(logits, two, axis=1)
        w = softmax(near) if weights is None else weights(near, logits)
        if lost:
            w = w * np.isin(two, kept)
        return (w[..., None] * outputs[two, np.arange(len(z))[:, None]]).sum(1)

    def best_experts(logits, outputs, r):
        E = len(outputs)
        whole = layer(logits, outputs, range(E))
        subsets = [list(kept) for kept in combinations(range(E), r)]
        found = best(subsets, key=lambda kept: measure(layer(logits, outputs, kept) - whole))
        return after(found, E)

    return best_experts


def answers(logits, outputs, kept, active=2):
    """F' of the experts that are kept, by another way than the check's."""
    kept = list(kept)
    order = np.argsort(-logits[:, kept], axis=1)[:, :active]
    w = softmax(np.take_along_axis(logits[:, kept], order, axis=1))
    return np.einsum("nk,nkd->nd", w, outputs[np.array(kept)[order], np.arange(len(logits))[:, None]])


def one_after_the_other(logits, outputs, r):
    """Greedy: the expert that is missed least goes first, then the next one."""
    whole, kept = answers(logits, outputs, range(len(outputs))), list(range(len(outputs)))
    while len(kept) > r:
        fewer = [[e for e in kept if e != gone] for gone in kept]
        kept = min(fewer, key=lambda some: np.linalg.norm(answers(logits, outputs, some) - whole))
    return kept


def each_alone(logits, outputs, r):
    E = len(outputs)
    whole = answers(logits, outputs, range(E))
    without = [answers(logits, outputs, [e for e in range(E) if e != gone]) - whole for gone in range(E)]
    return np.sort(np.argsort([-np.linalg.norm(difference) for difference in without])[:r])


def one_expert_per_token(logits, outputs, r):
    E = len(outputs)
    whole = answers(logits, outputs, range(E), active=1)
    return min(
        combinations(range(E), r),
        key=lambda kept: np.linalg.norm(answers(logits, outputs, kept, active=1) - whole),
    )


def used_most(logits, outputs, r):
    counts = np.bincount(np.argsort(-logits, axis=1)[:, :2].reshape(-1), minlength=len(outputs))
    return np.sort(np.argsort(-counts, kind="stable")[:r])


def largest(logits, outputs, r):
    return np.sort(np.argsort(-np.linalg.norm(outputs, axis=(1, 2)))[:r])


def one_token_at_a_time(logits, outputs, r):
    """Loops, squared errors, and an array of the experts as the result."""

    def answer(t, kept):
        a, b = sorted(kept, key=lambda e: -logits[t, e])[:2]
        w = 1 / (1 + np.exp(logits[t, b] - logits[t, a]))
        return w * outputs[a, t] + (1 - w) * outputs[b, t]

    errors = {}
    for kept in combinations(range(len(outputs)), r):
        differences = [answer(t, kept) - answer(t, range(len(outputs))) for t in range(len(logits))]
        errors[kept] = sum(d @ d for d in differences)
    return np.array(min(errors, key=errors.get))


def removed_the_other_way(logits, outputs, r):
    """The same search over what is removed."""
    E = len(outputs)
    search = chosen()
    kept = search(logits, outputs, r)
    return [e for e in range(E) if e in set(kept)]


def skip(where=lambda w, ratio: ratio < np.median(ratio), first=lambda w: w.sum(1), turned=False):
    """The right weights but for one thing."""

    def skip_second(w):
        alone = np.stack([first(w), np.zeros(len(w))], axis=1)
        return np.where(where(w, w[:, 1] / w[:, 0])[:, None], alone[:, ::-1] if turned else alone, w)

    return skip_second


def skip_in_a_loop(w):
    beta = np.median([b / a for a, b in w])
    return [[a + b, 0] if b < beta * a else [a, b] for a, b in w]


def skip_by_moving(w):
    moved = w[:, 1] * (w[:, 1] / w[:, 0] < np.median(w[:, 1] / w[:, 0]))
    return w + np.outer(moved, [1, -1])


WRONG = {
    check.soft_backward: [
        (soft(scale=lambda tau, z: 1 / tau / len(z)), "τ² of the loss is missing"),
        (soft(scale=lambda tau, z: tau**2 / len(z)), "another 1/τ"),
        (soft(scale=lambda tau, z: tau / z.size), "over the tokens alone"),
        (soft(scale=lambda tau, z: tau), "divide by their number"),
        (soft(scale=lambda tau, z: -tau / len(z)), "the wrong way"),
        (soft(of=swapped_kl), "KL(p_s‖p_t)"),
        (soft(of=lambda z, told, tau: softmax(z / tau) - softmax(told)), "the teacher's logits must be divided"),
        (soft(of=lambda z, told, tau: softmax(z) - softmax(told / tau)), "the student's logits must be divided"),
        (soft(of=lambda z, told, tau: softmax(z) - softmax(told)), "both logits must be divided"),
        (soft(of=lambda z, told, tau: softmax(z * tau) - softmax(told * tau)), "not multiplied"),
        (soft(of=lambda z, told, tau: (softmax(z.T / tau) - softmax(told.T / tau)).T), "the last axis"),
        (soft(scale=lambda tau, z: tau / z.shape[1]), "not over the V entries"),
    ],
    check.reverse_backward: [
        (reverse(lambda p, q, ratio, kl: p - q), "KL(p_t‖p_s)"),
        (reverse(lambda p, q, ratio, kl: p * ratio), "subtract the KL of the token"),
        (reverse(lambda p, q, ratio, kl: p * (ratio + 1 - kl)), "cancels"),
        (reverse(lambda p, q, ratio, kl: p * (ratio + 1)), "mean term of the softmax"),
        (reverse(lambda p, q, ratio, kl: ratio - kl), "factor p_s is missing"),
        (reverse(lambda p, q, ratio, kl: p * (ratio - ratio.mean(1, keepdims=True))), "weighted with p_s"),
        (reverse(lambda p, q, ratio, kl: p * (ratio - kl.mean())), "its own KL"),
        (reverse(lambda p, q, ratio, kl: p * (ratio + (q * ratio).sum(1, keepdims=True))), "weighted with p_s"),
        (
            reverse(lambda p, q, ratio, kl: p * (np.log(p) - (p * np.log(p)).sum(1, keepdims=True))),
            "the term with log p_t is missing",
        ),
        (reverse(lambda p, q, ratio, kl: p * (ratio - kl) * len(p) / p.shape[1]), "not over the V entries"),
        (reverse(lambda p, q, ratio, kl: q * (ratio - kl)), "not of the teacher"),
        (reverse(lambda p, q, ratio, kl: p * (ratio - kl) * len(p)), "divide by their number"),
        (reverse(lambda p, q, ratio, kl: p * (kl - ratio)), "the wrong way"),
    ],
    check.best_experts: [
        (used_most, "used most"),
        (chosen(best=max), "largest error"),
        (
            chosen(weights=lambda near, logits: np.exp(near) / np.exp(logits).sum(1, keepdims=True)),
            "softmax over the two",
        ),
        (chosen(lost=True), "goes to its next best one"),
        (chosen(measure=lambda d: abs(d.sum())), "must not cancel"),
        (chosen(after=lambda kept, E: [e for e in range(E) if e not in kept]), ""),
        (largest, "norm of an expert's output"),
        (one_after_the_other, "try all subsets"),
        (each_alone, "when each is removed alone"),
        (one_expert_per_token, "each token has two experts"),
        (chosen(measure=lambda d: np.linalg.norm(d, axis=1).sum()), "adds up sizes, or the norms of the tokens"),
        (chosen(measure=lambda d: abs(d).sum()), "adds up sizes, or the norms of the tokens"),
        (chosen(measure=lambda d: abs(d).max()), "not the largest size"),
    ],
    check.skip_second: [
        (skip(first=lambda w: w[:, 0]), "takes over the weight"),
        (skip(first=lambda w: np.ones(len(w))), "need not be 1"),
        (skip(where=lambda w, ratio: ratio < ratio.mean()), "not their mean"),
        (skip(where=lambda w, ratio: ratio > np.median(ratio)), "where it is strong"),
        (skip(where=lambda w, ratio: ratio <= np.median(ratio)), "exactly β"),
        (skip(where=lambda w, ratio: w[:, 1] < np.median(w[:, 1])), "not the second weight alone"),
        (skip(where=lambda w, ratio: w[:, 1] < np.median(ratio)), "not with β itself"),
        (skip(turned=True), "only the second expert"),
    ],
}

RIGHT = {
    check.soft_backward: [soft_by_jacobian, soft_as_cross_entropy],
    check.reverse_backward: [reverse_by_jacobian, reverse_from_logits],
    check.best_experts: [one_token_at_a_time, removed_the_other_way, chosen(measure=lambda d: (d**2).mean())],
    check.skip_second: [skip_in_a_loop, skip_by_moving],
}
