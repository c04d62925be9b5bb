"""Presets: what each name stands for, and a setting changed goes to the config that has it."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minimoe.core import presets
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.presets import PRESETS
from minimoe.cost import parameters


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_had_by_name(name: str) -> None:
    chosen = presets.preset(name)
    assert chosen is PRESETS[name]
    assert chosen.doc


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UserError, match="no preset 'toi'.*did you mean 'toy'") as caught:
        presets.preset("toi")
    assert all(name in str(caught.value) for name in PRESETS)


def test_mixtral_has_the_shape_that_its_paper_gives() -> None:
    config = presets.preset("mixtral-8x7b").config
    assert (config.width, config.layers, config.heads, config.kv_heads, config.head_width) == (4096, 32, 32, 8, 128)
    assert (config.experts, config.active_experts, config.expert_width) == (8, 2, 14_336)
    assert (config.vocab_size, config.context, config.rope_theta, config.window) == (32_000, 32_768, 1e6, None)
    assert config.renormalize


def test_override_sends_each_setting_to_the_config_that_has_it() -> None:
    chosen = presets.override(presets.preset("tiny"), {"width": 64, "steps": 3})
    assert chosen.config == dataclasses.replace(PRESETS["tiny"].config, width=64)
    assert chosen.recipe == dataclasses.replace(PRESETS["tiny"].recipe, steps=3)
    with pytest.raises(UserError, match="heads 4 cannot share"):
        presets.override(presets.preset("tiny"), {"kv_heads": 3})


@pytest.mark.parametrize(
    ("name", "says"),
    [("widht", "'widht' (did you mean 'width'?)"), ("step", "'step' (did you mean 'steps'?)"), (3, "3")],
)
def test_a_setting_that_no_config_has_is_named_with_a_suggestion(name: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        presets.override(presets.preset("tiny"), {"layers": 1, name: 3})
    assert f"there is no setting {says}: give the name of a field of ModelConfig" in str(caught.value)


def test_override_takes_numbers_of_numpy() -> None:
    chosen = presets.override(presets.preset("tiny"), {"learning_rate": np.float64(0.5), "width": np.int64(32)})
    assert (chosen.recipe.learning_rate, chosen.config.width) == (0.5, 32)
    assert type(chosen.recipe.learning_rate) is float and type(chosen.config.width) is int
    with pytest.raises(UserError, match=r"width array\(.*\) is not a whole number"):
        presets.override(presets.preset("tiny"), {"width": np.array([32])})


def test_no_setting_has_the_same_name_in_both_configs() -> None:
    """Otherwise override, and an option of the command line, could mean either."""
    of_config, of_recipe = ({field.name for field in dataclasses.fields(kind)} for kind in (ModelConfig, TrainConfig))
    assert not of_config & of_recipe


def test_a_twin_of_any_mixture_differs_in_what_is_about_experts_only() -> None:
    toy = presets.preset("toy")
    twin = presets.dense_twin(toy)
    assert (twin.config.experts, twin.config.active_experts, twin.config.expert_width) == (1, 1, 128)
    assert twin.corpus == toy.corpus
    of_routers = dict.fromkeys(("balance_loss", "importance_loss", "load_loss", "z_loss"), 0.0)
    assert twin.recipe == dataclasses.replace(toy.recipe, **of_routers), "steps, warm-up, optimiser and all else stay"
    of_one = dataclasses.replace(toy, config=ModelConfig(active_experts=1, renormalize=False))
    assert presets.dense_twin(of_one).config.expert_width == 256


def test_a_dense_twin_has_no_use_for_another_router_or_a_capacity() -> None:
    toy = presets.preset("toy")
    settings = {"router": "switch", "active_experts": 1, "capacity_factor": 1.25}
    twin = presets.dense_twin(presets.override(toy, settings))
    assert twin.config.router == ModelConfig().router
    assert not twin.config.noisy_gating
    assert twin.recipe.capacity_factor is None
    same = dataclasses.replace(
        twin.config, experts=8, active_experts=2, expert_width=toy.config.expert_width, noisy_gating=True
    )
    assert same == toy.config, "and all else stays"


def test_a_dense_twin_is_as_wide_as_the_active_experts_and_the_shared_ones() -> None:
    sparse = presets.override(presets.preset("toy"), {"shared_experts": 3, "sequence_loss": 0.1})
    twin = presets.dense_twin(sparse)
    assert (twin.config.shared_experts, twin.recipe.sequence_loss) == (0, 0.0)
    assert twin.config.expert_width == 5 * sparse.config.expert_width
    router = parameters.count(sparse.config).router
    one_row = parameters.count(twin.config).router
    assert parameters.count(twin.config).active - one_row == parameters.count(sparse.config).active - router


def test_a_dense_model_has_no_twin() -> None:
    with pytest.raises(UserError, match="dense already"):
        presets.dense_twin(presets.dense_twin(presets.preset("toy")))


def test_a_dense_twin_computes_with_its_only_expert() -> None:
    settings = {"expert_kind": "zero_computation"}
    assert presets.dense_twin(presets.override(presets.preset("toy"), settings)).config.expert_kind == "swiglu"
