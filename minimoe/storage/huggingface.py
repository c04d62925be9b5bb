"""Models in the layout of Hugging Face's transformers: load a Mixtral or a Mistral, save a model for others to load.

    config.json                          huggingface_config
    model.safetensors                    the weights; or several files, which model.safetensors.index.json lists
    tokenizer.json                       huggingface_tokenizer

The names and the orientation differ. A matrix is (outputs, inputs) there and (inputs, outputs) here, so every matrix is
transposed; ``layout`` says, once for reading and writing, which tensor is which. RoPE pairs channels by halves in both.

Newer versions of transformers keep a layer's experts in two fused tensors, gate_up_proj (E, 2F, D) and down_proj
(E, D, F). Both forms can be read. The older form, with one tensor per matrix, is the one that is written, because all
versions can read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import resources, tree
from minimoe.core.arrays import Array, Device, placeholder, to_device, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.files import unwritable, write_atomically
from minimoe.cost import parameters
from minimoe.layers import attention, decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.storage import huggingface_config, safetensors_file
from minimoe.storage.huggingface_config import CONFIG, is_folder
from minimoe.storage.safetensors_file import Stored
from minimoe.text import huggingface_tokenizer
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer
from minimoe.text.tokenizer import Tokenizer

__all__ = ["Pretrained", "is_folder", "layout", "load", "load_params", "save"]

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


class Pretrained(NamedTuple):
    """A model that was trained elsewhere, ready to generate."""

    params: Decoder
    config: ModelConfig
    tokenizer: PretrainedTokenizer
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

    Raises:
        UserError: as for ``load_params``; or the tokenizer is missing or unreadable, or has more tokens than the model.
    """
    described = huggingface_config.read(folder)
    tokenizer = huggingface_tokenizer.load(folder)
    if tokenizer.vocab_size > described.config.vocab_size:
        raise UserError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens and a model of {described.config.vocab_size}: "
            "the two do not belong together."
        )
    params, config = load_params(folder)
    return Pretrained(params, config, tokenizer, described.end_tokens)


def load_params(folder: str | Path) -> tuple[Decoder, ModelConfig]:
    """The weights of a folder, on the host in float32, and their config.

    Everything that the files claim is checked before memory is allocated. However large the files are, memory holds at
    most the model and the tensor that is being copied.

    Raises:
        UserError: config.json is unreadable or describes something other than a Mixtral or a Mistral; a tensor is
            missing, surplus, or of another shape or type; a file is damaged or is outside the folder; the model does
            not fit into this machine's memory.
    """
    folder = Path(folder)
    config, dense, _ = huggingface_config.read(folder)
    stored = _describe(folder)
    surplus = set(stored)
    for name, place in layout(decoder.blank(config, placeholder), config, dense):
        surplus.discard(_find(stored, name, place.shape, config.experts, folder).name)
    if surplus:
        raise UserError(
            f"{folder} has a tensor {min(surplus)} that the model in its {CONFIG} has no place for: "
            "the two do not belong together."
        )
    _check_memory(config)
    params = decoder.blank(config, lambda shape: np.zeros(shape, np.float32))
    for name, place in layout(params, config, dense):
        safetensors_file.copy(_find(stored, name, place.shape, config.experts, folder), place)
    return params, config


def save(
    folder: str | Path,
    params: Decoder,
    config: ModelConfig,
    tokenizer: Tokenizer | PretrainedTokenizer | None = None,
    end_tokens: tuple[int, ...] = (),
) -> None:
    """Writes a folder that transformers and ``load`` can read, in float32. A folder with a config.json is complete.

    The router's trainable noise is left out, because it is used only in training. A model with a single expert is saved
    as a Mistral.

    Raises:
        UserError: the folder is not empty or cannot be written, or the model cannot be written as a Mixtral.
    """
    folder = Path(folder)
    values = huggingface_config.to_dict(config, end_tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty, and nothing in it is overwritten: choose a new folder.")
    except OSError as error:
        raise unwritable(folder, error) from None
    on_host = tree.map(to_host, params)
    safetensors_file.write(folder / MODEL, dict(layout(on_host, config, dense=config.experts == 1)))
    if tokenizer is not None:
        huggingface_tokenizer.write(folder, tokenizer)
    write_atomically(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def layout(params: Decoder, config: ModelConfig, dense: bool) -> Iterator[tuple[str, Array]]:
    """Yields every tensor of a folder: its name there, and a view of its place in ``params`` with its shape there.

    ``dense`` selects Mistral's layout, which has no router and does not number its only expert. Attention, router and
    experts state their own tensors, in ``mixtral_tensors``.
    """
    router: Any = moe.router_of(config)
    experts: Any = moe.experts_of(config)
    yield "model.embed_tokens.weight", params.embedding.table
    for i, block in enumerate(params.blocks):
        inside = [
            ("input_layernorm.weight", block.attention_norm.gain),
            *attention.mixtral_tensors(block.attention),
            ("post_attention_layernorm.weight", block.moe_norm.gain),
            *([] if dense else router.mixtral_tensors(block.moe.router)),
            *experts.mixtral_tensors(block.moe.experts, dense),
        ]
        for name, tensor in inside:
            yield f"model.layers.{i}.{name}", tensor
    yield "model.norm.weight", params.norm.gain
    if params.head is not None:
        yield "lm_head.weight", params.head.weight.T


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
    stored = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in safetensors_file.describe(folder / shard).items():
            if shard_of.get(name) != shard:
                raise UserError(
                    f"{folder / shard} has a tensor {name} that {INDEX} does not place there: download both again."
                )
            stored[name] = tensor
    lost = shard_of.keys() - stored.keys()
    if lost:
        raise UserError(
            f"{index} places the tensor {min(lost)} in {shard_of[min(lost)]}, which lacks it: download both again."
        )
    return stored


def _find(stored: dict[str, Stored], name: str, shape: tuple[int, ...], experts: int, folder: Path) -> Stored:
    """The tensor ``name`` under its older or newer name, or as rows of a fused one; ``UserError`` if there is none."""
    newer = name.replace(".block_sparse_moe.", ".mlp.")
    tensor = stored.get(name) or stored.get(newer)
    if tensor is not None:
        _check_shape(tensor, shape)
        return tensor
    expert = re.fullmatch(r"(.*\.mlp\.experts\.)(\d+)\.(w[123])\.weight", newer)
    if expert is not None:
        prefix, e, matrix = expert.groups()
        fused = stored.get(prefix + ("down_proj" if matrix == "w2" else "gate_up_proj"))
        if fused is not None:
            return _rows_of_fused(fused, experts, int(e), matrix, shape)
    raise UserError(f"{folder} lacks the tensor {name} of the model in its {CONFIG}: download the missing file.")


def _rows_of_fused(fused: Stored, experts: int, e: int, matrix: str, shape: tuple[int, ...]) -> Stored:
    """The rows of down_proj (E, D, F) that are w2 of expert e, or of gate_up_proj (E, 2F, D) that are its w1 or w3."""
    rows, columns = shape  # whole rows, so that the part is contiguous in the file
    rows_of_expert = rows if matrix == "w2" else 2 * rows
    _check_shape(fused, (experts, rows_of_expert, columns))
    first = e * rows_of_expert + (rows if matrix == "w3" else 0)
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
            f"{available / 1e9:,.1f} GB: choose a smaller model."
        )
