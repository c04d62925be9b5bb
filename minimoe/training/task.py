"""What a run learns: its batches, its loss, how it is validated and what is written at its end.

    task = task.of_text(run, texts)            the default: the next token of a text
    trainer.start(run, task, params)           a task of another kind, from given parameters

The loop of ``trainer`` is the same for every task. A task other than the default is recorded in the run's config.json
as a ``checkpoint.Tuning``. When the run is resumed, the module that made the task makes it again from this record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimoe.core.summary import brief
from minimoe.evaluate import text_loss
from minimoe.layers.decoder import Decoder
from minimoe.losses.objective import Objective, Shard, Totals
from minimoe.parallel.thread_pool import Map
from minimoe.storage.checkpoint import Model, RunConfig
from minimoe.text.batches import Texts
from minimoe.training import run_report
from minimoe.training import step as steps


class Validation(NamedTuple):
    """What is measured on data that the run does not learn from."""

    loss: float  # the number that falls while the model gets better; early stopping compares it
    details: dict[str, Any] = {}  # further fields for the row of the metrics, which JSON can write


@brief
class Task(NamedTuple):
    """What a run learns."""

    reads: str  # a sentence about the data, for the opening
    batches: Callable[
        [int], Iterator[Shard]
    ]  # called with the steps already taken: the batches after them, on the host
    objective: Objective
    validate: Callable[[Decoder, Map], Validation]
    report: Callable[[Path, Model, list[dict[str, Any]]], None]  # writes the sample and the figures of a finished run
    together: int = 1  # so many sequences of a batch, one after the other, stay in one shard: 2 for pairs
    noise: bool = True  # whether the routers draw their noise
    measure: Callable[[Totals], dict[str, Any]] | None = None  # further fields for the metrics of a step
    patience: int | None = None  # stop after so many validations without a new lowest loss, and keep the best model


def of_text(run: RunConfig, data: Texts) -> Task:
    """The ordinary task: to predict every next token of the training texts."""
    recipe, config = run.recipe, run.config

    def batches(first: int) -> Iterator[Shard]:
        return (Shard(*batch) for batch in data.batches(recipe.batch, config.context, recipe.seed, first))

    def validate(params: Decoder, pool: Map) -> Validation:
        return Validation(text_loss.evaluate(params, config, data.validation, pool).loss)

    def report(folder: Path, model: Model, rows: list[dict[str, Any]]) -> None:
        run_report.write(folder, model, data, rows)

    return Task(run_report.about_texts(data), batches, steps.objective_of(config, recipe), validate, report)


def is_best(losses: Sequence[float]) -> bool:
    """Whether the last of these validation losses is lower than all before it."""
    return all(losses[-1] < earlier for earlier in losses[:-1])


def is_over(losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last ``patience`` validations brought no new lowest loss."""
    if patience is None or not losses:
        return False
    lowest = min(range(len(losses)), key=losses.__getitem__)
    return len(losses) - 1 - lowest >= patience
