"""Preferences: a model that answers instructions learns which of two answers is better, without a reward model.

    tuned = dpo.tune("runs/toy-sft", out="runs/toy-dpo")
    tuned.metrics[-1]["val_accuracy"]

The losses are those of ``losses.preference``. The reference is the model as it was before the first step. It never
changes, so the log-probabilities ℓ′ that it gives to all answers are computed once, and stand in the run's folder in
reference.safetensors: train (pairs, 2) and validation (pairs, 2), the chosen answer first.

The router's noise is off and no expert has a capacity, in the policy and in the reference: otherwise they would differ
before the first step. An auxiliary loss is added only if its coefficient is given; it then covers the chosen and the
rejected answers, and so every prompt twice.

Rafailov et al. 2023, arXiv 2305.18290; Muennighoff et al. 2024, arXiv 2409.02060 (OLMoE: a mixture that is tuned
without a balance loss).  Lesson: lessons/41_preferences.ipynb
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import files, presets, resources, tree
from minimoe.core.arrays import like, select_device, to_device, to_host
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.draw import plots, preference_plot
from minimoe.evaluate import text_loss
from minimoe.layers import moe
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective, preference
from minimoe.losses.objective import Objective, Shard, Totals
from minimoe.losses.preference import Measures, Preference, Sums
from minimoe.parallel import thread_pool
from minimoe.parallel.thread_pool import Map
from minimoe.storage import open_model
from minimoe.storage.checkpoint import Model, RunConfig, Tuning
from minimoe.text import chat
from minimoe.text.corpus import UNKNOWN
from minimoe.text.huggingface_tokenizer import MissingTokenizer
from minimoe.text.instructions import Pair
from minimoe.training import run_report, trainer
from minimoe.training import step as steps
from minimoe.training.task import Task, Validation
from minimoe.training.trainer import Trained
from minimoe.tuning import answers, pairs, sft
from minimoe.tuning.pairs import Data, Example

KIND = "dpo"
REFERENCE = "reference.safetensors"

SHOWN = 2
"""Held-out prompts of each kind that a finished run answers, to show what it learned."""


class Reference(NamedTuple):
    """ℓ′ of all answers: the chosen one of each pair, then the rejected one."""

    train: NDArray[Any]  # (pairs, 2)
    validation: NDArray[Any]  # (pairs, 2)


def tune(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    loss: Preference = Preference(),  # noqa: B008 - a tuple
    out: str | Path | None = None,
    freeze: Collection[str] = (),
    changes: Mapping[str, Any] | None = None,
    patience: int | None = presets.DPO_PATIENCE,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Tunes the model in ``folder``, which has learned to answer instructions, and writes a new run folder.

    ``data`` is a file of pairs, by default the one of ``data/``. The parts named by ``freeze`` (``sft.GROUPS``) stay as
    they are. ``changes`` sets fields of the recipe; its ``batch`` counts sequences, two for each pair. Without
    ``patience``, the run takes all its steps and keeps the last model. A Mixtral is written in Hugging Face's layout
    besides, as by ``sft.tune``.

    Raises:
        UserError: the folder holds no model, a quantised one, or one without tokens for a chat; or a setting, the file
            or the folder ``out`` is not possible.
    """
    preference.check(loss)
    base = open_model.load(folder)
    if not (chat.can_chat(base.tokenizer) or isinstance(base.tokenizer, MissingTokenizer)):
        raise UserError(
            f"{folder} has no tokens for a chat, so it cannot prefer answers: tune it with `minimoe sft` first."
        )
    if isinstance(base, Model) and base.run.quantization is not None:
        raise UserError(f"{folder} is quantised and cannot be tuned: tune the run that it came from.")
    recipe = _recipe(base.run.recipe if base.run else TrainConfig(), changes or {})
    where, threads = select_device(device), resources.thread_count(threads)
    found = pairs.read(base.tokenizer, base.config, data)
    params = tree.map(lambda leaf: leaf.astype(recipe.dtype, copy=False), base.params)
    settings = loss._asdict() | {
        "base": str(folder),
        "data": None if data is None else str(files.user_path(data).resolve()),
        "sha256": found.sha256,
        "patience": sft.checked_patience(patience),
    }
    frozen = sft.leaves_of(params, freeze)
    here = trainer.new_folder(out, f"{files.user_path(folder).resolve().name}-dpo")
    reference = None
    if loss.needs_reference:
        placed = tree.map(lambda leaf: to_device(leaf, where), params)
        with thread_pool.pool(1 if where == "gpu" else threads) as pool:
            parts = (sums_of(placed, base.config, part, pool=pool).logp for part in (found.train, found.validation))
            reference = Reference(*parts)
        files.write_tensors(here / REFERENCE, reference._asdict(), {"pairs": found.sha256})
        settings["reference"] = _digest(reference)
    source = base.run.source if base.run else UNKNOWN
    codec: Any = base.tokenizer
    run = RunConfig(base.config, recipe, codec, source, tuning=Tuning(KIND, settings, frozen))
    task = _task(run, found, reference)
    return trainer.start(run, task, params, out=here, device=where, threads=threads, progress=progress)


