"""Reads runs and writes a new one: merged from several of one shape, or upcycled from dense ones.

The new folder is a run of step 0: every command opens it, and ``minimoe train --resume`` trains it further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.compression import alignment, upcycle, vectors
from minimoe.core import files
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.storage import first_checkpoint
from minimoe.storage.checkpoint import Model
from minimoe.text import chat
from minimoe.text.corpus import Corpus

Folder = str | Path


def merge(
    sources: Sequence[Folder],
    out: Folder,
    method: str = "average",
    *,
    base: Folder | None = None,
    align: bool = False,
    t: float = 0.5,
    keep: float | None = None,
    strength: float = 1.0,
    seed: int = 0,
    corpus: str | Corpus | None = None,
) -> Model:
    """Merges the runs in ``sources`` into a new run in ``out``, with the recipe of the first.

    ``method`` and the numbers are those of ``compression.vectors.merge``. ``align`` puts the experts and neurons of
    each run in the order of the first run (or in that of ``base``, if the method needs a base). The new run continues
    on the text of the first one, or on ``corpus``.

    Raises:
        UserError: the runs differ in shape or in tokenizer, one cannot be loaded, the method does not fit, or ``out``
            is not empty.
    """
    vectors.check(method, len(sources), base is not None, t, keep, strength)
    if base is not None and method not in vectors.NEED_A_BASE:
        raise UserError(f"{method} has no use for a base: leave --base out, or choose task, ties or dare.")
    for name, value, usual, users in (
        ("t", t, 0.5, ("slerp",)),
        ("keep", keep, None, ("ties", "dare")),
        ("strength", strength, 1.0, vectors.NEED_A_BASE),
        ("seed", seed, 0, ("dare",)),
    ):
        if value != usual and method not in users:
            raise UserError(
                f"{method} has no use for {name} {value}: leave --{name} out, or choose {' or '.join(users)}."
            )
    if seed < 0:
        raise UserError(f"seed {seed} is not a seed: choose a whole number of at least 0.")
    files.refuse_occupied(files.user_path(out))
    models = [first_checkpoint.load(source) for source in sources]
    origin = None if base is None else first_checkpoint.load(base)
    folders = [*sources, *([] if base is None else [base])]
    for folder, other in zip(folders[1:], [*models[1:], *([] if origin is None else [origin])], strict=True):
        check_same(folders[0], models[0], folder, other)
    params = [model.params for model in models]
    config = models[0].config
    if align:
        to = params[0] if origin is None else origin.params
        params = [one if one is to else alignment.decoder(to, one, config) for one in params]
    made = vectors.merge(
        params,
        method,
        base=None if origin is None else origin.params,
        t=t,
        keep=keep,
        strength=strength,
        rng=np.random.default_rng(seed),
    )
    run = first_checkpoint.with_text(models[0].run, corpus)
    first_checkpoint.write(out, run, made)
    return Model(made, config, run.tokenizer, run)


def upcycled(
    sources: Sequence[Folder],
    out: Folder,
    *,
    experts: int | None = None,
    active: int = 2,
    granularity: int = 1,
    renormalize: bool = True,
    noisy_gating: bool = False,
    noise: float = 0.0,
    corpus: str | Corpus | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Model:
    """Makes a mixture of experts in ``out`` from one dense run in ``sources``, or from several (Branch-Train-MiX).

    One run is copied into ``experts`` experts, 8 by default. Several runs give one expert each. The arguments are those
    of ``compression.upcycle``. The recipe is that of the first run, with the balancing losses on, and with ``changes``.

    Raises:
        UserError: a run is not dense, the runs differ in shape or in tokenizer, one cannot be loaded, an argument does
            not fit, or ``out`` is not empty.
    """
    files.refuse_occupied(files.user_path(out))
    models = [first_checkpoint.load(source) for source in sources]
    first = models[0]
    for folder, other in zip(sources[1:], models[1:], strict=True):
        check_same(sources[0], first, folder, other)
    if len(models) > 1:
        if experts not in (None, len(models)):
            raise UserError(f"{len(models)} runs make {len(models)} experts, not {experts}: leave --experts out.")
        if noise:
            raise UserError(f"noise {noise} is for copies of one run, which are equal: leave --noise out.")
    count = len(models) if len(models) > 1 else 8 if experts is None else experts
    config = upcycle.config_of(
        first.config, count, active, granularity, renormalize=renormalize, noisy_gating=noisy_gating
    )
    settings = {"balance_loss": None, "z_loss": TrainConfig.z_loss, **(changes or {})}
    recipe = dataclasses.replace(first.run.recipe, **settings)
    rng = np.random.default_rng(recipe.seed)
    if len(models) > 1:
        made = upcycle.mix(rng, [model.params for model in models], config, granularity)
    else:
        made = upcycle.upcycle(rng, first.params, config, granularity, noise)
    run = first_checkpoint.with_text(first.run._replace(config=config, recipe=recipe), corpus)
    first_checkpoint.write(out, run, made)
    return Model(made, config, run.tokenizer, run)


def check_same(folder: Folder, mine: Model, other_folder: Folder, other: Model) -> None:
    """Raises ``UserError`` unless both models have the same config and the same tokenizer."""
    for field in dataclasses.fields(mine.config):
        ours, theirs = getattr(mine.config, field.name), getattr(other.config, field.name)
        if ours != theirs and field.name != "vocab_size":
            raise UserError(
                f"{other_folder} has {field.name} {theirs}, but {folder} has {ours}: give runs of the same shape."
            )
    tuned = [path for path, model in ((folder, mine), (other_folder, other)) if chat.can_chat(model.tokenizer)]
    if len(tuned) == 1:
        raise UserError(
            f"{tuned[0]} was tuned and has tokens of a chat that {other_folder if tuned[0] == folder else folder} has "
            "not: give runs that were all tuned, or none of them."
        )
    if mine.tokenizer != other.tokenizer:
        raise UserError(
            f"{other_folder} has another tokenizer than {folder}, so the same token means something else: train both "
            "with the same characters, or with --tokenizer byte."
        )
