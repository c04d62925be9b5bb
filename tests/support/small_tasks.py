"""A small task other than the ordinary one: to repeat each token; for tests of the training loop."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from small_runs import finished

from minimoe.layers import decoder
from minimoe.losses.objective import Shard
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import Model, RunConfig, Tuning
from minimoe.training import step, trainer
from minimoe.training.task import Task, Validation
from minimoe.training.trainer import Trained

SETTINGS = {"steps": 8, "evaluate_every": 2, "save_every": 3, "learning_rate": 0.02, "warmup": 0}


def begun(frozen: tuple[str, ...] = (), **settings: Any) -> tuple[RunConfig, decoder.Decoder]:
    """A run that starts from the parameters of a finished one."""
    model = checkpoint.load_model(finished())
    recipe = dataclasses.replace(model.run.recipe, capacity_factor=None, **SETTINGS | settings)
    run = model.run._replace(recipe=recipe, tuning=Tuning("copying", {"told": 3}, frozen))
    return run, model.params


def copying(run: RunConfig, losses: tuple[float, ...] = (), patience: int | None = None) -> Task:
    """Learns to repeat each token; some of the rows are shorter. ``losses`` stand in for the validation."""
    V, found = run.config.vocab_size, iter(losses)

    def read(first: int) -> Iterator[Shard]:
        number = first
        while True:
            rng = np.random.default_rng((5, number))
            tokens = rng.integers(V, size=(4, 6))
            mask = np.ones((4, 6), np.float32)
            mask[1, 4:] = 0
            yield Shard(tokens, tokens, mask=mask, loss_mask=rng.integers(2, size=(4, 6)).astype(np.float32))
            number += 1

    def validate(params: decoder.Decoder, pool: Any) -> Validation:
        loss = next(found, None)
        if loss is None:
            tokens = np.arange(V)[None]
            logits = decoder.forward(params, tokens, run.config).logits
            loss = float(-logits[0, np.arange(V), np.arange(V)].mean())
        return Validation(loss, {"val_of": "copies"})

    def report(folder: Path, model: Model, rows: list[dict[str, Any]]) -> None:
        (folder / "report.txt").write_text(f"{model.step} {len(rows)}")

    return Task("It copies.", read, step.objective_of(run.config, run.recipe), validate, report, patience=patience)


def start(out: Path, made: Task | None = None, threads: int = 1, **settings: Any) -> Trained:
    run, params = begun(**settings)
    return trainer.start(run, made or copying(run), params, out=out, device="cpu", threads=threads, progress=False)
