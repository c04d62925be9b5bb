"""Wrong answers to the exercises of lesson 09, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_09 as check


def rows(round_up=lambda counts, block: (-(-counts // block) * block).sum(), slots=lambda c: len(c) * c.max()):
    """The right numbers but for one thing."""

    def computed_rows(counts, block):
        return round_up(counts, block), slots(counts)

    return computed_rows


def place_in_queue(chosen, E):
    entries = chosen.reshape(-1)
    one_hot = entries[:, None] == np.arange(E)
    return (np.cumsum(one_hot, axis=0)[np.arange(len(entries)), entries] - 1).reshape(chosen.shape)


def one_too_high(chosen, E):
    counts = np.bincount(chosen.reshape(-1), minlength=E)
    return place_in_queue(chosen, E) + 1 + (np.cumsum(counts) - counts)[chosen]


def only_the_start(chosen, E):
    counts = np.bincount(chosen.reshape(-1), minlength=E)
    return (np.cumsum(counts) - counts)[chosen]


def first_choices_first(chosen, E):
    order = np.argsort(chosen.T.reshape(-1), kind="stable")
    return np.argsort(order).reshape(chosen.shape[::-1]).T


def the_order(chosen, E):
    return np.argsort(chosen.reshape(-1), kind="stable").reshape(chosen.shape)


def unweighted(x, weights, place, dz):
    return dz[place].sum(1), (x[:, None] * dz[place]).sum(2)


def as_it_stands(x, weights, place, dz):
    dz = dz.reshape(*weights.shape, -1)
    return (weights[:, :, None] * dz).sum(1), (x[:, None] * dz).sum(2)


def unsorted_weights_only(x, weights, place, dz):
    return (weights[:, :, None] * dz[place]).sum(1), (x[:, None] * dz.reshape(*weights.shape, -1)).sum(2)


def first_choice_only(x, weights, place, dz):
    return weights[:, :1] * dz[place[:, 0]], ...


def without_x(x, weights, place, dz):
    return (weights[:, :, None] * dz[place]).sum(1), dz[place].sum(2)


def renormalized(shared=True, mask=True, divide=True, softmax=False, by_weight=False, safe=True):
    """The right gradient but for one thing."""

    def renormalize_kept_backward(w, kept, dv):
        total = (kept * w).sum(1, keepdims=True)
        total = np.where(total > 0, total, 1) if safe else total
        with np.errstate(invalid="ignore"):
            v = kept * w / total
            dw = dv - shared * ((kept * w if by_weight else v) * dv).sum(1, keepdims=True)
            dw = dw / (total if divide else 1)
        alive = kept.any(1, keepdims=True)
        return v * dw * total if softmax else kept * dw if mask else alive * dw

    return renormalize_kept_backward


WRONG = {
    check.computed_rows: [
        (rows(lambda counts, block: (counts // block * block).sum()), "rounds down"),
        (rows(lambda counts, block: -(-counts.sum() // block) * block), "on its own"),
        (rows(lambda counts, block: ((counts // block + 1) * block).sum()), "no further block"),
        (rows(lambda counts, block: (-(-counts // block)).sum()), "about rows"),
        (rows(slots=lambda counts: counts.max()), "slots of one expert"),
        (rows(slots=lambda counts: counts.sum()), "fair share"),
    ],
    check.place_without_sorting: [
        (place_in_queue, "queue of the entry's own expert"),
        (one_too_high, "one too high"),
        (only_the_start, "where each expert begins"),
        (first_choices_first, "token by token"),
        (the_order, "its inverse"),
    ],
    check.weighted_input_backward: [
        (unweighted, "multiplied by its weight"),
        (as_it_stands, "sorted by expert"),
        (unsorted_weights_only, "sorted by expert"),
        (first_choice_only, "first of them"),
        (without_x, "lacks x"),
    ],
    check.renormalize_kept_backward: [
        (renormalized(shared=False), "second path"),
        (renormalized(mask=False), "has no gradient"),
        (renormalized(divide=False), "divides the gradient too"),
        (renormalized(softmax=True), "nothing was exponentiated"),
        (renormalized(by_weight=True), "weighted with v"),
        (renormalized(safe=False), "not finite"),
    ],
}
