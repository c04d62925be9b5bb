"""config.json and generation_config.json: what both say is read, and a setting that would change results is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.storage import huggingface_config


def folder_of(path: Path, small: ModelConfig, **changes: Any) -> Path:
    """A folder with nothing in it but the description of a small model without noise."""
    path.mkdir()
    values = huggingface_config.to_dict(dataclasses.replace(small, noisy_gating=False, **changes))
    (path / "config.json").write_text(json.dumps(values))
    return path


def reconfigure(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; ... leaves one out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(("ids", "written"), [((2, 7), [2, 7]), ((2,), 2), ((), None)])
def test_every_token_that_ends_a_text_is_written(ids: tuple[int, ...], written: Any) -> None:
    assert huggingface_config.to_dict(ModelConfig(), ids)["eos_token_id"] == written


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": None},
        {"rope_theta": 77, "rope_scaling": {"type": "default"}},
        {"rope_theta": 77.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 77.0}},
    ],
)
def test_older_and_newer_settings_of_rope_are_read(tmp_path: Path, small: ModelConfig, settings: Any) -> None:
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, **settings)
    assert huggingface_config.read(folder).config.rope_theta == 77.0


def test_what_a_config_leaves_out_is_filled_in(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small)
    optional = ("rope_theta", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "hidden_act", "architectures")
    reconfigure(folder, **dict.fromkeys(optional, ...))
    config = huggingface_config.read(folder).config
    assert (config.rope_theta, config.norm_eps, config.window, config.tied_embeddings) == (1e6, 1e-5, None, False)
    reconfigure(folder, model_type="mistral")
    config = huggingface_config.read(folder).config
    assert (config.rope_theta, config.norm_eps, config.window, config.experts) == (1e4, 1e-6, 4096, 1)
    reconfigure(folder, num_key_value_heads=None, head_dim=None, hidden_size=24)
    config = huggingface_config.read(folder).config
    assert (config.kv_heads, config.head_width) == (4, 6)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (2, (2,)), ([3, 2], (3, 2))])
def test_tokens_that_end_a_text_are_known(tmp_path: Path, small: ModelConfig, value: Any, ids: Any) -> None:
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, eos_token_id=value)
    assert huggingface_config.read(folder).end_tokens == ids


@pytest.mark.parametrize(
    ("value", "generation", "ids"),
    [
        (7, {"eos_token_id": [7, 3]}, (7, 3)),
        (2, {"eos_token_id": 5}, (2, 5)),
        (None, {"eos_token_id": 3}, (3,)),
        ([4, 2], {"eos_token_id": None, "temperature": 0.6}, (4, 2)),
        (2, {}, (2,)),
    ],
)
def test_tokens_that_end_a_text_may_stand_in_both_files(
    tmp_path: Path, small: ModelConfig, value: Any, generation: Any, ids: Any
) -> None:
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, eos_token_id=value)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert huggingface_config.read(folder).end_tokens == ids


@pytest.mark.parametrize("content", ["", "[7]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_damaged_settings_of_generation_are_refused(tmp_path: Path, small: ModelConfig, content: str) -> None:
    folder = folder_of(tmp_path / "saved", small)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        huggingface_config.read(folder)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "llama"}, "model_type 'llama'"),
    "no architecture": ({"model_type": ...}, "model_type None"),
    "an architecture that is a list": ({"model_type": []}, "model_type"),
    "another task": ({"architectures": ["MixtralForSequenceClassification"]}, "architectures .*Classification"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "scaled RoPE, older": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling .*'linear'"),
    "scaled RoPE, newer": ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_parameters .*'yarn'"),
    "RoPE of a part": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "RoPE by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "RoPE that is a number": ({"rope_parameters": 3}, "rope_parameters 3"),
    "a missing size": ({"hidden_size": ...}, "hidden_size is missing"),
    "a missing number of experts": ({"num_local_experts": ...}, "num_local_experts is missing"),
    "a size in words": ({"intermediate_size": "3"}, "intermediate_size '3'"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads 0"),
    "heads that cannot be shared": ({"num_key_value_heads": 3}, "heads 4 .* kv_heads 3"),
    "no key heads": ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
    "fewer key heads than none": ({"num_key_value_heads": -2}, "num_key_value_heads -2"),
    "heads without width": ({"head_dim": 0}, "head_width 0"),
    "an end in words": ({"eos_token_id": "</s>"}, "eos_token_id '</s>'"),
    "θ in words": ({"rope_theta": "big"}, "rope_theta 'big'"),
    "tied perhaps": ({"tie_word_embeddings": 1}, "tie_word_embeddings 1"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_make_no_sense_are_named(tmp_path: Path, small: ModelConfig, case: str) -> None:
    settings, words = SETTINGS[case]
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, **settings)
    with pytest.raises(UserError, match=words) as error:
        huggingface_config.read(folder)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


FOREIGN: dict[str, tuple[Any, Any]] = {  # a value that changes results, and one that does not (... for none)
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "use_qk_norm": (True, False),
    "partial_rotary_factor": (0.5, 1.0),
    "final_logit_softcapping": (30.0, None),
    "attn_logit_softcapping": (50.0, 0),
    "layer_types": (["sliding_attention", "full_attention"], ["full_attention", "full_attention"]),
    "use_sliding_window": (3, False),
    "norm_topk_prob": (False, True),
    "is_causal": (False, True),
    "logit_scale": (0.0625, 1),
    "residual_multiplier": (True, 1.0),
    "n_shared_experts": (1, 0),
    "scoring_func": ("sigmoid", "softmax"),
    "hidden_activation": ("gelu", "silu"),
    "query_pre_attn_scalar": (256, 8),
    "num_experts": (4, 5),
    "pretraining_tp": (2, 1),
    "quantization": ({"bits": 4}, {}),
    "a_setting_of_tomorrow": (0.5, None),
    "unsloth_version": (..., "2024.9"),
    "router_jitter_noise": (..., 0.1),
    "attention_dropout": (..., 0.1),
    "_name_or_path": (..., "somewhere/else"),
    "torch_dtype": (..., "bfloat16"),
    "use_cache": (..., True),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_setting_that_changes_results_is_refused_and_no_other(tmp_path: Path, small: ModelConfig, name: str) -> None:
    changes, harmless = FOREIGN[name]
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, **{name: harmless})
    assert huggingface_config.read(folder).config.width == small.width
    if changes is not ...:
        reconfigure(folder, **{name: changes})
        with pytest.raises(UserError, match=f"{name} .* is not supported") as error:
            huggingface_config.read(folder)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_window_in_every_layer_is_no_setting_of_its_own(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small, window=3)
    reconfigure(folder, layer_types=["sliding_attention"] * 2, use_sliding_window=True, max_window_layers=0)
    assert huggingface_config.read(folder).config.window == 3
    for changes in ({"layer_types": ["full_attention"] * 2}, {"use_sliding_window": False}, {"max_window_layers": 2}):
        reconfigure(folder, **changes)
        with pytest.raises(UserError, match=f"{next(iter(changes))} .* is not supported"):
            huggingface_config.read(folder)
        reconfigure(folder, **dict.fromkeys(changes, ...))


@pytest.mark.parametrize("layers", [0, 2, 28])
def test_without_a_window_no_layer_has_one(tmp_path: Path, small: ModelConfig, layers: int) -> None:
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, use_sliding_window=False, max_window_layers=layers)
    assert huggingface_config.read(folder).config.window is None


@pytest.mark.parametrize("content", ["", "{", "3", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, small: ModelConfig, content: str) -> None:
    folder = folder_of(tmp_path / "saved", small)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        huggingface_config.read(folder)
