"""Wrong answers to the exercises of lesson 40, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_40 as check


def softmax(z):
    exp = np.exp(z - z.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def gradient(weigh=lambda m: m, count=lambda m: max(m.sum(), 1), sign=1, minus=1):
    """The right answer but for one thing."""

    def answer_loss_backward(z, target, m):
        dz = softmax(z) - minus * np.eye(z.shape[1])[target]
        with np.errstate(invalid="ignore", divide="ignore"):
            return sign * weigh(m)[:, None] * dz / count(m)

    return answer_loss_backward


def one_by_one(z, target, m):
    dz = np.zeros_like(z)
    for t in np.flatnonzero(m):
        dz[t] = softmax(z[t : t + 1])[0]
        dz[t, target[t]] -= 1
        dz[t] /= m.sum()
    return dz


def as_a_list(z, target, m):
    count = 1.0 if not m.any() else m.sum()
    p = softmax(z)
    return [[m[t] * (p[t, v] - (target[t] == v)) / count for v in range(z.shape[1])] for t in range(len(z))]


def packed(
    shift=True, end=True, question=False, first=None, padding=None, border=False, flip=False, tokens_as_targets=False
):
    """The right answer but for one thing."""

    def pack(documents, T):
        if border:
            documents = [tuple(np.concatenate(parts) for parts in zip(*documents, strict=True))]
        tokens, targets, loss_mask = np.zeros((3, T), int)
        starts, start = np.arange(T), 0
        for ids, answer in documents:
            n = min(len(ids) - 1, T - start)
            place = slice(start, start + n)
            tokens[place], targets[place] = ids[:n], ids[:n] if tokens_as_targets else ids[1 : n + 1]
            mask = answer[1 : n + 1].copy() if shift else answer[:n].copy()
            if not end:
                mask[-1] = 0
            loss_mask[place] = 1 if question else 1 - mask if flip else mask
            starts[place] = start if first is None else first
            start += n
        if padding is not None:
            starts[start:] = padding
        return tokens, targets, loss_mask, starts

    return pack


def other_starts(rule):
    """The right row but for its starts: ``rule`` gives those of the documents and that of padding."""

    def pack(documents, T):
        tokens, targets, loss_mask, starts = packed()(documents, T)
        lengths = [len(ids) for ids, _ in documents]
        filled = sum(lengths) - len(lengths)
        of_documents, of_padding = rule(lengths, starts, filled)
        starts[:filled] = np.repeat(of_documents, np.array(lengths) - 1)
        starts[filled:] = of_padding
        return tokens, targets, loss_mask, starts

    return pack


def right_starts(lengths):
    return np.cumsum([0, *lengths[:-1]]) - np.arange(len(lengths))


def within(documents, T):
    tokens, targets, loss_mask, starts = packed()(documents, T)
    return tokens, targets, loss_mask, np.arange(T) - starts


def pack_from_the_end(documents, T):
    row = np.zeros((4, T), int)
    row[3] = np.arange(T)
    stop = sum(len(ids) - 1 for ids, _ in documents)
    for ids, answer in documents[::-1]:
        start = stop - len(ids) + 1
        row[:, start:stop] = np.stack([ids[:-1], ids[1:], answer[1:], np.full(len(ids) - 1, start)])
        stop = start
    return tuple(row)


def pack_as_lists(documents, T):
    rows = [[], [], [], []]
    for ids, answer in documents:
        start = len(rows[0])
        for k in range(1, len(ids)):
            for row, value in zip(rows, (ids[k - 1], ids[k], answer[k], start), strict=True):
                row.append(int(value))
    while len(rows[0]) < T:
        for row, value in zip(rows, (0, 0, 0, len(rows[0])), strict=True):
            row.append(value)
    return rows


def seen(rule):
    def visible(starts):
        i, j = np.arange(len(starts))[:, None], np.arange(len(starts))[None]
        return rule(i, j, starts[:, None], starts[None])

    return visible


def visible_by_loops(starts):
    return [[starts[i] <= j <= i for j in range(len(starts))] for i in range(len(starts))]


def visible_by_documents(starts):
    return np.tril(np.equal.outer(starts, starts)).astype(float)


def mean_of_means(parts):
    return np.mean([(nats * m).sum() / m.sum() for nats, m in parts if m.any()])


def mean_of_means_and_zeros(parts):
    return sum((nats * m).sum() / max(m.sum(), 1) for nats, m in parts) / len(parts)


def over_all_tokens(parts):
    return sum((nats * m).sum() for nats, m in parts) / sum(len(m) for _, m in parts)


def of_all_tokens(parts):
    return np.concatenate([nats for nats, _ in parts]).mean()


def of_all_over_some(parts):
    return sum(nats.sum() for nats, _ in parts) / sum(m.sum() for _, m in parts)


def the_sum(parts):
    return sum((nats * m).sum() for nats, m in parts)


def by_one_array(parts):
    nats, m = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return np.average(nats, weights=m)


def weighted_means(parts):
    counts = np.array([m.sum() for _, m in parts])
    means = np.array([(nats * m).sum() / max(m.sum(), 1) for nats, m in parts])
    return np.array((counts * means).sum() / counts.sum())


WRONG = {
    check.answer_loss_backward: [
        (gradient(weigh=np.ones_like), "every target is learned"),
        (gradient(count=len), "divides by T"),
        (gradient(count=lambda m: 1), "gradient of the sum"),
        (gradient(weigh=lambda m: 1 - m), "the questions are learned"),
        (gradient(minus=0), "softmax alone"),
        (gradient(sign=-1), "the sign is wrong"),
        (gradient(count=lambda m: m.sum()), "not finite"),
    ],
    check.pack: [
        (packed(border=True), "no pair crosses a border"),
        (packed(shift=False), "not shifted"),
        (packed(end=False), "never learns to stop"),
        (packed(question=True), "every target counts"),
        (packed(flip=True), "exchanged"),
        (packed(first=0), "start at 0"),
        (packed(padding=0), "padding sees only itself"),
        (packed(tokens_as_targets=True), "these are the tokens"),
        (within, "positions within a document"),
        (other_starts(lambda n, starts, filled: (np.arange(len(n)), starts[filled:])), "numbers of the documents"),
        (other_starts(lambda n, starts, filled: (np.cumsum([0, *n[:-1]]), starts[filled:])), "n − 1 places"),
        (other_starts(lambda n, starts, filled: (right_starts(n), filled)), "see each other"),
    ],
    check.visible: [
        (seen(lambda i, j, si, sj: si == sj), "later tokens of its own document"),
        (seen(lambda i, j, si, sj: (si <= j) & (i == i)), "later documents too"),
        (seen(lambda i, j, si, sj: j <= i), "causal mask alone"),
        (seen(lambda i, j, si, sj: (si < j) & (j <= i)), "first token of each document"),
        (seen(lambda i, j, si, sj: (si <= j) & (j < i)), "no query sees itself"),
        (seen(lambda i, j, si, sj: ~((si <= j) & (j <= i))), "hidden"),
        (seen(lambda i, j, si, sj: ((si <= j) & (j <= i)).T), "transpose"),
    ],
    check.mean_of_parts: [
        (mean_of_means, "add up the sums, divide once"),
        (mean_of_means_and_zeros, "divide once"),
        (over_all_tokens, "divides by all tokens"),
        (of_all_tokens, "every target counts"),
        (of_all_over_some, "every target is in the sum"),
        (the_sum, "this is the sum"),
    ],
}

RIGHT = {
    check.answer_loss_backward: [one_by_one, as_a_list],
    check.pack: [pack_from_the_end, pack_as_lists],
    check.visible: [visible_by_loops, visible_by_documents],
    check.mean_of_parts: [by_one_array, weighted_means],
}
