"""Published models, counted from their published shapes: Mixtral, Mistral, OLMoE, Qwen3, DeepSeekMoE,
Switch, and a rumour.
"""

from __future__ import annotations

import re

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError, suggestion
from minimoe.core.presets import PRESETS
from minimoe.cost.blueprint import Blueprint, Part, of_config


def mixtral_8x22b() -> Blueprint:
    config = ModelConfig(
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
    return of_config("mixtral-8x22b", config, "Mixtral 8x22B, Mistral AI 2024, counted with a vocabulary of 32,000")


def mistral_7b() -> Blueprint:
    config = ModelConfig(
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
    return of_config("mistral-7b", config, "Mistral 7B, Jiang et al. 2023, arXiv 2310.06825")


def olmoe_1b_7b() -> Blueprint:
    """64 small experts, of which 8 are active; queries and keys are normalised too."""
    config = ModelConfig(
        vocab_size=50_304,
        width=2048,
        layers=16,
        heads=16,
        kv_heads=16,
        head_width=128,
        qk_norm="whole",
        context=4096,
        experts=64,
        active_experts=8,
        expert_width=1024,
        renormalize=False,
        noisy_gating=False,
    )
    return of_config("olmoe-1b-7b", config, "OLMoE-1B-7B, Muennighoff et al. 2024, arXiv 2409.02060")


def qwen3_30b_a3b() -> Blueprint:
    """128 experts, of which 8 are active; queries and keys are normalised in each head."""
    config = ModelConfig(
        vocab_size=151_936,
        width=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        head_width=128,
        qk_norm="per_head",
        context=40_960,
        experts=128,
        active_experts=8,
        expert_width=768,
        noisy_gating=False,
    )
    return of_config("qwen3-30b-a3b", config, "Qwen3-30B-A3B, Yang et al. 2025, arXiv 2505.09388")


def deepseek_moe_16b() -> Blueprint:
    """64 small experts, of which 6 are active, and 2 that are always active; the first of 28 layers is dense."""
    config = ModelConfig(
        vocab_size=102_400,
        width=2048,
        layers=28,
        heads=16,
        kv_heads=16,
        head_width=128,
        context=4096,
        experts=64,
        active_experts=6,
        expert_width=1408,
        shared_experts=2,
        dense_layers=1,
        dense_width=10_944,
        renormalize=False,
        noisy_gating=False,
    )
    return of_config("deepseek-moe-16b", config, "DeepSeekMoE 16B, Dai et al. 2024, arXiv 2401.06066")


def switch_base(experts: int) -> Blueprint:
    """T5-base: an encoder and a decoder of 12 layers each. Every second layer uses one of ``experts`` experts."""
    V, D, F, layers, sparse = 32_128, 768, 3072, 12, 12  # sparse: 6 layers of the encoder, 6 of the decoder
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
        attention_width=layers * D,  # the decoder's attention to its own text
        cached_numbers=2 * layers * 2 * D,
        context=512,
        unmasked_width=2 * layers * D,  # the encoder's attention, and the decoder's to the encoder
    )


def rumoured_8x220b(shared: float = 0.0) -> Blueprint:
    """The rumour of "8 × 220B" with top-2 of 8, if the fraction ``shared`` of each model is common to all eight.

    Raises:
        UserError: ``shared`` is not in [0, 1].
    """
    if not 0 <= shared <= 1:
        raise UserError(
            f"shared {shared} is not a fraction: choose a number from 0 (eight whole models) to 1 (one model)."
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
    "qwen3-30b-a3b",
    "deepseek-moe-16b",
    *(f"switch-base-{2**n}" for n in range(3, 9)),
    "rumour-8x220b",
)
"""The names that ``named`` knows, beside those of the presets."""


def named(name: str, shared: float = 0.0) -> Blueprint:
    """The blueprint of a preset or of a published model; ``shared`` is used only for the rumour.

    Raises:
        UserError: there is no model of this name (the message lists the names), or ``shared`` is not in [0, 1].
    """
    if name in PRESETS:
        source = (
            "Mixtral 8x7B, Jiang et al. 2024, arXiv 2401.04088" if name == "mixtral-8x7b" else "a preset of minimoe"
        )
        return of_config(name, PRESETS[name].config, source)
    makers = {
        "mixtral-8x22b": mixtral_8x22b,
        "mistral-7b": mistral_7b,
        "olmoe-1b-7b": olmoe_1b_7b,
        "qwen3-30b-a3b": qwen3_30b_a3b,
        "deepseek-moe-16b": deepseek_moe_16b,
    }
    if name in makers:
        return makers[name]()
    if name == "rumour-8x220b":
        return rumoured_8x220b(shared)
    switch = re.fullmatch(r"switch-base-(8|16|32|64|128|256)", name)
    if switch:
        return switch_base(int(switch[1]))
    known = [*PRESETS, *PUBLISHED]
    raise UserError(
        f"there is no model {name!r}{suggestion(name, known)}: "
        f"give the folder of a model, or one of {', '.join(known)}."
    )
