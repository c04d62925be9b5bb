"""Blueprints: exact counts of the parts of a model, for this package's own shapes and for well-known published ones.

    total      every parameter
    active     those used for one token: K of the E experts, and everything that is shared

The counts follow from the published shapes alone; ``costs`` turns them into operations and bytes.
Lesson: lessons/00_start_here.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

from minimoe.core.config import ModelConfig
from minimoe.cost import parameters
from minimoe.layers import moe


class Part(NamedTuple):
    """A kind of parameter, over all layers."""

    name: str
    total: int
    active: int
    multiplied: bool = True  # whether a token is multiplied by it: a table is only looked up, and gains are very few


class Blueprint(NamedTuple):
    """The counts of one model."""

    name: str
    source: str
    parts: tuple[Part, ...]
    attention_width: int  # Σ over layers of H·C: products of a token's queries with the keys of one earlier token
    cached_numbers: int  # Σ over layers of 2·G·C: the numbers that the key/value cache keeps for one token
    context: int  # the T that it was made for
    window: int | None = None
    unmasked_width: int = 0  # as attention_width, for layers whose queries see the whole text, as in an encoder

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        return sum(part.active for part in self.parts)


def of_config(name: str, config: ModelConfig, source: str = "") -> Blueprint:
    """The blueprint of a config. A model with one expert is dense: it needs no router, so none is counted."""
    counts = parameters.count(config)
    working = (config.layers - config.dense_layers) * moe.experts_of(config).active_parameters(config)
    router = 0 if config.experts == 1 else counts.router
    parts = (
        Part("embedding", counts.embedding, counts.embedding, multiplied=config.tied_embeddings),
        Part("attention", counts.attention, counts.attention),
        Part("experts", counts.experts, working),
        Part("shared experts", counts.shared_experts, counts.shared_experts),
        Part("dense layers", counts.dense_layers, counts.dense_layers),
        Part("router", router, router),
        Part("norms", counts.norms, counts.norms, multiplied=False),
        Part("head", counts.head, counts.head),
    )
    return Blueprint(
        name,
        source,
        tuple(part for part in parts if part.total),
        config.layers * config.heads * config.head_width,
        config.layers * 2 * config.kv_heads * config.head_width,
        config.context,
        config.window,
    )
