"""Pairs of answers as ids, and batches of them: two sequences for each pair, of which only the answers count.

    begin user "What is 7 - 2?" assistant 5 end
          0     0 … 0          1         1             loss mask at the places that predict: only the answer and its end

Both answers of a pair follow the same prompt, so a batch holds every prompt twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.losses import preference
from minimoe.losses.objective import Shard
from minimoe.losses.preference import Answers
from minimoe.text import chat, instructions
from minimoe.text.chat import AnyTokenizer, Encoded, Turn
from minimoe.text.instructions import Pair
from minimoe.tuning import packing


class Example(NamedTuple):
    """A pair as ids. In a prompt of several turns, earlier answers of the assistant do not count."""

    kind: str
    chosen: Encoded
    rejected: Encoded


@brief
class Data(NamedTuple):
    """The pairs of a run."""

    train: list[Example]
    validation: list[Example]
    items: list[Pair]  # the pairs of ``validation``
    lost: int  # pairs that are left out because one of their answers does not fit into the context
    sha256: str


def read(tokenizer: AnyTokenizer, config: ModelConfig, path: str | Path | None = None) -> Data:
    """The pairs in a file, or those of ``data/``, split and encoded.

    Raises:
        UserError: the file cannot be read, is too small to be split, or holds a character that the model does not know;
            the model has no tokens for a chat; or no pair fits into the context.
    """
    parts: list[list[Example]] = [[], []]
    kept: list[Pair] = []
    lost = 0
    digest = hashlib.sha256()
    for part, items in zip(parts, instructions.split(instructions.read_pairs(path)), strict=True):
        for item in items:
            (example,) = encoded(tokenizer, [item])
            if max(len(one.ids) for one in (example.chosen, example.rejected)) > config.context + 1:
                lost += 1
                continue
            for ids, answer in (example.chosen, example.rejected):
                digest.update(np.int64(len(ids)).tobytes() + ids.tobytes() + answer.tobytes())
            part.append(example)
            if part is parts[1]:
                kept.append(item)
    if not all(parts):
        raise UserError(
            f"no pair of answers fits into the {config.context} tokens of the model's context: give shorter ones, or "
            "tune a model with a longer context."
        )
    return Data(parts[0], parts[1], kept, lost, digest.hexdigest())


def encoded(tokenizer: AnyTokenizer, items: Sequence[Pair]) -> list[Example]:
    """Pairs as ids, however long they are; raises ``UserError`` as ``chat.encode``."""
    return [
        Example(item.kind, *(_encode(tokenizer, item.prompt, text) for text in (item.chosen, item.rejected)))
        for item in items
    ]


def _encode(tokenizer: AnyTokenizer, prompt: Sequence[Turn], answer: str) -> Encoded:
    ids, of_answers = chat.encode(tokenizer, [*prompt, Turn("assistant", answer)])
    of_answers[: len(chat.prompt(tokenizer, prompt))] = False  # answers within the prompt are given, not chosen
    return Encoded(ids, of_answers)


def shard_of(examples: Sequence[Example], reference: NDArray[np.floating] | None = None) -> Shard:
    """P pairs, and what the reference gives to their answers (P, 2) → 2P padded sequences, on the host.

    The chosen answer of a pair is followed by its rejected one.
    """
    rows = [[one] for example in examples for one in (example.chosen, example.rejected)]
    answers = Answers(preference.places(len(examples)), None if reference is None else reference.reshape(-1))
    return packing.shard_of(rows, packed=False)._replace(extra=answers)


class Batches(NamedTuple):
    """Reads pairs in epochs, each in another order."""

    examples: Sequence[Example]
    reference: NDArray[np.floating] | None  # (pairs, 2)
    size: int  # pairs in a batch
    seed: int = 0

    def read(self, first: int = 0) -> Iterator[Shard]:
        """Yields batches without end, but skips the ``first`` batches. A seed always gives the same batches.

        A batch may hold the end of one epoch and the beginning of the next.
        """
        pairs = len(self.examples)
        epoch, done = divmod(first * self.size, pairs)
        order = self._epoch(epoch)[done:]
        while True:
            while len(order) < self.size:
                epoch += 1
                order = np.concatenate([order, self._epoch(epoch)])
            some, order = order[: self.size], order[self.size :]
            yield shard_of([self.examples[i] for i in some], None if self.reference is None else self.reference[some])

    def _epoch(self, number: int) -> NDArray[np.intp]:
        return np.random.default_rng((self.seed, number)).permutation(len(self.examples))


def in_pieces(
    examples: Sequence[Example], sequences: int, reference: NDArray[np.floating] | None = None
) -> list[tuple[NDArray[np.intp], Shard]]:
    """All pairs in shards of at most ``sequences`` sequences, each shard with the indices of its pairs.

    Pairs of similar length stand together.
    """
    lengths = [max(len(example.chosen.ids), len(example.rejected.ids)) for example in examples]
    order = np.argsort(lengths, kind="stable")
    pieces = []
    for start in range(0, len(order), max(1, sequences // 2)):
        some = order[start : start + max(1, sequences // 2)]
        pieces.append((some, shard_of([examples[i] for i in some], None if reference is None else reference[some])))
    return pieces
