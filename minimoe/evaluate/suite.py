"""The evaluation suite: what a trained model can do, with confidence intervals, alone or beside another model.

    print(suite_table.table(run("runs/toy", against="runs/toy-dense")))

    held-out text       bits per byte of each document's last tenth, which is not in the training split
    unseen sums         share that is answered exactly with greedy decoding (``sums``)
    Python              share of the written definitions that parse (``well_formed``)
    brackets            share of the written texts in which every bracket is closed (``well_formed``)
    tuned models        exact answers, preferred answers, length of answers, a probe for bias (``tuned``)
    quantised models    nats per token lost, and share of routings changed, beside the run that they came from

Each number comes with the number that chance reaches: every character predicted by its frequency alone, the commonest
answer given every time, or the model's own texts with their characters shuffled. Written texts also come with the
number that real text reaches: held-out text, cut in the same way. If a run's text has no sums or no Python, the row
says so, because a number would mean nothing.

A fair comparison for a mixture is a dense model with the same number of active parameters: see
``trainer.train_dense_twin``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import files, resources
from minimoe.core.arrays import select_device
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.cost import parameters
from minimoe.evaluate import changes, sums, text_loss, tuned, well_formed
from minimoe.evaluate.changes import Changes
from minimoe.evaluate.tuned import Marks, Means, Questions
from minimoe.inference import generation, sampling
from minimoe.parallel import thread_pool
from minimoe.parallel.thread_pool import Map
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import Model
from minimoe.text import batches
from minimoe.text.batches import Texts
from minimoe.text.corpus import Corpus
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer
from minimoe.text.tokenizer import ChatTokenizer, Tokenizer


class Settings(NamedTuple):
    """How much is measured, and how the models write."""

    samples: int = 100  # how many texts, and how many definitions
    questions: int = 200  # how many sums of each kind
    tokens: int = 256  # the length of a text
    temperature: float = 0.8
    seed: int = 0


@brief
class Losses(NamedTuple):
    """A model's loss on one document, piece by piece."""

    bits: NDArray[np.float64]  # (P,)
    sizes: NDArray[np.int64]  # (P,)  bytes
    chance: float  # bits per byte


@brief
class Measured(NamedTuple):
    """All results of the suite for one model; a string in place of marks says why there are none."""

    name: str
    active: int  # parameters used for a token
    total: int
    trained_tokens: int
    losses: dict[str, Losses]  # by document
    marks: dict[str, Marks | str]  # by task
    means: dict[str, Means | str] = {}  # of a model that was tuned to answer, by task
    tuned: bool = False  # then ``trained_tokens`` are those of tuning, after the training of another run


@brief
class Results(NamedTuple):
    """All results of the suite for one model, or for two that share a text."""

    settings: Settings
    models: tuple[Measured, ...]
    changes: Changes | None = None  # if one of two models was quantised from the other


SUMS, PYTHON, BRACKETS = "unseen sums", "written texts, Python that parses", "written texts, brackets closed"


def run(
    folder: str | Path,
    against: str | Path | None = None,
    settings: Settings | None = None,
    *,
    corpus: Corpus | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Results:
    """Runs the suite on the run in ``folder`` and on the run in ``against``, to compare the two.

    The number of threads does not change the results. ``corpus`` is needed only if the runs were trained on a corpus
    that was made in Python.

    Raises:
        UserError: a folder is not a run, its text has changed, the two do not share text, tokenizer and context, or a
            setting is out of range.
    """
    settings = settings or Settings()
    _check(settings)
    folders = [files.user_path(path) for path in (folder, *([] if against is None else [against]))]
    models = [checkpoint.load_model(path) for path in folders]
    _check_alike(folders, models)
    first = models[0]
    data = None  # of a model that was trained elsewhere; what it answers can be measured all the same
    if corpus is not None or first.run.source.is_known:
        data = batches.reload(first.run.source, first.tokenizer, first.config.context, corpus)
    asked = next((tuned.questions_for(model.run) for model in models if tuned.is_tuned(model)), None)
    where = select_device(device)
    with thread_pool.pool(1 if where == "gpu" else resources.thread_count(threads)) as pool:
        models = [model.to(where) for model in models]
        found = [
            measure(str(path), model, data, _trained_tokens(model), settings, pool, asked)
            for path, model in zip(folders, models, strict=True)
        ]
        lost = _changes(folders, models, data, settings, pool)
    return Results(settings, tuple(found), lost)


def _changes(
    folders: Sequence[Path], models: Sequence[Model], data: Texts | None, settings: Settings, pool: Map
) -> Changes | None:
    """What quantisation changed, if one of two models was quantised from the other, or both from one run."""
    if data is None or len(models) == 1 or all(model.run.quantization is None for model in models):
        return None
    one, other = models
    apart = one.run.recipe != other.run.recipe or one.run.tuning != other.run.tuning or one.step != other.step
    if one.config != other.config or apart:
        return None
    pair = list(zip(map(str, folders), models, strict=True))
    pair.sort(key=lambda named: named[1].run.quantization is None)  # the quantised one first; both: as they were given
    (name, quantised), (against, original) = pair
    return changes.measure(
        (name, against), quantised.params, original.params, one.config, data.validation, pool, settings.seed
    )


def _check(settings: Settings) -> None:
    for name in ("samples", "questions", "tokens"):
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"{name} {value} leaves nothing to measure: choose a whole number of at least 1.")
    if settings.seed < 0:
        raise UserError(f"seed {settings.seed} is not a seed: choose a whole number of at least 0.")
    sampling.check(settings.temperature, None, None)


