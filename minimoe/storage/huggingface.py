"""Models in the layout of Hugging Face's transformers: load one of a known family, save a model for others to load.

    config.json, generation_config.json  huggingface_config, huggingface_families
    model.safetensors                    the weights; or several files, which model.safetensors.index.json lists
    tokenizer.json and files beside it   huggingface_tokenizer

Names and orientation of the matrices differ from minimoe's. A matrix is (outputs, inputs) there and (inputs, outputs)
here, so every matrix is transposed. Reading and writing both use ``layout``, which matches the tensors. RoPE pairs
channels by halves, there and here.

Newer versions of transformers keep a layer's experts in two fused tensors, gate_up_proj (E, 2F, D) and down_proj
(E, D, F). Both forms can be read. The older form, with one tensor per matrix, is the one that is written, because all
versions can read it. Mixtral's names of a layer's router and experts differ from those of all other families:

    block_sparse_moe.gate, block_sparse_moe.experts.3.w1, .w3, .w2              Mixtral
    mlp.gate, mlp.experts.3.gate_proj, .up_proj, .down_proj                     OLMoE, Qwen3-MoE, DeepSeekMoE
    mlp.shared_experts.gate_proj, …                                             the shared experts of a DeepSeekMoE
    mlp.gate_proj, mlp.up_proj, mlp.down_proj                                   a dense layer, and all of a Mistral

A folder with quantised weights has the same config.json with a plan in it, and quantized.safetensors with the arrays
that ``compression.quantize`` describes. The file has another name because transformers ignores a plan that it does not
know: in a file of the usual name, transformers would find none of the tensors it looks for, print a warning, and use
random weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.compression import quantize
from minimoe.compression.quantize import Plan
from minimoe.core import resources, tree
from minimoe.core.arrays import Array, Device, placeholder, to_device, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.files import new_folder, read_tensors, user_path, write_atomically, write_tensors
from minimoe.core.summary import brief
from minimoe.cost import parameters
from minimoe.layers import attention, decoder, dense, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts import swiglu
from minimoe.layers.moe import MoE
from minimoe.storage import huggingface_config, safetensors_file
from minimoe.storage.huggingface_config import CONFIG, GENERATION, Description, is_folder
from minimoe.storage.safetensors_file import Stored
from minimoe.text import huggingface_tokenizer
from minimoe.text.huggingface_tokenizer import MissingTokenizer, PretrainedTokenizer
from minimoe.text.tokenizer import Tokenizer

__all__ = ["Pretrained", "is_folder", "layout", "load", "load_params", "save"]

MODEL, INDEX, PACKED = "model.safetensors", "model.safetensors.index.json", "quantized.safetensors"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRICES = {"w1": "gate", "w2": "down", "w3": "up"}
"""Mixtral's names of the matrices of an expert, and the beginnings of their names in the other families."""

Tokens = Tokenizer | PretrainedTokenizer | MissingTokenizer | None
Write = Callable[[Path], None]
Repeated = dict[str, list[tuple[Stored, str | None]]]
"""What each surplus tensor of a folder repeats: see ``_repeats``."""


