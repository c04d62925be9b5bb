"""An adapter for EleutherAI's lm-evaluation-harness: its tasks, on any model that minimoe opens.

    import lm_eval                                      pip install "minimoe[harness]"
    from minimoe.evaluate import harness
    lm_eval.simple_evaluate(model=harness.lm("runs/toy"), tasks=["lambada_openai"])

The harness asks a model for three things: the log-probability of a text after a context (and whether the likeliest
tokens are exactly that text), the log-probability of a whole document, and a text that is written until a stop string.
``Harness`` answers them as the harness's own backend for transformers does, in these points:

- Spaces at the end of a context belong to the continuation; context and continuation are encoded as one text.
- A context that is too long for the model loses its beginning.
- A document that is longer than the context is read in pieces, so that each of its tokens is predicted once.

``Harness`` differs from that backend in one point: a token that begins every text is never predicted. If a tokenizer
adds such a token, that backend also counts, in documents, how likely the token is after itself.

An empty context is replaced by the token with which the tokenizer begins every text, or else by one that ends texts. A
model without such tokens, such as one that ``minimoe train`` makes, has nothing that predicts the first token of a
document; this token is then left out of the sum, as ``text_loss`` leaves it out.

The harness writes a chat as one string, in which a user could type what ends a question. minimoe never reads special
ids from a text (see ``text.chat``), so ``apply_chat_template`` is not possible with this adapter.

Gao et al., https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from minimoe.core.arrays import Array, array_module, like, select_device, to_host
from minimoe.core.errors import UserError
from minimoe.core.files import user_path
from minimoe.evaluate.text_loss import LOGITS, SEQUENCES
from minimoe.inference import generation, reading
from minimoe.inference.generation import Writer
from minimoe.layers import decoder, linear
from minimoe.losses import cross_entropy
from minimoe.storage import open_model

MOST_TOKENS = 256
"""Tokens that are written at most if a task does not say how many; never more than half of the model's context."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = {"until", "do_sample", "temperature", "top_k", "top_p", *LIMITS}
"""Settings of a task for writing, by the names that the harness uses."""


