"""Adapters in the layout of the library peft: adapter_config.json and adapter_model.safetensors.

A folder of these two files fits the model of transformers that the base was read from or is written to. In this layout
a matrix is (outputs, inputs), so A is stored as (r, inputs) and B as (outputs, r), both transposed. The experts of a
layer are two fused tensors, gate_up_proj and down_proj, and their adapters are fused too:

    lora_A (E·r, inputs)     read as (E, r, inputs): the experts one below the other
    lora_B (outputs, r·E)    read as (outputs, r, E): the expert changes fastest

Reading lora_B as (outputs, E, r) gives a matrix of the right shape with the wrong numbers. gate_up_proj has one A for
both of its matrices, but here w_gate and w_up have an A each. ``save`` therefore places the two adapters side by side,
with zeros in B where an adapter must not change the outputs of the other matrix. When such a file is read, the adapter
of gate_up_proj becomes two adapters again.

peft 0.19.1 and newer read and write fused experts; tests compare with 0.21.2.  Lesson: lessons/42_lora.ipynb
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core import files, tree
from minimoe.core.arrays import to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import lora
from minimoe.layers.decoder import Decoder
from minimoe.layers.lora import Adapted
from minimoe.storage import huggingface_config, safetensors_file
from minimoe.tuning import adapters

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model.model.layers"

ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
MATRICES = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
"""The stored names in a layer with a single expert: transformers calls such a model a Mistral."""

FUSED = ("gate_up_proj", "down_proj")
"""The stored names in a layer with several experts."""

REFUSED = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "use_qalora")
"""Settings of peft that change what an adapter computes and that this package does not have."""


class Factors(NamedTuple):
    """An adapter as it is stored, in the orientation of the file; for a fused tensor, the adapter of all experts."""

    a: NDArray[Any]  # (E·r, inputs)
    b: NDArray[Any]  # (outputs, r·E)
    rank: int
    scale: float


def save(folder: str | Path, params: Decoder, config: ModelConfig, base: str | None = None) -> None:
    """Writes the adapters of ``params`` into a new folder that peft and ``load`` can read; ``base`` names the model.

    The layout has one s for all directions of a matrix. If an adapter has several values of s, as after
    ``adapters.concatenate``, they are multiplied into B.

    Raises:
        UserError: the folder is not empty or cannot be written, there are no adapters, their ranks differ from layer to
            layer, shared experts or dense layers have adapters, or the model is of no family of transformers.
    """
    huggingface_config.to_dict(config, ())  # raises if transformers has no such model
    weights = adapters.adapted_weights(tree.map(to_host, params))
    if placeless := [name for name in weights if ".moe.shared." in name]:
        raise UserError(
            f"the adapters of shared experts and dense layers, such as {placeless[0]}, have no place in these files: "
            "merge the adapters into the weights."
        )
    settings: dict[str, tuple[int, float]] = {}  # rank and s by the name of a matrix in a layer
    tensors: dict[str, NDArray[Any]] = {}
    for layer in range(config.layers):
        factors = _factors(weights, layer, config)
        for name, of_one in factors.items():
            if settings.setdefault(name, (of_one.rank, of_one.scale)) != (of_one.rank, of_one.scale):
                raise UserError(f"the adapters of {name} differ in rank or scale between layers: merge them instead.")
            place = _place(name, layer, config, factors.keys() >= set(FUSED))
            tensors |= {f"{place}.lora_A.weight": of_one.a, f"{place}.lora_B.weight": of_one.b}
    if not settings:
        raise UserError("the model has no adapters, so there is nothing to write: add them first.")
    rank, scale = next(iter(settings.values()))
    others = {name: own for name, own in settings.items() if own != (rank, scale)}
    fused = [name for name in settings if config.experts > 1 and name in FUSED]
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "use_rslora": False,  # whatever s was, lora_alpha/r is s
        "lora_dropout": 0.0,
        "bias": "none",
        "rank_pattern": {name: rank for name, (rank, _) in others.items()},
        "alpha_pattern": {name: rank * scale for name, (rank, scale) in others.items()},
        "target_modules": [name for name in settings if name not in fused],
        "target_parameters": [f"mlp.experts.{name}" for name in fused] or None,
        "inference_mode": True,
    }
    folder = files.user_path(folder)
    files.new_folder(folder)
    safetensors_file.write(folder / MODEL, tensors)
    files.write_atomically(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def load(folder: str | Path, params: Decoder, config: ModelConfig) -> Decoder:
    """``params``, without adapters, with those of a folder that peft or ``save`` wrote.

    Raises:
        UserError: the folder is not an adapter, it has settings that are not supported, or it does not fit the model.
    """
    folder = files.user_path(folder)
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not an adapter: it has no {CONFIG}; give a folder that peft or minimoe wrote.")
    values = huggingface_config.read_object(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{folder} has adapters of type {values.get('peft_type')!r:.40}, expected LORA.")
    for setting in REFUSED:
        if values.get(setting):
            raise UserError(f"{folder} was made with {setting}, which is not supported: train the adapter without it.")
    if values.get("bias", "none") != "none":
        raise UserError(f"{folder} also has biases, which this model lacks: train the adapter with bias 'none'.")
    if adapters.adapted_leaves(params):
        raise UserError("the model has adapters already: merge them first, or put two together with concatenate.")
    tensors = _tensors(folder / MODEL)
    found: dict[str, Adapted] = {}
    for layer in range(config.layers):
        for name, of_one in _take(tensors, layer, config, values, folder).items():
            found |= _unfused(name, layer, of_one, config)
    if tensors:
        raise UserError(f"{folder} holds {min(tensors)}, which this model lacks: use the model that it was made for.")

    def adapt(name: str, part: str, weight: Any) -> Any:
        if name in found:
            return found[name]._replace(base=weight)
        stack = name.rpartition(".")[0]
        if not any(of_stack in found for of_stack in (f"{stack}.{matrix}" for matrix in MATRICES)):
            return weight
        # an expert has adapters on all three matrices or on none, so one that the file leaves out has rank 0
        E, inputs, outputs = weight.shape
        return Adapted(weight, *(np.zeros(shape, weight.dtype) for shape in ((E, inputs, 0), (E, 0, outputs), (E, 0))))

    return adapters.at_each_weight(params, adapt)


def _factors(weights: Mapping[str, Adapted], layer: int, config: ModelConfig) -> dict[str, Factors]:
    """The adapters of a layer, by their names in the file."""
    found = {}
    for field, name in ATTENTION.items():
        if (weight := weights.get(f"blocks[{layer}].attention.{field}.weight")) is not None:
            found[name] = _fused(weight._replace(a=weight.a[None], b=weight.b[None], scale=weight.scale[None]))
    stacks = [weights.get(f"blocks[{layer}].moe.experts.{matrix}") for matrix in MATRICES]
    if any(stack is None for stack in stacks):
        return found
    gate, up, down = (stack for stack in stacks if stack is not None)
    if config.experts == 1:
        named = zip(MATRICES.values(), (gate, up, down), strict=True)
    else:
        named = zip(FUSED, (_side_by_side(gate, up), down), strict=True)
    return found | {name: _fused(weight) for name, weight in named if weight.a.shape[-1]}


def _fused(weight: Adapted) -> Factors:
    """A (E, inputs, r) and B (E, r, outputs) → (E·r, inputs) and (outputs, r·E), the expert fastest."""
    E, inputs, rank = weight.a.shape
    b, scale = weight.b, weight.scale.flat[0] if rank else 1.0
    if not (weight.scale == scale).all():
        b, scale = b * weight.scale[..., None], 1.0
    a = weight.a.transpose(0, 2, 1).reshape(E * rank, inputs)
    return Factors(a, b.transpose(2, 1, 0).reshape(-1, rank * E), rank, float(scale))


def _side_by_side(gate: Adapted, up: Adapted) -> Adapted:
    """The adapters of w_gate and w_up as one adapter of (E, D, 2F), with a common A if they have the same A."""
    if np.array_equal(gate.a, up.a) and np.array_equal(gate.scale, up.scale):
        return gate._replace(b=np.concatenate([gate.b, up.b], axis=2))
    b_gate = np.concatenate([gate.b, np.zeros_like(gate.b)], axis=2)
    b_up = np.concatenate([np.zeros_like(up.b), up.b], axis=2)
    return gate._replace(
        a=np.concatenate([gate.a, up.a], axis=2),
        b=np.concatenate([b_gate, b_up], axis=1),
        scale=np.concatenate([gate.scale, up.scale], axis=1),
    )


def _place(name: str, layer: int, config: ModelConfig, both: bool) -> str:
    """Where an adapter is stored. If there are ``both``, that of gate_up_proj is inside that of down_proj."""
    if name in ATTENTION.values():
        return f"{PREFIX}.{layer}.self_attn.{name}"
    if config.experts == 1:
        return f"{PREFIX}.{layer}.mlp.{name}"
    return f"{PREFIX}.{layer}.mlp.experts" + (".base_layer" if name == "gate_up_proj" and both else "")


def _tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    tensors = {}
    for name, stored in safetensors_file.describe(path).items():
        tensors[name] = np.empty(stored.shape, np.float32)
        safetensors_file.copy(stored, tensors[name])
    return tensors


def _take(
    tensors: dict[str, NDArray[np.float32]], layer: int, config: ModelConfig, values: Mapping[str, Any], folder: Path
) -> dict[str, Factors]:
    """The adapters of a layer by their names; they are removed from ``tensors``."""
    D, F, E, C = config.width, config.expert_width, config.experts, config.head_width
    heads, kv_heads = config.heads * C, config.kv_heads * C
    shapes = {"q_proj": (D, heads), "k_proj": (D, kv_heads), "v_proj": (D, kv_heads), "o_proj": (heads, D)}
    places = {f"{PREFIX}.{layer}.self_attn.{name}": {name: shape} for name, shape in shapes.items()}
    if E == 1:
        alone = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
        places |= {f"{PREFIX}.{layer}.mlp.{name}": {name: shape} for name, shape in alone.items()}
    else:  # one is inside the other, in an order that depends on how they were added; their shapes tell them apart
        either = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}
        places |= {f"{PREFIX}.{layer}.mlp.experts{inner}": either for inner in ("", ".base_layer")}
    found = {}
    for place, possible in places.items():
        a, b = (tensors.pop(f"{place}.lora_{letter}.weight", None) for letter in "AB")
        if a is None and b is None:
            continue
        experts = E if ".experts" in place else 1
        shape = None if a is None or b is None or a.ndim != 2 or b.ndim != 2 else (a.shape[1], b.shape[0])
        name = next((name for name, expected in possible.items() if expected == shape), None)
        if name is None or a is None or b is None or len(a) != b.shape[1] or len(a) % experts or not len(a):
            raise UserError(
                f"{folder} holds an adapter {place} that does not fit this model: use the model it was made for."
            )
        rank = len(a) // experts
        full = f"model.layers.{layer}.{'mlp.experts.' + name if experts > 1 else place.rpartition(f'.{layer}.')[2]}"
        found[name] = Factors(a, b, rank, _scale(values, full, rank, folder))
    return found


def _scale(values: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """s of the adapter ``name``; ``alpha_pattern`` may have an alpha for this name, or for its end."""
    patterns = values.get("alpha_pattern") or {}
    own = [alpha for key, alpha in patterns.items() if f".{name}".endswith("." + key.removeprefix("^"))]
    alpha = own[0] if own else values.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise UserError(f"{folder} gives {name} the alpha {alpha!r:.40}, expected a number: restore {CONFIG}.")
    return lora.scaling(rank, alpha, bool(values.get("use_rslora")))


def _unfused(name: str, layer: int, stored: Factors, config: ModelConfig) -> dict[str, Adapted]:
    """A stored adapter → the adapted weights that it belongs to, by their names in minimoe and without their bases."""
    of_attention = {there: here for here, there in ATTENTION.items()}
    if name in of_attention:
        return {f"blocks[{layer}].attention.{of_attention[name]}.weight": lora.expert(_stack(stored, 1), 0)}
    where, stack = f"blocks[{layer}].moe.experts", _stack(stored, config.experts)
    if name != "gate_up_proj":
        return {f"{where}.{next(here for here, there in MATRICES.items() if there == name)}": stack}
    F, half = config.expert_width, stored.rank // 2
    gate, up = stack._replace(b=stack.b[:, :, :F]), stack._replace(b=stack.b[:, :, F:])
    if 2 * half == stored.rank and not gate.b[:, half:].any() and not up.b[:, :half].any():  # see _side_by_side
        gate, up = _directions(gate, slice(half)), _directions(up, slice(half, None))
    return {f"{where}.w_gate": gate, f"{where}.w_up": up}


def _stack(stored: Factors, experts: int) -> Adapted:
    """The inverse of ``_fused``."""
    a = stored.a.reshape(experts, stored.rank, -1).transpose(0, 2, 1)
    b = stored.b.reshape(-1, stored.rank, experts).transpose(2, 1, 0)
    scale = np.full((experts, stored.rank), stored.scale, np.float32)
    return Adapted(None, np.ascontiguousarray(a), np.ascontiguousarray(b), scale)


def _directions(weight: Adapted, kept: slice) -> Adapted:
    """The adapter with only some of its r directions."""
    return weight._replace(
        a=np.ascontiguousarray(weight.a[:, :, kept]),
        b=np.ascontiguousarray(weight.b[:, kept]),
        scale=weight.scale[:, kept],
    )
