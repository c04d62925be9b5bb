"""Checks of lesson 24: hash and zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def balanced_table(answer: Answer) -> Report:
    """(counts, E) → the expert of each id: from the most frequent id on, each id goes to the expert with the fewest
    tokens."""
    cases = (([5, 5, 7, 9, 1, 2, 8], 3), ([4, 4, 1, 8, 2, 4], 2), ([1, 1, 1, 1, 1], 4))
    return first_failure(_balanced_table(answer, np.array(counts), E) for counts, E in cases)


def _balanced_table(answer: Answer, counts: Array, E: int) -> Report:
    def dealt(order: Array, weight: Array, last: bool = False) -> Array:
        """Deals out the ids in the given order: each goes to the expert whose total ``weight`` so far is smallest."""
        load, experts = np.zeros(E), np.zeros(len(counts), int)
        for token in order:
            least = np.flatnonzero(load == load.min())
            experts[token] = least[-1 if last else 0]
            load[experts[token]] += weight[token]
        return experts

    by_count = np.argsort(-counts, kind="stable")
    right = dealt(by_count, counts)
    mistakes = {
        "this takes the ids in their order; begin with the most frequent one.": dealt(np.arange(len(counts)), counts),
        "this begins with the rarest id; begin with the most frequent one.": (
            dealt(np.argsort(counts, kind="stable"), counts)
        ),
        "this counts how many ids an expert has; add up how often they occur.": dealt(by_count, np.ones_like(counts)),
        "this deals the ids out in turns, whatever each expert already has to do.": np.arange(len(counts)) % E,
        "of experts that have equally little to do, the one with the lowest number takes the id.": (
            dealt(by_count, counts, last=True)
        ),
        "of ids that occur equally often, the lower one comes first.": (
            dealt(len(counts) - 1 - np.argsort(-counts[::-1], kind="stable"), counts)
        ),
        "these are the experts in order of frequency; entry i must belong to id i.": right[by_count],
    }
    return values(
        answer,
        (counts, E),
        {"experts": right},
        sizes={"V": len(counts), "E": E},
        mistakes={"experts": {hint: wrong for hint, wrong in mistakes.items() if not np.array_equal(wrong, right)}},
    )


def fixed_set_backward(answer: Answer) -> Report:
    """(x, W, chosen, dw) → dx, dW of w = softmax over the fixed set of the logits x W."""
    rng = np.random.default_rng(24)
    N, D, E, K = 6, 4, 5, 3
    x, W = rng.standard_normal((N, D)), rng.standard_normal((D, E))
    chosen = np.argsort(rng.random((N, E)), axis=1)[:, :K]
    dw = rng.standard_normal((N, K))

    def weights(x: Array, W: Array) -> Array:
        return _softmax(np.take_along_axis(x @ W, chosen, axis=1))

    w = weights(x, W)

    def of(dz: Array, once: bool = False) -> dict[str, Array]:
        """dz (N, K) of the set → dx, dW."""
        full = np.zeros((N, E))
        np.put_along_axis(full, chosen, dz, axis=1)
        dW = x.T @ full
        if once:  # what ``dW[:, chosen[t]] = …`` leaves of it
            for t in range(N):
                dW[:, chosen[t]] = np.outer(x[t], dz[t])
        return {"dx": full @ W.T, "dW": dW}

    dw_of_all = np.zeros((N, E))
    np.put_along_axis(dw_of_all, chosen, dw, axis=1)
    p_of_all = _softmax(x @ W)
    everywhere = p_of_all * (dw_of_all - (p_of_all * dw_of_all).sum(1, keepdims=True))  # also outside the set
    over_all = np.take_along_axis(_softmax(x @ W), chosen, axis=1)
    wrong = {
        "the softmax's mean term is missing: raising one logit lowers the other weights.": of(w * dw),
        "this is the gradient with respect to the weights; the softmax is left.": of(dw),
        "this uses the softmax over all E experts, but only those of the set are weighed.": (
            of(over_all * (dw - (over_all * dw).sum(1, keepdims=True)))
        ),
        "a logit outside the set gets no gradient: the softmax is over the set alone.": {
            "dx": everywhere @ W.T,
            "dW": x.T @ everywhere,
        },
        "the mean of the softmax must be weighted with w.": of(w * (dw - dw.mean(1, keepdims=True))),
        "the mean of the softmax is over the set of each token, not over the tokens.": of(w * (dw - (w * dw).sum(0))),
        "this goes the wrong way.": of(-w * (dw - (w * dw).sum(1, keepdims=True))),
        "several tokens share an expert, so their gradients must be added up.": of(
            w * (dw - (w * dw).sum(1, keepdims=True)), once=True
        ),
    }
    return gradients(
        answer,
        (x, W, chosen, dw),
        lambda x, W: (dw * weights(x, W)).sum(),
        {"x": x, "W": W},
        sizes={"N": N, "D": D, "E": E, "K": K},
        mistakes=_by_name(wrong, of(w * (dw - (w * dw).sum(1, keepdims=True)))),
    )


def cheap_backward(answer: Answer) -> Report:
    """(x, w, copies, dy) → dx, dw of y_t = Σ_k w_tk x_t over the copies; the other experts answer 0."""
    rng = np.random.default_rng(24)
    N, D, K = 5, 4, 3
    x, dy = rng.standard_normal((2, N, D))
    w = rng.uniform(0.1, 0.9, (N, K))
    copies = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]], bool)
    along = (dy * x).sum(1, keepdims=True)  # (N, 1)
    right = {"dx": (w * copies).sum(1, keepdims=True) * dy, "dw": copies * along}
    share = (w * copies).sum(1, keepdims=True) / w.sum(1, keepdims=True)
    wrong: dict[str, dict[str, Array]] = {
        "a zero expert answers 0 for every x, so nothing flows back through it.": {
            "dx": w.sum(1, keepdims=True) * dy,
            "dw": np.repeat(along, K, axis=1),
        },
        "the weight is missing: y is the copy times its weight.": {"dx": copies.sum(1, keepdims=True) * dy},
        "the weight does not belong here: y is linear in it.": {"dw": copies * along * w},
        "each copy passes its own part back: add up the K parts.": {"dx": (w * copies)[:, :1] * dy},
        "this is for the mean of the copies; y is their sum.": {"dx": right["dx"] / K},
        "the weights stay as the router gave them, although they may not add up to 1.": {"dx": share * dy},
        "this uses y where the copy itself, x, belongs.": {
            "dw": copies * (dy * (w * copies).sum(1, keepdims=True) * x).sum(1, keepdims=True)
        },
        "the weights are given, so no softmax follows: dw is the gradient with respect to w itself.": {
            "dw": w * (right["dw"] - (w * right["dw"]).sum(1, keepdims=True))
        },
        "a gradient with respect to x is made of dy, not of x.": {"dx": (w * copies).sum(1, keepdims=True) * x},
        "this passes dy through the zero experts and not through the copies.": {
            "dx": (w * ~copies).sum(1, keepdims=True) * dy,
            "dw": ~copies * along,
        },
        "this uses x alone; the gradient of y is missing.": {"dw": copies * x.sum(1, keepdims=True)},
    }
    return gradients(
        answer,
        (x, w, copies, dy),
        lambda x, w: (dy * (w * copies).sum(1, keepdims=True) * x).sum(),
        {"x": x, "w": w},
        sizes={"N": N, "D": D, "K": K},
        mistakes=_by_name(wrong, right),
    )


def loads_at_equal_price(answer: Answer) -> Report:
    """eta (E,) → the shares f (E,), adding up to 1, for which η f is the same for all experts."""
    cases = ([1.0, 1.0, 1.0, 0.25, 0.5], [2.0, 0.1, 1.0])
    return first_failure(_loads_at_equal_price(answer, np.array(eta)) for eta in cases)


def _loads_at_equal_price(answer: Answer, eta: Array) -> Report:
    right = 1 / eta / (1 / eta).sum()
    mistakes: dict[str, Any] = {
        "this is turned round: an expert with a small η has a low price, so it gets more.": eta / eta.sum(),
        "the shares must add up to 1.": 1 / eta,
        "this is K or E times too much: the shares must add up to 1.": len(eta) * right,
        "these loads are equal, so the prices η f are not.": np.full(len(eta), 1 / len(eta)),
        "this divides by Σ η; divide by the sum of 1/η.": 1 / eta / eta.sum(),
        "what is left of 1 grows as η falls, but η f is not equal then: divide by η.": (
            (1 - eta / eta.sum()) / (len(eta) - 1)
        ),
        "no softmax is needed: η f must be equal, not η + log f.": np.exp(-eta) / np.exp(-eta).sum(),
    }
    return values(
        answer, (eta,), {"f": right}, sizes={"E": len(eta)}, mistakes={"f": mistakes}, reference="The closed form"
    )


def _by_name(wrong: dict[str, dict[str, Array]], right: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """hint → wrong values by name, as name → hint → wrong value, without those that are right."""
    return {
        name: {
            hint: found[name]
            for hint, found in wrong.items()
            if name in found and not np.allclose(found[name], right[name])
        }
        for name in right
    }


def _softmax(c: Array) -> Array:
    p = np.exp(c - c.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
