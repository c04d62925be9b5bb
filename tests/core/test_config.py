"""Settings: what makes no sense is refused, in a sentence that says what to do."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from minimoe.core import config
from minimoe.core.config import ModelConfig, TrainConfig, from_dict
from minimoe.core.errors import UserError


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (ModelConfig, {"heads": 6, "kv_heads": 4}, "heads 6 cannot share kv_heads 4"),
        (ModelConfig, {"head_width": 5}, "head_width 5 is odd"),
        (ModelConfig, {"experts": 2, "active_experts": 3}, "active_experts 3 is more than experts 2"),
        (ModelConfig, {"experts": 0}, "experts 0 is too small: it must be at least 1"),
        (ModelConfig, {"layers": 0}, "layers 0 is too small"),
        (ModelConfig, {"width": 2**21}, "width 2097152 is too large"),
        (ModelConfig, {"window": 0}, "window 0 is too small"),
        (ModelConfig, {"width": 12.0}, "width 12.0 is not a whole number"),
        (ModelConfig, {"width": True}, "width True is not a whole number"),
        (ModelConfig, {"width": "12"}, "width '12' is not a whole number"),
        (ModelConfig, {"width": None}, "width None is not a whole number"),
        (ModelConfig, {"renormalize": 1}, "renormalize 1 is not true or false"),
        (ModelConfig, {"rope_theta": float("nan")}, "rope_theta nan is not a finite number"),
        (ModelConfig, {"norm_eps": float("inf")}, "norm_eps inf is not a finite number"),
        (ModelConfig, {"norm_eps": -1e-9}, "norm_eps -1e-09 is too small"),
        (ModelConfig, {"norm_eps": 3e38}, "norm_eps 3e+38 is too large: it must be at most 1"),
        (TrainConfig, {"batch": 16, "accumulate": 3}, "batch 16 cannot be divided into accumulate 3"),
        (TrainConfig, {"optimizer": "sgd"}, "optimizer 'sgd' is unknown: choose one of muon, adamw"),
        (TrainConfig, {"dtype": "float16"}, "dtype 'float16' is unknown: choose one of float32, float64"),
        (TrainConfig, {"learning_rate": -1}, "learning_rate -1.0 is too small"),
        (TrainConfig, {"beta2": 1.0}, "beta2 1.0 is too large"),
        (TrainConfig, {"capacity_factor": 0}, "capacity_factor 0.0 is too small"),
        (TrainConfig, {"balance_loss": "much"}, "balance_loss 'much' is not a number"),
        (TrainConfig, {"steps": -1}, "steps -1 is too small"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(kind: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**settings)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_whole_number_will_do_for_a_number() -> None:
    settings = TrainConfig(clip=1, capacity_factor=2)
    assert type(settings.clip) is float
    assert type(settings.capacity_factor) is float
    assert settings == TrainConfig(clip=1.0, capacity_factor=2.0)


def test_none_is_for_optional_settings_only() -> None:
    assert ModelConfig(window=None).window is None
    assert config.field_types(ModelConfig)["window"] == (int, True)
    assert config.field_types(ModelConfig)["width"] == (int, False)
    assert config.field_types(TrainConfig)["capacity_factor"] == (float, True)


def test_a_config_cannot_be_changed_behind_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().width = 3  # type: ignore[misc]
    with pytest.raises(UserError):
        dataclasses.replace(ModelConfig(), kv_heads=3)


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig])
def test_a_config_survives_the_way_through_plain_values(kind: Any) -> None:
    assert from_dict(kind, dataclasses.asdict(kind())) == kind()


def test_an_unknown_setting_is_refused_with_the_name_that_was_meant() -> None:
    with pytest.raises(UserError, match=r"config\.json has a setting 'expert' .*did you mean 'experts'\?"):
        from_dict(ModelConfig, {"expert": 4}, "config.json")
    with pytest.raises(UserError, match=r"'zzz' that TrainConfig does not know\."):
        from_dict(TrainConfig, {"zzz": 4})


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig])
def test_every_setting_says_what_it_is(kind: Any) -> None:
    assert [field.name for field in dataclasses.fields(kind) if not field.metadata["doc"]] == []


def test_numbers_of_numpy_are_numbers() -> None:
    recipe, config = TrainConfig(learning_rate=np.float64(0.5)), ModelConfig(width=np.int64(32))
    assert (recipe.learning_rate, config.width) == (0.5, 32)
    assert type(recipe.learning_rate) is float and type(config.width) is int
    with pytest.raises(UserError, match=r"width array\(.*\) is not a whole number"):
        ModelConfig(width=np.array([32]))


def test_dense_layers_leave_a_mixture_and_have_a_width() -> None:
    config = ModelConfig(layers=3, dense_layers=2, active_experts=3, shared_experts=2, expert_width=10)
    assert (config.width_of_dense, dataclasses.replace(config, dense_width=7).width_of_dense) == (50, 7)
    with pytest.raises(UserError, match="dense_layers 3 leave none of the layers 3 for a mixture"):
        dataclasses.replace(config, dense_layers=3)
    with pytest.raises(UserError, match=r"are 3,145,728 wide together.*: give a dense_width"):
        ModelConfig(dense_layers=1, active_experts=3, expert_width=2**20)
    wide = ModelConfig(dense_layers=1, active_experts=3, expert_width=2**20, dense_width=9)
    assert (wide.width_of_dense, ModelConfig(active_experts=3, expert_width=2**20).dense_layers) == (9, 0)
