"""A text coloured by the experts that its tokens are sent to, for a notebook, a web page or a terminal.

    ColouredText(routing_trace.trace(params, config, tokens), tokenizer)     the last line of a cell displays it
    print(ColouredText(…).to_terminal(layer=2))
    print(ColouredText(…).to_text())                                         without colours

This is Figure 8 of Jiang et al. 2024, arXiv 2401.04088, for every layer: radio buttons choose the layer, and pointing
at a token shows its experts and weights. The output is HTML and CSS without a script, so the text also looks like this
in a viewer that displays a notebook without running it. Some viewers remove the style sheet: JupyterLab does so in a
notebook that it does not trust yet, and so do many sites that show notebooks. Without a style sheet, the page shows the
plain form of the text, in which the number of the expert stands below each token. Where the style sheet works, it hides
the plain form.
"""

from __future__ import annotations

import html
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from minimoe.analysis.routing_trace import Trace
from minimoe.core.errors import UserError
from minimoe.draw import palette
from minimoe.text.huggingface_tokenizer import MissingTokenizer, PretrainedTokenizer
from minimoe.text.tokenizer import ByteTokenizer, CharTokenizer, ChatTokenizer

AnyTokenizer: TypeAlias = CharTokenizer | ByteTokenizer | ChatTokenizer | PretrainedTokenizer | MissingTokenizer

HTML_MARKS = ("none", "underline", "underline double", "underline dotted", "overline", "underline wavy", "line-through",
              "underline overline")  # fmt: skip
TERMINAL_MARKS = ("", ";4", ";1", ";1;4", ";3", ";3;4", ";1;3", ";1;3;4")
"""Marks for experts of the same colour: the first eight experts have none, the next eight an underline, and so on."""

STYLE = """
#ID{margin:.5em 0;line-height:1.7}
#ID input{margin:0 .3em 0 0;vertical-align:middle}
#ID label{display:inline;font-weight:normal;margin:0 1em 0 0;cursor:pointer}
#ID p{margin:.3em 0}
#ID pre{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.7 monospace;color:inherit;\
background:none;border:0;margin:.3em 0;padding:0}
#ID span{padding:.2em 0;forced-color-adjust:none;print-color-adjust:exact}
#ID p span{padding:.2em .6em;white-space:nowrap}
#ID pre span:hover{outline:2px solid}
#ID .plain{display:none}
"""

PLAIN_COLUMNS = 88
"""The longest line of the plain form, without the names of the layers in front of it."""


