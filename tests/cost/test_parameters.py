"""Accounting: the numbers that were published, and the numbers that are really in memory."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import resources
from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.cost import memory, parameters
from minimoe.layers import decoder
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer


def test_mixtral_8x7b_has_the_parameters_it_was_published_with() -> None:
    counts = parameters.count(presets.preset("mixtral-8x7b").config)
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248
    assert counts.attention == 32 * 41_943_040
    assert counts.experts == 32 * 8 * 176_160_768
    assert counts.router == 32 * 32_768
    assert counts.norms == 32 * 8_192 + 4_096
    assert counts.embedding == counts.head == 131_072_000
    assert counts.noise == 0
    assert counts.experts / counts.total == pytest.approx(0.9656, abs=5e-5)


def test_mixtral_8x22b_has_the_parameters_it_was_published_with() -> None:
    shape = {"width": 6144, "layers": 56, "heads": 48, "expert_width": 16_384}
    counts = parameters.count(presets.override(presets.preset("mixtral-8x7b"), shape).model)
    assert (counts.total, counts.active) == (140_620_634_112, 39_152_031_744)


SHAPES = st.builds(
    lambda groups, kv_heads, half_width, experts, share, **sizes: ModelConfig(
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        head_width=2 * half_width,
        experts=experts,
        active_experts=max(1, round(share * experts)),
        renormalize=False,
        **sizes,
    ),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    half_width=st.integers(1, 3),
    experts=st.integers(1, 5),
    share=st.floats(0, 1),
    vocab_size=st.integers(1, 9),
    width=st.integers(1, 9),
    layers=st.integers(1, 3),
    expert_width=st.integers(1, 9),
    noisy_gating=st.booleans(),
    tied_embeddings=st.booleans(),
)


@given(SHAPES)
def test_the_counts_are_those_of_a_real_decoder(shape: ModelConfig) -> None:
    params = decoder.init(np.random.default_rng(0), shape)
    counts = parameters.count(shape)
    assert counts.total + counts.noise == tree.size(params)
    assert counts.embedding == tree.size(params.embedding)
    assert counts.attention == sum(tree.size(layer.attention) for layer in params.blocks)
    assert counts.experts == sum(tree.size(layer.moe.experts) for layer in params.blocks)
    assert counts.router == sum(layer.moe.router.w_gate.size for layer in params.blocks)
    assert counts.norms == sum(leaf.size for name, leaf in tree.named_leaves(params) if name.endswith("gain"))
    assert counts.head == tree.size(params.head)
    assert counts.noise == sum(tree.size(layer.moe.router.w_noise) for layer in params.blocks)
    idle = counts.experts * (shape.experts - shape.active_experts) // shape.experts
    assert counts.active == counts.total - idle


RECIPES = [
    {},
    {"optimizer": "adamw"},
    {"dtype": "float64", "noisy_gating": False},
    {"tied_embeddings": True, "active_experts": 4, "experts": 4},
    {"context": 16, "batch": 6, "accumulate": 3},
]


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings))
def test_training_takes_the_bytes_that_are_foretold(settings: dict[str, Any]) -> None:
    chosen = presets.override(presets.preset("tiny"), settings)
    params = decoder.init(np.random.default_rng(0), chosen.config, chosen.recipe.dtype)
    state = list(optimizer.init(params, chosen.recipe).values())
    weights, moments = (sum(leaf.nbytes for leaf in tree.leaves(part)) for part in (params, state))
    assert memory.training_bytes(chosen.config, chosen.recipe) == 2 * weights + moments
    assert memory.training_bytes(chosen.config, chosen.recipe, threads=4) == 9 * weights + moments


def test_where_rows_travel_there_is_one_gradient_of_the_experts() -> None:
    toy = presets.override(presets.preset("toy"), {"experts": 128, "optimizer": "adamw"})
    counts = parameters.count(toy.config)
    every = counts.total + counts.noise
    bytes_of_two = 4 * (3 * every + 4 * (every - counts.experts) + counts.experts)
    assert memory.training_bytes(toy.config, toy.recipe, threads=2) == bytes_of_two


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings))
def test_what_forward_leaves_for_backward_is_foretold_from_below(settings: dict[str, Any]) -> None:
    chosen = presets.override(presets.preset("tiny"), settings)
    model, recipe = chosen.config, chosen.recipe
    rng = np.random.default_rng(0)
    params = decoder.init(rng, model, recipe.dtype)
    shape = recipe.batch // recipe.accumulate, model.context
    noise = rng.standard_normal((model.layers, *shape, model.experts)).astype(recipe.dtype)
    tokens = np.zeros(shape, np.int32)
    forward = objective.forward(params, Shard(tokens, tokens, noise), model, Objective())
    held = sum(array.nbytes for array in buffers(forward.caches) if array.dtype == np.dtype(recipe.dtype))
    foretold = memory.activation_bytes(model, recipe)
    assert foretold <= held < 2 * foretold


def buffers(cache: Any) -> list[np.ndarray]:
    """Every block of memory behind the arrays of a cache, once."""
    found: dict[int, np.ndarray] = {}

    def walk(part: Any) -> None:
        if isinstance(part, np.ndarray):
            while isinstance(part.base, np.ndarray):
                part = part.base
            found[id(part)] = part
        elif isinstance(part, tuple | list):
            for branch in part:
                walk(branch)

    walk(cache)
    return list(found.values())


def test_a_model_or_a_step_that_cannot_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = presets.preset("toy")
    monkeypatch.setattr(resources, "memory_bytes", lambda: 16 * 10**9)
    memory.check_memory(toy.config, toy.recipe, threads=8)
    mixtral = presets.preset("mixtral-8x7b").config
    state = memory.training_bytes(mixtral, TrainConfig()) / 1e9
    with pytest.raises(UserError, match=rf"46,702,792,704 parameters needs {state:.1f} GB .*this machine has 16.0 GB"):
        memory.check_memory(mixtral, TrainConfig())
    assert state > 46.7 * 4 * 3
    large = presets.override(toy, {"batch": 4096})
    with pytest.raises(UserError, match="for a step of 524,288 tokens.* choose a smaller .*batch"):
        memory.check_memory(large.model, large.train)
    memory.check_memory(large.model, presets.override(large, {"accumulate": 256}).recipe)


def test_a_machine_that_does_not_tell_its_memory_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_bytes", lambda: None)
    memory.check_memory(presets.preset("mixtral-8x7b").config, TrainConfig())
