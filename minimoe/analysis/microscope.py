"""The routing microscope: all statistics of a model's routing on several texts, as a table or as JSON.

    model = open_model.load("runs/toy")
    seen = look(model, {"fables": model.tokenizer.encode(…), "sums": …})
    print(table(seen))

``routing_trace`` explains each number; ``microscope_page`` shows the same numbers on a page to explore.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minimoe.analysis import routing_trace
from minimoe.analysis.coloured_text import token_texts, visible
from minimoe.analysis.routing_trace import Choice, Trace
from minimoe.core.arrays import Array
from minimoe.core.errors import UserError
from minimoe.core.ids import checked
from minimoe.core.summary import brief
from minimoe.parallel.thread_pool import Map
from minimoe.storage.checkpoint import Model
from minimoe.storage.huggingface import Pretrained
from minimoe.text import batches
from minimoe.text.corpus import Corpus

LINE = 100
"""The largest number of characters in a line of the tables."""

FAVOURITES = 8
"""How many favourite tokens are listed for each expert."""

RATES = ("observed", "uniform", "load", "shuffled")
"""The fields of ``routing_trace.Repetition``: how often neighbours share an expert, and three chance levels."""

SHUFFLED_TOKENS = 100_000
"""About how many tokens of a text are shuffled, over at most 20 rounds. The random error is then rarely above 0.5 %."""


class Favourite(NamedTuple):
    """``routing_trace.Favourite`` with the visible text of the token."""

    token: int
    text: str
    seen: int
    share: float
    lift: float


@brief
class Chosen(NamedTuple):
    """The statistics of one layer's first choices, of its second choices, or of all its choices together."""

    load: Array  # (texts, E)  each expert's share of the assignments
    difference: Array  # (texts, texts)  Jensen-Shannon divergence of the loads of two texts, in bits; 0 if one is empty
    divergence: float  # the divergence of all texts that have a load; 0 if there is only one
    repetition: Array  # (texts, 4)  in the order of RATES
    favourites: list[list[Favourite]]  # of each expert, over all texts


@brief
class Layer(NamedTuple):
    """The statistics of one layer's router."""

    choices: dict[Choice, Chosen]
    entropy: Array  # (texts,)  mean over the tokens, nats
    margin: Array  # (texts,)  median over the tokens, logits; infinite if K = E
    co_activation: Array  # (E, E)  share of all tokens that go to both


@dataclass(frozen=True, repr=False)
class Seen:
    """A model's routing on some texts, and all statistics of it."""

    context: int  # T  longer texts are read in windows of this many tokens
    traces: dict[str, Trace]  # by the name of the text
    token_texts: dict[int, str]  # the visible text of each token
    layers: list[Layer]

    @property
    def first_layer(self) -> int:
        """The number of the first layer with a router; those before it are dense."""
        return next(iter(self.traces.values())).first_layer

    @property
    def experts(self) -> int:
        """E"""
        return int(next(iter(self.traces.values())).logits.shape[2])

    @property
    def active(self) -> int:
        """K, or the most experts that a token has"""
        return max(int(trace.experts.shape[2]) for trace in self.traces.values())

    @property
    def mean_active(self) -> float:
        """Experts per token, averaged over tokens and layers."""
        return float(np.concatenate([(trace.experts >= 0).sum(2) for trace in self.traces.values()], axis=1).mean())

    def __repr__(self) -> str:
        names = ", ".join(map(visible, self.traces))
        return f"Seen({names}; pass it to microscope.table and print the result, or to microscope_page.write)"


def read(model: Model | Pretrained, files: Corpus | None = None) -> dict[str, Array]:
    """The tokens of each file; without files, those of the validation split, which the run was not trained on.

    Raises:
        UserError: there are neither files nor a run, the run's texts have changed, or a text cannot be encoded.
    """
    if files is not None:
        return {name: model.tokenizer.encode(text) for name, text in files.documents.items()}
    if model.run is None:
        raise UserError("A model that was trained elsewhere has no validation split: name a text with --text.")
    held = batches.reload(model.run.source, model.run.tokenizer, model.config.context)
    return dict(zip(held.names, held.validation, strict=True))


