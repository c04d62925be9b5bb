"""Which of two answers a model prefers: the share of held-out pairs in which the better one is likelier.

    log p(chosen | prompt) > log p(rejected | prompt)        both summed over the answer and its end

A sum over more tokens is lower, so a model prefers short answers before it has learned anything about pairs. Where the
better answer is the shorter one, this share therefore says little; it says most where both are of one length. The share
by chance is one half. Two answers that are equally likely are no preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minimoe.evaluate import harness
from minimoe.inference.conversation import Talker
from minimoe.text import chat
from minimoe.text.chat import Turn
from minimoe.text.instructions import Pair


class Judge(Talker, Protocol):
    """A model that can answer, and that ends texts."""

    @property
    def end_tokens(self) -> tuple[int, ...]: ...


def prefer(model: Judge, pairs: Sequence[Pair], questions: int) -> dict[str, NDArray[np.bool_]]:
    """By kind, for at most ``questions`` pairs of each: whether the better answer is the likelier one, (n,).

    Pairs of which one answer does not fit into the model's context are left out.

    Raises:
        UserError: the model has no tokens for a chat, or a pair holds a character that it does not know.
    """
    rows: dict[str, list[tuple[list[int], list[int]]]] = {}  # by kind; the better answer comes first
    for pair in pairs:
        both = [_row(model, pair, answer) for answer in (pair.chosen, pair.rejected)]
        if all(len(before) + len(after) <= model.config.context + 1 for before, after in both):
            rows.setdefault(pair.kind, []).extend(both)
    chosen = {kind: of_kind[: 2 * questions] for kind, of_kind in rows.items()}
    logp = iter(harness.score(model, [row for of_kind in chosen.values() for row in of_kind]))
    found = {}
    for kind, of_kind in chosen.items():
        better, worse = np.array([next(logp).logp for _ in of_kind]).reshape(-1, 2).T
        found[kind] = better > worse
    return found


def _row(model: Judge, pair: Pair, answer: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and of an answer with its end."""
    before = chat.prompt(model.tokenizer, pair.prompt).tolist()
    whole = chat.encode(model.tokenizer, [*pair.prompt, Turn("assistant", answer)]).ids.tolist()
    return before, whole[len(before) :]
