"""The routing microscope: all that can be asked of the routers on several texts, gathered, as a table or as JSON.

    model = models.load("runs/toy")
    seen = look(model, {"fables": model.tokenizer.encode(…), "sums": …})
    print(table(seen))

What each number means stands in ``routing``; ``microscope_page`` shows the same on a page to explore.
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
from minimoe.parallel.thread_pool import Map
from minimoe.storage.checkpoint import Model
from minimoe.storage.huggingface import Pretrained
from minimoe.text import batches
from minimoe.text.corpus import Corpus

LINE = 100
"""Characters of a line of the tables, at most."""

FAVOURITES = 8
"""How many favourite tokens are listed for each expert."""

RATES = ("observed", "uniform", "load", "shuffled")
"""How often neighbours share an expert, and by three kinds of chance, as ``routing.Repetition`` has them."""

SHUFFLED_TOKENS = 100_000
"""A text is shuffled until about so many tokens have been, at most 20 times: half a percent by luck is then rare."""


class Favourite(NamedTuple):
    """``routing.Favourite``, with the token's text made visible."""

    token: int
    text: str
    seen: int
    share: float
    lift: float


class Chosen(NamedTuple):
    """What one layer's first choices do, or its second ones, or all of them together."""

    load: Array  # (texts, E)  each expert's share of the assignments
    difference: Array  # (texts, texts)  Jensen-Shannon divergence of their loads, in bits
    divergence: float  # that of all texts at once, 0 if there is only one
    repetition: Array  # (texts, 4)  in the order of RATES
    favourites: list[list[Favourite]]  # of each expert, in all texts together


class Layer(NamedTuple):
    """What one layer's router does."""

    choices: dict[Choice, Chosen]
    entropy: Array  # (texts,)  mean over the tokens, nats
    margin: Array  # (texts,)  median over the tokens, logits; infinite if K = E
    co_activation: Array  # (E, E)  share of all tokens that go to both


@dataclass(frozen=True, repr=False)
class Seen:
    """What there is to see of a model's routing on some texts."""

    context: int  # T  longer texts are read in windows of so many tokens
    traces: dict[str, Trace]  # by the name of the text
    token_texts: dict[int, str]  # what each token stands for, made visible
    layers: list[Layer]

    @property
    def experts(self) -> int:
        """E"""
        return int(next(iter(self.traces.values())).logits.shape[2])

    @property
    def active(self) -> int:
        """K"""
        return int(next(iter(self.traces.values())).experts.shape[2])

    def __repr__(self) -> str:
        names = ", ".join(map(visible, self.traces))
        return f"Seen({names}; print microscope.table(…), or give it to microscope_page.write)"


