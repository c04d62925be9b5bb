"""The families of models in Hugging Face's layout: how each names its settings, and which settings it can have.

    mixtral      Mixtral        the weights of the chosen experts are renormalised
    mistral      Mistral        a single expert and no router
    olmoe        OLMoE          queries are normalised over all heads, and keys too; every head is D/H wide
    qwen3_moe    Qwen3-MoE      queries and keys are normalised in each head; the first layers may be dense
    deepseek     DeepSeekMoE    shared experts; the first layers may be dense; every head is D/H wide

For the last three, ``norm_topk_prob`` says whether the weights are renormalised. The family ``deepseek`` is that of
deepseek-moe-16b, whose attention is ordinary. DeepSeek-V2 and its successors compress keys and values and are not read.

A setting that a family cannot express is refused with an error message, when a folder is read and when one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import moe


class Family(NamedTuple):
    """A family, with the values of transformers 5 for the fields that its config may leave out."""

    architecture: str
    title: str  # with its article, for sentences
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    experts: tuple[str, ...]  # names of the number of experts; the first one is written; none in a dense model
    expert_width: str  # the name of F
    qk_norm: str = "none"
    reads: str = ""  # the fields that only this family has
    no_window: bool = False
    fixed_heads: bool = False  # every head is D/H wide
    no_dense: bool = True
    no_shared: bool = True
    always_renormalizes: bool = True


FAMILIES = {
    "mixtral": Family("MixtralForCausalLM", "a Mixtral", 1e-5, 1e6, None, ("num_local_experts",), "intermediate_size"),
    "mistral": Family(
        "MistralForCausalLM",
        "a Mistral",
        1e-6,
        1e4,
        4096,
        (),
        "intermediate_size",
        reads="num_local_experts",  # without a meaning here
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        "an OLMoE",
        1e-5,
        1e4,
        None,
        ("num_experts", "num_local_experts"),
        "intermediate_size",
        qk_norm="whole",
        reads="norm_topk_prob",
        no_window=True,
        fixed_heads=True,
        always_renormalizes=False,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "a Qwen3-MoE",
        1e-6,
        1e4,
        4096,
        ("num_experts", "num_local_experts"),
        "moe_intermediate_size",
        qk_norm="per_head",
        reads="norm_topk_prob mlp_only_layers use_sliding_window",
        no_dense=False,
        always_renormalizes=False,
    ),
    "deepseek": Family(
        "DeepseekForCausalLM",
        "a DeepSeekMoE",
        1e-6,
        1e4,
        None,
        ("n_routed_experts",),
        "moe_intermediate_size",
        # its code lies beside the weights, and seq_aux and aux_loss_alpha are settings of its training
        reads="norm_topk_prob n_shared_experts first_k_dense_replace auto_map seq_aux aux_loss_alpha",
        no_window=True,
        fixed_heads=True,
        no_dense=False,
        no_shared=False,
        always_renormalizes=False,
    ),
}
"""By ``model_type``."""


def known_fields(model_type: str) -> set[str]:
    """The fields of config.json that only this family reads."""
    family = FAMILIES[model_type]
    return {*family.experts, family.expert_width, *family.reads.split()}


def read(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The settings of a ``ModelConfig`` that families name differently, from the values of a config.json.

    Raises:
        UserError: a field is missing or of another type, two fields contradict each other, or a field has a value that
            is not supported.
    """
    family = FAMILIES[model_type]
    width, heads = value(values, "hidden_size", int), value(values, "num_attention_heads", int)
    if family.fixed_heads and values.get("head_dim") not in (None, width // heads):
        raise UserError(
            f"head_dim {values['head_dim']!r} is not supported, because every head of {family.title} is "
            f"hidden_size / num_attention_heads wide, which is {width // heads}."
        )
    found: dict[str, Any] = {
        "qk_norm": family.qk_norm,
        "experts": 1,
        "active_experts": 1,
        "expert_width": value(values, family.expert_width, int),
        "window": or_none(values, "sliding_window", int, family.sliding_window),
    }
    if family.experts:
        found["experts"] = _experts(values, family)
        found["active_experts"] = value(values, "num_experts_per_tok", int)
    if not family.always_renormalizes:
        found["renormalize"] = value(values, "norm_topk_prob", bool, False)
    if family.no_window and found["window"] is not None:
        raise UserError(f"sliding_window {found['window']} is not supported, because {family.title} has none.")
    if model_type == "qwen3_moe":
        if not value(values, "use_sliding_window", bool, False):
            found["window"] = None
        found |= _dense_of(values, _first_layers(values.get("mlp_only_layers")))
    if model_type == "deepseek":
        # This family leaves a single weight as it is, whatever norm_topk_prob says.
        found["renormalize"] &= found["active_experts"] > 1
        found["shared_experts"] = or_none(values, "n_shared_experts", int, None) or 0
        found |= _dense_of(values, or_none(values, "first_k_dense_replace", int, None) or 0)
    return found


def _experts(values: Mapping[str, Any], family: Family) -> int:
    given = {name: value(values, name, int) for name in family.experts if values.get(name) is not None}
    if len(set(given.values())) > 1:
        raise UserError(f"{' and '.join(f'{name} {number}' for name, number in given.items())} contradict each other.")
    return next(iter(given.values())) if given else value(values, family.experts[0], int)


def _first_layers(layers: Any) -> int:
    """How many layers are dense; they must be the first ones."""
    if layers is None or layers == []:
        return 0
    if not isinstance(layers, list) or layers != list(range(len(layers))) or type(layers[0]) is not int:
        raise UserError(
            f"mlp_only_layers {layers!r:.60} is not supported, because only the first layers may be dense, such as "
            "[0, 1]."
        )
    return len(layers)


def _dense_of(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {"dense_layers": count, "dense_width": value(values, "intermediate_size", int)} if count else {}


def renormalizes(config: ModelConfig) -> bool:
    """Whether the weights of a token's experts add up to 1; the only expert of a layer always has 1."""
    return config.renormalize or config.router != "noisy_top_k" or config.experts == 1


def model_type_of(config: ModelConfig) -> str:
    """The family that a model is written in."""
    of_norm = {"whole": "olmoe", "per_head": "qwen3_moe"}
    if config.qk_norm in of_norm:
        return of_norm[config.qk_norm]
    if config.shared_experts or config.dense_layers or not renormalizes(config):
        return "deepseek"
    return "mistral" if config.experts == 1 else "mixtral"


def check(config: ModelConfig) -> None:
    """Raises ``UserError`` if the family of a model lacks one of its settings."""
    model_type = model_type_of(config)
    family = FAMILIES[model_type]

    def refuse(setting: str, why: str) -> None:
        raise UserError(f"a model with {setting} cannot be written as {family.title}, {why}: keep it as a run.")

    for kind, module in (("router", moe.router_of(config)), ("expert_kind", moe.experts_of(config))):
        if not hasattr(module, "mixtral_tensors"):
            refuse(f"{kind} {getattr(config, kind)!r}", "which has none")
    if config.shared_experts and family.no_shared:
        refuse(f"shared_experts {config.shared_experts}", "which has none")
    if config.dense_layers and family.no_dense:
        refuse(f"dense_layers {config.dense_layers}", "which has none")
    if config.window is not None and family.no_window:
        refuse(f"window {config.window}", "which has none")
    if family.fixed_heads and config.heads * config.head_width != config.width:
        refuse(
            f"head_width {config.head_width}", f"whose heads are width / heads wide ({config.width} / {config.heads})"
        )
    if model_type == "deepseek" and config.active_experts == 1 and config.experts > 1 and renormalizes(config):
        refuse("renormalize on and active_experts 1", "which leaves a single weight as it is")


def write(config: ModelConfig) -> dict[str, Any]:
    """The values of config.json that families name differently: what ``read`` reads."""
    model_type = model_type_of(config)
    family = FAMILIES[model_type]
    values: dict[str, Any] = {"sliding_window": config.window}
    if family.no_window:
        values = {}
    elif model_type == "qwen3_moe":
        values |= {"use_sliding_window": config.window is not None}
    values[family.expert_width] = config.expert_width
    if family.experts:
        values |= {family.experts[0]: config.experts, "num_experts_per_tok": config.active_experts}
    if not family.always_renormalizes:
        single = model_type == "deepseek" and config.active_experts == 1
        values["norm_topk_prob"] = renormalizes(config) and not single
    if not family.no_dense:
        values["intermediate_size"] = config.width_of_dense
    if model_type == "qwen3_moe":
        values |= {"mlp_only_layers": list(range(config.dense_layers)), "decoder_sparse_step": 1}
    if model_type == "deepseek":
        values |= {"n_shared_experts": config.shared_experts or None, "first_k_dense_replace": config.dense_layers}
        values |= {"moe_layer_freq": 1, "scoring_func": "softmax"}
    return values


_REQUIRED: Any = object()
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}
Value = TypeVar("Value", int, float, bool)


def value(values: Mapping[str, Any], name: str, kind: type[Value], default: Value = _REQUIRED) -> Value:
    """The field ``name``, of type ``kind``; raises ``UserError`` if it is missing or of another type."""
    found = values.get(name, default)
    if found is _REQUIRED:
        raise UserError(f"{name} is missing.")
    if kind is float and type(found) is int and abs(found) < 2**1023:
        return kind(found)
    if type(found) is not kind:
        raise UserError(f"{name} {found!r} is not {_KINDS[kind]}.")
    return found


def or_none(values: Mapping[str, Any], name: str, kind: type[Value], default: Value | None = _REQUIRED) -> Value | None:
    """The field ``name``, which may also be null."""
    if values.get(name, default) is None:
        return None
    return value(values, name, kind, _REQUIRED if default is None else default)
