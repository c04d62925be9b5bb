"""Small runs with preferences in memory, for comparisons: no folder, and every step of a run is measured.

    base = begin(seed=0)                                      a small model that answers sums and greetings
    rows = prefer(base, Preference("dpo", beta=0.1))          how its answers change, step by step

Runs that begin with the same base read the same pairs in the same order, whatever their loss is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.summary import brief
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective, preference
from minimoe.losses.objective import Objective, Shard
from minimoe.losses.preference import Preference
from minimoe.optim import clipping, optimizer
from minimoe.text import chat, instructions, tokenizer
from minimoe.text.tokenizer import ChatTokenizer
from minimoe.tuning import dpo, packing, pairs
from minimoe.tuning.pairs import Example

CONFIG = ModelConfig(
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    context=64,
    experts=4,
    expert_width=32,
    noisy_gating=False,
)
ANSWERING = TrainConfig(steps=400, batch=12, learning_rate=1e-2, warmup=20)
PREFERRING = TrainConfig(batch=32, learning_rate=3e-4, warmup=5, weight_decay=0.0, final_rate=1.0, schedule="linear")

INSTRUCTIONS, PAIRS = ("sums", "yes or no", "manners"), ("truth", "politeness")
"""The kinds of data/ that these models learn. A pair is used only if one of these instructions has its prompt."""


@brief
class Base(NamedTuple):
    """A model that answers, and pairs of answers to questions of the kinds that it knows."""

    params: Decoder
    config: ModelConfig
    codec: ChatTokenizer
    train: list[Example]
    validation: list[Example]
    seed: int


def begin(seed: int, steps: int = ANSWERING.steps) -> Base:
    """Trains a small model from nothing to answer the instructions of two kinds."""
    asked, _ = instructions.split([one for one in instructions.read() if one.kind in INSTRUCTIONS])
    questions = {one.turns[:-1] for one in instructions.read() if one.kind in INSTRUCTIONS}
    given = [one for one in instructions.read_pairs() if one.kind in PAIRS and one.prompt in questions]
    text = "\n" + "".join(turn.text for one in asked for turn in one.turns)
    text += "".join(one.prompt[-1].text + one.chosen + one.rejected for one in given)
    codec = tokenizer.with_chat_tokens(tokenizer.build("char", text))
    assert isinstance(codec, ChatTokenizer)
    config = ModelConfig(**vars(CONFIG) | {"vocab_size": codec.vocab_size})
    rng = np.random.default_rng(seed)
    params = decoder.init(rng, config)
    documents = [chat.encode(codec, one.turns) for one in asked]
    batches = packing.Batches(documents, config.context, ANSWERING.batch, pack=True, seed=seed)
    _learn(params, batches.read(), Objective(), config, ANSWERING, steps)
    train, validation = (pairs.encoded(codec, part) for part in instructions.split(given))
    return Base(params, config, codec, train, validation, seed)


class Row(NamedTuple):
    """What was measured before a step: of the held-out pairs, and of the training pairs of the step."""

    step: int
    held_out: preference.Measures | None  # at every tenth step
    training: preference.Measures
    gap: float  # h of the loss, the mean over the training pairs of the step
    likelier: float | None  # share of the held-out pairs whose chosen answer has the larger log-probability


def prefer(base: Base, loss: Preference, steps: int = 80, learning_rate: float = PREFERRING.learning_rate) -> list[Row]:
    """Tunes a copy of the base by ``loss`` → a row for each step. The base stays as it is."""
    params = tree.map(np.copy, base.params)
    train, held_out = (dpo.sums_of(params, base.config, part).logp for part in (base.train, base.validation))
    batches = pairs.Batches(base.train, train, PREFERRING.batch // 2, base.seed)
    rows: list[Row] = []

    def watch(number: int, totals: Any) -> None:
        score = loss.score(totals.sums)
        of_all = likelier = None
        if number % 10 == 0:
            sums = dpo.sums_of(params, base.config, base.validation, loss, held_out)
            of_all, likelier = preference.measures(loss, sums), float((sums.logp[:, 0] > sums.logp[:, 1]).mean())
        gap = float((score[:, 0] - score[:, 1]).mean())
        rows.append(Row(number, of_all, preference.measures(loss, totals.sums), gap, likelier))

    recipe = TrainConfig(**vars(PREFERRING) | {"learning_rate": learning_rate})
    _learn(params, batches.read(), Objective(token_loss=loss), base.config, recipe, steps, watch)
    return rows


def _learn(
    params: Decoder,
    batches: Iterator[Shard],
    goal: Objective,
    config: ModelConfig,
    recipe: TrainConfig,
    steps: int,
    watch: Any = lambda number, totals: None,
) -> None:
    """Takes ``steps`` steps with one worker; changes ``params`` in place."""
    recipe = TrainConfig(**vars(recipe) | {"steps": steps})
    moments = optimizer.init(params, recipe)
    for number in range(steps):
        totals, gradient = objective.loss_and_gradient(params, [next(batches)], config, goal)
        watch(number, totals)
        clipping.clip(gradient, recipe.clip)
        optimizer.update(params, gradient, moments, recipe, number)