@dataclass(frozen=True, repr=False)
class ColouredText:
    """The first ``limit`` tokens of a trace, each in the colour of the expert that is its first choice.

    Any text is safe to show: markup is escaped, and a character that is invisible or that controls the terminal or the
    writing direction is replaced by its code point.

    Raises:
        UserError: ``limit`` is below 1, or the trace has a token that the tokenizer does not know.
    """

    trace: Trace
    tokenizer: AnyTokenizer
    limit: int = 2000

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UserError(f"limit {self.limit} leaves no token to show: give at least 1.")
        if not isinstance(self.tokenizer, MissingTokenizer):
            self.tokenizer.decode(self.trace.tokens[: self.limit])

    def __repr__(self) -> str:
        return f"ColouredText({self._shown()}; a notebook displays it, elsewhere print its .to_terminal())"

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """A fragment of an HTML page, about 95 bytes per token for 4 layers and 2 choices.

        A token names its experts only once, in its tooltip, "L0: 5 61% 2 39%", and the style sheet matches the text of
        the tooltip. Naming them in a class as well would take a fifth more bytes.
        """
        name = "experts-" + uuid.uuid4().hex[:8]  # two fragments on one page must not react to each other's buttons
        layers, _, experts = self.trace.logits.shape
        rules = (_colour_rule(name, e, layers, self.trace.first_layer) for e in range(experts))
        style = STYLE.replace("#ID", f"#{name}") + "\n".join(rules)
        buttons = "\n".join(
            f"<input type=radio name={name} id={name}-{layer}{' checked' * (layer == 0)}>"
            f"<label for={name}-{layer}>layer {self.trace.first_layer + layer}</label>"
            for layer in range(layers)
        )
        key = " ".join(f"<span class=e{e}>{e}</span>" for e in range(experts))
        tokens = "".join(
            f'<span title="{tooltip}">{html.escape(visible(text))}</span>'
            for text, tooltip in zip(self._texts(), self._tooltips(), strict=True)
        )
        return (
            f'<div id={name} role=group aria-label="Text coloured by expert">\n<style>{style}\n</style>\n{buttons}\n'
            f"<p>expert {key} &ensp; {self._shown()}; point at a token to see its experts and weights</p>\n"
            f"<pre>{tokens}</pre>\n"
            "<div class=plain>\n<p>This page shows no colours. Here is the same text with the number of each token's "
            f"expert below it:</p>\n<pre>{html.escape(self.to_text())}</pre>\n</div>\n</div>"
        )

    def to_terminal(self, layer: int | None = None) -> str:
        """The text in the colours of one layer, with the escape codes of a 256-colour terminal and a key above it.

        The layer is by default the first that has a router.

        Raises:
            UserError: there is no such layer.
        """
        layers, _, experts = self.trace.logits.shape
        start = self.trace.first_layer
        layer = start if layer is None else layer
        if not start <= layer < start + layers:
            dense = f"Layer {layer} is dense" if 0 <= layer < start else f"There is no layer {layer}"
            raise UserError(f"{dense}; choose one from {start} to {start + layers - 1}.")
        key = " ".join(_in_colour(f" {e} ", e) for e in range(experts))
        first = self.trace.experts[layer - start, : self.limit, 0].tolist()
        text = "".join(_in_colour(visible(text), e) for text, e in zip(self._texts(), first, strict=True))
        return f"layer {layer}, expert {key}\n{text}\n"

    def to_text(self) -> str:
        """The text without colours. Each line of the text is followed by one line for each layer, which has, under each
        token, the number of the expert that is its first choice."""
        layers, _, experts = self.trace.logits.shape
        digits = len(str(experts - 1))
        narrowest = digits + (digits > 1)  # numbers of two digits need a space between them
        start = self.trace.first_layer
        names = ["", *(f"layer {layer}" for layer in range(start, start + layers))]
        margin = len(names[-1]) + 2
        lines: list[list[list[str]]] = [[]]  # per line of the text its tokens, each as its text and its experts
        columns = 0
        first = self.trace.experts[:, : self.limit, 0].T.tolist()
        for text, experts_of_token in zip(self._texts(), first, strict=True):
            pieces = visible(text).replace("\t", "").split("\n")  # a tab keeps its arrow only
            for i, piece in enumerate(pieces):
                width = max(_columns(piece), narrowest)
                if i > 0 or columns + width > PLAIN_COLUMNS:
                    lines.append([])
                    columns = 0
                if i == 0 or piece:
                    marks = [(str(e) if e >= 0 else "-") if i == 0 else "" for e in experts_of_token]
                    padded = piece + " " * (width - _columns(piece))
                    lines[-1].append([padded, *(f"{mark:<{width}}" for mark in marks)])
                    columns += width
        rows = [
            f"{name:<{margin}}" + "".join(token[place] for token in line)
            for line in lines
            if line
            for place, name in enumerate(names)
        ]
        return "".join(row.rstrip() + "\n" for row in rows)

    def _texts(self) -> list[str]:
        return token_texts(self.tokenizer, self.trace.tokens[: self.limit].tolist())

    def _tooltips(self) -> list[str]:
        """For each token, one line per layer: the token's experts, best first, each with its weight."""
        lines = []
        of_layers = zip(self.trace.experts, self.trace.weights, strict=True)
        for layer, (experts, weights) in enumerate(of_layers, self.trace.first_layer):
            pairs = zip(experts[: self.limit].tolist(), weights[: self.limit].tolist(), strict=True)
            lines.append(
                [
                    f"L{layer}: " + (" ".join(f"{e} {w:.0%}" for e, w in _taken(chosen, weight)) or "none")
                    for chosen, weight in pairs
                ]
            )
        return ["\n".join(token) for token in zip(*lines, strict=True)]

    def _shown(self) -> str:
        total = len(self.trace.tokens)
        return f"{total:,} tokens" if total <= self.limit else f"the first {self.limit:,} of {total:,} tokens"


