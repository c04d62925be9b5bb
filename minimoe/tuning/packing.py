"""Packing: short documents of unequal length become rows of one length, with or without padding.

    packed    a a a a|b b b|c c c c c        tokens
              0 0 0 0 4 4 4 7 7 7 7 7        starts: no query sees another document
    padded    a a a a . . . . . . . .        one document in each row; the rest is padding

A document of n ids gives n − 1 pairs of a token and its target, so no pair crosses a border: the last token of a
document never predicts the first one of the next. There are two masks. ``mask`` is 0 for padding, which is no token at
all. ``loss_mask`` is 1 where the target counts, that is, where it is a token of an answer or the end of an answer; the
other tokens are read, routed and balanced, but not learned.

Krell et al. 2021, arXiv 2107.02027.  Lesson: lessons/40_instruct.ipynb
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minimoe.core.errors import UserError
from minimoe.losses.objective import Shard
from minimoe.text.chat import Encoded


def rows_of(lengths: Sequence[int], space: int, pack: bool) -> list[list[int]]:
    """Which documents, by number, share a row of ``space`` places.

    In the order given, each document goes to the first row with room. Without ``pack``, each document
    has a row of its own.

    Raises:
        UserError: a document is longer than a row, or empty.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number, length in enumerate(lengths):
        if not 1 <= length <= space:
            raise UserError(f"a document of {length} tokens does not fit into a row of {space}: cut it first.")
        place = next((row for row, left in enumerate(room) if left >= length), None) if pack else None
        if place is None:
            rows.append([])
            room.append(space)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= length
    return rows


def shard_of(rows: Sequence[Sequence[Encoded]], packed: bool) -> Shard:
    """The documents of each row, one after the other and filled up to the longest row → a shard on the host.

    If the rows are ``packed``, the shard has ``starts``; a place of padding sees only itself.

    Raises:
        UserError: a document has fewer than two ids, so there is no token to predict.
    """
    for document in (document for row in rows for document in row):
        if len(document.ids) < 2:
            raise UserError(f"a document of {len(document.ids)} token has nothing to predict: give a longer one.")
    T = max(sum(len(document.ids) - 1 for document in row) for row in rows)
    tokens, targets = np.zeros((2, len(rows), T), np.int32)
    mask, loss_mask = np.zeros((2, len(rows), T), np.float32)
    starts = np.tile(np.arange(T), (len(rows), 1))
    for b, row in enumerate(rows):
        start = 0
        for ids, answer in row:
            place = slice(start, start + len(ids) - 1)
            tokens[b, place], targets[b, place] = ids[:-1], ids[1:]
            mask[b, place], loss_mask[b, place] = 1, answer[1:]  # the mask of a place is that of its target
            starts[b, place] = start
            start = place.stop
    return Shard(tokens, targets, mask=mask, loss_mask=loss_mask, starts=starts if packed else None)


class Batches(NamedTuple):
    """Reads documents in epochs, each in another order."""

    documents: Sequence[Encoded]
    space: int  # places in a row
    rows: int  # rows in a batch
    pack: bool
    seed: int = 0

    def read(self, first: int = 0) -> Iterator[Shard]:
        """Yields batches without end, but skips the ``first`` batches. A seed always gives the same batches.

        Rows that are left over at the end of an epoch begin the first batch of the next epoch.
        """
        lengths = [len(document.ids) - 1 for document in self.documents]
        waiting: list[list[int]] = []
        number = taken = 0
        while True:
            while len(waiting) < self.rows:
                order = np.random.default_rng((self.seed, number)).permutation(len(lengths))
                filled = rows_of([lengths[i] for i in order], self.space, self.pack)
                waiting += [[int(order[place]) for place in row] for row in filled]
                number += 1
            batch, waiting = waiting[: self.rows], waiting[self.rows :]
            taken += 1
            if taken > first:
                yield shard_of([[self.documents[i] for i in row] for row in batch], self.pack)

    def per_epoch(self) -> float:
        """How many batches the first epoch has."""
        order = np.random.default_rng((self.seed, 0)).permutation(len(self.documents))
        lengths = [len(self.documents[i].ids) - 1 for i in order]
        return len(rows_of(lengths, self.space, self.pack)) / self.rows
