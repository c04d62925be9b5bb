"""A new run that begins with the parameters of another one: on another text, or with another recipe.

    minimoe.training.continued.train("runs/seed", out="runs/fables", corpus="fables", changes={"steps": 200})

Unlike a resumed run, it is a run of its own: it counts its steps from 0, and its optimiser starts afresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.storage import first_checkpoint
from minimoe.text import batches
from minimoe.text.corpus import Corpus
from minimoe.training import task as tasks
from minimoe.training import trainer
from minimoe.training.trainer import Trained


def train(
    origin: str | Path,
    out: str | Path,
    *,
    corpus: str | Corpus | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a new run in ``out`` from the parameters of the run in ``origin``, with its tokenizer.

    The text is the same, or ``corpus``; the recipe is the same, with ``changes``.

    Raises:
        UserError: the run cannot be loaded or is quantised, ``changes`` would give the model another shape, or as for
            ``trainer.train``.
    """
    model = first_checkpoint.load(origin)
    run = model.run._replace(recipe=changed(model.run.recipe, changes or {}), tuning=None)
    read = batches.read_source(run.source) if corpus is None else corpus
    data, source = batches.prepare_again(read, run.tokenizer, run.config.context)
    run = run._replace(source=source)
    task = tasks.of_text(run, data)
    return trainer.start(run, task, model.params, out=out, device=device, threads=threads, progress=progress)


def changed(recipe: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The recipe with other settings; raises ``UserError`` for a setting that the parameters already determine."""
    free = {field.name for field in dataclasses.fields(TrainConfig)} - {"tokenizer", "dtype"}
    for name, value in changes.items():
        if name not in free:
            raise UserError(
                f"{name} {value!r:.40} cannot be set here, because the model that it begins with determines it: leave "
                "it out."
            )
    return dataclasses.replace(recipe, **changes)
