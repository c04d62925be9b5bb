"""Wrong answers to the exercises of lesson 62, each with words that its hint must hold, and unusual right ones."""

import math

import numpy as np

from minimoe.exercises import lesson_62 as check


def bar(out=lambda totals, margin: totals - totals.mean() > margin, divide=True, added="w"):
    """The right answer but for one thing."""

    def answer(g, totals, margin):
        w = g * ~out(totals, margin)
        w = w / w.sum(1, keepdims=True) if divide else w
        new = {
            "w": totals + w.sum(0),
            "g": totals + g.sum(0),
            "mean": totals + w.mean(0),
            "batch": w.sum(0),
            "old": totals,
        }
        return w, new[added]

    return answer


def softmax_again(g, totals, margin):
    w = np.exp(g) * (totals - totals.mean() <= margin)
    w = w / w.sum(1, keepdims=True)
    return w, totals + w.sum(0)


def bar_by_loops(g, totals, margin):
    mean = sum(totals) / len(totals)
    w = [[0.0 if total - mean > margin else weight for weight, total in zip(row, totals, strict=True)] for row in g]
    w = [[weight / sum(row) for weight in row] for row in w]
    return w, [total + sum(column) for total, column in zip(totals, zip(*w, strict=True), strict=True)]


def bar_by_logits(g, totals, margin):
    z = np.where(totals - totals.mean() > margin, -np.inf, np.log(g))
    w = np.exp(z - z.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    return w, totals + w.sum(axis=0)


def experts(weigh=True, rectify=True, sum_up=np.sum, mean=False, together=False):
    """The right gradients but for one thing."""

    def answer(x, W, g, dy):
        a = x @ W
        on = np.einsum("ne,enf->nf", g, a)[None] > 0 if together else a > 0
        da = (g.T[:, :, None] if weigh else 1) * dy * (on if rectify else np.ones_like(a))
        dx = da @ W.transpose(0, 2, 1)
        return sum_up(dx, axis=0), x.T @ da / (len(x) if mean else 1)

    return answer


def slope_is_the_output(x, W, g, dy):
    da = g.T[:, :, None] * dy * np.maximum(x @ W, 0)
    return (da @ W.transpose(0, 2, 1)).sum(0), x.T @ da


def one_expert_at_a_time(x, W, g, dy):
    dx, dW = np.zeros_like(x), np.zeros_like(W)
    for e in range(len(W)):
        for n in range(len(x)):
            da = g[n, e] * dy[n] * (x[n] @ W[e] > 0)
            dx[n] += W[e] @ da
            dW[e] += np.outer(x[n], da)
    return dx, dW


def by_einsum(x, W, g, dy):
    on = np.einsum("nd,edf->enf", x, W) > 0
    return np.einsum("ne,nf,enf,edf->nd", g, dy, on, W), np.einsum("nd,ne,nf,enf->edf", x, g, dy, on)


def joint_of(gate, labels):
    return np.array([gate[labels == k].sum(0) for k in np.unique(labels)]) / len(labels)


def bits_of(joint, log=np.log2):
    return (joint * log(joint / (joint.sum(1, keepdims=True) * joint.sum(0)))).sum()


def open_expert(joint):
    """What the rows of the joint table leave open about its columns, in bits."""
    return -(joint * np.log2(joint / joint.sum(1, keepdims=True))).sum()


def label_bits(labels):
    shares = np.bincount(labels) / len(labels)
    return -(shares * np.log2(shares)).sum()


def hard_bits(gate, labels):
    joint = joint_of(np.eye(gate.shape[1])[gate.argmax(1)], labels)
    seen = joint > 0
    ratio = joint[seen] / (joint.sum(1, keepdims=True) * joint.sum(0))[seen]
    return (joint[seen] * np.log2(ratio)).sum()


def labels_alike(gate, labels):
    means = np.array([gate[labels == k].mean(0) for k in np.unique(labels)])
    return bits_of(means / len(means))


def entropies(gate, labels):
    """I = H(e) + H(l) − H(e, l)."""
    joint = joint_of(gate, labels)

    def entropy(p):
        return -sum(q * math.log2(q) for q in np.ravel(p))

    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)


def surprise(gate, labels):
    """The mean over labels of the divergence between the experts of a label and all."""
    total = 0.0
    for k in set(labels.tolist()):
        p = gate[labels == k].mean(0)
        total += (labels == k).mean() * (p * (np.log(p) - np.log(gate.mean(0)))).sum() / math.log(2)
    return total


def entropy_of(p):
    return -(p * np.log(p)).sum()


def ways_by_bits(g1, g2):
    pairs = np.einsum("ni,nj->ij", g1, g2) / len(g1)
    return 2 ** -(pairs * np.log2(pairs)).sum()


def ways_by_product(g1, g2):
    pairs = sum(np.outer(a, b) for a, b in zip(g1, g2, strict=True)) / len(g1)
    return 1 / np.prod(pairs**pairs)


