"""Small training runs in memory, for comparisons: no folder, no progress bar, any part of the model frozen.

    data, _, codec = batches.prepare("data", recipe, config.context)
    found = [learn(config, recipe, data, seed) for seed in range(3)]

A run with the same seed reads the same batches whatever the model is, so runs of equal seed can be compared in pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.summary import brief
from minimoe.evaluate import text_loss
from minimoe.layers import decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective
from minimoe.losses.objective import Totals
from minimoe.losses.token_loss import TokenLoss
from minimoe.optim import clipping, optimizer
from minimoe.text.batches import Texts
from minimoe.training import step as steps


@brief
class Learned(NamedTuple):
    """A model after its run."""

    params: Decoder
    loss: float  # nats per token of the validation text
    load: NDArray[np.float64]  # (L, E)  each expert's share of a layer's assignments, on the validation text
    active: float  # experts per token in the last tenth of the training, averaged over the layers
    seconds: float  # of a training step, the median


def learn(
    config: ModelConfig,
    recipe: TrainConfig,
    data: Texts,
    seed: int,
    *,
    start: Decoder | None = None,
    frozen: Callable[[str], bool] = lambda name: False,
    look_ahead: bool = False,
    token_loss: TokenLoss | None = None,
    watch: Callable[[Decoder, Totals], None] = lambda params, totals: None,
) -> Learned:
    """Trains a new model with one worker. A parameter for which ``frozen(name)`` is true keeps its initial values.

    The model begins with a copy of ``start``, in the shapes of ``config``, or is drawn at random. Training minimises
    ``token_loss``, by default cross-entropy.

    ``look_ahead`` allows a router that is not causal, as in ``decoder.init``. ``watch`` is called at each step with the
    sums of the batch, before anything is changed.
    """
    rng = np.random.default_rng(seed)
    drawn = decoder.init(rng, config, recipe.dtype, look_ahead=look_ahead) if start is None else start
    params = tree.map(np.array, drawn)  # a copy: the steps change it in place
    moments = optimizer.init(params, recipe)
    named = dict(tree.named_leaves(params))
    goal = steps.objective_of(config, recipe)
    if token_loss is not None:
        goal = goal._replace(token_loss=token_loss)
    batches = data.batches(recipe.batch, config.context, seed)
    noise, times, active = np.random.default_rng(seed), [], []
    for number in range(recipe.steps):
        started = time.perf_counter()
        shards = steps.shard_batch(noise, params, *next(batches), config, recipe, 1)
        totals, gradient = objective.loss_and_gradient(params, shards, config, goal)
        watch(params, totals)
        moving = {name: d for name, d in tree.named_leaves(gradient) if not frozen(name)}
        clipping.clip(list(moving.values()), recipe.clip)
        optimizer.update_some(named, moving, moments, recipe, number)
        moe.update_state(decoder.mixtures(params), totals.stats, config, recipe)
        times.append(time.perf_counter() - started)
        active.append(np.mean([layer.assignments.sum() / layer.tokens for layer in totals.stats]))
    result = text_loss.evaluate(params, config, data.validation)
    last = active[-max(len(active) // 10, 1) :]
    return Learned(params, result.loss, result.load, float(np.mean(last)), float(np.median(times)))


def only(data: Texts, *names: str) -> Texts:
    """The documents of these names alone; raises ``KeyError`` if no document has one of the names."""
    numbers = {name: number for number, name in enumerate(data.names)}
    chosen = [numbers[name] for name in names]
    starts = [data.starts[data.spans[number]] for number in chosen]
    stops = np.cumsum([len(of_document) for of_document in starts]).tolist()
    spans = [slice(stop - len(own), stop) for stop, own in zip(stops, starts, strict=True)]
    return data._replace(
        names=list(names), starts=np.concatenate(starts), spans=spans, validation=[data.validation[n] for n in chosen]
    )