@brief
class Pretrained(NamedTuple):
    """A model that was trained elsewhere, ready to generate."""

    params: Decoder
    config: ModelConfig
    tokenizer: PretrainedTokenizer | MissingTokenizer
    end_tokens: tuple[int, ...]  # ids that end a text

    def to(self, device: Device) -> Pretrained:
        """The same model on ``device``."""
        return self._replace(params=tree.map(lambda leaf: to_device(leaf, device), self.params))

    @property
    def run(self) -> None:
        """None: it is not known how the model was trained."""

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on the GPU."""
        return not isinstance(self.params.norm.gain, np.ndarray)


def load(folder: str | Path) -> Pretrained:
    """A model with its tokenizer, on the host in float32.

    Without tokenizer.json, or without the library that reads it, the model is opened all the same. Its tokenizer is
    then a ``MissingTokenizer``, which refuses every text and says why.

    Raises:
        UserError: as for ``load_params``; or the tokenizer is unreadable, or plain text can give it a token that the
            model does not have.
    """
    folder = user_path(folder)
    described = huggingface_config.read(folder)
    tokenizer = find_tokenizer(folder, described)
    params, config = load_params(folder)
    return Pretrained(params, config, tokenizer, described.end_tokens)


def find_tokenizer(folder: Path, described: Description) -> PretrainedTokenizer | MissingTokenizer:
    """The tokenizer of a folder; raises ``UserError`` if it is unreadable or does not belong to the model."""
    tokenizer = huggingface_tokenizer.find(folder).beside(GENERATION, _to_json(described.generation))
    if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.text_size > described.config.vocab_size:
        raise UserError(
            f"{folder} has a tokenizer of {tokenizer.text_size} tokens and a model of {described.config.vocab_size}: "
            "the two do not belong together."
        )
    return tokenizer


def load_params(folder: str | Path) -> tuple[Decoder, ModelConfig]:
    """The weights of a folder, on the host in float32, and their config.

    Everything that the files claim is checked before memory is allocated. However large the files are, memory holds at
    most the model and the tensor that is being copied.

    Raises:
        UserError: config.json is unreadable or describes a model that is not of a known family; a tensor is missing,
            of another shape or type, or surplus, unless it only repeats what the model has (``_repeats``); a
            file is damaged or is outside the folder; the model does not fit into this machine's memory.
    """
    folder = user_path(folder)
    described = huggingface_config.read(folder)
    config, model_type = described.config, described.model_type
    if described.plan is not None:
        _check_memory(config)
        tensors, _ = read_tensors(folder / PACKED)
        return quantize.restore(tensors, decoder.blank(config, placeholder), described.plan, folder / PACKED), config
    found, repeated = locate(folder, config, model_type)
    _check_memory(config)
    params = decoder.blank(config, lambda shape: np.zeros(shape, np.float32))
    places = dict(layout(params, config, model_type))
    for name, place in places.items():
        safetensors_file.copy(found[name], place)
    check_repeated(folder, repeated, places, config)
    return params, config


def locate(folder: Path, config: ModelConfig, model_type: str) -> tuple[dict[str, Stored], Repeated]:
    """Where each tensor of ``layout`` is in the files of a folder, and what the files hold besides; nothing is read.

    Raises:
        UserError: as for ``load_params``, except for tensors that do not repeat what they should.
    """
    stored = _describe(folder)
    found, blank = {}, {}
    for name, place in layout(decoder.blank(config, placeholder), config, model_type):
        found[name] = _find(stored, name, place.shape, config, folder)
        blank[name] = place
    surplus = stored.keys() - {tensor.name for tensor in found.values()}
    repeated = {name: _repeats(stored[name], blank, config) for name in surplus}
    for name in sorted(repeated):
        if not repeated[name]:
            raise UserError(
                f"{folder} has a tensor {name} that the model in its {CONFIG} has no place for: "
                "the two do not belong together."
            )
    return found, repeated


def check_repeated(folder: Path, repeated: Repeated, places: Mapping[str, Array], config: ModelConfig) -> None:
    """Raises ``UserError`` if a surplus tensor differs from what it should repeat, in the layout of a folder."""
    for name in sorted(repeated):
        for part, of in repeated[name]:
            if not (_is_implied(part, config) if of is None else safetensors_file.equals(part, places[of])):
                raise UserError(
                    f"{folder} has a tensor {name} that differs from {of or 'what follows from its ' + CONFIG}, but "
                    "the model has no other place for it: the two do not belong together."
                )


def save(
    folder: str | Path,
    params: Decoder,
    config: ModelConfig,
    tokenizer: Tokens = None,
    end_tokens: tuple[int, ...] = (),
    plan: Plan | None = None,
) -> None:
    """Writes a folder that transformers and ``load`` can read, in float32. A folder with a config.json is complete.

    With a ``plan``, the weights are quantised, under the names of the code. Only ``load`` can read such a folder;
    transformers refuses it, because it has no model.safetensors.

    A tokenizer that was read from a folder is written with all that was read there: the names of its special tokens,
    its chat template and the settings of generation.

    The router's trainable noise is left out, because it is used only in training. The family follows from the settings:
    see ``huggingface_families.model_type_of``. For example, a model with a single expert is saved as a Mistral.

    Raises:
        UserError: the folder is not empty or cannot be written, the model has a setting that its family lacks, or its
            weights cannot be quantised.
    """
    folder = user_path(folder)
    beside = _beside(config, tokenizer, end_tokens, plan)
    on_host = tree.map(to_host, params)
    packed = None if plan is None else quantize.compress(on_host, plan)
    new_folder(folder)
    if packed is None:
        safetensors_file.write(folder / MODEL, dict(layout(on_host, config, beside[0]["model_type"])))
    else:
        write_tensors(folder / PACKED, packed, {"format": "np"})
    _write_beside(folder, beside, tokenizer)


def save_quantized(
    folder: Path, config: ModelConfig, tokenizer: Tokens, end_tokens: tuple[int, ...], plan: Plan, write: Write
) -> None:
    """Like ``save`` with a ``plan``, but ``write`` makes the file of the weights, so the weights need not be in memory.

    Raises:
        UserError: as for ``save``. The folder is removed again if ``write`` fails.
    """
    beside = _beside(config, tokenizer, end_tokens, plan)
    new_folder(folder)
    try:
        write(folder / PACKED)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    _write_beside(folder, beside, tokenizer)


def _beside(
    config: ModelConfig, tokenizer: Tokens, end_tokens: tuple[int, ...], plan: Plan | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The values of config.json and of generation_config.json; None if the second is not written."""
    generation = None
    if isinstance(tokenizer, PretrainedTokenizer | MissingTokenizer) and GENERATION in tokenizer.files:
        generation = json.loads(tokenizer.files[GENERATION])
    values = huggingface_config.to_dict(config, end_tokens, generation)
    if plan is not None:
        values["quantization_config"] = huggingface_config.of_plan(plan)
    if generation is not None:
        generation = generation | {"eos_token_id": huggingface_config.one_or_more(end_tokens)}
    return values, generation


