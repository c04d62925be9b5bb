"""Checks of lesson 09: the mixture-of-experts layer."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import routing


def computed_rows(answer: Answer) -> Report:
    """(counts, block) → rows computed with whole blocks, and with equal slots; in one case an expert has no work."""
    return first_failure(_computed_rows(answer, *case) for case in (([13, 5, 22], 8), ([37, 16, 0, 23], 8)))


def _computed_rows(answer: Answer, counts: list[int], block: int) -> Report:
    rows = np.array(counts)
    blocks = int((-(-rows // block) * block).sum())
    slots = len(counts) * max(counts)
    hints = {
        "this rounds down: the remaining rows would be dropped.": int((rows // block * block).sum()),
        "round up every segment on its own, not the sum of all.": -(-sum(counts) // block) * block,
        "a segment that is empty, or already a whole number of blocks, needs no further block.": int(
            ((rows // block + 1) * block).sum()
        ),
        "this counts blocks, but the question is about rows.": blocks // block,
    }
    slot_hints = {
        "this is the number of slots of one expert.": max(counts),
        "with these slots, each expert has only the fair share, and the busiest expert drops entries.": sum(counts),
    }
    return values(
        answer,
        (rows, block),
        {"with blocks": blocks, "with equal slots": slots},
        mistakes={
            "with blocks": {hint: wrong for hint, wrong in hints.items() if wrong != blocks},
            "with equal slots": slot_hints,
        },
    )


def place_without_sorting(answer: Answer) -> Report:
    """(chosen, E) → place."""
    rng = np.random.default_rng(9)
    N, E, K = 7, 5, 3
    chosen = np.argsort(-rng.random((N, E)), axis=1)[:, :K]
    chosen[chosen == 1] = 4  # expert 1 stays empty; the entries need not be a real routing
    dispatch = routing.sort_by_expert(chosen, E)
    counts = np.array(dispatch.counts)  # (E,)
    first = np.cumsum(counts) - counts  # (E,)
    by_choice = routing.sort_by_expert(chosen.T.reshape(-1, 1), E).place.reshape(K, N).T
    return values(
        answer,
        (chosen, E),
        {"place": dispatch.place},
        sizes={"N": N, "E": E, "K": K},
        mistakes={
            "place": {
                "this is the place in the queue of the entry's own expert; all entries of lower experts come first.": (
                    dispatch.place - first[chosen]
                ),
                "every place is one too high: an entry does not come before itself.": dispatch.place + 1,
                "`np.cumsum` includes the expert itself, so each expert begins where it should end.": (
                    dispatch.place + counts[chosen]
                ),
                "`np.cumsum` includes the expert itself and the entry itself: subtract both.": (
                    dispatch.place + counts[chosen] + 1
                ),
                "this is where each expert begins; the earlier entries of the same expert are missing.": first[chosen],
                "read the entries token by token; here all first choices come before all second choices.": by_choice,
                "this is the order, which gives the entry at each place; the place is its inverse.": (
                    dispatch.order.reshape(N, K)
                ),
            }
        },
    )


def weighted_input_backward(answer: Answer) -> Report:
    """(x, weights, place, dz) → dx, dweights."""
    rng = np.random.default_rng(9)
    N, D, E, K = 5, 4, 7, 3
    chosen = np.argsort(-rng.random((N, E)), axis=1)[:, :K]
    dispatch = routing.sort_by_expert(chosen, E)
    x, weights = rng.standard_normal((N, D)), rng.uniform(0.1, 1, (N, K))
    dz = rng.standard_normal((N * K, D))

    def loss(x: Array, weights: Array) -> Array:
        z = weights.reshape(-1)[dispatch.order][:, None] * x[dispatch.token]
        return (z * dz).sum()

    unsorted = dz[dispatch.place]  # (N, K, D)
    as_it_stands = dz.reshape(N, K, D)
    inverse = dz[dispatch.order].reshape(N, K, D)
    wrong_way = "this uses the inverse of place: row place[n, k] of dz belongs to choice k of token n."
    return gradients(
        answer,
        (x, weights, dispatch.place, dz),
        loss,
        {"x": x, "weights": weights},
        sizes={"N": N, "D": D, "K": K},
        mistakes={
            "dx": {
                "every dz must be multiplied by its weight, because z = w x.": unsorted.sum(1),
                "dz is sorted by expert: fetch the rows of a token with place.": (
                    (weights[:, :, None] * as_it_stands).sum(1)
                ),
                wrong_way: (weights[:, :, None] * inverse).sum(1),
                "x reaches K rows of z, but this is the gradient from the first of them only.": (
                    weights[:, :1] * unsorted[:, 0]
                ),
            },
            "dweights": {
                "dz is sorted by expert: fetch the rows of a token with place.": (x[:, None] * as_it_stands).sum(2),
                wrong_way: (x[:, None] * inverse).sum(2),
                "this lacks x: every dz must be multiplied by x, because z = w x.": unsorted.sum(2),
            },
        },
    )


def renormalize_kept_backward(answer: Answer) -> Report:
    """(w, kept, dv) → dw; some tokens keep all their entries, some keep a part, and one keeps none."""
    rng = np.random.default_rng(9)
    w, dv = rng.uniform(0.2, 1, (5, 3)), rng.standard_normal((5, 3))
    kept = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 1]], bool)

    def normalized(w: Array) -> tuple[Array, Array]:
        left = kept * w
        total = left.sum(1, keepdims=True)
        safe = np.where(total > 0, total, 1)
        return left / safe, safe

    v, total = normalized(w)
    along = (v * dv).sum(1, keepdims=True)
    everything = w.sum(1, keepdims=True)
    return gradients(
        answer,
        (w, kept, dv),
        lambda w: (normalized(w)[0] * dv).sum(),
        {"w": w},
        sizes={"N": 5, "K": 3},
        mistakes={
            "dw": {
                "w is in the denominator too: a second path, which the whole row shares, is missing.": (
                    kept * dv / total
                ),
                "a dropped entry reaches nothing, so it has no gradient.": np.where(
                    kept.any(1, keepdims=True), (dv - along) / total, 0
                ),
                "a dropped entry reaches nothing, so it has no gradient: multiply by m outside the brackets too.": (
                    (dv - along) / total
                ),
                "the sum in the denominator is over the kept entries only.": (
                    kept * (dv - (kept * w * dv).sum(1, keepdims=True) / everything) / everything
                ),
                "v is the kept weights over their sum; here v and w are mixed up.": kept * (dv - w * along) / total,
                "the denominator is not 1, and it divides the gradient too.": kept * (dv - along),
                "this is the backward pass of a softmax, but here nothing was exponentiated.": v * (dv - along),
                "the mean along the row must be weighted with v, not with w.": (
                    kept * (dv - (kept * w * dv).sum(1, keepdims=True)) / total
                ),
            }
        },
    )
