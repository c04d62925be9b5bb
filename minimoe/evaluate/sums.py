"""Sums that a model never saw, asked in the form of its training text and marked by the exact answer.

    [ ] - 36 = 21   The box holds 36 + 21 = |57|         addition
    36 + [ ] = 57   The box holds 57 - 36 = |21|         subtraction

Of all the forms in data/make_sums.py, this is the only one after which nothing but a number can follow. A sum is unseen
if the text contains no fact of its family: none of a + b, b + a, c − a and c − b, where c = a + b. The model therefore
cannot remember the answer; it must work it out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

A, B = range(4, 61), range(4, 40)
"""The numbers that are added, as in data/make_sums.py."""

ANSWER_TOKENS = 4
"""Tokens generated for an answer: at most two digits, the token that ends the number, and one more."""

EXAMPLE = "[ ] - 36 = 21   The box holds 36 + 21 = 57"

KINDS = ("addition", "subtraction")


class Question(NamedTuple):
    prompt: str
    answer: str


def are_in(text: str) -> bool:
    """Whether a text asks such questions at all; a model that never saw the form cannot be expected to answer."""
    return re.search(r"\d   The box holds \d+ [+-] \d+ = \d", text) is not None


def unseen(text: str, kind: str, count: int, seed: int = 0) -> list[Question]:
    """At most ``count`` different questions of a kind, ordered by ``seed``; ``text`` has none of their facts."""
    facts = set(re.findall(r"(?=(?<!\d)(\d+ [+-] \d+)(?!\d))", text))  # the lookahead finds both in 1 + 2 + 3
    pairs = [(a, b) for a in A for b in B if facts.isdisjoint(_family(a, b))]
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [_ask(kind, *pairs[i]) for i in order]


def is_right(written: str, answer: str) -> bool:
    """Whether a text begins with exactly this number: 5, 570 and 057 do not answer 57."""
    number = re.match(r"\d*", written)
    return number is not None and number[0] == answer


def best_constant(questions: list[Question]) -> float:
    """The share of questions for which the commonest answer is right: the rate that chance can reach."""
    _, counts = np.unique([question.answer for question in questions], return_counts=True)
    return float(counts.max() / len(questions))


def _family(a: int, b: int) -> set[str]:
    c = a + b
    return {f"{a} + {b}", f"{b} + {a}", f"{c} - {a}", f"{c} - {b}"}


def _ask(kind: str, a: int, b: int) -> Question:
    """The question, at the beginning of a new paragraph, as an exercise begins."""
    c = a + b
    if kind == "addition":
        return Question(f"\n\n[ ] - {a} = {b}   The box holds {a} + {b} = ", str(c))
    return Question(f"\n\n{a} + [ ] = {c}   The box holds {c} - {a} = ", str(b))