def _check_alike(folders: Sequence[Path], models: Sequence[Model]) -> None:
    """Raises ``UserError`` unless the models, one or two, can be measured on the same pieces of the same text."""
    (folder, model), *others = zip(folders, models, strict=True)
    for path, other in others:
        if other.run.source.sha256 != model.run.source.sha256 or _of_text(other) != _of_text(model):
            raise UserError(
                f"{folder} and {path} did not learn from the same text with the same tokenizer, so their numbers "
                f"cannot be compared: train an opponent with minimoe train --dense-twin {folder}."
            )
        if other.config.context != model.config.context:
            raise UserError(
                f"{folder} reads {model.config.context} tokens at a time and {path} {other.config.context}, so their "
                "losses cannot be compared: train one of them again with the --context of the other."
            )


def _of_text(model: Model) -> Tokenizer | PretrainedTokenizer:
    """The tokenizer without the tokens of a chat, which no text contains: a model stays comparable when it is tuned."""
    return model.tokenizer.of_text if isinstance(model.tokenizer, ChatTokenizer) else model.tokenizer


def _trained_tokens(model: Model) -> int:
    """Counted up to the step in the model's file: the run may have taken more steps than the model that it keeps."""
    return model.step * model.run.recipe.batch * model.config.context


def measure(
    name: str,
    model: Model,
    data: Texts | None,
    trained_tokens: int,
    settings: Settings | None = None,
    pool: Map = map,
    asked: Questions | None = None,
) -> Measured:
    """All results of the suite for one model; ``pool`` is a ``map``, for example one that uses several threads.

    ``asked`` is what is held out for models that were tuned to answer; without it, nothing is asked. Without ``data``,
    nothing is measured that a text is needed for.
    """
    settings = settings or Settings()
    counts = parameters.count(model.config)
    answered = None if asked is None else tuned.measure(model, asked, settings.questions, pool)
    router = counts.router if model.config.experts == 1 else 0  # a dense model's router has no choice, and no work
    return Measured(
        name,
        counts.active - router,
        counts.total - router,
        trained_tokens,
        {} if data is None else _all_losses(model, data, pool),
        {
            **(_without_text() if data is None else _written(model, data, settings, pool)),
            **(answered.marks if answered else {}),
        },
        answered.means if answered else {},
        # a student of a teacher learns another loss too, but from the start: no run is its base
        model.run.tuning is not None and "base" in model.run.tuning.settings,
    )


def _all_losses(model: Model, data: Texts, pool: Map) -> dict[str, Losses]:
    return {name: _losses(model, data, ids, pool) for name, ids in zip(data.names, data.validation, strict=True)}


def _written(model: Model, data: Texts, settings: Settings, pool: Map) -> dict[str, Marks | str]:
    return {
        **{f"{SUMS}, {kind}": _sums(model, data, kind, settings, pool) for kind in sums.KINDS},
        PYTHON: _python(model, data, settings, pool),
        BRACKETS: _brackets(model, data, settings, pool),
    }


