"""Short tuning runs in memory, for comparisons: no folder and no progress bar, and batches can be altered on purpose.

    course = trial.learn(params, config, recipe, data, seed=0)
    leaking = trial.learn(params, config, recipe, data, seed=0, alter=lambda shard: shard._replace(starts=None))

Runs with the same seed read the same batches and draw the same noise, so they can be compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.summary import brief
from minimoe.layers.decoder import Decoder
from minimoe.losses.objective import Shard
from minimoe.optim import optimizer
from minimoe.training import step as steps
from minimoe.tuning import packing, sft


class Point(NamedTuple):
    """Both losses after some steps, in nats per token of an answer."""

    step: int
    train: float  # on as many of the examples that it learns from as there are held out
    validation: float


@brief
class Course(NamedTuple):
    """A model after a run, and its losses."""

    params: Decoder
    points: list[Point]


def learn(
    params: Decoder,
    config: ModelConfig,
    recipe: TrainConfig,
    data: sft.Data,
    seed: int,
    *,
    pack: bool = True,
    every: int | None = None,
    alter: Callable[[Shard], Shard] = lambda shard: shard,
) -> Course:
    """Tunes a copy of ``params`` with one worker, and measures after each ``every`` steps (by default, at the end).

    ``alter`` changes every batch before it is learned; what is measured is never altered.
    """
    params = tree.map(np.copy, params)
    moments = optimizer.init(params, recipe)
    documents = [example.ids for example in data.train]
    batches = packing.Batches(documents, config.context, recipe.batch, pack, seed).read()
    noise = np.random.default_rng(seed)
    some = _spread(data.train, len(data.validation))
    both = [sft.pieces_of(part, config) for part in (some, data.validation)]
    points = []
    for number in range(recipe.steps):
        shards = steps.cut(noise, params, alter(next(batches)), config, recipe, 1)
        steps.train_step(params, moments, shards, config, recipe, number)
        if number + 1 == recipe.steps or (every and (number + 1) % every == 0):
            points.append(Point(number + 1, *(sft.validate_on(params, config, part, map).loss for part in both)))
    return Course(params, points)


def of_kinds(data: sft.Data, kinds: Sequence[str], most: int | None = None) -> sft.Data:
    """The examples of some kinds alone; of those to learn from, at most ``most``, evenly spread over all."""
    train = [example for example in data.train if example.kind in kinds]
    pairs = zip(data.validation, data.items, strict=True)
    held_out = [(example, item) for example, item in pairs if example.kind in kinds]
    return data._replace(
        train=train if most is None else _spread(train, most),
        validation=[example for example, _ in held_out],
        items=[item for _, item in held_out],
    )


def _spread(examples: list[sft.Example], most: int) -> list[sft.Example]:
    """At most ``most`` of the examples, evenly spread."""
    return examples[:: max(1, -(-len(examples) // most))]
