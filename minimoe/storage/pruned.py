"""Reads a folder with a model and writes a new one with fewer experts per layer, in the same layout.

Every command opens the new folder as it opens the old one. The sample on which the experts are compared is drawn from
another text if one is given. Otherwise it is drawn from the text of the run, but never from the part that the run held
out.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import prune
from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.cost import parameters
from minimoe.storage import checkpoint, huggingface, huggingface_config, open_model
from minimoe.storage.checkpoint import Model
from minimoe.storage.huggingface import Pretrained
from minimoe.text import batches
from minimoe.text.batches import Texts
from minimoe.text.corpus import Corpus

TOKENS = 2048
"""Tokens of the sample, unless another number is given."""

LONGEST = 512
"""The largest length of a sequence of the sample: some models have a context that is longer than the whole sample."""


@brief
class Report(NamedTuple):
    """What was removed, and what that changed on the sample."""

    method: str
    kept: list[list[int]]  # L: the experts that stayed, by their number in the model before
    errors: list[float]  # L: the change of the layer's output, as a share of its norm
    tokens: int  # of the sample
    parameters: tuple[int, int]  # of the model, before and after
    first_layer: int = 0  # the number of the first of these layers; those before it are dense


def write(
    source: str | Path,
    out: str | Path,
    keep: int,
    method: str = "reconstruction",
    *,
    corpus: Corpus | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Report:
    """Writes the model of the folder ``source`` with ``keep`` experts per layer to the new folder ``out``.

    ``method`` is one of ``prune.METHODS``. The experts are compared on about ``tokens`` tokens of ``corpus``; without
    ``corpus``, of the text that the run was trained on. ``seed`` draws the sample and the experts of the method
    ``random``.

    Raises:
        UserError: there is no such method; ``source`` cannot be loaded, is quantised, or cannot lose experts; the model
            was trained elsewhere and there is no ``corpus``; the text of the run has changed; or ``out`` is not empty
            or cannot be written.
    """
    source, out = files.user_path(source), files.user_path(out)
    files.refuse_occupied(out)  # before the work, not after it
    _refuse_quantised(source)
    prune.check(open_model.shape(source), keep, method)
    model = open_model.load(source)
    ids = sample(model, corpus, tokens, seed)
    done = prune.prune(model.params, model.config, ids, keep, method, seed)
    if isinstance(model, Model):
        checkpoint.save_changed(out, model._replace(params=done.params, config=done.config))
    else:
        huggingface.save(out, done.params, done.config, model.tokenizer, model.end_tokens)
    before, after = (parameters.count(config).total for config in (model.config, done.config))
    return Report(method, done.kept, done.errors, ids.size, (before, after), model.config.dense_layers)


def sample(
    model: Model | Pretrained, corpus: Corpus | None = None, tokens: int = TOKENS, seed: int = 0
) -> NDArray[np.int32]:
    """About ``tokens`` token ids as sequences (B, T) that do not overlap; fewer if the text is shorter.

    T is the context of the model, but at most ``LONGEST``. If ``corpus`` is the text of the run itself, only the part
    that the run was trained on is used.

    Raises:
        UserError: ``tokens`` is less than 1; the model was trained elsewhere and there is no ``corpus``; the text of
            the run has changed; or the text cannot be encoded.
    """
    if tokens < 1:
        raise UserError(f"tokens {tokens} is too small: the sample needs at least 1 token.")
    if seed < 0:
        raise UserError(f"seed {seed} is not a seed: choose a whole number of at least 0.")
    length = min(model.config.context, LONGEST, tokens)
    texts = _texts_of_the_run(model, corpus)
    if texts is not None:
        there = sum(max((span.stop - span.start) // length, 1) for span in texts.spans)  # more would repeat the text
        return next(texts.batches(min(max(tokens // length, 1), there), length, seed))[0]
    if corpus is None:
        raise UserError("the model was trained elsewhere, so its text is not known: give a text with --text.")
    documents = [model.tokenizer.encode(text) for text in corpus.documents.values()]
    length = min(length, max(len(ids) for ids in documents))
    rows = np.concatenate([ids[: len(ids) // length * length].reshape(-1, length) for ids in documents])
    return rows[np.random.default_rng(seed).permutation(len(rows))[: max(tokens // length, 1)]]


def _texts_of_the_run(model: Model | Pretrained, corpus: Corpus | None) -> Texts | None:
    """The texts that the model was trained on, unless it was trained elsewhere or ``corpus`` is another text."""
    if model.run is None:
        return None
    try:
        return batches.reload(model.run.source, model.run.tokenizer, model.config.context, corpus)
    except UserError:
        if corpus is None:
            raise
        return None


def table(report: Report) -> str:
    """The experts that are left in each layer, and how much the output of the layer changed on the sample."""
    before, after = report.parameters
    lines = [f"{'layer':<7}{'error':>8}   experts left, by their old number"]
    for i, (kept, error) in enumerate(zip(report.kept, report.errors, strict=True), report.first_layer):
        lines.append(f"{i:<7}{error:>8.1%}   {' '.join(map(str, kept))}")
    lines.append(
        f"\n{after:,} of {before:,} parameters are left ({after / before:.0%}). The error is the change of a layer's "
        f"output, as a share of its norm, on {report.tokens:,} tokens."
    )
    return "\n".join(lines)


def _refuse_quantised(source: Path) -> None:
    if huggingface.is_folder(source):
        plan = huggingface_config.read(source).plan
    else:
        plan = checkpoint.load_config(source).quantization
    if plan is not None:
        raise UserError(f"{source} is quantised: prune the model that it came from, then quantise the result.")