def look(model: Model | Pretrained, tokens: Mapping[str, Array], run: Map = map) -> Seen:
    """Routes every text, given as tokens (T,) by name, and computes all statistics of ``routing_trace``.

    The layers are processed one by one, which bounds the memory that the statistics need in addition to the traces.

    Args:
        run: a ``map`` over the texts, for example one that uses several threads.

    Raises:
        UserError: there is no text, a text has fewer than two tokens, or a token is not in the model's vocabulary; or
            the model has too many experts to compare, or a context of one token.
    """
    if not tokens:
        raise UserError("There is no text to look at; give at least one.")
    if model.config.context < 2:
        raise UserError(
            "The model reads one token at a time (its context is 1), so no token has a neighbour to compare it with: "
            "train one with a context of at least 2."
        )
    for name, ids in tokens.items():
        if len(checked(ids, 2**63, axes=(1,), what=f"The ids of the text {name!r:.40}")) < 2:
            raise UserError(f"The text {name!r} is {len(ids)} token long; give at least two, to compare neighbours.")
    routing_trace.check_experts(model.config.experts)
    traced = run(lambda ids: routing_trace.trace(model.params, model.config, ids), tokens.values())
    traces = dict(zip(tokens, routing_trace.alike(list(traced)), strict=True))
    known = np.unique(np.concatenate([trace.tokens for trace in traces.values()])).tolist()
    shown = dict(zip(known, map(visible, token_texts(model.tokenizer, known)), strict=True))
    several = next(iter(traces.values())).experts.shape[2] > 1
    choices: tuple[Choice, ...] = ("first", "second", "either") if several else ("first",)
    repetition = {choice: np.stack([_rates(trace, choice) for trace in traces.values()], 1) for choice in choices}
    layers = [
        _look_at(
            [_layer(trace, layer) for trace in traces.values()],
            {choice: rates[layer] for choice, rates in repetition.items()},
            shown,
        )
        for layer in range(model.config.layers - model.config.dense_layers)
    ]
    return Seen(model.config.context, traces, shown, layers)


def _rates(trace: Trace, choice: Choice) -> Array:
    """(L, 4), in the order of ``RATES``."""
    shuffles = min(20, math.ceil(SHUFFLED_TOKENS / len(trace.tokens)))
    found = routing_trace.repetition(trace, choice, shuffles=shuffles)
    rates: Array = np.stack(np.broadcast_arrays(*(getattr(found, name) for name in RATES)), axis=1)
    return rates


def _layer(trace: Trace, layer: int) -> Trace:
    """One layer of a trace; its arrays keep the axis of layers, with length 1."""
    experts, weights, logits = (part[layer : layer + 1] for part in (trace.experts, trace.weights, trace.logits))
    return trace._replace(experts=experts, weights=weights, logits=logits)


def _look_at(traces: list[Trace], repetition: Mapping[Choice, Array], shown: Mapping[int, str]) -> Layer:
    """The statistics of one layer; ``traces`` holds one trace per text, each of this layer only."""
    arrays: Any = (trace[:5] for trace in traces)
    joined: Any = (np.concatenate(parts, axis=int(parts[0].ndim > 1)) for parts in zip(*arrays, strict=True))
    together = Trace(*joined)
    return Layer(
        {choice: _look_at_choice(traces, together, choice, rates, shown) for choice, rates in repetition.items()},
        entropy=np.array([routing_trace.entropy(trace).mean() for trace in traces]),
        margin=np.array([np.median(routing_trace.margin(trace)) for trace in traces]),
        co_activation=routing_trace.co_activation(together)[0],
    )


def _look_at_choice(
    traces: list[Trace], together: Trace, choice: Choice, repetition: Array, shown: Mapping[int, str]
) -> Chosen:
    load = np.concatenate([routing_trace.load(trace, choice) for trace in traces])
    listed = routing_trace.favourite_tokens(together, 0, FAVOURITES, choice=choice)
    # A text in which no token has this choice has no load to compare.
    there = np.flatnonzero(load.any(1))
    difference = np.zeros((len(load), len(load)))
    difference[np.ix_(there, there)] = routing_trace.jensen_shannon(
        *np.broadcast_arrays(load[there][:, None], load[there][None])
    )
    return Chosen(
        load,
        difference,
        divergence=float(routing_trace.jensen_shannon(*load[there])) if len(there) > 1 else 0.0,
        repetition=repetition,
        favourites=[[Favourite(f.token, shown[f.token], *f[1:]) for f in favourites] for favourites in listed],
    )


