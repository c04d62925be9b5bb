"""What a tuned model answers to instructions that were held out: how many answers are exact, and how long they are.

    found = answer(model, items, questions=200)
    found.right["sums"]        whether each answer is exactly the expected one, and ends there

Decoding is greedy, so nothing is random. An answer that never ends is wrong, whatever it begins with, and its length is
that of what was written. Exactness is a strict measure, and for short answers the only fair one: "7" is right and "7 or
8" is not. As in the other tasks, the number that chance reaches is that of giving the commonest answer of a kind every
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.summary import brief
from minimoe.inference import conversation
from minimoe.inference.conversation import Talker
from minimoe.parallel.thread_pool import Map
from minimoe.text import chat
from minimoe.text.instructions import Instruction

TOKENS = 200
"""Tokens that are written for an answer, at most."""


@brief
class Answered(NamedTuple):
    """The answers of a model, kind by kind; n instructions are of a kind, and N of all kinds."""

    right: dict[str, NDArray[np.bool_]]  # by kind: (n,)
    chance: dict[str, float]  # by kind: the share of the commonest expected answer
    lengths: NDArray[np.float64]  # (N,)  characters that were written
    expected: NDArray[np.float64]  # (N,)  characters of the expected answers


class Reply(NamedTuple):
    """One answer."""

    text: str
    ended: bool  # whether the model ended it


def answer(model: Talker, items: Sequence[Instruction], questions: int, pool: Map = map) -> Answered:
    """Asks at most ``questions`` instructions of each kind, the first ones that fit into the model's context.

    Raises:
        UserError: the model has no tokens for a chat, or an instruction holds a character that it does not know.
    """
    fitting = [item for item in items if _fits(model, item)]
    chosen = first_of_each_kind(fitting, questions)
    replies = list(pool(lambda item: reply(model, item), chosen))
    right: dict[str, list[bool]] = {}
    expected: dict[str, list[str]] = {}
    for item, found in zip(chosen, replies, strict=True):
        wanted = item.turns[-1].text
        right.setdefault(item.kind, []).append(found.ended and found.text == wanted)
        expected.setdefault(item.kind, []).append(wanted)
    return Answered(
        {kind: np.array(marks, np.bool_) for kind, marks in right.items()},
        {kind: max(map(wanted.count, wanted)) / len(wanted) for kind, wanted in expected.items()},
        np.array([len(found.text) for found in replies], np.float64),
        np.array([len(item.turns[-1].text) for item in chosen], np.float64),
    )


def reply(model: Talker, item: Instruction) -> Reply:
    """The likeliest answer to everything in ``item`` before its last answer; raises ``UserError`` like ``answer``."""
    ids = np.array(list(conversation.reply(model, item.turns[:-1], temperature=0, tokens=TOKENS)), np.int32)
    end = np.isin(ids, chat.end_ids(model.tokenizer))
    return Reply(model.tokenizer.decode(ids[~end]), bool(end.any()))


def _fits(model: Talker, item: Instruction) -> bool:
    """Whether the model can read the prompt and write the expected answer, whose last token is never read."""
    return len(chat.encode(model.tokenizer, item.turns).ids) <= model.config.context + 1


def first_of_each_kind(items: Sequence[Instruction], count: int) -> list[Instruction]:
    """The first ``count`` items of each kind, kind by kind."""
    kinds = dict.fromkeys(item.kind for item in items)
    return [item for kind in kinds for item in [one for one in items if one.kind == kind][:count]]