def task_of(run: RunConfig, folder: Path) -> Task:
    """The task of a run that ``tune`` began.

    Raises:
        UserError: the pairs or the reference of the run have changed or are gone.
    """
    assert run.tuning is not None
    settings = run.tuning.settings
    found = pairs.read(run.tokenizer, run.config, settings["data"])
    if found.sha256 != settings["sha256"]:
        raise UserError(
            f"{settings['data'] or 'the pairs of data/'} changed since this run began: restore them, or tune again."
        )
    if not _loss(settings).needs_reference:
        return _task(run, found, None)
    path = folder / REFERENCE
    if not path.exists():
        raise UserError(
            f"{path} is missing, so it is not known what this run began with: restore it, or begin a new "
            f"run with `minimoe dpo {folder}`."
        )
    tensors, metadata = files.read_tensors(path)
    reference = Reference(*(tensors.get(name, np.zeros(0)) for name in Reference._fields))
    shapes = [(len(found.train), 2), (len(found.validation), 2)]
    if metadata.get("pairs") != found.sha256 or [part.shape for part in reference] != shapes:
        raise UserError(f"{path} is that of other pairs: restore the right one, or tune again.")
    if _digest(reference) != settings.get("reference"):
        raise UserError(f"{path} is that of another model: restore the right one, or tune again.")
    return _task(run, found, reference)


def sums_of(
    params: Decoder,
    config: ModelConfig,
    examples: Sequence[Example],
    loss: Preference = Preference(),  # noqa: B008 - a tuple
    reference: NDArray[Any] | None = None,
    pool: Map = map,
) -> Sums:
    """The sums of some pairs, in their order, next to the ``reference`` (pairs, 2): see ``preference.measures``."""
    at_once = min(text_loss.SEQUENCES, max(2, text_loss.LOGITS // (config.vocab_size * config.context)))
    goal = _objective(config, TrainConfig(), loss)
    where = params.norm.gain

    def read(piece: tuple[NDArray[np.intp], Shard]) -> Sums:
        shard = tree.map(lambda leaf: like(where, leaf), piece[1])
        found: Sums = objective.forward(params, shard, config, goal, keep=False).sums.loss
        return tree.map(to_host, found)

    pieces = pairs.in_pieces(examples, at_once, reference)
    found = [np.concatenate(of_pieces) for of_pieces in zip(*pool(read, pieces), strict=True)]  # (pairs, 2) each
    back = np.argsort(np.concatenate([numbers for numbers, _ in pieces]))
    return Sums(*(leaf[back] for leaf in found))


def _digest(reference: Reference) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in reference)).hexdigest()


def _objective(config: ModelConfig, recipe: TrainConfig, loss: Preference) -> Objective:
    """The loss of pairs, and the auxiliary losses that the recipe asks for; no expert refuses a token."""
    # E times its fair share is more than an expert can be asked for; other routers refuse nothing by themselves
    unlimited = float(config.experts) if hasattr(moe.router_of(config), "CAPACITY_FACTOR") else None
    return steps.objective_of(config, recipe)._replace(token_loss=loss, capacity_factor=unlimited)