def _write_beside(folder: Path, beside: tuple[dict[str, Any], dict[str, Any] | None], tokenizer: Tokens) -> None:
    values, generation = beside
    if tokenizer is not None:
        huggingface_tokenizer.write(folder, tokenizer)
    if generation is not None:
        write_atomically(folder / GENERATION, _to_json(generation).encode())
    write_atomically(folder / CONFIG, _to_json(values).encode())  # last, because it is what makes a folder a model


def layout(params: Decoder, config: ModelConfig, model_type: str) -> Iterator[tuple[str, Array]]:
    """Yields, for every tensor of a folder, its name in the folder and a view into ``params`` with the shape that it
    has there.

    Attention, router and experts state their own tensors, in ``mixtral_tensors``. The names of the other families
    follow from Mixtral's, and those of a dense layer from Mistral's, which does not number its only expert.
    """
    yield TABLE, params.embedding.table
    for i, block in enumerate(params.blocks):
        inside = [
            ("input_layernorm.weight", block.attention_norm.gain),
            *attention.mixtral_tensors(block.attention),
            ("post_attention_layernorm.weight", block.moe_norm.gain),
            *_feed_forward(block.moe, config, model_type),
        ]
        for name, tensor in inside:
            yield f"model.layers.{i}.{name}", tensor
    yield "model.norm.weight", params.norm.gain
    if params.head is not None:
        yield HEAD, params.head.weight.T


def _feed_forward(layer: MoE, config: ModelConfig, model_type: str) -> Iterator[tuple[str, Array]]:
    """The tensors of a layer's router and experts, or of its dense layer."""
    router: Any = moe.router_of(config)
    experts: Any = moe.experts_of(config)
    if dense.is_dense(layer):
        yield from swiglu.mixtral_tensors(layer.shared, dense=True)
    elif model_type == "mistral":
        yield from experts.mixtral_tensors(layer.experts, dense=True)
    else:
        for name, tensor in (*router.mixtral_tensors(layer.router), *experts.mixtral_tensors(layer.experts, False)):
            yield name if model_type == "mixtral" else _newer(name), tensor
        if layer.shared is not None:
            for name, tensor in swiglu.mixtral_tensors(layer.shared, dense=True):
                yield name.replace("mlp.", "mlp.shared_experts."), tensor


def _newer(name: str) -> str:
    """Mixtral's name of a tensor of router or experts → the name that all other families use."""
    for old, new in (("block_sparse_moe.", "mlp."), *((f".{w}.", f".{of}_proj.") for w, of in MATRICES.items())):
        name = name.replace(old, new)
    return name


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _describe(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's one file, or of all the files (shards) that its index names."""
    if (folder / MODEL).exists():
        return safetensors_file.describe(folder / MODEL)
    index = folder / INDEX
    if not index.exists():
        raise UserError(f"{folder} has neither {MODEL} nor {INDEX}: convert the model to safetensors first.")
    shard_of = huggingface_config.read_object(index).get("weight_map")
    if not isinstance(shard_of, dict):
        raise UserError(f"{index} has no weight_map, which says where each tensor is: download it again.")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard) is None:
            raise UserError(
                f"{index} places the tensor {name} in {shard!r}, expected the plain name of a .safetensors file in "
                "the same folder: do not use this folder."
            )
    stored: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        # the index decides: what a shard holds besides belongs to another shard, or to no model
        stored |= safetensors_file.describe(folder / shard, {name for name, of in shard_of.items() if of == shard})
    lost = shard_of.keys() - stored.keys()
    if lost:
        raise UserError(
            f"{index} places the tensor {min(lost)} in {shard_of[min(lost)]}, which lacks it: download both again."
        )
    return stored


