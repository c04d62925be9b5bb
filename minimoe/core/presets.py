"""Presets: named combinations of a model, a recipe and a corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError, suggestion


@dataclass(frozen=True)
class Preset:
    """A model, a recipe and the corpus they are meant for."""

    doc: str
    config: ModelConfig
    recipe: TrainConfig
    corpus: str = "data"


PRESETS: dict[str, Preset] = {
    "toy": Preset(
        "a small Mixtral that learns the texts of data/ in a minute or two",
        ModelConfig(expert_width=64),  # with wider experts, on so little text, a dense model would do as well
        TrainConfig(steps=500, learning_rate=6e-3, warmup=50, weight_decay=0.5, evaluate_every=50),
    ),
    "tiny": Preset(
        "trains in seconds on any machine, for lessons and tests",
        ModelConfig(width=32, layers=2, heads=4, kv_heads=2, head_width=8, context=32, experts=4, expert_width=32),
        TrainConfig(steps=50, batch=8, warmup=5, evaluate_every=25, save_every=25),
        corpus="fables",
    ),
    "nanogpt-cpu": Preset(
        "nanoGPT's CPU recipe: 2000 steps of 12 × 64 tokens of tiny Shakespeare, at most 0.85M active parameters",
        ModelConfig(context=64, experts=4, expert_width=96),
        TrainConfig(steps=2000, batch=12, learning_rate=0.01, warmup=50, schedule="linear", evaluate_every=500),
        corpus="shakespeare",
    ),
    "makemoe": Preset(
        "makeMoE's budget: 5000 steps of 16 × 32 tokens of tiny Shakespeare, at most 2.67M active parameters",
        ModelConfig(context=32, active_experts=4, expert_width=192),
        TrainConfig(steps=5000, batch=16, learning_rate=0.01, warmup=50, schedule="linear", evaluate_every=500),
        corpus="shakespeare",
    ),
    "shakespeare-fast": Preset(
        "the shortest time to a validation loss of 1.744 on tiny Shakespeare",
        ModelConfig(context=64, experts=4, expert_width=96),
        TrainConfig(
            steps=470, batch=12, learning_rate=0.01, warmup=20, momentum=0.85, schedule="linear", evaluate_every=50
        ),
        corpus="shakespeare",
    ),
    "mixtral-8x7b": Preset(
        "Mixtral 8x7B's shape, for counting only: 46.7 billion parameters cannot be trained on a laptop",
        ModelConfig(
            vocab_size=32_000,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_width=128,
            context=32_768,
            expert_width=14_336,
            noisy_gating=False,
            rope_theta=1e6,
        ),
        TrainConfig(),
    ),
}

SFT_RECIPE: dict[str, Any] = {
    "steps": 800,
    "batch": 8,
    "learning_rate": 6e-3,
    "warmup": 20,
    "weight_decay": 0.1,
    "evaluate_every": 100,
    "save_every": 100,
}
"""How a run that learns to answer instructions changes the recipe of the run that it begins with."""

SFT_PATIENCE = 4
"""A run that learns to answer stops after this many evaluations in a row without a new lowest loss."""

DPO_RECIPE: dict[str, Any] = {
    "steps": 60,
    "batch": 32,
    "learning_rate": 5e-5,
    "warmup": 5,
    "weight_decay": 0.0,
    "balance_loss": 0.0,
    "importance_loss": 0.0,
    "load_loss": 0.0,
    "z_loss": 0.0,
    "sequence_loss": 0.0,
    "capacity_factor": None,
    "evaluate_every": 20,
    "save_every": 20,
}
"""How a run that learns preferences changes the recipe of the run that it begins with.

A batch of 32 sequences is 16 pairs of answers."""

DPO_PATIENCE = 4
"""A run that learns preferences stops after this many evaluations in a row without a new lowest loss."""


def preset(name: str) -> Preset:
    """The preset called ``name``; raises ``UserError``, which lists all names, if there is none."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}{suggestion(name, PRESETS)}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def override(chosen: Preset, settings: Mapping[str, Any]) -> Preset:
    """``chosen`` with new values for some fields of its config and of its recipe.

    Raises:
        UserError: a name is a field of neither config nor recipe, or a value is invalid.
    """
    of_model = {field.name for field in dataclasses.fields(ModelConfig)}
    known = [*of_model, *(field.name for field in dataclasses.fields(TrainConfig))]
    for name in settings:
        if name not in known:
            raise UserError(
                f"there is no setting {name!r:.40}{suggestion(str(name), known)}: give the name of a field of "
                "ModelConfig or of TrainConfig."
            )
    return dataclasses.replace(
        chosen,
        config=dataclasses.replace(chosen.config, **{k: v for k, v in settings.items() if k in of_model}),
        recipe=dataclasses.replace(chosen.recipe, **{k: v for k, v in settings.items() if k not in of_model}),
    )


def dense_twin(sparse: Preset) -> Preset:
    """A dense model with as many active parameters as ``sparse``, and its recipe. Its one expert is as wide as all
    active experts of ``sparse`` together.

    The active experts are the K experts that a token is sent to and the S shared ones. The only difference is the
    router, which a dense model does not need. Corpus, steps, batch and optimiser stay the same; everything about
    routers (noise, auxiliary losses, capacity) is turned off.

    Raises:
        UserError: the model is already dense, or its twin would be wider than a model may be.
    """
    config = sparse.config
    if config.experts == 1:
        raise UserError("a model with one expert is dense already: choose a model with more experts.")
    return dataclasses.replace(
        sparse,
        config=dataclasses.replace(
            config,
            router=ModelConfig.router,
            expert_kind=ModelConfig.expert_kind,
            experts=1,
            active_experts=1,
            expert_width=(config.active_experts + config.shared_experts) * config.expert_width,
            shared_experts=0,
            noisy_gating=False,
        ),
        recipe=dataclasses.replace(
            sparse.recipe,
            balance_loss=0.0,
            importance_loss=0.0,
            load_loss=0.0,
            z_loss=0.0,
            sequence_loss=0.0,
            capacity_factor=None,
        ),
    )
