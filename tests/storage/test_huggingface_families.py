"""Each family's names for its settings: what is written is read again, and what a family cannot be is refused."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.storage import huggingface_config
from minimoe.storage import huggingface_families as families

SMALL = ModelConfig(
    vocab_size=13,
    width=24,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=6,
    context=7,
    experts=5,
    active_experts=2,
    expert_width=3,
    noisy_gating=False,
)
MADE: dict[str, dict[str, Any]] = {
    "mixtral": {"window": 3},
    "mistral": {"experts": 1, "active_experts": 1, "window": 3},
    "olmoe": {"qk_norm": "whole", "renormalize": False},
    "qwen3_moe": {"qk_norm": "per_head", "head_width": 8, "dense_layers": 2, "dense_width": 11, "window": 4},
    "deepseek": {"renormalize": False, "shared_experts": 2, "dense_layers": 1, "dense_width": 11},
}


def made(model_type: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **{**MADE[model_type], **changes})


def written(family: str, /, **changes: Any) -> dict[str, Any]:
    """The values of a config.json of this family."""
    values = huggingface_config.to_dict(made(family))
    assert values["model_type"] == family
    kept = {**values, **changes}
    return {name: value for name, value in kept.items() if value is not ...}


def read(values: dict[str, Any]) -> ModelConfig:
    return huggingface_config._describe(values)[0]


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_what_is_written_is_read(model_type: str) -> None:
    assert set(MADE) == set(families.FAMILIES)
    assert read(written(model_type)) == made(model_type)
    assert written(model_type)["architectures"] == [families.FAMILIES[model_type].architecture]


settings = st.fixed_dictionaries(
    {
        "qk_norm": st.sampled_from(["none", "whole", "per_head"]),
        "experts": st.integers(1, 3),
        "active": st.integers(1, 3),
        "renormalize": st.booleans(),
        "shared_experts": st.integers(0, 2),
        "dense_layers": st.integers(0, 2),
        "dense_width": st.none() | st.integers(1, 9),
        "head_width": st.sampled_from([6, 8]),
        "window": st.none() | st.integers(1, 5),
        "router": st.sampled_from(["noisy_top_k", "gshard", "switch"]),
        "tied_embeddings": st.booleans(),
    }
)


@given(settings)
def test_a_model_is_refused_or_comes_back_as_it_was(settings: dict[str, Any]) -> None:
    """What may differ: the router's name, the weights of a single expert, and widths that nothing has."""
    active = min(settings.pop("active"), settings["experts"])
    config = dataclasses.replace(SMALL, **settings, active_experts=active)
    try:
        values = huggingface_config.to_dict(config)
    except UserError as error:
        assert "cannot be written as" in str(error)
        assert str(error).endswith(": keep it as a run.")
        return
    back = read(values)
    assert families.renormalizes(back) == families.renormalizes(config)
    assert back.width_of_dense == config.width_of_dense or not config.dense_layers
    same = dict(router=back.router, renormalize=back.renormalize, dense_width=back.dense_width)
    assert dataclasses.replace(config, **same) == back


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"qk_norm": "whole", "window": 5}, "window 5 cannot be written as an OLMoE, which has none"),
    "wide heads": ({"qk_norm": "whole", "head_width": 8}, r"head_width 8 .* OLMoE, .* wide \(24 / 4\)"),
    "shared": ({"qk_norm": "whole", "shared_experts": 1}, "shared_experts 1 cannot be written as an OLMoE"),
    "dense": ({"qk_norm": "whole", "dense_layers": 1}, "dense_layers 1 cannot be written as an OLMoE"),
    "shared, Qwen3": ({"qk_norm": "per_head", "shared_experts": 1}, "shared_experts 1 .* as a Qwen3-MoE"),
    "window, DeepSeek": ({"shared_experts": 1, "window": 5}, "window 5 cannot be written as a DeepSeekMoE"),
    "wide, DeepSeek": ({"dense_layers": 1, "head_width": 8}, "head_width 8 cannot be written as a DeepSeekMoE"),
    "single weight": ({"shared_experts": 1, "active_experts": 1}, "renormalize on and active_experts 1 .* DeepSeekMoE"),
    "router": ({"router": "switch", "active_experts": 1}, "router 'switch' cannot be written as a Mixtral"),
    "experts": ({"expert_kind": "zero_computation"}, "expert_kind 'zero_computation' .* as a Mixtral"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_cannot_be_is_refused_in_a_sentence(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        huggingface_config.to_dict(dataclasses.replace(SMALL, **changes))


READ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "the older name of OLMoE's experts": ("olmoe", {"num_experts": 5}, {}),
    "the newer name": ("qwen3_moe", {"num_experts": ..., "num_local_experts": 5}, {}),
    "both names": ("olmoe", {"num_local_experts": 5}, {}),
    "weights renormalised": ("olmoe", {"norm_topk_prob": True}, {"renormalize": True}),
    "weights renormalised by nobody": ("qwen3_moe", {"norm_topk_prob": ...}, {"renormalize": False}),
    "no dense layer": ("qwen3_moe", {"mlp_only_layers": []}, {"dense_layers": 0, "dense_width": None}),
    "dense layers unnamed": ("qwen3_moe", {"mlp_only_layers": None}, {"dense_layers": 0, "dense_width": None}),
    "a window that is switched off": ("qwen3_moe", {"use_sliding_window": False}, {"window": None}),
    "no window": ("qwen3_moe", {"use_sliding_window": ..., "max_window_layers": 48}, {"window": None}),
    "narrow heads by themselves": ("qwen3_moe", {"head_dim": ...}, {"head_width": 6}),
    "no shared expert": ("deepseek", {"n_shared_experts": None}, {"shared_experts": 0}),
    "no dense layer, DeepSeek": ("deepseek", {"first_k_dense_replace": 0}, {"dense_layers": 0, "dense_width": None}),
    "renormalised": ("deepseek", {"norm_topk_prob": True}, {"renormalize": True}),
    "a single weight is left as it is": (
        "deepseek",
        {"norm_topk_prob": True, "num_experts_per_tok": 1},
        {"active_experts": 1},
    ),
    "what only its training uses": (
        "deepseek",
        {"auto_map": {"AutoConfig": "x"}, "seq_aux": True, "aux_loss_alpha": 0.001, "pretraining_tp": 1},
        {},
    ),
    "no clipping": ("olmoe", {"clip_qkv": None, "attention_bias": False}, {}),
    "an epsilon of its own": ("olmoe", {"rms_norm_eps": ..., "rope_theta": ...}, {"norm_eps": 1e-5, "rope_theta": 1e4}),
    "another": ("deepseek", {"rms_norm_eps": ..., "rope_theta": ...}, {"norm_eps": 1e-6, "rope_theta": 1e4}),
}


@pytest.mark.parametrize("case", READ)
def test_settings_are_read_as_the_family_means_them(case: str) -> None:
    model_type, changes, expected = READ[case]
    assert read(written(model_type, **changes)) == made(model_type, **expected)


FOREIGN: dict[str, tuple[str, dict[str, Any], str]] = {
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
    "a window": ("olmoe", {"sliding_window": 4}, "sliding_window 4 is not supported, because an OLMoE has none"),
    "wide heads": ("olmoe", {"head_dim": 8}, "head_dim 8 is not supported, because every head of an OLMoE .* 6"),
    "shared": ("olmoe", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
    "two counts": ("olmoe", {"num_local_experts": 4}, "num_experts 5 and num_local_experts 4 contradict each other"),
    "no count": ("olmoe", {"num_experts": ...}, "num_experts is missing"),
    "a number as a truth": ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob 1 is not true or false"),
    "biases": ("qwen3_moe", {"attention_bias": True}, "attention_bias True is not supported"),
    "every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
    "a later layer": ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] .* only the first layers"),
    "out of order": ("qwen3_moe", {"mlp_only_layers": [1, 0]}, r"mlp_only_layers \[1, 0\] .* only the first layers"),
    "layers that are truths": ("qwen3_moe", {"mlp_only_layers": [False]}, "mlp_only_layers"),
    "layers in words": ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers '0'"),
    "all layers": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "dense_layers 3 leave none of the layers 3"),
    "a window in some layers": ("qwen3_moe", {"max_window_layers": 2}, "max_window_layers 2 is not supported"),
    "no width of experts": ("qwen3_moe", {"moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
    "no width of the dense layers": ("qwen3_moe", {"intermediate_size": ...}, "intermediate_size is missing"),
    "every second layer, DeepSeek": ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
    "sigmoids": ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
    "scaled": ("deepseek", {"routed_scaling_factor": 2.5}, "routed_scaling_factor 2.5 is not supported"),
    "compressed keys": ("deepseek", {"kv_lora_rank": 512}, "kv_lora_rank 512 is not supported"),
    "groups": ("deepseek", {"n_group": 8}, "n_group 8 is not supported"),
    "half an expert": ("deepseek", {"n_shared_experts": 0.5}, "n_shared_experts 0.5 is not a whole number"),
    "code of its own": ("olmoe", {"auto_map": {"AutoConfig": "x"}}, "auto_map .* is not supported"),
    "another's name": ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob False is not supported"),
    "DeepSeek-V2": (
        "deepseek",
        {"model_type": "deepseek_v2"},
        "model_type 'deepseek_v2' is not supported",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_setting_that_is_not_supported_is_named(case: str) -> None:
    model_type, changes, words = FOREIGN[case]
    with pytest.raises(UserError, match=words) as error:
        read(written(model_type, **changes))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_the_family_follows_from_the_settings() -> None:
    assert families.model_type_of(SMALL) == "mixtral"
    assert families.model_type_of(dataclasses.replace(SMALL, renormalize=False)) == "deepseek"
    assert families.model_type_of(dataclasses.replace(SMALL, router="gshard", renormalize=False)) == "mixtral"
    one = dataclasses.replace(SMALL, experts=1, active_experts=1)
    assert families.model_type_of(one) == "mistral"
    assert families.model_type_of(dataclasses.replace(one, shared_experts=1)) == "deepseek"
    assert families.model_type_of(dataclasses.replace(one, qk_norm="whole")) == "olmoe"


def test_shared_experts_have_no_place_in_a_mixtral() -> None:
    assert families.model_type_of(dataclasses.replace(SMALL, shared_experts=2)) == "deepseek"
    assert written("deepseek")["n_shared_experts"] == 2
