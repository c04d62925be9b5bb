"""Wrong answers to the exercises of lesson 09, each with words that its hint must hold, and unusual right ones."""

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


def inclusive_cumsum(chosen, E):
    return place_in_queue(chosen, E) + np.cumsum(np.bincount(chosen.reshape(-1), minlength=E))[chosen]


def inclusive_twice(chosen, E):
    return inclusive_cumsum(chosen, E) + 1


def by_the_inverse(x, weights, place, dz):
    dz = dz[np.argsort(place.reshape(-1)).reshape(place.shape)]
    return (weights[:, :, None] * dz).sum(1), (x[:, None] * dz).sum(2)


def mask_forgotten_outside(w, kept, dv):
    total = (kept * w).sum(1, keepdims=True)
    total = np.where(total > 0, total, 1)
    return (dv - (kept * w / total * dv).sum(1, keepdims=True)) / total


def all_in_the_denominator(w, kept, dv):
    total = w.sum(1, keepdims=True)
    return kept * (dv - (kept * w / total * dv).sum(1, keepdims=True)) / total


def one_segment_at_a_time(counts, block):
    blocks = 0
    for count in counts:
        while count > 0:
            blocks, count = blocks + 1, count - block
    return block * blocks, max(counts) * len(counts)


def by_ceiling(counts, block):
    return [int(np.ceil(counts / block).sum()) * block, counts.size * np.sort(counts)[-1]]


def by_two_argsorts(chosen, E):
    return np.argsort(np.argsort(chosen.reshape(-1), kind="stable"), kind="stable").reshape(chosen.shape)


def entry_by_entry(chosen, E):
    entries = chosen.reshape(-1).tolist()
    return [
        [sum(f < e or (f == e and j < i) for j, f in enumerate(entries)) for i, e in enumerate(entries)][
            n : n + len(row)
        ]
        for n, row in zip(range(0, len(entries), chosen.shape[1]), chosen, strict=True)
    ]


def unsorted_first(x, weights, place, dz):
    token = np.argsort(place.reshape(-1)) // place.shape[1]  # (N·K,) of each row of dz
    dx, dweights = np.zeros_like(x), np.zeros(weights.size)
    np.add.at(dx, token, dz * weights.reshape(-1)[np.argsort(place.reshape(-1))][:, None])
    dweights[np.argsort(place.reshape(-1))] = (dz * x[token]).sum(1)
    return dx, dweights.reshape(weights.shape)


def by_einsum(x, weights, place, dz):
    return np.einsum("nk,nkd->nd", weights, dz[place]), np.einsum("nd,nkd->nk", x, dz[place])


def row_by_row(w, kept, dv):
    dw = np.zeros_like(w)
    for n, m in enumerate(kept):
        if m.any():
            v = w[n, m] / w[n, m].sum()
            dw[n, m] = (dv[n, m] - v @ dv[n, m]) / w[n, m].sum()
    return dw


def with_nan_removed(w, kept, dv):
    with np.errstate(invalid="ignore", divide="ignore"):
        v = kept * w / (kept * w).sum(1, keepdims=True)
        dw = kept * (dv - np.nansum(v * dv, axis=1, keepdims=True)) / (kept * w).sum(1, keepdims=True)
    return np.nan_to_num(dw)


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
        (inclusive_cumsum, "where it should end"),
        (inclusive_twice, "subtract both"),
    ],
    check.weighted_input_backward: [
        (unweighted, "multiplied by its weight"),
        (as_it_stands, "sorted by expert"),
        (unsorted_weights_only, "sorted by expert"),
        (by_the_inverse, "the inverse of place"),
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
        (mask_forgotten_outside, "outside the brackets"),
        (all_in_the_denominator, "over the kept entries only"),
    ],
}

RIGHT = {
    check.computed_rows: [one_segment_at_a_time, by_ceiling],
    check.place_without_sorting: [by_two_argsorts, entry_by_entry],
    check.weighted_input_backward: [unsorted_first, by_einsum],
    check.renormalize_kept_backward: [row_by_row, with_nan_removed],
}