def _loss(settings: Mapping[str, Any]) -> Preference:
    return Preference(*(settings[name] for name in Preference._fields))


def _recipe(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    recipe = sft.recipe_of(base, presets.DPO_RECIPE | dict(changes))
    if recipe.batch % 2:
        raise UserError(f"batch {recipe.batch} cannot be divided into pairs of answers: choose an even number.")
    if recipe.capacity_factor is not None:
        raise UserError(
            f"with a capacity_factor ({recipe.capacity_factor}), the experts would not give an answer the same "
            "log-probability as in the reference: leave it out."
        )
    return recipe


def _task(run: RunConfig, found: Data, reference: Reference | None) -> Task:
    assert run.tuning is not None
    loss, recipe = _loss(run.tuning.settings), run.recipe
    of_train, of_validation = reference or (None, None)
    batches = pairs.Batches(found.train, of_train, recipe.batch // 2, recipe.seed)

    def measured(totals: Totals) -> dict[str, Any]:
        return _rounded(preference.measures(loss, totals.sums))

    def validate(params: Decoder, pool: Map) -> Validation:
        value = preference.measures(loss, sums_of(params, run.config, found.validation, loss, of_validation, pool))
        return Validation(value.loss, {f"val_{name}": number for name, number in _rounded(value).items()})

    def report(folder: Path, model: Model, rows: list[dict[str, Any]]) -> None:
        text = _sample(model, found, loss, of_validation)
        files.write_atomically(folder / run_report.SAMPLE, text.encode(errors="backslashreplace"))
        if rows:
            plots.save(preference_plot.curves(rows), folder / run_report.LOSS)
        sft.export(folder, model)

    return Task(
        _about(found, recipe),
        batches.read,
        _objective(run.config, recipe, loss),
        validate,
        report,
        patience=run.tuning.settings["patience"],
        noise=False,
        measure=measured,
    )


def _rounded(value: Measures) -> dict[str, float]:
    """The fields of a row of the metrics; the loss has a field of its own there."""
    return {name: round(number, 6) for name, number in value._asdict().items() if name != "loss"}


def _about(found: Data, recipe: TrainConfig) -> str:
    said = (
        f"It reads {len(found.train):,} pairs of answers of {len({one.kind for one in found.train})} kinds, "
        f"{recipe.batch // 2} in each step; {len(found.validation):,} pairs are held out."
    )
    return said + f"\nThe context has no room for {found.lost:,} pairs, which are left out." * (found.lost > 0)


def by_kind(
    params: Decoder, config: ModelConfig, examples: Sequence[Example], loss: Preference, reference: NDArray[Any] | None
) -> dict[str, Measures]:
    """What is reported of pairs, for each kind by itself."""
    sums = sums_of(params, config, examples, loss, reference)
    kinds = np.array([example.kind for example in examples])
    return {
        str(kind): preference.measures(loss, Sums(*(leaf[kinds == kind] for leaf in sums))) for kind in np.unique(kinds)
    }


def _sample(model: Model, found: Data, loss: Preference, reference: NDArray[Any] | None) -> str:
    """The share of held-out pairs whose chosen answer has the larger reward, and answers to some of their prompts."""
    lines = ["Held-out pairs whose chosen answer has the larger reward:"]
    for kind, value in by_kind(model.params, model.config, found.validation, loss, reference).items():
        lines.append(f"  {kind}: {value.accuracy:.0%}, margin {value.margin:.3f}")
    shown = [item for kind in sorted({item.kind for item in found.items}) for item in _first(found.items, kind)]
    written = answers.write(model, [item.prompt for item in shown])
    for item, answer in zip(shown, written, strict=True):
        lines += ["", f"--- {item.kind} ---", item.prompt[-1].text, f"|> {answer.text}{'' if answer.ended else ' …'}"]
    return "\n".join(lines) + "\n"


def _first(items: Sequence[Pair], kind: str) -> list[Pair]:
    return [item for item in items if item.kind == kind][:SHOWN]
