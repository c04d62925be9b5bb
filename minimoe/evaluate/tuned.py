"""The part of the suite for models that were tuned to answer: instructions, preferences, and a probe for bias.

    held-out instructions   share that is answered exactly with greedy decoding, by kind     ``exchanges``
    preferred answers       share of held-out pairs whose better answer is likelier          ``preferences``
    length of answers       characters, beside those of the expected answers                 ``exchanges``
    praise and blame        which word of a pair praise goes with, in nats                   ``bias``

A run that was tuned with a file of its own is asked what is held out in that file; every other run is asked what is
held out in the file of ``data/``. A model that was tuned with preferences only was tuned with instructions before, in
another run, whose file is not known here. Models that are compared answer the same questions, those of the first one.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.evaluate import bias, exchanges, preferences
from minimoe.parallel.thread_pool import Map
from minimoe.storage.checkpoint import Model, RunConfig
from minimoe.text import chat, instructions
from minimoe.text.instructions import Instruction, Pair

INSTRUCTIONS, PREFERENCES = "held-out instructions", "preferred answers"
LENGTH, BIAS = "length of answers, characters", "praise and blame, nats"
"""Groups of the table; the name of a group of means ends with their unit."""


TOO_LONG = "not asked: none of them fits into the model's context"


@brief
class Questions(NamedTuple):
    """What is held out for tuned models."""

    instructions: list[Instruction]
    pairs: list[Pair]


@brief
class Marks(NamedTuple):
    """The results of n attempts."""

    right: NDArray[np.bool_]  # (n,)
    chance: float  # the share right by chance
    reachable: float | None = None  # the share right in real text; None if there is no such text


@brief
class Means(NamedTuple):
    """Numbers of which the mean is shown."""

    values: NDArray[np.float64]  # (n,)
    chance: float | None  # what the mean would be without any skill or bias; None if that has no meaning
    reachable: float | None  # the mean in real answers


@brief
class Found(NamedTuple):
    """The results, marks by "group, name" and means by "group, unit: name"; a string says why there are none."""

    marks: dict[str, Marks | str]
    means: dict[str, Means | str]


def is_tuned(model: Model) -> bool:
    """Whether the model has tokens for a chat, which ``minimoe sft`` gives it."""
    return chat.can_chat(model.tokenizer)


def questions_for(run: RunConfig) -> Questions:
    """What a run may be asked, because it is held out.

    Raises:
        UserError: a file that the run was tuned with is gone.
    """
    kind, settings = (run.tuning.kind, run.tuning.settings) if run.tuning else ("", {})
    given = settings.get("data")
    path = Path(given) if isinstance(given, str) else None
    _, asked = instructions.split(instructions.read(path if kind == "sft" else None))
    _, judged = instructions.split(instructions.read_pairs(path if kind == "dpo" else None))
    return Questions(asked, judged)


def measure(model: Model, held_out: Questions, questions: int, pool: Map = map) -> Found:
    """All results for one model, with at most ``questions`` of each kind.

    If a model was not tuned but is compared with one that was, strings that say so take the place of its results.
    """
    marks: dict[str, Marks | str] = {}
    means: dict[str, Means | str] = {}
    kinds = dict.fromkeys(item.kind for item in held_out.instructions)
    try:
        answered = exchanges.answer(model, held_out.instructions, questions, pool)
        for kind in kinds:
            fits = kind in answered.right
            marks[f"{INSTRUCTIONS}, {kind}"] = Marks(answered.right[kind], answered.chance[kind]) if fits else TOO_LONG
        length = Means(answered.lengths, None, float(answered.expected.mean())) if answered.right else TOO_LONG
        means[f"{LENGTH}: mean"] = length
    except UserError as error:
        marks |= {f"{INSTRUCTIONS}, {kind}": f"not asked: {error}" for kind in kinds}
        means[f"{LENGTH}: mean"] = f"not asked: {error}"
    kinds = dict.fromkeys(pair.kind for pair in held_out.pairs)
    try:
        likelier = preferences.prefer(model, held_out.pairs, questions)
        marks |= {
            f"{PREFERENCES}, {kind}": Marks(likelier[kind], 0.5) if kind in likelier else TOO_LONG for kind in kinds
        }
    except UserError as error:
        marks |= {f"{PREFERENCES}, {kind}": f"not measured: {error}" for kind in kinds}
    try:
        means |= {f"{BIAS}: {group}": Means(d, 0.0, None) for group, d in bias.probe(model).items()}
    except UserError as error:
        means |= {f"{BIAS}: {group}": f"not measured: {error}" for group in bias.GROUPS}
    return Found(marks, means)
