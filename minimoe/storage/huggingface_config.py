"""The config.json and generation_config.json of a Hugging Face folder, and minimoe's names for their fields.

    hidden_size            width            num_local_experts       experts
    intermediate_size      expert_width     num_experts_per_tok     active_experts
    num_hidden_layers      layers           max_position_embeddings context
    num_attention_heads    heads            sliding_window          window
    num_key_value_heads    kv_heads         rms_norm_eps            norm_eps
    head_dim               head_width       tie_word_embeddings     tied_embeddings

These are Mixtral's names; ``huggingface_families`` has those of the other families. Any setting that would change the
results and is not supported here is refused, never ignored. Because nobody can list all of them, a setting is ignored
only if it is known to change nothing (``HARMLESS``), if it is switched off, or if it has the value that the family
implies (``_implied``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minimoe.compression import quantize
from minimoe.compression.quantize import Plan
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.files import read_text, user_path
from minimoe.storage import huggingface_families as families
from minimoe.storage.huggingface_families import FAMILIES

CONFIG, GENERATION = "config.json", "generation_config.json"

QUANT_METHOD = "minimoe"
"""What the quantization_config of a model that minimoe quantised calls the method."""

READ = """
    architectures bos_token_id eos_token_id head_dim hidden_act hidden_size intermediate_size max_position_embeddings
    model_type num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads
    pad_token_id quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings vocab_size
"""
"""The fields that are read in every family."""

HARMLESS = """
    attn_implementation begin_suppress_tokens chunk_size_feed_forward diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size experts_implementation finetuning_task gradient_checkpointing id2label
    initializer_range is_decoder label2id length_penalty max_length min_length model_max_length max_seq_len
    max_sequence_length no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    original_max_position_embeddings output_attentions output_hidden_states output_past output_router_logits
    output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    router_jitter_noise suppress_tokens task_specific_params temperature tie_encoder_decoder tokenizer_class top_k
    top_p torch_dtype torchscript typical_p unsloth_fixed use_bfloat16 use_cache use_flash_attn
"""
"""Fields that do not change what a model computes for a text, or that only training or sampling uses."""

HARMLESS_ENDS = ("dropout", "pdrop", "loss_coef", "token_id", "_ids", "_version", "_path")
"""Fields whose names end in one of these are harmless too, and so are fields whose names begin with an underscore."""


class Description(NamedTuple):
    """The contents of config.json that matter here."""

    config: ModelConfig
    model_type: str  # the family: see ``huggingface_families``
    end_tokens: tuple[int, ...]  # ids that end a text, of config.json and of generation_config.json
    generation: dict[str, Any]  # what generation_config.json says, or would say
    plan: Plan | None = None  # how the weights are quantised


def is_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder in Hugging Face's layout; a run of minimoe is not."""
    try:
        values = json.loads(read_text(user_path(path) / CONFIG))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and not {"model_type", "architectures"}.isdisjoint(values)


def read(folder: str | Path) -> Description:
    """Reads config.json, and generation_config.json if there is one.

    Raises:
        UserError: a file cannot be read, lacks a size, or describes a model that is not of a known family.
    """
    path, beside = user_path(folder) / CONFIG, user_path(folder) / GENERATION
    values = read_object(path)
    generation = read_object(beside) if os.path.lexists(beside) else {}
    try:
        config, model_type = _describe(values)
        plan = _plan(values.get("quantization_config"))
        end_tokens = _end_tokens(values.get("eos_token_id"))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    try:
        end_tokens = tuple(dict.fromkeys([*end_tokens, *_end_tokens(generation.get("eos_token_id"))]))
    except UserError as error:
        raise UserError(f"{beside} cannot be used: {error}") from None
    inherited = {name: values[name] for name in ("bos_token_id", "pad_token_id") if values.get(name) is not None}
    inherited |= {name: value for name, value in generation.items() if value is not None}
    return Description(config, model_type, end_tokens, inherited, plan)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ``UserError`` if the file cannot be read or holds something else."""
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a folder that holds a model in Hugging Face's layout.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it, or download it again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object: download it again.")
    return values


def to_dict(
    config: ModelConfig, end_tokens: tuple[int, ...] = (), generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of config.json for a model, in the family that ``huggingface_families.model_type_of`` finds for it.

    ``generation`` holds the ids of the tokens that begin and pad a text, in the form that a ``Description`` has.

    Raises:
        UserError: the model's router or experts are not Mixtral's, or the model has another setting that its family
            lacks.
    """
    families.check(config)
    model_type = families.model_type_of(config)
    values: dict[str, Any] = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": (generation or {}).get("bos_token_id"),
        "eos_token_id": one_or_more(end_tokens),
        "pad_token_id": (generation or {}).get("pad_token_id"),
        "torch_dtype": "float32",
    }
    return values | families.write(config)


def one_or_more(end_tokens: tuple[int, ...]) -> int | list[int] | None:
    """``end_tokens`` as both files write them: a single id by itself, several as a list."""
    return end_tokens[0] if len(end_tokens) == 1 else list(end_tokens) or None