class Request(Protocol):
    """One question of the harness."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Scored(NamedTuple):
    """A continuation under the model."""

    logp: float  # nats, summed over its tokens
    greedy: bool  # whether each of its tokens is the likeliest one


class Harness:
    """The three answers, for a model of minimoe. ``lm`` makes it a model of the harness."""

    def __init__(self, model: Writer) -> None:
        super().__init__()
        self.model = model
        self.length = model.config.context

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(context, continuation) of each request → the log-probability in nats, and whether it is the likeliest."""
        pairs = [_pair(self.model, *request.args) for request in requests]
        return [(scored.logp, scored.greedy) for scored in score(self.model, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """(document,) of each request → the log-probability of the whole document, in nats."""
        windows = [list(_windows(self.model, *request.args)) for request in requests]
        scored = iter(score(self.model, [pair for of_one in windows for pair in of_one]))
        return [float(sum(next(scored).logp for _ in of_one)) for of_one in windows]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """(context, settings) of each request → the text that the model writes up to one of its stop strings."""
        return [write_until(self.model, *request.args) for request in requests]


def lm(folder: str | Path, device: str = "auto") -> Any:
    """The model in ``folder``, a run or a Mixtral in Hugging Face's layout, for ``lm_eval.simple_evaluate(model=…)``.

    Raises:
        UserError: lm-evaluation-harness is not installed, or the folder holds no model.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise UserError(
            f'lm-evaluation-harness cannot be imported ({error}): run `pip install "minimoe[harness]"`.'
        ) from None
    name = str(user_path(folder))
    kind = type("MiniMoE", (Harness, base), {"tokenizer_name": property(lambda self: name)})
    return kind(open_model.load(folder).to(select_device(device)))


def score(model: Writer, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """The ids of a context, at least one, and of its continuation → how likely the continuation is.

    Together they may be one token longer than the model's context, because the last token predicts nothing. If they are
    longer, the context loses its beginning.

    Raises:
        UserError: a context is empty, or a continuation alone is longer than the model's context.
    """
    length = model.config.context
    for context, continuation in pairs:
        if not context:
            raise UserError("a context without a token predicts nothing: give it at least one.")
        if len(continuation) > length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit into the model's context of {length}: use "
                "shorter texts, or a model with a longer context."
            )
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))  # similar lengths together
    found: dict[int, Scored] = {}
    at_once = min(SEQUENCES, reading.sequences_at_once(length))
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        rows = [(pairs[i][0] + pairs[i][1])[-length - 1 :] for i in some]
        for i, scored in zip(some, _score(model, rows, [len(pairs[i][1]) for i in some]), strict=True):
            found[i] = scored
    return [found[i] for i in range(len(pairs))]


def _score(model: Writer, rows: Sequence[list[int]], counts: Sequence[int]) -> Iterator[Scored]:
    """Rows of ids, and how many of the last ids of each are its continuation.

    The padding stands after the ids. No token sees a later one, and experts have no capacity in evaluation, so padding
    does not change the results.
    """
    gain = model.params.norm.gain
    xp = array_module(gain)
    tokens = np.zeros((len(rows), max(len(row) for row in rows) - 1), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row) - 1] = row[:-1]
    pieces = [found.x for _, found in reading.read(model.params, model.config, like(gain, tokens))]
    hidden = pieces[0] if len(pieces) == 1 else xp.concatenate(pieces, axis=1)  # (B, T, D)
    head = decoder.output_layer(model.params)
    for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
        last = len(row) - 1
        x, targets = hidden[b, last - count : last], np.array(row[last + 1 - count :], np.int32)
        logp, greedy = 0.0, True
        step = max(1, LOGITS // model.config.vocab_size)
        for start in range(0, count, step):
            logits, _ = linear.forward(head, x[start : start + step])
            nats, likeliest = _compare(logits, like(gain, targets[start : start + step]))
            logp, greedy = logp - nats, greedy and likeliest
        yield Scored(logp, greedy)


def _compare(logits: Array, targets: Array) -> tuple[float, bool]:
    """logits (n, V) and targets (n,) → the summed loss, and whether every target is the likeliest token."""
    nats, _ = cross_entropy.by_token(logits, targets)
    return float(to_host(nats).sum(dtype=np.float64)), bool((logits.argmax(1) == targets).all())


def _pair(model: Writer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """A context and its continuation as ids, cut where the context ends."""
    if not context:
        prefix, ids = _prefix(model), _without_beginning(model, continuation)
        return (prefix, ids) if prefix else (ids[:1], ids[1:])
    spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    if not context:  # there were only spaces
        return _pair(model, "", continuation)
    before = model.tokenizer.encode(context).tolist()
    return before, model.tokenizer.encode(context + continuation).tolist()[len(before) :]


def _windows(model: Writer, document: str) -> Iterator[tuple[list[int], list[int]]]:
    """A document in pieces for ``score``: each token is predicted once, the last ones with as much context as fits."""
    length = model.config.context
    prefix, ids = _prefix(model), _without_beginning(model, document)
    if not prefix:
        prefix, ids = ids[:1], ids[1:]
    if ids:
        yield prefix, ids[:length]
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start], ids[start:end]


def _prefix(model: Writer) -> list[int]:
    """The token that stands for an empty context; none if the model has no such token."""
    return model.tokenizer.encode("").tolist()[:1] or list(model.end_tokens[:1])


def _without_beginning(model: Writer, text: str) -> list[int]:
    """The ids of a text, without those that begin every text."""
    return model.tokenizer.encode(text).tolist()[len(model.tokenizer.encode("")) :]


def write_until(model: Writer, context: str, settings: Mapping[str, Any]) -> str:
    """What the model writes after a context, up to a stop string or a token that ends a text, both left out.

    The likeliest token is taken unless ``do_sample`` is on, or a ``temperature`` above 0 is given without
    ``do_sample``. The context loses its beginning if there would be no room for what is to be written.

    Raises:
        UserError: a setting is unknown, or more is to be written than the model's context holds.
    """
    unknown = sorted(settings.keys() - SETTINGS)
    if unknown:
        raise UserError(
            f"the task sets {unknown[0]!r:.40} for writing, which minimoe does not know: leave it out; possible are "
            f"{', '.join(sorted(SETTINGS))}."
        )
    until = settings.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    usual = min(MOST_TOKENS, max(model.config.context // 2, 1))
    most = int(next((settings[name] for name in LIMITS if settings.get(name) is not None), usual))
    if not 0 < most < model.config.context:
        raise UserError(
            f"{most} tokens are to be written, but the model's context is {model.config.context}: set max_gen_toks "
            "to at least 1 and to less than that."
        )
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is not None:
        temperature = (temperature or 1.0) if settings["do_sample"] else 0.0
    drawn = generation.generate(
        model.params,
        model.config,
        (model.tokenizer.encode(context).tolist() or _prefix(model))[most - model.config.context :],
        tokens=most,
        temperature=temperature,
        top_k=settings.get("top_k"),
        top_p=settings.get("top_p"),
    )
    written: list[int] = []
    text = ""
    for token in drawn:
        if token in model.end_tokens:
            break
        written.append(token)
        text = model.tokenizer.decode(written)
        if any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.partition(stop)[0]
    return text
