"""Checks of lesson 40: answering instructions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def answer_loss_backward(answer: Answer) -> Report:
    """(z, target, m) → dz of Σ m · nll / max(Σ m, 1), also where no target counts."""
    return first_failure(_answer_loss(answer, nothing) for nothing in (False, True))


def _answer_loss(answer: Answer, nothing: bool) -> Report:
    rng = np.random.default_rng(40)
    T, V = 5, 7
    z, target = rng.standard_normal((T, V)), rng.integers(V, size=T)
    m = np.zeros(T) if nothing else np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    onehot = np.eye(V)[target]

    def softmax(z: Array) -> Array:
        exp = np.exp(z - z.max(1, keepdims=True))
        return np.asarray(exp / exp.sum(1, keepdims=True))

    def loss(z: Array) -> float:
        nats = -np.log((softmax(z) * onehot).sum(1))
        return float((m * nats).sum() / max(m.sum(), 1.0))

    dz = softmax(z) - onehot
    count = max(m.sum(), 1.0)
    mistakes = {
        "every target is learned: multiply each row by its m.": dz / count,
        "this divides by T; divide by the number of targets that count.": m[:, None] * dz / T,
        "every target is learned, and the sum is divided by T: use m in both places.": dz / T,
        "this is the gradient of the sum; the loss is a mean over the targets that count.": m[:, None] * dz,
        "the questions are learned and the answers are not: m is 1 where a target counts.": (1 - m)[:, None]
        * dz
        / count,
        "this is softmax alone; subtract 1 at the target.": m[:, None] * softmax(z) / count,
        "the sign is wrong: softmax minus one-hot.": -m[:, None] * dz / count,
    }
    return gradients(
        answer,
        (z, target, m),
        loss,
        {"z": z},
        sizes={"T": T, "V": V},
        mistakes={"dz": _without(m[:, None] * dz / count, mistakes)},
    )


DOCUMENTS = (
    (np.array([90, 11, 12, 91, 13, 92]), np.array([0, 0, 0, 0, 1, 1])),
    (np.array([90, 14, 91, 15, 16, 92]), np.array([0, 0, 0, 1, 1, 1])),
    (np.array([90, 91, 92]), np.array([0, 0, 1])),
)


def pack(answer: Answer) -> Report:
    """(documents, T) → tokens, targets, loss mask and starts of one row of T places, filled up with 0."""
    return first_failure(_pack(answer, documents, T) for documents, T in ((DOCUMENTS, 15), (DOCUMENTS[1:], 7)))


def _pack(answer: Answer, documents: Sequence[tuple[Array, Array]], T: int) -> Report:
    right = _packed(documents, T)
    names = ("tokens", "targets", "loss_mask", "starts")
    wrong: dict[str, dict[str, Array]] = {name: {} for name in names}

    def mistake(name: str, hint: str, values: Array) -> None:
        if values.shape != right[name].shape or (values != right[name]).any():
            wrong[name][hint] = values

    joined = np.concatenate([ids for ids, _ in documents])
    told = np.concatenate([of for _, of in documents])
    mistake(
        "targets",
        "the last token of a document has the first of the next as its target: drop it, and no pair crosses a border.",
        _fill(joined[1:], T),
    )
    border = "the last token of each document predicts nothing here: leave it out, so that no pair crosses a border."
    mistake("tokens", border, _fill(joined, T))
    mistake("tokens", border.replace("predicts nothing here", "would predict a stranger"), _fill(joined[:-1], T))
    mistake("targets", "these are the tokens; the target of a place is the token after it.", right["tokens"])
    mistake(
        "loss_mask",
        "the mask is not shifted with the targets: place t counts if its target, token t + 1, is part of an answer.",
        _fill(np.concatenate([of[:-1] for _, of in documents]), T),
    )
    mistake(
        "loss_mask",
        "the end of an answer does not count here; without it, the model never learns to stop.",
        _fill(np.concatenate([np.append(of[1:-1], 0) for _, of in documents]), T),
    )
    mistake(
        "loss_mask",
        "every target counts here; only those in an answer do.",
        _fill(np.ones(len(joined) - len(documents), int), T),
    )
    mistake(
        "loss_mask",
        "questions and answers are exchanged.",
        _fill(1 - np.concatenate([of[1:] for _, of in documents]), T),
    )
    mistake(
        "loss_mask",
        "this is the mask of the ids; that of the targets is one place shorter per document.",
        _fill(told, T),
    )
    starts = right["starts"]
    filled = sum(len(ids) - 1 for ids, _ in documents)
    mistake(
        "starts",
        "all documents start at 0 here, so later ones would read earlier ones.",
        np.where(np.arange(T) < filled, 0, np.arange(T)),
    )
    mistake(
        "starts",
        "padding sees only itself: its start is its own place.",
        np.where(np.arange(T) < filled, starts, starts[filled - 1]),
    )
    mistake(
        "starts", "padding sees only itself: its start is its own place.", np.where(np.arange(T) < filled, starts, 0)
    )
    mistake(
        "starts",
        "these are positions within a document; give the place in the row where the document starts.",
        np.arange(T) - starts,
    )
    mistake(
        "starts",
        "these places of padding see each other; each of them sees only itself.",
        np.where(np.arange(T) < filled, starts, filled),
    )
    lengths = [len(ids) for ids, _ in documents]
    for hint, of_document in (
        ("these are the numbers of the documents; give the place in the row where the document starts.", range(T)),
        ("a document of n ids fills n − 1 places, so the next one starts earlier.", np.cumsum([0, *lengths])),
    ):
        of_places = [start for start, n in zip(of_document, lengths, strict=False) for _ in range(n - 1)]
        mistake("starts", hint, np.append(of_places, np.arange(filled, T)))
    mistake("starts", "every place starts at itself here, so no token would see its own document.", np.arange(T))
    return values(answer, (tuple(documents), T), right, sizes={"T": T}, mistakes=wrong)


def _packed(documents: Sequence[tuple[Array, Array]], T: int) -> dict[str, Array]:
    lengths = [len(ids) - 1 for ids, _ in documents]
    ends = np.cumsum(lengths)
    starts = np.arange(T)
    starts[: ends[-1]] = np.repeat(ends - lengths, lengths)
    return {
        "tokens": _fill(np.concatenate([ids[:-1] for ids, _ in documents]), T),
        "targets": _fill(np.concatenate([ids[1:] for ids, _ in documents]), T),
        "loss_mask": _fill(np.concatenate([of[1:] for _, of in documents]), T),
        "starts": starts,
    }


def _fill(row: Array, T: int) -> Array:
    return np.concatenate([row, np.zeros(max(T - len(row), 0), row.dtype)])[:T]


def visible(answer: Answer) -> Report:
    """(starts) → which key j each query i sees: (T, T), [i, j]."""
    starts = np.array([0, 0, 0, 3, 3, 5, 5, 5, 8])
    T = len(starts)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    right = (starts[:, None] <= j) & (j <= i)
    mistakes: dict[str, Array] = {
        "a query sees later tokens of its own document: add j ≤ i.": starts[:, None] == starts[None],
        "a query sees everything after the start, later documents too: add j ≤ i.": starts[:, None] <= j + 0 * i,
        "this is the causal mask alone; documents read each other.": j <= i,
        "the first token of each document is hidden from it: j may be equal to its start.": (starts[:, None] < j)
        & (j <= i),
        "no query sees itself here: j may be equal to i.": (starts[:, None] <= j) & (j < i),
        "rows are queries, columns keys: this is the transpose.": right.T,
        "these are the keys that are hidden.": ~right,
    }
    return values(
        answer,
        (starts,),
        {"visible": right.astype(int)},
        sizes={"T": T},
        mistakes={"visible": _without(right.astype(int), mistakes)},
    )


Part = tuple[Array, Array]  # nats and m of a micro-batch


def mean_of_parts(answer: Answer) -> Report:
    """(parts) → the loss of a batch from its micro-batches, each (nats, m)."""
    rng = np.random.default_rng(4)
    masks = ([0, 0, 0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0, 1])
    parts: list[Part] = [(np.round(3 * rng.random(len(m)), 2), np.array(m, float)) for m in masks]
    return first_failure(_mean_of_parts(answer, some) for some in (parts, [*parts, (np.ones(3), np.zeros(3))]))


def _mean_of_parts(answer: Answer, parts: list[Part]) -> Report:
    sums = [float((nats * m).sum()) for nats, m in parts]
    counts = [float(m.sum()) for _, m in parts]
    means = [total / count for total, count in zip(sums, counts, strict=True) if count]
    right = sum(sums) / sum(counts)
    mistakes: dict[str, float] = {
        "this is the mean of the parts' means, in which a short answer counts more: add up the sums, divide once.": (
            sum(means) / len(means)
        ),
        "this divides by all tokens; divide by the targets that count.": sum(sums) / sum(len(m) for _, m in parts),
        "every target counts here; multiply by m.": (
            sum(float(nats.sum()) for nats, _ in parts) / sum(len(m) for _, m in parts)
        ),
        "every target is in the sum; multiply by m.": sum(float(nats.sum()) for nats, _ in parts) / sum(counts),
        "this is the sum; divide by the number of targets that count.": sum(sums),
    }
    if len(means) < len(parts):
        hint = "a part without any target has no mean, and counts as 0 here: add up the sums, then divide once."
        mistakes[hint] = sum(means) / len(parts)
    different = {hint: value for hint, value in mistakes.items() if abs(value - right) > 1e-9}
    return values(answer, (tuple(parts),), {"loss": right}, mistakes={"loss": different})


def _without(right: Array, mistakes: dict[str, Array]) -> dict[str, Array]:
    """The mistakes that give something else in this case."""
    different = {hint: wrong for hint, wrong in mistakes.items() if not np.array_equal(right, wrong)}
    return {hint: wrong.astype(int) if wrong.dtype == bool else wrong for hint, wrong in different.items()}
