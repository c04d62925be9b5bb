"""Checks of lesson 62: where, then what."""

from __future__ import annotations

import numpy as np

from minimoe.beyond import stacked_experts
from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report


def bar(answer: Answer) -> Report:
    """(g, totals, margin) → the gate after the constraint, and the new totals."""
    rng = np.random.default_rng(62)
    N, E = 3, 8
    g = _softmax(rng.standard_normal((N, E)))
    # The mean is 11. They are ahead of it by 5.25, 2.25, −8, 2.5, 5.5, −8.5, 3 and −2: three are beyond
    # the margin, and one is exactly at it.
    totals, margin = np.array([16.25, 13.25, 3.0, 13.5, 16.5, 2.5, 14.0, 9.0]), 2.5

    def barred(out: Array) -> Array:
        kept = g * ~out
        return kept / kept.sum(1, keepdims=True)

    out = totals - totals.mean() > margin
    w = barred(out)
    new = totals + g.sum(0)
    return values(
        answer,
        (g, totals, margin),
        {"w": w, "totals": totals + w.sum(0)},
        sizes={"N": N, "E": E},
        shares=("w",),
        mistakes={
            "w": {
                "the weights of an image no longer add up to 1: divide by what is left.": g * ~out,
                "an expert at the margin is not yet barred: its total must exceed the mean by more.": (
                    barred(totals - totals.mean() >= margin)
                ),
                "compare the total with the mean plus the margin, not with the margin alone.": barred(totals > margin),
                "compare the total with the mean of the layer, not with the smallest total.": (
                    barred(totals - totals.min() > margin)
                ),
                "compare the total with the mean of the layer, not with the median.": (
                    barred(totals - np.median(totals) > margin)
                ),
                "compare the total with the mean of all, the expert itself included.": (
                    barred(totals - (totals.sum() - totals) / (E - 1) > margin)
                ),
                "this bars the leader alone; bar everybody who is ahead by more than the margin.": (
                    barred(totals == totals.max())
                ),
                "an expert that is far behind is not barred.": barred(abs(totals - totals.mean()) > margin),
                "this bars the experts that are behind; bar those that are ahead.": (
                    barred(totals.mean() - totals > margin)
                ),
                "this is the softmax of the remaining weights; divide them by their sum instead.": (
                    np.where(out, 0, np.exp(g)) / np.where(out, 0, np.exp(g)).sum(1, keepdims=True)
                ),
                "nobody is barred here: compare each total with the mean plus the margin.": g,
            },
            "totals": {
                "add what each expert was given after the constraint, w, not the g before it.": new,
                "add the sum over the images, not the mean: totals are counted in images.": totals + w.mean(0),
                "this is the batch alone; the old totals are missing.": w.sum(0),
                "these are the old totals; add what this batch gave.": totals,
            },
        },
    )


def experts_backward(answer: Answer) -> Report:
    """(x, W, g, dy) → dx and dW of y = Σ_e g_e max(0, x W_e), with the gate g held fixed."""
    rng = np.random.default_rng(2)
    N, D, F, E = 4, 3, 5, 2
    x, W, dy = rng.standard_normal((N, D)), rng.standard_normal((E, D, F)), rng.standard_normal((N, F))
    g = _softmax(rng.standard_normal((N, E)))

    def loss(x: Array, W: Array) -> Array:
        return (np.einsum("ne,enf->nf", g, np.maximum(x @ W, 0)) * dy).sum()

    on = x @ W > 0  # (E, N, F)
    weights = g.T[:, :, None]  # (E, N, 1)
    da = weights * dy * on

    def dx_of(da: Array) -> Array:
        return (da @ W.transpose(0, 2, 1)).sum(0)

    together = (np.einsum("ne,enf->nf", g, x @ W) > 0)[None]
    return gradients(
        answer,
        (x, W, g, dy),
        loss,
        {"x": x, "W": W},
        sizes={"N": N, "D": D, "F": F, "E": E},
        mistakes={
            "dx": {
                "the weight g of each expert is missing.": dx_of(dy * on),
                "the rectification is missing: where an expert's output is 0, it has no slope.": dx_of(weights * dy),
                "this is the first expert alone; x goes to all of them.": da[0] @ W[0].T,
                "this is the last expert alone; x goes to all of them.": da[-1] @ W[-1].T,
                "x reaches y through every expert: add them up, do not take the mean.": dx_of(da) / E,
                "each expert has its own rectification; the mixture has none.": dx_of(weights * dy * together),
                "the mixture is dense: all experts answer, not only the one with the largest weight.": dx_of(
                    np.eye(E)[g.argmax(1)].T[:, :, None] * dy * on
                ),
                "the slope of the rectification is 1 or 0, not the output itself.": dx_of(da * (x @ W)),
            },
            "dW": {
                "the weight g of each expert is missing.": x.T @ (dy * on),
                "the rectification is missing: where an expert's output is 0, it has no slope.": x.T @ (weights * dy),
                "the gradient of a sum is a sum over the images, not the mean.": x.T @ da / N,
                "each expert has its own rectification; the mixture has none.": x.T @ (weights * dy * together),
            },
        },
    )