def _find(stored: dict[str, Stored], name: str, shape: tuple[int, ...], config: ModelConfig, folder: Path) -> Stored:
    """The tensor ``name`` under its older or newer name, or as rows of a fused one; ``UserError`` if there is none.

    A tied table may be stored under either of its two names.
    """
    newer = name.replace(".block_sparse_moe.", ".mlp.")
    tensor = stored.get(name) or stored.get(newer)
    if tensor is None and name == TABLE and config.tied_embeddings:
        tensor = stored.get(HEAD)
    if tensor is not None:
        _check_shape(tensor, shape)
        return tensor
    expert = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight", newer)
    if expert is not None:
        prefix, e, matrix = expert[1], expert[2], MATRICES.get(expert[3], expert[3].removesuffix("_proj"))
        fused = stored.get(prefix + ("down_proj" if matrix == "down" else "gate_up_proj"))
        if fused is not None:
            return _rows_of_fused(fused, config.experts, int(e), matrix, shape)
    raise UserError(f"{folder} lacks the tensor {name} of the model in its {CONFIG}: download the missing file.")


def _repeats(tensor: Stored, places: dict[str, Array], config: ModelConfig) -> list[tuple[Stored, str | None]]:
    """What a surplus tensor may repeat: pairs of a part of it and the tensor of ``places`` that this part must equal.

    Instead of a name, None stands for what follows from the config: the frequencies of RoPE, or a bias of zero. The
    list is empty if the model says nothing about such a tensor.
    """

    def like(name: str, part: Stored) -> list[tuple[Stored, str | None]]:
        return [(part, name)] if name in places and places[name].shape == part.shape else []

    name = tensor.name
    older = name.replace(".mlp.", ".block_sparse_moe.")
    if name == HEAD and config.tied_embeddings:
        return like(TABLE, tensor)
    if older != name and older in places:
        return like(older, tensor)
    frequencies = re.fullmatch(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.inv_freq", name)
    if frequencies is not None:
        fits = int(frequencies[1] or 0) < config.layers and tensor.shape == (config.head_width // 2,)
        return [(tensor, None)] if fits else []
    if name.endswith(".bias"):
        of = places.get(name.removesuffix("bias") + "weight", places.get(older.removesuffix("bias") + "weight"))
        return [(tensor, None)] if of is not None and tensor.shape == of.shape[:1] else []
    fused = re.fullmatch(r"(model\.layers\.\d+\.block_sparse_moe\.experts\.)(gate_up_proj|down_proj)", older)
    if fused is not None:
        found: list[tuple[Stored, str | None]] = []
        for e in range(config.experts):
            for matrix in ("w2",) if fused[2] == "down_proj" else ("w1", "w3"):
                single = f"{fused[1]}{e}.{matrix}.weight"
                single = single if single in places else _newer(single)
                if single not in places:
                    return []
                part = _rows_of_fused(tensor, config.experts, e, MATRICES[matrix], places[single].shape)
                found.append((part, single))
        return found
    return []


def _is_implied(tensor: Stored, config: ModelConfig) -> bool:
    """Whether a tensor holds the frequencies of RoPE, or, if it is a bias, zeros."""
    values = np.zeros(tensor.shape, np.float32)
    safetensors_file.copy(tensor, values)
    if tensor.name.endswith(".bias"):
        return not values.any()
    exact = config.rope_theta ** (-2.0 * np.arange(config.head_width // 2) / config.head_width)
    # another program may round a power in the last digits of float32, and then to the type of the file
    step = {"F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-7}[tensor.dtype]
    return bool((np.abs(values - exact) <= step * exact + (2.0**-24 if tensor.dtype == "F16" else 0)).all())


def _rows_of_fused(fused: Stored, experts: int, e: int, matrix: str, shape: tuple[int, ...]) -> Stored:
    """The rows of down_proj (E, D, F) of expert e, or those of gate_up_proj (E, 2F, D) of its gate or up."""
    rows, columns = shape  # whole rows, so that the part is contiguous in the file
    rows_of_expert = rows if matrix == "down" else 2 * rows
    _check_shape(fused, (experts, rows_of_expert, columns))
    first = e * rows_of_expert + (rows if matrix == "up" else 0)
    part = fused._replace(shape=shape)
    return part._replace(start=fused.start + first * safetensors_file.size_of(part) // rows)


def _check_shape(tensor: Stored, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise UserError(
            f"{tensor.path} holds the tensor {tensor.name} with shape {tensor.shape}, but {CONFIG} asks for "
            f"{expected}: the two do not belong together."
        )


def _check_memory(config: ModelConfig) -> None:
    """Raises ``UserError`` if the weights are larger than this machine's memory."""
    available = resources.memory_bytes()
    needed = 4 * parameters.count(config).total
    if available is not None and needed > available:
        raise UserError(
            f"the model's {needed // 4:,} parameters take {needed / 1e9:,.1f} GB in float32, but this machine has "
            f"{available / 1e9:,.1f} GB: choose a smaller model, or leave its experts on the disk with --memory."
        )