def _without_text() -> dict[str, Marks | str]:
    """The reasons in the places of what ``_written`` measures."""
    tasks = (*(f"{SUMS}, {kind}" for kind in sums.KINDS), PYTHON, BRACKETS)
    return dict.fromkeys(tasks, "not measured: the model was trained elsewhere, on a text that is not known here")


# The tasks


def _losses(model: Model, data: Texts, ids: NDArray[np.int32], pool: Map) -> Losses:
    pieces = text_loss.by_piece(model.params, model.config, ids, pool)
    sizes = np.array([model.tokenizer.bytes_of(piece.targets) for piece in pieces])
    frequency = np.bincount(data.train, minlength=model.config.vocab_size) + 1.0  # each token occurs once more
    by_frequency = -np.log2(frequency / frequency.sum())[ids[1:]]
    bits = np.array([piece.nats for piece in pieces]) / math.log(2)
    return Losses(bits, sizes, float(by_frequency.sum() / sizes.sum()))


def _sums(model: Model, data: Texts, kind: str, settings: Settings, pool: Map) -> Marks | str:
    text = model.tokenizer.decode(data.train)
    if not sums.are_in(text):
        return f"not asked: the training text has no line like {sums.EXAMPLE!r}"
    questions = sums.unseen(text, kind, settings.questions, settings.seed)
    if not questions:
        return "not asked: the training text contains every sum of this kind"

    def is_right(question: sums.Question) -> bool:
        written = generation.write(model, question.prompt, sums.ANSWER_TOKENS, temperature=0)
        return sums.is_right(written, question.answer)

    try:
        right = np.array(list(pool(is_right, questions)))
    except UserError as error:  # a character that is not in the training text
        return f"not asked: {error}"
    return Marks(right, sums.best_constant(questions))


def _python(model: Model, data: Texts, settings: Settings, pool: Map) -> Marks | str:
    if not well_formed.has_python(model.tokenizer.decode(data.train)):
        return "not measured: the training text contains no Python"
    begin = well_formed.DEFINITION
    written = [begin + text for text in _write(model, begin, settings, pool)]
    held_out = [model.tokenizer.decode(ids) for ids in data.validation]
    places = [(text, found.start()) for text in held_out for found in re.finditer(begin, text)][: settings.samples]
    real = [text[start : start + len(begin) + settings.tokens] for text, start in places]

    def parse(snippets: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([well_formed.parses(well_formed.first_definition(snippet)) for snippet in snippets], bool)

    shuffled = [begin + text for text in _shuffled([text[len(begin) :] for text in written], settings.seed)]
    return Marks(parse(written), float(parse(shuffled).mean()), float(parse(real).mean()) if real else None)


def _brackets(model: Model, data: Texts, settings: Settings, pool: Map) -> Marks | str:
    if "\n" not in model.tokenizer.decode(data.train):
        return "not measured: the training text has no line ends, after which a text could begin"
    written = [well_formed.whole_lines(text) for text in _write(model, "\n", settings, pool)]
    held_out = "\n".join(model.tokenizer.decode(ids) for ids in data.validation)
    starts = [place + 1 for place, character in enumerate(held_out) if character == "\n"]
    chosen = np.random.default_rng(settings.seed).permutation(starts)[: settings.samples]
    real = [well_formed.whole_lines(held_out[start : start + settings.tokens]) for start in chosen]

    def closed(passages: Sequence[str]) -> NDArray[np.bool_]:
        """The marks of those passages that have something to close."""
        return np.array([well_formed.is_closed(text) for text in passages if well_formed.has_brackets(text)], bool)

    right, reachable = closed(written), closed(real)
    if not len(right):
        return f"not measured: none of the {len(written)} texts that it wrote contains a bracket or a double quote"
    shuffled = closed(_shuffled(written, settings.seed))
    return Marks(right, float(shuffled.mean()), float(reachable.mean()) if len(reachable) else None)


def _write(model: Model, prompt: str, settings: Settings, pool: Map) -> list[str]:
    """Many texts that the model writes after the same prompt, each from a seed of its own."""

    def text(number: int) -> str:
        seed = settings.seed * settings.samples + number
        return generation.write(model, prompt, settings.tokens, temperature=settings.temperature, seed=seed)

    return list(pool(text, range(settings.samples)))


def _shuffled(passages: Sequence[str], seed: int) -> list[str]:
    """Each passage with its characters in random order: the same brackets and quotes, but no skill."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.permutation(list(passage))) for passage in passages]