def _describe(values: Mapping[str, Any]) -> tuple[ModelConfig, str]:
    """The model that the values of a config.json describe, and its family."""
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str):
        *others, last = FAMILIES
        raise UserError(f"model_type {model_type!r} is not supported, only {', '.join(others)} and {last} are.")
    if values.get("architectures") not in (None, [family.architecture]):
        raise UserError(
            f"architectures {values['architectures']!r} is not supported, only [{family.architecture!r}] is."
        )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise UserError(f"hidden_act {values['hidden_act']!r} is not supported, only 'silu' is.")
    width, heads = families.value(values, "hidden_size", int), families.value(values, "num_attention_heads", int)
    if heads < 1:
        raise UserError(f"num_attention_heads {heads} is too small: it must be at least 1.")
    kv_heads = families.or_none(values, "num_key_value_heads", int)
    head_width = families.or_none(values, "head_dim", int, None)
    if kv_heads is not None and kv_heads < 1:
        raise UserError(f"num_key_value_heads {kv_heads} is too small: it must be at least 1.")
    config = ModelConfig(
        vocab_size=families.value(values, "vocab_size", int),
        width=width,
        layers=families.value(values, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_width=width // heads if head_width is None else head_width,
        context=families.value(values, "max_position_embeddings", int),
        noisy_gating=False,
        tied_embeddings=families.value(values, "tie_word_embeddings", bool, False),
        rope_theta=_rope_theta(values, family.rope_theta),
        norm_eps=families.value(values, "rms_norm_eps", float, family.rms_norm_eps),
        **families.read(values, model_type),
    )
    _refuse_unsupported(values, config, model_type)
    return config, model_type


def of_plan(plan: Plan) -> dict[str, Any]:
    """The quantization_config of a model that minimoe quantised."""
    return {"quant_method": QUANT_METHOD, **quantize.to_dict(plan)}


def _plan(value: Any) -> Plan | None:
    """How the weights are quantised, if minimoe quantised them; weights that another program quantised are refused."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("quant_method") != QUANT_METHOD:
        raise UserError(
            "quantization_config says that another program quantised the weights: use the model's original weights, "
            "and `minimoe quantize` if they are to be smaller."
        )
    return quantize.from_dict({name: one for name, one in value.items() if name != "quant_method"})


def _refuse_unsupported(values: Mapping[str, Any], config: ModelConfig, model_type: str) -> None:
    """Raises ``UserError`` for a field that may change the results and that nothing here takes account of."""
    known, implied = {*READ.split(), *HARMLESS.split(), *families.known_fields(model_type)}, _implied(config)
    for name, value in values.items():
        if name in known or name.startswith("_") or name.endswith(HARMLESS_ENDS) or value is None:
            continue
        if name == "max_window_layers" and config.window is None:  # then no layer has one
            continue
        if name in implied:
            fits = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in implied[name])
        else:
            fits = value is False or value in ([], {}, "")  # a feature that is switched off
        if not fits:
            raise UserError(
                f"{name} {value!r:.60} is not supported, because it may change what the model computes: use another "
                f"model, or remove {name} if the model does without it."
            )


def _implied(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Settings of other architectures, each with the values at which it changes nothing in this model."""
    everywhere = "full_attention" if config.window is None else "sliding_attention"
    of_one = (
        "decoder_sparse_step embedding_multiplier logit_scale logits_scaling moe_layer_freq n_group "
        "partial_rotary_factor pretraining_tp residual_multiplier rotary_pct routed_scaling_factor scale_emb topk_group"
    )
    of_none = (
        "attn_logit_softcapping final_logit_softcapping first_k_dense_replace n_shared_experts num_shared_experts "
        "num_nextn_predict_layers shared_expert_intermediate_size"
    )
    needed = "causal gated_mlp is_causal norm_topk_prob renormalize scale_attn_weights use_rmsnorm use_rope"
    activations = dict.fromkeys(("activation_function", "hidden_activation", "mlp_hidden_act"), ("silu", "swish"))
    return {
        **dict.fromkeys(of_one.split(), (1,)),
        **dict.fromkeys(of_none.split(), (0, False)),
        **dict.fromkeys(needed.split(), (True,)),
        **activations,
        "layer_types": ([everywhere] * config.layers,),
        "max_window_layers": (0,),
        "moe_intermediate_size": (config.expert_width,),
        "num_experts": (config.experts,),
        "num_local_experts": (config.experts,),
        "n_routed_experts": (config.experts,),
        "query_pre_attn_scalar": (config.head_width,),
        "rotary_dim": (config.head_width,),
        "scoring_func": ("softmax",),
        "use_sliding_window": (True,) if config.window is not None else (True, False),
    }


def _rope_theta(values: Mapping[str, Any], default: float) -> float:
    """θ, from ``rope_theta`` in older folders or from ``rope_parameters`` in newer ones; scaled RoPE is refused."""
    theta = families.value(values, "rope_theta", float, default)
    for name in ("rope_scaling", "rope_parameters"):
        settings = values.get(name)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise UserError(f"{name} {settings!r} is not an object.")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise UserError(f"{name} asks for RoPE of type {kind!r}, but only 'default' is supported.")
        unknown = settings.keys() - {"rope_type", "type", "rope_theta"}
        if settings.get("partial_rotary_factor") == 1:  # all channels
            unknown.discard("partial_rotary_factor")
        if unknown:
            raise UserError(f"{name} has a setting {min(unknown)!r}, which is not supported.")
        theta = families.value(settings, "rope_theta", float, theta)
    return theta


def _end_tokens(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise UserError(f"eos_token_id {value!r} is neither an id nor a list of ids.")
    return tuple(ids)
