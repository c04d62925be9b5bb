"""The routing microscope as one HTML page: the text in the experts' colours, with every table and figure.

    microscope_page.write("routing.html", microscope.look(model, texts))

The page loads nothing and works from disk. Its script and style are in minimoe/analysis/web; its content security
policy names them by checksum, so that nothing else can run, whatever a text contains. The experts and weights of a
token are 2·L·K small integers, stored in compressed columns.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from minimoe.analysis import coloured_text, microscope
from minimoe.analysis.microscope import Seen
from minimoe.analysis.routing_trace import Trace
from minimoe.core.arrays import Array
from minimoe.core.files import user_path, write_atomically
from minimoe.draw import palette

WEB = Path(__file__).with_name("web")

MOST_CHOICES = 16_000_000
"""The largest number of choices of experts on the page, N·L·K over all texts; a longer text is cut at its end."""


def write(path: str | Path, seen: Seen, title: str = "Routing microscope") -> None:
    """Writes the page; a reader sees either the whole new file or the old one.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(user_path(path), page(seen, title).encode())


def page(seen: Seen, title: str = "Routing microscope") -> str:
    """The page as one string; everything that comes from a text is written in ASCII."""
    style = _read("microscope.css") + "\n".join(_expert_rules(seen.experts))
    script = _read("microscope_figures.js") + _read("microscope.js")
    parts = {
        "title": html.escape(coloured_text.visible(title)),
        "policy": f"default-src 'none'; script-src {_checksum(script)}; style-src {_checksum(style)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": _data(seen),
    }
    return Template(_read("microscope.html")).substitute(parts)


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _checksum(content: str) -> str:
    """The name of a script or style sheet in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _expert_rules(experts: int) -> list[str]:
    """The style of each expert: its background, the band under a token whose second choice it is, and its button."""
    rules = []
    for expert in range(experts):
        ground = palette.colour(expert)
        mark = coloured_text.HTML_MARKS[expert // len(palette.COLOURS) % len(coloured_text.HTML_MARKS)]
        rules.append(f".e{expert} {{ background: {ground}; color: {palette.ink(ground)}; text-decoration: {mark}; }}")
        rules.append(f".also{expert} {{ box-shadow: 0 4px {ground}; }}")
        rules.append(f".chosen button.e{expert}:not([aria-pressed=true]) {{ box-shadow: inset 0 -4px {ground}; }}")
    return rules


def _data(seen: Seen) -> str:
    """Everything that the page shows, as JSON that cannot close the element that contains it."""
    names = list(seen.traces)
    places = {token: place for place, token in enumerate(seen.token_texts)}
    limit = max(1, MOST_CHOICES // (len(seen.layers) * seen.active * len(names)))
    data = {
        **_rounded(microscope.to_dict(seen)),
        "names": [coloured_text.visible(name) for name in names],
        "keys": names,
        "vocabulary": list(seen.token_texts.values()),
        "tokens": [_columns(trace, places, limit) for trace in seen.traces.values()],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    """Dictionaries and lists of numbers, each rounded to four digits, which is as many as the page shows."""
    match value:
        case dict():
            return {name: _rounded(part) for name, part in value.items()}
        case list():
            return [_rounded(part) for part in value]
        case float():
            return float(f"{value:.4g}")
    return value


def _columns(trace: Trace, places: dict[int, int], limit: int) -> dict[str, Any]:
    """The first ``limit`` tokens of a text: places in the vocabulary (N,), experts and weights in percent (L, K, N)."""
    known = np.array(list(places))  # ascending, because numpy.unique made them
    experts = trace.experts[:, :limit].transpose(0, 2, 1)
    weights = np.rint(100 * trace.weights[:, :limit]).transpose(0, 2, 1)
    return {
        "shown": min(limit, len(trace.tokens)),
        "total": len(trace.tokens),
        "places": _packed(np.searchsorted(known, trace.tokens[:limit])),
        "experts": _packed(np.where(experts < 0, trace.logits.shape[2], experts)),  # E where there is none
        "weights": _packed(weights),
    }


def _packed(values: Array) -> dict[str, str]:
    """Non-negative integers in the narrowest type that holds them, little-endian, deflated, in base64."""
    bits = next(bits for bits in (8, 16, 32) if values.max() < 2**bits)
    content = zlib.compress(np.ascontiguousarray(values, f"<u{bits // 8}").tobytes(), 6)
    return {"type": f"Uint{bits}Array", "content": base64.b64encode(content).decode()}
