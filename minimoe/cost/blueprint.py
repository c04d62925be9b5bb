"""Blueprints: what a model is made of, counted exactly; this package's own shapes and well-known published ones.

    total      every parameter
    active     those at work for one token: K experts of E, and everything that is shared

The counts follow from the published shapes alone; ``costs`` turns them into operations and bytes.
Lesson: lessons/00_start_here.ipynb
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from minimoe import accounting, config
from minimoe.config import ModelConfig
from minimoe.errors import UserError


class Part(NamedTuple):
    """A kind of parameter, over all layers."""

    name: str
    total: int
    active: int
    multiplied: bool = True  # whether a token is multiplied by it; a table is only looked up, a gain hardly counts


class Blueprint(NamedTuple):
    """A model as accounting sees it."""

    name: str
    source: str
    parts: tuple[Part, ...]
    attention_width: int  # Σ over layers of H·C: what one query meets of one earlier token
    cached_numbers: int  # Σ over layers of 2·G·C: what the key/value cache keeps of one token
    context: int  # T it was made for
    window: int | None = None
    unmasked_width: int = 0  # as attention_width, but of layers whose queries see the whole text: an encoder's

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        return sum(part.active for part in self.parts)


def of_config(name: str, shape: ModelConfig, source: str = "") -> Blueprint:
    """The blueprint of a config. A model of one expert is dense: it needs no router, and none is counted."""
    counts = accounting.parameters(shape)
    working = counts.experts // shape.experts * shape.active_experts
    router = 0 if shape.experts == 1 else counts.router
    parts = (
        Part("embedding", counts.embedding, counts.embedding, multiplied=shape.tied_embeddings),
        Part("attention", counts.attention, counts.attention),
        Part("experts", counts.experts, working),
        Part("router", router, router),
        Part("norms", counts.norms, counts.norms, multiplied=False),
        Part("head", counts.head, counts.head),
    )
    return Blueprint(
        name,
        source,
        tuple(part for part in parts if part.total),
        shape.layers * shape.heads * shape.head_width,
        shape.layers * 2 * shape.kv_heads * shape.head_width,
        shape.context,
        shape.window,
    )


def mixtral_8x22b() -> Blueprint:
    shape = ModelConfig(
        vocab_size=32_000,
        width=6144,
        layers=56,
        heads=48,
        kv_heads=8,
        head_width=128,
        context=65_536,
        expert_width=16_384,
        noisy_gating=False,
    )
    return of_config("mixtral-8x22b", shape, "Mixtral 8x22B, Mistral AI 2024, counted with a vocabulary of 32,000")


def mistral_7b() -> Blueprint:
    shape = ModelConfig(
        vocab_size=32_000,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_width=128,
        context=8192,
        window=4096,
        experts=1,
        active_experts=1,
        expert_width=14_336,
        noisy_gating=False,
    )
    return of_config("mistral-7b", shape, "Mistral 7B, Jiang et al. 2023, arXiv 2310.06825")


def olmoe_1b_7b() -> Blueprint:
    """64 small experts, 8 at work; queries and keys are normalised too."""
    shape = ModelConfig(
        vocab_size=50_304,
        width=2048,
        layers=16,
        heads=16,
        kv_heads=16,
        head_width=128,
        context=4096,
        experts=64,
        active_experts=8,
        expert_width=1024,
        renormalize=False,
        noisy_gating=False,
    )
    plain = of_config("olmoe-1b-7b", shape, "OLMoE-1B-7B, Muennighoff et al. 2024, arXiv 2409.02060")
    query_key_norms = 2 * shape.layers * shape.width
    return plain._replace(
        parts=(*plain.parts, Part("query and key norms", query_key_norms, query_key_norms, multiplied=False))
    )


def deepseek_moe_16b() -> Blueprint:
    """64 small experts, 6 at work, beside 2 that always are; the first of 28 layers is dense."""
    V, D, L, F = 102_400, 2048, 28, 1408
    expert, attention, first = 3 * D * F, L * 4 * D * D, 3 * D * 10_944
    norms = (2 * L + 1) * D
    return Blueprint(
        "deepseek-moe-16b",
        "DeepSeekMoE 16B, Dai et al. 2024, arXiv 2401.06066",
        (
            Part("embedding", V * D, V * D, multiplied=False),
            Part("attention", attention, attention),
            Part("first feed-forward", first, first),
            Part("shared experts", (L - 1) * 2 * expert, (L - 1) * 2 * expert),
            Part("experts", (L - 1) * 64 * expert, (L - 1) * 6 * expert),
            Part("router", (L - 1) * D * 64, (L - 1) * D * 64),
            Part("norms", norms, norms, multiplied=False),
            Part("head", V * D, V * D),
        ),
        attention_width=L * D,
        cached_numbers=L * 2 * D,
        context=4096,
    )


def switch_base(experts: int) -> Blueprint:
    """T5-base, an encoder and a decoder of 12 layers, with one expert of ``experts`` in every second layer."""
    V, D, F, layers, sparse = 32_128, 768, 3072, 12, 12  # sparse: 6 of the encoder's, 6 of the decoder's
    feed_forward = 2 * D * F
    attention = layers * 4 * D * D + layers * 2 * 4 * D * D  # the decoder also attends to the encoder
    dense = (2 * layers - sparse) * feed_forward
    small = 2 * 32 * 12 + layers * 2 * D + layers * 3 * D + 2 * D  # relative positions, norms
    return Blueprint(
        f"switch-base-{experts}",
        "Switch Transformer, Fedus et al. 2021, arXiv 2101.03961",
        (
            Part("embedding and head", V * D, V * D),
            Part("attention", attention, attention),
            Part("dense feed-forward", dense, dense),
            Part("experts", sparse * experts * feed_forward, sparse * feed_forward),
            Part("router", sparse * D * experts, sparse * D * experts),
            Part("norms and positions", small, small, multiplied=False),
        ),
        attention_width=layers * D,  # the decoder's own
        cached_numbers=2 * layers * 2 * D,
        context=512,
        unmasked_width=2 * layers * D,  # the encoder's, and the decoder's of what that has read
    )


def rumoured_8x220b(shared: float = 0.0) -> Blueprint:
    """The rumour of "8 × 220B" with top-2 of 8, if the fraction ``shared`` of each model is common to all eight.

    Raises:
        UserError: ``shared`` is not in [0, 1].
    """
    if not 0 <= shared <= 1:
        raise UserError(
            f"shared {shared} is no fraction: choose a number from 0 (eight whole models) to 1 (one model)."
        )
    common = round(220e9 * shared)
    own = round(220e9) - common
    return Blueprint(
        "rumour-8x220b",
        f"a rumour, never confirmed; {shared:.2%} of each expert taken as shared",
        (Part("shared", common, common), Part("experts", 8 * own, 2 * own)),
        attention_width=0,
        cached_numbers=0,
        context=0,
    )


PUBLISHED = (
    "mixtral-8x22b",
    "mistral-7b",
    "olmoe-1b-7b",
    "deepseek-moe-16b",
    *(f"switch-base-{2**n}" for n in range(3, 9)),
    "rumour-8x220b",
)
"""Names that ``named`` knows beside those of the presets."""


def named(name: str, shared: float = 0.0) -> Blueprint:
    """A preset or a published model; ``shared`` is for the rumour alone. ``UserError`` lists the names there are."""
    if name in config.PRESETS:
        source = (
            "Mixtral 8x7B, Jiang et al. 2024, arXiv 2401.04088" if name == "mixtral-8x7b" else "a preset of minimoe"
        )
        return of_config(name, config.PRESETS[name].model, source)
    makers = {
        "mixtral-8x22b": mixtral_8x22b,
        "mistral-7b": mistral_7b,
        "olmoe-1b-7b": olmoe_1b_7b,
        "deepseek-moe-16b": deepseek_moe_16b,
    }
    if name in makers:
        return makers[name]()
    if name == "rumour-8x220b":
        return rumoured_8x220b(shared)
    switch = re.fullmatch(r"switch-base-(8|16|32|64|128|256)", name)
    if switch:
        return switch_base(int(switch[1]))
    known = [*config.PRESETS, *PUBLISHED]
    close = difflib.get_close_matches(name, known, 1)
    raise UserError(
        f"there is no model {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}: "
        f"give the folder of a model, or one of {', '.join(known)}."
    )
