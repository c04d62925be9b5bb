"""Distillation runs: a student learns from the probabilities of a trained teacher, on the text of the teacher.

    trained = distill("runs/toy", "dense-twin", out="runs/toy-student")

The student may be dense, a smaller mixture, or any other model with the vocabulary of its teacher: both have the same
tokenizer. The loop is that of every run (``trainer``), with ``losses.distillation`` in place of the cross-entropy; the
validation loss stays the cross-entropy, so that it can be compared with that of other runs. The run's config.json names
the teacher and holds a checksum of the teacher's weights, so the run can be resumed.

Lesson: lessons/51_distillation_and_pruning.ipynb
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.core import files, presets, resources, tree
from minimoe.core.arrays import select_device, to_device
from minimoe.core.errors import UserError
from minimoe.core.presets import Preset
from minimoe.cost import memory
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses import distillation
from minimoe.losses.distillation import Distillation, Settings
from minimoe.storage import open_model
from minimoe.storage.checkpoint import Model, RunConfig, Tuning
from minimoe.text import batches
from minimoe.text.corpus import Corpus
from minimoe.text.huggingface_tokenizer import MissingTokenizer, PretrainedTokenizer
from minimoe.training import task as tasks
from minimoe.training import trainer
from minimoe.training.task import Task
from minimoe.training.trainer import Trained

KIND = "distill"

LIKE_THE_TEACHER = ("teacher", "dense-twin")
"""Students that follow from the teacher: its own settings, and those of its dense twin."""


def distill(
    teacher: str | Path,
    student: str | Preset = "dense-twin",
    settings: Settings = Settings(),  # noqa: B008 - a tuple of constants
    *,
    from_teacher: bool = False,
    corpus: Corpus | None = None,
    changes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a student of the run ``teacher`` and writes a run folder.

    ``student`` is the name of a preset, a ``Preset``, ``"teacher"`` for the settings of the teacher itself, or
    ``"dense-twin"``; ``changes`` sets fields of its config and of its recipe. With ``from_teacher``, the student begins
    with the weights of the teacher that are not in its mixtures: embedding, attention, norms and output layer (Fedus et
    al. 2021, arXiv 2101.03961). ``corpus`` is needed only if the student is to read another text than its teacher did.
    Without ``out``, the new run has the name of the teacher, followed by ``-student``.

    Raises:
        UserError: ``teacher`` is no run; a setting is not possible; the student is to have another tokenizer;
            ``from_teacher`` is set, but the student's shapes are not those of the teacher; the text has changed, or has
            a character that the teacher does not know; or ``out`` holds a run or cannot be written.
    """
    distillation.check(settings)
    folder = files.user_path(teacher)
    where, threads = select_device(device), resources.thread_count(threads)
    model = open_model.load(folder)
    codec = model.tokenizer
    if not isinstance(model, Model) or isinstance(codec, PretrainedTokenizer | MissingTokenizer):
        raise UserError(
            f"{folder} is a model of Hugging Face, whose student would need its tokenizer: give the folder of a run."
        )
    chosen = presets.override(_preset(student, model), changes or {})
    if "tokenizer" in (changes or {}) and chosen.recipe.tokenizer != model.run.recipe.tokenizer:
        raise UserError(
            f"tokenizer {chosen.recipe.tokenizer!r} is not that of the teacher, {model.run.recipe.tokenizer!r}, but "
            "both must read the same tokens: leave it out."
        )
    recipe = dataclasses.replace(chosen.recipe, tokenizer=model.run.recipe.tokenizer)
    config = dataclasses.replace(chosen.config, vocab_size=model.config.vocab_size)
    decoder.check(config)
    memory.check_memory(config, recipe, 1 if where == "gpu" else min(threads, recipe.batch))
    begin = decoder.init(np.random.default_rng(recipe.seed), config, recipe.dtype)
    if from_teacher:
        begin = take_over(begin, model.params)
    read = batches.read_source(model.run.source) if corpus is None else corpus
    data, source = batches.prepare_for(read, codec, config.context)
    if corpus is None and source.sha256 != model.run.source.sha256:
        batches.reload(model.run.source, codec, model.config.context)  # it says what has changed
    values = {"teacher": str(folder.resolve()), "sha256": checksum(model.params), **settings._asdict()}
    run = RunConfig(config, recipe, codec, source, tuning=Tuning(KIND, values))
    return trainer.start(
        run,
        _task(run, data, model._replace(params=tree.map(lambda leaf: to_device(leaf, where), model.params)), settings),
        begin,
        out=out,
        name=f"{folder.resolve().name}-student",
        device=where,
        threads=threads,
        progress=progress,
    )


def task_of(run: RunConfig) -> Task:
    """The task of a run that ``distill`` began.

    Raises:
        UserError: the teacher is gone or is another model now, or the text has changed.
    """
    assert run.tuning is not None
    values = dict(run.tuning.settings)
    folder, digest = values.pop("teacher"), values.pop("sha256")
    model = open_model.load(folder)
    if not isinstance(model, Model) or checksum(model.params) != digest:
        raise UserError(
            f"{folder} holds another model than when its student began to learn: restore it, or distill again."
        )
    return _task(run, batches.reload(run.source, run.tokenizer, run.config.context), model, Settings(**values))


def take_over(student: Decoder, teacher: Decoder) -> Decoder:
    """The student with every weight of the teacher outside the mixtures: all but routers and experts (copies).

    Raises:
        UserError: a weight of the student has another shape than that of the teacher, or the teacher lacks it.
    """
    if len(student.blocks) != len(teacher.blocks):
        raise UserError(
            f"the student has {len(student.blocks)} layers and the teacher {len(teacher.blocks)}, so it cannot begin "
            "with the weights of the teacher: give it as many layers, or leave --from-teacher out."
        )
    theirs = dict(tree.named_leaves(teacher))
    leaves = []
    for name, leaf in tree.named_leaves(student):
        if ".moe." in name:
            leaves.append(leaf)
            continue
        if name not in theirs or theirs[name].shape != leaf.shape:
            found = "none" if name not in theirs else f"the shape {theirs[name].shape}"
            raise UserError(
                f"{name} has the shape {leaf.shape} in the student and {found} in the teacher, so the student cannot "
                "begin with it: give both the same width and heads, or leave --from-teacher out."
            )
        leaves.append(theirs[name].astype(leaf.dtype))
    return tree.rebuild(student, leaves)


def checksum(params: Decoder) -> str:
    """SHA-256 of all weights, by which a resumed run recognises its teacher."""
    digest = hashlib.sha256()
    for name, leaf in tree.named_leaves(params):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _preset(student: str | Preset, teacher: Model) -> Preset:
    if isinstance(student, Preset):
        return student
    if student not in LIKE_THE_TEACHER:
        if student not in presets.PRESETS:
            known = [*LIKE_THE_TEACHER, *presets.PRESETS]
            raise UserError(f"there is no student {student!r:.40}: choose one of {', '.join(known)}.")
        return presets.preset(student)
    own = Preset("", teacher.config, teacher.run.recipe)
    return own if student == "teacher" else presets.dense_twin(own)


def _task(run: RunConfig, data: batches.Texts, teacher: Model, settings: Settings) -> Task:
    task = tasks.of_text(run, data)
    loss = Distillation(teacher.params, teacher.config, settings)
    return task._replace(objective=task.objective._replace(token_loss=loss))