def to_dict(seen: Seen) -> dict[str, Any]:
    """All statistics as lists and numbers, by name; an infinite margin, where K = E, becomes None."""
    names = list(seen.traces)
    return {
        "layers": len(seen.layers),
        "first_layer": seen.first_layer,
        "experts": seen.experts,
        "active_experts": seen.active,
        "mean_active_experts": seen.mean_active,
        "context": seen.context,
        "texts": {name: {"tokens": len(trace.tokens)} for name, trace in seen.traces.items()},
        "by_layer": [
            {
                "entropy": dict(zip(names, layer.entropy.tolist(), strict=True)),
                "margin": {
                    name: margin if math.isfinite(margin) else None
                    for name, margin in zip(names, layer.margin.tolist(), strict=True)
                },
                "co_activation": layer.co_activation.tolist(),
                "choices": {choice: _chosen_to_dict(chosen, names) for choice, chosen in layer.choices.items()},
            }
            for layer in seen.layers
        ],
    }


def _chosen_to_dict(chosen: Chosen, names: list[str]) -> dict[str, Any]:
    return {
        "load": dict(zip(names, chosen.load.tolist(), strict=True)),
        "divergence": chosen.divergence,
        "difference": chosen.difference.tolist(),
        "repetition": {
            name: dict(zip(RATES, rates, strict=True))
            for name, rates in zip(names, chosen.repetition.tolist(), strict=True)
        },
        "favourites": [[favourite._asdict() for favourite in expert] for expert in chosen.favourites],
    }


def to_json(seen: Seen) -> str:
    """``to_dict`` as one JSON object, in ASCII."""
    return json.dumps(to_dict(seen), indent=2, allow_nan=False)


def table(seen: Seen) -> str:
    """The statistics in columns, layer by layer, without characters that could control a terminal."""
    lengths = ", ".join(f"{_in_line(visible(name))} {len(trace.tokens):,}" for name, trace in seen.traces.items())
    mean = f"{seen.mean_active:.2f}".removesuffix(".00")
    dense = f" after {seen.first_layer} dense" if seen.first_layer else ""
    head = f"{len(seen.layers)} layers{dense}, {mean} of {seen.experts} experts per token. Tokens: {lengths}."
    return "\n".join([head, *(line for layer in range(len(seen.layers)) for line in _layer_table(seen, layer))])


def _layer_table(seen: Seen, number: int) -> Iterator[str]:
    layer = seen.layers[number]
    names = [_in_line(visible(name)) for name in seen.traces]
    experts = [str(expert) for expert in range(seen.experts)]
    yield f"\nLAYER {seen.first_layer + number}"
    for choice, chosen in layer.choices.items():
        yield from _columns(f"load, {choice} choice", experts, names, _percent(chosen.load))
        if len(names) > 1:
            yield f"  {chosen.divergence:.4f} bits apart (Jensen-Shannon)"
    for choice, chosen in layer.choices.items():
        yield from _columns(f"neighbours share, {choice}", RATES, names, _percent(chosen.repetition))
    sure = [[f"{entropy:.3f}", f"{gap:.3f}"] for entropy, gap in zip(layer.entropy, layer.margin, strict=True)]
    yield from _columns("how sure", ("entropy/nats", "margin/logits"), names, sure)
    if seen.active > 1:
        others = _percent(shared(layer.co_activation))
        for itself, row in enumerate(others):
            row[itself] = "-"
        yield from _columns("of its tokens, also to", experts, experts, others)
    chosen = list(layer.choices.values())[-1]
    yield "\nfavourite tokens, each with its multiple of the expert's base rate"
    for expert, favourites in zip(experts, chosen.favourites, strict=True):
        tokens = "   ".join(f"'{_in_line(token.text)}' {token.lift:.1f}" for token in favourites)
        yield f"  {expert:<3} {tokens or '-'}"


def shared(co_activation: Array) -> Array:
    """co_activation (E, E) → (E, E): of the tokens sent to expert i, the share that is also sent to expert j."""
    own = np.diag(co_activation)[:, None]
    given: Array = co_activation / np.where(own > 0, own, 1)
    return given


def _columns(title: str, heads: Sequence[str], names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A title and column heads, then one line per name; columns too many for one ``LINE`` follow below."""
    left = max(len(title), *(len(name) + 2 for name in names)) + 1
    width = max(len(cell) for cells in (heads, *rows) for cell in cells) + 2
    count = max(1, (LINE - left) // width)
    for start in range(0, len(heads), count):
        some = slice(start, start + count)
        yield "\n" + title.ljust(left) + "".join(head.rjust(width) for head in heads[some])
        for name, row in zip(names, rows, strict=True):
            yield ("  " + name).ljust(left) + "".join(cell.rjust(width) for cell in row[some])


def _in_line(text: str) -> str:
    """A visible text on one line: its newlines and tabs are removed, because the arrows before them are enough."""
    return text.replace("\n", "").replace("\t", "")


def _percent(shares: Array) -> list[list[str]]:
    return [[f"{share:.1%}" for share in row] for row in shares]
