"""Supervised fine-tuning: a model that continues texts learns to answer instructions.

    tuned = sft.tune("runs/toy", out="runs/toy-sft")
    answers.score(tuned.model, validation)

The loss is the cross-entropy of the answers and of their ends. The questions are read, routed and balanced, but not
learned: L = Σ_t m_t · nll_t / Σ_t m_t with m_t = 1 where the target of position t is part of an answer. Both sums are
taken over all shards before the division, so the loss of a batch does not depend on how it is cut into shards.

A model that is tuned on few examples soon begins to learn them by heart. So the run validates on instructions about
documents that it never sees, stops when the validation loss has not fallen for some time, and keeps the best model.

Ouyang et al. 2022, arXiv 2203.02155; Zoph et al. 2022, arXiv 2202.08906 (ST-MoE: fine-tuning mixtures of experts).
Lesson: lessons/40_instruct.ipynb
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import files, presets, tree
from minimoe.core.arrays import like
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError, suggestion
from minimoe.core.summary import brief
from minimoe.draw import plots
from minimoe.evaluate import text_loss
from minimoe.layers import decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.losses import cross_entropy
from minimoe.losses.objective import Shard
from minimoe.parallel.thread_pool import Map
from minimoe.storage import huggingface, open_model
from minimoe.storage.checkpoint import Model, RunConfig, Tuning
from minimoe.text import chat, instructions
from minimoe.text.chat import AnyTokenizer, Encoded
from minimoe.text.corpus import UNKNOWN
from minimoe.text.huggingface_tokenizer import MissingTokenizer, PretrainedTokenizer
from minimoe.text.instructions import Instruction
from minimoe.text.tokenizer import with_chat_tokens
from minimoe.training import run_report, trainer
from minimoe.training import step as steps
from minimoe.training.task import Task, Validation
from minimoe.training.trainer import Trained
from minimoe.tuning import answers, grow, lora_run, packing
from minimoe.tuning.lora_run import Lora

KIND = "sft"
GROUPS = {
    "router": (".moe.router.",),
    "experts": (".moe.experts.", ".moe.shared."),
    "attention": (".attention.",),
    "embedding": ("embedding.", "head."),
    "norms": ("_norm.", "norm."),
}
"""What ``--freeze`` names, and how the names of its leaves begin or what they contain."""

MIXTRAL = "mixtral"
"""If the model came in Hugging Face's layout, a finished run has this folder, with its result in that layout."""

SHOWN = 50
"""Held-out instructions that a finished run answers, at most, to say how many of its answers are right."""


class Example(NamedTuple):
    """An instruction as ids."""

    kind: str
    ids: Encoded


@brief
class Data(NamedTuple):
    """The instructions of a run, encoded and cut to the context of its model."""

    train: list[Example]
    validation: list[Example]
    items: list[Instruction]  # the instructions of ``validation``
    cut: int  # answers of which the context left only a part
    lost: int  # answers of which it left nothing, so that they are left out
    sha256: str