WRONG = {
    check.bar: [
        (bar(divide=False), "no longer add up to 1"),
        (bar(lambda totals, margin: totals - totals.mean() >= margin), "at the margin is not yet barred"),
        (bar(lambda totals, margin: totals - totals.min() > margin), "not with the smallest total"),
        (bar(lambda totals, margin: totals > margin), "not with the margin alone"),
        (bar(lambda totals, margin: totals.mean() - totals > margin), "bars the experts that are behind"),
        (bar(lambda totals, margin: totals - np.median(totals) > margin), "not with the median"),
        (bar(lambda totals, margin: totals - (totals.sum() - totals) / (len(totals) - 1) > margin), "itself included"),
        (bar(lambda totals, margin: totals == totals.max()), "the leader alone"),
        (bar(lambda totals, margin: abs(totals - totals.mean()) > margin), "far behind is not barred"),
        (softmax_again, "divide them by their sum instead"),
        (bar(lambda totals, margin: totals > 100), "nobody is barred here"),
        (bar(added="g"), "after the constraint"),
        (bar(added="mean"), "not the mean"),
        (bar(added="batch"), "the old totals are missing"),
        (bar(added="old"), "these are the old totals"),
    ],
    check.experts_backward: [
        (experts(weigh=False), "weight g of each expert is missing"),
        (experts(rectify=False), "the rectification is missing"),
        (experts(sum_up=lambda dx, axis: dx[0]), "the first expert alone"),
        (experts(sum_up=lambda dx, axis: dx[-1]), "the last expert alone"),
        (experts(sum_up=np.mean), "do not take the mean"),
        (experts(together=True), "each expert has its own rectification"),
        (experts(mean=True), "a sum over the images"),
        (lambda x, W, g, dy: experts()(x, W, np.eye(g.shape[1])[g.argmax(1)], dy), "the mixture is dense"),
        (slope_is_the_output, "1 or 0, not the output"),
        (lambda x, W, g, dy: experts()(x, W, g, np.maximum(dy, 0)), ""),
        (lambda x, W, g, dy: experts()(x, W, np.tile(g.mean(0), (len(g), 1)), dy), ""),
        (lambda x, W, g, dy: (experts()(x, W, g, dy)[0] * (x > 0), experts()(x, W, g, dy)[1]), ""),
    ],
    check.information: [
        (lambda gate, labels: bits_of(joint_of(gate, labels), np.log), "in nats"),
        (hard_bits, "the largest weight only"),
        (labels_alike, "counts as often as it occurs"),
        (lambda gate, labels: (gate * np.log2(gate / gate.mean(0))).sum(1).mean(), "of the single image"),
        (lambda gate, labels: -(joint_of(gate, labels) * np.log2(joint_of(gate, labels))).sum(), "the entropy of p"),
        (lambda gate, labels: -bits_of(joint_of(gate, labels)), "the sign is turned round"),
        (lambda gate, labels: -(gate.mean(0) * np.log2(gate.mean(0))).sum(), "the experts alone"),
        (lambda gate, labels: bits_of(len(labels) * joint_of(gate, labels)), "divide by the number of images"),
        (lambda gate, labels: open_expert(joint_of(gate, labels)), "leaves open about the expert"),
        (lambda gate, labels: open_expert(joint_of(gate, labels).T), "leaves open about the label"),
        (lambda gate, labels: bits_of(joint_of(gate, labels)) / label_bits(labels), "as a share of"),
        (lambda gate, labels: label_bits(labels), "of the labels alone"),
        (lambda gate, labels: bits_of(joint_of(gate, labels)) / joint_of(gate, labels).size, "this is a mean"),
    ],
    check.ways: [
        (lambda g1, g2: entropy_of(g1.T @ g2 / len(g1)), "this is the entropy; its exponential"),
        (lambda g1, g2: entropy_of(g1.T @ g2 / len(g1)) / np.log(2), "the entropy in bits"),
        (lambda g1, g2: np.exp(entropy_of(g1.mean(0)) + entropy_of(g2.mean(0))), "multiplies the two means"),
        (
            lambda g1, g2: np.exp(np.mean([entropy_of(np.outer(a, b)) for a, b in zip(g1, g2, strict=True)])),
            "what each of them uses",
        ),
        (lambda g1, g2: np.exp(entropy_of(g1.mean(0))) + np.exp(entropy_of(g2.mean(0))), "adds the ways"),
        (lambda g1, g2: g1.shape[1] * g2.shape[1], "largest possible number"),
        (lambda g1, g2: np.mean([ways_by_bits(a[None], b[None]) for a, b in zip(g1, g2, strict=True)]), "own number"),
        (lambda g1, g2: np.exp(entropy_of(g1.T @ g2)), "not only added up"),
        (lambda g1, g2: len(set(zip(g1.argmax(1), g2.argmax(1), strict=True))), "the largest weights only"),
        (lambda g1, g2: 1 / ((g1.T @ g2 / len(g1)) ** 2).sum(), "sum of squares"),
        (lambda g1, g2: np.exp(-entropy_of(g1.T @ g2 / len(g1))), "turned round"),
        (lambda g1, g2: 2 ** entropy_of(g1.T @ g2 / len(g1)), "not a power of 2"),
    ],
}

RIGHT = {
    check.bar: [bar_by_loops, bar_by_logits],
    check.experts_backward: [one_expert_at_a_time, by_einsum],
    check.information: [entropies, surprise],
    check.ways: [ways_by_bits, ways_by_product],
}
