"""Continues a run of any kind: the ordinary ones, and those that learn a task of this room.

A run folder says in its config.json which module made its task. That module makes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import RunConfig
from minimoe.text.corpus import Corpus
from minimoe.training import distill, trainer
from minimoe.training.task import Task
from minimoe.training.trainer import Trained
from minimoe.tuning import dpo, sft

TASKS: dict[str, Callable[[Path], Callable[[RunConfig], Task]]] = {
    sft.KIND: lambda folder: sft.task_of,
    dpo.KIND: lambda folder: partial(dpo.task_of, folder=folder),
    distill.KIND: lambda folder: distill.task_of,
}
"""What makes the task of a tuned run again, by the kind that its config.json names; called with the run's folder."""


def resume(
    folder: str | Path,
    *,
    corpus: Corpus | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
    kind: str | None = None,
) -> Trained:
    """Continues the run in ``folder`` as ``trainer.resume`` does, whatever it learns, or only what ``kind`` names.

    Raises:
        UserError: as ``trainer.resume``; the run learns something else, or what this version does not know; what it
            learns from has changed; or a corpus is given for a tuned run, which reads none.
    """
    tuning = checkpoint.load_config(folder).tuning
    if kind is not None and (tuning is None or tuning.kind != kind):
        begun = "train" if tuning is None or tuning.kind not in (sft.KIND, dpo.KIND) else tuning.kind
        raise UserError(
            f"{folder} was not begun with minimoe {kind}: resume it with `minimoe {begun} --resume {folder}`, or tune "
            f"its model with `minimoe {kind} {folder}`."
        )
    if tuning is None:
        task = None
    elif tuning.kind not in TASKS:
        raise UserError(
            f"{folder} learns {tuning.kind!r:.40}, which this version does not know: use the one that wrote it."
        )
    elif corpus is not None:
        raise UserError(f"{folder} is a tuned run and reads no text: leave the text out.")
    else:
        task = TASKS[tuning.kind](files.user_path(folder))
    return trainer.resume(
        folder, corpus=corpus, changes=changes, device=device, threads=threads, progress=progress, task=task
    )
