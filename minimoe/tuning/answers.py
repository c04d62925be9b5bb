"""Answers: what a tuned model says to instructions, and how many of its answers are exactly right.

    answers.write(model, [turns, …])              one answer for each prompt
    answers.score(model, instructions)            for each kind: how many answers are right, and how many there are

Decoding is greedy and stops at the id that ends an answer, so nothing is random. Prompts of the same length are
answered together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minimoe.core.arrays import to_host
from minimoe.core.errors import UserError
from minimoe.inference import generation, kv_cache
from minimoe.inference.conversation import Talker
from minimoe.text import chat
from minimoe.text.chat import Turn
from minimoe.text.instructions import Instruction
from minimoe.text.tokenizer import Ids

LONGEST = 200
"""Tokens of an answer, at most."""

TOGETHER = 32
"""Prompts that are answered together, at most."""


class Answer(NamedTuple):
    """What a model said."""

    text: str
    ended: bool  # False: it did not come to an end within the tokens that it was given


class Score(NamedTuple):
    """How many answers of a kind are exactly right."""

    right: int
    asked: int


def write(model: Talker, prompts: Sequence[Sequence[Turn]], tokens: int = LONGEST) -> list[Answer]:
    """The likeliest answer to each prompt, of at most ``tokens`` tokens.

    Raises:
        UserError: the model has no tokens for a chat, a prompt does not end with a question or holds unknown
            characters, or ``tokens`` is not positive.
    """
    if tokens < 1:
        raise UserError(f"tokens {tokens} leaves no room for an answer: choose at least 1.")
    ends = chat.end_ids(model.tokenizer)
    rows = [chat.prompt(model.tokenizer, turns) for turns in prompts]
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    found: dict[int, Answer] = {}
    for alike in by_length.values():
        for start in range(0, len(alike), TOGETHER):
            some = alike[start : start + TOGETHER]
            for number, ids in zip(some, _greedy(model, np.stack([rows[i] for i in some]), ends, tokens), strict=True):
                ended = bool(ids) and ids[-1] in ends
                found[number] = Answer(model.tokenizer.decode(ids[:-1] if ended else ids), ended)
    return [found[number] for number in range(len(rows))]


def score(model: Talker, items: Sequence[Instruction], tokens: int = LONGEST) -> dict[str, Score]:
    """Given the turns before the last answer, how often the model writes exactly this answer, and ends it: per kind.

    Raises:
        UserError: as for ``write``.
    """
    written = write(model, [item.turns[:-1] for item in items], tokens)
    scores: dict[str, Score] = {}
    for item, answer in zip(items, written, strict=True):
        right, asked = scores.get(item.kind, Score(0, 0))
        scores[item.kind] = Score(right + (answer.ended and answer.text == item.turns[-1].text), asked + 1)
    return dict(sorted(scores.items()))


def _greedy(model: Talker, prompts: Ids, ends: tuple[int, ...], tokens: int) -> list[list[int]]:
    """prompts (B, n) → for each, the likeliest ids up to one of ``ends`` or to as many as ``tokens``."""
    cache = kv_cache.init(model.params, model.config, len(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    unread: Any = prompts
    going = np.ones(len(prompts), bool)
    for _ in range(tokens):
        logits = to_host(generation.extend(model.params, cache, unread))
        if not np.isfinite(logits).all():
            raise UserError("the model's logits are not finite: it has diverged or is damaged; use another checkpoint.")
        best = logits.argmax(-1)
        for row in np.flatnonzero(going):
            written[row].append(int(best[row]))
        going &= ~np.isin(best, ends)
        if not going.any():
            break
        unread = best[:, None]  # a row that has ended goes on, unread by anyone, until the last one ends
    return written