def token_texts(tokenizer: AnyTokenizer, ids: list[int]) -> list[str]:
    """The text of each token, or a name if it is not text by itself: ⟨C3⟩ for a byte of é, ⟨s⟩ for a special token.

    Without a tokenizer, the name is the id.
    """
    texts = {token: _text_of(tokenizer, token) for token in set(ids)}
    return [texts[token] for token in ids]


def _text_of(tokenizer: AnyTokenizer, token: int) -> str:
    """The text that the token adds to a text that ends in the same token.

    The token is not decoded alone, because the first word of a text loses the space in front of it.
    """
    if isinstance(tokenizer, MissingTokenizer):
        return f"⟨{token}⟩"
    if isinstance(tokenizer, ChatTokenizer):
        reserved = tokenizer.name_of(token)
        return f"⟨{reserved}⟩" if reserved else _text_of(tokenizer.of_text, token)
    text = tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]
    if isinstance(tokenizer, CharTokenizer) or (text and "\ufffd" not in text):  # � stands for a part of a character
        return text
    if isinstance(tokenizer, ByteTokenizer):
        return f"⟨{token:02X}⟩"
    name = tokenizer.name_of(token) or str(token)
    return f"⟨{name.removeprefix('<').removesuffix('>').removeprefix('0x')}⟩"


def visible(text: str) -> str:
    """``text`` with every invisible or active character replaced; only newlines and tabs stay, after an arrow.

    Control characters, direction marks, zero-width characters and the like become their code point, ⟨1B⟩ or ⟨202E⟩. If
    the text begins with an accent that has no letter, the accent is put on a dotted circle.
    """
    shown = "".join(map(_visible_character, text))
    return "◌" + shown if text and unicodedata.category(text[0]).startswith("M") else shown


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return {"\n": "↵\n", "\t": "→\t"}[character]
    # controls, formats (directions, zero widths), surrogates, private-use and unassigned characters, line separators
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨{ord(character):02X}⟩"
    return character


def _columns(text: str) -> int:
    """How many columns ``text`` takes in a font of equal widths: two for a wide character, none for an accent."""
    return sum(
        0 if unicodedata.category(c).startswith("M") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )


def _colour_rule(name: str, expert: int, layers: int, start: int) -> str:
    """The CSS rule that colours one expert's tokens in the chosen layer, and the expert's entry in the key."""
    tokens = "".join(f'#{name}-{layer}:checked~pre [title*="L{start + layer}: {expert} "],' for layer in range(layers))
    background = palette.colour(expert)
    mark = HTML_MARKS[expert // len(palette.COLOURS) % len(HTML_MARKS)]
    decoration = "" if mark == "none" else f";text-decoration:{mark}"
    return f"{tokens}#{name} .e{expert}{{background:{background};color:{palette.ink(background)}{decoration}}}"


def _taken(experts: list[int], weights: list[float]) -> Iterator[tuple[int, float]]:
    """The experts of a token, each with its weight, without the places of a trace that are empty."""
    return ((e, w) for e, w in zip(experts, weights, strict=True) if e >= 0)


def _in_colour(text: str, expert: int) -> str:
    """``text`` between escape codes that colour it; the colour ends before each newline, or it would fill the line.

    If there is no expert (−1), the text keeps the colour of the terminal.
    """
    if expert < 0:
        return text
    place = expert % len(palette.COLOURS)
    ink = 16 if palette.ink(palette.COLOURS[place]) == "#000000" else 231
    mark = TERMINAL_MARKS[expert // len(palette.COLOURS) % len(TERMINAL_MARKS)]
    start, stop = f"\x1b[38;5;{ink};48;5;{palette.TERMINAL[place]}{mark}m", "\x1b[0m"
    return "\n".join(f"{start}{line}{stop}" if line else "" for line in text.split("\n"))
