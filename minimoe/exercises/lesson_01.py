"""Checks of lesson 01: tokens and the embedding."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure
from minimoe.layers import embedding
from minimoe.layers.embedding import Embedding


def rows_without_gradient(answer: Answer) -> Report:
    """(tokens, vocabulary) → the number of rows that no token of the batch uses."""
    cases = (
        (np.array([[3, 0, 3, 10, 3, 3], [10, 5, 3, 5, 1, 3]]), 19),
        (np.array([[1, 1, 1]]), 5),
        (np.array([[2, 0], [1, 2]]), 3),  # every row is used
    )
    return first_failure(_rows_without_gradient(answer, *case) for case in cases)


def _rows_without_gradient(answer: Answer, tokens: Array, vocabulary: int) -> Report:
    used = len(np.unique(tokens))
    once = int((np.bincount(tokens.reshape(-1)) == 1).sum())
    in_sequences = [len(np.unique(sequence)) for sequence in tokens]
    largest = int(tokens.max())
    hints = {
        "these are the rows that are used; count the others.": used,
        "a token that occurs twice uses one row, not two.": vocabulary - tokens.size,
        "this counts the first sequence only: a batch has several sequences.": vocabulary - in_sequences[0],
        "this counts the last sequence only: a batch has several sequences.": vocabulary - in_sequences[-1],
        "a token that occurs in two sequences uses one row, not two.": vocabulary - sum(in_sequences),
        "rows above the largest token of the batch are not used either.": largest + 1 - used,
        "rows below the largest token can be unused as well: count the different tokens.": vocabulary - largest - 1,
        "a row that is used more than once has a gradient too.": vocabulary - once,
    }
    right = vocabulary - used
    return values(
        answer,
        (tokens, vocabulary),
        {"rows": right},
        mistakes={"rows": {hint: wrong for hint, wrong in hints.items() if wrong != right}},
    )


def undo_merges(answer: Answer) -> Report:
    """(ids, merges) → the bytes that the ids stand for."""
    merges = [(101, 101), (256, 100), (32, 110), (258, 257), (104, 257)]  # ee, eed, " n", " need", heed
    ids = [100, 257, 32, 260, 259, 257, 255, 256, 0]
    return first_failure(_undo_merges(answer, *case) for case in ((ids, merges), ([104, 105], [])))


def _undo_merges(answer: Answer, ids: list[int], merges: list[tuple[int, int]]) -> Report:
    once = _expanded(ids, merges)
    swapped = [(right, left) for left, right in merges]
    return values(
        answer,
        (list(ids), list(merges)),
        {"bytes": np.array(_bytes(ids, merges))},
        mistakes={
            "bytes": {
                "a pair may contain other pairs: undo the merges of its parts as well.": np.array(once),
                "two levels are not enough: continue until every id is below 256.": np.array(_expanded(once, merges)),
                "id 256 is a pair too, the first one: only ids below 256 are bytes.": np.array(
                    _bytes(ids, merges, below=257)
                ),
                "the two halves of a pair are the wrong way round.": np.array(_bytes(ids, swapped)),
                "ids of 256 and above are left out, but each of them stands for at least two bytes.": np.array(
                    [i for i in ids if i < 256]
                ),
            }
        },
    )


def with_positions_backward(answer: Answer) -> Report:
    """(tokens, vocabulary, dy) → dtable, dposition."""
    rng = np.random.default_rng(1)
    tokens = np.array([[2, 5, 2, 0], [0, 2, 6, 6], [5, 5, 1, 2]])
    (B, T), V, D = tokens.shape, 8, 5
    dy = rng.standard_normal((B, T, D))
    table, position = rng.standard_normal((V, D)), rng.standard_normal((T, D))

    def loss(table: Array, position: Array) -> Array:
        y, _ = embedding.forward(Embedding(table), tokens)
        return ((y + position) * dy).sum()

    last = np.zeros((V, D))
    last[tokens] += dy
    return gradients(
        answer,
        (tokens, V, dy),
        loss,
        {"table": table, "position": position},
        sizes={"B": B, "T": T, "V": V, "D": D},
        mistakes={
            "dtable": {
                "a token that occurs twice counts only once here: an indexed += keeps only the last write.": last,
                "this is the mean over the places of a token; its gradient is the sum.": _mean_by_token(tokens, V, dy),
                "the rows end at the largest token of the batch, but the table has V rows.": _sums(tokens, V, dy)[:-1],
            },
            "dposition": {
                "every sequence of the batch uses the same row for place t: take the sum over B, not the mean.": (
                    dy.mean(0)
                ),
                "this is the first sequence's share only, but every sequence uses row t.": dy[0],
                "this is the last sequence's share only, but every sequence uses row t.": dy[-1],
            },
        },
    )


def tied_backward(answer: Answer) -> Report:
    """(table, tokens, dz) → dtable, for a table that is both the embedding and the output layer."""
    rng = np.random.default_rng(1)
    tokens = np.array([2, 5, 2, 0])
    N, V, D = len(tokens), 7, 3
    table, dz = rng.standard_normal((V, D)), rng.standard_normal((N, V))

    def loss(table: Array) -> Array:
        y, _ = embedding.forward(Embedding(table), tokens)
        return (y @ table.T * dz).sum()

    y = table[tokens]
    as_embedding = np.zeros((V, D))
    np.add.at(as_embedding, tokens, dz @ table)
    as_output = dz.T @ y
    last = np.zeros((V, D))
    last[tokens] += dz @ table
    return gradients(
        answer,
        (table, tokens, dz),
        loss,
        {"table": table},
        sizes={"N": N, "V": V, "D": D},
        mistakes={
            "dtable": {
                "the table reaches z by two paths, and this is the path as embedding only.": as_embedding,
                "the table reaches z by two paths, and this is the path as output layer only.": as_output,
                "both paths are there, but a repeated token counts once: an indexed += keeps only the last write.": (
                    as_output + last
                ),
                "both paths are there, but they are averaged: add them.": (as_embedding + as_output) / 2,
                "this doubles the path as embedding, but the two paths have different gradients.": 2 * as_embedding,
                "this doubles the path as output layer, but the two paths have different gradients.": 2 * as_output,
            }
        },
    )


def _expanded(ids: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Every merge undone once, and no further."""
    return [part for i in ids for part in ((i,) if i < 256 else merges[i - 256])]


def _bytes(ids: list[int], merges: list[tuple[int, int]], below: int = 256) -> list[int]:
    """Every merge undone until every id is less than ``below``."""
    while max(ids) >= below:
        ids = [part for i in ids for part in ((i,) if i < below else merges[i - 256])]
    return ids


def _sums(tokens: Array, vocabulary: int, dy: Array) -> Array:
    """The sum of dy over the places of each token."""
    total = np.zeros((vocabulary, dy.shape[-1]))
    np.add.at(total, tokens, dy)
    return total


def _mean_by_token(tokens: Array, vocabulary: int, dy: Array) -> Array:
    """The mean of dy over the places of each token."""
    return _sums(tokens, vocabulary, dy) / np.maximum(np.bincount(tokens.reshape(-1), minlength=vocabulary), 1)[:, None]
