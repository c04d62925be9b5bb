"""Which settings each router is tried with, wherever all routers are held to the same rules.

A router that needs no settings of its own is tried with the defaults; it need not be named here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minimoe.core.config import ModelConfig
from minimoe.layers import moe

SMALL = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=7, experts=4, expert_width=5
)

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "noisy_top_k": [{}, {"renormalize": False}],
    "switch": [{"active_experts": 1}],
    "gshard": [{}, {"second_expert": "sampling"}, {"second_expert": "all"}],
    "expert_choice": [{}, {"active_experts": 1}],
    "expert_threshold": [{}, {"active_experts": 1}],
    "sigmoid_bias": [
        {},
        {"routed_scale": 2.5, "experts": 6, "expert_groups": 3, "active_groups": 2, "shared_experts": 1},
    ],
    "token_hash": [{}, {"hash_gate": True}],
    "cosine": [{}, {"cosine_form": "x-moe"}],
    "remoe": [{}, {"active_experts": 1}],
}


def config_of(router: str, settings: dict[str, Any], base: ModelConfig = SMALL) -> ModelConfig:
    return dataclasses.replace(base, router=router, **settings)


CONFIGS = {
    f"{router}, {', '.join(f'{name} {value}' for name, value in settings.items()) or 'as it is'}": config_of(
        router, settings
    )
    for router in moe.ROUTERS
    for of_router in [SETTINGS.get(router, [{}])]
    for settings in [*of_router, {**of_router[-1], "expert_kind": "zero_computation"}]
}
"""A small config for each router and each of its settings, and one with experts that compute nothing, by name."""