def information(answer: Answer) -> Report:
    """(gate, labels) → the mutual information of the drawn expert and the label, in bits."""
    rng = np.random.default_rng(62)
    N, E, kinds = 12, 3, 4
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3])  # unequal shares
    gate = _softmax(2 * rng.standard_normal((N, E)) + np.eye(4)[labels][:, :E])
    joint = np.array([gate[labels == k].sum(0) for k in range(kinds)]).T / N  # (E, kinds)
    experts, shares = joint.sum(1, keepdims=True), joint.sum(0)
    right = stacked_experts.information(gate, labels)
    hard = stacked_experts.information(np.eye(E)[gate.argmax(1)], labels)
    means = joint / shares  # p(e | label)
    equal = means.mean(1, keepdims=True)
    per_image = float((gate * np.log2(gate / gate.mean(0))).sum(1).mean())
    return values(
        answer,
        (gate, labels),
        {"bits": right},
        sizes={"N": N, "E": E},
        mistakes={
            "bits": {
                "this is in nats; take the logarithm to base 2.": right * np.log(2),
                "this counts the largest weight only; p(e, l) adds up the weights themselves.": hard,
                "every label counts alike here, but a label counts as often as it occurs.": float(
                    (means / kinds * np.log2(means / equal)).sum()
                ),
                "this is what the gate knows of the single image: first add up the images of a label.": per_image,
                "this is the entropy of p(e, l); subtract what independent e and l would have.": float(
                    -(joint * np.log2(joint)).sum()
                ),
                "the sign is turned round: it is p(e, l) over p(e) p(l).": -right,
                "this is the entropy of the experts alone.": float(-(experts * np.log2(experts)).sum()),
                "each term must be weighted by p(e, l).": float(np.log2(joint / (experts * shares)).sum()),
                "p(e, l) adds up to 1: divide by the number of images.": float(
                    (N * joint * np.log2(joint / (N * experts * shares))).sum()
                ),
                "this is what the label leaves open about the expert; subtract it from the entropy of the expert.": (
                    float(-(joint * np.log2(means)).sum())
                ),
                "this is what the expert leaves open about the label; subtract it from the entropy of the label.": (
                    float(-(joint * np.log2(joint / experts)).sum())
                ),
                "this is the information as a share of the entropy of the label.": right
                / float(-(shares * np.log2(shares)).sum()),
                "this is the entropy of the labels alone.": float(-(shares * np.log2(shares)).sum()),
                "add up over all pairs of an expert and a label; this is a mean.": right / joint.size,
            }
        },
    )


def ways(answer: Answer) -> Report:
    """(g1, g2) → the effective number of pairs of experts in use: exp of the entropy of the mean of g¹ g²."""
    rng = np.random.default_rng(62)
    N, E1, E2 = 6, 3, 4
    g1, g2 = _softmax(2 * rng.standard_normal((N, E1))), _softmax(2 * rng.standard_normal((N, E2)))
    pair = np.einsum("ne,nf->ef", g1, g2) / N

    def entropy(p: Array) -> float:
        return float(-(p * np.log(p)).sum())

    apart = np.einsum("ne,nf->nef", g1, g2)
    return values(
        answer,
        (g1, g2),
        {"ways": np.exp(entropy(pair))},
        sizes={"N": N, "E1": E1, "E2": E2},
        mistakes={
            "ways": {
                "this is the entropy; its exponential is a number of ways.": entropy(pair),
                "this is the entropy in bits; its power of 2 is a number of ways.": entropy(pair) / np.log(2),
                "this multiplies the two means; take the mean of the products, image by image.": np.exp(
                    entropy(g1.mean(0)) + entropy(g2.mean(0))
                ),
                "this is the mean over images of what each of them uses; first take the mean of the products.": np.exp(
                    np.mean([entropy(one) for one in apart])
                ),
                "this mixes bases: nats go with exp, bits with a power of 2.": np.exp(entropy(pair) / np.log(2)),
                "this adds the ways of the two layers; count pairs of experts.": np.exp(entropy(g1.mean(0)))
                + np.exp(entropy(g2.mean(0))),
                "this is the largest possible number; some pairs are used more than others.": E1 * E2,
                "this is the mean of each image's own number; first take the mean of the products.": float(
                    np.mean([np.exp(entropy(one)) for one in apart])
                ),
                "the products must be averaged over the images, not only added up.": np.exp(entropy(N * pair)),
                "this counts the largest weights only; take the products of the weights themselves.": len(
                    set(zip(g1.argmax(1).tolist(), g2.argmax(1).tolist(), strict=True))
                ),
                "this is 1 over the sum of squares; take the exponential of the entropy.": 1 / (pair**2).sum(),
                "the entropy is −Σ p log p: the sign is turned round.": np.exp(-entropy(pair)),
                "this mixes bases: the entropy is in nats, so take exp, not a power of 2.": 2 ** entropy(pair),
            }
        },
    )


def _softmax(z: Array) -> Array:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)
