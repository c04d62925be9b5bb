"""Pairs of answers as ids, in trl's form and as a shard, and the cases that are compared with trl."""

from typing import Any, NamedTuple

import numpy as np

from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.losses.preference import Answers, Preference, places


class Case(NamedTuple):
    trl: str  # what trl calls the loss
    loss: Preference
    auxiliary: float = 0.0  # coefficient of the pooled balance loss
    pairs: int = 3

    @property
    def objective(self) -> Objective:
        return Objective(Coefficients(balance=self.auxiliary), pooled_balance=True, token_loss=self.loss)


CASES = {
    "dpo": Case("sigmoid", Preference("dpo", 0.3)),
    "dpo, auxiliary loss": Case("sigmoid", Preference("dpo", 0.3), auxiliary=0.25),
    # trl smooths the labels of its sigmoid loss only under another name, which sorts the pairs: one cannot be sorted
    "dpo, smoothed": Case("aot", Preference("dpo", 0.3, label_smoothing=0.2), pairs=1),
    "ipo": Case("ipo", Preference("ipo", 0.3)),
    "simpo": Case("simpo", Preference("simpo", 2.0, margin=1.0)),
    "simpo, smoothed": Case("simpo", Preference("simpo", 2.0, label_smoothing=0.1, margin=0.5)),
}
PAIRS = (
    ([3, 4, 5], [6, 7, 8, 1], [9, 1]),
    ([10], [11, 1], [12, 2, 4, 1]),
    ([7, 7], [2, 9, 3, 1], [5, 6, 10, 11, 1]),
)
"""Prompt, chosen answer, rejected answer: ids below 13, of which 1 ends an answer and 0 is padding."""


def examples(case: Case) -> list[dict[str, list[int]]]:
    """The pairs of a case as trl's collator takes them."""
    return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS[: case.pairs]]


def shard_of(case: Case, reference: Any = None) -> Shard:
    """The same pairs: the chosen answers first. The last token of a sequence predicts nothing, but is routed."""
    rows = [(p, a) for side in (1, 2) for p, a in ((pair[0], pair[side]) for pair in PAIRS[: case.pairs])]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = np.zeros((len(rows), longest), int)
    mask, counts = np.zeros((2, len(rows), longest))
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        mask[row, : len(prompt) + len(answer)] = 1
        counts[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = 1
    place = np.concatenate([places(case.pairs)[::2], places(case.pairs)[1::2]])
    targets = np.roll(tokens, -1, axis=1)
    return Shard(tokens, targets, None, mask, counts, extra=Answers(place, reference))


def fingerprint(leaf: Any) -> float:
    """One number that depends on every entry of an array and on its place."""
    values = np.asarray(leaf, np.float64).reshape(-1)
    return float(values @ np.cos(np.arange(values.size)))
