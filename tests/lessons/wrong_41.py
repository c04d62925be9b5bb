"""Wrong answers to the exercises of lesson 41, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_41 as check


def mask(first=-1, last=-1, prompt_too=False, padding_too=False, flip=False):
    """The right mask but for one thing."""

    def answer_mask(prompt, answer, T):
        at = np.arange(T)
        start = 0 * prompt[:, None] if prompt_too else prompt[:, None] + first
        stop = 0 * prompt[:, None] + T if padding_too else (prompt + answer)[:, None] + last
        found = ((at >= start) & (at < stop)).astype(float)
        return 1 - found if flip else found

    return answer_mask


def mask_by_loop(prompt, answer, T):
    m = np.zeros((len(prompt), T), int)
    for b in range(len(prompt)):
        for t in range(T):
            m[b, t] = prompt[b] <= t + 1 < prompt[b] + answer[b]
    return m


def mask_by_shift(prompt, answer, T):
    tokens = np.zeros((len(prompt), T + 1))
    for row, start, count in zip(tokens, prompt, answer, strict=True):
        row[start : start + count] = 1
    return tokens[:, 1:]


def one_row(prompt, answer, T):
    return mask()(prompt, answer, T)[0]


def sigma(mu):
    return 1 / (1 + np.exp(-mu))


def doubt(loss=None, slope=None, best=None):
    """The right answer but for what is given."""

    def doubt(mu, epsilon):
        right, wrong = np.logaddexp(0, -mu), np.logaddexp(0, mu)
        return (
            (1 - epsilon) * right + epsilon * wrong if loss is None else loss(right, wrong, epsilon),
            sigma(mu) - 1 + epsilon if slope is None else slope(sigma(mu), epsilon),
            np.log((1 - epsilon) / epsilon) if best is None else best(epsilon),
        )

    return doubt


def doubt_from_sigma(mu, epsilon):
    p = sigma(mu)
    return (
        -((1 - epsilon) * np.log(p) + epsilon * np.log(1 - p)),
        (1 - epsilon) * (p - 1) + epsilon * p,
        -np.log(epsilon / (1 - epsilon)),
    )


def doubt_as_a_list(mu, epsilon):
    loss = np.log(1 + np.exp(mu)) - (1 - epsilon) * mu
    return [loss, [float(p) + epsilon - 1 for p in sigma(mu)], np.log(1 - epsilon) - np.log(epsilon)]


def ipo(inside=True, outside=True, mean=True, square=2.0, target=lambda beta: 1 / (2 * beta), sign=1, swapped=False):
    """The right gradient but for one thing."""

    def ipo_backward(delta_w, delta_l, length_w, length_l, beta):
        h = delta_w / length_w - delta_l / length_l if inside else delta_w - delta_l
        dh = sign * square * (h - target(beta)) / (len(h) if mean else 1)
        if not outside:
            return dh, -dh
        return (dh / length_l, -dh / length_w) if swapped else (dh / length_w, -dh / length_l)

    return ipo_backward


def ipo_pair_by_pair(delta_w, delta_l, length_w, length_l, beta):
    found = np.zeros((2, len(delta_w)))
    for p in range(len(delta_w)):
        off = delta_w[p] / length_w[p] - delta_l[p] / length_l[p] - 0.5 / beta
        found[:, p] = 2 * off / length_w[p], -2 * off / length_l[p]
    return tuple(found / len(delta_w))


def ipo_by_a_factor(delta_w, delta_l, length_w, length_l, beta):
    h = delta_w / length_w - delta_l / length_l
    factor = (2 * beta * h - 1) / (beta * len(h))
    return factor / length_w, -factor / length_l


WRONG = {
    check.answer_mask: [
        (mask(0, 0), "place t predicts token t + 1"),
        (mask(-1, 0), "stop one place earlier"),
        (mask(0, -1), "begin one place earlier"),
        (mask(-1, -2), "end token does not count"),
        (mask(-2, -2), "one place too early"),
        (mask(prompt_too=True), "only the answer counts"),
        (mask(padding_too=True), "padding"),
        (mask(flip=True), "complement"),
        (one_row, "an axis is missing"),
    ],
    check.doubt: [
        (doubt(loss=lambda right, wrong, e: e * right + (1 - e) * wrong), "belongs to"),
        (doubt(loss=lambda right, wrong, e: right), "ε is not used"),
        (doubt(loss=lambda right, wrong, e: (1 - e) * right - e * wrong), "subtracted"),
        (doubt(loss=lambda right, wrong, e: ((1 - e) * right + e * wrong).mean()), "give the loss of each"),
        (doubt(slope=lambda s, e: (1 - e) * (s - 1)), "second term is forgotten"),
        (doubt(slope=lambda s, e: (1 - e) * (s - 1) - e * s), "not −σ(μ)"),
        (doubt(slope=lambda s, e: s - 1), "slope without doubt"),
        (doubt(slope=lambda s, e: 1 - s - e), "sign is wrong"),
        (doubt(slope=lambda s, e: s - 1 - e), "pulls the margin back"),
        (doubt(best=lambda e: np.log(e / (1 - e))), "negative"),
        (doubt(best=lambda e: 1 - e), "probability"),
        (doubt(best=lambda e: -np.log(e)), "1 − ε is forgotten"),
        (doubt(best=lambda e: (1 - e) / e), "odds"),
    ],
    check.ipo_backward: [
        (ipo(inside=False), "forgotten inside h"),
        (ipo(inside=False, outside=False), "not used at all"),
        (ipo(outside=False), "divide by |y|"),
        (ipo(mean=False), "the loss is their mean"),
        (ipo(square=1.0), "2 of the square"),
        (ipo(target=lambda beta: 0), "is missing"),
        (ipo(target=lambda beta: 1 / beta), "not 1/β"),
        (ipo(target=lambda beta: beta / 2), "not β/2"),
        (ipo(sign=-1), "sign is wrong"),
        (ipo(swapped=True), "its own length"),
    ],
}

RIGHT = {
    check.answer_mask: [mask_by_loop, mask_by_shift],
    check.doubt: [doubt_from_sigma, doubt_as_a_list],
    check.ipo_backward: [ipo_pair_by_pair, ipo_by_a_factor],
}
