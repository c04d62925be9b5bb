"""Folders in Mixtral's layout with random weights, of any size: written tensor by tensor, so they need no memory."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizer_json import mixtral_like

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
"""A model whose text is any text: the tokenizer has 275 tokens."""

FILE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def write(
    folder: Path, dtype: str = "BF16", shards: int = 1, fused: bool = False, seed: int = 0, **changes: Any
) -> Path:
    """A folder with config, tokenizer and weights; ``fused`` keeps the experts of a layer in two tensors.

    The ``dtype`` is that of all tensors, or ``"mixed"``: each is then of one of three.

    The numbers of all tensors are cut from one pool of normal ones, because drawing new ones would take long.
    """
    values = SMALL | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "eos_token_id": 2} | changes
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(2**16 if math.prod(shape_sizes(values)) < 2**24 else 2**24).astype(np.float32)
    shapes = tensors(values, fused)
    names = list(shapes)
    files = [names[i::shards] for i in range(shards)] if shards > 1 else [names]
    weight_map = {}
    for number, inside in enumerate(files, 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(inside, name)
        _write_file(folder / name, {one: shapes[one] for one in inside}, dtype, pool, rng)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    return folder


def shape_sizes(values: dict[str, Any]) -> list[int]:
    return [values["hidden_size"], values["intermediate_size"], values["num_local_experts"]]


def tensors(values: dict[str, Any], fused: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name."""
    D, F, E = (values[name] for name in ("hidden_size", "intermediate_size", "num_local_experts"))
    kv = D // values["num_attention_heads"] * values["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (values["vocab_size"], D)}
    for i in range(values["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        shapes |= {at + f"self_attn.{one}_proj.weight": (D, D) for one in "qo"}
        shapes |= {at + f"self_attn.{one}_proj.weight": (kv, D) for one in "kv"}
        if fused:
            shapes |= {at + "mlp.gate.weight": (E, D), at + "mlp.experts.gate_up_proj": (E, 2 * F, D)}
            shapes[at + "mlp.experts.down_proj"] = (E, D, F)
            continue
        shapes[at + "block_sparse_moe.gate.weight"] = (E, D)
        for e in range(E):
            shapes |= {at + f"block_sparse_moe.experts.{e}.{w}.weight": (F, D) for w in ("w1", "w3")}
            shapes[at + f"block_sparse_moe.experts.{e}.w2.weight"] = (D, F)
    shapes["model.norm.weight"] = (values["hidden_size"],)
    if not values.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (values["vocab_size"], D)
    return shapes


def _write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, pool: np.ndarray, rng: np.random.Generator
) -> None:
    header, end = {}, 0
    cycle = ["F32", "F16", "BF16", "F16", "BF16", "F16", "BF16"]  # so that experts have different sizes
    types = {name: cycle[i % 7] if dtype == "mixed" else dtype for i, name in enumerate(shapes)}
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * FILE[types[name]].itemsize
        header[name] = {"dtype": types[name], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            std = 1.0 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
            left = math.prod(shape)
            while left:
                start = int(rng.integers(len(pool)))
                part = pool[start : start + min(left, 2**22)] * np.float32(std)
                if types[name] == "BF16":
                    part = (part.view(np.uint32) >> 16).astype(np.uint16)
                file.write(part.astype(FILE[types[name]]).data)
                left -= len(part)