def tune(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    freeze: Collection[str] = (),
    lora: Lora | None = None,
    changes: Mapping[str, Any] | None = None,
    pack: bool | None = None,
    patience: int | None = presets.SFT_PATIENCE,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Tunes the model in ``folder``, a run or a Mixtral in Hugging Face's layout, and writes a new run folder.

    ``data`` is a file of instructions, by default the one of ``data/``. The parts named by ``freeze`` (``GROUPS``) stay
    as they are. With ``lora``, only adapters learn, and the embedding and the output layer if the model gains tokens:
    see ``lora_run``. ``changes`` sets fields of the recipe. ``pack`` puts several instructions into one sequence; this
    is the default unless experts have a capacity or there is a ``sequence_loss``. Without ``patience``, the run takes
    all its steps and keeps the last model.

    A run gets ids for a chat (``grow``). A Mixtral keeps its tokenizer and its ids. Its run folder is an ordinary one
    too, but when the run ends, ``mixtral/`` in this folder holds the result in Hugging Face's layout.

    Raises:
        UserError: the folder holds no model or a quantised one; a setting, the file or the folder ``out`` is not
            possible; or experts with a capacity are to be packed.
    """
    lora = None if lora is None else lora_run.checked(lora)
    base = open_model.load(folder)
    if isinstance(base, Model) and base.run.quantization is not None:
        raise UserError(f"{folder} is quantised and cannot be tuned: tune the run that it came from.")
    recipe = recipe_of(base.run.recipe if base.run else TrainConfig(), presets.SFT_RECIPE | dict(changes or {}))
    codec: Any = base.tokenizer
    if not isinstance(codec, PretrainedTokenizer | MissingTokenizer):
        codec = with_chat_tokens(codec)
    size = max(base.config.vocab_size, codec.vocab_size)
    params, config = grow.vocabulary(base.params, base.config, size, np.random.default_rng(recipe.seed))
    params = tree.map(lambda leaf: leaf.astype(recipe.dtype, copy=False), params)
    found = read(codec, config, data)
    settings: dict[str, Any] = {
        "base": str(folder),
        "data": None if data is None else str(files.user_path(data).resolve()),
        "sha256": found.sha256,
        "pack": _packs(config, recipe, pack),
        "patience": checked_patience(patience),
    }
    source = base.run.source if base.run else UNKNOWN
    frozen = leaves_of(params, freeze)
    if lora is not None:
        grown = size > base.config.vocab_size and "embedding" not in freeze
        also = leaves_of(params, ["embedding"]) if grown else ()
        params, frozen = lora_run.begin(params, lora, freeze, also, recipe.seed, device)
        settings |= {lora_run.SETTING: lora._asdict(), "freeze": list(freeze)}
    run = RunConfig(config, recipe, codec, source, tuning=Tuning(KIND, settings, frozen))
    name = f"{files.user_path(folder).resolve().name}-sft"
    return trainer.start(
        run, _task(run, found), params, out=out, name=name, device=device, threads=threads, progress=progress
    )


def task_of(run: RunConfig) -> Task:
    """The task of a run that ``tune`` began; raises ``UserError`` if its instructions have changed or are gone."""
    assert run.tuning is not None
    settings = run.tuning.settings
    found = read(run.tokenizer, run.config, settings["data"])
    if found.sha256 != settings["sha256"]:
        raise UserError(
            f"{settings['data'] or 'the instructions of data/'} changed since this run began: restore them, or tune "
            "again."
        )
    return _task(run, found)


def read(tokenizer: AnyTokenizer, config: ModelConfig, path: str | Path | None = None) -> Data:
    """The instructions in a file, split, encoded and cut to the context.

    Raises:
        UserError: the file cannot be read, is too small to be split, or holds a character that the model does not know;
            or no answer fits into the context.
    """
    train, validation = instructions.split(instructions.read(path))
    digest = hashlib.sha256()
    cut = lost = 0
    parts: list[list[Example]] = [[], []]
    kept: list[Instruction] = []
    for part, items in zip(parts, (train, validation), strict=True):
        for item in items:
            ids, answer = chat.encode(tokenizer, item.turns)
            digest.update(np.int64(len(ids)).tobytes() + ids.tobytes() + answer.tobytes())
            whole, room = int(answer.sum()), config.context + 1
            ids, answer = ids[:room], answer[:room]
            lost += not answer.any()
            cut += 0 < answer.sum() < whole
            if answer.any():
                part.append(Example(item.kind, Encoded(ids, answer)))
                if part is parts[1]:
                    kept.append(item)
    if not all(parts):
        raise UserError(
            f"no answer begins within the {config.context} tokens of the model's context: give shorter instructions, "
            "or tune a model with a longer context."
        )
    return Data(parts[0], parts[1], kept, cut, lost, digest.hexdigest())


def leaves_of(params: Decoder, groups: Collection[str]) -> tuple[str, ...]:
    """The names of the leaves of some ``GROUPS``, in the order of the parameters.

    Raises:
        UserError: a group does not exist, or nothing is left to learn.
    """
    for group in groups:
        if group not in GROUPS:
            raise UserError(
                f"there is no part {group!r:.40} to freeze{suggestion(str(group), GROUPS)}: choose from "
                f"{', '.join(GROUPS)}."
            )
    names = [name for name, _ in tree.named_leaves(params)]
    found = tuple(name for name in names if any(_belongs(name, group) for group in groups))
    if len(found) == len(names):
        raise UserError(f"with {', '.join(groups)} frozen, nothing is left to learn: freeze less.")
    return found


def _belongs(name: str, group: str) -> bool:
    return any(
        part in name if part.startswith(".") or part == "_norm." else name.startswith(part) for part in GROUPS[group]
    )


def recipe_of(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The recipe of a run with other settings; raises ``UserError`` if one is unknown or not possible."""
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in changes:
        if name not in known:
            raise UserError(
                f"there is no setting {name!r:.40}{suggestion(str(name), known)}: give a field of TrainConfig."
            )
    return dataclasses.replace(base, **changes)


def _packs(config: ModelConfig, recipe: TrainConfig, asked: bool | None) -> bool:
    """Whether instructions share sequences. They cannot if a capacity or a balance loss is counted per sequence."""
    if asked not in (None, True, False):
        raise UserError(f"pack {asked!r:.40} is no answer: give True, False, or None for the usual one.")
    limited = recipe.capacity_factor is not None or hasattr(moe.router_of(config), "CAPACITY_FACTOR")
    if asked and limited:
        raise UserError(
            "experts with a capacity count it per sequence, so packed instructions would take each other's places: pad "
            "them instead (--pad), or tune without a --capacity-factor and with another router."
        )
    if asked and recipe.sequence_loss:
        raise UserError(
            f"the sequence_loss {recipe.sequence_loss} balances the experts within each sequence, so packed "
            "instructions would be balanced together: pad them instead (--pad), or tune with --sequence-loss 0."
        )
    return not (limited or recipe.sequence_loss) if asked is None else asked


def checked_patience(patience: int | None) -> int | None:
    """``patience`` itself; raises ``UserError`` unless it is a number of validations or None."""
    if patience is not None and (type(patience) is not int or patience < 1):
        raise UserError(f"patience {patience!r:.40} is not a number of validations: choose at least 1, or none.")
    return patience


def _task(run: RunConfig, data: Data) -> Task:
    assert run.tuning is not None
    settings, recipe = run.tuning.settings, run.recipe
    documents = [example.ids for example in data.train]
    batches = packing.Batches(documents, run.config.context, recipe.batch, settings["pack"], recipe.seed)
    pieces = pieces_of(data.validation, run.config)

    def validate(params: Decoder, pool: Map) -> Validation:
        return validate_on(params, run.config, pieces, pool)

    def report(folder: Path, model: Model, rows: list[dict[str, Any]]) -> None:
        files.write_atomically(folder / run_report.SAMPLE, _sample(model, data).encode(errors="backslashreplace"))
        if rows:
            plots.save(plots.loss_curves(rows), folder / run_report.LOSS)
        export(folder, model)

    return Task(
        _about(data, batches),
        lora_run.with_dropout(batches.read, run, settings["freeze"]) if lora_run.SETTING in settings else batches.read,
        steps.objective_of(run.config, recipe),
        validate,
        report,
        patience=settings["patience"],
    )


def export(folder: Path, model: Model) -> None:
    """Writes a model that came in Hugging Face's layout in it again, in the run's folder ``MIXTRAL``.

    It replaces the one of an earlier end of the run.
    """
    if not isinstance(model.tokenizer, PretrainedTokenizer):
        return
    if huggingface.is_folder(folder / MIXTRAL):
        shutil.rmtree(folder / MIXTRAL)
    huggingface.save(folder / MIXTRAL, model.params, model.config, model.tokenizer, model.end_tokens)


def _about(data: Data, batches: packing.Batches) -> str:
    learned = sum(int(example.ids.answer.sum()) for example in data.train)
    tokens = sum(len(example.ids.ids) - 1 for example in data.train)
    kinds = len({example.kind for example in data.train})
    said = (
        f"It reads {len(data.train):,} instructions of {kinds} kind{'s' * (kinds != 1)}: {tokens:,} "
        f"tokens, of which it learns the {learned:,} of the answers; {len(data.validation):,} are held out. "
        f"{'Packed' if batches.pack else 'Padded'}, an epoch is {batches.per_epoch():.1f} batches."
    )
    if data.cut or data.lost:
        said += (
            f"\nThe context has no room for the end of {data.cut:,} answers, which are cut, and for {data.lost:,} "
            "answers at all, which are left out."
        )
    return said


class Piece(NamedTuple):
    shard: Shard  # some instructions, a row for each
    kinds: list[str]


def pieces_of(examples: Sequence[Example], config: ModelConfig) -> list[Piece]:
    """The examples in padded rows, those of similar length together, with a bounded number of logits."""
    ordered = sorted(examples, key=lambda example: len(example.ids.ids))
    pieces: list[Piece] = []
    at_once = max(1, text_loss.LOGITS // (config.vocab_size * config.context))
    for start in range(0, len(ordered), min(at_once, text_loss.SEQUENCES)):
        some = ordered[start : start + min(at_once, text_loss.SEQUENCES)]
        shard = packing.shard_of([[example.ids] for example in some], packed=False)
        pieces.append(Piece(shard, [example.kind for example in some]))
    return pieces


def validate_on(params: Decoder, config: ModelConfig, pieces: Sequence[Piece], pool: Map) -> Validation:
    """The mean loss of the tokens of all answers, and that of each kind."""

    def losses(piece: Piece) -> list[tuple[str, float, float]]:
        def move(array: Any) -> Any:
            return like(params.norm.gain, array)

        logits = decoder.forward(params, move(piece.shard.tokens), config).logits
        rows = zip(piece.kinds, logits, piece.shard.targets, piece.shard.loss_mask, strict=True)  # type: ignore[arg-type]
        sums = ((kind, cross_entropy.forward(z, move(y), move(m))[0]) for kind, z, y, m in rows)
        return [(kind, float(loss.total), float(loss.tokens)) for kind, loss in sums]

    nats: dict[str, float] = {}
    tokens: dict[str, float] = {}
    for found in pool(losses, pieces):
        for kind, total, count in found:
            nats[kind] = nats.get(kind, 0.0) + total
            tokens[kind] = tokens.get(kind, 0.0) + count
    loss = sum(nats.values()) / sum(tokens.values())
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}, expected a finite number: choose a lower --learning-rate.")
    by_kind = {kind: round(nats[kind] / tokens[kind], 5) for kind in sorted(nats)}
    return Validation(loss, {"val_loss_by_kind": by_kind})


def _sample(model: Model, data: Data) -> str:
    """How many of the model's answers to held-out instructions are right, and its first answer of each kind."""
    shown = data.items[:: max(1, len(data.items) // SHOWN)]
    scores = answers.score(model, shown)
    lines = [f"Right answers to held-out instructions, to the letter (of {len(shown)}):"]
    lines += [f"  {kind}: {score.right} of {score.asked}" for kind, score in scores.items()]
    first = {item.kind: item for item in reversed(shown)}
    written = answers.write(model, [item.turns[:-1] for item in first.values()])
    for item, answer in zip(first.values(), written, strict=True):
        lines += ["", f"--- {item.kind} ---", item.turns[-2].text, f"|> {answer.text}{'' if answer.ended else ' …'}"]
    return "\n".join(lines) + "\n"