def read(model: Model | Pretrained, files: Corpus | None = None) -> dict[str, Array]:
    """The tokens of each file; without files those that the run was validated on, which it never learned from.

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
    """Routes every text, given as tokens (T,) by name, and gathers what ``routing`` says of it.

    The layers are looked at one by one, which bounds the memory that the statistics take beside the traces.

    Args:
        run: a ``map`` over the texts, one of several threads for instance.

    Raises:
        UserError: there is no text, one has fewer than two tokens, or one that the model does not know.
    """
    if not tokens:
        raise UserError("There is no text to look at; give at least one.")
    for name, ids in tokens.items():
        if len(ids) < 2:
            raise UserError(f"The text {name!r} is {len(ids)} token long; give at least two, which can be compared.")
    traced = run(lambda ids: routing_trace.trace(model.params, model.config, ids), tokens.values())
    traces = dict(zip(tokens, traced, strict=True))
    known = np.unique(np.concatenate([trace.tokens for trace in traces.values()])).tolist()
    shown = dict(zip(known, map(visible, token_texts(model.tokenizer, known)), strict=True))
    choices: tuple[Choice, ...] = ("first", "second", "either") if model.config.active_experts > 1 else ("first",)
    repetition = {choice: np.stack([_rates(trace, choice) for trace in traces.values()], 1) for choice in choices}
    layers = [
        _look_at(
            [_layer(trace, layer) for trace in traces.values()],
            {choice: rates[layer] for choice, rates in repetition.items()},
            shown,
        )
        for layer in range(model.config.layers)
    ]
    return Seen(model.config.context, traces, shown, layers)


def _rates(trace: Trace, choice: Choice) -> Array:
    """(L, 4), in the order of ``RATES``."""
    shuffles = min(20, math.ceil(SHUFFLED_TOKENS / len(trace.tokens)))
    found = routing_trace.repetition(trace, choice, shuffles=shuffles)
    rates: Array = np.stack(np.broadcast_arrays(*(getattr(found, name) for name in RATES)), axis=1)
    return rates


def _layer(trace: Trace, layer: int) -> Trace:
    """One layer of a trace, still with an axis of layers."""
    experts, weights, logits = (part[layer : layer + 1] for part in (trace.experts, trace.weights, trace.logits))
    return trace._replace(experts=experts, weights=weights, logits=logits)


def _look_at(traces: list[Trace], repetition: Mapping[Choice, Array], shown: Mapping[int, str]) -> Layer:
    """The statistics of one layer; the traces, one a text, have no other."""
    together = Trace(*(np.concatenate(parts, axis=int(parts[0].ndim > 1)) for parts in zip(*traces, strict=True)))
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
    return Chosen(
        load,
        difference=routing_trace.jensen_shannon(*np.broadcast_arrays(load[:, None], load[None])),
        divergence=float(routing_trace.jensen_shannon(*load)) if len(load) > 1 else 0.0,
        repetition=repetition,
        favourites=[[Favourite(f.token, shown[f.token], *f[1:]) for f in favourites] for favourites in listed],
    )


def to_dict(seen: Seen) -> dict[str, Any]:
    """All statistics in lists and numbers, by name; a margin that is infinite, where K = E, is None."""
    names = list(seen.traces)
    return {
        "layers": len(seen.layers),
        "experts": seen.experts,
        "active_experts": seen.active,
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
    """The statistics in columns, layer by layer, with nothing in them that could steer a terminal."""
    lengths = ", ".join(f"{_in_line(visible(name))} {len(trace.tokens):,}" for name, trace in seen.traces.items())
    head = f"{len(seen.layers)} layers, {seen.active} of {seen.experts} experts a token. Tokens: {lengths}."
    return "\n".join([head, *(line for layer in range(len(seen.layers)) for line in _layer_table(seen, layer))])


def _layer_table(seen: Seen, number: int) -> Iterator[str]:
    layer = seen.layers[number]
    names = [_in_line(visible(name)) for name in seen.traces]
    experts = [str(expert) for expert in range(seen.experts)]
    yield f"\nLAYER {number}"
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
    yield "\ntakes most, times its base rate"
    for expert, favourites in zip(experts, chosen.favourites, strict=True):
        tokens = "   ".join(f"'{_in_line(token.text)}' {token.lift:.1f}" for token in favourites)
        yield f"  {expert:<3} {tokens or '-'}"


def shared(co_activation: Array) -> Array:
    """co_activation (E, E) → of the tokens sent to expert i, the share also sent to expert j, (E, E)."""
    own = np.diag(co_activation)[:, None]
    given: Array = co_activation / np.where(own > 0, own, 1)
    return given


def _columns(title: str, heads: Sequence[str], names: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A title and heads of columns, then one line a name; columns that do not fit into ``LINE`` follow below."""
    left = max(len(title), *(len(name) + 2 for name in names)) + 1
    width = max(len(cell) for cells in (heads, *rows) for cell in cells) + 2
    count = max(1, (LINE - left) // width)
    for start in range(0, len(heads), count):
        some = slice(start, start + count)
        yield "\n" + title.ljust(left) + "".join(head.rjust(width) for head in heads[some])
        for name, row in zip(names, rows, strict=True):
            yield ("  " + name).ljust(left) + "".join(cell.rjust(width) for cell in row[some])


def _in_line(text: str) -> str:
    """A visible text on one line: its new lines and tabs stand behind arrows, which are enough."""
    return text.replace("\n", "").replace("\t", "")


def _percent(shares: Array) -> list[list[str]]:
    return [[f"{share:.1%}" for share in row] for row in shares]
