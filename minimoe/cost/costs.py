"""What a model costs: operations per token, and bytes for its weights, its key/value cache and its training.

forward     2 operations (a product, a sum) for every active parameter that multiplies a token,
            and 4·H·C in every layer for every token that attention looks at: half of the context on average,
            nearly the whole window if there is one, all of the context in an encoder
backward    twice as many: one product for the gradient of the input, and one for the gradient of the weight
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from minimoe.cost.blueprint import Blueprint

BITS = (32, 16, 8, 4)


@dataclass(frozen=True)
class Costs:
    """Exact whole numbers. Operations are for one token, as the average over a full context."""

    name: str
    source: str
    total: int
    active: int
    parts: dict[str, dict[str, int]]  # part → total, active
    context: int
    forward_operations: int
    backward_operations: int
    weight_bytes: dict[int, int]  # bits per number → bytes
    cache_bytes_per_token: int  # with 16 bits per number
    cache_bytes: dict[int, int]  # context → bytes, with 16 bits per number
    training_bytes: int  # 32-bit weights, gradients and AdamW's two moments


def of(blueprint: Blueprint) -> Costs:
    """The costs of a blueprint."""
    seen = blueprint.context if blueprint.window is None else min(blueprint.window, blueprint.context)
    weights = 2 * sum(part.active for part in blueprint.parts if part.multiplied)
    masked = 4 * blueprint.attention_width * _pairs(blueprint.context, seen) // max(blueprint.context, 1)
    forward = weights + masked + 4 * blueprint.unmasked_width * blueprint.context
    per_token = 2 * blueprint.cached_numbers
    return Costs(
        name=blueprint.name,
        source=blueprint.source,
        total=blueprint.total,
        active=blueprint.active,
        parts={part.name: {"total": part.total, "active": part.active} for part in blueprint.parts},
        context=blueprint.context,
        forward_operations=forward,
        backward_operations=2 * forward,
        weight_bytes={bits: (blueprint.total * bits + 7) // 8 for bits in BITS},
        cache_bytes_per_token=per_token,
        cache_bytes={length: per_token * min(length, seen) for length in _lengths(blueprint.context)},
        training_bytes=16 * blueprint.total,
    )


def to_json(costs: Costs) -> str:
    """One JSON object."""
    return json.dumps(dataclasses.asdict(costs), indent=2)


def table(costs: Costs) -> str:
    """The costs as text, in aligned columns."""
    lines = [f"{costs.name}" + (f" ({costs.source})" if costs.source else ""), ""]
    lines += _columns(
        [("", "total", "active", "share of total")]
        + [
            (name, f"{part['total']:,}", f"{part['active']:,}", f"{part['total'] / costs.total:.2%}")
            for name, part in costs.parts.items()
        ]
        + [("all", f"{costs.total:,}", f"{costs.active:,}", f"active {costs.active / costs.total:.2%}")]
    )
    full = f", in a full context of {costs.context:,} tokens" if costs.context else ""
    facts: list[tuple[str, str]] = [
        (f"operations per token, forward{full}", f"{costs.forward_operations:,}"),
        (f"operations per token, backward{full}", f"{costs.backward_operations:,}"),
        *((f"weights at {bits} bits", _size(size)) for bits, size in costs.weight_bytes.items()),
        *(
            (f"key/value cache at {length:,} tokens, 16 bits", _size(size))
            for length, size in costs.cache_bytes.items()
        ),
        ("training with AdamW in 32 bits, without activations", _size(costs.training_bytes)),
    ]
    return "\n".join([*lines, "", *_columns(facts)])


def _pairs(context: int, window: int) -> int:
    """How many pairs (a token, a token that it sees) there are: the sum of min(t, window), t from 1 to ``context``."""
    return window * (window + 1) // 2 + (context - window) * window


def _lengths(context: int) -> list[int]:
    """A sixteenth, a quarter and all of a context."""
    return sorted({max(1, context // 16), max(1, context // 4), context}) if context else []


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.3f} MB"


def _columns(rows: list[Any]) -> list[str]:
    """Rows of texts as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
